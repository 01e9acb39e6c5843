"""DiffAugment (Zhao et al. 2020): differentiable changes of images, the same for an image and its reconstruction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

CHANGES = ("color", "translation", "cutout")
HOLE = 0.5  # side of a cutout, as a share of the image's


def augment(
    images: Float[Tensor, "b c h w"],
    policy: Sequence[str],
    numbers: Float[Tensor, "b 7"],
    hole: float = HOLE,
    chosen: Bool[Tensor, "b 3"] | None = None,
) -> Float[Tensor, "b c h w"]:
    """DiffAugment (Zhao et al. 2020): the same differentiable changes to images and reconstructions.

    Args:
        images: in [-1, 1].
        policy: any of `color`, `translation`, `cutout`, applied in this order.
        numbers: uniform in [0, 1): brightness, saturation, contrast, shift (y, x), hole (y, x), for each image.
        hole: side of the cutout, as a share of the image's.
        chosen: which of the three changes each image undergoes, in the order above; by default all.
    """
    u = [n.view(-1, 1, 1, 1) for n in numbers.to(images).unbind(1)]
    changes = {
        "color": lambda x: _colour(x, u[0], u[1], u[2]),
        "translation": lambda x: _shift(x, u[3], u[4]),
        "cutout": lambda x: _cut(x, u[5], u[6], hole),
    }
    for number, (name, change) in enumerate(changes.items()):
        if name in policy:
            changed = change(images)
            images = changed if chosen is None else torch.where(chosen[:, number, None, None, None], changed, images)
    return images


def _colour(
    images: Float[Tensor, "b c h w"], brightness: Tensor, saturation: Tensor, contrast: Tensor
) -> Float[Tensor, "b c h w"]:
    """Brightness by up to a half, saturation up to twofold, contrast from a half to one and a half."""
    images = images + (brightness - 0.5)
    gray = images.mean(1, keepdim=True)  # (b, 1, h, w)
    images = (images - gray) * (2 * saturation) + gray
    mean = images.mean((1, 2, 3), keepdim=True)  # (b, 1, 1, 1)
    return (images - mean) * (0.5 + contrast) + mean


def _shift(images: Float[Tensor, "b c h w"], down: Tensor, right: Tensor) -> Float[Tensor, "b c h w"]:
    """Moved by up to an eighth of the side; zeros come in."""
    height, width = images.shape[2:]
    y, x = _coordinates(images)
    dy, dx = (_steps(n, side // 8) for n, side in ((down, height), (right, width)))  # (b, 1, 1)
    rows, columns = y + dy, x + dx
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)  # (b, h, w)
    batch = torch.arange(len(images), device=images.device).view(-1, 1, 1)
    moved = images.permute(0, 2, 3, 1)[batch, rows.clamp(0, height - 1), columns.clamp(0, width - 1)]
    return moved.permute(0, 3, 1, 2) * inside[:, None]  # (b, c, h, w)


def _cut(images: Float[Tensor, "b c h w"], down: Tensor, right: Tensor, share: float) -> Float[Tensor, "b c h w"]:
    """A hole of zeros around a random position."""
    height, width = images.shape[2:]
    y, x = _coordinates(images)
    top, left = ((n.view(-1, 1, 1) * side).long() for n, side in ((down, height), (right, width)))
    reach = [int(side * share / 2) for side in (height, width)]
    hole = ((y - top).abs() <= reach[0]) & ((x - left).abs() <= reach[1])  # (b, h, w)
    return images * ~hole[:, None]


def _coordinates(images: Float[Tensor, "b c h w"]) -> tuple[Tensor, Tensor]:
    """Rows `(1, h, 1)` and columns `(1, 1, w)`."""
    height, width = images.shape[2:]
    y, x = (torch.arange(side, device=images.device) for side in (height, width))
    return y.view(1, -1, 1), x.view(1, 1, -1)


def _steps(u: Tensor, most: int) -> Tensor:
    """Whole numbers from -most to most."""
    return (u.view(-1, 1, 1) * (2 * most + 1)).long() - most
