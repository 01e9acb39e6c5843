"""How much of a codebook a tokenizer uses, over all held-out images.

The perplexity of codes that are used p_1, ..., p_K of the time is exp(- sum_k p_k ln p_k): K where all are used alike,
1 where it is always the same one.
"""

from __future__ import annotations

import torch
from diffusers import VQModel

from latelier.analysis.sample import LatentSample
from latelier.analysis.spectrum import subsample
from latelier.evaluation.results import Result
from latelier.losses.codebook import nearest_codes, perplexity
from latelier.tokenizers.codec import Codec

ENOUGH = 10  # latent vectors for each code: of so many an evenly used code is missed once in 22,000 times


@torch.no_grad()
def codebook_usage(sample: LatentSample, codec: Codec) -> dict[str, Result]:
    """Which codes the images' latents are nearest to.

    Returns:
        `codebook-usage`, the share of codes that occur; `codebook-perplexity`, in codes; `dead-codes`, how many never
        occur. Nothing for tokenizers without a codebook.
    """
    if not isinstance(codec.tokenizer, VQModel):
        return {}
    codes = codec.tokenizer.quantize.embedding.weight  # (k, c)
    counts = torch.zeros(len(codes), dtype=torch.float64)
    for rows in sample.parts():
        z = sample.mean[rows].to(codes.device)  # (b, c, h / f, w / f)
        indices = nearest_codes(z.movedim(1, -1).flatten(0, -2), codes)  # (b h w / f f,)
        counts += torch.bincount(indices, minlength=len(codes)).cpu()
    vectors, used = int(counts.sum()), int((counts > 0).sum())
    about = {"latents": "before quantisation", "codes": len(codes), "vectors": vectors}
    if vectors < ENOUGH * len(codes):
        about["warning"] = f"{vectors} latent vectors cannot show all of {len(codes)} codes; compare at equal n"
    by_rank = {"shares_by_rank": subsample(counts.sort(descending=True).values / vectors)}
    return {
        "codebook-usage": Result(used / len(codes), details=about),
        "codebook-perplexity": Result(perplexity(counts).item(), details={**about, **by_rank}),
        "dead-codes": Result(float(len(codes) - used), details=about),
    }
