"""The settings that both stages of training share."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from latelier.sections import Count, Section, Size, Unit, Weight, parse_count

__all__ = ["Count", "Section", "Size", "Training", "Unit", "Weight", "parse_count"]


class Training(Section):
    """What both stages of training share. Progress is counted in images seen."""

    images: Count = 1_000_000
    batch: int = Field(256, ge=1, description="images per optimiser step over all processes")
    micro_batch: int | None = Field(None, ge=1, description="images per forward pass of one process; default: all")
    lr: float = Field(1e-4, gt=0)
    betas: tuple[Unit, Unit] = (0.9, 0.95)
    weight_decay: Weight = 0.0
    warmup: Count = 0
    schedule: Literal["constant", "cosine"] = "constant"
    final_lr: Weight = Field(0.0, description="where `schedule: cosine` ends, as a share of lr")
    clip: float | None = Field(1.0, gt=0, description="largest gradient norm; null switches clipping off")
    ema: float = Field(0.9999, ge=0, lt=1)
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: bool = False
    log_every: Count = 0
    preview_every: Count = 0
    checkpoint_every: Count = 0
    keep_checkpoints: int = Field(2, ge=1)

    @model_validator(mode="after")
    def _derive(self) -> Training:
        if self.images % self.batch:
            self.images += self.batch - self.images % self.batch  # whole steps
        for name, parts in (("log_every", 200), ("preview_every", 10), ("checkpoint_every", 10)):
            if not getattr(self, name):
                object.__setattr__(self, name, max(self.batch, self.images // parts))
        return self
