"""What a report shows of a latent space: the verdict in words, curves, a bar for each channel, images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from latelier.evaluation.chart import bar_chart, line_chart
from latelier.evaluation.page import inline_image
from latelier.evaluation.report_metrics import in_short, receipts, values
from latelier.evaluation.verdict import Finding

Metrics = Mapping[str, Any]  # the content of metrics.json

MAP = "latent-map.png"
IMAGES = {
    MAP: "One point for each held-out image: its latents, in two dimensions.",
    "channels.png": "Images, and below each how large its latents are: means over groups of neighbouring channels.",
}
BARS = {
    "latent-std": "std of raw latents",
    "posterior-std": "std of the posterior",
    "kl-bits-per-pixel": "KL, nats per number",
    "channel-sparsity": "sparsity (Hoyer)",
}  # metrics whose receipts have a value for each channel
ROUNDING = 1e-8  # shares of the variance below it are none
SPECTRA = {"effective-rank": "spectrum of whole latents", "channel-rank": "spectrum of channels"}


def show_verdict(findings: Iterable[Finding], experience: str) -> str:
    """The findings, each with the numbers that it rests on, and what our experiments say of those measures."""
    rows = "".join(map(_finding, findings))
    after = f'<p class="soft">{escape(experience)}</p>' if experience else ""
    return f'<ul class="verdict card">{rows}</ul>{after}' if rows else ""


def _finding(finding: Finding) -> str:
    numbers = ", ".join(f"{name} {in_short(number)}" for name, number in finding.evidence.items())
    words = f'{escape(finding.sentence)}<div class="soft">{escape(numbers)}</div>'
    return f'<li class="{finding.kind}"><b>{finding.kind}</b><div>{words}</div></li>'


def show_noise(metrics: Metrics) -> str:
    """What noise on the latents does, for each metric that has a curve."""
    charts = [
        line_chart(name.removeprefix("smoothness-"), [(x, y) for x, y in receipt["curve"]], False, "noise level")
        for name, receipt in receipts(metrics).items()
        if name.startswith("smoothness-") and receipt.get("curve")
    ]
    words = "Noise in standard deviations of each latent channel; the smoother the latent space, the flatter the line."
    return _charts(words, charts)


def show_prefixes(metrics: Metrics) -> str:
    """Quality of images over how many of the first channels they are decoded from."""
    about, numbers = receipts(metrics), values(metrics)
    prefixes = [name for name in numbers if name.startswith("prefix-") and "prefix" in about[name]]
    charts = []
    for metric in dict.fromkeys(name.removeprefix("prefix-").partition("@")[0] for name in prefixes):
        points = sorted((about[n]["prefix"], numbers[n]) for n in prefixes if n.startswith(f"prefix-{metric}@"))
        charts.append(line_chart(f"{metric} of prefixes", points, False, "channels that are decoded"))
    words = "Images from the first channels alone, more of them from left to right. Where channels are in order, "
    return _charts(f"{words}a few show most of the image.", charts)


def show_channels(metrics: Metrics) -> str:
    """A bar for each channel: scale, noise of the posterior, sparsity."""
    charts = [
        bar_chart(words, [float(y) for y in by_channel], "channel")
        for name, words in BARS.items()
        if (by_channel := receipts(metrics).get(name, {}).get("by_channel"))
    ]
    return _charts("One bar for each channel; the line is their median, outliers have another colour.", charts)


def show_distribution(metrics: Metrics) -> str:
    """Mixtures over their number of modes, a small denoiser's loss over time, spectra."""
    about, numbers = receipts(metrics), values(metrics)
    modes = sorted((about[n]["modes"], y) for n, y in numbers.items() if n.startswith("gmm-nll@"))
    losses = [(t, y) for t, y in about.get("diffusion-loss", {}).get("by_time") or ()]
    charts = [
        line_chart("GMM negative log-likelihood", modes, False, "number of modes"),
        line_chart("loss of a small denoiser", losses, False, "time, from data to noise"),
    ]
    for name, words in SPECTRA.items():
        points = [(i, share) for i, share in about.get(name, {}).get("spectrum") or () if share > ROUNDING]
        charts.append(line_chart(words, points, False, "directions, the largest first"))
    return _charts("Left to right: more modes of the mixture; more noise; smaller directions.", charts)


def show_images(folder: Path) -> str:
    """What was drawn of the latents."""
    return "".join(
        f'<div class="{"figure map" if name == MAP else "big"}">{inline_image(folder / name, words)}</div>'
        f'<p class="soft">{words}</p>'
        for name, words in IMAGES.items()
        if (folder / name).is_file()
    )


def _charts(words: str, charts: Iterable[str]) -> str:
    """Charts side by side below a sentence; nothing where there is none."""
    drawn = "".join(charts)
    return f'<p class="soft">{words}</p><div class="charts">{drawn}</div>' if drawn else ""
