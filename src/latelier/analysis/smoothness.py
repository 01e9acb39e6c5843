"""Images decoded from latents that were changed: with noise in them, or with the first channels alone.

Smoothness is the first of the three properties that "Latent Diffusion Models with Masked AutoEncoders" (ICCV 2025,
figure 6) asks of a latent space. Quality against the length of the prefix is that of DC-AE 1.5 (figure 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from latelier.analysis.sample import PIXELS, LatentSample
from latelier.errors import NotMeasurable
from latelier.evaluation.distributions import FeatureStatistics
from latelier.evaluation.features import FeatureExtractor, load_extractor
from latelier.evaluation.reconstruction import SETTINGS, psnr
from latelier.evaluation.results import Result, mean_with_interval, size_warning
from latelier.images import round_to_8_bit
from latelier.keyed_random import KeyedRandom
from latelier.losses.perceptual import LPIPS
from latelier.tokenizers.codec import Codec

AREA_END = 0.3  # the paper's largest noise level
QUARTERS = 4  # lengths of prefixes by default: quarters of the channels
MAPS_BYTES = 2**31  # of the originals' feature maps that are kept
METRICS = ("psnr", "lpips", "rfd")
Rows = dict[str, Tensor]


@torch.no_grad()
def smoothness(
    sample: LatentSample, codec: Codec, noise_levels: Sequence[float], metrics: Sequence[str], features: Sequence[str],
    seed: int = 0,
) -> dict[str, Result]:  # fmt: skip
    """PSNR, LPIPS and Fréchet distance (in the first of `features`) of images decoded from noisy latents.

    `smoothness-<metric>`: the metric's mean over noise levels (in standard deviations of each channel) from 0 to 0.3
    (area under the curve by the trapezoidal rule over the range), in its unit; the curve is in the details. Image i has
    the same noise at every level and in every codec of equal latent shape. An error if there is no noise.
    """
    levels = sorted({0.0, *noise_levels})
    if len(levels) < 2:
        raise NotMeasurable("evaluate.noise_levels has no level above 0; smoothness needs one, such as 0.3.")
    if not {*METRICS} & {*metrics}:
        return {}
    quality, scaled = Quality(sample, metrics, features, len(levels)), sample.scaled(codec)
    for rows in sample.parts(PIXELS):
        noisy = noisy_latents(sample.latents(rows).to(sample.device), levels, seed, rows.start)
        versions = [lambda z=z: scaled.decode(z).clamp(-1, 1) for z in noisy]
        quality.add(rows, versions, plain=0 if scaled is codec else None)
    about = {"latents": "posterior mean", "latent_scale": sample.scale.origin, "seed": seed}
    about["noise"] = "z + level * standard deviation of the channel * normal noise"
    result = {}
    for name, values in quality.values.items():
        result[f"smoothness-{name}"] = _area(levels, torch.cat(values), {**about, "settings": SETTINGS[name]})
    if quality.extractor is not None:
        distances = [ours.distance(quality.theirs) for ours in quality.ours]
        curve = torch.tensor([distances], dtype=torch.float64)  # (1, levels)
        result[f"smoothness-rfd-{quality.extractor.name}"] = _area(levels, curve, {**about, **quality.about()})
    return result


def noisy_latents(
    z: Float[Tensor, "b k *grid"], levels: Sequence[float], seed: int, first: int
) -> Iterator[Float[Tensor, "b k *grid"]]:
    """Normalised latents of the images `first`, ... with more and more noise, which belongs to the image's number."""
    rng = KeyedRandom(seed, torch.arange(first, first + len(z)), z.device)
    noise = rng.normal("smoothness", *z.shape[1:])  # (b, k, *grid)
    for level in levels:
        yield z + level * noise


def area_weights(levels: list[float], end: float = AREA_END) -> Float[Tensor, " l"]:
    """Weights whose product with a curve is its mean over [first level, end], piecewise linear between levels;
    `end` is interpolated where it is no level, and no farther than the last one.
    """
    from scipy.integrate import trapezoid

    end = min(end, levels[-1])
    grid = np.array([*(level for level in levels if level < end), end])
    areas = [trapezoid(np.interp(grid, levels, basis), grid) for basis in np.eye(len(levels))]
    return torch.tensor(areas, dtype=torch.float64) / (end - levels[0])


def _area(levels: list[float], curves: Float[Tensor, "n l"], details: dict[str, Any]) -> Result:
    """The mean curve's area, with an interval from the areas of single images where there are several."""
    curves, end = curves.double(), min(AREA_END, levels[-1])
    mean, interval = mean_with_interval(curves @ area_weights(levels))
    curve = curves.mean(0).tolist()  # (l,)
    drop = float(np.interp(end, levels, curve)) - curve[0]
    about = {"curve": [[*point] for point in zip(levels, curve)], "drop": drop, "range": [0.0, end]}
    if end < AREA_END:
        short = f"integrated to the last noise level {end:g}, not to {AREA_END:g}"
        about["warning"] = "; ".join(filter(None, [details.get("warning"), short]))
    return Result(mean, interval, {**details, **about})


@torch.no_grad()
def prefix_quality(
    sample: LatentSample, codec: Codec, prefix_lengths: Sequence[int] | None, metrics: Sequence[str],
    features: Sequence[str],
) -> dict[str, Result]:  # fmt: skip
    """`prefix-<metric>@<length>` for every length of `lengths_of`: PSNR, LPIPS and Fréchet distance of images decoded
    from the first channels alone.
    """
    lengths = lengths_of(prefix_lengths, codec.channels)
    if not {*METRICS} & {*metrics}:
        return {}
    quality, scaled = Quality(sample, metrics, features, len(lengths)), sample.scaled(codec)
    for rows in sample.parts(PIXELS):
        z = (sample.latents(rows) if scaled is codec else sample.mean[rows]).to(sample.device)  # (b, c, *grid)
        versions = [lambda z=z, k=length: codec.decode(z, k).clamp(-1, 1) for length in lengths]
        quality.add(rows, versions, plain=len(lengths) - 1 if scaled is codec else None)
    about = {"latents": "posterior mean, first channels; the others are zero", "channels": codec.channels}
    result = {}
    for name, values in quality.values.items():
        of_name = torch.cat(values).double()  # (n, lengths)
        for i, length in enumerate(lengths):
            details = {**about, "prefix": length, "settings": SETTINGS[name]}
            result[f"prefix-{name}@{length}"] = Result(*mean_with_interval(of_name[:, i]), details)
    if quality.extractor is not None:
        about |= quality.about()
        for length, ours in zip(lengths, quality.ours):
            name = f"prefix-rfd-{quality.extractor.name}@{length}"
            result[name] = Result(ours.distance(quality.theirs), details={**about, "prefix": length})
    return result


def lengths_of(wanted: Sequence[int] | None, channels: int) -> list[int]:
    """Ascending lengths: those of the recipe, or quarters of the channels; the last is always all of them."""
    quarters = {max(1, channels * i // QUARTERS) for i in range(1, QUARTERS + 1)}
    lengths = quarters if wanted is None else {*wanted, channels}
    if max(lengths) > channels:
        longest = f"evaluate.prefix_lengths has {max(lengths)}"
        raise NotMeasurable(f"{longest}, but the latents have only {channels} channels.")
    return sorted(lengths)


class Quality:
    """How close several versions of a sample's images are to the originals, in as few passes of networks as possible:
    maps of the originals and the quality of plain reconstructions stay in the sample's cache.
    """

    def __init__(self, sample: LatentSample, metrics: Sequence[str], features: Sequence[str], versions: int):
        self.sample, self.names = sample, [name for name in ("psnr", "lpips") if name in metrics]
        self.extractor: FeatureExtractor | None = None
        if "rfd" in metrics:
            self.extractor = extractor_of(sample, features[0])
        self.network = vgg16(sample, self.extractor) if "lpips" in self.names else None
        self.key = ("quality", *self.names, self.extractor and self.extractor.name)
        self.values: dict[str, list[Tensor]] = {name: [] for name in self.names}  # of (b, versions)
        dims = self.extractor.dims if self.extractor else 0
        self.theirs, self.ours = FeatureStatistics(dims), [FeatureStatistics(dims) for _ in range(versions)]

    def add(self, rows: slice, versions: Sequence[Callable[[], Tensor]], plain: int | None = None) -> None:
        """Count some of the images in: what makes each version, `(b, c, h, w)`, and which is the reconstruction."""
        found = []
        for number, make in enumerate(versions):
            rate, key = partial(self._rate, make, rows), (*self.key, rows.start, rows.stop)
            found.append(self.sample.recall(key, rate) if number == plain else rate())
        for name, values in self.values.items():
            values.append(torch.stack([row[name] for row in found], 1))  # (b, versions)
        if self.extractor is not None:
            self.theirs.update(self._original(rows)[1])
            for statistics, row in zip(self.ours, found):
                statistics.update(row["vector"])

    def about(self) -> dict[str, Any]:
        """What receipts say of Fréchet distances."""
        assert self.extractor is not None
        n = self.theirs.n
        return {**self.extractor.describe(), "n_reference": n, **size_warning(n, self.extractor.dims)}

    def _rate(self, make: Callable[[], Tensor], rows: slice) -> Rows:
        images, originals, found = make(), self.sample.pixels(rows), {}
        maps = [] if self.network is None else self.network.features(round_to_8_bit(images))
        if "psnr" in self.names:
            found["psnr"] = psnr(images, originals).cpu()
        if self.network is not None:
            found["lpips"] = self.network.compare(maps, self._original(rows)[0]).cpu()
        if self.extractor is not None:
            found["vector"] = _vector(self.extractor, images, maps)
        return found

    def _original(self, rows: slice) -> tuple[list[Tensor], Tensor]:
        """Maps and vectors of the originals."""
        maps = [] if self.network is None else original_maps(self.sample, self.network, rows)
        if self.extractor is None:
            return maps, torch.zeros(0)
        return maps, original_vectors(self.sample, self.extractor, rows, maps)


def extractor_of(sample: LatentSample, name: str) -> FeatureExtractor:
    """A feature extractor, opened once for the sample."""
    return sample.recall(("extractor", name), lambda: load_extractor(name, sample.device))


def original_vectors(
    sample: LatentSample, extractor: FeatureExtractor, rows: slice, maps: list[Tensor] | None = None
) -> Float[Tensor, "b d"]:
    """The extractor's vectors of some originals, whose maps may be known; kept."""
    key = ("vectors", extractor.name, rows.start, rows.stop)
    maps = maps or sample.cache.get(("maps", rows.start, rows.stop))
    return sample.recall(key, lambda: _vector(extractor, sample.pixels(rows), maps))


def _vector(extractor: FeatureExtractor, images: Tensor, maps: list[Tensor] | None) -> Float[Tensor, "b d"]:
    """The extractor's vectors: where it is the VGG16 of LPIPS, a mean of its last map."""
    return maps[-1].mean((2, 3)) if maps and isinstance(extractor.module, LPIPS) else extractor(images)


def vgg16(sample: LatentSample, extractor: FeatureExtractor | None = None) -> LPIPS:
    """LPIPS's VGG16, opened once for the sample; the extractor's, if it is that."""
    if extractor is not None and isinstance(extractor.module, LPIPS):
        sample.cache["vgg16"] = extractor.module
    return sample.recall("vgg16", lambda: LPIPS("vgg").to(sample.device))


def original_maps(sample: LatentSample, network: LPIPS, rows: slice) -> list[Tensor]:
    """VGG16's five feature maps of some originals; kept if those of all images fit."""
    key = ("maps", rows.start, rows.stop)
    if key in sample.cache:
        return sample.cache[key]
    maps = network.features(round_to_8_bit(sample.pixels(rows)))  # 5 x (b, k, i, j)
    size = sum(x.numel() * x.element_size() for x in maps)
    if size * len(sample) <= MAPS_BYTES * (rows.stop - rows.start):
        sample.cache[key] = maps
    return maps
