"""How many directions of a latent space are in use: spectra of the covariance of its latents.

The effective rank (Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality", definition 1)
of a covariance with eigenvalues e_i is

    exp(- sum_i p_i ln p_i)        p_i = e_i / sum_j e_j

It is d where d directions are used alike, 1 where all variance lies in one, and does not change with scale or rotation.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from latelier.analysis.sample import LatentSample
from latelier.errors import LatelierError
from latelier.evaluation.distributions import FeatureStatistics
from latelier.evaluation.results import Result

MOST_IMAGES = 8192  # the Gram matrix of so many takes half a GiB, and its eigenvalues a minute
ENOUGH = 10  # images for each dimension: the effective rank of white noise is then 5 % too small, with fewer more
CHUNK = 256  # images whose positions are held in float64 at once
MOST_ENTRIES = 64  # of a list in a receipt


@torch.no_grad()
def spectrum(sample: LatentSample) -> dict[str, Result]:
    """Effective ranks of whole latents and of channels, of at most 8192 images.

    Returns:
        `effective-rank` of the covariance of flattened latents over images, at most n - 1 and too small where
        images are few, so that only values of equal n compare; and `channel-rank` of the `(c, c)` covariance of
        channels over images and positions. Details have the spectra, as shares of the variance, and standard
        deviations of the channels.

    Raises:
        LatelierError: for fewer than two images, or latents that do not vary.
    """
    sample = sample.first(MOST_IMAGES)
    n = len(sample)
    if n < 2:
        raise LatelierError(f"A spectrum needs at least 2 images, not {n}.")
    whole = covariance_eigenvalues(sample.z.flatten(1))  # (min(n, d),)
    covariance = channel_covariance(sample.z)  # (c, c)
    channels = torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0)  # (c,)
    common = {"n": n, **sample.about(), "measure": "effective rank (Roy & Vetterli 2007)"}
    dims = sample.z[0].numel()
    about = {**common, "dims": dims, "spectrum": subsample(whole / whole.sum())}
    if n < ENOUGH * dims:
        about["warning"] = f"n = {n} images show at most {min(n - 1, dims)} of {dims} dimensions, and those unevenly"
        about["warning"] += "; compare only at equal n"
    of_channels = {
        **common, "dims": len(channels), "spectrum": subsample(channels / channels.sum()),
        "channel_std": subsample(covariance.diag().sqrt()),
    }  # fmt: skip
    return {
        "effective-rank": Result(effective_rank(whole), details=about),
        "channel-rank": Result(effective_rank(channels), details=of_channels),
    }


def covariance_eigenvalues(x: Float[Tensor, "n d"]) -> Float[Tensor, " r"]:
    """Eigenvalues of the covariance, largest first, float64; the min(n, d) that may differ from 0.

    Where there are more dimensions than vectors, they are those of the `(n, n)` Gram matrix, which are the same.

    Raises:
        LatelierError: if all vectors are equal, or some not finite.
    """
    x = x - x.mean(0, dtype=torch.float64)  # (n, d)
    product = x.T @ x if x.shape[1] <= len(x) else x @ x.T  # (r, r)
    if not (product.trace() > 0 and product.trace().isfinite()):
        raise LatelierError(f"The latents of {len(x)} vectors are equal, or not finite; they have no spectrum.")
    return torch.linalg.eigvalsh(product).flip(0).clamp(min=0) / (len(x) - 1)


def channel_covariance(z: Float[Tensor, "n c l"]) -> Float[Tensor, "c c"]:
    """Covariance of channels over all positions of all images, float64."""
    statistics = FeatureStatistics(z.shape[1])
    for part in z.split(CHUNK):
        statistics.update(part.transpose(1, 2).flatten(0, 1))  # (b l, c)
    return statistics.covariance


def effective_rank(eigenvalues: Float[Tensor, " r"]) -> float:
    """The exponential of the entropy of eigenvalues that are scaled to sum to 1."""
    return torch.special.entr(eigenvalues / eigenvalues.sum()).sum().exp().item()


def subsample(values: Float[Tensor, " n"], most: int = MOST_ENTRIES) -> list[tuple[int, float]]:
    """At most so many `(number, value)`, numbers from 1, spaced evenly in their logarithm; all where they are few."""
    numbers = np.arange(1, len(values) + 1)
    if len(values) > most:
        numbers = np.unique(np.geomspace(1, len(values), most).round().astype(int))
    return [(int(number), values[number - 1].item()) for number in numbers]
