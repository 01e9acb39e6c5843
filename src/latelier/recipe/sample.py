"""The recipe's `sample` section: how pictures are drawn."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from latelier.recipe.base import Section, Unit


class Sample(Section):
    """How pictures are drawn."""

    steps: int = Field(50, ge=1)
    guidance: float = Field(1.0, ge=0)
    guidance_interval: tuple[Unit, Unit] = Field((0.0, 1.0), description="noise levels t at which guidance acts")
    guidance_channels: int | None = Field(None, ge=1, description="guide only the first channels (LightningDiT: 3)")
    sampler: Literal["auto", "euler", "heun", "ddpm", "ddim", "plms", "dpm++"] = "auto"
    shift: float = Field(1.0, gt=0, description="flow: spends more steps near noise when above 1")
    eta: Unit = Field(0.0, description="ddim: 0 deterministic, 1 ancestral")
    count: int = Field(64, ge=1)
    batch: int = Field(64, ge=1)
    classes: list[int | str] | None = None
    seed: int = 0
