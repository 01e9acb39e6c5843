"""What each latent channel carries: its share of the variance, how sparse it is, images of it (DC-AE 1.5, figure 2).

In a structured latent space the first channels show objects: large values where things are, small ones elsewhere. Later
ones look like texture.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from latelier.analysis.sample import LatentSample
from latelier.errors import LatelierError
from latelier.evaluation.results import Result
from latelier.images import make_columns

GROUPS = 8  # of neighbouring channels, in the image of maps


@torch.no_grad()
def channel_statistics(sample: LatentSample) -> dict[str, Result]:
    """Where the variance of raw latents lies, and how sparse channels are.

    Returns:
        `variance-first-quarter`: the share of the raw latents' variance that the first quarter of the channels has, a
        quarter where channels are alike. `channel-sparsity`: the mean over channels of Hoyer's (2004) measure, 0 for
        values of equal size, 1 for a single one that is not 0. Details have both for every channel.
    """
    sample = sample.first()
    raw = sample.z * sample.scale.std[:, None] + sample.scale.mean[:, None]  # (n, c, l)
    values = raw.transpose(0, 1).flatten(1).double()  # (c, n l)
    variance = values.var(1, correction=0)  # (c,)
    sparsity = hoyer(values - values.mean(1, keepdim=True))  # (c,)
    quarter = max(1, len(variance) // 4)
    share = (variance[:quarter].sum() / variance.sum().clamp(min=1e-12)).item()
    about = {"n": len(sample), **sample.about(), "channels": len(variance)}
    by_variance = {**about, "quarter": quarter, "by_channel": variance.tolist()}
    return {
        "variance-first-quarter": Result(share, details=by_variance),
        "channel-sparsity": Result(sparsity.mean().item(), details={**about, "by_channel": sparsity.tolist()}),
    }


def hoyer(values: Float[Tensor, "c n"]) -> Float[Tensor, " c"]:
    """(sqrt(n) - |x|_1 / |x|_2) / (sqrt(n) - 1) of each row."""
    root = values.shape[1] ** 0.5
    ratio = values.abs().sum(1) / values.norm(dim=1).clamp(min=1e-12)
    return ((root - ratio) / max(root - 1, 1e-12)).clamp(0, 1)


def draw_channel_maps(images: Float[Tensor, "b c h w"], z: Float[Tensor, "b k *grid"]) -> Image.Image:
    """Images in [-1, 1], and below each how large its latents are: the mean over groups of neighbouring channels.

    Raises:
        LatelierError: for latents that do not lie on a plane.
    """
    if z.ndim != 4:
        raise LatelierError("1-D latents have no place in the image, so there are no maps of their channels.")
    maps = []
    for group in z.abs().chunk(min(GROUPS, z.shape[1]), dim=1):
        mean = group.mean(1, keepdim=True)  # (b, 1, h / f, w / f)
        low, high = mean.amin((2, 3), keepdim=True), mean.amax((2, 3), keepdim=True)
        shade = 2 * (mean - low) / (high - low).clamp(min=1e-6) - 1  # (b, 1, h / f, w / f) in [-1, 1]
        maps.append(F.interpolate(shade, images.shape[2:]).expand(-1, images.shape[1], -1, -1))
    return make_columns([images, *maps], columns=len(images))
