"""Conditions that are concatenated to `x_t` (LDM, section 3.3): what they share, and the plainest, an image-like map.

All of them end as channels on the latents' grid, whatever the size of the image. A row that is told nothing has zeros
there. What users hand over as images, files or arrays is read here too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from jaxtyping import Bool, Float
from PIL import Image, ImageOps
from torch import Tensor, nn

from latelier.conditioning.condition import Condition
from latelier.data.records import UNREADABLE
from latelier.data.transforms import to_float
from latelier.errors import LatelierError
from latelier.tokenizers.codec import check_size

if TYPE_CHECKING:
    from latelier.conditioning import DataSpec
    from latelier.recipe.condition import MapCondition


class MapConditioner(ModelMixin, ConfigMixin):
    """An image-like map (depth, edges, a sketch), averaged down to the latents' grid.

    Args:
        map_channels: of the map.
        channels: after a learned projection without bias; None leaves the map as it is.
        latent_factor: pixels along a side of a latent position.
    """

    input_name = "maps"
    token_width = 0

    @register_to_config
    def __init__(self, map_channels: int = 1, channels: int | None = None, latent_factor: int = 8):
        super().__init__()
        self.register_buffer("one", torch.ones(1))  # gives the module a device and its weights file a content
        self.projection = nn.Conv2d(map_channels, channels, 1, bias=False) if channels else nn.Identity()

    @property
    def spatial_channels(self) -> int:
        """Channels that are concatenated to `x_t`."""
        return self.config["channels"] or self.config["map_channels"]

    def prepare(self, batch: Mapping[str, Any], codec: Any) -> dict[str, Tensor]:
        """Nothing is made from the images; `batch["map"]` `(b, c, h, w)` is checked.

        Raises:
            LatelierError: if there are no maps, or they have other channels.
        """
        found = needed(batch, "map", "map").shape[1]
        if found != self.config["map_channels"]:
            raise LatelierError(
                f"The maps have {found} channels, but the model was made for {self.config['map_channels']}; "
                "set the condition's map_channels to that of the data."
            )
        return {}

    def forward(self, batch: Mapping[str, Any], drop: Bool[Tensor, " b"] | None = None) -> Condition:
        """The condition of `batch["map"]` `(b, c, h, w)` in [-1, 1]; rows where `drop` is true get zeros."""
        values = batch["map"].to(self.device, self.dtype)  # (b, c, h, w)
        grid = grid_of((values.shape[2], values.shape[3]), self.config["latent_factor"])
        spatial = self.projection(F.interpolate(values, size=grid, mode="area"))  # (b, k, *grid)
        return Condition(spatial=blank(spatial, drop))

    def inputs(self, wanted: list[Any], size: tuple[int, int]) -> dict[str, Any]:
        """Maps as a user gives them (see `read_image`), resized to `size`, height and width, to `map`."""
        maps = [read_image(entry, self.config["map_channels"], self.input_name)[None] for entry in wanted]
        resized = [
            m if m.shape[2:] == size else F.interpolate(m, size=size, mode="bilinear", antialias=True) for m in maps
        ]
        return {"map": torch.cat(resized)}  # (b, c, h, w)


def build_map(section: MapCondition, spec: DataSpec) -> MapConditioner:
    """A conditioner for the data's maps.

    Raises:
        LatelierError: if the latents are no grid.
    """
    require_grid(spec, section.kind)
    return MapConditioner(section.map_channels, section.channels, spec.factor)


# -- what conditioners share -------------------------------------------------------------------------------------------


def require_grid(spec: DataSpec, kind: str) -> None:
    """Refuse latents of one axis: there is no place to put an image's plane to."""
    if len(spec.latent_shape) != 3:
        raise LatelierError(
            f"denoiser.condition = {kind!r} is concatenated to latents on a grid, but the tokenizer makes "
            f"{' x '.join(map(str, spec.latent_shape[1:]))} of them in a row; choose a tokenizer with a 2-D grid."
        )


def needed(batch: Mapping[str, Any], key: str, kind: str) -> Tensor:
    """An entry of the batch.

    Raises:
        LatelierError: if the data lack it.
    """
    if key not in batch:
        raise LatelierError(f"denoiser.condition = {kind!r} needs data with {key!r}, but these images have none.")
    return batch[key]


def grid_of(size: tuple[int, int], factor: int) -> tuple[int, int]:
    """Height and width of the latents of an image."""
    check_size(size, factor)
    return size[0] // factor, size[1] // factor


def blank(
    spatial: Float[Tensor, "b c *grid"], drop: Bool[Tensor, " b"] | None, value: float = 0.0
) -> Float[Tensor, "b c *grid"]:
    """The same with a constant in the rows that are dropped."""
    if drop is None:
        return spatial
    return spatial.masked_fill(drop.to(spatial.device).view(-1, *[1] * (spatial.ndim - 1)), value)


# -- what users hand over ----------------------------------------------------------------------------------------------


def open_image(entry: Any, input_name: str) -> Image.Image:
    """A PIL image, or one from a file, upright.

    Args:
        entry: an image, or a file's path.
        asks: the argument that it was given in, for messages.

    Raises:
        LatelierError: if it is something else, or cannot be read.
    """
    if isinstance(entry, str | Path):
        if not Path(entry).is_file():
            raise LatelierError(f"{input_name}: there is no file {str(entry)!r}.")
        try:
            with Image.open(entry) as image:
                image.load()
                return ImageOps.exif_transpose(image)
        except UNREADABLE as error:
            raise LatelierError(f"{input_name}: {str(entry)!r} cannot be read as an image ({error}).") from None
    if not isinstance(entry, Image.Image):
        raise LatelierError(f"{input_name} takes images, files or arrays, not {type(entry).__name__}.")
    return entry


def read_image(entry: Any, channels: int, input_name: str) -> Float[Tensor, "c h w"]:
    """An image as a user gives it, in [-1, 1].

    Args:
        entry: a PIL image, a file's path, an array `(h, w)` or `(h, w, c)`, or a tensor `(c, h, w)`; uint8 means
            0..255, floats are in [-1, 1] already.
        channels: of the result. Images and files become grey or RGB as needed.
        asks: the argument that it was given in, for messages.

    Raises:
        LatelierError: if it cannot be read, or has other channels, other numbers, or transparent pixels.
    """
    if isinstance(entry, Tensor):
        pixels = entry.detach().cpu()
    else:
        array = (
            entry if isinstance(entry, np.ndarray) else _decoded(open_image(entry, input_name), channels, input_name)
        )
        pixels = torch.from_numpy(np.atleast_3d(array).copy()).movedim(-1, 0)
    if pixels.ndim != 3 or len(pixels) != channels:
        raise LatelierError(
            f"{input_name}: images must have {channels} channels, tensors as (c, h, w), arrays as (h, w, c); "
            f"this one is {' x '.join(map(str, pixels.shape))}."
        )
    if pixels.dtype == torch.uint8:
        return to_float(pixels)
    if not pixels.is_floating_point() or not bool((pixels.abs() <= 1).all()):
        raise LatelierError(f"{input_name}: numbers must be uint8, or floats in [-1, 1]; these are {_range(pixels)}.")
    return pixels.float()


def _decoded(image: Image.Image, channels: int, input_name: str) -> np.ndarray:
    """Pixels as uint8, or those of 16 bits as floats in [-1, 1]."""
    if image.mode.startswith("I;16"):
        return (np.asarray(image).astype(np.float64) / 32767.5 - 1).astype(np.float32)
    if image.mode in ("I", "F"):
        raise LatelierError(
            f"{input_name}: images of mode {image.mode} (32 bits) have no fixed range; give 8 or 16 bits."
        )
    if image.has_transparency_data:
        if np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
            raise LatelierError(f"{input_name}: an image has transparent pixels; put it on a background first.")
        image = image.convert("RGB") if channels == 3 else image
    if channels in (1, 3):
        image = image.convert("L" if channels == 1 else "RGB")
    return np.asarray(image)


def _range(values: Tensor) -> str:
    return f"{values.dtype} from {values.min().item():g} to {values.max().item():g}" if values.numel() else "none"
