"""What all tokenizers share: the error of the pixels, and LPIPS on every n-th image."""

from __future__ import annotations

from typing import Literal

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
            reconstruction: in [-1, 1], gradients flow into it.
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
