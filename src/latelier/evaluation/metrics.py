"""The numbers: what they are, how sure they are, and where they come from.

Pictures are compared as they would be saved: clamped to [-1, 1] and rounded to 8 bit.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from latelier.errors import LatelierError
from latelier.images import to_uint8

PSNR_LIMIT = 100.0  # dB, for pictures without any error
SSIM_WINDOW = 11


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


# -- per picture ------------------------------------------------------------------------------------------------------


def l1(images: Float[Tensor, "b c h w"], reference: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Mean absolute error of each picture in units of [-1, 1], after rounding to 8 bit."""
    x, y = _levels(images), _levels(reference)  # (b, c, h, w)
    return (x - y).abs().mean((1, 2, 3)) / 127.5


def psnr(images: Float[Tensor, "b c h w"], reference: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Peak signal-to-noise ratio of each picture in dB: 8-bit levels, range 255; 100 dB when nothing differs."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    x, y = _levels(images), _levels(reference)  # (b, c, h, w)
    ratio = peak_signal_noise_ratio(x, y, data_range=255.0, reduction="none", dim=(1, 2, 3))  # (b,)
    return ratio.clamp(max=PSNR_LIMIT)


def ssim(images: Float[Tensor, "b c h w"], reference: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Structural similarity of each picture: 8-bit levels, range 255, Gaussian window 11 x 11 of sigma 1.5.

    Raises:
        LatelierError: for pictures smaller than the window.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    if min(images.shape[-2:]) < SSIM_WINDOW:
        height, width = images.shape[-2:]
        raise LatelierError(
            f"SSIM needs pictures of at least {SSIM_WINDOW} pixels a side, not {height} x {width}; "
            "take ssim out of evaluate.metrics."
        )
    x, y = _levels(images), _levels(reference)  # (b, c, h, w)
    similarity = structural_similarity_index_measure(x, y, data_range=255.0, kernel_size=SSIM_WINDOW, reduction="none")
    assert isinstance(similarity, Tensor)
    return similarity.reshape(-1)  # (b,)


def mean_with_interval(values: Float[Tensor, " n"]) -> tuple[float, tuple[float, float] | None]:
    """Mean and its 95 % confidence interval (normal approximation), None for fewer than two values."""
    values = values.double()
    mean = values.mean().item()
    if len(values) < 2:
        return mean, None
    half = 1.96 * values.std().item() / math.sqrt(len(values))
    return mean, (mean - half, mean + half)


# -- distributions of features ----------------------------------------------------------------------------------------


class FeatureStatistics:
    """Mean and covariance of feature vectors that come in batches, in float64.

    Args:
        dims: length of a vector.
    """

    def __init__(self, dims: int):
        self.n = 0
        self._sum = torch.zeros(dims, dtype=torch.float64)
        self._outer = torch.zeros(dims, dims, dtype=torch.float64)

    def update(self, features: Float[Tensor, "b d"]) -> None:
        """Count a batch of vectors in."""
        x = features.detach().double().cpu()  # (b, d)
        self.n += len(x)
        self._sum += x.sum(0)
        self._outer += x.T @ x

    def merge(self, other: FeatureStatistics) -> None:
        """Count in what another one (of another process) has seen."""
        self.n += other.n
        self._sum += other._sum
        self._outer += other._outer

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """The mean vector."""
        return self._sum / self.n

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """The covariance, normalised by n - 1.

        Raises:
            LatelierError: for fewer than two vectors.
        """
        if self.n < 2:
            raise LatelierError(f"A Fréchet distance needs at least 2 pictures on each side, not {self.n}.")
        return (self._outer - torch.outer(self._sum, self._sum) / self.n) / (self.n - 1)

    def distance(self, other: FeatureStatistics) -> float:
        """Fréchet distance to another set."""
        return frechet_distance(self.mean, self.covariance, other.mean, other.covariance)


def frechet_distance(
    mean1: Float[Tensor, " d"], cov1: Float[Tensor, "d d"], mean2: Float[Tensor, " d"], cov2: Float[Tensor, "d d"]
) -> float:
    """Fréchet distance of two Gaussians (Dowson & Landau 1982), float64:

        |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1^1/2 C2 C1^1/2)^1/2)

    Symmetric eigenvalue problems instead of a general matrix root, so singular covariances need no special care.
    """
    cov1, cov2 = cov1.double(), cov2.double()
    values, vectors = torch.linalg.eigh(cov1)
    root = vectors * values.clamp(min=0).sqrt()  # (d, d); root @ root.T = C1
    cross = torch.linalg.eigvalsh(root.T @ cov2 @ root).clamp(min=0).sqrt().sum()
    shift = (mean1.double() - mean2.double()).square().sum()
    return max(0.0, (shift + cov1.trace() + cov2.trace() - 2 * cross).item())


def precision_recall(
    samples: Float[Tensor, "n d"], references: Float[Tensor, "m d"], k: int = 3, chunk: int = 1024
) -> tuple[Float[Tensor, " n"], Float[Tensor, " m"]]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, equations 1-2), one indicator for each vector.

    Args:
        samples: features of generated pictures.
        references: features of real pictures.
        k: a manifold is the union of balls that reach each vector's k-th nearest neighbour.
        chunk: rows of the distance matrix held at once.

    Returns:
        For each sample 1 if it lies in the references' manifold, and the reverse; the means are precision and recall.

    Raises:
        LatelierError: if a side has no k neighbours.
    """
    if min(len(samples), len(references)) <= k:
        raise LatelierError(
            f"Precision and recall need more than {k} pictures on each side, not {len(samples)} and {len(references)}."
        )
    return _inside(samples, references, k, chunk), _inside(references, samples, k, chunk)


def _inside(points: Tensor, manifold: Tensor, k: int, chunk: int) -> Tensor:
    """1 for each point that lies in a ball of the manifold."""
    radius = torch.cat([_distances(rows, manifold).kthvalue(k + 1).values for rows in manifold.split(chunk)])  # (m,)
    return torch.cat([(_distances(rows, manifold) <= radius).any(1) for rows in points.split(chunk)]).float()


def _distances(x: Tensor, y: Tensor) -> Tensor:
    # The exact form: the faster matrix-product form is not zero between equal vectors.
    return torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist")  # (n, m)


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
    """What a receipt adds when there are too few pictures for a covariance of full rank."""
    if n > dims:
        return {}
    return {"warning": f"n = {n} is below the feature dimension {dims}; compare only at equal n"}


def _levels(images: Tensor) -> Tensor:
    return to_uint8(images).float()
