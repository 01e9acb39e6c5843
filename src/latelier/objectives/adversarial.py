"""The game between a tokenizer and a discriminator.

`DiscriminatorObjective` is what the discriminator trains on, in a step and with an optimiser of its own. `Adversary`
adds the tokenizer's side of the game to a tokenizer's terms. It holds the discriminator without registering it, so
that neither the tokenizer's optimiser, nor its EMA, nor DDP ever see its weights, and freezes it meanwhile, so that
the tokenizer's step leaves no gradient in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import reduce
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from latelier.keyed_random import KeyedRandom
from latelier.losses.adversarial import (
    PatchGAN,
    adaptive_weight,
    augment,
    consistency,
    discriminator_loss,
    generator_loss,
    lecam,
)
from latelier.losses.terms import LossTerms
from latelier.recipe import Adversarial

CHANGES = ("color", "translation", "cutout")
HOLES = {"patch": 0.5, "dino": 0.2}  # cutouts of DiffAugment's paper and of MAETok; consistency cuts out a half


class DiscriminatorObjective(nn.Module):
    """Loss terms of the discriminator on images and their reconstructions.

    Args:
        discriminator: the model to train.
        recipe: form of the loss, regularisation, augmentation.
        seed: of the augmentation, which is addressed by the images' numbers.
    """

    averages: Tensor

    def __init__(self, discriminator: nn.Module, recipe: Adversarial, seed: int):
        super().__init__()
        self.discriminator, self.recipe, self.seed = discriminator, recipe, seed
        self.register_buffer("averages", torch.zeros(2))  # running means of the logits of images, reconstructions

    def forward(self, batch: dict[str, Any]) -> LossTerms:
        """Terms of `real` and `fake`, both `(b, c, h, w)` and without gradients; `draw` addresses randomness."""
        with parametrize.cached():  # spectral norms move on once for each batch, and are the same for all its images
            logits = [self.logits(batch[side], batch["sample_id"]) for side in ("real", "fake")]
            again = []
            if self.recipe.consistency:
                again = [self.logits(batch[side], batch["sample_id"], strong=True) for side in ("real", "fake")]
        on_real, on_fake = logits
        losses = {
            "d_loss": discriminator_loss(on_real, on_fake, self.recipe.loss),
            "d_real": on_real.detach().mean(),
            "d_fake": on_fake.detach().mean(),
            "d_accuracy": 0.5 * ((on_real > 0).float().mean() + (on_fake < 0).float().mean()),
        }
        weights = {"d_loss": 1.0}
        if self.recipe.lecam:
            means = reduce(torch.stack([losses["d_real"], losses["d_fake"]]), reduction="mean")  # over processes
            self.averages.lerp_(means, 1 - self.recipe.lecam_decay)
            losses["d_lecam"] = lecam(on_real, on_fake, *self.averages.clone())
            weights["d_lecam"] = self.recipe.lecam
        if again:
            losses["d_consistency"] = consistency(logits, again)
            weights["d_consistency"] = self.recipe.consistency
        return LossTerms(losses, weights)

    def logits(
        self, images: Float[Tensor, "b c h w"], numbers: Tensor, strong: bool = False
    ) -> Float[Tensor, "b 1 *patches"]:
        """What the discriminator says of augmented images, float32.

        Args:
            images: in [-1, 1].
            numbers: that address the augmentation, which images and their reconstructions share.
            strong: every change is made and cutouts are large, whatever the recipe says: for the consistency.
        """
        if strong:
            changes = KeyedRandom(self.seed, numbers, images.device).uniform("consistency", 7)
            images = augment(images, CHANGES, changes)
        else:
            images = changed(images, numbers, self.recipe, self.seed)
        if self.recipe.kind == "dino":  # the view is drawn on the CPU, where it is used
            return self.discriminator(images, KeyedRandom(self.seed, numbers).uniform("view", 3)).float()
        return self.discriminator(images).float()  # (b, 1, i, j)


class Adversary:
    """The tokenizer's side of the game.

    Args:
        recipe: weight, start, form.
        seed: of the augmentation.
        channels: of the images.
    """

    def __init__(self, recipe: Adversarial, seed: int, channels: int):
        self.recipe, self.seed = recipe, seed
        self.objective = DiscriminatorObjective(build_discriminator(recipe, channels), recipe, seed)

    @property
    def first(self) -> int:
        """Images seen before the discriminator begins to learn."""
        return max(0, self.recipe.start - self.recipe.ahead)

    def add(
        self, terms: LossTerms, reconstruction: Float[Tensor, "b c h w"], last_layer: Tensor, batch: dict[str, Any]
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
        with untouched(self.objective.discriminator):
            logits = self.objective.logits(reconstruction, batch["sample_id"])
        loss = generator_loss(logits, self.recipe.loss)
        weight = self.recipe.weight
        if self.recipe.adaptive and torch.is_grad_enabled():
            scale = adaptive_weight(terms.total, loss, last_layer)
            terms.losses["adaptive_weight"] = scale
            weight = weight * scale.item()
        terms.losses["adversarial"], terms.weights["adversarial"] = loss, weight


def build_discriminator(recipe: Adversarial, channels: int) -> nn.Module:
    """The discriminator of a recipe, with fresh weights, for images of so many channels."""
    if recipe.kind == "dino":
        from latelier.losses.dino import DinoDiscriminator

        return DinoDiscriminator(recipe.teacher, channels, recipe.norm)
    return PatchGAN(channels, recipe.channels, recipe.layers, recipe.norm)


@contextmanager
def untouched(discriminator: nn.Module) -> Iterator[None]:
    """A judgement that leaves no gradient in the weights, and the power iterations of spectral norms where they are."""
    spectral = [m.parametrizations for m in discriminator.modules() if parametrize.is_parametrized(m)]
    discriminator.requires_grad_(False)
    for norm in spectral:
        norm.eval()
    try:
        yield
    finally:
        discriminator.requires_grad_(True)
        for norm in spectral:
            norm.train(discriminator.training)


def changed(images: Float[Tensor, "b c h w"], numbers: Tensor, recipe: Adversarial, seed: int) -> Tensor:
    """Images as the recipe augments them for the discriminator."""
    if not recipe.augment:
        return images
    draws = KeyedRandom(seed, numbers, images.device)
    chosen = None
    if recipe.augment_share < 1:
        chosen = draws.uniform("augment share", len(CHANGES)) < recipe.augment_share  # (b, 3)
    return augment(images, recipe.augment, draws.uniform("augment", 7), HOLES[recipe.kind], chosen)
