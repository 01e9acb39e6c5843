"""Tiled sampling, beyond the size of training: the denoiser sees overlapping tiles, and its predictions are blended.

As LDM's convolutional sampling, but for any denoiser, so also for those whose position tables end with the size of
training. In each step every tile is denoised at the same t; a position's prediction is the mean over the tiles that
cover it, weighted by how far it lies from each tile's border (clipped, so that no weight vanishes).
"""

from __future__ import annotations

from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latelier.conditioning.condition import Condition
from latelier.diffusion import Latents, Levels
from latelier.errors import LatelierError
from latelier.tokenizers.codec import starts

LEAST, MOST = 0.01, 0.5  # LDM's clip of the distance to the border, in sides of a tile
Corner = tuple[int, ...]  # row and column of a tile's first position


def tiled(denoiser: nn.Module, tile: int | None, stride: int | None = None, batch: int = 64) -> nn.Module:
    """A denoiser that looks at tiles; it costs the memory of `batch` tiles, whatever the size.

    Args:
        denoiser: `forward(x_t, t, condition) -> prediction`.
        tile: side of a tile in latent positions, the side of training's latents; None is the denoiser itself.
        stride: from one tile to the next; default half a tile. The last tiles end with the latents.
        batch: tiles per forward pass.
    """
    if tile is None:
        return denoiser
    stride = stride or max(1, tile // 2)
    if stride > tile:
        raise LatelierError(f"tile_stride = {stride} leaves gaps between tiles of {tile}; use {tile} or less.")
    return TiledDenoiser(denoiser, tile, stride, batch)


class TiledDenoiser(nn.Module):
    """A denoiser for latents of any size, made of one for tiles; see `tiled`."""

    def __init__(self, denoiser: nn.Module, tile: int, stride: int, batch: int):
        super().__init__()
        self.denoiser, self.tile, self.stride, self.batch = denoiser, tile, stride, batch

    def forward(self, x_t: Latents, t: Levels, condition: Condition | None) -> Latents:
        """The prediction for the whole, float32 unless one tile covers it.

        Vector and tokens of the condition hold in every tile, spatial channels are cut as `x_t` is.
        """
        grid = tuple(x_t.shape[2:])
        if len(grid) != 2:
            raise LatelierError(
                f"sample.tile = {self.tile} cuts latents that lie on a plane, but this tokenizer makes {grid[0]} 1-D "
                "latents; leave it out."
            )
        corners = list(product(*(starts(side, self.tile, self.stride) for side in grid)))
        if len(corners) == 1:
            return self.denoiser(x_t, t, condition)
        size = tuple(min(self.tile, side) for side in grid)
        weight = border_weight(size).to(x_t.device)  # (th, tw)
        total, weights = torch.zeros(x_t.shape, device=x_t.device), torch.zeros(grid, device=x_t.device)
        pieces = [(row, corner) for corner in corners for row in range(len(x_t))]
        for first in range(0, len(pieces), self.batch):
            part = pieces[first : first + self.batch]
            rows = torch.tensor([row for row, _ in part], device=x_t.device)  # (p,)
            prediction = self.denoiser(_cut(x_t, part, size), t[rows], _cut_condition(condition, rows, part, size))
            for (row, corner), piece in zip(part, prediction.float()):
                total[_slices(row, corner, size)] += weight * piece
        for corner in corners:
            weights[_slices(0, corner, size)[2:]] += weight
        return total / weights


def border_weight(size: tuple[int, ...]) -> Float[Tensor, "*tile"]:
    """Distance of each position's centre from the nearest border, in sides of a tile, within `LEAST` and `MOST`."""
    lines = [(torch.arange(side) + 0.5) / side for side in size]
    near = [torch.minimum(line, 1 - line) for line in lines]
    return torch.stack(torch.meshgrid(*near, indexing="ij")).amin(0).clamp(LEAST, MOST)  # (th, tw)


def _cut(x: Tensor, pieces: list[tuple[int, Corner]], size: Corner) -> Tensor:
    return torch.stack([x[_slices(row, corner, size)] for row, corner in pieces])  # (p, c, th, tw)


def _cut_condition(
    condition: Condition | None, rows: Tensor, pieces: list[tuple[int, Corner]], size: Corner
) -> Condition | None:
    """The condition of each tile: its image's vector and tokens, its own part of the spatial channels."""
    if condition is None:
        return None
    c = condition
    vector, tokens, mask = (value if value is None else value[rows] for value in (c.vector, c.tokens, c.mask))
    return Condition(vector, tokens, mask, None if c.spatial is None else _cut(c.spatial, pieces, size))


def _slices(row: int, corner: Corner, size: Corner) -> tuple[int | slice, ...]:
    return (row, slice(None), *(slice(start, start + side) for start, side in zip(corner, size)))
