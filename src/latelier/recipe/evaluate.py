"""The recipe's `evaluate` section: what is measured."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from latelier.recipe.base import Count, Section, Weight

Metric = Literal[
    "psnr", "ssim", "ms-ssim", "lpips", "l1", "rfd", "gfd", "fid50k", "sfid", "kid", "cmmd", "inception-score",
    "precision", "recall", "smoothness", "compression", "cost", "gmm", "probe", "spectrum", "map", "difficulty",
    "prefixes", "channels", "posterior", "equivariance", "codebook", "convergence",
]  # fmt: skip


def _one_or_several(value: object) -> object:
    return [value] if isinstance(value, str) else value


class Evaluate(Section):
    """Which numbers are measured, on how many images."""

    metrics: list[Metric] = ["psnr", "ssim", "lpips", "rfd", "gfd"]
    features: Annotated[list[str], BeforeValidator(_one_or_several), Field(min_length=1)] = Field(
        ["vgg16"],
        description="feature extractors: vgg16, inception, inception-fid-helper, dinov2, clip; the last two also as "
        "`dinov2:folder or Hub name`. Distances are measured in each, everything else in the first",
    )
    samples: Count = 5_000
    batch: int = Field(64, ge=1)
    noise_levels: list[Weight] = Field(
        [0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0], description="of smoothness, in standard deviations of each channel"
    )
    clusters: int = Field(64, ge=2, description="of compression, at each granularity")
    modes: list[Annotated[int, Field(ge=1)]] = Field(
        [1, 2, 5, 10, 20, 50, 100, 200, 300], description="of gmm: numbers of Gaussians"
    )
    prefix_lengths: list[Annotated[int, Field(ge=1)]] | None = Field(
        None, description="of prefixes: numbers of channels that are decoded; default quarters of them"
    )
    probe_samples: Count = Field(10_000, description="training images that probe, gmm and difficulty learn from")
    seed: int = Field(0, ge=0, description="of the noise, of the clusters, of the holes of inpainting")
    clip: str | None = Field(
        None, description="Hub name or folder of a CLIP, which judges how well drawn images fit their captions"
    )
    sampling_steps: list[Annotated[int, Field(ge=1)]] = Field(
        [], description="numbers of sampling steps at which gfd and samples per second are measured; none by default"
    )
