"""The numbers: what they are, how sure they are, and where they come from.

Images are compared as they would be saved: clamped to [-1, 1] and rounded to 8 bit.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from latelier.errors import LatelierError
from latelier.images import to_uint8

PSNR_LIMIT = 100.0  # dB, for images without any error
SSIM_WINDOW = 11
MS_SSIM_SCALES = 5


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


# -- per image ------------------------------------------------------------------------------------------------------


def l1(images: Float[Tensor, "b c h w"], reference: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Mean absolute error of each image in units of [-1, 1], after rounding to 8 bit."""
    x, y = _levels(images), _levels(reference)  # (b, c, h, w)
    return (x - y).abs().mean((1, 2, 3)) / 127.5


def psnr(images: Float[Tensor, "b c h w"], reference: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Peak signal-to-noise ratio of each image in dB: 8-bit levels, range 255; 100 dB when nothing differs."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    x, y = _levels(images), _levels(reference)  # (b, c, h, w)
    ratio = peak_signal_noise_ratio(x, y, data_range=255.0, reduction="none", dim=(1, 2, 3))  # (b,)
    return ratio.clamp(max=PSNR_LIMIT)


def ssim(images: Float[Tensor, "b c h w"], reference: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Structural similarity of each image: 8-bit levels, range 255, Gaussian window 11 x 11 of sigma 1.5.

    Raises:
        LatelierError: for images smaller than the window.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    if min(images.shape[-2:]) < SSIM_WINDOW:
        height, width = images.shape[-2:]
        raise LatelierError(
            f"SSIM needs images of at least {SSIM_WINDOW} pixels a side, not {height} x {width}; "
            "take ssim out of evaluate.metrics."
        )
    x, y = _levels(images), _levels(reference)  # (b, c, h, w)
    similarity = structural_similarity_index_measure(x, y, data_range=255.0, kernel_size=SSIM_WINDOW, reduction="none")
    assert isinstance(similarity, Tensor)
    return similarity.reshape(-1)  # (b,)


def ms_ssim(images: Float[Tensor, "b c h w"], reference: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Multi-scale structural similarity of each image: five scales and weights as in Wang et al. 2003, section 3.2.

    Contrasts that are correlated the wrong way round count as zero, since they are raised to powers.

    Raises:
        LatelierError: for images whose coarsest scale is smaller than the window.
    """
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    least = SSIM_WINDOW * 2 ** (MS_SSIM_SCALES - 1)  # halved four times, a window still fits
    if min(images.shape[-2:]) < least:
        height, width = images.shape[-2:]
        raise LatelierError(
            f"MS-SSIM of {MS_SSIM_SCALES} scales needs images of at least {least} pixels a side, not "
            f"{height} x {width}; take ms-ssim out of evaluate.metrics. With fewer scales it would be another number."
        )
    x, y = _levels(images), _levels(reference)  # (b, c, h, w)
    similarity = multiscale_structural_similarity_index_measure(
        x, y, data_range=255.0, kernel_size=SSIM_WINDOW, reduction="none", normalize="relu"
    )
    return similarity.reshape(-1)  # (b,)


def mean_with_interval(values: Float[Tensor, " n"]) -> tuple[float, tuple[float, float] | None]:
    """Mean and its 95 % confidence interval (normal approximation), None for fewer than two values."""
    values = values.double()
    mean = values.mean().item()
    if len(values) < 2:
        return mean, None
    half = 1.96 * values.std().item() / math.sqrt(len(values))
    return mean, (mean - half, mean + half)


# -- the file ---------------------------------------------------------------------------------------------------------


def write_measurements(path: str | Path, measurements: list[Measurement], section: str) -> None:
    """Merge measurements into `metrics.json`: `{section: {name: {value, interval, receipt}}}`, never half written.

    Args:
        path: the file; made if missing.
        measurements: replace those of the same name in the section.
        section: such as `reconstruction` or `generation`.
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


def size_warning(n: int, dims: int) -> dict[str, str]:
    """What a receipt adds when there are too few images for a covariance of full rank."""
    if n > dims:
        return {}
    return {"warning": f"n = {n} is below the feature dimension {dims}; compare only at equal n"}


def _levels(images: Tensor) -> Tensor:
    return to_uint8(images).float()
