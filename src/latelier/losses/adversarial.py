"""Losses of the game between a tokenizer and a discriminator: what makes reconstructions sharp (VQGAN, LDM).

The discriminator says of overlapping patches whether they belong to an image or to a reconstruction; the tokenizer is
rewarded for patches that pass. Esser et al. 2021, "Taming Transformers", section 3.1 and equations 5-7.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from accelerate.utils import reduce
from jaxtyping import Float
from torch import Tensor

ADAPTIVE_EPSILON, ADAPTIVE_LIMIT = 1e-4, 1e4


def discriminator_loss(
    real: Float[Tensor, "b 1 *patches"], fake: Float[Tensor, "b 1 *patches"], kind: str = "hinge"
) -> Float[Tensor, ""]:
    """What the discriminator minimises: hinge 0.5 (E relu(1 - D(x)) + E relu(1 + D(y))), or cross-entropy."""
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(fake: Float[Tensor, "b 1 *patches"], kind: str = "hinge") -> Float[Tensor, ""]:
    """What the tokenizer minimises: -E D(y) for the hinge form, the non-saturating cross-entropy otherwise."""
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def lecam_loss(
    real: Float[Tensor, "b 1 *patches"], fake: Float[Tensor, "b 1 *patches"], average_real: Tensor, average_fake: Tensor
) -> Float[Tensor, ""]:
    """Keeps logits near the other side's running mean (Tseng et al. 2021, equation 3), against overfitting."""
    return F.relu(real - average_fake).square().mean() + F.relu(average_real - fake).square().mean()


def consistency_loss(
    logits: Sequence[Float[Tensor, "b 1 *patches"]], augmented: Sequence[Float[Tensor, "b 1 *patches"]]
) -> Float[Tensor, ""]:
    """Mean squared change of the logits when the images are augmented.

    Zhang et al. 2020, "Consistency Regularization for Generative Adversarial Networks"; of images and of
    reconstructions alike, as in Zhao et al. 2021, "Improved Consistency Regularization for GANs".

    Args:
        logits: of images, and of their reconstructions.
        augmented: the same when both are augmented.
    """
    return torch.stack([(one - other).square().mean() for one, other in zip(logits, augmented, strict=True)]).mean()


def adaptive_weight(
    reconstruction_loss: Float[Tensor, ""], adversarial_loss: Float[Tensor, ""], last_layer: Tensor
) -> Float[Tensor, ""]:
    """lambda = |grad of reconstruction| / (|grad of adversarial| + 1e-4) at the last layer's weight, at most 1e4.

    Taming Transformers, equation 7. Gradients are averaged over processes first, so that all use the same lambda.
    """
    ours = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)[0].float()
    theirs = torch.autograd.grad(adversarial_loss, last_layer, retain_graph=True)[0].float()
    ours, theirs = reduce(torch.stack([ours, theirs]), reduction="mean")
    return (ours.norm() / (theirs.norm() + ADAPTIVE_EPSILON)).clamp(0, ADAPTIVE_LIMIT).detach()
