"""`report.html`: one self-contained page with everything that came of a run. Missing parts are simply absent."""

from __future__ import annotations

import base64
import importlib.resources
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
from latelier.evaluation.chart import line_chart, short

STAGES = ("tokenizer", "denoiser")
MACHINE = ("grad_norm", "lr", "images_per_second", "memory_gb")  # logged quantities that are not loss terms
NOT_CURVES = ("stage", "images", "seconds")
TITLES = {"grad_norm": "gradient norm", "lr": "learning rate", "images_per_second": "images per second",
          "memory_gb": "memory, GB"}  # fmt: skip
BETTER = {"l1": "lower", "lpips": "lower", "rfd": "lower", "gfd": "lower", "psnr": "higher", "ssim": "higher",
          "precision": "higher", "recall": "higher", "fd": "lower", "match": "higher", "score": "higher",
          "gmm": "lower", "probe": "higher", "knn": "higher", "diffusion": "lower"}  # fmt: skip
UNITS = {"gmm-nll": "nats per principal component", "gmm-modes": "Gaussians", "effective-rank": "directions",
         "channel-rank": "directions", "probe": "share of pictures", "knn": "share of pictures",
         "diffusion-loss": "squared error of the velocity"}  # fmt: skip
LATENT_PICTURES = {
    "latent-map.png": "One point for each held-out picture: its latents, in two dimensions.",
    "channels.png": "Pictures, and below each how large its latents are: means over groups of neighbouring channels.",
}
MOST_PREVIEWS, MOST_THUMBS, MOST_SKIPPED = 12, 32, 20
ZOOM = """
const box = document.querySelector("dialog");
document.querySelectorAll("main img").forEach(i => i.onclick = () => { box.firstChild.src = i.src; box.showModal(); });
box.onclick = () => box.close();
"""

Row = dict[str, Any]


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run folder and return its path.

    Args:
        folder: the run folder; reads recipe.yaml, log.jsonl, previews/, samples/, metrics.json and skipped.jsonl, as
            far as they exist.

    Raises:
        LatelierError: if the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise LatelierError(f"There is no run folder {folder} to report on.")
    recipe = _read_recipe(folder / "recipe.yaml")
    log = read_log(folder / "log.jsonl")
    metrics = _read_json(folder / "metrics.json")
    sections = {
        "Samples": _samples(folder / "samples"),
        "Reconstructions": _reconstructions(folder / "previews"),
        "Metrics": _metrics(metrics),
        "Noise on latents": _curves(metrics),
        "Latent space": _latent_space(folder, metrics),
        "Training": _training(log),
        "Previews": _previews(folder / "previews"),
        "Skipped files": _skipped(folder / "skipped.jsonl"),
        "Recipe": _recipe_text(folder / "recipe.yaml"),
    }
    present = {title: body for title, body in sections.items() if body}
    name = str(recipe.get("name", folder.resolve().name))
    body = _head(name, recipe, log, metrics, list(present)) + "".join(
        f'<section id="{_anchor(title)}"><h2>{escape(title)}</h2>{part}</section>' for title, part in present.items()
    )
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


def _head(name: str, recipe: Row, log: Mapping[str, list[Row]], metrics: Row, titles: list[str]) -> str:
    """Name, one sentence, key numbers, links."""
    parts = [_model_words(_section(recipe, stage)) for stage in STAGES]
    data = _section(recipe, "data")
    size = data.get("image_size")
    on = f"on {data.get('source')}" + (f" at {_pixels(size)}" if size else "") if data.get("source") else ""
    sentence = " ".join(part for part in (" + ".join(p for p in parts if p), on) if part)
    tiles = [(f"{short(rows[-1]['images'])}", f"images seen, {stage}") for stage, rows in log.items() if rows]
    seconds = sum(_number(row.get("seconds")) for rows in log.values() for row in rows)
    if seconds:
        tiles.append((_duration(seconds), "training time"))
    for entries in metrics.values():
        for metric, entry in entries.items() if isinstance(entries, dict) else ():
            curve = metric.startswith("gmm-nll@")  # shown as one, further down
            if isinstance(entry, dict) and isinstance(entry.get("value"), int | float) and not curve:
                tiles.append((_digits(entry["value"]), metric))
    links = "".join(f'<a href="#{_anchor(title)}">{escape(title)}</a>' for title in titles)
    blocks = "".join(f'<div class="tile"><b>{escape(b)}</b><span>{escape(s)}</span></div>' for b, s in tiles)
    return (
        f'<header><h1>{escape(name)}</h1><p class="soft">{escape(sentence)}</p><nav>{links}</nav></header>'
        f'<div class="tiles">{blocks}</div>'
    )


def _samples(folder: Path) -> str:
    """The grid (or single pictures), and beside it the nearest training pictures."""
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
        "<h3>Samples (upper rows) above their nearest training pictures (lower rows)</h3>"
        f"{inline_image(near, 'samples above nearest training pictures')}"
        '<p class="soft">Pairs that look the same are remembered rather than invented.</p></div></div>'
    )


def _reconstructions(folder: Path) -> str:
    final = folder.parent / "reconstructions.png"
    if final.is_file():
        return (
            '<p class="soft">Held-out originals above their reconstructions.</p>'
            f'<div class="big">{inline_image(final, "originals above reconstructions")}</div>'
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


def _metrics(metrics: Row) -> str:
    """One table; each row opens to its receipt."""
    parts = []
    for section, entries in metrics.items():
        if not isinstance(entries, dict):
            continue
        rows = "".join(_metric(name, entry) for name, entry in entries.items() if isinstance(entry, dict))
        parts.append(
            f'<h3>{escape(section)}</h3><div class="card scroll metrics"><table><tr><th>Metric</th>'
            f'<th class="number">Value</th><th class="number">95 % interval</th><th>Receipt</th></tr>'
            f"{rows}</table></div>"
            if rows
            else ""
        )
    return "".join(parts)


def _metric(name: str, entry: Row) -> str:
    receipt = entry.get("receipt") or {}
    interval = entry.get("interval")
    between = f"{_digits(interval[0])} to {_digits(interval[1])}" if interval else ""
    better = next((BETTER[part] for part in name.split("-") if part in BETTER), None)
    unit = next((words for begin, words in UNITS.items() if name.startswith(begin)), None)
    said = "; ".join(filter(None, [f"{better} is better" if better else "", unit]))
    warning = f'<div><span class="note">{escape(str(receipt["warning"]))}</span></div>' if "warning" in receipt else ""
    summary = ", ".join(
        [f"n = {receipt['n']:,}" if isinstance(receipt.get("n"), int) else ""] * ("n" in receipt)
        + [str(receipt.get("reference"))] * ("reference" in receipt)
    )
    return (
        f"<tr><td>{escape(name)}{f'<br><span class=soft>{said}</span>' if said else ''}</td>"
        f'<td class="number value">{escape(_digits(entry.get("value")))}</td><td class="number">{escape(between)}</td>'
        f"<td>{warning}<details><summary>{escape(summary or 'receipt')}</summary>{_list(receipt)}</details></td></tr>"
    )


def _curves(metrics: Row) -> str:
    """What noise on the latents does, for each metric that has a curve."""
    charts = [
        line_chart(name.removeprefix("smoothness-"), [(x, y) for x, y in receipt["curve"]], False, "noise level")
        for name, receipt in _receipts(metrics).items()
        if name.startswith("smoothness-") and receipt.get("curve")
    ]
    if not charts:
        return ""
    words = "Noise in standard deviations of each latent channel; the smoother the latent space, the flatter the line."
    return f'<p class="soft">{words}</p><div class="charts">{"".join(charts)}</div>'


def _latent_space(folder: Path, metrics: Row) -> str:
    """Pictures of the latents, and what has a curve: mixtures, the small denoiser's loss, prefixes of the channels."""
    receipts = _receipts(metrics)
    mixtures = ((name, receipts[name].get("modes")) for name in receipts if name.startswith("gmm-nll@"))
    modes = sorted((k, name) for name, k in mixtures if isinstance(k, int))
    values = {name: entry.get("value") for entries in _sections(metrics) for name, entry in entries.items()}
    likelihoods = [(k, float(y)) for k, name in modes if isinstance(y := values[name], int | float)]
    losses = [(t, y) for t, y in receipts.get("diffusion-loss", {}).get("by_time") or ()]
    charts = line_chart("GMM negative log-likelihood", likelihoods, False, "number of modes")
    charts += line_chart("loss of a small denoiser", losses, False, "time, from data to noise")
    for metric in ("psnr", "lpips"):
        lengths = sorted((about["prefix"], name) for name, about in receipts.items() if f"prefix-{metric}@" in name)
        points = [(k, float(y)) for k, name in lengths if isinstance(y := values[name], int | float)]
        charts += line_chart(f"{metric} of prefixes", points, False, "channels that are decoded")
    shown = ""
    for name, words in LATENT_PICTURES.items():
        if (folder / name).is_file():
            shown += f'<div class="big">{inline_image(folder / name, words)}</div><p class="soft">{words}</p>'
    if charts:
        shown += '<p class="soft">Left to right: more modes of the mixture; more noise; more channels.</p>'
        shown += f'<div class="charts">{charts}</div>'
    return shown


def _sections(metrics: Row) -> list[dict[str, Row]]:
    """The sections' entries, as far as they are what they should be."""
    dicts = (entries for entries in metrics.values() if isinstance(entries, dict))
    return [{name: entry for name, entry in entries.items() if isinstance(entry, dict)} for entries in dicts]


def _receipts(metrics: Row) -> dict[str, Row]:
    """The receipt of each number."""
    return {name: entry.get("receipt") or {} for entries in _sections(metrics) for name, entry in entries.items()}


def _list(values: Mapping[str, Any]) -> str:
    """A definition list; nested values in one line."""
    rows = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(in_words(v))}</dd>" for k, v in values.items())
    return f"<dl>{rows}</dl>"


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
        f"<details><summary>{len(rows):,} unreadable picture{'s' * (len(rows) != 1)} left out</summary>"
        f'<div class="card scroll"><table><tr>{head}</tr>{body}</table></div>{more}</details>'
    )


def _recipe_text(path: Path) -> str:
    if not path.is_file():
        return ""
    text = escape(path.read_text(encoding="utf-8", errors="replace"))
    return f'<details><summary>Show the whole recipe</summary><div class="card"><pre>{text}</pre></div></details>'


def page(name: str, body: str) -> str:
    style = importlib.resources.files("latelier.evaluation").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)} · latelier</title><style>{style}</style></head><body><main>{body}"
        f'<footer>Written by latelier. Click a picture to enlarge it.</footer></main><dialog><img alt=""></dialog>'
        f"<script>{ZOOM}</script></body></html>"
    )


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


def inline_image(path: Path, words: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(words)}" loading="lazy">'


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z]+", "-", title.lower())


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


def _digits(value: Any) -> str:
    """Four significant digits, never in powers of ten for everyday sizes."""
    if not isinstance(value, int | float):
        return str(value)
    if not math.isfinite(value) or value == 0 or not 1e-4 <= abs(value) < 1e7:
        return f"{value:.4g}"
    return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {in_words(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return (
            " x ".join(map(in_words, value))
            if all(isinstance(v, int) for v in value)
            else ", ".join(map(in_words, value))
        )
    return "none" if value is None else str(value)
