"""Statistics of latents, one number for each channel or for each element: their files, and exact sums over images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from latelier.errors import LatelierError, reading

STATISTICS_FILE = "latent_statistics.json"  # of channels
ELEMENTS_FILE = "latent_statistics.safetensors"  # of elements; the receipt is its metadata
NORMS = (None, "rms", "rms-both")  # of each position before the statistics; both: of what is decoded too
REMEASURE = "delete it to go on without, or take the file that was written with the weights"
Statistics = tuple[Tensor, Tensor, dict[str, Any]]  # mean and std, (c,) or (c, *grid), and how they were measured


def save_statistics(folder: str | Path, mean: Tensor, std: Tensor, receipt: dict[str, Any]) -> None:
    """Write the statistics and their receipt beside the weights, in place of those that are there."""
    numbers, elements = Path(folder, STATISTICS_FILE), Path(folder, ELEMENTS_FILE)
    if mean.ndim == 1:
        elements.unlink(missing_ok=True)
        numbers.write_text(json.dumps({"mean": mean.tolist(), "std": std.tolist(), **receipt}, indent=2))
    else:
        numbers.unlink(missing_ok=True)
        tensors = {"mean": mean.cpu().contiguous(), "std": std.cpu().contiguous()}
        save_file(tensors, elements, metadata={"receipt": json.dumps(receipt)})


def load_statistics(folder: Path, shape: tuple[int, ...]) -> Statistics | None:
    """The statistics in a folder, None without; `shape` is `(c, *grid)` of latents of any size."""
    for path in (folder / ELEMENTS_FILE, folder / STATISTICS_FILE):
        if path.is_file():
            with reading(f"{path} holds no statistics of these latents", REMEASURE):
                content, about = _read_elements(path) if path.name == ELEMENTS_FILE else _read_channels(path)
                return *read_statistics(content, shape), about
    return None


def _read_elements(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    with safe_open(path, "pt") as file:
        content = {name: file.get_tensor(name) for name in ("mean", "std")}
        return content, dict(json.loads((file.metadata() or {}).get("receipt", "{}")))


def _read_channels(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    content = json.loads(path.read_text(encoding="utf-8"))
    return content, {key: value for key, value in content.items() if key not in ("mean", "std")}


def read_statistics(content: dict[str, Any], shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """`mean` and `std`, `(c,)` or `(c, *grid)`; an error if they are not numbers by which latents can be divided."""
    mean, std = (torch.as_tensor(content[key], dtype=torch.float32) for key in ("mean", "std"))
    if mean.shape != std.shape or mean.shape[:1] != shape[:1] or mean.ndim not in (1, len(shape)):
        raise LatelierError(f"mean and std have shapes {tuple(mean.shape)} and {tuple(std.shape)}, not ({shape[0]},)")
    if not bool((mean.isfinite() & std.isfinite() & (std > 0)).all()):
        raise LatelierError("mean and std are not all finite, or a std is not above 0")
    return mean, std


def rms_normalise(z: Float[Tensor, "b c *grid"]) -> Float[Tensor, "b c *grid"]:
    """z / sqrt(mean over channels of z^2 + 1e-6), so that |z|^2 = c at each position (GAE, PAE)."""
    return z * (z.float().square().mean(1, keepdim=True) + 1e-6).rsqrt().to(z.dtype)


def fit_statistic(statistic: Tensor, z: Float[Tensor, "b k *grid"]) -> Tensor:
    """A statistic as it meets latents, of all channels or of a prefix: `(k, 1, ...)` or `(k, *grid)`.

    Raises:
        LatelierError: if it is of elements of another grid.
    """
    part = statistic[: z.shape[1]].to(z)
    if statistic.ndim == 1:
        return part.view(-1, *[1] * (z.ndim - 2))
    if part.shape[1:] != z.shape[2:]:
        raise LatelierError(
            f"The latent statistics are of each element of a grid of {_grid(part)}, not {_grid(z[0])}; take images of "
            "the size that they were measured on, or measure them again at this size."
        )
    return part


def _grid(z: Tensor) -> str:
    return " x ".join(map(str, z.shape[1:]))


class Moments:
    """Count, mean and summed squared deviations of rows `(k, n)` that come in parts; float64.

    Two parts are merged as in Chan, Golub & LeVeque (1983), so that a mean much larger than the spread costs no digits.
    """

    def __init__(self, size: int):
        self.sums = torch.zeros(3, size, dtype=torch.float64)

    def add(self, values: Float[Tensor, "k n"]) -> None:
        """One more part."""
        values = values.cpu().double()
        mean = values.mean(1) if values.shape[1] else torch.zeros(len(values), dtype=torch.float64)
        count = torch.full_like(mean, values.shape[1])
        self.merge(torch.stack([count, mean, (values - mean[:, None]).square().sum(1)]))

    def merge(self, other: Float[Tensor, "3 k"]) -> None:
        """The sums of other rows of the same kind."""
        (n, mean, squares), (m, their_mean, their_squares) = self.sums, other
        total = (n + m).clamp(min=1)
        distance = their_mean - mean
        squares = squares + their_squares + distance.square() * n * m / total
        self.sums = torch.stack([n + m, mean + distance * m / total, squares])

    def mean_and_std(self) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
        """Float32; the deviation of what is constant is 1e-6, so that it can be normalised."""
        count, mean, squares = self.sums
        return mean.float(), (squares / count).clamp(min=1e-12).sqrt().float()
