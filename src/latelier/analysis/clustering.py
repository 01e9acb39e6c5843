"""Perceptual compression: whether images, parts and patterns that look alike lie together in the latent space.

The second property that "Latent Diffusion Models with Masked AutoEncoders" (ICCV 2025, figure 7) asks of a latent
space: how tightly latents lie within clusters, and how far clusters lie apart. Clusters are found in VGG16's features
of the images, never in the latents. Neither number changes when the space is scaled or rotated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from latelier.analysis.sample import PIXELS, LatentSample
from latelier.analysis.smoothness import original_maps, vgg16
from latelier.errors import NotMeasurable
from latelier.evaluation.results import Result
from latelier.keyed_random import KeyedRandom
from latelier.weights import LPIPS_WEIGHTS

RESAMPLES = 200
LEAST_IMAGES, LEAST_SIDE = 16, 16  # pixels a side: VGG16 sees nothing smaller
REGIONS_PER_CLUSTER = 8  # k-means makes at most one cluster per 8 regions
MOST_REGIONS = 20_000
MOST_NUMBERS = 2**27  # latent numbers kept at each granularity, half a GiB
TAPS = {"object": 4, "part": 3, "pattern": 1}  # of the five that LPIPS's VGG16 has
LAYERS = {"object": "relu5_3", "part": "relu4_3", "pattern": "relu2_2"}

Interval = tuple[float, float]


@torch.no_grad()
def perceptual_compression(sample: LatentSample, clusters: int = 64, seed: int = 0) -> dict[str, Result]:
    """Within and separation of clusters that are the same for every codec with the same latent grid.

    `within-<granularity>` (lower is better) and `separation-<granularity>` (higher is better) for class (if two classes
    have two images each), object, and of 2-D latents part and pattern; at each granularity, at most `clusters`, never
    more than an eighth of the regions. An error for too few images, or such as VGG16 has no features for.
    """
    assert sample.images is not None
    channels, (height, width) = sample.images.shape[1], sample.image_size
    if channels not in (1, 3) or min(height, width) < LEAST_SIDE:
        raise NotMeasurable(
            f"VGG16 finds clusters in images of 1 or 3 channels and at least {LEAST_SIDE} pixels a side, not of "
            f"{channels} channels, {height} x {width}; take compression out of evaluate.metrics."
        )
    if len(sample) < LEAST_IMAGES:
        raise NotMeasurable(f"Compression needs at least {LEAST_IMAGES} images, but there are only {len(sample)}.")
    network, kept = vgg16(sample), dict[str, Regions]()
    for rows in sample.parts(PIXELS):
        taps = original_maps(sample, network, rows)  # 5 x (b, k, i, j)
        z = sample.latents(rows).to(sample.device)  # (b, c, *grid)
        for name, (latents, looks, window) in regions(z, taps).items():
            kept.setdefault(name, Regions(name, window, seed)).add(latents, looks, sample.labels[rows], rows.start)
    about = {"latents": "posterior mean, normalised", "latent_scale": sample.scale.origin, "seed": seed}
    about["resamples"] = RESAMPLES
    if len(kept) == 1:
        about["note"] = "1-D latents have no place in the image: classes and objects only"
    result = _by_class(kept["object"], about)
    for name, found in kept.items():
        groups = perceptual_clusters(found.looks, clusters, seed)  # (n,)
        layer = f"{LAYERS[name]} of LPIPS's VGG16, mean over the region, unit length"
        how = {"clustering": f"k-means of {layer}", "weights_sha256": LPIPS_WEIGHTS["vgg"].digest}
        result |= _spread(name, found, groups, torch.ones(len(groups)).bool(), {**about, **how})
    return result


def _by_class(objects: Regions, about: dict[str, Any]) -> dict[str, Result]:
    """The data set's classes as clusters of whole images; nothing where there are no two classes."""
    labels, counts = objects.labels[objects.labels >= 0].unique(return_counts=True)
    usable = torch.isin(objects.labels, labels[counts >= 2])  # (n,)
    if (counts >= 2).sum() < 2:
        return {}
    return _spread("class", objects, objects.labels, usable, {**about, "clustering": "labels of the data"})


def _spread(
    name: str, found: Regions, clusters: Int[Tensor, " n"], chosen: Tensor, about: dict[str, Any]
) -> dict[str, Result]:
    latents = found.latents if chosen.all() else found.latents[chosen]  # (n, d)
    clusters, images = clusters[chosen], found.images[chosen]
    spread = measure_spread(latents, clusters, images, found.seed)
    details = {
        **about, "granularity": name, "window": list(found.window), "regions": len(latents),
        "dims": latents.shape[1], "clusters": len(clusters.unique()), "images": len(images.unique()),
    }  # fmt: skip
    return {
        f"within-{name}": Result(spread.within, spread.within_interval, details),
        f"separation-{name}": Result(spread.separation, spread.separation_interval, details),
    }


@dataclass
class Spread:
    """Two estimates with 95 % confidence intervals, None where some resample has no finite value."""

    within: float  # share of the variance that lies inside clusters: 0 for points, 1 where the space knows no clusters
    separation: float  # half the mean squared distance of two cluster means over the variance inside clusters
    within_interval: Interval | None
    separation_interval: Interval | None


def measure_spread(
    x: Float[Tensor, "n d"], clusters: Int[Tensor, " n"], images: Int[Tensor, " n"], seed: int = 0
) -> Spread:
    """Within and separation, with intervals from a bootstrap over images; the clusters are taken as fixed.

    Regions of one image are not independent, so whole images are drawn with replacement. Doubles make clusters seem
    tighter and farther apart, so percentiles are shifted until the resamples' mean is the estimate.
    """
    clusters = clusters.unique(return_inverse=True)[1]  # (n,), 0 ... k - 1
    owners, images = images.unique(return_inverse=True)
    n, count = len(x), int(clusters.max()) + 1
    if count < 2 or n <= count:
        raise NotMeasurable(
            f"Within and separation need at least 2 clusters, and more regions than clusters, not {count} clusters of "
            f"{n} regions; evaluate on more, or more varied, images."
        )
    if not x.var(0).sum() > 0:
        raise NotMeasurable(f"The latents of all {n} regions are equal, or not finite; there is nothing to compare.")
    estimate = torch.cat(within_and_separation(x, clusters, torch.ones(1, len(x)))).tolist()
    weights = image_weights(len(owners), seed)  # (r, p)
    resampled = within_and_separation(x, clusters, weights, images)  # 2 x (r,)
    within, separation = (_recentred(values, value) for values, value in zip(resampled, estimate))
    return Spread(estimate[0], estimate[1], within and (max(0.0, within[0]), min(1.0, within[1])), separation)


def within_and_separation(
    x: Float[Tensor, "n d"], clusters: Int[Tensor, " n"], weights: Float[Tensor, "r p"],
    images: Int[Tensor, " n"] | None = None,
) -> tuple[Float[Tensor, " r"], Float[Tensor, " r"]]:  # fmt: skip
    """The two estimators, for each of r weightings at once.

    With n_k vectors of mean m_k in each of K clusters, N in all, and the mean squares of a one-way analysis of variance

        MSW = sum_k sum_i |x_i - m_k|^2 / (N - K)        MSB = sum_k n_k |m_k - m|^2 / (K - 1)

    the unbiased variance components (Searle, Casella & McCulloch 1992, section 3.6) and the results are

        s_w^2 = MSW        s_b^2 = max(0, (MSB - MSW) / n_0)        n_0 = (N - sum_k n_k^2 / N) / (K - 1)
        within = s_w^2 / (s_w^2 + s_b^2)
        separation = mean over pairs of (|m_i - m_j|^2 - MSW (1/n_i + 1/n_j)) / (2 MSW)

    A mean over pairs of |m_i - m_j|^2 is twice the sample variance of the means, so no pair is ever formed. Weights say
    how often each vector, or with `images` each image, counts; clusters of weight 0 do not exist.
    """
    rows, count = len(weights), int(clusters.max()) + 1
    weights = weights.double()
    sizes = torch.zeros(rows, count, dtype=torch.float64)  # (r, k)
    inside, means_squared, weighted_squared = torch.zeros(3, rows, dtype=torch.float64)  # 3 x (r,)
    means, total = torch.zeros(2, rows, x.shape[1], dtype=torch.float64)  # 2 x (r, d)
    centre = x.mean(0).double()  # (d,); sums of squares about it lose fewer digits
    for k in range(count):
        members = (clusters == k).nonzero()[:, 0]  # (n_k,)
        own = x[members].double() - centre  # (n_k, d)
        weight = weights[:, members if images is None else images[members]]  # (r, n_k)
        sizes[:, k] = weight.sum(1)
        mean = weight @ own / sizes[:, k : k + 1].clamp(min=1)  # (r, d)
        square = mean.square().sum(1)  # (r,)
        inside += (weight @ own.square().sum(1) - sizes[:, k] * square).clamp(min=0)
        means_squared += square
        weighted_squared += sizes[:, k] * square
        means += mean
        total += sizes[:, k : k + 1] * mean
    number, n = (sizes > 0).sum(1), sizes.sum(1)  # (r,)
    msw = inside / (n - number)
    msb = (weighted_squared - total.square().sum(1) / n) / (number - 1)
    n0 = (n - sizes.square().sum(1) / n) / (number - 1)
    between = ((msb - msw) / n0).clamp(min=0)
    spread = (means_squared - means.square().sum(1) / number) / (number - 1)  # sample variance of the means
    inverse = torch.where(sizes > 0, 1 / sizes.clamp(min=1), 0).sum(1) / number  # mean of 1 / n_k
    return msw / (msw + between), spread / msw - inverse


def image_weights(images: int, seed: int, resamples: int = RESAMPLES) -> Float[Tensor, "r p"]:
    """How often each image appears in each bootstrap resample."""
    uniform = KeyedRandom(seed, torch.arange(resamples)).uniform("bootstrap", images)  # (r, p)
    picks = (uniform * images).long().clamp(max=images - 1)  # rounding may reach 1
    return torch.zeros(resamples, images).scatter_add_(1, picks, torch.ones_like(uniform))


def _recentred(values: Float[Tensor, " r"], estimate: float) -> Interval | None:
    """The middle 95 % of resampled values, shifted so that their mean is the estimate."""
    if not values.isfinite().all():
        return None
    low, high = (values - values.mean()).quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return estimate + low, estimate + high


class Region(NamedTuple):
    """A batch's regions of one granularity: r of them in each image."""

    latents: Float[Tensor, "b r d"]
    looks: Float[Tensor, "b r k"]
    window: tuple[int, ...]


def regions(z: Float[Tensor, "b c *grid"], taps: list[Tensor]) -> dict[str, Region]:
    """Latents and VGG16 features (`taps`, finest first) of the same regions: the whole image (object), and of 2-D
    latents windows of it (part) and single positions (pattern).
    """
    grid = tuple(z.shape[2:])
    windows = {"object": grid}
    if len(grid) == 2:
        windows |= {"part": (part_side(grid[0]), part_side(grid[1])), "pattern": (1, 1)}
    result = {}
    for name, window in windows.items():
        counts = tuple(side // part for side, part in zip(grid, window)) if len(grid) == 2 else (1, 1)
        looks = F.adaptive_avg_pool2d(taps[TAPS[name]], counts).flatten(2).transpose(1, 2)  # (b, r, k)
        blocks = F.unfold(z, window, stride=window).transpose(1, 2) if len(grid) == 2 else z.flatten(1)[:, None]
        result[name] = Region(blocks, looks, window)  # blocks: (b, r, d)
    return result


def part_side(side: int) -> int:
    """Side of a part: the largest divisor of the grid's side that is at most a quarter of it, so that parts tile."""
    return next(part for part in range(max(1, side // 4), 0, -1) if side % part == 0)


class Regions:
    """At most `most` regions out of a stream of images, those with the smallest random numbers: fewer where their
    latents would not fit into `MOST_NUMBERS`. The window is a region's size in latent positions.
    """

    def __init__(self, name: str, window: tuple[int, ...], seed: int, most: int = MOST_REGIONS):
        self.name, self.window, self.seed, self.most = name, window, seed, most
        self._parts: list[tuple[Tensor, ...]] = []
        self._count = 0

    def add(
        self, latents: Float[Tensor, "b r d"], looks: Float[Tensor, "b r k"], labels: Int[Tensor, " b"], first: int
    ) -> None:
        """Count in the regions of images first, first + 1, ..."""
        b, r, d = latents.shape
        self.most = min(self.most, max(1, MOST_NUMBERS // d))
        numbers = torch.arange(first, first + b)
        keys = KeyedRandom(self.seed, numbers).uniform(f"region-{self.name}", r).flatten()  # (b r,)
        parts = (keys, latents.flatten(0, 1), looks.flatten(0, 1), numbers.repeat_interleave(r))
        self._parts.append((*(part.cpu() for part in parts), labels.cpu().repeat_interleave(r)))
        self._count += len(keys)
        if self._count > 1.25 * self.most:
            self._prune()

    latents = property(lambda self: self._column(1), doc="Flattened latents of the regions that stayed, `(n, d)`.")
    looks = property(lambda self: self._column(2), doc="Their VGG16 features, `(n, k)`.")
    images = property(lambda self: self._column(3), doc="Numbers of their images, `(n,)`.")
    labels = property(lambda self: self._column(4), doc="Labels of their images, `(n,)`.")

    def _column(self, index: int) -> Tensor:
        if len(self._parts) > 1 or self._count > self.most:
            self._prune()
        return self._parts[0][index]

    def _prune(self) -> None:
        columns = [torch.cat(column) for column in zip(*self._parts)]
        stay = columns[0].argsort(stable=True)[: self.most].sort().values  # (most,), in the order of the stream
        self._parts, self._count = [tuple(column[stay] for column in columns)], len(stay)


def perceptual_clusters(looks: Float[Tensor, "n k"], count: int, seed: int) -> Int[Tensor, " n"]:
    """k-means of unit-normalised feature vectors; never more than n / 8 clusters, nor than different vectors."""
    import numpy as np
    from sklearn.cluster import KMeans

    unit = F.normalize(looks.float(), dim=1).cpu().numpy()  # (n, k)
    count = min(count, len(unit) // REGIONS_PER_CLUSTER, len(np.unique(unit.round(4), axis=0)))
    if count < 2:
        return torch.zeros(len(unit), dtype=torch.long)
    labels = KMeans(count, n_init=1, max_iter=100, random_state=seed % 2**32).fit_predict(unit)
    return torch.from_numpy(labels).long()  # (n,)
