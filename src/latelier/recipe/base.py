"""What all sections of a recipe are made of: counts, sizes, and the settings of a stage of training."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

_UNITS = {"": 1, "k": 1_000, "m": 1_000_000, "b": 1_000_000_000}


def parse_count(value: Any) -> Any:
    """`2M`, `64k`, `1.5M`, `1_000` or a number, to an int; anything else is left for pydantic to refuse."""
    match = re.fullmatch(r"\s*(\d[\d_]*(?:\.\d+)?)\s*([kKmMbB]?)\s*", value) if isinstance(value, str) else None
    if match:
        value = float(match[1].replace("_", "")) * _UNITS[match[2].lower()]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def parse_size(value: Any) -> Any:
    """One number is a square."""
    return (value, value) if isinstance(value, int) else value


Count = Annotated[int, BeforeValidator(parse_count), Field(ge=0, description="a count such as 64k, 2M or 1000")]
Size = Annotated[tuple[int, int], BeforeValidator(parse_size), Field(description="height and width, or one number")]
Unit = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", validate_default=True)


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
