"""PatchGAN and adversarial losses, which make reconstructions sharp.

The discriminator classifies overlapping patches as of an image or a reconstruction; the tokenizer is rewarded for
patches that pass as images. Esser et al. 2021, "Taming Transformers", section 3.1 and equations 5-7.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from accelerate.utils import reduce
from jaxtyping import Float
from torch import Tensor, nn

from latelier.errors import LatelierError

ADAPTIVE_EPSILON, ADAPTIVE_LIMIT = 1e-4, 1e4
GROUPS = 32


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
    """LeCAM (Tseng et al. 2021, equation 3): keeps logits near the other side's running mean, against overfitting."""
    return F.relu(real - average_fake).square().mean() + F.relu(average_real - fake).square().mean()


def consistency_loss(
    logits: Sequence[Float[Tensor, "b 1 *patches"]], augmented: Sequence[Float[Tensor, "b 1 *patches"]]
) -> Float[Tensor, ""]:
    """Mean squared change of the logits of images and reconstructions when both are augmented.

    Zhang et al. 2020, "Consistency Regularization for Generative Adversarial Networks"; of reconstructions too as in
    Zhao et al. 2021, "Improved Consistency Regularization for GANs".
    """
    return torch.stack([(one - other).square().mean() for one, other in zip(logits, augmented, strict=True)]).mean()


def adaptive_weight(
    reconstruction_loss: Float[Tensor, ""],
    other_loss: Float[Tensor, ""],
    last_layer: Tensor,
    limit: float = ADAPTIVE_LIMIT,
) -> Float[Tensor, ""]:
    """lambda = |grad of reconstruction| / (|grad of the other| + 1e-4) at the layer's weight, at most `limit`.

    Taming Transformers, equation 7, of the adversarial loss. Gradients are averaged over processes first, so that all
    use the same lambda.
    """
    ours = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)[0].float()
    theirs = torch.autograd.grad(other_loss, last_layer, retain_graph=True)[0].float()
    ours, theirs = reduce(torch.stack([ours, theirs]), reduction="mean")
    return (ours.norm() / (theirs.norm() + ADAPTIVE_EPSILON)).clamp(0, limit).detach()


class PatchGAN(nn.Module):
    """Fully convolutional discriminator (Isola et al. 2017): a map of logits, one for each overlapping patch.

    Args:
        in_channels: of the images.
        channels: of the first layer; doubled at every stride up to eightfold.
        layers: strided convolutions after the first; with 3 a patch has 70 x 70 pixels.
        norm: `batch` as in LDM; `group` does not mix the images of a batch, so processes and micro-batches agree.
    """

    def __init__(self, in_channels: int = 3, channels: int = 64, layers: int = 3, norm: str = "group"):
        super().__init__()
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        blocks: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        for number, (narrow, wide) in enumerate(pairwise(widths)):
            stride = 1 if number == layers - 1 else 2
            normalise = nn.BatchNorm2d(wide) if norm == "batch" else nn.GroupNorm(group_count(wide), wide)
            blocks += [nn.Conv2d(narrow, wide, 4, stride, 1, bias=False), normalise, nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*blocks)
        self.head = nn.Conv2d(widths[-1], 1, 4, 1, 1)
        self.smallest = 2 ** (layers + 2)
        self.apply(_initialise)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 i j"]:
        """Logits: positive where the patch looks like an image."""
        if min(images.shape[2:]) < self.smallest:
            height, width = images.shape[2:]
            raise LatelierError(
                f"A discriminator of {self.smallest.bit_length() - 3} layers needs images of at least "
                f"{self.smallest} pixels a side, not {height} x {width}; lower tokenizer.adversarial.layers."
            )
        return self.head(self.body(images))


def group_count(channels: int) -> int:
    """The largest number of groups, up to 32, that divides the channels."""
    return next(groups for groups in range(min(GROUPS, channels), 0, -1) if channels % groups == 0)


def _initialise(module: nn.Module) -> None:
    """N(0, 0.02) convolutions, N(1, 0.02) norms, as in pix2pix."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
