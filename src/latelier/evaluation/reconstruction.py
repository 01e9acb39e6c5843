"""How well a tokenizer gives back what it was given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from latelier.errors import LatelierError
from latelier.evaluation.features import load_extractor
from latelier.evaluation.metrics import (
    FeatureStatistics,
    Measurement,
    l1,
    mean_with_interval,
    psnr,
    size_warning,
    ssim,
)
from latelier.receipt import make_receipt
from latelier.recipe import Evaluate
from latelier.tokenizers.codec import Codec

SETTINGS = {
    "l1": "8-bit levels, units of [-1, 1]",
    "psnr": "8-bit levels, range 255, mean over pictures of dB",
    "ssim": "8-bit levels, range 255, Gaussian window 11, sigma 1.5",
    "lpips": "LPIPS 0.1, VGG16, 8-bit levels, own size",
}


@torch.no_grad()
def evaluate_reconstruction(
    codec: Codec,
    batches: Iterable[Mapping[str, Any]],
    evaluate: Evaluate,
    reference: str,
    extra: Mapping[str, Any] | None = None,
) -> list[Measurement]:
    """Encode (posterior mean), decode, compare.

    Args:
        codec: the tokenizer.
        batches: dicts with `image`, `(b, c, h, w)` in [-1, 1]; at most `evaluate.samples` pictures are read.
        evaluate: which metrics; those of generation are skipped.
        reference: the name of the pictures, for the receipts: `emoji/validation`.
        extra: fields for the receipts beyond those gathered here.

    Returns:
        l1, psnr, ssim, lpips with confidence intervals, and `rfd-<features>`, as far as asked for.

    Raises:
        LatelierError: if there are no pictures, or a metric is not defined for them.
    """
    per_picture = picture_metrics(evaluate, codec.device)
    extractor = load_extractor(evaluate.features, codec.device) if "rfd" in evaluate.metrics else None
    values: dict[str, list[Tensor]] = {name: [] for name in per_picture}
    theirs = FeatureStatistics(extractor.dims if extractor else 0)
    ours = FeatureStatistics(extractor.dims if extractor else 0)
    n, size = 0, (0, 0)
    for images in pictures(batches, evaluate.samples):
        images = images.to(codec.device)
        reconstruction = codec.decode(codec.encode(images)).clamp(-1, 1)  # (b, c, h, w)
        n, size = n + len(images), (images.shape[2], images.shape[3])
        for name, metric in per_picture.items():
            values[name].append(metric(reconstruction, images).cpu())
        if extractor:
            theirs.update(extractor(images))
            ours.update(extractor(reconstruction))
    if n == 0:
        raise LatelierError(f"There are no pictures in {reference} to evaluate reconstruction on.")
    receipt = make_receipt(
        n=n, reference=reference, image_size=size, latents="posterior mean", tokenizer=codec.hash(), **(extra or {})
    )
    result = []
    for name, parts in values.items():
        mean, interval = mean_with_interval(torch.cat(parts))
        result.append(Measurement(name, mean, {**receipt, "settings": SETTINGS[name]}, interval))
    if extractor:
        about = {**receipt, **extractor.describe(), "n_reference": n, **size_warning(n, extractor.dims)}
        result.append(Measurement(f"rfd-{extractor.name}", ours.distance(theirs), about))
    return result


def pictures(batches: Iterable[Mapping[str, Any]], count: int) -> Iterator[Tensor]:
    """The batches' images, cut off after so many pictures."""
    left = count
    for batch in batches:
        if left <= 0:
            return
        images = batch["image"][:left]
        left -= len(images)
        yield images


def picture_metrics(evaluate: Evaluate, device: torch.device) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """The metrics that are means over pictures."""
    from latelier.images import round_to_8_bit
    from latelier.losses.perceptual import LPIPS

    known: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l1": l1, "psnr": psnr, "ssim": ssim}
    wanted: list[str] = list(evaluate.metrics)
    chosen = {name: metric for name, metric in known.items() if name in wanted}
    if "lpips" in evaluate.metrics:
        network = LPIPS("vgg").to(device)
        chosen["lpips"] = lambda x, y: network(round_to_8_bit(x), round_to_8_bit(y))
    return chosen
