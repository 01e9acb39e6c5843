"""Vector quantisation: nearest codes, the codebook loss, and which codes are used.

van den Oord et al. 2017, "Neural Discrete Representation Learning", equation 3; Esser et al. 2021, equation 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate.utils import gather, reduce
from jaxtyping import Float, Int
from torch import Tensor, nn

from latelier.keyed_random import KeyedRandom

DISTANCES_AT_ONCE = 2**26  # numbers: 256 MiB


@dataclass
class Quantised:
    """Codes of latents `(b, c, h, w)`, with straight-through gradients, their indices, and the codebook loss."""

    z: Float[Tensor, "b c h w"]
    indices: Int[Tensor, "b h w"]
    loss: Float[Tensor, ""]


def nearest_codes(vectors: Float[Tensor, "n c"], codebook: Float[Tensor, "k c"]) -> Int[Tensor, " n"]:
    """Index of the code e nearest to each vector z, in float32 under any autocast.

    |z - e|^2 = |z|^2 - 2 z.e + |e|^2, whose first term is the same for all codes: one matrix product.
    """
    with torch.no_grad(), torch.autocast(vectors.device.type, enabled=False):
        vectors, codebook = vectors.float(), codebook.float()
        squares = codebook.square().sum(1)  # (k)
        rows = vectors.split(max(1, DISTANCES_AT_ONCE // len(codebook)))
        return torch.cat([torch.addmm(squares, part, codebook.T, alpha=-2).argmin(1) for part in rows])  # (n)


def quantise(
    latents: Float[Tensor, "b c h w"], codebook: Float[Tensor, "k c"], beta: float = 0.25, form: str = "legacy"
) -> Quantised:
    """The nearest codes q of latents z, and the loss of both; sg stops the gradient.

    `legacy`: mean (z - sg q)^2 + beta mean (q - sg z)^2, with which LDM's models were trained;
    `fixed`:  beta mean (z - sg q)^2 + mean (q - sg z)^2, the VQ-VAE's. Both have the same value.
    """
    z = latents.float().permute(0, 2, 3, 1)  # (b, h, w, c)
    indices = nearest_codes(z.detach().flatten(0, 2), codebook.detach()).view(z.shape[:3])
    q = F.embedding(indices, codebook.float())  # (b, h, w, c)
    commitment, movement = F.mse_loss(z, q.detach()), F.mse_loss(q, z.detach())
    loss = commitment + beta * movement if form == "legacy" else beta * commitment + movement
    straight = z + (q - z).detach()
    return Quantised(straight.permute(0, 3, 1, 2).contiguous(), indices, loss)


def perplexity(counts: Float[Tensor, " k"]) -> Float[Tensor, ""]:
    """exp of the entropy of the codes' frequencies: k when all are used alike, 1 when only one is."""
    share = counts / counts.sum()
    return torch.special.entr(share).sum().exp()


class CodebookUse(nn.Module):
    """When each of `codes` codes was last used, in images seen; the same on all processes, saved with checkpoints."""

    last_used: Tensor

    def __init__(self, codes: int, seed: int):
        super().__init__()
        self.seed = seed
        self.register_buffer("last_used", torch.full((codes,), -1, dtype=torch.int64))  # -1: never

    @torch.no_grad()
    def count(self, indices: Int[Tensor, "b h w"], seen: int) -> Float[Tensor, " k"]:
        """How often the batches of all processes use each code; `seen` images were seen before them."""
        counts = torch.bincount(indices.flatten(), minlength=len(self.last_used)).float()
        counts = reduce(counts, reduction="sum")
        self.last_used[counts > 0] = seen
        return counts

    def share(self, seen: int, window: int) -> Float[Tensor, ""]:
        """Share of the codes that were used in the last `window` images."""
        return (self.last_used >= max(0, seen - window + 1)).float().mean()

    @torch.no_grad()
    def restart(
        self, codebook: Float[Tensor, "k c"], latents: Float[Tensor, "b c h w"], numbers: Tensor, seen: int, after: int
    ) -> Int[Tensor, " dead"]:
        """Set codes unused for `after` images to random latents of all processes' batches, in place; their indices.

        Each latent vector has a random number, keyed by its image's number, and the vectors with the highest are taken;
        so neither the order of the images nor their distribution over processes matters.
        """
        dead = (seen - self.last_used.clamp(min=0) >= after).nonzero().flatten()
        if not len(dead):
            return dead
        vectors = latents.detach().float().permute(0, 2, 3, 1).flatten(0, 2)  # (n, c)
        lots = KeyedRandom(self.seed, numbers, latents.device).uniform("restart", *latents.shape[2:]).flatten()  # (n)
        lots, chosen = lots.topk(min(len(dead), len(lots)))
        lots, vectors = gather(lots), gather(vectors[chosen])
        chosen = lots.argsort(descending=True, stable=True)[: len(dead)]
        dead = dead[: len(chosen)]
        codebook[dead] = vectors[chosen].to(codebook)
        return dead
