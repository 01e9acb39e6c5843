"""Terms that tokenizers share: the error of the pixels, LPIPS on every n-th image, and the KL of a posterior."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

DISTANCES = {"l1": F.l1_loss, "l2": F.mse_loss, "mse": F.mse_loss}


class ReconstructionLoss(nn.Module):
    """Terms of a reconstruction: `l1`, `l2` or `mse`, the mean over all values, and `lpips`.

    Args:
        pixels: the term of the pixels; None where the objective has its own.
        perceptual: LPIPS, or None.
        perceptual_weight: of LPIPS; where it is 0, LPIPS is not computed.
        perceptual_every: n: LPIPS on every n-th image of the stream only, since it costs most.
    """

    def __init__(
        self,
        pixels: Literal["l1", "l2", "mse"] | None = None,
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 0.0,
        perceptual_every: int = 1,
    ):
        super().__init__()
        self.pixels, self.perceptual = pixels, perceptual
        self.perceptual_weight, self.perceptual_every = perceptual_weight, perceptual_every

    def forward(
        self,
        reconstruction: Float[Tensor, "b c h w"],
        images: Float[Tensor, "b c h w"],
        sample_id: Int[Tensor, " b"] | None = None,
        with_perceptual: bool = True,
    ) -> dict[str, Tensor]:
        """The terms, unweighted; `lpips` is left out where no image of the batch is compared.

        Args:
            reconstruction: in [-1, 1]; gradients flow into it.
            images: the originals.
            sample_id: numbers of the images in the stream; None: LPIPS on all.
            with_perceptual: false leaves LPIPS out, as where its weight is still 0.
        """
        losses: dict[str, Tensor] = {}
        if self.pixels is not None:
            losses[self.pixels] = DISTANCES[self.pixels](reconstruction, images)
        if self.perceptual is None or not self.perceptual_weight or not with_perceptual:
            return losses
        if self.perceptual_every > 1 and sample_id is not None:
            rows = (sample_id % self.perceptual_every == 0).to(images.device)  # (b,)
            if not rows.any():
                return losses
            reconstruction, images = reconstruction[rows], images[rows]
        losses["lpips"] = self.perceptual(reconstruction, images).mean()
        return losses


def gaussian_kl(
    mean: Float[Tensor, "*b"], logvar: Float[Tensor, "*b"], form: str = "standard", fixed_std: float = 1.0
) -> Float[Tensor, "*b"]:
    """KL of N(mean, var) to another Gaussian, for each element.

    `standard`   KL to N(0, 1):       0.5 (mean^2 + var - 1 - logvar)
    `free-mean`  KL to N(mean, 1):    0.5 (var - 1 - logvar); the mean is not pulled to zero (LDMAE)
    `fixed-std`  KL to N(mean, s^2):  0.5 (var / s^2 - 1 - logvar + log s^2), s = `fixed_std` (LDMAE's released script)
    """
    variance = logvar.exp()
    if form == "standard":
        return 0.5 * (mean.square() + variance - 1 - logvar)
    if form == "free-mean":
        return 0.5 * (variance - 1 - logvar)
    if form == "fixed-std":
        return 0.5 * (variance / fixed_std**2 - 1 - logvar + 2 * math.log(fixed_std))
    raise ValueError(f"unknown form of the KL: {form}")


def mean_kl(mean: Float[Tensor, " b *rest"], logvar: Float[Tensor, " b *rest"], form: str = "standard") -> Tensor:
    """KL summed over each image's latent, averaged over the batch (LDM)."""
    return torch.mean(gaussian_kl(mean, logvar, form).flatten(1).sum(1))
