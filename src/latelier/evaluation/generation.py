"""How good generated images are, as a set, and whether they are merely remembered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from latelier.errors import LatelierError
from latelier.evaluation.distributions import (
    CMMD_SCALE,
    GROUPS,
    SIGMA,
    gaussian_kernel,
    polynomial_kernel,
    precision_recall,
    subset_mmd,
)
from latelier.evaluation.features import (
    NEEDS,
    FeatureExtractor,
    check_features,
    inception_of,
    load_extractors,
)
from latelier.evaluation.processes import is_main
from latelier.evaluation.reconstruction import FRECHET_INTERVAL, read_images
from latelier.evaluation.references import FeatureCollector, FeatureSet, Key, collect, reference_sets
from latelier.evaluation.results import Measurement, mean_with_interval, size_warning
from latelier.receipt import make_receipt
from latelier.recipe import Evaluate

NEIGHBOURS = 3  # of precision and recall
FID_SAMPLES = 50_000
CLIP = "clip"  # how extractors' names begin that CMMD is defined in
KEPT = {
    "gfd": "features", "fid50k": "features", "sfid": "spatial", "inception-score": "logits", "kid": "vectors",
    "cmmd": "vectors", "precision": "vectors", "recall": "vectors",
}  # fmt: skip


@torch.no_grad()
def evaluate_generation(
    samples: Iterable[Float[Tensor, "_ c h w"]],
    references: Iterable[Mapping[str, Any]],
    evaluate: Evaluate,
    receipt: Mapping[str, Any],
    device: torch.device | str = "cpu",
    key: Key | None = None,
    shared: bool = False,
) -> list[Measurement]:
    """Compare generated images with real ones as distributions of features.

    Args:
        samples: batches of images in [-1, 1]; at most `evaluate.samples` are read.
        references: dicts with `image`; at most `evaluate.samples` images are read.
        evaluate: which metrics, in which features; those of reconstruction are skipped.
        receipt: how the samples came about: reference, sampler, steps, guidance, ema, seed, tokenizer.
        device: where features are computed.
        key: what the references depend on, see `references.reference_key`: what is kept of them is cached.
        shared: whether all processes take part, each with its own batches, see `processes.gather_in_order`.

    Returns:
        As far as asked for: `gfd-<features>` and `kid-<features>` for each of the features, `cmmd-<features>` for
        each CLIP, `precision` and `recall` (k = 3) in the first; `sfid` and `inception-score` in the first that gives
        what they need, `fid50k` in `inception`. Nothing on processes that only take part.

    Raises:
        LatelierError: if a side has no images, or too few, or a metric is not defined in these features.
    """
    if not any(name in KEPT for name in evaluate.metrics):
        return []
    _check(evaluate)
    tasks = _tasks(evaluate, device)
    watchers = [task.watcher for task in tasks]
    ours = collect(watchers, read_images(({"image": batch} for batch in samples), evaluate.samples), shared)
    known = [FeatureCollector(w.extractor, {*w.kept} - {"logits"} or {"features"}) for w in watchers]
    theirs = reference_sets(known, read_images(references, evaluate.samples), key, shared)
    if not is_main(shared):
        return []
    result: list[Measurement] = []
    for task in tasks:
        a, b = (sets[task.watcher.extractor.name] for sets in (ours, theirs))
        if not a.n or not b.n:
            raise LatelierError(f"Generation cannot be judged from {a.n} samples and {b.n} reference images.")
        about = make_receipt(n=a.n, n_reference=b.n, **receipt, **task.watcher.extractor.describe())
        result += _measure(task, a, b, about, evaluate.seed)
    return result


# -- what is measured in which features -------------------------------------------------------------------------------


@dataclass
class Task:
    """An extractor, and the metrics that are measured in its features."""

    watcher: FeatureCollector
    metrics: set[str]


def _check(evaluate: Evaluate) -> None:
    """Refuse early what cannot be measured, before images are drawn."""
    check_features(evaluate)
    if "cmmd" in evaluate.metrics and not any(name.startswith(CLIP) for name in evaluate.features):
        raise LatelierError(
            f"cmmd is defined for CLIP's embeddings only, but evaluate.features = {evaluate.features}; add clip to it, "
            "or ask for kid, which is defined in any features."
        )
    if "fid50k" in evaluate.metrics:
        _check_fid(evaluate.samples, "evaluate.samples asks for")


def _check_fid(n: int, who: str) -> None:
    if n < FID_SAMPLES:
        raise LatelierError(
            f"fid50k needs {FID_SAMPLES:,} images on each side, but {who} {n:,}; what fewer images give is called "
            "gfd-inception, with n in its receipt: ask for gfd."
        )


def _tasks(evaluate: Evaluate, device: torch.device | str) -> list[Task]:
    """The extractors in their order, and what is measured in each."""
    wanted: set[str] = {name for name in evaluate.metrics if name in KEPT}
    extractors = load_extractors(evaluate.features, device)
    chosen = {extractor.name: wanted & {"gfd", "kid"} for extractor in extractors}
    chosen[extractors[0].name] |= wanted & {"precision", "recall"}
    for extractor in extractors:
        if extractor.name.startswith(CLIP):
            chosen[extractor.name] |= wanted & {"cmmd"}
    for metric in wanted & set(NEEDS):
        chosen[inception_of(extractors, metric).name].add(metric)
    found = [Task(FeatureCollector(e, sorted({KEPT[m] for m in chosen[e.name]})), chosen[e.name]) for e in extractors]
    return [task for task in found if task.metrics]


# -- the measurements -------------------------------------------------------------------------------------------------


def _measure(
    task: Task, ours: FeatureSet, theirs: FeatureSet, about: Mapping[str, Any], seed: int
) -> list[Measurement]:
    """All metrics of one extractor, in a fixed order."""
    extractor, wanted = task.watcher.extractor, task.metrics
    names = [label for metric, label in (("gfd", f"gfd-{extractor.name}"), ("fid50k", "fid50k")) if metric in wanted]
    if "fid50k" in wanted:
        _check_fid(min(ours.n, theirs.n), "there are")
    result = _frechet(names, "features", ours, theirs, about) if names else []
    if "sfid" in wanted:
        result += _frechet(["sfid"], "spatial", ours, theirs, {**about, **extractor.describe("spatial")})
    if "inception-score" in wanted:
        value, interval = ours.score.measure()
        receipt = {**about, **extractor.describe("logits"), "splits": GROUPS, "interval": "Student's t over splits"}
        result.append(Measurement("inception-score", value, receipt, interval))
    held = {**about, "n_vectors": len(ours.vectors), "n_reference_vectors": len(theirs.vectors)}
    return [*result, *_discrepancies(task, ours, theirs, held, seed), *_coverage(task, ours, theirs, held)]


def _frechet(
    names: Sequence[str], output: str, ours: FeatureSet, theirs: FeatureSet, about: Mapping[str, Any]
) -> list[Measurement]:
    """One Fréchet distance, under one name or two."""
    value, interval = ours.sums[output].distance(theirs.sums[output])
    warning = size_warning(min(ours.n, theirs.n), int(about["dims"]))
    return [Measurement(name, value, {**about, **warning, "interval": FRECHET_INTERVAL}, interval) for name in names]


def _discrepancies(
    task: Task, ours: FeatureSet, theirs: FeatureSet, about: Mapping[str, Any], seed: int
) -> list[Measurement]:
    """KID and CMMD."""
    kinds = {
        "kid": (polynomial_kernel, 1.0, "(x.y / d + 1)^3"),
        "cmmd": (gaussian_kernel, CMMD_SCALE, f"Gaussian, sigma {SIGMA:g}, unit length, x {CMMD_SCALE:g}"),
    }
    result = []
    for metric, (kernel, scale, words) in kinds.items():
        if metric in task.metrics:
            value, interval, subsets = subset_mmd(ours.vectors, theirs.vectors, kernel, seed)
            if "standard_error" in subsets:
                subsets["standard_error"] *= scale
            receipt = {**about, "kernel": words, **subsets, "interval": "Student's t over subsets"}
            ends = interval and (scale * interval[0], scale * interval[1])
            name = f"{metric}-{task.watcher.extractor.name}"
            result.append(Measurement(name, scale * value, receipt, ends))
    return result


def _coverage(task: Task, ours: FeatureSet, theirs: FeatureSet, about: Mapping[str, Any]) -> list[Measurement]:
    """Precision and recall."""
    wanted = [name for name in ("precision", "recall") if name in task.metrics]
    if not wanted:
        return []
    device = task.watcher.extractor.device
    inside = precision_recall(ours.vectors.to(device), theirs.vectors.to(device), NEIGHBOURS)
    found = {name: mean_with_interval(each) for name, each in zip(("precision", "recall"), inside)}
    receipt = {**about, "neighbours": NEIGHBOURS}
    return [Measurement(name, found[name][0], receipt, _shares(found[name][1])) for name in wanted]


def _shares(interval: tuple[float, float] | None) -> tuple[float, float] | None:
    """A share cannot leave [0, 1]."""
    return interval and (max(0.0, interval[0]), min(1.0, interval[1]))


# -- memory -----------------------------------------------------------------------------------------------------------


@dataclass
class Neighbours:
    """The nearest training images of some samples.

    Attributes:
        indices: `(n, k)` positions in the order in which references came.
        distances: `(n, k)` Euclidean distances of features, ascending.
        images: `(n, k, c, h, w)` the images themselves.
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
    """Find each sample's nearest training images in feature space, reading the training set once.

    Args:
        samples: generated images in [-1, 1].
        references: batches of training images, dicts with `image` of the samples' size.
        extractor: the space in which near is meant.
        k: how many neighbours of each.

    Raises:
        LatelierError: if there are fewer than k training images.
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
        raise LatelierError(f"{k} nearest training images were asked for, but there are only {seen}.")
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
