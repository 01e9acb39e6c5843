"""The recipe's `sample` and `evaluate` sections: how images are sampled, and what is measured."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, field_validator
from pydantic_core import PydanticCustomError

from latelier.evaluation.metrics import METRICS
from latelier.sections import Count, PositiveCount, Section, Seed, Unit, Weight

# Names under which other libraries know a metric that is called otherwise here.
_ELSEWHERE = {"rfid": "rfd", "gfid": "gfd"}


class Sample(Section):
    """How images are sampled."""

    steps: int = Field(50, ge=1)
    guidance: float = Field(1.0, ge=0)
    guide: Annotated[str, BeforeValidator(lambda v: str(v) if isinstance(v, Path) else v)] | None = Field(
        None,
        description="autoguidance: folder of a weaker model (run, pipeline, denoiser), or `snapshots/<images>` of this "
        "run, that takes the place of the null condition",
    )
    guidance_interval: tuple[Unit, Unit] = Field((0.0, 1.0), description="noise levels t at which guidance acts")
    guidance_channels: int | None = Field(None, ge=1, description="guide only the first channels (LightningDiT: 3)")
    channels: int | None = Field(
        None, ge=1, description="sample only the first k latent channels (a denoiser trained with `prefixes`)"
    )
    sampler: Literal["auto", "euler", "heun", "ddpm", "ddim", "plms", "dpm++", "unipc", "sde", "dopri5"] = "auto"
    shift: float | None = Field(
        None,
        gt=0,
        description="flow: spends more steps near noise when above 1; default 1, or that of training where "
        "`denoiser.process.shift` is `dimension`",
    )
    last_step: Unit = Field(0.04, description="sde: where the noisy steps end and one step without noise follows")
    eta: Unit = Field(0.0, description="ddim: 0 deterministic, 1 ancestral")
    tile: int | None = Field(None, ge=1, description="tiled sampling: side of a tile, in latent positions")
    tile_stride: int | None = Field(None, ge=1, description="from one tile to the next; default half a tile")
    count: int = Field(64, ge=1)
    batch: int = Field(64, ge=1)
    classes: list[int | str] | None = None
    seed: int = Field(0, ge=-(2**62), le=2**62, description="of the first image; the next has the next number")

    @field_validator("tile_stride")
    @classmethod
    def _fits(cls, stride: int | None, info: Any) -> int | None:
        tile = info.data.get("tile")
        if stride is not None and (tile is None or stride > tile):
            raise ValueError(f"at most sample.tile, which is {'not set' if tile is None else tile}")
        return stride


def _known_metric(name: str) -> str:
    if name in METRICS:
        return name
    if name in _ELSEWHERE:
        words = f"use {_ELSEWHERE[name]!r}, a Fréchet distance whose features need not be Inception's."
    else:
        near = difflib.get_close_matches(name, METRICS, 1, 0.5)
        words = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(METRICS)}."
    raise PydanticCustomError("unknown_name", "{hint}", {"hint": words})


Metric = Annotated[str, AfterValidator(_known_metric), WithJsonSchema({"type": "string", "enum": list(METRICS)})]


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
    samples: PositiveCount = 5_000
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
    probe_samples: PositiveCount = Field(
        10_000, description="training images that probe, gmm and difficulty learn from"
    )
    seed: Annotated[Seed, Field(description="of noise, clusters and the masks of inpainting")] = 0
    clip: str | None = Field(
        None, description="Hub name or folder of a CLIP, which scores how well samples fit their captions"
    )
    every: Count = Field(0, description="images: keep and measure snapshots of the denoiser during training")
    every_samples: PositiveCount = Field(500, description="samples at each of these snapshots")
    quality: dict[Metric, float] = Field(
        {}, description="levels by metric, `{gfd: 200}`: how many images training takes to reach them"
    )
    sampling_steps: list[Annotated[int, Field(ge=1)]] = Field(
        [], description="numbers of sampling steps at which gfd and samples per second are measured; none by default"
    )
