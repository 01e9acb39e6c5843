"""The one table of metrics: what `evaluate.metrics` may name, which function measures it, and how to read its results.

A new metric is a function and one entry. A metric of latents is `function(*takes, **settings) -> dict[str, Result]`:
`takes` are of `sample` and `train`, two `LatentSample`s, and `codec`; `settings` keys of the recipe's `evaluate`.
Modules are imported when a metric is measured, so the table costs nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

T = TypeVar("T")
Words = tuple[str, ...]
Better = Literal["lower", "higher"]
Group = Literal["reconstruction", "generation", "latents", "cost"]  # what is compared, in the order of reports
ARROWS = {"lower": " ↓", "higher": " ↑", None: ""}


@dataclass(frozen=True)
class Metric:
    """What is known of a metric."""

    group: Group  # the section of reports and of `metrics.json` follows from it
    function: str = ""  # `module:function`; empty for the map, and for what is measured in one pass over images
    takes: Words = ("sample",)  # positional arguments
    settings: Words = ()  # keys of `evaluate` that are passed by name
    better: Mapping[str, Better] = field(default_factory=dict)  # direction, by the longest fitting beginning of a name
    units: Mapping[str, str] = field(default_factory=dict)  # the same for units, in words
    headline: Words = ()  # results that stand in front of a report
    inspect: bool = False  # whether `latelier inspect` measures it by default
    features: Words = ()  # beginnings of results that carry the extractor's name: `rfd-vgg16`
    images: int = 1  # that it needs, on each side; measures of latents count for themselves
    side: int = 1  # of images, in pixels, that it needs
    networks: bool = False  # whether it looks at grey images and colours only
    followed: bool = False  # whether it is measured at snapshots of a denoiser's training, by `measure_snapshot`

    def lacks(self, images: int, channels: int, size: tuple[int, int]) -> str:
        """Why it cannot be measured on so many images like these, or nothing."""
        if images < self.images:
            return f"it needs {self.images:,} images, and there are {images:,}"
        if min(size) < self.side:
            return f"it needs images of at least {self.side} pixels a side, not {size[0]} x {size[1]}"
        return f"it is for 1 or 3 channels, not {channels}" if self.networks and channels not in (1, 3) else ""

    def load(self) -> Callable[..., Any]:
        """The function."""
        module, name = self.function.split(":")
        return getattr(importlib.import_module(module), name)


def _latents(function: str, takes: Words = ("sample",), settings: Words = (), **about: Any) -> Metric:
    """A metric of latents, by its function in `latelier.analysis`."""
    return Metric("latents", f"latelier.analysis.{function}", takes, settings, inspect=True, **about)


METRICS: dict[str, Metric] = {
    # of reconstructions, measured in one pass
    "l1": Metric("reconstruction", better={"l1": "lower"}, units={"l1": "of [-1, 1]"}, inspect=True),
    "psnr": Metric("reconstruction", better={"psnr": "higher"}, units={"psnr": "dB"}, inspect=True),
    "ssim": Metric("reconstruction", side=11, better={"ssim": "higher"}, inspect=True),
    "ms-ssim": Metric("reconstruction", side=176, better={"ms-ssim": "higher"}, inspect=True),
    "lpips": Metric("reconstruction", side=16, networks=True, better={"lpips": "lower"}, inspect=True),
    "rfd": Metric("reconstruction", images=2, networks=True, better={"rfd": "lower"}, inspect=True, features=("rfd",)),
    # of latents: functions of one sample that is encoded once
    "smoothness": _latents(
        "smoothness:smoothness", ("sample", "codec"), ("noise_levels", "metrics", "features", "seed"),
        better={"smoothness-psnr": "higher", "smoothness-lpips": "lower", "smoothness-rfd": "lower"},
        headline=("smoothness-psnr",), features=("smoothness-rfd",),
    ),
    "compression": _latents(
        "clustering:perceptual_compression", ("sample",), ("clusters", "seed"),
        better={"within": "lower", "separation": "higher"}, headline=("separation-object",),
    ),
    "spectrum": _latents(
        "statistics:spectrum", units={"effective-rank": "directions", "channel-rank": "directions"},
        headline=("effective-rank", "channel-rank"),
    ),
    "prefixes": _latents(
        "smoothness:prefix_quality", ("sample", "codec"), ("prefix_lengths", "metrics", "features"),
        better={"prefix-psnr": "higher", "prefix-lpips": "lower", "prefix-rfd": "lower"}, features=("prefix-rfd",),
    ),
    "channels": _latents("statistics:channel_statistics"),
    "posterior": _latents(
        "statistics:posterior_statistics", units={"latent-std": "of raw latents"},
        better={"active": "higher", "outlier-channels": "lower", "largest-variance-ratio": "lower"},
        headline=("latent-std", "active-channels"),
    ),
    "equivariance": _latents(
        "equivariance:equivariance", ("sample", "codec"), better={"equivariance": "lower"},
        units={"equivariance": "share of the latents' variance"},
    ),
    "codebook": _latents(
        "statistics:codebook_usage", ("sample", "codec"), better={"codebook": "higher", "dead-codes": "lower"},
        headline=("codebook-usage",),
    ),
    "gmm": _latents(
        "mixture:gaussian_mixtures", ("train", "sample"), ("modes", "seed"), better={"gmm": "lower"},
        units={"gmm-nll": "nats per principal component", "gmm-modes": "Gaussians"}, headline=("gmm-modes",),
    ),
    "probe": _latents(
        "probes:class_probes", ("train", "sample"), ("seed",), better={"probe": "higher", "knn": "higher"},
        units={"probe": "share of images", "knn": "share of images"}, headline=("probe-accuracy",),
    ),
    "difficulty": _latents(
        "difficulty:diffusion_difficulty", ("train", "sample", "codec"), ("seed",),
        better={"diffusion": "lower", "path": "higher"},
        units={"diffusion-loss": "squared error of the velocity"}, headline=("diffusion-loss",),
    ),
    "viv": _latents(
        "velocity:velocity_variance", ("sample",), ("seed",), better={"viv": "lower"},
        units={"viv": "squared velocity per number"}, headline=("viv",), images=4,
    ),
    "neighbours": _latents(
        "neighbours:label_neighbours", ("sample",), ("seed",), better={"neighbours": "higher"},
        units={"neighbours": "share of images"}, headline=("neighbours-10",), images=12,
    ),
    "structure": _latents("structure:spatial_structure", better={"structure": "higher"}, headline=("structure-lds",)),
    "frequency": _latents(
        "frequency:high_frequencies", better={"high-frequency": "lower"}, units={"high-frequency": "share of energy"},
    ),
    "interpolation": _latents(
        "interpolation:interpolation", ("sample", "codec"), ("features", "seed"),
        better={"interpolation": "lower", "continuity": "lower"}, features=("interpolation",), images=2, networks=True,
    ),
    "uniformity": _latents(
        "uniformity:uniformity", ("sample",), ("seed",), images=10,
        better={"uniformity-cv": "lower", "uniformity-gini": "lower", "uniformity-entropy": "higher"},
    ),
    "text": _latents(
        "text:readable_text", ("sample", "codec"), better={"text": "higher"}, units={"text": "share of glyphs"},
        headline=("text",),
    ),
    "map": Metric("latents", inspect=True),  # a figure, no number: `analysis.latent_map`
    # of samples
    "gfd": Metric(
        "generation", images=2, networks=True, better={"gfd": "lower"}, features=("gfd",), followed=True,
    ),
    "fid50k": Metric("generation", images=50_000, networks=True, better={"fid50k": "lower"}),
    "fdr": Metric("generation", images=100, networks=True, better={"fdr": "lower"}, features=("fdr",)),
    "sfid": Metric("generation", images=2, networks=True, better={"sfid": "lower"}),
    "kid": Metric("generation", images=2, networks=True, better={"kid": "lower"}, features=("kid",)),
    "cmmd": Metric("generation", images=2, networks=True, better={"cmmd": "lower"}, features=("cmmd",)),
    "inception-score": Metric("generation", images=20, networks=True, better={"inception-score": "higher"}),
    "precision": Metric("generation", images=4, networks=True, better={"precision": "higher"}),
    "recall": Metric("generation", images=4, networks=True, better={"recall": "higher"}),
    "objects": Metric(
        "generation", followed=True, better={"objects": "higher", "objects-copies": "lower"},
        units={
            "objects": "share of images", "objects-relations": "share of relations",
            **dict.fromkeys(("objects-counts", "objects-classes", "objects-places"), "1 - total variation"),
        },
    ),
    "convergence": Metric("generation", better={"convergence": "lower"}),
    # of the tokenizer itself
    "cost": Metric(
        "cost", "latelier.evaluation.cost:measure_cost", ("codec",),
        better={
            "gflop": "lower", "parameters": "lower", "size-mib": "lower", "memory-gb": "lower",
            "encode-images-per-second": "higher", "decode-images-per-second": "higher",
        },
        units={"gflop": "for an image"}, headline=("parameters", "gflop-encode", "gflop-decode"), inspect=True,
    ),
}  # fmt: skip

# Results that no entry of `evaluate.metrics` asks for: whether conditions are followed, and how fast samples come.
OTHERS: dict[str, Better] = {"fd": "lower", "layout-match": "higher", "segmentation-match": "higher"}
OTHERS |= {"clip-score": "higher", "samples-per-second": "higher", "images-to": "lower"}
FOLLOWED = "convergence-"  # before the names of metrics that are followed through a training
SIDES = ("sr", "bicubic", "inpainting", "mean-fill")  # images that follow conditions, and simple ones


def better(name: str) -> Better | None:
    """Whether lower or higher values of a result are better; None where neither is."""
    known = {**OTHERS, **{begin: side for metric in METRICS.values() for begin, side in metric.better.items()}}
    name = next((name.removeprefix(f"{side}-") for side in SIDES if name.startswith(f"{side}-")), name)
    return _longest(name.removeprefix(FOLLOWED), known) or _longest(name, known)


def unit(name: str) -> str | None:
    """The unit of a result, in words."""
    return _longest(name, {begin: words for metric in METRICS.values() for begin, words in metric.units.items()})


def plain(name: str) -> str:
    """A result's name without its extractor: `rfd-vgg16` is `rfd`, `gfd-vgg16@50` is `gfd@50`."""
    name, at, setting = name.partition("@")
    with_features = [begin for metric in METRICS.values() for begin in metric.features if name.startswith(f"{begin}-")]
    return (max(with_features, key=len) if with_features else name) + at + setting


def heading(name: str) -> str:
    """A result's name with an arrow in its better direction."""
    return f"{name}{ARROWS[better(name)]}"


def _longest(name: str, known: Mapping[str, T]) -> T | None:
    """The entry of the longest key whose whole words a result's name begins with: `probe-accuracy` with `probe`."""
    words = f"{name.partition('@')[0]}-"
    begins = [begin for begin in known if words.startswith(f"{begin}-")]
    return known[max(begins, key=len)] if begins else None
