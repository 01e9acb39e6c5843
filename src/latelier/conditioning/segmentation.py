"""Semantic synthesis: a map of classes beside `x_t` (LDM, section 4.3.2 and appendix)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from latelier.conditioning.condition import Condition
from latelier.conditioning.spatial import blank, grid_of, needed, open_image, require_grid
from latelier.data.transforms import nearest
from latelier.errors import LatelierError

if TYPE_CHECKING:
    from latelier.conditioning import DataSpec
    from latelier.recipe.condition import SegmentationCondition

LABEL_MODES = ("1", "L", "P", "I")  # of PIL; and I;16 in its byte orders


class SegmentationConditioner(ModelMixin, ConfigMixin):
    """One-hot classes, rescaled to the latents' grid, projected.

    Args:
        classes: how many ids there are, 0 <= id < classes.
        channels: after the projection, which has no bias.
        latent_factor: pixels along a side of a latent position.
    """

    input_name = "segmentations"
    token_width = 0

    @register_to_config
    def __init__(self, classes: int, channels: int = 3, latent_factor: int = 4):
        super().__init__()
        self.projection = nn.Conv2d(classes, channels, 1, bias=False)

    @property
    def spatial_channels(self) -> int:
        """Channels that are concatenated to `x_t`."""
        return self.config["channels"]

    def prepare(self, batch: Mapping[str, Any], codec: Any) -> dict[str, Tensor]:
        """Nothing is made from the images; the ids of `batch["segmentation"]` `(b, h, w)` are checked.

        Raises:
            LatelierError: if there are no maps, or an id is not of a class.
        """
        self._check(needed(batch, "segmentation", "segmentation").long())
        return {}

    def forward(self, batch: Mapping[str, Any], drop: Bool[Tensor, " b"] | None = None) -> Condition:
        """The condition of `batch["segmentation"]` `(b, h, w)`; rows where `drop` is true get zeros."""
        ids = batch["segmentation"].to(self.device).long()  # (b, h, w)
        shares = class_shares(ids, self.config["classes"], self.config["latent_factor"]).to(self.dtype)  # (b, k, *grid)
        return Condition(spatial=blank(self.projection(shares), drop))

    def inputs(self, wanted: list[Any], size: tuple[int, int]) -> dict[str, Any]:
        """Label maps as a user gives them, resized to `size`, height and width, to `segmentation`.

        Args:
            wanted: `(h, w)` arrays or tensors of integers, PIL images whose pixels are ids (modes P, L, I), or PNG
                files of such.
            size: height and width of the images to draw.

        Raises:
            LatelierError: if one is something else, or an id is not of a class.
        """
        maps = [nearest(self._read(entry), (0.0, 0.0, 1.0, 1.0), size) for entry in wanted]
        ids = torch.from_numpy(np.stack(maps).astype(np.int64))  # (b, h, w)
        self._check(ids)
        return {"segmentation": ids}

    def _read(self, entry: Any) -> np.ndarray:
        """The ids of one map `(h, w)`."""
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
                f"{self.input_name}: label maps are (h, w) arrays of integers, not {' x '.join(map(str, entry.shape))} "
                f"of {entry.dtype}."
            )
        return entry

    def _check(self, ids: Int[Tensor, "b h w"]) -> None:
        low, high = (int(v) for v in ids.aminmax())
        if low < 0 or high >= self.config["classes"]:
            raise LatelierError(
                f"A label map has the id {low if low < 0 else high}, but ids go from 0 to "
                f"{self.config['classes'] - 1}; give unlabelled pixels an id of their own, or set the condition's "
                "`classes`."
            )


def class_shares(ids: Int[Tensor, "b h w"], classes: int, factor: int) -> Float[Tensor, "b k i j"]:
    """How much of each latent position's square every class covers.

    This is the one-hot map after bilinear halving, as often as it takes: each halving averages squares of 2 x 2 (LDM's
    SpatialRescaler), so that a power of two averages squares of factor x factor. Counting ids gives the same without
    one-hot maps of the image's size, and for any factor.

    Args:
        ids: `(b, h, w)`, 0 <= id < classes.
        classes: how many there are.
        factor: pixels along a square's side.

    Returns:
        `(b, classes, h / factor, w / factor)`, float32, which sum to 1 over classes.
    """
    rows, columns = grid_of((ids.shape[1], ids.shape[2]), factor)
    squares = ids.unflatten(1, (rows, factor)).unflatten(3, (columns, factor))  # (b, i, f, j, f)
    squares = squares.movedim(3, 2).flatten(3)  # (b, i, j, f f)
    counts = torch.zeros(*squares.shape[:3], classes, device=ids.device)  # (b, i, j, k)
    counts.scatter_add_(3, squares, torch.ones_like(squares, dtype=counts.dtype))
    return (counts / factor**2).movedim(3, 1)


def build_segmentation(section: SegmentationCondition, spec: DataSpec) -> SegmentationConditioner:
    """A conditioner for the data's label maps.

    Raises:
        LatelierError: if neither the recipe nor the data say how many classes there are, or the latents are no grid.
    """
    require_grid(spec, section.kind)
    classes = section.classes or spec.segmentation_classes
    if classes is None:
        raise LatelierError(
            "denoiser.condition = 'segmentation', but the data do not say how many classes their maps have; use data "
            "with label maps, and set the condition's `classes`."
        )
    return SegmentationConditioner(classes, section.channels, spec.factor)
