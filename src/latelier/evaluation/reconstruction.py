"""How well a tokenizer gives back what it was given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from latelier.errors import LatelierError
from latelier.evaluation.features import load_extractors
from latelier.evaluation.processes import gather_in_order, is_main
from latelier.evaluation.references import FeatureCollector, FeatureSet, Key, open_sets, store_sets
from latelier.evaluation.results import (
    MS_SSIM_SCALES,
    Measurement,
    l1,
    mean_with_interval,
    ms_ssim,
    psnr,
    size_warning,
    ssim,
)
from latelier.receipt import make_receipt
from latelier.recipe import Evaluate
from latelier.tokenizers.codec import Codec

SETTINGS = {
    "l1": "8-bit levels, units of [-1, 1]",
    "psnr": "8-bit levels, range 255, mean over images of dB",
    "ssim": "8-bit levels, range 255, Gaussian window 11, sigma 1.5",
    "ms-ssim": f"8-bit levels, range 255, Gaussian window 11, sigma 1.5, {MS_SSIM_SCALES} scales",
    "lpips": "LPIPS 0.1, VGG16, 8-bit levels, own size",
}
FRECHET_INTERVAL = "delete-a-group jackknife of 10 groups of images, Student's t"


@torch.no_grad()
def evaluate_reconstruction(
    codec: Codec,
    batches: Iterable[Mapping[str, Any]],
    evaluate: Evaluate,
    reference: str,
    extra: Mapping[str, Any] | None = None,
    key: Key | None = None,
    shared: bool = False,
) -> list[Measurement]:
    """Encode (posterior mean), decode, compare.

    Args:
        codec: the tokenizer.
        batches: dicts with `image`, `(b, c, h, w)` in [-1, 1]; at most `evaluate.samples` images are read.
        evaluate: which metrics; those of generation are skipped.
        reference: the name of the images, for the receipts: `emoji/validation`.
        extra: fields for the receipts beyond those gathered here.
        key: what the images depend on, see `references.reference_key`: their features are cached; None caches none.
        shared: whether all processes take part, each with its own batches, see `processes.gather_in_order`.

    Returns:
        l1, psnr, ssim, ms-ssim, lpips and, for each of the features, `rfd-<features>`, as far as asked for, with
        confidence intervals; nothing on processes that only take part.

    Raises:
        LatelierError: if there are no images, or a metric is not defined for them.
    """
    per_image, watchers = image_metrics(evaluate, codec.device), _watchers(evaluate, codec.device)
    known = open_sets(watchers, key, shared)
    new = [watcher for watcher in watchers if watcher.extractor.name not in known]
    ours, theirs = ({watcher.extractor.name: FeatureSet(watcher.kept) for watcher in watchers} for _ in range(2))
    values: dict[str, list[Tensor]] = {name: [] for name in per_image}
    n, size = 0, (0, 0)
    seen = (_look(codec, images, per_image, watchers, new) for images in read_images(batches, evaluate.samples))
    for batch in gather_in_order(seen, shared):
        n, size = n + batch["n"], batch["size"]
        for name, value in batch["values"].items():
            values[name].append(value.cpu())
        for sets, outputs in ((ours, batch["ours"]), (theirs, batch["theirs"])):
            for name, found in outputs.items():
                sets[name].update(found)
    if not is_main(shared):
        return []
    if n == 0:
        raise LatelierError(f"There are no images in {reference} to evaluate reconstruction on.")
    store_sets(new, key, theirs)
    receipt = make_receipt(
        n=n, reference=reference, image_size=size, latents="posterior mean", tokenizer=codec.hash(), **(extra or {})
    )
    means = [_mean(name, torch.cat(parts), receipt) for name, parts in values.items()]
    return means + [_distance(watcher, ours, {**theirs, **known}, receipt) for watcher in watchers]


def read_images(batches: Iterable[Mapping[str, Any]], count: int) -> Iterator[Tensor]:
    """The batches' images, cut off after so many images."""
    left = count
    for batch in batches:
        if left <= 0:
            return
        images = batch["image"][:left]
        left -= len(images)
        yield images


def image_metrics(evaluate: Evaluate, device: torch.device) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """The metrics that are means over images."""
    from latelier.images import round_to_8_bit
    from latelier.losses.perceptual import LPIPS

    known: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l1": l1, "psnr": psnr, "ssim": ssim, "ms-ssim": ms_ssim}
    wanted: list[str] = list(evaluate.metrics)
    chosen = {name: metric for name, metric in known.items() if name in wanted}
    if "lpips" in evaluate.metrics:
        network = LPIPS("vgg").to(device)
        chosen["lpips"] = lambda x, y: network(round_to_8_bit(x), round_to_8_bit(y))
    return chosen


def _watchers(evaluate: Evaluate, device: torch.device) -> list[FeatureCollector]:
    """Every extractor, if Fréchet distances are asked for."""
    names = evaluate.features if "rfd" in evaluate.metrics else ()
    return [FeatureCollector(extractor, ("features",)) for extractor in load_extractors(names, device)]


def _look(
    codec: Codec,
    images: Tensor,
    metrics: Mapping[str, Callable[[Tensor, Tensor], Tensor]],
    watchers: Sequence[FeatureCollector],
    new: Sequence[FeatureCollector],
) -> dict[str, Any]:
    """One batch: errors of each image, features of the reconstructions, and of originals that are not known."""
    images = images.to(codec.device)
    reconstruction = codec.decode(codec.encode(images)).clamp(-1, 1)  # (b, c, h, w)
    return {
        "n": len(images),
        "size": (images.shape[2], images.shape[3]),
        "values": {name: metric(reconstruction, images) for name, metric in metrics.items()},
        "ours": {watcher.extractor.name: watcher.look(reconstruction) for watcher in watchers},
        "theirs": {watcher.extractor.name: watcher.look(images) for watcher in new},
    }


def _mean(name: str, values: Tensor, receipt: Mapping[str, Any]) -> Measurement:
    mean, interval = mean_with_interval(values)
    return Measurement(name, mean, {**receipt, "settings": SETTINGS[name]}, interval)


def _distance(
    watcher: FeatureCollector,
    ours: Mapping[str, FeatureSet],
    theirs: Mapping[str, FeatureSet],
    receipt: Mapping[str, Any],
) -> Measurement:
    """`rfd-<features>`."""
    extractor = watcher.extractor
    a, b = ours[extractor.name], theirs[extractor.name]
    if a.n != b.n:
        raise LatelierError(
            f"{a.n} images could be read, but features of {b.n} were kept of them; delete the folder that "
            "$LATELIER_CACHE names (by default ~/.cache/latelier) and measure again."
        )
    value, interval = a.sums["features"].distance(b.sums["features"])
    about = {**receipt, **extractor.describe(), "n_reference": b.n, **size_warning(a.n, extractor.dims)}
    return Measurement(f"rfd-{extractor.name}", value, {**about, "interval": FRECHET_INTERVAL}, interval)
