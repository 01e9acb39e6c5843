"""PSNR, LPIPS and Fréchet distance of decoded images, version by version, with as few passes of networks as possible.

Feature maps of the originals, where memory holds them, and the quality of plain reconstructions are left in the
sample's cache, so that no measure computes them again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from latelier.analysis.sample import LatentSample
from latelier.evaluation.distributions import FeatureStatistics
from latelier.evaluation.features import FeatureExtractor, load_extractor
from latelier.evaluation.results import psnr, size_warning
from latelier.images import round_to_8_bit
from latelier.losses.perceptual import LPIPS

MAPS_BYTES = 2**31  # of the originals' feature maps that are kept
METRICS = ("psnr", "lpips", "rfd")
Rows = dict[str, Tensor]


class Quality:
    """How close several versions of a sample's images are to the originals.

    Args:
        sample: the originals.
        metrics: of these psnr, lpips and rfd count.
        features: extractors; the first is rfd's.
        versions: how many there are of each image.
    """

    def __init__(self, sample: LatentSample, metrics: Sequence[str], features: Sequence[str], versions: int):
        self.sample, self.names = sample, [name for name in ("psnr", "lpips") if name in metrics]
        self.extractor = extractor_of(sample, features[0]) if "rfd" in metrics else None
        self.network = vgg16(sample, self.extractor) if "lpips" in self.names else None
        self.shared = self.network is not None and self.extractor is not None and self.extractor.module is self.network
        self.key = ("quality", *self.names, self.extractor and self.extractor.name)
        self.values: dict[str, list[Tensor]] = {name: [] for name in self.names}  # of (b, versions)
        dims = self.extractor.dims if self.extractor else 0
        self.theirs, self.ours = FeatureStatistics(dims), [FeatureStatistics(dims) for _ in range(versions)]

    def add(self, rows: slice, versions: Sequence[Callable[[], Tensor]], plain: int | None = None) -> None:
        """Count some of the images in.

        Args:
            rows: which.
            versions: what makes each version, `(b, c, h, w)` in [-1, 1].
            plain: which of them is the reconstruction, unless none is.
        """
        found = []
        for number, make in enumerate(versions):
            if number == plain:
                found.append(self.sample.recall((*self.key, rows.start, rows.stop), lambda: self._rate(make(), rows)))  # noqa: B023
            else:
                found.append(self._rate(make(), rows))
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

    def _rate(self, images: Tensor, rows: slice) -> Rows:
        originals, found = self.sample.pixels(rows), {}
        maps, vector = self._look(images)
        if "psnr" in self.names:
            found["psnr"] = psnr(images, originals).cpu()
        if self.network is not None:
            found["lpips"] = self.network.compare(maps, self._original(rows)[0]).cpu()
        if vector is not None:
            found["vector"] = vector
        return found

    def _original(self, rows: slice) -> tuple[list[Tensor], Tensor]:
        """Maps and vectors of the originals."""
        maps = [] if self.network is None else original_maps(self.sample, self.network, rows)
        if self.extractor is None:
            return maps, torch.zeros(0)
        key = ("vectors", self.extractor.name, self.shared, rows.start, rows.stop)
        return maps, self.sample.recall(key, lambda: self._vector(self.sample.pixels(rows), maps))

    def _look(self, images: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """VGG16's maps of images for LPIPS, and the extractor's vectors: where it is VGG16, a mean of the last map."""
        maps = [] if self.network is None else self.network.features(round_to_8_bit(images))
        return maps, None if self.extractor is None else self._vector(images, maps)

    def _vector(self, images: Tensor, maps: list[Tensor]) -> Tensor:
        assert self.extractor is not None
        return maps[-1].mean((2, 3)) if self.shared else self.extractor(images)  # (b, d)


def extractor_of(sample: LatentSample, name: str) -> FeatureExtractor:
    """A feature extractor, opened once for the sample."""
    return sample.recall(("extractor", name), lambda: load_extractor(name, sample.device))


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
