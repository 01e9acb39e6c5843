"""Large images through a tokenizer tile by tile, with memory bounded by the tile.

Tiles overlap. At an inner border, the last quarter of the overlap, where a tile feels that it ends, is thrown away,
and over the half in the middle one tile fades into the next. So wherever nothing within a quarter of the overlap
is missing from the receptive field, the result is that of the whole image. What looks at all positions at once
(attention, group normalisation) sees its tile only; there the result is near, not equal.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

from latelier.errors import LatelierError
from latelier.tokenizers.codec import Codec, check_size


def decode_tiled(
    codec: Codec, latents: Float[Tensor, "b k *grid"], tile: int, overlap: int, channels: int | None = None
) -> Float[Tensor, "b c h w"]:
    """Images of normalised latents, `codec.decode` in tiles.

    Args:
        codec: a tokenizer whose latents lie on a plane.
        latents: normalised latents of any size.
        tile: side of a tile in latent positions; best that of training, or more.
        overlap: latent positions that neighbours share at least.
        channels: decode only the first k, see `Codec.decode`.

    Raises:
        LatelierError: for latents without a plane, and an overlap that leaves a tile nothing of its own.
    """
    _check(latents.shape[1:], tile, overlap)
    return _tiled(lambda part: codec.decode(part, channels), latents, (tile, overlap), (1, codec.factor))


def decode_within(
    codec: Codec, latents: Float[Tensor, "b k *grid"], window: int | None, channels: int | None = None
) -> Float[Tensor, "b c h w"]:
    """Images of normalised latents: at once if they fit into one tile, else in tiles.

    Args:
        codec: a tokenizer.
        latents: normalised latents of any size.
        window: side of the tiles, which overlap by half; None decodes all at once.
        channels: decode only the first k, see `Codec.decode`.
    """
    if window is None or max(latents.shape[2:]) <= window:
        return codec.decode(latents, channels)
    return torch.cat([decode_tiled(codec, row, window, window // 2, channels) for row in latents.split(1)])


def encode_tiled(codec: Codec, images: Float[Tensor, "b c h w"], tile: int, overlap: int) -> Float[Tensor, "b k *grid"]:
    """Normalised latents of images, `codec.encode` in tiles: the posterior's mean.

    There is no sampling here, since two tiles would draw two different noises where they overlap.

    Args:
        codec: a tokenizer whose latents lie on a plane.
        images: in [-1, 1], of any size that the tokenizer's factor divides.
        tile: side of a tile in latent positions.
        overlap: latent positions that neighbours share at least.

    Raises:
        LatelierError: for latents without a plane, a size that the factor does not divide, and an overlap that leaves
            a tile nothing of its own.
    """
    check_size(images.shape[-2:], codec.factor)
    _check(codec.latent_shape(images.shape[-2], images.shape[-1]), tile, overlap)
    return _tiled(codec.encode, images, (tile, overlap), (codec.factor, 1))


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin so that they cover `length`: every `stride`, the last flush with the end."""
    return [0] if window >= length else [*range(0, length - window, stride), length - window]


def _tiled(convert: Callable[[Tensor], Tensor], x: Tensor, tile: tuple[int, int], units: tuple[int, int]) -> Tensor:
    """Convert tile by tile and blend.

    Args:
        convert: one tile's worth of `x` to the result.
        x: `(b, c, h, w)`.
        tile: side and overlap in latent positions.
        units: how long one latent position is in `x` and in the result.
    """
    side, overlap = tile
    before, after = units
    grid = [length // before for length in x.shape[-2:]]
    if all(side >= length for length in grid):
        return convert(x)
    total, weights = torch.zeros(0), torch.zeros(0)
    for corner in product(*(starts(length, side, side - overlap) for length in grid)):
        size = [min(side, length) for length in grid]
        part = convert(x[_place(corner, size, before)])  # (b, k, th, tw)
        if not total.numel():
            whole = [length * after for length in grid]
            total, weights = part.new_zeros(*part.shape[:2], *whole), part.new_zeros(*whole)
        rows, columns = (_fade(*line, overlap, after).to(part) for line in zip(corner, size, grid))
        weight = rows[:, None] * columns  # (th, tw)
        place = _place(corner, size, after)
        total[place] += weight * part
        weights[place[2:]] += weight
    return total / weights


def _fade(start: int, size: int, length: int, overlap: int, unit: int) -> Float[Tensor, " n"]:
    """A tile's weight along one side, `(size unit,)`: 1, falling to 0 towards ends that are not the image's."""
    weight = torch.ones(size * unit)
    if not overlap:
        return weight
    distance = (torch.arange(size * unit) + 0.5) / unit  # from the border, in latent positions
    ramp = ((distance - overlap / 4) / (overlap / 2)).clamp(0, 1)  # 0 in the outer quarter of the overlap
    if start > 0:
        weight = weight * ramp
    return weight * ramp.flip(0) if start + size < length else weight


def _place(corner: tuple[int, ...], size: list[int], unit: int) -> tuple[slice, ...]:
    inner = (slice(start * unit, (start + side) * unit) for start, side in zip(corner, size))
    return (slice(None), slice(None), *inner)


def _check(shape: tuple[int, ...] | torch.Size, tile: int, overlap: int) -> None:
    if len(shape) != 3:
        raise LatelierError(
            f"Latents of shape {tuple(shape)} do not lie on a plane, so this tokenizer cannot work in tiles; "
            "leave tiling off."
        )
    if tile < 1 or not 0 <= overlap < tile:
        raise LatelierError(f"overlap = {overlap} does not go with tile = {tile}; choose 0 <= overlap < tile.")
