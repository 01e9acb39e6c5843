"""The game between a tokenizer and a discriminator.

`DiscriminatorObjective` is what the discriminator trains on, in a step and with an optimiser of its own. `Adversary`
adds the tokenizer's side of the game to a tokenizer's terms. It holds the discriminator without registering it, so
that neither the tokenizer's optimiser, nor its EMA, nor DDP ever see its weights, and freezes it meanwhile, so that
the tokenizer's step leaves no gradient in it.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import reduce
from jaxtyping import Float
from torch import Tensor, nn

from latelier.draws import Draws
from latelier.losses.adversarial import (
    PatchGAN,
    adaptive_weight,
    augment,
    discriminator_loss,
    generator_loss,
    lecam,
)
from latelier.objectives.terms import Terms
from latelier.recipe import Adversarial

LECAM_DECAY = 0.99


class DiscriminatorObjective(nn.Module):
    """Loss terms of the discriminator on pictures and their reconstructions.

    Args:
        discriminator: the model to train.
        recipe: form of the loss, regularisation, augmentation.
        seed: of the augmentation, which is addressed by the images' numbers.
    """

    averages: Tensor

    def __init__(self, discriminator: nn.Module, recipe: Adversarial, seed: int):
        super().__init__()
        self.discriminator, self.recipe, self.seed = discriminator, recipe, seed
        self.register_buffer("averages", torch.zeros(2))  # running means of the logits of pictures, reconstructions

    def forward(self, batch: dict[str, Any]) -> Terms:
        """Terms of `real` and `fake`, both `(b, c, h, w)` and without gradients; `draw` addresses randomness."""
        real, fake = (changed(batch[k], batch["draw"], self.recipe, self.seed) for k in ("real", "fake"))
        on_real, on_fake = self.discriminator(real).float(), self.discriminator(fake).float()  # (b, 1, i, j)
        losses = {
            "d_loss": discriminator_loss(on_real, on_fake, self.recipe.loss),
            "d_real": on_real.detach().mean(),
            "d_fake": on_fake.detach().mean(),
            "d_accuracy": 0.5 * ((on_real > 0).float().mean() + (on_fake < 0).float().mean()),
        }
        weights = {"d_loss": 1.0}
        if self.recipe.lecam:
            means = reduce(torch.stack([losses["d_real"], losses["d_fake"]]), reduction="mean")  # over processes
            self.averages.lerp_(means, 1 - LECAM_DECAY)
            losses["d_lecam"] = lecam(on_real, on_fake, *self.averages.clone())
            weights["d_lecam"] = self.recipe.lecam
        return Terms(losses, weights)


class Adversary:
    """The tokenizer's side of the game.

    Args:
        recipe: weight, start, form.
        seed: of the augmentation.
        channels: of the pictures.
    """

    def __init__(self, recipe: Adversarial, seed: int, channels: int):
        self.recipe, self.seed = recipe, seed
        discriminator = PatchGAN(channels, recipe.channels, recipe.layers, recipe.norm)
        self.objective = DiscriminatorObjective(discriminator, recipe, seed)

    @property
    def first(self) -> int:
        """Images seen before the discriminator begins to learn."""
        return max(0, self.recipe.start - self.recipe.ahead)

    def add(
        self, terms: Terms, reconstruction: Float[Tensor, "b c h w"], last_layer: Tensor, batch: dict[str, Any]
    ) -> None:
        """Add `adversarial` to a tokenizer's terms, once `batch["seen"]` has reached the start.

        Args:
            terms: of reconstruction, differentiable; their balance sets the adaptive weight.
            reconstruction: what the discriminator judges, with its graph.
            last_layer: weight at which gradients are compared.
            batch: `seen` (images before this step) and `draw`.
        """
        if batch["seen"] < self.recipe.start:
            return
        discriminator = self.objective.discriminator.requires_grad_(False)
        logits = discriminator(changed(reconstruction, batch["draw"], self.recipe, self.seed)).float()
        loss = generator_loss(logits, self.recipe.loss)
        weight = self.recipe.weight
        if self.recipe.adaptive and torch.is_grad_enabled():
            scale = adaptive_weight(terms.total, loss, last_layer)
            terms.losses["adaptive_weight"] = scale
            weight = weight * scale.item()
        terms.losses["adversarial"], terms.weights["adversarial"] = loss, weight
        discriminator.requires_grad_(True)


def changed(images: Float[Tensor, "b c h w"], numbers: Tensor, recipe: Adversarial, seed: int) -> Tensor:
    """Pictures as the discriminator sees them."""
    if not recipe.augment:
        return images
    return augment(images, recipe.augment, Draws(seed, numbers, images.device).uniform("augment", 7))
