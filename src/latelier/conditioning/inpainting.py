"""Inpainting: the image with holes, encoded, and where the holes are, beside `x_t` (LDM, section 4.5).

The denoiser sees `[x_t, latents of the masked image, mask]`; the mask is -1 in what is known and +1 in holes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from jaxtyping import Bool, Float
from torch import Tensor

from latelier.conditioning.condition import Condition
from latelier.conditioning.spatial import blank, needed, open_image, read_image, require_grid
from latelier.data.corruptions import SETTINGS, draw_masks
from latelier.errors import LatelierError

if TYPE_CHECKING:
    from latelier.conditioning import DataSpec
    from latelier.recipe.condition import InpaintingCondition


class InpaintingConditioner(ModelMixin, ConfigMixin):
    """Latents of the masked image and the mask; nothing is learned.

    Args:
        masks: how holes are drawn in training, one of `latelier.data.corruptions.SETTINGS`.
        latent_channels: of the tokenizer.
        image_channels: of the images.
        seed: of the holes, addressed by `batch["draw"]`.
    """

    input_name = "inpainting"
    token_width = 0

    @register_to_config
    def __init__(self, masks: str = "train", latent_channels: int = 4, image_channels: int = 3, seed: int = 0):
        super().__init__()
        if masks not in SETTINGS:
            raise LatelierError(f"Unknown masks {masks!r}; there are: {', '.join(SETTINGS)}.")
        self.register_buffer("one", torch.ones(1))  # gives the module a device and its weights file a content

    @property
    def spatial_channels(self) -> int:
        """Channels that are concatenated to `x_t`."""
        return self.config["latent_channels"] + 1

    def prepare(self, batch: Mapping[str, Any], codec: Any) -> dict[str, Tensor]:
        """What the holes leave of `image` `(b, c, h, w)`, in latents.

        Args:
            batch: `image`, and `hole` `(b, 1, h, w)`, 1 in holes; without it holes are drawn, addressed by `draw`.
            codec: the tokenizer.

        Returns:
            `hole`; `masked` `(b, k, *grid)`, normalised latents (posterior mean) of the image with black holes; and
            `hole_grid` `(b, 1, *grid)`, -1 or +1 in holes.
        """
        image = needed(batch, "image", "inpainting")
        if "hole" in batch:
            hole = batch["hole"].to(image)  # (b, 1, h, w)
        else:
            size = (image.shape[2], image.shape[3])
            hole = draw_masks(SETTINGS[self.config["masks"]], size, self.config["seed"], batch["sample_id"]).to(image)
        black = image.masked_fill(hole > 0.5, -1.0)  # (1 - m) x in [0, 1], then to [-1, 1]
        with torch.autocast(codec.device.type, enabled=False):  # as exact as the latents that are drawn
            masked = codec.encode(black.to(codec.device)).to(image.device)  # (b, k, *grid)
        hole_grid = F.interpolate(hole, size=masked.shape[2:], mode="nearest") * 2 - 1  # (b, 1, *grid)
        return {"hole": hole, "masked": masked, "hole_grid": hole_grid}

    def forward(self, batch: Mapping[str, Any], drop: Bool[Tensor, " b"] | None = None) -> Condition:
        """The condition of `batch["masked"]` and `batch["hole_grid"]`; where `drop` is true everything is a hole."""
        masked = batch["masked"].to(self.device, self.dtype)  # (b, k, *grid)
        hole = batch["hole_grid"].to(self.device, self.dtype)  # (b, 1, *grid)
        return Condition(spatial=torch.cat([blank(masked, drop), blank(hole, drop, 1.0)], dim=1))

    def inputs(self, wanted: list[Any], size: tuple[int, int]) -> dict[str, Any]:
        """Pairs of image and mask, as a user gives them, to `image` and `hole`.

        Args:
            wanted: pairs; images see `read_image`, masks see `read_hole`.
            size: height and width of the images to draw, which are those of image and mask.

        Raises:
            LatelierError: if one is no pair, or has another size.
        """
        images, holes = [], []
        for entry in wanted:
            if not isinstance(entry, tuple | list) or len(entry) != 2:
                raise LatelierError(f"{self.input_name} takes pairs (image, mask), not {type(entry).__name__}.")
            image = read_image(entry[0], self.config["image_channels"], self.input_name)  # (c, h, w)
            hole = read_hole(entry[1], self.input_name)  # (h, w)
            if image.shape[1:] != hole.shape:
                raise LatelierError(
                    f"{self.input_name}: the mask is {_by(hole.shape)} (height x width), but its image is "
                    f"{_by(image.shape[1:])}; give a mask of the image's size."
                )
            if hole.shape != size:
                raise LatelierError(
                    f"{self.input_name}: the image is {_by(hole.shape)} (height x width), not {_by(size)}; "
                    f"resize it and its mask, or ask for height={hole.shape[0]}, width={hole.shape[1]}."
                )
            images.append(image)
            holes.append(hole[None].float())
        return {"image": torch.stack(images), "hole": torch.stack(holes)}


def compose(
    drawn: Float[Tensor, "b c h w"], image: Float[Tensor, "b c h w"], hole: Float[Tensor, "b 1 h w"]
) -> Float[Tensor, "b c h w"]:
    """What was drawn in the holes, and the image itself everywhere else."""
    return torch.where(hole > 0.5, drawn, image)


def read_hole(entry: Any, input_name: str) -> Bool[Tensor, "h w"]:
    """A mask as a user gives it, true in holes.

    Args:
        entry: a PIL image or a file's path, where bright pixels (from 128 of 255 on) are holes; or an array or tensor
            `(h, w)` or `(1, h, w)` of booleans, of uint8 in 0..255 or 0..1, or of floats in [0, 1] (holes above 0.5).
        asks: the argument that it was given in, for messages.

    Raises:
        LatelierError: if it is something else.
    """
    if isinstance(entry, np.ndarray | Tensor):
        values = torch.from_numpy(entry.copy()) if isinstance(entry, np.ndarray) else entry.detach().cpu()
    else:
        values = torch.from_numpy(np.array(open_image(entry, input_name).convert("L")))
    values = values[0] if values.ndim == 3 and len(values) == 1 else values
    if values.ndim != 2 or not (values.is_floating_point() or values.dtype in (torch.bool, torch.uint8)):
        raise LatelierError(
            f"{input_name}: masks are (h, w) of booleans, uint8, or floats in [0, 1], not {_by(values.shape)} of "
            f"{values.dtype}."
        )
    if values.is_floating_point() and not bool(((values >= 0) & (values <= 1)).all()):
        raise LatelierError(
            f"{input_name}: a mask's floats are in [0, 1], but these go from {values.min():g} to {values.max():g}."
        )
    bright = values.dtype == torch.uint8 and bool((values > 1).any())
    return values > (127 if bright else 0.5)


def _by(size: Any) -> str:
    return " x ".join(map(str, size))


def build_inpainting(section: InpaintingCondition, spec: DataSpec) -> InpaintingConditioner:
    """A conditioner for the recipe's holes.

    Raises:
        LatelierError: if the latents are no grid.
    """
    require_grid(spec, section.kind)
    return InpaintingConditioner(section.masks, spec.latent_shape[0], spec.image_channels, spec.seed)
