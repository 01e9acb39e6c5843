"""PatchGAN (Isola et al. 2017): a discriminator that judges overlapping patches."""

from __future__ import annotations

from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn

from latelier.errors import LatelierError

GROUPS = 32


class PatchGAN(nn.Module):
    """Fully convolutional discriminator (Isola et al. 2017): a map of logits, one for each overlapping patch.

    Args:
        in_channels: of the images.
        channels: of the first layer; doubled at every stride up to eightfold.
        layers: strided convolutions after the first; 3 judges patches of 70 x 70 pixels.
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
        """Logits: positive where the patch looks like an image.

        Raises:
            LatelierError: for images smaller than the last layers need.
        """
        if min(images.shape[2:]) < self.smallest:
            height, width = images.shape[2:]
            raise LatelierError(
                f"A discriminator of {self.smallest.bit_length() - 3} layers needs images of at least "
                f"{self.smallest} pixels a side, not {height} x {width}; lower tokenizer.adversarial.layers."
            )
        return self.head(self.body(images))


def group_count(channels: int) -> int:
    """Of a group norm: the most groups, up to 32, that divide the channels."""
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
