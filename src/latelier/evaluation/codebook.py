"""How much of a codebook a tokenizer uses, over all held-out images.

The perplexity of codes that are used p_1, ..., p_K of the time is exp(- sum_k p_k ln p_k): K where all are used alike,
1 where it is always the same one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers import VQModel

from latelier.errors import LatelierError
from latelier.evaluation.latent_space import read
from latelier.evaluation.results import Measurement
from latelier.evaluation.spectrum import subsample
from latelier.losses.codebook import nearest_codes, perplexity
from latelier.receipt import make_receipt
from latelier.recipe import Evaluate
from latelier.tokenizers.codec import Codec

ENOUGH = 10  # latent vectors for each code: of so many an evenly used code is missed once in 22,000 times


@torch.no_grad()
def measure_codebook(
    codec: Codec,
    batches: Iterable[Mapping[str, Any]],
    evaluate: Evaluate,
    reference: str,
    extra: Mapping[str, Any] | None = None,
) -> list[Measurement]:
    """Which codes the images' latents are nearest to.

    Args:
        codec: the tokenizer.
        batches: dicts with `image`, `(b, c, h, w)` in [-1, 1]; at most `evaluate.samples` images are read.
        evaluate: `samples`.
        reference: the name of the images, for the receipts.
        extra: fields for the receipts beyond those gathered here.

    Returns:
        `codebook-usage`, the share of codes that occur; `codebook-perplexity`, in codes; `dead-codes`, how many never
        occur. Nothing for tokenizers without a codebook.

    Raises:
        LatelierError: if there are no images.
    """
    if not isinstance(codec.tokenizer, VQModel):
        return []
    codes = codec.tokenizer.quantize.embedding.weight  # (k, c)
    counts = torch.zeros(len(codes), dtype=torch.float64)
    n, size = 0, (0, 0)
    for images, _ in read(batches, evaluate.samples):
        n, size = n + len(images), (images.shape[2], images.shape[3])
        z = codec.posterior(images.to(codec.device)).mean  # (b, c, h / f, w / f)
        indices = nearest_codes(z.movedim(1, -1).flatten(0, -2), codes)  # (b h w / f f,)
        counts += torch.bincount(indices, minlength=len(codes)).cpu()
    if n == 0:
        raise LatelierError(f"There are no images in {reference} to measure the codebook on.")
    vectors, used = int(counts.sum()), int((counts > 0).sum())
    receipt = make_receipt(
        n=n, reference=reference, image_size=size, latents="before quantisation", codes=len(codes), vectors=vectors,
        tokenizer=codec.hash(), **(extra or {}),
    )  # fmt: skip
    if vectors < ENOUGH * len(codes):
        receipt["warning"] = f"{vectors} latent vectors cannot show all of {len(codes)} codes; compare at equal n"
    by_rank = {"shares_by_rank": subsample(counts.sort(descending=True).values / vectors)}
    return [
        Measurement("codebook-usage", used / len(codes), receipt),
        Measurement("codebook-perplexity", perplexity(counts).item(), {**receipt, **by_rank}),
        Measurement("dead-codes", float(len(codes) - used), receipt),
    ]
