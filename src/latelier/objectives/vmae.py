"""The VMAE objective: visible and masked reconstruction, LPIPS, and a KL that leaves the mean free.

L = (1 - v) MSE(masked patches) + v MSE(visible patches) + w_p LPIPS(whole image) + w_kl KL
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from latelier.keyed_random import KeyedRandom
from latelier.losses.kl import gaussian_kl
from latelier.losses.terms import LossTerms, judged
from latelier.recipe import VMAERecipe
from latelier.tokenizers import last_layer
from latelier.tokenizers.vmae import VMAE, visible_patches


class VMAEObjective(nn.Module):
    """Loss terms of a VMAE on a batch of images.

    Args:
        tokenizer: the model to train.
        recipe: mask ratio, weights and the form of the KL.
        seed: of the masks and the posterior's noise, which are addressed by the images' numbers.
        perceptual: LPIPS; needed when its weight is not zero.
        adversary: the discriminator's side of the loss, if there is one; the paper has none.
    """

    def __init__(
        self,
        tokenizer: VMAE,
        recipe: VMAERecipe,
        seed: int,
        perceptual: nn.Module | None = None,
        adversary: None = None,
    ):
        super().__init__()
        self.tokenizer, self.perceptual, self.recipe, self.seed = tokenizer, perceptual, recipe, seed
        self.adversary = adversary
        if not recipe.mask_ratio:
            tokenizer.mask_token.requires_grad_(False)  # nothing stands in for a missing patch
        v = recipe.visible_weight if recipe.mask_ratio else 1.0
        self.weights = {
            "mse_visible": v,
            "mse_masked": 1 - v,
            "lpips": recipe.perceptual_weight,
            "kl": recipe.kl_weight,
        }

    def forward(self, batch: dict[str, Any]) -> LossTerms:
        """Terms of `batch["image"]` `(b, c, h, w)`; `draw` addresses the random numbers, `seen` counts images."""
        images, p = batch["image"], self.tokenizer.config["patch_size"]
        grid = (images.shape[2] // p, images.shape[3] // p)
        draws = KeyedRandom(self.seed, batch["sample_id"], images.device)
        keep = None
        if self.recipe.mask_ratio:
            keep = visible_patches(draws.uniform("mask", grid[0] * grid[1]), self.recipe.mask_ratio)
        tokens = grid[0] * grid[1] if keep is None else keep.shape[1]
        noise = None
        if self.recipe.sample_posterior:
            noise = draws.normal("posterior", tokens, self.tokenizer.config["latent_channels"])
        terms, reconstruction = self.terms(images, keep, noise, judged(batch, self.recipe))
        if self.adversary is not None:
            self.adversary.add(terms, reconstruction, last_layer(self.tokenizer), batch)
        return terms

    def terms(
        self,
        images: Float[Tensor, "b c h w"],
        keep: Int[Tensor, "b k"] | None,
        noise: Float[Tensor, "b k l"] | None,
        rows: Bool[Tensor, " b"] | None = None,
    ) -> tuple[LossTerms, Float[Tensor, "b c h w"]]:
        """Terms and reconstruction with the mask, the posterior's noise and the images that LPIPS judges given."""
        p = self.tokenizer.config["patch_size"]
        grid = (images.shape[2] // p, images.shape[3] // p)
        mean, logvar = self.tokenizer.moments(images, keep).float().chunk(2, dim=-1)  # (b, k, c)
        logvar = logvar.clamp(-30, 20)
        z = mean if noise is None else mean + (0.5 * logvar).exp() * noise
        reconstruction = self.tokenizer.decode_tokens(z, grid, keep).float()  # (b, c, h, w)

        squared = patch_errors(reconstruction, images, p)  # (b, n)
        losses = {"kl": gaussian_kl(mean, logvar, self.recipe.kl, self.recipe.fixed_std).sum(-1).mean()}
        if keep is None:
            losses["mse_visible"] = squared.mean()
        else:
            visible = torch.zeros_like(squared).scatter(1, keep, 1.0)
            losses["mse_visible"] = (squared * visible).sum() / visible.sum()
            losses["mse_masked"] = (squared * (1 - visible)).sum() / (1 - visible).sum()
        if self.perceptual is not None and self.weights["lpips"] and (rows is None or rows.any()):
            pair = (reconstruction, images) if rows is None else (reconstruction[rows], images[rows])
            losses["lpips"] = self.perceptual(*pair).mean()
        weights = {name: self.weights[name] for name in losses}
        return LossTerms(losses, weights, reconstruction=reconstruction), reconstruction


def patch_errors(x: Float[Tensor, "b c h w"], y: Float[Tensor, "b c h w"], patch: int) -> Float[Tensor, "b n"]:
    """Mean squared error of each patch, raster order."""
    return nn.functional.avg_pool2d((x - y).square().mean(1, keepdim=True), patch).flatten(1)
