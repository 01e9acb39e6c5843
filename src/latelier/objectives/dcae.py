"""Objective of deep-compression autoencoders: L1 or L2, LPIPS, a discriminator; structured latents on demand.

With structured latents (DC-AE 1.5) the decoder sees a random prefix of the channels, the others being zero:

    L = l(x, D(mask_{c,c'} E(x)))        c' drawn anew in each step

so that the first channels must carry what matters most. The encoder runs once a step, the decoder once for each draw.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC
from jaxtyping import Bool, Float
from torch import Tensor, nn

from latelier.losses.terms import LossTerms, judged
from latelier.objectives.prefixes import draw_lengths, keep_prefix
from latelier.recipe import DCAERecipe
from latelier.tokenizers import last_layer


class DCAEObjective(nn.Module):
    """Loss terms of an autoencoder on a batch of images, means over all its reconstructions.

    Args:
        tokenizer: the model to train.
        recipe: weights, and the prefixes if latents are structured.
        seed: of the prefixes.
        perceptual: LPIPS; needed when its weight is not zero.
        adversary: the discriminator's side of the loss, if there is one; it judges the first reconstruction.
    """

    def __init__(
        self,
        tokenizer: AutoencoderDC,
        recipe: DCAERecipe,
        seed: int,
        perceptual: nn.Module | None = None,
        adversary: None = None,
    ):
        super().__init__()
        self.tokenizer, self.perceptual, self.recipe, self.seed = tokenizer, perceptual, recipe, seed
        self.adversary = adversary
        if recipe.prefixes is not None:
            recipe.prefixes.of(tokenizer.config["latent_channels"])  # refuses lengths that do not exist

    def train(self, mode: bool = True) -> DCAEObjective:
        """Batch norms whose weights are frozen keep their statistics, too."""
        super().train(mode)
        for module in self.tokenizer.modules():
            if isinstance(module, nn.BatchNorm2d) and not module.weight.requires_grad:
                module.eval()
        return self

    def forward(self, batch: dict[str, Any]) -> LossTerms:
        """Terms of `batch["image"]` `(b, c, h, w)`; `seen` addresses the prefixes."""
        images, rows = batch["image"], judged(batch, self.recipe)
        z = self.tokenizer.encode(images).latent  # (b, k, h/f, w/f)
        lengths = [z.shape[1]]
        if self.recipe.prefixes is not None:
            lengths = draw_lengths(self.recipe.prefixes, z.shape[1], self.seed, batch["seen"])
        parts, image_batches = [], []
        for length in lengths:
            reconstruction = self.tokenizer.decode(keep_prefix(z, length)).sample.float()  # (b, c, h, w)
            parts.append(self._losses(reconstruction, images, rows))
            image_batches.append(reconstruction)
        losses = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
        weights = {self.recipe.reconstruction: 1.0, "lpips": self.recipe.perceptual_weight}
        weights = {name: weights[name] for name in losses}
        if self.recipe.prefixes is not None:
            losses["prefix"] = z.new_tensor(lengths, dtype=torch.float32).mean()  # in the log only
        terms = LossTerms(losses, weights, reconstruction=image_batches[0])
        if self.adversary is not None:
            self.adversary.add(terms, image_batches[0], last_layer(self.tokenizer), batch)
        return terms

    def _losses(
        self,
        reconstruction: Float[Tensor, "b c h w"],
        images: Float[Tensor, "b c h w"],
        rows: Bool[Tensor, " b"] | None,
    ) -> dict[str, Tensor]:
        """Distances of one reconstruction."""
        distance = F.l1_loss if self.recipe.reconstruction == "l1" else F.mse_loss
        losses: dict[str, Tensor] = {self.recipe.reconstruction: distance(reconstruction, images)}
        if self.perceptual is not None and self.recipe.perceptual_weight and (rows is None or rows.any()):
            pair = (reconstruction, images) if rows is None else (reconstruction[rows], images[rows])
            losses["lpips"] = self.perceptual(*pair).mean()
        return losses
