"""The numbers of a report: key ones in front, all of them in tables whose rows open to their receipts."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from latelier.evaluation.chart import short
from latelier.evaluation.page import definitions, digits

Entries = Mapping[str, Any]  # of metrics.json: section to metric to {value, interval, receipt}

BETTER = {"l1": "lower", "lpips": "lower", "rfd": "lower", "gfd": "lower", "psnr": "higher", "ssim": "higher",
          "ms-ssim": "higher", "kid": "lower", "cmmd": "lower", "sfid": "lower", "fid50k": "lower",
          "precision": "higher", "recall": "higher", "fd": "lower", "match": "higher", "score": "higher",
          "inception-score": "higher", "gmm": "lower", "probe": "higher", "knn": "higher", "diffusion": "lower",
          "equivariance": "lower", "codebook": "higher", "dead-codes": "lower", "active": "higher",
          "outlier-channels": "lower", "largest-variance-ratio": "lower", "convergence": "lower"}  # fmt: skip
UNITS = {"gmm-nll": "nats per principal component", "gmm-modes": "Gaussians", "effective-rank": "directions",
         "channel-rank": "directions", "probe": "share of images", "knn": "share of images",
         "diffusion-loss": "squared error of the velocity", "latent-std": "of raw latents",
         "equivariance": "share of the latents' variance"}  # fmt: skip
KEYS = ("gmm-modes", "probe-accuracy", "diffusion-loss", "effective-rank", "channel-rank", "smoothness-psnr",
        "separation-object", "latent-std", "active-channels", "codebook-usage", "parameters", "gflop-encode",
        "gflop-decode")  # of the sections that have dozens  # fmt: skip
LONG = ("latent space", "cost")


def sections(metrics: Entries) -> dict[str, dict[str, dict[str, Any]]]:
    """The sections' entries, as far as they are what they should be."""
    dicts = {title: entries for title, entries in metrics.items() if isinstance(entries, dict)}
    return {
        title: {name: entry for name, entry in entries.items() if isinstance(entry, dict)}
        for title, entries in dicts.items()
    }


def receipts(metrics: Entries) -> dict[str, dict[str, Any]]:
    """The receipt of each number."""
    return {n: entry.get("receipt") or {} for entries in sections(metrics).values() for n, entry in entries.items()}


def values(metrics: Entries) -> dict[str, float]:
    """The numbers themselves."""
    found = {n: entry.get("value") for entries in sections(metrics).values() for n, entry in entries.items()}
    return {n: float(v) for n, v in found.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def key_numbers(metrics: Entries) -> list[tuple[str, str]]:
    """(number, name) of what stands in front: of long sections the few in `KEYS`, no points of curves."""
    numbers = values(metrics)
    return [
        (in_short(numbers[name]), name)
        for title, entries in sections(metrics).items()
        for name in entries
        if name in numbers and "@" not in name and (title not in LONG or name in KEYS)
    ]


def in_short(value: float) -> str:
    """A number for a glance: 23M, 10, 0.4650."""
    if abs(value) >= 1e4:
        return short(value)
    return f"{value:.0f}" if value == round(value) else digits(value)


def metrics_tables(metrics: Entries) -> str:
    """A table for each section; each row opens to its receipt."""
    parts = []
    for title, entries in sections(metrics).items():
        rows = "".join(_row(name, entry) for name, entry in entries.items())
        parts.append(
            f'<h3>{escape(title)}</h3><div class="card scroll metrics"><table><tr><th>Metric</th>'
            f'<th class="number">Value</th><th class="number">95 % interval</th><th>Receipt</th></tr>'
            f"{rows}</table></div>"
            if rows
            else ""
        )
    return "".join(parts)


def _row(name: str, entry: Mapping[str, Any]) -> str:
    receipt = entry.get("receipt") or {}
    interval = entry.get("interval")
    between = f"{digits(interval[0])} to {digits(interval[1])}" if interval else ""
    better = BETTER.get(name) or next((BETTER[part] for part in _parts(name) if part in BETTER), None)
    unit = next((words for begin, words in UNITS.items() if name.startswith(begin)), None)
    said = "; ".join(filter(None, [f"{better} is better" if better else "", unit]))
    warning = f'<div><span class="note">{escape(str(receipt["warning"]))}</span></div>' if "warning" in receipt else ""
    summary = ", ".join(
        [f"n = {receipt['n']:,}" if isinstance(receipt.get("n"), int) else ""] * ("n" in receipt)
        + [str(receipt.get("reference"))] * ("reference" in receipt)
    )
    return (
        f"<tr><td>{escape(name)}{f'<br><span class=soft>{said}</span>' if said else ''}</td>"
        f'<td class="number value">{escape(digits(entry.get("value")))}</td><td class="number">{escape(between)}</td>'
        f"<td>{warning}<details><summary>{escape(summary or 'receipt')}</summary>{definitions(receipt)}</details>"
        "</td></tr>"
    )


def _parts(name: str) -> list[str]:
    """Single words of a metric's name, and each two neighbours, in order: `smoothness`, `smoothness-psnr`, `psnr`."""
    words = name.partition("@")[0].split("-")
    return [part for i, word in enumerate(words) for part in (word, "-".join(words[i : i + 2]))]
