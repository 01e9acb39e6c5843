"""Spatial structure: are neighbouring positions of a latent alike, and distant ones not?

Singh et al. 2025 ("What matters for representation alignment", iREPA, arXiv 2512.10794) find that the spatial structure
of features predicts generation better than how well they classify. Similarities are cosines of an image's tokens,
distances are Manhattan's on the grid, and values are means over images:

    lds    similarity of 4-neighbours, less that of pairs at 6 or more
    cds    how fast similarity falls with the distance, 1 to 8: the slope, its sign turned
    srss   for tokens of the foreground: similarity to its tokens at 1, less that to the background's at 6 or more
    rmsc   how unlike the tokens are: root mean square distance of unit tokens to their mean

The distances are those of a 16 x 16 grid; on others they scale with the side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from latelier.analysis.sample import FOREGROUND, LatentSample
from latelier.errors import NotMeasurable
from latelier.evaluation.results import Result, mean_with_interval

NEAR, FAR, END, GRID = 1, 6, 8, 16  # distances, and the side of the grid that they are for
SMALLEST = 4  # positions a side: below, near and far are the same
CHUNK = 2**24  # similarities that are held at once


@torch.no_grad()
def spatial_structure(sample: LatentSample) -> dict[str, Result]:
    """`structure-lds`, `structure-cds` and `structure-rmsc` of normalised posterior means; higher is better.

    `structure-srss` too where images have label maps, over those with foreground and background (`n` of the receipt).
    Nothing for 1-D latents, nor for grids of fewer than 4 positions a side.
    """
    if sample.mean.ndim != 4:
        return {}
    grid = (sample.mean.shape[2], sample.mean.shape[3])
    if min(grid) < SMALLEST:
        raise NotMeasurable(
            f"structure needs a grid of at least {SMALLEST} positions a side, not {grid[0]} x {grid[1]}."
        )
    step = max(1, CHUNK // (grid[0] * grid[1]) ** 2)
    masks = [None] * len(sample) if sample.foreground is None else sample.foreground.flatten(1).split(step)
    parts = [measure(z.transpose(1, 2), grid, mask) for z, mask in zip(sample.z.split(step), masks)]
    values = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    details = {"n": len(sample), "grid": list(grid), "distances": list(thresholds(grid)), **sample.about()}
    found = {name: Result(*mean_with_interval(values[name]), details) for name in ("lds", "cds", "rmsc")}
    if "srss" in values and len(rows := values["srss"][values["srss"].isfinite()]):
        about = {**details, "n": len(rows), "foreground": FOREGROUND}
        found["srss"] = Result(*mean_with_interval(rows), about)
    return {f"structure-{name}": result for name, result in found.items()}


def thresholds(grid: tuple[int, int]) -> tuple[int, int, int]:
    """Near, far, and the end of the slope, for a grid's longer side."""
    scale = max(grid) / GRID
    near, far = max(1, round(NEAR * scale)), max(2, round(FAR * scale))
    return near, far, max(2, round(END * scale))


def measure(
    tokens: Float[Tensor, "n t c"], grid: tuple[int, int], mask: Bool[Tensor, "n t"] | None = None
) -> dict[str, Float[Tensor, " n"]]:
    """All values of each image; `srss` only with a mask of the foreground, NaN where an image lacks one side."""
    unit = F.normalize(tokens.double(), dim=2)  # (n, t, c)
    similarity = unit @ unit.transpose(1, 2)  # (n, t, t)
    distance = distances(grid)  # (t, t)
    near, far, end = thresholds(grid)
    close, remote = (distance >= 1) & (distance <= near), distance >= far
    by_distance = torch.stack([similarity[:, distance == d].mean(1) for d in range(1, end + 1)], 1)  # (n, d)
    found = {
        "lds": similarity[:, close].mean(1) - similarity[:, remote].mean(1),
        "cds": -_slope(by_distance),
        "rmsc": (unit - unit.mean(1, keepdim=True)).square().sum(2).mean(1).sqrt(),
    }
    if mask is not None:
        inside = _mean(similarity, close & mask[:, None] & mask[:, :, None])  # (n, t)
        outside = _mean(similarity, remote & ~mask[:, None] & mask[:, :, None])  # (n, t)
        found["srss"] = (inside - outside).nanmean(1)  # over anchors that have both
    return found


def distances(grid: tuple[int, int]) -> Float[Tensor, "t t"]:
    """Manhattan distances of all pairs of positions in raster order."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    y, x = rows.flatten().double(), columns.flatten().double()  # (t,)
    return (y[:, None] - y).abs() + (x[:, None] - x).abs()


def _slope(y: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Of the least-squares line through y at 1, 2, ..."""
    x = torch.arange(y.shape[1], dtype=y.dtype)
    x = x - x.mean()
    return (y * x).sum(1) / x.square().sum()


def _mean(similarity: Float[Tensor, "n t t"], pairs: Bool[Tensor, "n t t"]) -> Float[Tensor, "n t"]:
    """Over the pairs of each anchor; NaN without any."""
    return (similarity * pairs).sum(2) / pairs.sum(2)
