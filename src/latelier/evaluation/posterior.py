"""How latents are spread: the posterior's rate and width, the channels' scale, and which numbers are in use at all.

The posterior N(mean, std²) of a latent number costs its Kullback-Leibler divergence to the prior N(0, 1). Where a
training weighs that much, numbers stop telling images apart: they are no longer active (Burda, Grosse & Salakhutdinov
2016, "Importance weighted autoencoders", section 5). The scale tells what a denoiser would see without normalisation,
and which channels normalisation has to stretch or squeeze.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from latelier.errors import LatelierError
from latelier.evaluation.latent_space import read, with_statistics
from latelier.evaluation.results import Measurement, mean_with_interval
from latelier.losses.kl import gaussian_kl
from latelier.receipt import make_receipt
from latelier.recipe import Evaluate
from latelier.tokenizers.codec import Codec, Posterior

ACTIVE = 0.01  # variance of the posterior's mean above which a number is active (Burda et al. 2016)
DEAD = 1e-6  # of the largest channel variance: what lies below is rounding, not signal
NO_SPREAD = -30.0  # the log-variance of a posterior that is a point
OUTLIER_SCORE = 3.5  # modified z-scores beyond it are outliers (Iglewicz & Hoaglin 1993)
OUTLIER_FACTOR = 4.0  # of the median variance, in either direction: what is nearer is never an outlier


@torch.no_grad()
def measure_posterior(
    codec: Codec,
    batches: Iterable[Mapping[str, Any]],
    evaluate: Evaluate,
    reference: str,
    extra: Mapping[str, Any] | None = None,
) -> list[Measurement]:
    """Rate, width, activity and scale of latents.

    Args:
        codec: the tokenizer, variational or not.
        batches: dicts with `image`, `(b, c, h, w)` in [-1, 1]; at most `evaluate.samples` images are read.
        evaluate: `samples`.
        reference: the name of the images, for the receipts.
        extra: fields for the receipts beyond those gathered here.

    Returns:
        Of variational tokenizers `kl-bits-per-pixel` and `posterior-std` (normalised units); of all `active-channels`,
        `active-numbers` (shares), `latent-std` (raw units), `largest-variance-ratio` and `outlier-channels`. Receipts
        have the values of all channels, which count from 0.

    Raises:
        LatelierError: for fewer than two images, or latents that do not vary or are not finite.
    """
    scaled, image_batches, scale = with_statistics(codec, read(batches, evaluate.samples))
    spread = Spread(scaled)
    size = (0, 0)
    for images, _ in image_batches:
        size = (images.shape[2], images.shape[3])
        spread.add(scaled.posterior(images.to(codec.device)))
    if spread.n < 2:
        raise LatelierError(f"The spread of latents needs at least 2 images; {reference} has {spread.n}.")
    variance = spread.raw_variance()  # (c,)
    if not (variance.isfinite().all() and variance.max() > 0):
        raise LatelierError(f"The latents of {spread.n} images of {reference} are equal, or not finite.")
    _, channels, positions = spread.powers.shape
    receipt = make_receipt(
        n=spread.n, reference=reference, image_size=size, latent_scale=scale, latent_channels=channels,
        latent_positions=positions, variational=spread.variational, tokenizer=codec.hash(), **(extra or {}),
    )  # fmt: skip
    rate = _rate(spread, size, receipt) if spread.variational else []
    return [*rate, *_activity(spread, receipt), *_scale(spread, variance, receipt)]


class Spread:
    """Sums over images, from which all the measures follow; float64, on the CPU.

    Args:
        codec: with statistics, so that normalised units are defined.

    Attributes:
        n: images counted in.
        powers: `(4, c, l)` sums of the first to fourth powers of normalised posterior means.
        widths: `(2, c, l)` sums of normalised posterior standard deviations and their squares.
        kl: of each image, nats of each channel to N(0, 1), `(b, c)`.
        own_kl: the same, to a normal distribution of the channel's own mean and standard deviation.
        std_of_images: the mean normalised posterior standard deviation of each image, `(b,)`.
        variational: whether any posterior has a spread.
    """

    def __init__(self, codec: Codec):
        self.codec = codec
        self.n, self.variational = 0, False
        self.powers = self.widths = torch.zeros(())
        self.kl: list[Tensor] = []
        self.own_kl: list[Tensor] = []
        self.std_of_images: list[Tensor] = []

    @property
    def mean(self) -> Float[Tensor, " c"]:
        """The statistics' means of the channels."""
        assert self.codec.mean is not None
        return self.codec.mean.double().cpu()

    @property
    def std(self) -> Float[Tensor, " c"]:
        """The statistics' standard deviations of the channels."""
        assert self.codec.std is not None
        return self.codec.std.double().cpu()

    def add(self, posterior: Posterior) -> None:
        """Count the posteriors of a batch in."""
        raw, logvar = (x.flatten(2).cpu().double() for x in (posterior.mean, posterior.logvar))  # (b, c, l)
        std = self.std[:, None]  # (c, 1)
        z = (raw - self.mean[:, None]) / std  # (b, c, l)
        self.n += len(z)
        self.powers = self.powers + torch.stack([z.pow(k).sum(0) for k in (1, 2, 3, 4)])
        self.variational |= bool((logvar > NO_SPREAD).any())
        width = posterior.std.flatten(2).cpu().double() / std  # (b, c, l)
        self.widths = self.widths + torch.stack([width.sum(0), width.square().sum(0)])
        self.kl.append(gaussian_kl(raw, logvar).sum(2))
        self.own_kl.append(gaussian_kl(z, logvar - 2 * std.log()).sum(2))
        self.std_of_images.append(width.mean((1, 2)))

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


def _rate(spread: Spread, size: tuple[int, int], receipt: dict[str, Any]) -> list[Measurement]:
    """What the posterior costs, and how wide it is."""
    _, channels, positions = spread.powers.shape
    bits = 1 / (math.log(2) * size[0] * size[1])  # per pixel, of a nat per image
    kl, own = torch.cat(spread.kl), torch.cat(spread.own_kl)  # (n, c)
    mean, interval = mean_with_interval(kl.sum(1) * bits)
    about = {
        "prior": "N(0, 1) of raw latents", "nats_per_number": kl.sum(1).mean().item() / (channels * positions),
        "by_channel": (kl.mean(0) / positions).tolist(), "by_channel_unit": "nats per number",
        "bits_per_pixel_at_own_scale": (own.sum(1).mean() * bits).item(),
    }  # fmt: skip
    width, width_interval = mean_with_interval(torch.cat(spread.std_of_images))
    widths = (spread.widths[0].mean(1) / spread.n).tolist()  # (c,)
    return [
        Measurement("kl-bits-per-pixel", mean, {**receipt, **about}, interval),
        Measurement("posterior-std", width, {**receipt, "by_channel": widths}, width_interval),
    ]


def _activity(spread: Spread, receipt: dict[str, Any]) -> list[Measurement]:
    """Shares of channels and numbers whose posterior mean differs between images."""
    rounding = spread.rounding()  # (c,)
    channels = spread.central()[0] * rounding  # (c,)
    numbers = spread.variance_of_numbers() * rounding[:, None] > ACTIVE  # (c, l)
    about = {**receipt, "threshold": ACTIVE, "unit": "variance of normalised posterior means"}
    active = (channels > ACTIVE).double().mean().item()
    share = numbers.double()  # (c, l)
    return [
        Measurement("active-channels", active, {**about, "by_channel": channels.tolist()}),
        Measurement("active-numbers", share.mean().item(), {**about, "by_channel": share.mean(1).tolist()}),
    ]


def _scale(spread: Spread, variance: Float[Tensor, " c"], receipt: dict[str, Any]) -> list[Measurement]:
    """How large raw latents are, and how unlike their channels."""
    mean = spread.raw_mean()  # (c,)
    overall = ((variance + mean.square()).mean() - mean.mean().square()).clamp(min=0).sqrt().item()
    second, fourth = spread.central()  # (c,)
    kurtosis = torch.where(second > 0, fourth / second.square().clamp(min=1e-24) - 3, 0.0)  # (c,)
    about = {
        "scaling_factor": 1 / overall, "shift_factor": mean.mean().item(), "by_channel": variance.sqrt().tolist(),
        "mean_by_channel": mean.tolist(), "excess_kurtosis_by_channel": kurtosis.tolist(),
    }  # fmt: skip
    configured = spread.codec.tokenizer.config.get("scaling_factor")
    if configured is not None:
        about["configured_scaling_factor"] = configured
    median = variance.quantile(0.5)
    ratio = (variance / median.clamp(min=1e-12 * variance.max().item())).tolist()  # (c,)
    large, small = outlier_channels(variance)
    outliers = {
        "large": large, "small": small, "by_channel": ratio, "by_channel_unit": "variance over the median channel's",
        "rule": f"|ln ratio| > max({OUTLIER_SCORE} x 1.4826 x its median, ln {OUTLIER_FACTOR:g})",
    }  # fmt: skip
    return [
        Measurement("latent-std", overall, {**receipt, **about}),
        Measurement(
            "largest-variance-ratio", max(ratio),
            {**receipt, "channel": int(variance.argmax()), "by_channel": ratio},
        ),
        Measurement("outlier-channels", float(len(large) + len(small)), {**receipt, **outliers}),
    ]  # fmt: skip


def outlier_channels(variance: Float[Tensor, " c"]) -> tuple[list[int], list[int]]:
    """Channels whose variance is not like the others'.

    The modified z-score of Iglewicz & Hoaglin (1993), of logarithms: far from the median, in units of the median
    distance from it. Where most channels are alike that unit is nearly 0, hence the factor that is always allowed.

    Args:
        variance: of each channel, some above 0.

    Returns:
        Numbers of channels that are too large, and of those that are too small, counted from 0.
    """
    logs = variance.double().clamp(min=1e-12 * variance.max().item()).log()
    distance = logs - logs.quantile(0.5)  # (c,)
    usual = 1.4826 * distance.abs().quantile(0.5).item()  # one standard deviation of normal logarithms
    limit = max(OUTLIER_SCORE * usual, math.log(OUTLIER_FACTOR))
    return (distance > limit).nonzero().flatten().tolist(), (distance < -limit).nonzero().flatten().tolist()
