"""The one table of metrics: what `evaluate.metrics` may name, which function measures it, and how to read its results.

Runs, `inspect`, `compare`, studies, reports and the verdict read everything they know of a metric from here. A new
metric is a function and one entry. Modules are imported when a metric is measured, so the table costs nothing.

A metric of latents is a plain function: `function(*takes, **settings) -> dict[str, Result]`, where `takes` names the
tensors it wants (`sample` and `train` are `LatentSample`s, `codec` the tokenizer) and `settings` the keys of the
recipe's `evaluate` section that it reads.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Better = Literal["lower", "higher"]
Group = Literal["reconstruction", "generation", "latents", "cost"]  # what is compared, in the order of reports
ARROWS = {"lower": " ↓", "higher": " ↑", None: ""}


@dataclass(frozen=True)
class Metric:
    """What is known of a metric.

    Attributes:
        group: what it measures; the section of reports and of `metrics.json` follows from it.
        function: `module:function`; empty for the map, and for what is measured in one pass over images.
        takes: positional arguments of a latent metric, of `sample`, `train` and `codec`.
        settings: keys of `evaluate` that are passed by name.
        better: the better direction of results, by the beginning of their names; the longest that fits counts.
        units: the same for units, in words.
        headline: results that stand in front of a report.
        inspect: whether `latelier inspect` measures it unless told otherwise.
        features: whether results carry the extractor's name: `rfd-vgg16`.
    """

    group: Group
    function: str = ""
    takes: tuple[str, ...] = ("sample",)
    settings: tuple[str, ...] = ()
    better: Mapping[str, Better] = field(default_factory=dict)
    units: Mapping[str, str] = field(default_factory=dict)
    headline: tuple[str, ...] = ()
    inspect: bool = False
    features: tuple[str, ...] = ()

    def load(self) -> Callable[..., Any]:
        """The function."""
        module, name = self.function.split(":")
        return getattr(importlib.import_module(module), name)


_ANALYSIS = "latelier.analysis"
_EVALUATION = "latelier.evaluation"

METRICS: dict[str, Metric] = {
    # of reconstructions, measured in one pass
    "l1": Metric("reconstruction", better={"l1": "lower"}, units={"l1": "of [-1, 1]"}, inspect=True),
    "psnr": Metric("reconstruction", better={"psnr": "higher"}, units={"psnr": "dB"}, inspect=True),
    "ssim": Metric("reconstruction", better={"ssim": "higher"}, inspect=True),
    "ms-ssim": Metric("reconstruction", better={"ms-ssim": "higher"}, inspect=True),
    "lpips": Metric("reconstruction", better={"lpips": "lower"}, inspect=True),
    "rfd": Metric("reconstruction", better={"rfd": "lower"}, inspect=True, features=("rfd",)),
    # of latents: functions of one sample that is encoded once
    "smoothness": Metric(
        "latents", f"{_ANALYSIS}.smoothness:smoothness", ("sample", "codec"),
        ("noise_levels", "metrics", "features", "seed"),
        better={"smoothness-psnr": "higher", "smoothness-lpips": "lower", "smoothness-rfd": "lower"},
        headline=("smoothness-psnr",), inspect=True, features=("smoothness-rfd",),
    ),
    "compression": Metric(
        "latents", f"{_ANALYSIS}.clustering:perceptual_compression", ("sample",), ("clusters", "seed"),
        better={"within": "lower", "separation": "higher"}, headline=("separation-object",), inspect=True,
    ),
    "spectrum": Metric(
        "latents", f"{_ANALYSIS}.spectrum:spectrum",
        units={"effective-rank": "directions", "channel-rank": "directions"},
        headline=("effective-rank", "channel-rank"), inspect=True,
    ),
    "prefixes": Metric(
        "latents", f"{_ANALYSIS}.smoothness:prefix_quality", ("sample", "codec"),
        ("prefix_lengths", "metrics", "features"),
        better={"prefix-psnr": "higher", "prefix-lpips": "lower", "prefix-rfd": "lower"}, inspect=True,
        features=("prefix-rfd",),
    ),
    "channels": Metric("latents", f"{_ANALYSIS}.spectrum:channel_statistics", inspect=True),
    "posterior": Metric(
        "latents", f"{_ANALYSIS}.posterior:posterior_statistics",
        better={"active": "higher", "outlier-channels": "lower", "largest-variance-ratio": "lower"},
        units={"latent-std": "of raw latents"}, headline=("latent-std", "active-channels"), inspect=True,
    ),
    "equivariance": Metric(
        "latents", f"{_ANALYSIS}.equivariance:equivariance", ("sample", "codec"),
        better={"equivariance": "lower"}, units={"equivariance": "share of the latents' variance"}, inspect=True,
    ),
    "codebook": Metric(
        "latents", f"{_ANALYSIS}.spectrum:codebook_usage", ("sample", "codec"),
        better={"codebook": "higher", "dead-codes": "lower"}, headline=("codebook-usage",), inspect=True,
    ),
    "gmm": Metric(
        "latents", f"{_ANALYSIS}.mixture:gaussian_mixtures", ("train", "sample"), ("modes", "seed"),
        better={"gmm": "lower"}, units={"gmm-nll": "nats per principal component", "gmm-modes": "Gaussians"},
        headline=("gmm-modes",), inspect=True,
    ),
    "probe": Metric(
        "latents", f"{_ANALYSIS}.probes:class_probes", ("train", "sample"), ("seed",),
        better={"probe": "higher", "knn": "higher"}, units={"probe": "share of images", "knn": "share of images"},
        headline=("probe-accuracy",), inspect=True,
    ),
    "difficulty": Metric(
        "latents", f"{_ANALYSIS}.difficulty:diffusion_difficulty", ("train", "sample", "codec"), ("seed",),
        better={"diffusion": "lower"}, units={"diffusion-loss": "squared error of the velocity"},
        headline=("diffusion-loss",), inspect=True,
    ),
    "map": Metric("latents", inspect=True),  # a figure, no number: `analysis.latent_map`
    # of samples
    "gfd": Metric("generation", better={"gfd": "lower"}, features=("gfd",)),
    "fid50k": Metric("generation", better={"fid50k": "lower"}),
    "sfid": Metric("generation", better={"sfid": "lower"}),
    "kid": Metric("generation", better={"kid": "lower"}, features=("kid",)),
    "cmmd": Metric("generation", better={"cmmd": "lower"}, features=("cmmd",)),
    "inception-score": Metric("generation", better={"inception-score": "higher"}),
    "precision": Metric("generation", better={"precision": "higher"}),
    "recall": Metric("generation", better={"recall": "higher"}),
    "convergence": Metric("generation", better={"convergence": "lower"}),
    # of the tokenizer itself
    "cost": Metric(
        "cost", f"{_EVALUATION}.cost:measure_cost", ("codec",),
        better={
            "gflop": "lower", "parameters": "lower", "size-mib": "lower", "memory-gb": "lower",
            "encode-images-per-second": "higher", "decode-images-per-second": "higher",
        },
        headline=("parameters", "gflop-encode", "gflop-decode"), inspect=True,
    ),
}  # fmt: skip

# Results that no entry of `evaluate.metrics` asks for: whether conditions are followed, and how fast samples come.
OTHERS: dict[str, Better] = {
    "fd": "lower", "layout-match": "higher", "segmentation-match": "higher", "clip-score": "higher",
    "samples-per-second": "higher",
}  # fmt: skip
SIDES = ("sr", "bicubic", "inpainting", "mean-fill")  # metrics of images that follow conditions, and of simple ones


def metric_of(name: str) -> Metric | None:
    """The metric that a result belongs to, by the longest beginning that some metric knows."""
    found = [
        (len(begin), metric)
        for metric in METRICS.values()
        for begin in (*metric.better, *metric.units, *metric.headline)
        if _begins(name, begin)
    ]
    return max(found, key=lambda pair: pair[0])[1] if found else METRICS.get(name)


def better(name: str) -> Better | None:
    """Whether lower or higher values of a result are better; None where neither is."""
    known = {**OTHERS, **{begin: side for metric in METRICS.values() for begin, side in metric.better.items()}}
    words = next((name.removeprefix(f"{side}-") for side in SIDES if name.startswith(f"{side}-")), name)
    begins = [begin for begin in known if _begins(words, begin)]
    return known[max(begins, key=len)] if begins else None


def unit(name: str) -> str | None:
    """The unit of a result, in words."""
    units = {begin: words for metric in METRICS.values() for begin, words in metric.units.items()}
    begins = [begin for begin in units if _begins(name, begin)]
    return units[max(begins, key=len)] if begins else None


def plain(name: str) -> str:
    """A result's name without its extractor: `rfd-vgg16` is `rfd`, `gfd-vgg16@50` is `gfd@50`."""
    name, at, setting = name.partition("@")
    with_features = [begin for metric in METRICS.values() for begin in metric.features if name.startswith(f"{begin}-")]
    return (max(with_features, key=len) if with_features else name) + at + setting


def heading(name: str) -> str:
    """A result's name with an arrow in its better direction."""
    return f"{name}{ARROWS[better(name)]}"


def _begins(name: str, begin: str) -> bool:
    """Whether a result's name begins with these whole words: `probe-accuracy` with `probe`."""
    words = name.partition("@")[0]
    return words == begin or words.startswith(f"{begin}-")
