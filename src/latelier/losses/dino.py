"""A discriminator on the features of a frozen vision transformer, MAETok's and RAE's.

At several depths of a self-supervised ViT (DINO), a small trainable head classifies every patch as of an image or a
reconstruction. The ViT is not registered, so that optimisers, checkpoints and DDP only see the heads. Sauer et al.
2021, "Projected GANs Converge Faster"; Sauer et al. 2023, "StyleGAN-T", section 3.2 (DINO ViT-S, five heads).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from latelier.errors import LatelierError
from latelier.losses.adversarial import group_count
from latelier.losses.teachers import Teacher

CROP_SHARE = 0.5  # of the images that are cropped to the ViT's size; the others are shrunk to it
TAPS = 4  # blocks whose outputs are read, besides the embedded patches
NEIGHBOURS = 9  # kernel size of a head's second convolution, in patches in raster order


class DinoDiscriminator(nn.Module):
    """One head on each tapped depth of a frozen ViT.

    Args:
        teacher: the ViT: a name on the Hugging Face Hub or a folder, see `Teacher`.
        in_channels: of the images, 1 or 3; a gray channel is repeated.
        norm: `batch` as in the papers; `group` does not mix the images of a batch.
        taps: `first`: a head reads the embedded patches (MAETok); `last`: a second one the last block (RAE).
        class_token: add the CLS token to each patch (MAETok).
    """

    def __init__(
        self, teacher: str, in_channels: int = 3, norm: str = "group", taps: str = "first", class_token: bool = True
    ):
        super().__init__()
        if in_channels not in (1, 3):
            raise LatelierError(
                f"tokenizer.adversarial.kind = 'dino' takes images of 1 or 3 channels, not {in_channels}; "
                "use kind: patch."
            )
        self.features = FrozenFeatures(teacher, taps, class_token)
        self.heads = nn.ModuleList(Head(self.features.dim, norm) for _ in self.features.taps)

    def forward(
        self, images: Float[Tensor, "b c h w"], numbers: Float[Tensor, "b 3"] | None = None, crops: bool = True
    ) -> Float[Tensor, "b 1 n"]:
        """Logits of all patches at all depths, positive where a patch looks like an image.

        For `numbers` see `view`; without `crops` all images are resized, bilinearly (RAE).
        """
        images, size = images.expand(-1, 3, -1, -1), self.features.size  # (b, 3, h, w)
        resized = view(images, size, numbers) if crops else F.interpolate(images, size, mode="bilinear")
        taps = self.features(resized)  # each (b, d, n)
        return torch.cat([head(x) for head, x in zip(self.heads, taps, strict=True)], dim=2)


class FrozenFeatures:
    """Features of a ViT of `transformers`, differentiable in the image only.

    No module, so that the ViT is not registered; it follows the images to their device. It takes images of `size`
    `(h, w)` and reads the depths `taps`: 0 before the first block, k after k blocks.
    """

    def __init__(self, teacher: str, taps: str = "first", class_token: bool = True):
        opened, self.class_token = Teacher(teacher), class_token
        self.name, self.vit, self.dim = teacher, opened.model, opened.dim
        self.mean, self.std = opened.mean, opened.std  # (3, 1, 1) each
        config = self.vit.config
        side = config.image_size
        self.size: tuple[int, int] = (side, side) if isinstance(side, int) else (side[0], side[1])
        self.patches = (self.size[0] // opened.patch) * (self.size[1] // opened.patch)
        self.taps = tapped(config.num_hidden_layers, taps)

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b d n"]]:
        """Patch tokens, with the CLS token added to each if wanted, at every tapped depth, of images in [-1, 1]."""
        if self.mean.device != images.device:
            self.vit.to(images.device)
            self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
        pixels = ((images + 1) / 2 - self.mean) / self.std  # (b, 3, h, w)
        states = self.vit(pixels, output_hidden_states=True).hidden_states  # depth + 1 times (b, 1 + n, d)
        return [self._with_class(states[depth]).transpose(1, 2) for depth in self.taps]

    def _with_class(self, tokens: Float[Tensor, "b m d"]) -> Float[Tensor, "b n d"]:
        """Patches plus CLS: CLS, where there is one, comes first, then registers, then the patches."""
        if tokens.shape[1] < self.patches or tokens.shape[2] != self.dim:
            raise LatelierError(
                f"tokenizer.adversarial.teacher = {self.name!r} lacks a vector of {self.dim} numbers for each patch "
                "at every depth; name a plain vision transformer, such as facebook/dino-vits16."
            )
        patches = tokens[:, -self.patches :]
        plain = not self.class_token or tokens.shape[1] == self.patches
        return patches if plain else patches + tokens[:, :1]


class Head(nn.Module):
    """A logit for each token: convolutions of 1, of `NEIGHBOURS` (residual), and of 1 in raster order."""

    def __init__(self, dim: int, norm: str = "group"):
        super().__init__()
        self.first = _block(dim, 1, norm)
        self.second = _block(dim, NEIGHBOURS, norm)
        self.logit = spectral_norm(FloatWeight(dim, 1, 1))

    def forward(self, x: Float[Tensor, "b d n"]) -> Float[Tensor, "b 1 n"]:
        x = self.first(x)  # (b, d, n)
        x = (x + self.second(x)) * 0.5**0.5  # (b, d, n), of unchanged variance
        return self.logit(x)


class FloatWeight(nn.Conv1d):
    """A convolution whose spectrally normalised weight is computed in float32 also under autocast."""

    def forward(self, x: Float[Tensor, "b d n"]) -> Float[Tensor, "b k n"]:
        with torch.autocast(x.device.type, enabled=False):
            weight = self.weight  # (k, d, neighbours) / its largest singular value
        return self._conv_forward(x, weight, self.bias)


def tapped(depth: int, fifth: str = "first") -> list[int]:
    """After four evenly spread blocks, the last included, and before the first (MAETok) or after the last again (RAE).

    Of 12 blocks: 0, 3, 6, 9, 12, or 3, 6, 9, 12, 12.
    """
    spread = sorted({-(-depth * k // TAPS) for k in range(1, TAPS + 1)})
    return [0, *spread] if fifth == "first" else [*spread, depth]


def view(
    images: Float[Tensor, "b c h w"], size: Sequence[int], numbers: Float[Tensor, "b 3"] | None = None
) -> Float[Tensor, "b c i j"]:
    """Images at the ViT's size: some cropped at a random place, the others reduced by area; small ones enlarged.

    `numbers` are uniform in [0, 1): an image with one below a half is cropped, at (y, x) of the others; None: no crops.
    """
    room = [have - want for have, want in zip(images.shape[2:], size)]
    if not any(room):
        return images
    if min(room) < 0:
        return F.interpolate(images, size=tuple(size), mode="bilinear", antialias=True)
    resized = F.interpolate(images, size=tuple(size), mode="area")  # (b, c, i, j)
    if numbers is None:
        return resized
    views = []
    for image, shrunk, (chance, *place) in zip(images, resized, numbers.tolist()):
        y, x = (int(u * (r + 1)) for u, r in zip(place, room))
        views.append(image[:, y : y + size[0], x : x + size[1]] if chance < CROP_SHARE else shrunk)
    return torch.stack(views)


def _block(dim: int, neighbours: int, norm: str) -> nn.Sequential:
    """Convolution around the sequence, norm, LeakyReLU."""
    padding = {"padding": neighbours // 2, "padding_mode": "circular"} if neighbours > 1 else {}
    return nn.Sequential(
        spectral_norm(FloatWeight(dim, dim, neighbours, **padding)),
        nn.BatchNorm1d(dim) if norm == "batch" else nn.GroupNorm(group_count(dim), dim),
        nn.LeakyReLU(0.2),
    )
