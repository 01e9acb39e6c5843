"""Whether a latent space suits diffusion: it is smooth, and things that look alike lie together in it.

The first two of the three properties that "Latent Diffusion Models with Masked AutoEncoders" (ICCV 2025) asks for;
the third is in `reconstruction.py`. Everything is measured on normalised latents, where each channel has variance 1,
so that any two tokenizers compare. The definitions are told in `docs/latent-space.md`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from latelier.errors import LatelierError
from latelier.evaluation.clusters import LAYERS, RESAMPLES, Regions, measure_spread, perceptual_clusters, regions
from latelier.evaluation.distributions import FeatureStatistics
from latelier.evaluation.features import load_extractor
from latelier.evaluation.reconstruction import SETTINGS, psnr
from latelier.evaluation.results import Measurement, mean_with_interval, size_warning
from latelier.images import round_to_8_bit
from latelier.keyed_random import KeyedRandom
from latelier.losses.perceptual import LPIPS
from latelier.receipt import make_receipt
from latelier.recipe import Evaluate
from latelier.tokenizers.codec import Codec

Images = Iterable[tuple[Tensor, Tensor]]  # images (b, c, h, w) and labels (b,), -1 for none

AREA_END = 0.3  # the paper's largest noise level
PIXELS = 2**20  # of images whose feature maps are held at once: half a gigabyte
STATISTICS_IMAGES = 256  # what the scale of a codec without statistics is measured on


# -- smoothness -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_smoothness(
    codec: Codec,
    batches: Iterable[Mapping[str, Any]],
    evaluate: Evaluate,
    reference: str,
    extra: Mapping[str, Any] | None = None,
) -> list[Measurement]:
    """How much of the image is left when noise is added to its latents (the paper's figure 6).

    Args:
        codec: the tokenizer.
        batches: dicts with `image`, `(b, c, h, w)` in [-1, 1]; at most `evaluate.samples` images are read.
        evaluate: `noise_levels`, in standard deviations of each channel; 0 is always measured. Of `metrics`, psnr,
            lpips and rfd count. `seed` is the noise's: image i has the same at every level and in every codec of
            equal latent shape.
        reference: the name of the images, for the receipts.
        extra: fields for the receipts beyond those gathered here.

    Returns:
        `smoothness-<metric>`: the metric's mean over the noise levels from 0 to 0.3 (area under the curve by the
        trapezoidal rule over the range), in the metric's unit; the curve is in the receipt.

    Raises:
        LatelierError: if there are no images, no noise, or a metric is not defined for the images.
    """
    levels = sorted({0.0, *evaluate.noise_levels})
    if len(levels) < 2:
        raise LatelierError("evaluate.noise_levels has no level above 0; smoothness needs one, such as 0.3.")
    if not {"psnr", "lpips", "rfd"} & set(evaluate.metrics):
        return []
    judge = Judge(evaluate, codec.device, len(levels))
    scaled, image_batches, scale = with_statistics(codec, read(batches, evaluate.samples))
    n, size = 0, (0, 0)
    for images, _ in image_batches:
        size = (images.shape[2], images.shape[3])
        for part in images.to(codec.device).split(max(1, PIXELS // (size[0] * size[1]))):
            judge.compare(part, decode_noisy(scaled, part, levels, evaluate.seed, n))
            n += len(part)
    if n == 0:
        raise LatelierError(f"There are no images in {reference} to measure smoothness on.")
    receipt = make_receipt(
        n=n, reference=reference, image_size=size, latents="posterior mean", latent_scale=scale, seed=evaluate.seed,
        noise="z + level * standard deviation of the channel * normal noise", tokenizer=codec.hash(), **(extra or {}),
    )  # fmt: skip
    return judge.measure(levels, receipt)


def decode_noisy(
    codec: Codec, images: Float[Tensor, "b c h w"], levels: list[float], seed: int, first: int
) -> Iterator[Float[Tensor, "b c h w"]]:
    """Reconstructions, clamped, with more and more noise in the latents.

    Args:
        codec: with statistics, so that one standard deviation is 1.
        images: in [-1, 1].
        levels: of the noise.
        seed: of the noise.
        first: the first image's number; noise belongs to the number.
    """
    z = codec.encode(images)  # (b, k, *grid)
    draws = KeyedRandom(seed, torch.arange(first, first + len(z)), z.device)
    noise = draws.normal("smoothness", *z.shape[1:])  # (b, k, *grid)
    for level in levels:
        yield codec.decode(z + level * noise).clamp(-1, 1)


def area_weights(levels: list[float], end: float = AREA_END) -> Float[Tensor, " l"]:
    """Weights whose product with a curve is its mean over [first level, end], piecewise linear between levels.

    Args:
        levels: ascending, at least two.
        end: upper end, interpolated where it is no level; the last level where that is smaller.
    """
    from scipy.integrate import trapezoid

    end = min(end, levels[-1])
    grid = np.array([*(level for level in levels if level < end), end])
    areas = [trapezoid(np.interp(grid, levels, basis), grid) for basis in np.eye(len(levels))]
    return torch.tensor(areas, dtype=torch.float64) / (end - levels[0])


class Judge:
    """PSNR, LPIPS and Fréchet distance of each level's images to the originals, in one pass of VGG16 where it can be.

    Args:
        evaluate: which of the three, in the first of its features.
        device: of the networks.
        levels: how many there are.
    """

    def __init__(self, evaluate: Evaluate, device: torch.device, levels: int):
        self.names = [name for name in ("psnr", "lpips") if name in evaluate.metrics]
        self.extractor = load_extractor(evaluate.features[0], device) if "rfd" in evaluate.metrics else None
        shared = self.extractor is not None and isinstance(self.extractor.module, LPIPS)
        if shared:
            self.network = self.extractor.module  # type: ignore[union-attr]
        elif "lpips" in self.names:
            self.network = LPIPS("vgg").to(device)
        self.shared = shared and "lpips" in self.names
        self.curves: dict[str, list[Tensor]] = {name: [] for name in self.names}  # of (b, levels)
        dims = self.extractor.dims if self.extractor else 0
        self.theirs, self.ours = FeatureStatistics(dims), [FeatureStatistics(dims) for _ in range(levels)]

    def compare(self, images: Tensor, noisy: Iterable[Tensor]) -> None:
        """Count a batch in: originals and, level by level, what became of them."""
        maps, vector = self._look(images)
        if vector is not None:
            self.theirs.update(vector)
        rows: dict[str, list[Tensor]] = {name: [] for name in self.names}
        for statistics, image_batches in zip(self.ours, noisy):
            theirs, vector = self._look(image_batches)
            if "psnr" in rows:
                rows["psnr"].append(psnr(image_batches, images).cpu())
            if "lpips" in rows:
                rows["lpips"].append(self.network.compare(theirs, maps).cpu())
            if vector is not None:
                statistics.update(vector)
        for name, values in rows.items():
            self.curves[name].append(torch.stack(values, 1))  # (b, levels)

    def measure(self, levels: list[float], receipt: dict[str, Any]) -> list[Measurement]:
        """`smoothness-<metric>`: psnr and lpips with an interval, rfd without."""
        result = [
            _area(name, levels, torch.cat(parts), {**receipt, "settings": SETTINGS[name]})
            for name, parts in self.curves.items()
        ]
        if self.extractor is not None:
            n, curve = self.theirs.n, [statistics.distance(self.theirs) for statistics in self.ours]
            warning = size_warning(n, self.extractor.dims)
            about = {**receipt, **self.extractor.describe(), "n_reference": n, **warning}
            distances = torch.tensor([curve], dtype=torch.float64)  # (1, levels)
            result.append(_area(f"rfd-{self.extractor.name}", levels, distances, about))
        return result

    def _look(self, images: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """VGG16's feature maps for LPIPS, and the extractor's vectors: where it is VGG16, a mean of the last."""
        maps = self.network.features(round_to_8_bit(images)) if "lpips" in self.names else []
        if self.extractor is None:
            return maps, None
        return maps, maps[-1].mean((2, 3)) if self.shared else self.extractor(images)  # (b, d)


def _area(name: str, levels: list[float], curves: Float[Tensor, "n l"], receipt: dict[str, Any]) -> Measurement:
    """The mean curve's area, with an interval from the areas of single images where there are several."""
    curves, end = curves.double(), min(AREA_END, levels[-1])
    mean, interval = mean_with_interval(curves @ area_weights(levels))
    curve = curves.mean(0).tolist()  # (l,)
    about = {
        "curve": [[level, value] for level, value in zip(levels, curve)],
        "drop": float(np.interp(end, levels, curve)) - curve[0],
        "range": [0.0, end],
    }
    if end < AREA_END:
        about["warning"] = f"integrated to the last noise level {end:g}, not to {AREA_END:g}"
        about["warning"] = "; ".join(filter(None, [receipt.get("warning"), about["warning"]]))
    return Measurement(f"smoothness-{name}", mean, {**receipt, **about}, interval)


# -- perceptual compression -------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_compression(
    codec: Codec,
    batches: Iterable[Mapping[str, Any]],
    evaluate: Evaluate,
    reference: str,
    extra: Mapping[str, Any] | None = None,
) -> list[Measurement]:
    """Whether images, parts and patterns that look alike lie together (the paper's figure 7).

    The clusters are found in VGG16's features of the images, never in the latents, and are the same for every codec
    with the same latent grid. 1-D latents have no place in the image, so they have classes and objects only.

    Args:
        codec: the tokenizer.
        batches: dicts with `image` and optionally `label` `(b,)`, -1 for none; at most `evaluate.samples` images.
        evaluate: `clusters` at each granularity, never more than an eighth of the regions; `seed`.
        reference: the name of the images, for the receipts.
        extra: fields for the receipts beyond those gathered here.

    Returns:
        `within-<granularity>` (lower is better) and `separation-<granularity>` (higher is better), see `clusters.py`,
        for class (if two classes have two images each), object, part and pattern.

    Raises:
        LatelierError: if there are too few images, or VGG16 has no features for them.
    """
    from latelier.weights import LPIPS_WEIGHTS

    network = LPIPS("vgg").to(codec.device)
    scaled, image_batches, scale = with_statistics(codec, read(batches, evaluate.samples))
    kept: dict[str, Regions] = {}
    n, size = 0, (0, 0)
    for images, labels in image_batches:
        n, size = n + len(images), (images.shape[2], images.shape[3])
        images = _visible(images, reference).to(codec.device)
        taps = network.features(round_to_8_bit(images))  # 5 x (b, k, i, j)
        for name, (latents, looks, window) in regions(scaled.encode(images), taps).items():
            kept.setdefault(name, Regions(name, window, evaluate.seed)).add(latents, looks, labels, n - len(images))
    if n < 16:
        raise LatelierError(f"Compression needs at least 16 images, but {reference} has only {n}.")
    receipt = make_receipt(
        n=n, reference=reference, image_size=size, latents="posterior mean, normalised", latent_scale=scale,
        tokenizer=codec.hash(), seed=evaluate.seed, resamples=RESAMPLES, **(extra or {}),
    )  # fmt: skip
    if len(kept) == 1:
        receipt["note"] = "1-D latents have no place in the image: classes and objects only"
    result = _by_class(kept["object"], receipt)
    for name, found in kept.items():
        clusters = perceptual_clusters(found.looks, evaluate.clusters, evaluate.seed)  # (n,)
        layer = f"{LAYERS[name]} of LPIPS's VGG16, mean over the region, unit length"
        about = {"clustering": f"k-means of {layer}", "weights_sha256": LPIPS_WEIGHTS["vgg"].digest}
        result += _spread(name, found, clusters, torch.ones(len(clusters)).bool(), {**receipt, **about})
    return result


def _by_class(objects: Regions, receipt: dict[str, Any]) -> list[Measurement]:
    """The data set's classes as clusters of whole images; nothing where there are no two classes."""
    labels, counts = objects.labels[objects.labels >= 0].unique(return_counts=True)
    usable = torch.isin(objects.labels, labels[counts >= 2])  # (n,)
    if (counts >= 2).sum() < 2:
        return []
    return _spread("class", objects, objects.labels, usable, {**receipt, "clustering": "labels of the data"})


def _spread(
    name: str, found: Regions, clusters: Int[Tensor, " n"], chosen: Tensor, receipt: dict[str, Any]
) -> list[Measurement]:
    latents = found.latents if chosen.all() else found.latents[chosen]  # (n, d)
    clusters, images = clusters[chosen], found.images[chosen]
    spread = measure_spread(latents, clusters, images, found.seed)
    about = {
        **receipt, "granularity": name, "window": list(found.window), "regions": len(latents),
        "dims": latents.shape[1], "clusters": len(clusters.unique()), "images": len(images.unique()),
    }  # fmt: skip
    return [
        Measurement(f"within-{name}", spread.within, about, spread.within_interval),
        Measurement(f"separation-{name}", spread.separation, about, spread.separation_interval),
    ]


def _visible(images: Tensor, reference: str) -> Tensor:
    """Refuse images that VGG16 cannot see."""
    _, channels, height, width = images.shape
    if channels not in (1, 3) or min(height, width) < 16:
        raise LatelierError(
            f"VGG16 finds clusters in images of 1 or 3 channels and at least 16 pixels a side; {reference} has "
            f"{channels} channels, {height} x {width}; take compression out of evaluate.metrics."
        )
    return images


# -- both -------------------------------------------------------------------------------------------------------------


def read(batches: Iterable[Mapping[str, Any]], count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels (-1 where there are none), cut off after so many images."""
    left = count
    for batch in batches:
        if left <= 0:
            return
        images = batch["image"][:left]  # (b, c, h, w)
        labels = batch.get("label")
        left -= len(images)
        yield images, torch.full((len(images),), -1) if labels is None else labels[: len(images)].long()


def with_statistics(codec: Codec, image_batches: Images) -> tuple[Codec, Images, str]:
    """A codec whose latents have mean 0 and variance 1 in each channel, the images, and where the scale is from.

    A codec without stored statistics gets them from the first images, by the same definition as training's: of
    sampled latents, whose variance is that of the posterior's mean plus the mean of its variance.
    """
    if codec.std is not None:
        return codec, image_batches, "the codec's statistics"
    image_batches = iter(image_batches)
    first: list[tuple[Tensor, Tensor]] = []
    while sum(len(images) for images, _ in first) < STATISTICS_IMAGES and (batch := next(image_batches, None)):
        first.append(batch)
    if not first:
        return codec, first, "none"
    sums: list[Tensor] = []
    count = 0
    for images, _ in first:
        posterior = codec.posterior(images.to(codec.device))
        mean, std = (x.transpose(0, 1).flatten(1).double() for x in (posterior.mean, posterior.std))  # (c, b l)
        sums.append(torch.stack([mean.sum(1), (mean.square() + std.square()).sum(1)]))
        count += mean.shape[1]
    mean, square = torch.stack(sums).sum(0) / count  # (c,)
    std = (square - mean.square()).clamp(min=1e-12).sqrt()  # a dead channel stays finite
    scaled = Codec(codec.tokenizer, mean.float(), std.float(), precision=codec.precision)
    n = sum(len(images) for images, _ in first)
    return scaled, chain(first, image_batches), f"measured on the first {n} images"
