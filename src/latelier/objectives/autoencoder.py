"""Objective of convolutional autoencoders: AE, DAE, VAE, SD-VAE, KL-reg and VQ-reg from one class of explicit terms.

All terms of the image are means over its c h w values. LDM's KL models sum the pixel errors (and LPIPS, broadcast
over them) instead; divided by c h w, their loss is ours with the KL's weight divided by c h w: `kl_per_pixel`. A common
factor changes nothing under Adam, nor in the adaptive adversarial weight, which follows the reconstruction's gradient.
LDM's VQ models take means as we do.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from diffusers import AutoencoderKL, VQModel
from jaxtyping import Float
from torch import Tensor, nn

from latelier.keyed_random import KeyedRandom
from latelier.losses.codebook import CodebookUse, perplexity, quantise
from latelier.losses.kl import mean_kl
from latelier.losses.terms import LossTerms, judged
from latelier.recipe import ConvRecipe
from latelier.tokenizers import last_layer


class AutoencoderObjective(nn.Module):
    """L1 or L2 + LPIPS + KL or codebook; noise on the encoder's input makes it a denoising autoencoder.

    Args:
        tokenizer: the model to train. A VQModel decodes the codes nearest to its latents.
        recipe: weights and forms. With `kl_weight: 0` the latent is the posterior's mean: a plain autoencoder.
        seed: of the noises, which are addressed by the images' numbers.
        perceptual: LPIPS; needed when its weight is not zero.
        adversary: the discriminator's side of the loss, if there is one.
    """

    def __init__(
        self,
        tokenizer: AutoencoderKL | VQModel,
        recipe: ConvRecipe,
        seed: int,
        perceptual: nn.Module | None = None,
        adversary: None = None,
    ):
        super().__init__()
        self.tokenizer, self.perceptual, self.recipe, self.seed = tokenizer, perceptual, recipe, seed
        self.adversary = adversary
        if isinstance(tokenizer, VQModel):
            self.use = CodebookUse(tokenizer.config["num_vq_embeddings"], seed)

    def forward(self, batch: dict[str, Any]) -> LossTerms:
        """Terms of `batch["image"]` `(b, c, h, w)`; `draw` addresses the random numbers, `seen` counts images."""
        images = batch["image"]
        draws = KeyedRandom(self.seed, batch["sample_id"], images.device)
        inputs = images
        if self.recipe.input_noise:
            inputs = images + self.recipe.input_noise * draws.normal("input", *images.shape[1:])
        through = self._codes if isinstance(self.tokenizer, VQModel) else self._posterior
        reconstruction, regularisation = through(inputs, draws, batch)

        distance = F.l1_loss if self.recipe.reconstruction == "l1" else F.mse_loss
        losses: dict[str, Tensor] = {self.recipe.reconstruction: distance(reconstruction, images)}
        weights: dict[str, float] = {self.recipe.reconstruction: 1.0}
        losses |= regularisation.losses
        weights |= regularisation.weights
        rows = judged(batch, self.recipe)
        if self.perceptual is not None and self.recipe.perceptual_weight and (rows is None or rows.any()):
            pair = (reconstruction, images) if rows is None else (reconstruction[rows], images[rows])
            losses["lpips"] = self.perceptual(*pair).mean()
            weights["lpips"] = self.recipe.perceptual_weight
        terms = LossTerms(losses, weights, reconstruction=reconstruction)
        if self.adversary is not None:
            self.adversary.add(terms, reconstruction, last_layer(self.tokenizer), batch)
        return terms

    def _posterior(
        self, images: Float[Tensor, "b c h w"], draws: KeyedRandom, batch: dict[str, Any]
    ) -> tuple[Float[Tensor, "b c h w"], LossTerms]:
        """Reconstruction through the posterior, and the KL's term."""
        posterior = self.tokenizer.encode(images).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()  # (b, k, h/f, w/f)
        if not self.recipe.kl_weight:
            return self.tokenizer.decode(mean).sample.float(), LossTerms({}, {})
        z = mean + (0.5 * logvar).exp() * draws.normal("posterior", *mean.shape[1:])
        reconstruction = self.tokenizer.decode(z).sample.float()
        values = images[0].numel() if self.recipe.kl_per_pixel else 1
        kl = mean_kl(mean, logvar, self.recipe.kl)
        return reconstruction, LossTerms({"kl": kl}, {"kl": self.recipe.kl_weight / values})

    def _codes(
        self, images: Float[Tensor, "b c h w"], draws: KeyedRandom, batch: dict[str, Any]
    ) -> tuple[Float[Tensor, "b c h w"], LossTerms]:
        """Reconstruction through the nearest codes, the codebook's term, and how much of the codebook is used."""
        recipe, seen = self.recipe, batch["seen"]
        codebook = self.tokenizer.quantize.embedding.weight  # (codes, k)
        latents = self.tokenizer.encode(images).latents.float()  # (b, k, h/f, w/f)
        if recipe.codebook_restart and self.training and codebook.requires_grad:
            self.use.restart(codebook.data, latents, batch["sample_id"], seen, recipe.codebook_restart)
        quantised = quantise(latents, codebook, recipe.codebook_beta, recipe.codebook_form)
        reconstruction = self.tokenizer.decode(quantised.z, force_not_quantize=True).sample.float()
        counts = self.use.count(quantised.indices, seen)
        losses = {
            "codebook": quantised.loss,
            "codebook_perplexity": perplexity(counts),
            "codebook_usage": self.use.share(seen, recipe.codebook_window),
        }
        return reconstruction, LossTerms(losses, {"codebook": recipe.codebook_weight})
