"""`report.html`: one self-contained page with everything that came of a run. Missing parts are simply absent."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from latelier.errors import LatelierError
from latelier.evaluation.metrics import FOLLOWED, METRICS, better, heading, unit
from latelier.evaluation.results import AT_MOST, LEFT_OUT, NOT_REACHED
from latelier.publish import write_whole
from latelier.report.diffusability import experience
from latelier.report.figures import CHANNELS, ERRORS, MAP, SPECTRUM
from latelier.report.measures import Measures, read_entries
from latelier.report.page import Chart, at_a_glance, bar_chart, digits, line_chart, number, render, short
from latelier.report.verdict import verdict

STAGES = ("tokenizer", "denoiser")
MACHINE = {"grad_norm": "gradient norm", "lr": "learning rate", "images_per_second": "images per second",
           "memory_gb": "memory, GB"}  # logged quantities that are not loss terms  # fmt: skip
NOT_CURVES = ("stage", "images", "seconds")
MOST_PREVIEWS, MOST_THUMBS, MOST_SKIPPED = 12, 32, 20
LONG = ("latent space", "cost")  # sections with dozens of numbers, of which headlines stand in front
BARS = {"latent-std": "std of raw latents", "posterior-std": "std of the posterior",
        "kl-bits-per-pixel": "KL, nats per number", "channel-sparsity": "sparsity (Hoyer)",
}  # metrics whose receipts have a value for each channel  # fmt: skip
SPECTRA = {"effective-rank": "spectrum of whole latents", "channel-rank": "spectrum of channels"}
ROUNDING = 1e-8  # shares of the variance below it are none

Row = dict[str, Any]
Charts = list[tuple[str, list[Chart]]]  # charts side by side below a sentence


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run folder from the files that it has, and return its path.

    Raises:
        LatelierError: if the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise LatelierError(f"There is no run folder {folder} to report on.")
    file = folder / "recipe.yaml"
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    recipe = _dict(yaml.safe_load(text))
    log = read_log(folder / "log.jsonl")
    metrics = _dict(json.loads(path.read_text())) if (path := folder / "metrics.json").is_file() else {}
    measures, skipped = Measures(metrics), _read_lines(folder / "skipped.jsonl")
    rows = skipped[:MOST_SKIPPED]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    receipts = Measures({title: entries for title, entries in metrics.items() if title != "generation"}).receipts
    of = next((f" ({receipt['reference']})" for receipt in receipts.values() if "reference" in receipt), "")
    sections = {
        "Samples": _samples(folder / "samples"),
        "Reconstructions": _reconstructions(folder, of),
        "Noise on latents": _noise(measures),
        "Channels": _prefixes(measures) + _channels(measures),
        "Latent space": _latent_space(folder, measures, of),
        "Convergence": _convergence(measures),
        "Metrics": _metrics(metrics),
        "Training": [_training(stage, rows) for stage, rows in log.items()],
        "Previews": _previews(folder / "previews"),
        "Skipped files": {"count": len(skipped), "rows": rows, "columns": columns} if skipped else {},
        "Recipe": text,
    }
    head = {
        "title": str(recipe.get("name", folder.resolve().name)), "sentence": _sentence(recipe),
        "findings": verdict(metrics), "experience": experience(metrics), "tiles": _tiles(log, metrics),
    }  # fmt: skip
    filled = {title: content for title, content in sections.items() if content}
    return write_whole(folder / "report.html", render("run.html.j2", **head, sections=filled))


def read_log(path: Path) -> dict[str, list[Row]]:
    """Log lines by stage, ascending in images seen; a resumed run logs some steps again, whose later line counts."""
    stages: dict[str, list[Row]] = {}
    for row in (row for row in _read_lines(path) if isinstance(row.get("images"), int | float)):
        rows = stages.setdefault(str(row.get("stage", "training")), [])
        while rows and rows[-1]["images"] >= row["images"]:
            rows.pop()
        rows.append(row)
    return stages


def _sentence(recipe: Row) -> str:
    """`vmae small + dit S on photos at 64 x 64 px`, as far as the recipe says it."""
    models = []
    for section in (_dict(recipe.get(stage)) for stage in STAGES):
        words = [section.get("kind"), section.get("preset") or section.get("size") or section.get("path")]
        models.append(" ".join(str(word) for word in words if word))
    data = _dict(recipe.get("data"))
    sides = size if isinstance(size := data.get("image_size"), list) else [size, size]
    at = f" at {' x '.join(map(str, sides))} px" if size else ""
    on = f"on {data['source']}{at}" if data.get("source") else ""
    return " ".join(part for part in (" + ".join(filter(None, models)), on) if part)


def _tiles(log: Mapping[str, list[Row]], metrics: Row) -> list[tuple[str, str]]:
    """(number, words): what was seen in training and, of what was measured, the headlines; no points of curves."""
    tiles = [(short(rows[-1]["images"]), f"images seen, {stage}") for stage, rows in log.items() if rows]
    if seconds := sum(number(row.get("seconds")) or 0.0 for rows in log.values() for row in rows):
        long = f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"
        tiles.append((f"{seconds:.0f} s" if seconds < 120 else long, "training time"))
    headlines = {name for metric in METRICS.values() for name in metric.headline}
    for title, entries in read_entries(metrics).items():
        for name, entry in entries.items():
            value = number(entry.get("value"))
            if value is not None and "@" not in name and (title not in LONG or name in headlines):
                tiles.append((at_a_glance(value), " · ".join(filter(None, (heading(name), unit(name))))))
    return tiles


def _samples(folder: Path) -> Row:
    """The grid (or single images, with their classes), the conditions, and the nearest training images."""
    files = {name: folder / f"{name}.png" for name in ("grid", "nearest", "conditions")}
    found: Row = {name: path if path.is_file() else None for name, path in files.items()}
    singles = [] if found["grid"] else [path for path in sorted(folder.glob("*.png")) if path not in files.values()]
    labelled = _labelled(folder)[:MOST_THUMBS]
    captions = text.read_text().replace("\n", " · ") if (text := folder / "conditions.txt").is_file() else ""
    if not singles and not any(found.values()):
        return {}
    return {**found, "singles": singles[:MOST_THUMBS], "labelled": labelled, "captions": captions}


def _labelled(folder: Path) -> list[tuple[Path, str]]:
    """The last samples and their classes, where the model is conditioned on nothing else."""
    files = (folder / "settings.json", folder.parent / "pipeline" / "conditioner" / "config.json")
    settings, config = (_dict(json.loads(file.read_text())) if file.is_file() else {} for file in files)
    if not settings or config.get("_class_name") != "ClassConditioner":
        return []
    known = list(map(str, config["names"] or range(config["num_classes"])))
    asked = [str(one) for one in settings["classes"] or range(config["num_classes"])]
    labels = [one if one in known else known[int(one)] for one in asked]
    paths = (folder / f"{settings['seed'] + i:06d}.png" for i in range(settings["count"]))
    return [(path, labels[i % len(labels)]) for i, path in enumerate(paths) if path.is_file()]


def _reconstructions(folder: Path, images: str) -> list[tuple[Path, str]]:
    """The final ones, of `images`, and their errors; while training goes on, the last preview."""
    words = "Originals, reconstructions, and where they differ: the same scale for every tokenizer."
    final, errors = folder / "reconstructions.png", folder / ERRORS
    if final.is_file():
        found = [(final, f"Originals above their reconstructions{images}.")]
        return [*found, (errors, words)] if errors.is_file() else found
    previews = _preview_files(folder / "previews", "tokenizer")[-1:]
    return [(path, f"Originals above their reconstructions, after {short(seen)} images.") for seen, path in previews]


def _previews(folder: Path) -> dict[str, list[tuple[int, Path]]]:
    """What each stage showed on the way: first, last and evenly between; a tokenizer's only one is shown already."""
    stages = {path.stem.rpartition("-")[0] for path in folder.glob("*-*.png")}
    found = {}
    for stage in sorted(stages, key=lambda s: (s == "denoiser", s != "tokenizer", s)):
        files = _preview_files(folder, stage)
        if len(files) > MOST_PREVIEWS:
            files = [files[round(i * (len(files) - 1) / (MOST_PREVIEWS - 1))] for i in range(MOST_PREVIEWS)]
        if len(files) > (stage == "tokenizer"):
            found[stage] = files
    return found


def _preview_files(folder: Path, stage: str) -> list[tuple[int, Path]]:
    """(images seen, file) of a stage's previews, ascending."""
    found = ((re.fullmatch(rf"{stage}-(\d+)", path.stem), path) for path in folder.glob(f"{stage}-*.png"))
    return sorted((int(match[1]), path) for match, path in found if match)


def _noise(measures: Measures) -> Charts:
    """What noise on the latents does, for each metric that has a curve."""
    charts = [
        line_chart(name.removeprefix("smoothness-"), [(x, y) for x, y in receipt["curve"]], False, "noise level")
        for name, receipt in measures.receipts.items()
        if name.startswith("smoothness-") and receipt.get("curve")
    ]
    words = "Noise in standard deviations of each latent channel; the smoother the latent space, the flatter the line."
    return _group(words, charts)


def _prefixes(measures: Measures) -> Charts:
    """Quality of images over how many of the first channels they are decoded from."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for name, value in measures.begin("prefix-").items():
        if (length := measures.about(name, "prefix")) is not None:
            curves.setdefault(name.removeprefix("prefix-").partition("@")[0], []).append((length, value))
    over = "channels that are decoded"
    charts = [line_chart(f"{metric} of prefixes", sorted(points), False, over) for metric, points in curves.items()]
    words = "Images decoded from the first channels alone, more of them from left to right. Where channels are in "
    return _group(f"{words}order, a few show most of the image.", charts)


def _channels(measures: Measures) -> Charts:
    """A bar for each channel: scale, noise of the posterior, sparsity."""
    found = ((words, measures.about(name, "by_channel")) for name, words in BARS.items())
    charts = [bar_chart(words, [float(y) for y in channels], "channel") for words, channels in found if channels]
    return _group("One bar for each channel; the line is their median, outliers have another colour.", charts)


def _latent_space(folder: Path, measures: Measures, of: str) -> Row:
    """Images of latents; mixtures over their number of modes, a small denoiser's loss over time, spectra."""
    map_words = f"One point for each image{of}: its latents, in two dimensions."
    channel_words = "Images, and below each how large its latents are: means over groups of neighbouring channels."
    spectrum_words = (
        "Latents beside images of the same size. The flatter line has more fine detail, which is learnt late."
    )
    images = [(folder / MAP, map_words, "figure map"), (folder / SPECTRUM, spectrum_words, "figure big")]
    images += [(folder / CHANNELS, channel_words, "big")]
    modes = sorted((measures.about(name, "modes"), y) for name, y in measures.begin("gmm-nll@").items())
    losses = [(t, y) for t, y in measures.about("diffusion-loss", "by_time") or ()]
    charts = [
        line_chart("GMM negative log-likelihood", modes, False, "number of modes"),
        line_chart("loss of a small denoiser", losses, False, "time, from data to noise"),
    ]
    for name, words in SPECTRA.items():
        points = [(i, share) for i, share in measures.about(name, "spectrum") or () if share > ROUNDING]
        charts.append(line_chart(words, points, False, "directions, the largest first"))
    words = "Left to right: more modes of the mixture; more noise; smaller directions."
    found = {"images": [image for image in images if image[0].is_file()], "charts": _group(words, charts)}
    return found if any(found.values()) else {}


def _convergence(measures: Measures) -> Charts:
    """What was measured while the denoiser was trained, and how many images a quality took."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for name, height in measures.begin(FOLLOWED).items():
        curves.setdefault(name.partition("@")[0], []).append((measures.number(name, "images_trained"), height))
    charts = [line_chart(heading(name).removeprefix(FOLLOWED), sorted(ps), False) for name, ps in curves.items()]
    words = "The averaged weights, while the denoiser was trained. "
    for name in (name for name in measures.receipts if name.startswith("images-to-")):
        level = " ".join(name.removeprefix("images-to-").rsplit("-", 1))
        bound = f"{AT_MOST} " if measures.about(name, AT_MOST) else ""
        missed = measures.about(name, NOT_REACHED)
        words += f"{missed}. " if missed else f"{level} was reached after {bound}{measures[name]:,.0f} images. "
    return _group(words.strip(), charts)


def _group(words: str, charts: Iterable[Chart | None]) -> Charts:
    """Charts below a sentence; nothing where there is none."""
    drawn = [chart for chart in charts if chart is not None]
    return [(words, drawn)] if drawn else []


def _metrics(metrics: Row) -> dict[str, list[Row]]:
    """A row for each number of each section; it opens to its receipt."""
    tables = {title: [_row(*item) for item in entries.items()] for title, entries in read_entries(metrics).items()}
    return {title: rows for title, rows in tables.items() if rows}


def _row(name: str, entry: Row) -> Row:
    receipt, interval, side = entry.get("receipt") or {}, entry.get("interval"), better(name)
    n = f"n = {receipt['n']:,}" if isinstance(receipt.get("n"), int) else ""
    summary = ", ".join([n] * ("n" in receipt) + [str(receipt.get("reference"))] * ("reference" in receipt))
    return {
        "name": name, "value": digits(entry.get("value")), "summary": summary or "receipt", "receipt": receipt,
        "about": "; ".join(filter(None, [f"{side} is better" if side else "", unit(name)])),
        "interval": " to ".join(map(digits, interval or ())),
        "warning": str(receipt.get(LEFT_OUT) or receipt.get(NOT_REACHED) or receipt.get("warning", "")),
    }  # fmt: skip


def _training(stage: str, rows: list[Row]) -> tuple[str, list[Chart], list[Chart]]:
    """Curves of loss terms, the whole loss first if it is not one of them, then of the machine."""
    names = dict.fromkeys(key for row in rows for key in row if key not in NOT_CURVES)
    terms = sorted((name for name in names if name not in MACHINE), key=lambda name: (name != "loss", name))
    if any(all(row.get(name) == row.get("loss") for row in rows) for name in terms[1:]):
        terms.remove("loss")

    def curves(names: Iterable[str]) -> Iterator[Chart | None]:
        for name in names:
            points = [(float(r["images"]), float(r[name])) for r in rows if isinstance(r.get(name), int | float)]
            yield line_chart(MACHINE.get(name, name), points, smooth=name != "lr")

    machine = [name for name in MACHINE if name in names]
    return stage, [chart for chart in curves(terms) if chart], [chart for chart in curves(machine) if chart]


def _read_lines(path: Path) -> list[Row]:
    """Dicts of a JSON-lines file, without lines that a killed process left half written."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def _dict(content: Any) -> Row:
    return content if isinstance(content, dict) else {}
