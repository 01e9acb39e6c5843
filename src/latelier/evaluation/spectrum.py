"""How many directions of a latent space are in use: spectra of the covariance of its latents.

The effective rank (Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality", definition 1)
of a covariance with eigenvalues e_i is

    exp(- sum_i p_i ln p_i)        p_i = e_i / sum_j e_j

It is d where d directions are used alike, 1 where all variance lies in one, and does not change with scale or rotation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from latelier.errors import LatelierError
from latelier.evaluation.distributions import FeatureStatistics
from latelier.evaluation.latent_matrix import collect
from latelier.evaluation.latent_space import read
from latelier.evaluation.results import Measurement
from latelier.receipt import make_receipt
from latelier.recipe import Evaluate
from latelier.tokenizers.codec import Codec

MOST_IMAGES = 8192  # the Gram matrix of so many takes half a GiB, and its eigenvalues a minute
ENOUGH = 10  # images for each dimension: the effective rank of white noise is then 5 % too small, with fewer more
CHUNK = 256  # images whose positions are held in float64 at once
MOST_ENTRIES = 64  # of a list in a receipt


@torch.no_grad()
def measure_spectrum(
    codec: Codec,
    batches: Iterable[Mapping[str, Any]],
    evaluate: Evaluate,
    reference: str,
    extra: Mapping[str, Any] | None = None,
) -> list[Measurement]:
    """Effective ranks of whole latents and of channels.

    Args:
        codec: the tokenizer.
        batches: dicts with `image`, `(b, c, h, w)` in [-1, 1]; at most `evaluate.samples` images, and 8192, are read.
        evaluate: `samples`.
        reference: the name of the images, for the receipts.
        extra: fields for the receipts beyond those gathered here.

    Returns:
        `effective-rank` of the covariance of flattened latents over images, at most n - 1 and too small where
        images are few, so that only values of equal n compare; and `channel-rank` of the `(c, c)` covariance of
        channels over images and positions. Spectra, as shares of the variance, and standard deviations of the
        channels are in the receipts.

    Raises:
        LatelierError: for fewer than two images, or latents that do not vary.
    """
    latents = collect(codec, read(batches, min(evaluate.samples, MOST_IMAGES)))
    if latents is None or len(latents) < 2:
        raise LatelierError(f"A spectrum needs at least 2 images; {reference} has fewer.")
    n, dims = len(latents), latents.values[0].numel()
    receipt = make_receipt(
        n=n, reference=reference, **latents.about(), measure="effective rank (Roy & Vetterli 2007)",
        tokenizer=codec.hash(), **(extra or {}),
    )  # fmt: skip
    whole = covariance_eigenvalues(latents.values.flatten(1))  # (min(n, d),)
    covariance = channel_covariance(latents.values)  # (c, c)
    channels = torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0)  # (c,)
    deviations = subsample(covariance.diag().sqrt())
    about = {"dims": dims, "spectrum": subsample(whole / whole.sum())}
    if n < ENOUGH * dims:
        about["warning"] = f"n = {n} images show at most {min(n - 1, dims)} of {dims} dimensions, and those unevenly"
        about["warning"] += "; compare only at equal n"
    of_channels = {"dims": len(channels), "spectrum": subsample(channels / channels.sum()), "channel_std": deviations}
    return [
        Measurement("effective-rank", effective_rank(whole), {**receipt, **about}),
        Measurement("channel-rank", effective_rank(channels), {**receipt, **of_channels}),
    ]


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
