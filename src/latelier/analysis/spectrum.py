"""What of a latent space is in use: directions, channels, codes.

The effective rank (Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality", definition 1)
of a covariance with eigenvalues e_i is

    exp(- sum_i p_i ln p_i)        p_i = e_i / sum_j e_j

It is d where d directions are used alike, 1 where all variance lies in one, and does not change with scale or rotation.
The perplexity of codes that are used p_1, ..., p_K of the time is the same of them. In a structured latent space
(DC-AE 1.5, figure 2) the first channels show objects: large values where things are, small ones elsewhere.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import VQModel
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from latelier.analysis.sample import LatentSample
from latelier.errors import LatelierError
from latelier.evaluation.distributions import FeatureStatistics
from latelier.evaluation.results import Result
from latelier.images import make_columns
from latelier.losses.codebook import nearest_codes, perplexity
from latelier.tokenizers.codec import Codec

MOST_IMAGES = 8192  # the Gram matrix of so many takes half a GiB, and its eigenvalues a minute
IMAGES_PER_DIM = 10  # the effective rank of white noise is then 5 % too small, with fewer more
CHUNK = 256  # images whose positions are held in float64 at once
MOST_ENTRIES = 64  # of a list in a receipt
GROUPS = 8  # of neighbouring channels, in the image of maps
VECTORS_PER_CODE = 10  # of so many an evenly used code is missed once in 22,000 times


# -- directions -------------------------------------------------------------------------------------------------------


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
    if n < IMAGES_PER_DIM * dims:
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


# -- channels ---------------------------------------------------------------------------------------------------------


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


# -- codes ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def codebook_usage(sample: LatentSample, codec: Codec) -> dict[str, Result]:
    """Which codes the images' latents are nearest to.

    Returns:
        `codebook-usage`, the share of codes that occur; `codebook-perplexity`, in codes; `dead-codes`, how many never
        occur. Nothing for tokenizers without a codebook.
    """
    if not isinstance(codec.tokenizer, VQModel):
        return {}
    codes = codec.tokenizer.quantize.embedding.weight  # (k, c)
    counts = torch.zeros(len(codes), dtype=torch.float64)
    for rows in sample.parts():
        z = sample.mean[rows].to(codes.device)  # (b, c, h / f, w / f)
        indices = nearest_codes(z.movedim(1, -1).flatten(0, -2), codes)  # (b h w / f f,)
        counts += torch.bincount(indices, minlength=len(codes)).cpu()
    vectors, used = int(counts.sum()), int((counts > 0).sum())
    about = {"latents": "before quantisation", "codes": len(codes), "vectors": vectors}
    if vectors < VECTORS_PER_CODE * len(codes):
        about["warning"] = f"{vectors} latent vectors cannot show all of {len(codes)} codes; compare at equal n"
    by_rank = {"shares_by_rank": subsample(counts.sort(descending=True).values / vectors)}
    return {
        "codebook-usage": Result(used / len(codes), details=about),
        "codebook-perplexity": Result(perplexity(counts).item(), details={**about, **by_rank}),
        "dead-codes": Result(float(len(codes) - used), details=about),
    }
