"""Conditions that are concatenated to `x_t` (LDM, section 3.3): maps, label maps, small images, images with holes.

All of them end as channels on the latents' grid. Dropped rows are zeros there; for inpainting, all of one is a hole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from latelier.conditioning.condition import Condition, DataSpec
from latelier.conditioning.inputs import by, open_image, read_image, read_mask
from latelier.data.corruptions import SETTINGS, degrade, draw_masks
from latelier.data.transforms import nearest
from latelier.diffusion import Latents
from latelier.errors import LatelierError
from latelier.sections import Section, Unit
from latelier.tokenizers.codec import check_size

LABEL_MODES = ("1", "L", "P", "I")  # of PIL; and I;16 in its byte orders


def require_grid(spec: DataSpec, kind: str) -> None:
    """Refuse 1-D latents, onto which no map can be laid."""
    if len(spec.latent_shape) != 3:
        raise LatelierError(
            f"denoiser.condition = {kind!r} is concatenated to latents on a 2-D grid, but the tokenizer makes "
            f"{by(spec.latent_shape[1:])} 1-D latents; choose a tokenizer with a 2-D grid."
        )


def needed(batch: Mapping[str, Any], key: str, kind: str) -> Tensor:
    """An entry of the batch, or an error if the data lack it."""
    if key not in batch:
        raise LatelierError(f"denoiser.condition = {kind!r} needs data with {key!r}, but these images have none.")
    return batch[key]


def grid_of(size: tuple[int, int], factor: int) -> tuple[int, int]:
    """Height and width of the latents of an image."""
    check_size(size, factor)
    return size[0] // factor, size[1] // factor


def blank(spatial: Latents, drop: Bool[Tensor, " b"] | None, value: float = 0.0) -> Latents:
    """`spatial` with a constant in the rows that are dropped."""
    if drop is None:
        return spatial
    return spatial.masked_fill(drop.to(spatial.device).view(-1, *[1] * (spatial.ndim - 1)), value)


class SegmentationCondition(Section):
    """A map of classes, one-hot, rescaled to the latents' grid and projected."""

    kind: Literal["segmentation"]
    classes: int | None = Field(None, ge=2, description="how many ids the maps have; by default what the data say")
    channels: int = Field(3, ge=1, description="after the projection")
    dropout: Unit = Field(0.1, description="share of images with an empty map")


class SegmentationConditioner(ModelMixin, ConfigMixin):
    """One-hot classes, rescaled to the latents' grid, projected without bias (LDM, section 4.3.2 and appendix).

    Args:
        classes: how many ids there are, 0 <= id < classes.
        channels: after the projection.
        latent_factor: pixels along a side of a latent position.
    """

    input_name, token_width = "segmentations", 0

    @register_to_config
    def __init__(self, classes: int, channels: int = 3, latent_factor: int = 4):
        super().__init__()
        self.spatial_channels = channels
        self.projection = nn.Conv2d(classes, channels, 1, bias=False)

    def prepare(self, batch: Mapping[str, Any], codec: Any) -> dict[str, Tensor]:
        """Check the ids of `batch["segmentation"]` `(b, h, w)`."""
        low, high = (int(v) for v in needed(batch, "segmentation", "segmentation").long().aminmax())
        most = self.config["classes"] - 1
        if low < 0 or high > most:
            raise LatelierError(
                f"A label map has the id {low if low < 0 else high}, but ids go from 0 to {most}; "
                "give unlabelled pixels an id of their own, or set the condition's `classes`."
            )
        return {}

    def forward(self, batch: Mapping[str, Any], drop: Bool[Tensor, " b"] | None = None) -> Condition:
        """The condition of `batch["segmentation"]` `(b, h, w)`; rows where `drop` is true get zeros."""
        ids = batch["segmentation"].to(self.device).long()  # (b, h, w)
        shares = class_shares(ids, self.config["classes"], self.config["latent_factor"]).to(self.dtype)  # (b, k, *grid)
        return Condition(spatial=blank(self.projection(shares), drop))

    def inputs(self, wanted: list[Any], size: tuple[int, int]) -> dict[str, Any]:
        """Label maps, resized to `size` (height, width), to `segmentation`.

        They are `(h, w)` arrays or tensors of integers, PIL images whose pixels are ids (modes P, L, I), or PNG files.
        """
        maps = [nearest(self._read(entry), (0.0, 0.0, 1.0, 1.0), size) for entry in wanted]
        return {"segmentation": torch.from_numpy(np.stack(maps).astype(np.int64))}  # (b, h, w)

    def _read(self, entry: Any) -> np.ndarray:
        if isinstance(entry, Tensor):
            entry = entry.detach().cpu().numpy()
        if not isinstance(entry, np.ndarray):
            image = open_image(entry, self.input_name)
            if image.mode not in LABEL_MODES and not image.mode.startswith("I;16"):
                raise LatelierError(
                    f"{self.input_name}: a label map holds ids (modes P, L or I), but this image is {image.mode}."
                )
            entry = np.asarray(image)
        if entry.ndim != 2 or entry.dtype.kind not in "biu":
            raise LatelierError(
                f"{self.input_name}: label maps are (h, w) arrays of integers, not {by(entry.shape)} of {entry.dtype}."
            )
        return entry


def class_shares(ids: Int[Tensor, "b h w"], classes: int, factor: int) -> Float[Tensor, "b k i j"]:
    """How much of each latent position's square, factor x factor pixels, every class covers; sums to 1 over classes.

    This is the one-hot map after bilinear halving, as often as it takes: each halving averages squares of 2 x 2 (LDM's
    SpatialRescaler). Counting ids gives the same without one-hot maps of the image's size, and for any factor.
    """
    rows, columns = grid_of((ids.shape[1], ids.shape[2]), factor)
    squares = ids.unflatten(1, (rows, factor)).unflatten(3, (columns, factor))  # (b, i, f, j, f)
    squares = squares.movedim(3, 2).flatten(3)  # (b, i, j, f f)
    counts = torch.zeros(*squares.shape[:3], classes, device=ids.device)  # (b, i, j, k)
    counts.scatter_add_(3, squares, torch.ones_like(squares, dtype=counts.dtype))
    return (counts / factor**2).movedim(3, 1)


class LowResolutionCondition(Section):
    """A smaller image: super-resolution."""

    kind: Literal["low-resolution"]
    factor: int = Field(4, ge=2, description="how many times smaller a side is")
    degradation: Literal["bicubic", "bsrgan-light"] = "bicubic"
    dropout: Unit = 0.0


class LowResolutionConditioner(ModelMixin, ConfigMixin):
    """A smaller image on the latents' grid, for super-resolution (LDM, section 4.4); nothing is learned.

    One of the latents' size, as in the paper (64 x 64 for 256 x 256, f = 4), is concatenated as it is; larger ones are
    folded into channels without loss, smaller ones are enlarged.

    Args:
        factor: how many times smaller a side is; divides `latent_factor`, or is larger.
        degradation: how small images are made in training, see `latelier.data.corruptions.degrade`.
        latent_factor: pixels along a side of a latent position.
        seed: of random degradations, keyed by `batch["sample_id"]`.
    """

    input_name, token_width = "low_resolution", 0

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
        self.fold = max(1, latent_factor // factor)  # pixels of the small image along a side of a latent position
        self.spatial_channels = image_channels * self.fold**2
        self.register_buffer("one", torch.ones(1))  # gives the module a device and its weights file a content

    def prepare(self, batch: Mapping[str, Any], codec: Any) -> dict[str, Tensor]:
        """`low` `(b, c, h / factor, w / factor)` of `image`, unless the batch has it already."""
        if "low" in batch:
            return {}
        image, config = needed(batch, "image", "low-resolution"), self.config
        return {"low": degrade(image, config["factor"], config["degradation"], config["seed"], batch["sample_id"])}

    def forward(self, batch: Mapping[str, Any], drop: Bool[Tensor, " b"] | None = None) -> Condition:
        """The condition of `batch["low"]` in [-1, 1]; rows where `drop` is true get zeros."""
        low, factor = batch["low"].to(self.device, self.dtype), self.config["factor"]  # (b, c, h / s, w / s)
        grid = grid_of((low.shape[2] * factor, low.shape[3] * factor), self.config["latent_factor"])
        if self.fold > 1:
            low = F.pixel_unshuffle(low, self.fold)  # (b, c fold fold, *grid)
        elif low.shape[2:] != grid:
            low = F.interpolate(low, size=grid, mode="bicubic", align_corners=False)  # (b, c, *grid)
        return Condition(spatial=blank(low, drop))

    def inputs(self, wanted: list[Any], size: tuple[int, int]) -> dict[str, Any]:
        """Small images (see `read_image`), smaller than `size` by the factor, to `low`."""
        images = [read_image(entry, self.config["image_channels"], self.input_name) for entry in wanted]
        factor = self.config["factor"]
        for height, width in (image.shape[1:] for image in images):
            if (height * factor, width * factor) != size:
                fits = f"from {by([side // factor for side in size])} ones"
                if any(side % factor for side in size):
                    fits = f"from none, as {factor} does not divide it"
                raise LatelierError(
                    f"{self.input_name}: a model of factor {factor} draws images of {by(size)} pixels {fits}; this one "
                    f"is {height} x {width}: resize it, or ask for height={height * factor}, width={width * factor}."
                )
        return {"low": torch.stack(images)}  # (b, c, h / s, w / s)


class InpaintingCondition(Section):
    """The image with holes."""

    kind: Literal["inpainting"]
    masks: Literal["train", "thick", "medium"] = Field(
        "train", description="LaMa's settings of strokes and boxes: for training, or of its evaluation sets"
    )
    dropout: Unit = 0.0


class InpaintingConditioner(ModelMixin, ConfigMixin):
    """Latents of the masked image, and the mask, -1 in what is known and +1 in holes (LDM, section 4.5).

    Args:
        masks: how holes are drawn in training, one of `latelier.data.corruptions.SETTINGS`.
        latent_channels, image_channels: of the tokenizer.
        seed: of the holes, keyed by `batch["sample_id"]`.
    """

    input_name, token_width = "inpainting", 0

    @register_to_config
    def __init__(self, masks: str = "train", latent_channels: int = 4, image_channels: int = 3, seed: int = 0):
        super().__init__()
        if masks not in SETTINGS:
            raise LatelierError(f"Unknown masks {masks!r}; there are: {', '.join(SETTINGS)}.")
        self.spatial_channels = latent_channels + 1
        self.register_buffer("one", torch.ones(1))  # gives the module a device and its weights file a content

    def prepare(self, batch: Mapping[str, Any], codec: Any) -> dict[str, Tensor]:
        """`hole`; `masked` `(b, k, *grid)`, normalised latents of `image` with black holes; and `hole_grid` in -1, +1.

        `hole` `(b, 1, h, w)` is 1 in holes; where the batch has none, holes are drawn, keyed by `sample_id`.
        """
        image = needed(batch, "image", "inpainting")
        if "hole" in batch:
            hole = batch["hole"].to(image)  # (b, 1, h, w)
        else:
            size = (image.shape[2], image.shape[3])
            hole = draw_masks(SETTINGS[self.config["masks"]], size, self.config["seed"], batch["sample_id"]).to(image)
        black = image.masked_fill(hole > 0.5, -1.0)  # (1 - m) x in [0, 1], then to [-1, 1]
        with torch.autocast(codec.device.type, enabled=False):  # as exact as the latents of training
            masked = codec.encode(black.to(codec.device)).to(image.device)  # (b, k, *grid)
        hole_grid = F.interpolate(hole, size=masked.shape[2:], mode="nearest") * 2 - 1  # (b, 1, *grid)
        return {"hole": hole, "masked": masked, "hole_grid": hole_grid}

    def forward(self, batch: Mapping[str, Any], drop: Bool[Tensor, " b"] | None = None) -> Condition:
        """Condition of `batch["masked"]` and `batch["hole_grid"]`; where `drop` is true everything is a hole."""
        masked = batch["masked"].to(self.device, self.dtype)  # (b, k, *grid)
        hole = batch["hole_grid"].to(self.device, self.dtype)  # (b, 1, *grid)
        return Condition(spatial=torch.cat([blank(masked, drop), blank(hole, drop, 1.0)], dim=1))

    def inputs(self, wanted: list[Any], size: tuple[int, int]) -> dict[str, Any]:
        """Pairs of an image and its mask, or strings `image.png,mask.png`, both of `size`, to `image` and `hole`."""
        images, holes = [], []
        for entry in wanted:
            entry = entry.split(",") if isinstance(entry, str) else entry
            if not isinstance(entry, tuple | list) or len(entry) != 2:
                raise LatelierError(f"{self.input_name} takes pairs (image, mask), not {type(entry).__name__}.")
            image = read_image(entry[0], self.config["image_channels"], self.input_name)  # (c, h, w)
            hole = read_mask(entry[1], self.input_name)  # (h, w)
            if image.shape[1:] != hole.shape:
                raise LatelierError(
                    f"{self.input_name}: the mask is {by(hole.shape)} (height x width), but its image is "
                    f"{by(image.shape[1:])}; give a mask of the image's size."
                )
            if hole.shape != size:
                raise LatelierError(
                    f"{self.input_name}: the image is {by(hole.shape)} (height x width), not {by(size)}; "
                    f"resize it and its mask, or ask for height={hole.shape[0]}, width={hole.shape[1]}."
                )
            images.append(image)
            holes.append(hole[None].float())
        return {"image": torch.stack(images), "hole": torch.stack(holes)}


class MapCondition(Section):
    """Any other image-like map, such as depth or edges."""

    kind: Literal["map"]
    map_channels: int = Field(1, ge=1, description="of the map")
    channels: int | None = Field(None, ge=1, description="after a learned projection; by default none")
    dropout: Unit = Field(0.1, description="share of images with an empty map")


class MapConditioner(ModelMixin, ConfigMixin):
    """An image-like map (depth, edges, a sketch), averaged down to the latents' grid.

    Args:
        channels: after a learned projection without bias; None leaves the map as it is.
        latent_factor: pixels along a side of a latent position.
    """

    input_name, token_width = "maps", 0

    @register_to_config
    def __init__(self, map_channels: int = 1, channels: int | None = None, latent_factor: int = 8):
        super().__init__()
        self.spatial_channels = channels or map_channels
        self.register_buffer("one", torch.ones(1))  # gives the module a device and its weights file a content
        self.projection = nn.Conv2d(map_channels, channels, 1, bias=False) if channels else nn.Identity()

    def prepare(self, batch: Mapping[str, Any], codec: Any) -> dict[str, Tensor]:
        """Check the channels of `batch["map"]` `(b, c, h, w)`."""
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
        """Maps (see `read_image`), resized to `size` (height, width), to `map`."""
        maps = [read_image(entry, self.config["map_channels"], self.input_name)[None] for entry in wanted]
        maps = [m if m.shape[2:] == size else F.interpolate(m, size, mode="bilinear", antialias=True) for m in maps]
        return {"map": torch.cat(maps)}  # (b, c, h, w)


def build(section: Any, spec: DataSpec) -> ModelMixin:
    """The conditioner of a recipe's section; an error for 1-D latents, and if the classes of label maps are unknown."""
    require_grid(spec, section.kind)
    if isinstance(section, LowResolutionCondition):
        degradation, channels = section.degradation, spec.image_channels
        return LowResolutionConditioner(section.factor, degradation, channels, spec.factor, spec.seed)
    if isinstance(section, InpaintingCondition):
        return InpaintingConditioner(section.masks, spec.latent_shape[0], spec.image_channels, spec.seed)
    if isinstance(section, MapCondition):
        return MapConditioner(section.map_channels, section.channels, spec.factor)
    classes = section.classes or spec.segmentation_classes
    if classes is None:
        raise LatelierError(
            "denoiser.condition = 'segmentation', but the data do not say how many classes their maps have; use data "
            "with label maps, and set the condition's `classes`."
        )
    return SegmentationConditioner(classes, section.channels, spec.factor)


SECTIONS = (SegmentationCondition, LowResolutionCondition, InpaintingCondition, MapCondition)
