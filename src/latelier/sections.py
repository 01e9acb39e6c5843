"""What the sections of a recipe are made of. Models and losses import it without the recipe itself."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

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
