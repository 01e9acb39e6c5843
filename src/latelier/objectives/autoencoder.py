"""Objective of convolutional autoencoders: AE, DAE, VAE and SD-VAE from one class with explicit terms."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from latelier.draws import Draws
from latelier.losses.kl import mean_kl
from latelier.objectives.adversarial import Adversary
from latelier.objectives.terms import Terms, judged
from latelier.recipe import ConvRecipe
from latelier.tokenizers import last_layer


class AutoencoderObjective(nn.Module):
    """L1 or L2 + LPIPS + KL; noise on the encoder's input makes it a denoising autoencoder.

    Args:
        tokenizer: the model to train.
        recipe: weights and forms. With `kl_weight: 0` the latent is the posterior's mean: a plain autoencoder.
        seed: of the noises, which are addressed by the images' numbers.
        perceptual: LPIPS; needed when its weight is not zero.
        adversary: the discriminator's side of the loss, if there is one.
    """

    def __init__(
        self,
        tokenizer: AutoencoderKL,
        recipe: ConvRecipe,
        seed: int,
        perceptual: nn.Module | None = None,
        adversary: Adversary | None = None,
    ):
        super().__init__()
        self.tokenizer, self.perceptual, self.recipe, self.seed = tokenizer, perceptual, recipe, seed
        self.adversary = adversary

    def forward(self, batch: dict[str, Any]) -> Terms:
        """Terms of `batch["image"]` `(b, c, h, w)`; `draw` addresses the random numbers, `seen` counts images."""
        images = batch["image"]
        draws = Draws(self.seed, batch["draw"], images.device)
        inputs = images
        if self.recipe.input_noise:
            inputs = images + self.recipe.input_noise * draws.normal("input", *images.shape[1:])
        posterior = self.tokenizer.encode(inputs).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()  # (b, c, h, w)
        z = mean
        if self.recipe.kl_weight:
            z = mean + (0.5 * logvar).exp() * draws.normal("posterior", *mean.shape[1:])
        reconstruction = self.tokenizer.decode(z).sample.float()  # (b, c, h, w)

        distance = F.l1_loss if self.recipe.reconstruction == "l1" else F.mse_loss
        losses: dict[str, Tensor] = {self.recipe.reconstruction: distance(reconstruction, images)}
        weights: dict[str, float] = {self.recipe.reconstruction: 1.0}
        if self.recipe.kl_weight:
            losses["kl"] = mean_kl(mean, logvar, self.recipe.kl)
            weights["kl"] = self.recipe.kl_weight
        rows = judged(batch, self.recipe)
        if self.perceptual is not None and self.recipe.perceptual_weight and (rows is None or rows.any()):
            pair = (reconstruction, images) if rows is None else (reconstruction[rows], images[rows])
            losses["lpips"] = self.perceptual(*pair).mean()
            weights["lpips"] = self.recipe.perceptual_weight
        terms = Terms(losses, weights, images={"reconstruction": reconstruction.detach()})
        if self.adversary is not None:
            self.adversary.add(terms, reconstruction, last_layer(self.tokenizer), batch)
        return terms
