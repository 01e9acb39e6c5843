"""How latents are spread: the posterior's rate and width, the channels' scale, and which numbers are in use at all.

The posterior N(mean, std²) of a latent number costs its Kullback-Leibler divergence to the prior N(0, 1). Where a
training weighs that much, numbers stop telling images apart: they are no longer active (Burda, Grosse & Salakhutdinov
2016, "Importance weighted autoencoders", section 5). The scale tells what a denoiser would see without normalisation,
and which channels normalisation has to stretch or squeeze.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from latelier.analysis.sample import LatentSample
from latelier.errors import LatelierError
from latelier.evaluation.results import Result, mean_with_interval
from latelier.losses.reconstruction import gaussian_kl

ACTIVE = 0.01  # variance of the posterior's mean above which a number is active (Burda et al. 2016)
DEAD = 1e-6  # of the largest channel variance: what lies below is rounding, not signal
NO_SPREAD = -30.0  # the log-variance of a posterior that is a point
OUTLIER_SCORE = 3.5  # modified z-scores beyond it are outliers (Iglewicz & Hoaglin 1993)
OUTLIER_FACTOR = 4.0  # of the median variance, in either direction: what is nearer is never an outlier


@torch.no_grad()
def posterior_statistics(sample: LatentSample) -> dict[str, Result]:
    """Rate, width, activity and scale of latents, of tokenizers that are variational or not.

    Returns:
        Of variational tokenizers `kl-bits-per-pixel` and `posterior-std` (normalised units); of all `active-channels`,
        `active-numbers` (shares), `latent-std` (raw units), `largest-variance-ratio` and `outlier-channels`. Details
        have the values of all channels, which count from 0.

    Raises:
        LatelierError: for fewer than two images, or latents that do not vary or are not finite.
    """
    if len(sample) < 2:
        raise LatelierError(f"The spread of latents needs at least 2 images, not {len(sample)}.")
    spread = Spread(sample)
    variance = spread.raw_variance()  # (c,)
    if not (variance.isfinite().all() and variance.max() > 0):
        raise LatelierError(f"The latents of {len(sample)} images are equal, or not finite.")
    _, channels, positions = spread.powers.shape
    about = {
        "latent_scale": sample.scale.origin, "latent_channels": channels, "latent_positions": positions,
        "variational": spread.variational,
    }  # fmt: skip
    rate = _rate(spread, sample.image_size, about) if spread.variational else {}
    return {**rate, **_activity(spread, about), **_scale(spread, variance, sample.scaling_factor, about)}


class Spread:
    """Sums over images, from which all the measures follow; float64."""

    def __init__(self, sample: LatentSample):
        self.n, self.mean, self.std = len(sample), sample.scale.mean.double(), sample.scale.std.double()
        self.variational = sample.logvar is not None and bool((sample.logvar > NO_SPREAD).any())
        self.powers = torch.zeros(())  # (4, c, l): sums of the first to fourth powers of normalised means
        self.widths = torch.zeros(())  # (2, c, l): sums of normalised standard deviations and their squares
        kl: list[Tensor] = []
        own_kl: list[Tensor] = []
        std_of_images: list[Tensor] = []
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

    def variance_of_numbers(self) -> Float[Tensor, "c l"]:
        """Variance over images of each number's normalised posterior mean, unbiased."""
        first, second = self.powers[:2] / self.n  # (c, l)
        return (second - first.square()).clamp(min=0) * self.n / (self.n - 1)

    def central(self) -> Float[Tensor, "2 c"]:
        """Second and fourth central moment of a channel's normalised posterior means, over images and positions."""
        a, b, c, d = self.powers.mean(2) / self.n  # (c,)
        fourth = d - 4 * a * c + 6 * a.square() * b - 3 * a**4
        return torch.stack([b - a.square(), fourth]).clamp(min=0)

    def raw_mean(self) -> Float[Tensor, " c"]:
        """Mean of each channel's raw latents."""
        return self.powers[0].mean(1) / self.n * self.std + self.mean

    def raw_variance(self) -> Float[Tensor, " c"]:
        """Variance of each channel's raw latents as a denoiser is shown them, sampled from their posteriors."""
        return (self.central()[0] + self.widths[1].mean(1) / self.n) * self.std.square()

    def rounding(self) -> Float[Tensor, " c"]:
        """1, and less for a channel whose scale is so small that its normalised latents are rounding, made large."""
        unit = self.std.square()
        return unit / unit.clamp(min=DEAD * unit.max().item())


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
    rounding = spread.rounding()  # (c,)
    channels = spread.central()[0] * rounding  # (c,)
    numbers = spread.variance_of_numbers() * rounding[:, None] > ACTIVE  # (c, l)
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
    mean = spread.raw_mean()  # (c,)
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
    distance from it. Where most channels are alike that unit is nearly 0, hence the factor that is always allowed.
    """
    logs = variance.double().clamp(min=1e-12 * variance.max().item()).log()
    distance = logs - logs.quantile(0.5)  # (c,)
    usual = 1.4826 * distance.abs().quantile(0.5).item()  # one standard deviation of normal logarithms
    limit = max(OUTLIER_SCORE * usual, math.log(OUTLIER_FACTOR))
    return (distance > limit).nonzero().flatten().tolist(), (distance < -limit).nonzero().flatten().tolist()
