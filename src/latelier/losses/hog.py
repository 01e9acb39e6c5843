"""Histograms of oriented gradients: which way brightness changes, in cells of 8 pixels (Dalal and Triggs 2005).

As a target of masked prediction: MaskFeat (Wei et al. 2022, section 3.2), MAETok (2025). Of each channel, with Sobel's
differences g = (g_x, g_y), a pixel gives |g| to one of nine bins of the unsigned direction,

    bin = floor(9 atan2(g_x, g_y) / pi) mod 9,

weighted by a Gaussian window of 16 pixels; a cell sums its pixels, and its nine bins have unit length.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from latelier.errors import LatelierError

BINS = 9
CELL = 8  # pixels along a side
WINDOW, DEVIATION = 16, 8.0  # of the Gaussian, in pixels


def hog_width(patch: int, channels: int) -> int:
    """How many numbers describe a patch: 108 for 16 pixels and RGB."""
    if patch % CELL:
        raise LatelierError(
            f"HOG needs patches divisible by {CELL}, the side of its cells, not {patch}; take the target hog out, or "
            "choose another patch_size."
        )
    return channels * BINS * (patch // CELL) ** 2


@torch.no_grad()
def hog(images: Float[Tensor, "b c h w"], patch: int) -> Float[Tensor, "b n d"]:
    """HOG of images, patches in raster order, each (channel, bin, cell row, cell column) flattened; no gradients.

    Float32 under any autocast, for any number of channels; brightness and contrast do not matter. The side of a patch
    is a multiple of 8 and divides the image.
    """
    batch, channels, height, width = images.shape
    if height % CELL or width % CELL or height % patch or width % patch:
        raise LatelierError(
            f"HOG needs images whose sides are divisible by {math.lcm(CELL, patch)}, not {height} x {width}; choose "
            "another image_size, or take the target hog out."
        )
    d, k = hog_width(patch, channels), patch // CELL
    with torch.autocast(images.device.type, enabled=False):
        histogram = _histograms(images.float())  # (b, c, 9, h / 8, w / 8)
    grid = histogram.view(batch, channels * BINS, height // patch, k, width // patch, k)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, d)  # (b, n, c 9 k k)


def _histograms(images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c 9 i j"]:
    """The nine bins of each cell, of unit length."""
    gx, gy = sobel(images)  # (b, c, h, w)
    height, width = images.shape[2:]
    bins = (torch.atan2(gx, gy) / math.pi * BINS).floor() % BINS  # (b, c, h, w)
    strength = torch.hypot(gx, gy) * _window(height, width, images.device)  # (b, c, h, w)
    # Bin after bin is nine passes, but sums in the same order each time, unlike a scatter on a GPU.
    cells = [F.avg_pool2d(strength * (bins == i), CELL, divisor_override=1) for i in range(BINS)]
    return F.normalize(torch.stack(cells, 2), dim=2)


def sobel(images: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
    """Sobel's differences (1, 0, -1) across and (1, 2, 1) along, to the right and downwards, edges reflected.

    Differences come first: in flat areas they are exactly zero, so that rounding errors give no direction.
    """
    x = F.pad(images, (1, 1, 1, 1), mode="reflect")  # (b, c, h + 2, w + 2)
    across = x[..., :-2] - x[..., 2:]  # (b, c, h + 2, w)
    down = x[..., :-2, :] - x[..., 2:, :]  # (b, c, h, w + 2)
    gx = across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]
    gy = down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]
    return gx, gy


def _window(height: int, width: int, device: torch.device) -> Float[Tensor, "h w"]:
    """The Gaussian, summing to 1, repeated from the upper left corner; each cell sees a quarter of it."""
    distance = torch.arange(WINDOW, device=device) - (WINDOW - 1) / 2
    bell = torch.exp(-0.5 * (distance / DEVIATION) ** 2)  # (16)
    bell = bell / bell.sum()
    rows, columns = (bell.repeat(-(-side // WINDOW))[:side] for side in (height, width))
    return rows[:, None] * columns
