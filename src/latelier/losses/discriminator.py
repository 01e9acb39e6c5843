"""The discriminator of a tokenizer's training, its loss, and the adversarial loss of the tokenizer (the generator).

The training loop makes both steps. The discriminator has its own optimiser and is no part of the tokenizer's objective,
so that neither the tokenizer's optimiser nor its EMA see its weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate.utils import reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils import parametrize

from latelier.images import round_to_8_bit
from latelier.keyed_random import KeyedRandom
from latelier.losses.adversarial import (
    PatchGAN,
    adaptive_weight,
    consistency_loss,
    discriminator_loss,
    generator_loss,
    lecam_loss,
)
from latelier.losses.dino import DinoDiscriminator
from latelier.losses.terms import LossTerms

CHANGES = ("color", "translation", "cutout")
HOLE = 0.5  # side of a cutout, as a share of the image's
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
        crops: whether a discriminator on DINO's features sees crops of larger images.
        round_fakes: it learns from reconstructions as a PNG holds them (RAE).
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
        crops: bool = True,
        round_fakes: bool = False,
    ):
        super().__init__()
        self.crops, self.round_fakes = crops, round_fakes
        self.network, self.seed, self.loss = network, seed, loss
        self.lecam, self.lecam_decay, self.consistency = lecam, lecam_decay, consistency
        self.augment, self.augment_share, self.cutout = tuple(augment), augment_share, cutout
        self.register_buffer("averages", torch.zeros(2))  # running means of the logits of images, reconstructions

    def forward(
        self, real: Float[Tensor, "b c h w"], fake: Float[Tensor, "b c h w"], sample_id: Int[Tensor, " b"]
    ) -> LossTerms:
        """Loss terms of the discriminator's step, on images and on reconstructions without gradients."""
        fake = round_to_8_bit(fake) if self.round_fakes else fake
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
        """Logits of augmented images, float32; an image and its reconstruction, of one `sample_id`, are changed alike.

        `strong` makes every change, with large cutouts: for the consistency loss.
        """
        if strong:
            numbers = KeyedRandom(self.seed, sample_id, images.device).uniform("consistency", 7)
            images = augment(images, CHANGES, numbers)
        else:
            images = self.augmented(images, sample_id)
        if isinstance(self.network, DinoDiscriminator):  # the view is drawn on the CPU, where it is used
            view = KeyedRandom(self.seed, sample_id).uniform("view", 3)  # (b, 3)
            return self.network(images, view, self.crops).float()
        return self.network(images).float()  # (b, 1, i, j)

    def augmented(self, images: Float[Tensor, "b c h w"], sample_id: Int[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
        """Images with the changes of `augment` and `augment_share`."""
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
    taps: str = "first",
    class_token: bool = True,
    **settings,
) -> Discriminator:
    """A discriminator with fresh weights for images of `channels` channels.

    `kind` is `patch` (PatchGAN; `layers`, `width`) or `dino` (heads on features of `teacher`; `taps`, `class_token`),
    `settings` go to `Discriminator`.
    """
    dino = kind == "dino"
    network = (
        DinoDiscriminator(teacher, channels, norm, taps, class_token)
        if dino
        else PatchGAN(channels, width, layers, norm)
    )
    return Discriminator(network, seed, cutout=CUTOUT[kind], **settings)


def add_adversarial_loss(
    terms: LossTerms,
    discriminator: Discriminator,
    last_layer: Tensor,
    sample_id: Int[Tensor, " b"],
    weight: float = 0.5,
    adaptive: bool = True,
) -> None:
    """Add the generator's loss `adversarial` to a tokenizer's terms; no gradient reaches the discriminator.

    `adaptive` scales it so that its gradient at the tokenizer's `last_layer` is as long as that of the other terms
    (Esser et al. 2021, equation 7).
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
    """No gradient reaches the weights, and the power iterations of spectral norms do not advance."""
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


def augment(
    images: Float[Tensor, "b c h w"],
    policy: Sequence[str],
    numbers: Float[Tensor, "b 7"],
    hole: float = HOLE,
    chosen: Bool[Tensor, "b 3"] | None = None,
) -> Float[Tensor, "b c h w"]:
    """DiffAugment (Zhao et al. 2020): the same differentiable changes to images and reconstructions.

    Args:
        images: in [-1, 1].
        policy: any of `color`, `translation`, `cutout`, applied in this order.
        numbers: uniform in [0, 1): brightness, saturation, contrast, shift (y, x), hole (y, x), for each image.
        hole: side of the cutout, as a share of the image's.
        chosen: which of the three changes each image undergoes; by default all.
    """
    u = [n.view(-1, 1, 1, 1) for n in numbers.to(images).unbind(1)]
    changes = {
        "color": lambda x: _colour(x, u[0], u[1], u[2]),
        "translation": lambda x: _shift(x, u[3], u[4]),
        "cutout": lambda x: _cut(x, u[5], u[6], hole),
    }
    for number, (name, change) in enumerate(changes.items()):
        if name in policy:
            changed = change(images)
            images = changed if chosen is None else torch.where(chosen[:, number, None, None, None], changed, images)
    return images


def _colour(
    images: Float[Tensor, "b c h w"], brightness: Tensor, saturation: Tensor, contrast: Tensor
) -> Float[Tensor, "b c h w"]:
    """Brightness by up to a half, saturation up to twofold, contrast from a half to one and a half."""
    images = images + (brightness - 0.5)
    gray = images.mean(1, keepdim=True)  # (b, 1, h, w)
    images = (images - gray) * (2 * saturation) + gray
    mean = images.mean((1, 2, 3), keepdim=True)  # (b, 1, 1, 1)
    return (images - mean) * (0.5 + contrast) + mean


def _shift(images: Float[Tensor, "b c h w"], down: Tensor, right: Tensor) -> Float[Tensor, "b c h w"]:
    """Moved by up to an eighth of the side; zeros come in."""
    height, width = images.shape[2:]
    y, x = _coordinates(images)
    dy, dx = (_steps(n, side // 8) for n, side in ((down, height), (right, width)))  # (b, 1, 1)
    rows, columns = y + dy, x + dx
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)  # (b, h, w)
    batch = torch.arange(len(images), device=images.device).view(-1, 1, 1)
    moved = images.permute(0, 2, 3, 1)[batch, rows.clamp(0, height - 1), columns.clamp(0, width - 1)]
    return moved.permute(0, 3, 1, 2) * inside[:, None]  # (b, c, h, w)


def _cut(images: Float[Tensor, "b c h w"], down: Tensor, right: Tensor, share: float) -> Float[Tensor, "b c h w"]:
    """A hole of zeros around a random position."""
    height, width = images.shape[2:]
    y, x = _coordinates(images)
    top, left = ((n.view(-1, 1, 1) * side).long() for n, side in ((down, height), (right, width)))
    reach = [int(side * share / 2) for side in (height, width)]
    hole = ((y - top).abs() <= reach[0]) & ((x - left).abs() <= reach[1])  # (b, h, w)
    return images * ~hole[:, None]


def _coordinates(images: Float[Tensor, "b c h w"]) -> tuple[Tensor, Tensor]:
    """Rows `(1, h, 1)` and columns `(1, 1, w)`."""
    height, width = images.shape[2:]
    y, x = (torch.arange(side, device=images.device) for side in (height, width))
    return y.view(1, -1, 1), x.view(1, 1, -1)


def _steps(u: Tensor, most: int) -> Tensor:
    """Whole numbers from -most to most."""
    return (u.view(-1, 1, 1) * (2 * most + 1)).long() - most
