"""The discriminator of a tokenizer's training, and the two losses of the game: its own and the tokenizer's.

The tokenizer (generator) is rewarded where its reconstructions pass for images. The training loop makes both steps; the
discriminator has an optimiser of its own and is no part of the tokenizer's objective, so that neither the tokenizer's
optimiser nor its EMA ever see its weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate.utils import reduce
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils import parametrize

from latelier.keyed_random import KeyedRandom
from latelier.losses.adversarial import (
    adaptive_weight,
    consistency_loss,
    discriminator_loss,
    generator_loss,
    lecam_loss,
)
from latelier.losses.augment import CHANGES, augment
from latelier.losses.dino import DinoDiscriminator
from latelier.losses.patchgan import PatchGAN
from latelier.losses.terms import LossTerms

CUTOUT = {"patch": 0.5, "dino": 0.2}  # side of cutouts in DiffAugment's paper and in MAETok's


class Discriminator(nn.Module):
    """A network that tells images from reconstructions, with its augmentation and its losses.

    Args:
        network: images to logits, one for each patch.
        seed: of the augmentation, which depends on each image's `sample_id`.
        loss: `hinge` or `non-saturating`.
        lecam: weight of LeCAM regularisation; `lecam_decay` is that of its running means.
        consistency: weight of the squared change of the logits under augmentation.
        augment: changes of DiffAugment; `augment_share` is the probability of each, `cutout` the side of its holes.
    """

    averages: Tensor

    def __init__(
        self,
        network: nn.Module,
        seed: int,
        loss: str = "hinge",
        lecam: float = 0.0,
        lecam_decay: float = 0.99,
        consistency: float = 0.0,
        augment: Sequence[str] = (),
        augment_share: float = 1.0,
        cutout: float = 0.5,
    ):
        super().__init__()
        self.network, self.seed, self.loss = network, seed, loss
        self.lecam, self.lecam_decay, self.consistency = lecam, lecam_decay, consistency
        self.augment, self.augment_share, self.cutout = tuple(augment), augment_share, cutout
        self.register_buffer("averages", torch.zeros(2))  # running means of the logits of images, reconstructions

    def forward(
        self, real: Float[Tensor, "b c h w"], fake: Float[Tensor, "b c h w"], sample_id: Int[Tensor, " b"]
    ) -> LossTerms:
        """Loss terms of the discriminator's own step, on images and on reconstructions without gradients."""
        with parametrize.cached():  # spectral norms are updated once for each batch
            on_real, on_fake = self.logits(real, sample_id), self.logits(fake, sample_id)
            augmented = []
            if self.consistency:
                augmented = [self.logits(images, sample_id, strong=True) for images in (real, fake)]
        losses = {
            "d_loss": discriminator_loss(on_real, on_fake, self.loss),
            "d_real": on_real.detach().mean(),
            "d_fake": on_fake.detach().mean(),
            "d_accuracy": 0.5 * ((on_real > 0).float().mean() + (on_fake < 0).float().mean()),
        }
        weights = {"d_loss": 1.0}
        if self.lecam:
            means = reduce(torch.stack([losses["d_real"], losses["d_fake"]]), reduction="mean")  # over processes
            self.averages.lerp_(means, 1 - self.lecam_decay)
            losses["d_lecam"] = lecam_loss(on_real, on_fake, *self.averages.clone())
            weights["d_lecam"] = self.lecam
        if augmented:
            losses["d_consistency"] = consistency_loss([on_real, on_fake], augmented)
            weights["d_consistency"] = self.consistency
        return LossTerms(losses, weights)

    def logits(
        self, images: Float[Tensor, "b c h w"], sample_id: Int[Tensor, " b"], strong: bool = False
    ) -> Float[Tensor, "b 1 *patches"]:
        """What the network says of augmented images, float32; an image and its reconstruction are changed alike.

        Args:
            images: in [-1, 1].
            sample_id: what the random changes depend on.
            strong: make every change, with large cutouts: for the consistency loss.
        """
        if strong:
            numbers = KeyedRandom(self.seed, sample_id, images.device).uniform("consistency", 7)
            images = augment(images, CHANGES, numbers)
        else:
            images = self.augmented(images, sample_id)
        if isinstance(self.network, DinoDiscriminator):  # the view is drawn on the CPU, where it is used
            view = KeyedRandom(self.seed, sample_id).uniform("view", 3)  # (b, 3)
            return self.network(images, view).float()
        return self.network(images).float()  # (b, 1, i, j)

    def augmented(self, images: Float[Tensor, "b c h w"], sample_id: Int[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
        """Images with the changes that `augment` and `augment_share` say."""
        if not self.augment:
            return images
        rng, chosen = KeyedRandom(self.seed, sample_id, images.device), None
        if self.augment_share < 1:
            chosen = rng.uniform("augment share", len(CHANGES)) < self.augment_share  # (b, 3)
        return augment(images, self.augment, rng.uniform("augment", 7), self.cutout, chosen)


def build_discriminator(
    channels: int,
    seed: int,
    kind: str = "patch",
    layers: int = 3,
    width: int = 64,
    norm: str = "group",
    teacher: str = "facebook/dino-vits16",
    **settings,
) -> Discriminator:
    """A discriminator with fresh weights for images of `channels` channels.

    Args:
        channels: of the images.
        seed: of its augmentation.
        kind: `patch` (PatchGAN; `layers`, `width`) or `dino` (heads on the features of `teacher`).
        norm: `batch` or `group`.
        settings: further arguments of `Discriminator`.
    """
    network: nn.Module
    if kind == "dino":
        network = DinoDiscriminator(teacher, channels, norm)
    else:
        network = PatchGAN(channels, width, layers, norm)
    return Discriminator(network, seed, cutout=CUTOUT[kind], **settings)


def add_adversarial_loss(
    terms: LossTerms,
    discriminator: Discriminator,
    last_layer: Tensor,
    sample_id: Int[Tensor, " b"],
    weight: float = 0.5,
    adaptive: bool = True,
) -> None:
    """Add the generator's loss `adversarial` to a tokenizer's terms.

    Args:
        terms: with the reconstruction and its graph; the balance of their gradients sets the adaptive weight.
        discriminator: is left as it is: no gradient reaches its weights.
        last_layer: the tokenizer's weight at which gradients are compared.
        sample_id: of the images.
        weight: of the term.
        adaptive: scale it so that both gradients at `last_layer` are equally long (Esser et al. 2021, equation 7).
    """
    assert terms.reconstruction is not None
    with frozen(discriminator.network):
        logits = discriminator.logits(terms.reconstruction, sample_id)
    loss = generator_loss(logits, discriminator.loss)
    if adaptive and torch.is_grad_enabled():
        scale = adaptive_weight(terms.total, loss, last_layer)
        terms.losses["adaptive_weight"] = scale
        weight = weight * scale.item()
    terms.losses["adversarial"], terms.weights["adversarial"] = loss, weight


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """No gradient reaches the weights, and the power iterations of spectral norms stay where they are."""
    spectral = [m.parametrizations for m in network.modules() if parametrize.is_parametrized(m)]
    network.requires_grad_(False)
    for norm in spectral:
        norm.eval()
    try:
        yield
    finally:
        network.requires_grad_(True)
        for norm in spectral:
            norm.train(network.training)
