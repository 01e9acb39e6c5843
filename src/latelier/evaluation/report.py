"""`report.html`: one self-contained page with everything that came of a run. Missing parts are simply absent."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import yaml

from latelier.errors import LatelierError
from latelier.evaluation import report_latents as latents
from latelier.evaluation.chart import line_chart, short
from latelier.evaluation.page import anchor, in_words, inline_image, page, section
from latelier.evaluation.report_metrics import key_numbers, metrics_tables
from latelier.evaluation.verdict import experience, verdict

STAGES = ("tokenizer", "denoiser")
MACHINE = ("grad_norm", "lr", "images_per_second", "memory_gb")  # logged quantities that are not loss terms
NOT_CURVES = ("stage", "images", "seconds")
TITLES = {"grad_norm": "gradient norm", "lr": "learning rate", "images_per_second": "images per second",
          "memory_gb": "memory, GB"}  # fmt: skip
MOST_PREVIEWS, MOST_THUMBS, MOST_SKIPPED = 12, 32, 20
ERROR_WORDS = "Originals, reconstructions, and where they differ: the same scale for every tokenizer."

Row = dict[str, Any]


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run folder and return its path.

    Args:
        folder: the run folder; reads recipe.yaml, log.jsonl, previews/, samples/, metrics.json, skipped.jsonl and the
            images, as far as they exist.

    Raises:
        LatelierError: if the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise LatelierError(f"There is no run folder {folder} to report on.")
    recipe = _read_recipe(folder / "recipe.yaml")
    log = read_log(folder / "log.jsonl")
    metrics = _read_json(folder / "metrics.json")
    words = latents.show_verdict(verdict(metrics), experience(metrics))
    sections = {
        "Samples": _samples(folder / "samples"),
        "Reconstructions": _reconstructions(folder / "previews"),
        "Noise on latents": latents.show_noise(metrics),
        "Channels": latents.show_prefixes(metrics) + latents.show_channels(metrics),
        "Latent space": latents.show_images(folder) + latents.show_distribution(metrics),
        "Metrics": metrics_tables(metrics),
        "Training": _training(log),
        "Previews": _previews(folder / "previews"),
        "Skipped files": _skipped(folder / "skipped.jsonl"),
        "Recipe": _recipe_text(folder / "recipe.yaml"),
    }
    present = {title: body for title, body in sections.items() if body}
    name = str(recipe.get("name", folder.resolve().name))
    body = _head(name, recipe, [*(["Verdict"] if words else []), *present])
    body += (section("Verdict", words) if words else "") + _tiles(log, metrics)
    body += "".join(section(title, part) for title, part in present.items())
    path = folder / "report.html"
    partial = folder / f".report.html.{os.getpid()}.tmp"
    partial.write_text(page(name, body), encoding="utf-8")
    partial.replace(path)
    return path


def read_log(path: Path) -> dict[str, list[Row]]:
    """Log lines by stage in the order in which they began, ascending in images seen.

    A resumed run writes again what it had logged after its checkpoint; the later line counts. Half-written lines are
    left out.
    """
    stages: dict[str, list[Row]] = {}
    for row in _read_lines(path):
        if not isinstance(row.get("images"), int | float):
            continue
        rows = stages.setdefault(str(row.get("stage", "training")), [])
        while rows and rows[-1]["images"] >= row["images"]:
            rows.pop()
        rows.append(row)
    return stages


# -- sections ---------------------------------------------------------------------------------------------------------


def _head(name: str, recipe: Row, titles: list[str]) -> str:
    """Name, one sentence, links."""
    parts = [_model_words(_section(recipe, stage)) for stage in STAGES]
    data = _section(recipe, "data")
    size = data.get("image_size")
    on = f"on {data.get('source')}" + (f" at {_pixels(size)}" if size else "") if data.get("source") else ""
    sentence = " ".join(part for part in (" + ".join(p for p in parts if p), on) if part)
    links = "".join(f'<a href="#{anchor(title)}">{escape(title)}</a>' for title in titles)
    return f'<header><h1>{escape(name)}</h1><p class="soft">{escape(sentence)}</p><nav>{links}</nav></header>'


def _tiles(log: Mapping[str, list[Row]], metrics: Row) -> str:
    """Key numbers: what was seen in training, and what was measured."""
    tiles = [(f"{short(rows[-1]['images'])}", f"images seen, {stage}") for stage, rows in log.items() if rows]
    seconds = sum(_number(row.get("seconds")) for rows in log.values() for row in rows)
    if seconds:
        tiles.append((_duration(seconds), "training time"))
    tiles += key_numbers(metrics)
    blocks = "".join(f'<div class="tile"><b>{escape(b)}</b><span>{escape(s)}</span></div>' for b, s in tiles)
    return f'<div class="tiles">{blocks}</div>'


def _samples(folder: Path) -> str:
    """The grid (or single images), and beside it the nearest training images."""
    grid, near, asked = (folder / f"{name}.png" for name in ("grid", "nearest", "asked"))
    left = ""
    if grid.is_file():
        left = f'<div class="big">{inline_image(grid, "samples")}</div>'
    else:
        singles = [path for path in sorted(folder.glob("*.png")) if path not in (near, asked)][:MOST_THUMBS]
        left = (
            f'<div class="thumbs">{"".join(inline_image(path, path.stem) for path in singles)}</div>' if singles else ""
        )
    told = folder / "asked.txt"
    captions = escape(told.read_text()).replace("\n", " · ") if told.is_file() else ""
    above = (
        f'<h3>Asked for, drawn, original</h3><div class="big">{inline_image(asked, "asked, drawn, original")}</div>'
        f'<p class="soft">{captions}</p>'
        if asked.is_file()
        else ""
    )
    if not near.is_file():
        return above + left
    return (
        f'{above}<div class="two">{f"<div><h3>Generated</h3>{left}</div>" if left else ""}<div class="big">'
        "<h3>Samples (upper rows) above their nearest training images (lower rows)</h3>"
        f"{inline_image(near, 'samples above nearest training images')}"
        '<p class="soft">Pairs that look the same are remembered rather than invented.</p></div></div>'
    )


def _reconstructions(folder: Path) -> str:
    final, errors = folder.parent / "reconstructions.png", folder.parent / "error-map.png"
    if final.is_file():
        shown = (
            '<p class="soft">Held-out originals above their reconstructions.</p>'
            f'<div class="big">{inline_image(final, "originals above reconstructions")}</div>'
        )
        return shown + (
            f'<div class="big">{inline_image(errors, ERROR_WORDS)}</div><p class="soft">{ERROR_WORDS}</p>'
            if errors.is_file()
            else ""
        )
    paths = _preview_files(folder, "tokenizer")
    if not paths:
        return ""
    images, path = paths[-1]
    return (
        f'<p class="soft">Originals above their reconstructions, after {short(images)} images.</p>'
        f'<div class="big">{inline_image(path, "originals above reconstructions")}</div>'
    )


def _previews(folder: Path) -> str:
    """What each stage showed on the way."""
    stages = {path.stem.rpartition("-")[0] for path in folder.glob("*-*.png")}
    parts = []
    for stage in sorted(stages, key=lambda s: (s == "denoiser", s != "tokenizer", s)):
        paths = _spread(_preview_files(folder, stage), MOST_PREVIEWS)
        if len(paths) < 2 and stage == "tokenizer":
            continue  # shown already
        figures = "".join(
            f"<figure><figcaption>{short(n)} images</figcaption>{inline_image(path, f'{stage} at {n}')}</figure>"
            for n, path in paths
        )
        parts.append(f'<h3>{stage}</h3><div class="strip">{figures}</div>' if figures else "")
    return "".join(parts)


def _training(log: Mapping[str, list[Row]]) -> str:
    """Curves of loss terms, then of the machine, for each stage."""
    parts = []
    for stage, rows in log.items():
        names = list(dict.fromkeys(key for row in rows for key in row if key not in NOT_CURVES))
        terms = sorted((n for n in names if n not in MACHINE), key=lambda n: (n != "loss", n))
        charts = [_curve(rows, name) for name in terms]
        machine = [_curve(rows, name) for name in MACHINE if name in names]
        parts.append(f'<h3>{escape(stage)}, over images seen</h3><div class="charts">{"".join(charts)}</div>')
        if any(machine):
            parts.append(
                f"<details><summary>Gradients, learning rate, speed, memory</summary>"
                f'<div class="charts">{"".join(machine)}</div></details>'
            )
    return "".join(parts)


def _curve(rows: list[Row], name: str) -> str:
    points = [(float(r["images"]), float(r[name])) for r in rows if isinstance(r.get(name), int | float)]
    return line_chart(TITLES.get(name, name), points, smooth=name != "lr")


def _skipped(path: Path) -> str:
    rows = _read_lines(path)
    if not rows:
        return ""
    shown = rows[:MOST_SKIPPED]
    keys = list(dict.fromkeys(key for row in shown for key in row))
    head = "".join(f"<th>{escape(key)}</th>" for key in keys)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(in_words(row.get(key, '')))}</td>" for key in keys) + "</tr>" for row in shown
    )
    more = f'<p class="soft">and {len(rows) - len(shown):,} more in skipped.jsonl</p>' if len(rows) > len(shown) else ""
    return (
        f"<details><summary>{len(rows):,} unreadable image{'s' * (len(rows) != 1)} left out</summary>"
        f'<div class="card scroll"><table><tr>{head}</tr>{body}</table></div>{more}</details>'
    )


def _recipe_text(path: Path) -> str:
    if not path.is_file():
        return ""
    text = escape(path.read_text(encoding="utf-8", errors="replace"))
    return f'<details><summary>Show the whole recipe</summary><div class="card"><pre>{text}</pre></div></details>'


# -- reading and wording ----------------------------------------------------------------------------------------------


def _read_lines(path: Path) -> list[Row]:
    """Dicts of a JSON-lines file, without lines that a killed process left half written."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _read_json(path: Path) -> Row:
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content if isinstance(content, dict) else {}


def _read_recipe(path: Path) -> Row:
    content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content if isinstance(content, dict) else {}


def _section(recipe: Row, key: str) -> Row:
    value = recipe.get(key)
    return value if isinstance(value, dict) else {}


def _preview_files(folder: Path, stage: str) -> list[tuple[int, Path]]:
    """(images seen, file) of a stage's previews, ascending."""
    found = ((re.fullmatch(rf"{stage}-(\d+)", path.stem), path) for path in folder.glob(f"{stage}-*.png"))
    return sorted((int(match[1]), path) for match, path in found if match)


def _spread(items: list[Any], most: int) -> list[Any]:
    """First, last and evenly between."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _model_words(section: Row) -> str:
    words = [section.get("kind"), section.get("preset") or section.get("size") or section.get("path")]
    return " ".join(str(word) for word in words if word)


def _pixels(size: Any) -> str:
    sides = size if isinstance(size, list) else [size, size]
    return " x ".join(map(str, sides)) + " px"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0
