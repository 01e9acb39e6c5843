"""Alignment: a middle block of a denoiser learns to predict a frozen vision model's features of the clean image.

REPA (Yu et al. 2025, section 3) projects each token by an MLP; iREPA (Singh et al. 2025) by one convolution, onto
features from which most of their mean over the image is taken off. HASTE (Wang et al. 2025) stops it on the way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from latelier.data.records import digest
from latelier.errors import LatelierError
from latelier.losses.teachers import Features, find_pretrained, open_teacher
from latelier.publish import sha256
from latelier.sections import Count, Section, Unit, Weight

WEIGHTS = {"repa": 0.5, "irepa": 1.0}


class Align(Section):
    """Alignment of a middle block with a frozen vision model: REPA, iREPA."""

    teacher: str = Field(
        "facebook/dinov2-base",
        description="Hub name or folder of a vision transformer, `vgg16`, or the folder of a tokenizer trained here",
    )
    form: Literal["repa", "irepa"] = Field("repa", description="an MLP of each token, or a convolution of them")
    depth: int = Field(8, ge=1, description="the block whose output is projected, the first is 1")
    weight: Weight | None = Field(None, description="of the loss; default 0.5 for repa, 1 for irepa")
    width: int = Field(2048, ge=1, description="repa: hidden layers of the MLP")
    gamma: Unit = Field(0.6, description="irepa: share of the features' mean over the image that is taken off")
    until: Count | None = Field(None, description="images after which it stops (HASTE); default never")
    cache: bool = Field(
        True, description="keep the features with the cached latents; false: the teacher sees every image of every step"
    )


class Alignment(nn.Module):
    """The projection, which is trained with the denoiser and not exported with it, and its loss.

    Args:
        teacher: makes the features.
        dim: width of the denoiser's tokens.
        grid: `(h, w)` of its tokens.
        form, depth, weight, width, gamma, until, cache: as in `Align`.
    """

    def __init__(
        self, teacher: Features, dim: int, grid: tuple[int, int], form: str = "repa", depth: int = 8,
        weight: float | None = None, width: int = 2048, gamma: float = 0.6, until: int | None = None,
        cache: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.teacher, self.grid, self.depth, self.until, self.cache = teacher, grid, depth, until, cache
        self.gamma, self.weight = gamma if form == "irepa" else None, WEIGHTS[form] if weight is None else weight
        layers = (nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, teacher.dim))
        mlp = form == "repa"
        self.projector: nn.Module = nn.Sequential(*layers) if mlp else nn.Conv2d(dim, teacher.dim, 3, padding=1)

    def acts(self, seen: int) -> bool:
        """Whether the step that begins at `seen` images is aligned."""
        return self.until is None or seen < self.until

    def features(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n k"]:
        """The teacher's features of images in [-1, 1], one for each token."""
        return self.teacher(images, self.grid)

    def key(self) -> dict[str, Any]:
        """What cached features depend on."""
        folder = Path(find_pretrained(self.teacher.name)).expanduser()
        folder = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
        weights = [sha256(path) for path in sorted(folder.glob("*.safetensors"))]
        return {"features": f"{self.teacher.name} {digest(*weights)} {self.grid[0]}x{self.grid[1]}"}

    def forward(self, hidden: Float[Tensor, "b m d"] | None, features: Float[Tensor, "b n k"] | None) -> Tensor:
        """-mean cos(target, projection) of the last n tokens of a block (REPA, equation 6); others precede patches.

        Without tokens, after the end, it is a zero with zero gradients, which all processes can average.
        """
        if hidden is None or features is None:
            return 0 * sum(parameter.sum() for parameter in self.projector.parameters())
        hidden = hidden[:, -features.shape[1] :]  # (b, n, d)
        if self.gamma is not None:
            hidden = hidden.transpose(1, 2).unflatten(2, self.grid)  # (b, d, h, w)
            projected = self.projector(hidden).flatten(2).transpose(1, 2)  # (b, n, k)
            features = standardise(features, self.gamma)
        else:
            projected = self.projector(hidden)  # (b, n, k)
        return -F.cosine_similarity(projected.float(), features, dim=-1).mean()


def standardise(features: Float[Tensor, "b n k"], gamma: float) -> Float[Tensor, "b n k"]:
    """(f - gamma mean) / std over the tokens of each image: iREPA's spatial normalisation."""
    std = features.std(dim=1, keepdim=True)  # (b, 1, k), unbiased
    return (features - gamma * features.mean(dim=1, keepdim=True)) / (std + 1e-6)


@contextmanager
def tapped(denoiser: Any, depth: int | None) -> Iterator[list[Tensor]]:
    """A list that gets the output of block `depth`, the first is 1, when the denoiser runs; None: it stays empty."""
    outputs: list[Tensor] = []
    if depth is not None:
        denoiser.taps = {denoiser.blocks[depth - 1]: outputs}  # see `layers.run_block`
    try:
        yield outputs
    finally:
        if depth is not None:
            denoiser.taps = {}


def build_alignment(section: Align, denoiser: Any, latent_shape: tuple[int, ...]) -> Alignment:
    """The alignment of a recipe's section, for a denoiser of latents `(c, *grid)`; an error if they do not fit."""
    blocks = getattr(denoiser, "blocks", None)
    if blocks is None:
        raise LatelierError(
            f"denoiser.align needs a transformer, but {type(denoiser).__name__} has no blocks of tokens; choose kind "
            "dit, sit, lightning-dit, ddt, uvit or usit, or leave align out."
        )
    if section.depth > len(blocks):
        raise LatelierError(f"denoiser.align.depth = {section.depth}, but the denoiser has {len(blocks)} blocks.")
    grid = tuple(side // denoiser.config["patch_size"] for side in latent_shape[1:])
    if len(grid) != 2:
        raise LatelierError(
            f"denoiser.align needs latents on a plane, but this tokenizer makes {math.prod(grid)} 1-D latents; leave "
            "align out."
        )
    settings = section.model_dump(exclude={"teacher"})
    return Alignment(open_teacher(section.teacher), denoiser.config["dim"], grid, **settings)
