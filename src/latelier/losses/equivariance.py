"""Smaller and turned latents that shall decode to smaller and turned images: EQ-VAE, and scale equivariance.

EQ-VAE (Kouzelis et al. 2025) puts L(T x, D(T z)) in place of L(x, D(z)), where T shrinks and turns; its images are
resized bilinearly, without a filter against aliasing. Scale equivariance (Skorokhodov et al. 2025) adds
w L(x', D(z')), where x' and z' are the image and the latents at a half or a quarter of the side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from latelier.errors import LatelierError
from latelier.keyed_random import KeyedRandom


def step_uniform(seed: int, purpose: str, seen: int, count: int) -> list[float]:
    """Uniform numbers of the step that begins at `seen` images, for all its processes and micro-batches."""
    return KeyedRandom(seed, torch.tensor([seen])).uniform(purpose, count)[0].tolist()


def move(x: Float[Tensor, "b c h w"], size: tuple[int, int], turns: int = 0) -> Float[Tensor, "b c i j"]:
    """Resized bilinearly to `size`, then turned by `turns` times 90 degrees; what stays as it is is not touched."""
    if tuple(x.shape[2:]) != tuple(size):
        x = F.interpolate(x, size, mode="bilinear", align_corners=False)
    return torch.rot90(x, turns, (-1, -2)) if turns else x


@dataclass(frozen=True)
class Equivariance:
    """What EQ-VAE does in a step, the same for all its images.

    Args:
        seed: of the draws.
        probability: p of a step whose latents and target are moved.
        image_probability: p_s of a step, of the others, whose image is shrunk before it is encoded.
        least: smallest scale; scales are j / g, where g is the latents' side, so that images have whole positions.
        rotate: turn by 90, 180 or 270 degrees too.
        anisotropic: a scale of its own for each side.
    """

    seed: int
    probability: float = 0.5
    image_probability: float = 0.25
    least: float = 0.25
    rotate: bool = True
    anisotropic: bool = False

    def draw(self, seen: int, grid: tuple[int, int]) -> tuple[str, tuple[int, int], int]:
        """What is moved (`latents`, `image`, or nothing, `""`), the grid that it is shrunk to, and quarter turns."""
        first, second, row, column, turn = step_uniform(self.seed, "equivariance", seen, 5)
        what = "latents" if first < self.probability else "image" if second < self.image_probability else ""
        if not what:
            return what, grid, 0
        sizes = self.sizes(grid)
        rows = sizes[int(row * len(sizes))][0]
        columns = sizes[int((column if self.anisotropic else row) * len(sizes))][1]
        return what, (rows, columns), 1 + int(3 * turn) if self.rotate and what == "latents" else 0

    def sizes(self, grid: tuple[int, int]) -> list[tuple[int, int]]:
        """The grids to which latents are shrunk, ascending; with `least` 1 only the grid itself.

        Raises:
            LatelierError: if there is none.
        """
        sides = math.gcd(*grid)
        smallest = math.ceil(self.least * sides - 1e-9)
        found = [(grid[0] * j // sides, grid[1] * j // sides) for j in range(max(1, smallest), sides)]
        if not found and self.least < 1:
            raise LatelierError(
                f"tokenizer.regularise: equivariance.least = {self.least} leaves no scale for latents of "
                f"{grid[0]} x {grid[1]}; set it lower, or to 1 to turn them only."
            )
        return found or [grid]


@dataclass(frozen=True)
class Shrinking:
    """Scale equivariance: the weight of its term, and the factors of which each step draws one."""

    seed: int
    weight: float = 0.25
    factors: Sequence[int] = (2, 4)

    def draw(self, seen: int) -> int:
        """The factor of the step that begins at `seen` images."""
        (number,) = step_uniform(self.seed, "scale", seen, 1)
        return self.factors[int(number * len(self.factors))]
