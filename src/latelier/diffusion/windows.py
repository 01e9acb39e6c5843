"""Sampling beyond the size of training: the denoiser sees overlapping windows, and its predictions are blended.

As LDM's convolutional sampling, but for any denoiser, so also for those whose position tables end with the size of
training. In each step every window is denoised at the same t; a position's prediction is the mean over the windows
that cover it, weighted by how far it lies from each window's border (clipped, so that no weight vanishes).
"""

from __future__ import annotations

from dataclasses import fields
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latelier.conditioning.condition import Condition
from latelier.errors import LatelierError
from latelier.tokenizers.tiling import starts

LEAST, MOST = 0.01, 0.5  # LDM's clip of the distance to the border, in window sides


class Windowed(nn.Module):
    """A denoiser for latents of any size, made of one for windows; see `windowed`."""

    def __init__(self, denoiser: nn.Module, window: int, stride: int, batch: int):
        super().__init__()
        self.denoiser, self.window, self.stride, self.batch = denoiser, window, stride, batch

    def forward(
        self, x_t: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], condition: Condition | None
    ) -> Float[Tensor, "b c h w"]:
        """The prediction for the whole, float32 unless one window covers it.

        Args:
            x_t: noisy latents, at least as large as a window or smaller, in which case the window is.
            t: noise levels.
            condition: vector and tokens hold in every window, spatial channels are cut as `x_t` is.
        """
        grid = tuple(x_t.shape[2:])
        corners = list(product(*(starts(side, self.window, self.stride) for side in grid)))
        if len(corners) == 1:
            return self.denoiser(x_t, t, condition)
        size = tuple(min(self.window, side) for side in grid)
        weight = border_weight(size).to(x_t.device)  # (wh, ww)
        total, weights = torch.zeros(x_t.shape, device=x_t.device), torch.zeros(grid, device=x_t.device)
        pieces = [(row, corner) for corner in corners for row in range(len(x_t))]
        for first in range(0, len(pieces), self.batch):
            part = pieces[first : first + self.batch]
            rows = torch.tensor([row for row, _ in part], device=x_t.device)  # (p,)
            prediction = self.denoiser(_cut(x_t, part, size), t[rows], _told(condition, rows, part, size))
            for (row, corner), piece in zip(part, prediction.float()):
                total[_place(row, corner, size)] += weight * piece
        for corner in corners:
            weights[_place(0, corner, size)[2:]] += weight
        return total / weights


def windowed(denoiser: nn.Module, window: int | None, stride: int | None = None, batch: int = 64) -> nn.Module:
    """A denoiser that looks through windows; it costs the memory of `batch` windows, whatever the size.

    Args:
        denoiser: `forward(x_t, t, condition) -> prediction`.
        window: side of a window in latent positions, the side of training's latents; None is the denoiser itself.
        stride: from one window to the next; default half a window. Windows at the far ends are flush with them.
        batch: windows per forward pass.

    Raises:
        LatelierError: if the stride would leave positions uncovered.
    """
    if window is None:
        return denoiser
    stride = stride or max(1, window // 2)
    if stride > window:
        raise LatelierError(f"stride = {stride} leaves gaps between windows of {window}; use {window} or less.")
    return Windowed(denoiser, window, stride, batch)


def border_weight(size: tuple[int, ...]) -> Float[Tensor, "*window"]:
    """Distance of each position's centre from the nearest border, in window sides, within `LEAST` and `MOST`."""
    lines = [(torch.arange(side) + 0.5) / side for side in size]
    near = [torch.minimum(line, 1 - line) for line in lines]
    return torch.stack(torch.meshgrid(*near, indexing="ij")).amin(0).clamp(LEAST, MOST)  # (wh, ww)


def _cut(x: Tensor, pieces: list[tuple[int, tuple[int, ...]]], size: tuple[int, ...]) -> Tensor:
    return torch.stack([x[_place(row, corner, size)] for row, corner in pieces])  # (p, c, wh, ww)


def _told(
    condition: Condition | None, rows: Tensor, pieces: list[tuple[int, tuple[int, ...]]], size: tuple[int, ...]
) -> Condition | None:
    """What each window is told: its image's vector and tokens, its own part of the spatial channels."""
    if condition is None:
        return None
    told = {field.name: getattr(condition, field.name) for field in fields(Condition)}
    picked = {name: None if value is None else value[rows] for name, value in told.items() if name != "spatial"}
    spatial = None if condition.spatial is None else _cut(condition.spatial, pieces, size)
    return Condition(**picked, spatial=spatial)


def _place(row: int, corner: tuple[int, ...], size: tuple[int, ...]) -> tuple[int | slice, ...]:
    return (row, slice(None), *(slice(start, start + side) for start, side in zip(corner, size)))
