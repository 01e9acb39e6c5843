"""What each latent channel carries: its share of the variance, how sparse it is, images of it (DC-AE 1.5, figure 2).

In a structured latent space the first channels show objects: large values where things are, small ones elsewhere. Later
ones look like texture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from latelier.errors import LatelierError
from latelier.evaluation.latent_matrix import collect
from latelier.evaluation.latent_space import read
from latelier.evaluation.results import Measurement
from latelier.images import make_columns, save_png
from latelier.receipt import make_receipt
from latelier.recipe import Evaluate
from latelier.tokenizers.codec import Codec

GROUPS, SHOWN = 8, 8  # groups of neighbouring channels, and images, in the image of maps


@torch.no_grad()
def measure_channels(
    codec: Codec,
    batches: Iterable[Mapping[str, Any]],
    evaluate: Evaluate,
    reference: str,
    extra: Mapping[str, Any] | None = None,
) -> list[Measurement]:
    """Where the variance of raw latents lies, and how sparse channels are.

    Args:
        codec: the tokenizer.
        batches: dicts with `image`; at most `evaluate.samples` images are read.
        evaluate: `samples`.
        reference: the name of the images, for the receipts.
        extra: fields for the receipts beyond those gathered here.

    Returns:
        `variance-first-quarter`: the share of the raw latents' variance that the first quarter of the channels has, a
        quarter where channels are alike. `channel-sparsity`: the mean over channels of Hoyer's (2004) measure, 0 for
        values of equal size, 1 for a single one that is not 0. Receipts have both for every channel.

    Raises:
        LatelierError: if there are no images.
    """
    found = collect(codec, read(batches, evaluate.samples))
    if found is None:
        raise LatelierError(f"There are no images in {reference} to measure channels on.")
    raw = found.codec.denormalise(found.values.float())  # (n, c, l)
    values = raw.transpose(0, 1).flatten(1).double()  # (c, n l)
    variance = values.var(1, correction=0)  # (c,)
    sparsity = hoyer(values - values.mean(1, keepdim=True))  # (c,)
    quarter = max(1, len(variance) // 4)
    share = (variance[:quarter].sum() / variance.sum().clamp(min=1e-12)).item()
    about = {**found.about(), **(extra or {})}
    receipt = make_receipt(n=len(found), reference=reference, tokenizer=codec.hash(), **about)
    by_variance = {"channels": len(variance), "quarter": quarter, "by_channel": variance.tolist()}
    by_sparsity = {"channels": len(variance), "by_channel": sparsity.tolist()}
    return [
        Measurement("variance-first-quarter", share, {**receipt, **by_variance}),
        Measurement("channel-sparsity", sparsity.mean().item(), {**receipt, **by_sparsity}),
    ]


def hoyer(values: Float[Tensor, "c n"]) -> Float[Tensor, " c"]:
    """(sqrt(n) - |x|_1 / |x|_2) / (sqrt(n) - 1) of each row."""
    root = values.shape[1] ** 0.5
    ratio = values.abs().sum(1) / values.norm(dim=1).clamp(min=1e-12)
    return ((root - ratio) / max(root - 1, 1e-12)).clamp(0, 1)


@torch.no_grad()
def draw_channel_maps(codec: Codec, batches: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Images, and below each how large its latents are on the grid: the mean over groups of neighbouring channels.

    Args:
        codec: a tokenizer whose latents lie on a plane.
        batches: dicts with `image`; the first few are shown.
        path: of the PNG.

    Raises:
        LatelierError: for latents without a plane.
    """
    images = next(iter(batches))["image"][:SHOWN]  # (b, c, h, w)
    z = codec.encode(images.to(codec.device)).abs().cpu()  # (b, k, h / f, w / f)
    if z.ndim != 4:
        raise LatelierError("1-D latents have no place in the image, so there are no maps of their channels.")
    maps = []
    for group in z.chunk(min(GROUPS, z.shape[1]), dim=1):
        mean = group.mean(1, keepdim=True)  # (b, 1, h / f, w / f)
        low, high = mean.amin((2, 3), keepdim=True), mean.amax((2, 3), keepdim=True)
        shade = 2 * (mean - low) / (high - low).clamp(min=1e-6) - 1  # (b, 1, h / f, w / f) in [-1, 1]
        maps.append(F.interpolate(shade, images.shape[2:]).expand(-1, images.shape[1], -1, -1))
    save_png(make_columns([images, *maps], columns=len(images)), path)
