"""The numbers: what they are, how sure they are, and the file that keeps them with their receipts."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

ERRORS = "error-map.png"  # beside metrics.json, see `reconstruction.draw_errors`


@dataclass
class Measurement:
    """One number with its receipt.

    Attributes:
        name: Fréchet distances carry their extractor: `rfd-vgg16`, `gfd-inception`.
        value: the number.
        receipt: n, reference, extractor, preprocessing, sampler, versions, ...: what is needed to measure it again.
        interval: 95 % confidence interval, where there is one.
    """

    name: str
    value: float
    receipt: dict[str, Any] = field(default_factory=dict)
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Result:
    """What a metric found.

    Attributes:
        value: the number.
        interval: 95 % confidence interval, where there is one.
        details: what the receipt says beside the common fields: curves, settings, warnings.
    """

    value: float
    interval: tuple[float, float] | None = None
    details: dict[str, Any] = field(default_factory=dict)


def mean_with_interval(values: Float[Tensor, " n"]) -> tuple[float, tuple[float, float] | None]:
    """Mean and its 95 % confidence interval (normal approximation), None for fewer than two values."""
    values = values.double()
    mean = values.mean().item()
    if len(values) < 2:
        return mean, None
    half = 1.96 * values.std().item() / math.sqrt(len(values))
    return mean, (mean - half, mean + half)


def size_warning(n: int, dims: int) -> dict[str, str]:
    """What a receipt adds when there are too few images for a covariance of full rank."""
    if n > dims:
        return {}
    return {"warning": f"n = {n} is below the feature dimension {dims}; compare only at equal n"}


def write_measurements(path: str | Path, measurements: list[Measurement], section: str) -> None:
    """Merge measurements into `metrics.json`: `{section: {name: {value, interval, receipt}}}`, never half written.

    Those of the same name in the section are replaced; a missing file is made.
    """
    path = Path(path)
    content = json.loads(path.read_text()) if path.is_file() else {}
    entries = content.setdefault(section, {})
    for measurement in measurements:
        entry = asdict(measurement)
        entries[entry.pop("name")] = entry
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_text(json.dumps(content, indent=2, default=str))
    partial.replace(path)
