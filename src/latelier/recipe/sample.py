"""The recipe's `sample` section: how images are drawn."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from latelier.recipe.base import Section, Unit


class Sample(Section):
    """How images are drawn."""

    steps: int = Field(50, ge=1)
    guidance: float = Field(1.0, ge=0)
    guidance_interval: tuple[Unit, Unit] = Field((0.0, 1.0), description="noise levels t at which guidance acts")
    guidance_channels: int | None = Field(None, ge=1, description="guide only the first channels (LightningDiT: 3)")
    channels: int | None = Field(
        None, ge=1, description="draw only the first channels of the latents (a denoiser trained with `prefixes`)"
    )
    sampler: Literal["auto", "euler", "heun", "ddpm", "ddim", "plms", "dpm++", "unipc", "sde", "dopri5"] = "auto"
    shift: float = Field(1.0, gt=0, description="flow: spends more steps near noise when above 1")
    last_step: Unit = Field(0.04, description="sde: where the noisy steps end and one step without noise follows")
    eta: Unit = Field(0.0, description="ddim: 0 deterministic, 1 ancestral")
    tile: int | None = Field(None, ge=1, description="side of the tiles of tiled sampling, in latent positions")
    tile_stride: int | None = Field(None, ge=1, description="from one tile to the next; default half a tile")
    count: int = Field(64, ge=1)
    batch: int = Field(64, ge=1)
    classes: list[int | str] | None = None
    seed: int = 0

    @field_validator("tile_stride")
    @classmethod
    def _fits(cls, stride: int | None, info: Any) -> int | None:
        tile = info.data.get("tile")
        if stride is not None and (tile is None or stride > tile):
            raise ValueError(f"at most sample.tile, which is {'not set' if tile is None else tile}")
        return stride
