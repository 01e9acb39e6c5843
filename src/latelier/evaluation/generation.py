"""How good generated pictures are, as a set, and whether they are merely remembered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from latelier.errors import LatelierError
from latelier.evaluation.features import FeatureExtractor, load_extractor
from latelier.evaluation.metrics import (
    FeatureStatistics,
    Measurement,
    mean_with_interval,
    precision_recall,
    size_warning,
)
from latelier.evaluation.reconstruction import pictures
from latelier.receipt import make_receipt
from latelier.recipe import Evaluate

NEIGHBOURS = 3  # of precision and recall


@torch.no_grad()
def evaluate_generation(
    samples: Iterable[Float[Tensor, "_ c h w"]],
    references: Iterable[Mapping[str, Any]],
    evaluate: Evaluate,
    receipt: Mapping[str, Any],
    device: torch.device | str = "cpu",
) -> list[Measurement]:
    """Compare generated pictures with real ones as distributions of features.

    Args:
        samples: batches of pictures in [-1, 1]; at most `evaluate.samples` are read.
        references: dicts with `image`; at most `evaluate.samples` pictures are read.
        evaluate: which of gfd, precision and recall, in which features; those of reconstruction are skipped.
        receipt: how the samples came about: reference, sampler, steps, guidance, ema, seed, tokenizer.
        device: where features are computed.

    Returns:
        `gfd-<features>`, `precision` and `recall` (k = 3), as far as asked for.

    Raises:
        LatelierError: if a side has no pictures, or too few.
    """
    wanted = [name for name in ("gfd", "precision", "recall") if name in evaluate.metrics]
    if not wanted:
        return []
    extractor = load_extractor(evaluate.features, device)
    ours = _features(({"image": batch} for batch in samples), evaluate.samples, extractor)  # (n, d)
    theirs = _features(references, evaluate.samples, extractor)  # (m, d)
    if not len(ours) or not len(theirs):
        raise LatelierError(
            f"Generation cannot be judged from {len(ours)} samples and {len(theirs)} reference pictures."
        )
    about = make_receipt(n=len(ours), n_reference=len(theirs), **receipt, **extractor.describe())
    result = []
    if "gfd" in wanted:
        warning = size_warning(min(len(ours), len(theirs)), extractor.dims)
        value = _statistics(ours).distance(_statistics(theirs))
        result.append(Measurement(f"gfd-{extractor.name}", value, {**about, **warning}))
    if "precision" in wanted or "recall" in wanted:
        inside = dict(zip(("precision", "recall"), precision_recall(ours, theirs, NEIGHBOURS)))
        for name in wanted:
            if name in inside:
                mean, interval = mean_with_interval(inside[name])
                result.append(Measurement(name, mean, {**about, "neighbours": NEIGHBOURS}, _shares(interval)))
    return result


@dataclass
class Neighbours:
    """The nearest training pictures of some samples.

    Attributes:
        indices: `(n, k)` positions in the order in which references came.
        distances: `(n, k)` Euclidean distances of features, ascending.
        images: `(n, k, c, h, w)` the pictures themselves.
    """

    indices: Int[Tensor, "n k"]
    distances: Float[Tensor, "n k"]
    images: Float[Tensor, "n k c h w"]


@torch.no_grad()
def nearest(
    samples: Float[Tensor, "n c h w"],
    references: Iterable[Mapping[str, Any]],
    extractor: FeatureExtractor,
    k: int = 1,
) -> Neighbours:
    """Find each sample's nearest training pictures in feature space, reading the training set once.

    Args:
        samples: generated pictures in [-1, 1].
        references: batches of training pictures, dicts with `image` of the samples' size.
        extractor: the space in which near is meant.
        k: how many neighbours of each.

    Raises:
        LatelierError: if there are fewer than k training pictures.
    """
    own = extractor(samples).cpu()  # (n, d)
    n, seen = len(samples), 0
    best = Neighbours(
        torch.zeros(n, 0, dtype=torch.long), torch.zeros(n, 0), samples.cpu().float()[:, None][:, :0]
    )  # nothing yet
    for batch in references:
        images = batch["image"].cpu().float()  # (b, c, h, w)
        distances = torch.cdist(own, extractor(images).cpu(), compute_mode="donot_use_mm_for_euclid_dist")  # (n, b)
        near = distances.topk(min(k, len(images)), largest=False)  # (n, <= k)
        found = Neighbours(near.indices + seen, near.values, images[near.indices])
        best = _closest(best, found, k)
        seen += len(images)
    if seen < k:
        raise LatelierError(f"{k} nearest training pictures were asked for, but there are only {seen}.")
    return best


def _closest(a: Neighbours, b: Neighbours, k: int) -> Neighbours:
    """The k nearest of both; of equals the earlier."""
    distances = torch.cat([a.distances, b.distances], 1)
    order = distances.argsort(dim=1, stable=True)[:, :k]  # (n, k)
    rows = torch.arange(len(order))[:, None]
    return Neighbours(
        torch.cat([a.indices, b.indices], 1)[rows, order],
        distances[rows, order],
        torch.cat([a.images, b.images], 1)[rows, order],
    )


def _features(batches: Iterable[Mapping[str, Any]], count: int, extractor: FeatureExtractor) -> Tensor:
    parts: Iterator[Tensor] = (extractor(images).cpu() for images in pictures(batches, count))
    return torch.cat([torch.zeros(0, extractor.dims), *parts])  # (n, d)


def _statistics(features: Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics(features.shape[1])
    for part in features.split(4096):
        statistics.update(part)
    return statistics


def _shares(interval: tuple[float, float] | None) -> tuple[float, float] | None:
    """A share cannot leave [0, 1]."""
    return interval and (max(0.0, interval[0]), min(1.0, interval[1]))
