"""Statistics of latents: the posterior's rate and width, the scale of channels, and directions and codes in use.

The posterior N(mean, std²) of a latent number costs its Kullback-Leibler divergence to the prior N(0, 1). Where a
training weighs that much, numbers stop telling images apart: they are no longer active (Burda, Grosse & Salakhutdinov
2016, "Importance weighted autoencoders", section 5). The scale tells what a denoiser would see without normalisation.

The effective rank (Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality", definition 1)
of a covariance with eigenvalues e_i is

    exp(- sum_i p_i ln p_i)        p_i = e_i / sum_j e_j

It is d where d directions are used alike, 1 where all variance lies in one. The perplexity of codes is the same of how
often they are used. In a structured latent space (DC-AE 1.5, figure 2) the first channels show objects.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import VQModel
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from latelier.analysis.sample import LatentSample
from latelier.errors import NotMeasurable
from latelier.evaluation.distributions import FeatureStatistics
from latelier.evaluation.results import Result, mean_with_interval
from latelier.images import make_columns
from latelier.losses.codebook import nearest_codes, perplexity
from latelier.losses.reconstruction import gaussian_kl
from latelier.tokenizers.codec import Codec

ACTIVE = 0.01  # variance of the posterior's mean above which a number is active (Burda et al. 2016)
DEAD = 1e-6  # of the largest channel variance: what lies below is rounding, not signal
NO_SPREAD = -30.0  # the log-variance of a posterior that is a point
OUTLIER_SCORE = 3.5  # modified z-scores beyond it are outliers (Iglewicz & Hoaglin 1993)
OUTLIER_FACTOR = 4.0  # of the median variance, in either direction: what is nearer is never an outlier
MOST_IMAGES = 8192  # their Gram matrix takes half a GiB, and its eigenvalues a minute
IMAGES_PER_DIM = 10  # the effective rank of white noise is then 5 % too small, with fewer more
CHUNK = 256  # images whose positions are held in float64 at once
MOST_ENTRIES = 64  # of a list in a receipt
GROUPS = 8  # of neighbouring channels, in the image of maps
VECTORS_PER_CODE = 10  # with 10, an evenly used code is missed once in 22,000 times


@torch.no_grad()
def posterior_statistics(sample: LatentSample) -> dict[str, Result]:
    """Rate, width, activity and scale of latents.

    Of variational tokenizers `kl-bits-per-pixel` and `posterior-std` (normalised units); of all `active-channels`,
    `active-numbers` (shares), `latent-std` (raw units), `largest-variance-ratio` and `outlier-channels`. Details have
    the values of all channels, from 0. An error for fewer than two images, or latents that are equal or not finite.
    """
    if len(sample) < 2:
        raise NotMeasurable(f"The spread of latents needs at least 2 images, not {len(sample)}.")
    spread = Spread(sample)
    variance = spread.raw_variance()  # (c,)
    if not (variance.isfinite().all() and variance.max() > 0):
        raise NotMeasurable(f"The latents of {len(sample)} images are equal, or not finite.")
    _, channels, positions = spread.powers.shape
    about = {"latent_scale": sample.scale.origin, "latent_channels": channels, "latent_positions": positions}
    about["variational"] = spread.variational
    rate = _rate(spread, sample.image_size, about) if spread.variational else {}
    return {**rate, **_activity(spread, about), **_scale(spread, variance, sample.scaling_factor, about)}


class Spread:
    """Sums over images, from which all the measures follow; float64."""

    def __init__(self, sample: LatentSample):
        self.n = len(sample)
        self.mean, self.std = (statistic.double() for statistic in sample.scale.of_channels())  # (c,)
        self.variational = sample.logvar is not None and bool((sample.logvar > NO_SPREAD).any())
        self.powers = torch.zeros(())  # (4, c, l): sums of the first to fourth powers of normalised means
        self.widths = torch.zeros(())  # (2, c, l): sums of normalised standard deviations and their squares
        kl, own_kl, std_of_images = [], [], []
        std = self.std[:, None]  # (c, 1)
        for rows in sample.parts():
            raw = sample.mean[rows].flatten(2).double()  # (b, c, l)
            z = (raw - self.mean[:, None]) / std  # (b, c, l)
            self.powers = self.powers + torch.stack([z.pow(k).sum(0) for k in (1, 2, 3, 4)])
            width = sample.std(rows).flatten(2).double() / std  # (b, c, l)
            self.widths = self.widths + torch.stack([width.sum(0), width.square().sum(0)])
            if sample.logvar is not None and self.variational:
                logvar = sample.logvar[rows].flatten(2).double()  # (b, c, l)
                kl.append(gaussian_kl(raw, logvar).sum(2))
                own_kl.append(gaussian_kl(z, logvar - 2 * std.log()).sum(2))
                std_of_images.append(width.mean((1, 2)))
        if self.variational:
            self.kl, self.own_kl = torch.cat(kl), torch.cat(own_kl)  # (n, c): nats to N(0, 1), and to its own scale's
            self.std_of_images = torch.cat(std_of_images)  # (n,)

    def central(self) -> Float[Tensor, "2 c"]:
        """Second and fourth central moment of a channel's normalised posterior means, over images and positions."""
        a, b, c, d = self.powers.mean(2) / self.n  # (c,)
        fourth = d - 4 * a * c + 6 * a.square() * b - 3 * a**4
        return torch.stack([b - a.square(), fourth]).clamp(min=0)

    def raw_variance(self) -> Float[Tensor, " c"]:
        """Variance of each channel's raw latents as a denoiser is shown them, sampled from their posteriors."""
        return (self.central()[0] + self.widths[1].mean(1) / self.n) * self.std.square()


def _rate(spread: Spread, size: tuple[int, int], about: dict[str, Any]) -> dict[str, Result]:
    """What the posterior costs, and how wide it is."""
    _, channels, positions = spread.powers.shape
    bits = 1 / (math.log(2) * size[0] * size[1])  # per pixel, of a nat per image
    mean, interval = mean_with_interval(spread.kl.sum(1) * bits)
    rate = {
        **about, "prior": "N(0, 1) of raw latents",
        "nats_per_number": spread.kl.sum(1).mean().item() / (channels * positions),
        "by_channel": (spread.kl.mean(0) / positions).tolist(), "by_channel_unit": "nats per number",
        "bits_per_pixel_at_own_scale": (spread.own_kl.sum(1).mean() * bits).item(),
    }  # fmt: skip
    width, width_interval = mean_with_interval(spread.std_of_images)
    widths = (spread.widths[0].mean(1) / spread.n).tolist()  # (c,)
    return {
        "kl-bits-per-pixel": Result(mean, interval, rate),
        "posterior-std": Result(width, width_interval, {**about, "by_channel": widths}),
    }


def _activity(spread: Spread, about: dict[str, Any]) -> dict[str, Result]:
    """Shares of channels and numbers whose posterior mean differs between images."""
    unit = spread.std.square()  # (c,); normalised latents of channels of almost no scale are rounding, made large
    rounding = unit / unit.clamp(min=DEAD * unit.max().item())  # (c,)
    channels = spread.central()[0] * rounding  # (c,)
    first, second = spread.powers[:2] / spread.n  # (c, l)
    variance = (second - first.square()).clamp(min=0) * spread.n / (spread.n - 1)  # (c, l), unbiased
    numbers = variance * rounding[:, None] > ACTIVE  # (c, l)
    about = {**about, "threshold": ACTIVE, "unit": "variance of normalised posterior means"}
    active = (channels > ACTIVE).double().mean().item()
    share = numbers.double()  # (c, l)
    return {
        "active-channels": Result(active, details={**about, "by_channel": channels.tolist()}),
        "active-numbers": Result(share.mean().item(), details={**about, "by_channel": share.mean(1).tolist()}),
    }


def _scale(
    spread: Spread, variance: Float[Tensor, " c"], configured: float | None, about: dict[str, Any]
) -> dict[str, Result]:
    """How large raw latents are, and how unlike their channels."""
    mean = spread.powers[0].mean(1) / spread.n * spread.std + spread.mean  # (c,)
    overall = ((variance + mean.square()).mean() - mean.mean().square()).clamp(min=0).sqrt().item()
    second, fourth = spread.central()  # (c,)
    kurtosis = torch.where(second > 0, fourth / second.square().clamp(min=1e-24) - 3, 0.0)  # (c,)
    scale = {
        **about, "scaling_factor": 1 / overall, "shift_factor": mean.mean().item(),
        "by_channel": variance.sqrt().tolist(), "mean_by_channel": mean.tolist(),
        "excess_kurtosis_by_channel": kurtosis.tolist(),
    }  # fmt: skip
    if configured is not None:
        scale["configured_scaling_factor"] = configured
    median = variance.quantile(0.5)
    ratio = (variance / median.clamp(min=1e-12 * variance.max().item())).tolist()  # (c,)
    large, small = outlier_channels(variance)
    outliers = {
        **about, "large": large, "small": small, "by_channel": ratio,
        "by_channel_unit": "variance over the median channel's",
        "rule": f"|ln ratio| > max({OUTLIER_SCORE} x 1.4826 x its median, ln {OUTLIER_FACTOR:g})",
    }  # fmt: skip
    largest = {**about, "channel": int(variance.argmax()), "by_channel": ratio}
    return {
        "latent-std": Result(overall, details=scale),
        "largest-variance-ratio": Result(max(ratio), details=largest),
        "outlier-channels": Result(float(len(large) + len(small)), details=outliers),
    }


def outlier_channels(variance: Float[Tensor, " c"]) -> tuple[list[int], list[int]]:
    """Numbers, from 0, of channels whose variance is too large and too small among the others'.

    The modified z-score of Iglewicz & Hoaglin (1993), of logarithms: far from the median, in units of the median
    distance from it, and at least a factor, as that unit is nearly 0 where most channels are alike.
    """
    logs = variance.double().clamp(min=1e-12 * variance.max().item()).log()
    distance = logs - logs.quantile(0.5)  # (c,)
    usual = 1.4826 * distance.abs().quantile(0.5).item()  # one standard deviation of normal logarithms
    limit = max(OUTLIER_SCORE * usual, math.log(OUTLIER_FACTOR))
    return (distance > limit).nonzero().flatten().tolist(), (distance < -limit).nonzero().flatten().tolist()


@torch.no_grad()
def spectrum(sample: LatentSample) -> dict[str, Result]:
    """Effective ranks of at most 8192 images; an error for fewer than two, or latents that do not vary.

    `effective-rank` is of the covariance of flattened latents over images, at most n - 1 and too small where images are
    few, so that only values of equal n compare; `channel-rank` of the `(c, c)` covariance of channels over images and
    positions. Details have the spectra, as shares of the variance.
    """
    sample = sample.first(MOST_IMAGES)
    n = len(sample)
    if n < 2:
        raise NotMeasurable(f"A spectrum needs at least 2 images, not {n}.")
    whole = covariance_eigenvalues(sample.z.flatten(1))  # (min(n, d),)
    covariance = channel_covariance(sample.z)  # (c, c)
    channels = torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0)  # (c,)
    common = {"n": n, **sample.about(), "measure": "effective rank (Roy & Vetterli 2007)"}
    dims = sample.z[0].numel()
    about = {**common, "dims": dims, "spectrum": subsample(whole / whole.sum())}
    if n < IMAGES_PER_DIM * dims:
        about["warning"] = f"n = {n} images show at most {min(n - 1, dims)} of {dims} dimensions, and those unevenly"
        about["warning"] += "; compare only at equal n"
    of_channels = {**common, "dims": len(channels), "spectrum": subsample(channels / channels.sum())}
    of_channels["channel_std"] = subsample(covariance.diag().sqrt())
    return {
        "effective-rank": Result(effective_rank(whole), details=about),
        "channel-rank": Result(effective_rank(channels), details=of_channels),
    }


def covariance_eigenvalues(x: Float[Tensor, "n d"]) -> Float[Tensor, " r"]:
    """Eigenvalues of the covariance, largest first, float64; the min(n, d) that may differ from 0: of the `(n, n)` Gram
    matrix where that is smaller. An error if all vectors are equal, or some not finite.
    """
    x = x - x.mean(0, dtype=torch.float64)  # (n, d)
    product = x.T @ x if x.shape[1] <= len(x) else x @ x.T  # (r, r)
    if not (product.trace() > 0 and product.trace().isfinite()):
        raise NotMeasurable(f"The latents of {len(x)} vectors are equal, or not finite; they have no spectrum.")
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
    """At most `most` pairs `(number, value)`, numbers from 1, spaced evenly in their logarithm."""
    numbers = np.arange(1, len(values) + 1)
    if len(values) > most:
        numbers = np.unique(np.geomspace(1, len(values), most).round().astype(int))
    return [(int(number), values[number - 1].item()) for number in numbers]


@torch.no_grad()
def channel_statistics(sample: LatentSample) -> dict[str, Result]:
    """Where the variance of raw latents lies, and how sparse channels are.

    `variance-first-quarter`: the share of the raw latents' variance that the first quarter of the channels has.
    `channel-sparsity`: the mean over channels of Hoyer's (2004) measure, 0 for values of equal size, 1 for a single
    one that is not 0. Details have both for every channel.
    """
    sample = sample.first()
    mean, std = (statistic.view(len(statistic), -1) for statistic in (sample.scale.mean, sample.scale.std))
    raw = sample.z * std + mean  # (n, c, l)
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
    """Images in [-1, 1], and below each how large its latents are: the mean over groups of neighbouring channels."""
    if z.ndim != 4:
        raise NotMeasurable("1-D latents have no place in the image, so there are no maps of their channels.")
    maps = []
    for group in z.abs().chunk(min(GROUPS, z.shape[1]), dim=1):
        mean = group.mean(1, keepdim=True)  # (b, 1, h / f, w / f)
        low, high = mean.amin((2, 3), keepdim=True), mean.amax((2, 3), keepdim=True)
        shade = 2 * (mean - low) / (high - low).clamp(min=1e-6) - 1  # (b, 1, h / f, w / f) in [-1, 1]
        maps.append(F.interpolate(shade, images.shape[2:]).expand(-1, images.shape[1], -1, -1))
    return make_columns([images, *maps], columns=len(images))


@torch.no_grad()
def codebook_usage(sample: LatentSample, codec: Codec) -> dict[str, Result]:
    """`codebook-usage`, the share of codes that are nearest to some latent; `codebook-perplexity`, in codes;
    `dead-codes`, how many are not. Nothing for tokenizers without a codebook.
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
