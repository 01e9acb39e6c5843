"""Super-resolution: the small image beside `x_t` (LDM, section 4.4).

The small image is not encoded. Where it has the latents' size, as in the paper (64 x 64 for 256 x 256, f = 4), it is
concatenated as it is; larger ones are folded into channels without loss, smaller ones are enlarged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from jaxtyping import Bool
from torch import Tensor

from latelier.conditioning.condition import Condition
from latelier.conditioning.spatial import blank, grid_of, needed, read_image, require_grid
from latelier.data.corruptions import degrade
from latelier.errors import LatelierError

if TYPE_CHECKING:
    from latelier.conditioning import DataSpec
    from latelier.recipe.condition import LowResolutionCondition


class LowResolutionConditioner(ModelMixin, ConfigMixin):
    """A smaller image on the latents' grid; nothing is learned.

    Args:
        factor: how many times smaller a side is.
        degradation: how small images are made in training, see `latelier.data.corruptions`.
        image_channels: of the images.
        latent_factor: pixels along a side of a latent position; `factor` divides it, or is larger.
        seed: of random degradations, addressed by `batch["draw"]`.

    Raises:
        LatelierError: if the small image's pixels do not make whole latent positions.
    """

    input_name = "low_resolution"
    token_width = 0

    @register_to_config
    def __init__(
        self, factor: int, degradation: str = "bicubic", image_channels: int = 3, latent_factor: int = 4, seed: int = 0
    ):
        super().__init__()
        if factor < latent_factor and latent_factor % factor:
            raise LatelierError(
                f"condition.factor = {factor} does not divide the tokenizer's factor {latent_factor}; "
                f"use a divisor of {latent_factor}, or more than it."
            )
        self.register_buffer("one", torch.ones(1))  # gives the module a device and its weights file a content

    @property
    def spatial_channels(self) -> int:
        """Channels that are concatenated to `x_t`."""
        return self.config["image_channels"] * self._fold**2

    @property
    def _fold(self) -> int:
        """Pixels of the small image along a side of a latent position, at least one."""
        return max(1, self.config["latent_factor"] // self.config["factor"])

    def prepare(self, batch: Mapping[str, Any], codec: Any) -> dict[str, Tensor]:
        """`low` `(b, c, h / factor, w / factor)` of `image`, unless it is there already."""
        if "low" in batch:
            return {}
        image, config = needed(batch, "image", "low-resolution"), self.config
        return {"low": degrade(image, config["factor"], config["degradation"], config["seed"], batch["sample_id"])}

    def forward(self, batch: Mapping[str, Any], drop: Bool[Tensor, " b"] | None = None) -> Condition:
        """The condition of `batch["low"]` in [-1, 1]; rows where `drop` is true get zeros."""
        low, factor = batch["low"].to(self.device, self.dtype), self.config["factor"]  # (b, c, h / s, w / s)
        grid = grid_of((low.shape[2] * factor, low.shape[3] * factor), self.config["latent_factor"])
        if self._fold > 1:
            low = F.pixel_unshuffle(low, self._fold)  # (b, c fold fold, *grid)
        elif low.shape[2:] != grid:
            low = F.interpolate(low, size=grid, mode="bicubic", align_corners=False)  # (b, c, *grid)
        return Condition(spatial=blank(low, drop))

    def inputs(self, wanted: list[Any], size: tuple[int, int]) -> dict[str, Any]:
        """Small images as a user gives them (see `read_image`) to `low`.

        Raises:
            LatelierError: if one has not `size`, height and width of the images to draw, over the factor.
        """
        images = [read_image(entry, self.config["image_channels"], self.input_name) for entry in wanted]
        for image in images:
            self._check(image.shape[1], image.shape[2], size)
        return {"low": torch.stack(images)}  # (b, c, h / s, w / s)

    def _check(self, height: int, width: int, size: tuple[int, int]) -> None:
        factor = self.config["factor"]
        if (height * factor, width * factor) == size:
            return
        fits = f"from {size[0] // factor} x {size[1] // factor} ones"
        if size[0] % factor or size[1] % factor:
            fits = f"from none, as {factor} does not divide it"
        raise LatelierError(
            f"{self.input_name}: a model of factor {factor} draws images of {size[0]} x {size[1]} pixels {fits}; "
            f"this one is {height} x {width}: resize it, or ask for height={height * factor}, width={width * factor}."
        )


def build_low_resolution(section: LowResolutionCondition, spec: DataSpec) -> LowResolutionConditioner:
    """A conditioner for the recipe's factor and degradation.

    Raises:
        LatelierError: if the factor does not go with the tokenizer's, or the latents are no grid.
    """
    require_grid(spec, section.kind)
    return LowResolutionConditioner(section.factor, section.degradation, spec.image_channels, spec.factor, spec.seed)
