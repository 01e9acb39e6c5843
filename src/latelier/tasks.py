"""Picture in, picture out: enlarging and filling holes, for any size, with a pipeline that was trained for it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from latelier.conditioning import parts
from latelier.conditioning.inpainting import read_hole
from latelier.conditioning.spatial import read_picture
from latelier.errors import LatelierError
from latelier.pipeline import LatentDiffusionPipeline


def upscale(pipeline: LatentDiffusionPipeline, image: Any, **settings: Any) -> Float[Tensor, "c h w"]:
    """Enlarge a picture of any size by the factor that the model was trained for.

    Pictures whose sides do not fit the networks are continued at the right and at the bottom, and cut back.

    Args:
        pipeline: trained with `condition: low-resolution`.
        image: a PIL picture, a file, or a tensor `(c, h, w)` in [-1, 1].
        settings: of the pipeline's call: `steps`, `seed`, ...

    Returns:
        The picture in [-1, 1], `(c, factor h, factor w)`.

    Raises:
        LatelierError: if the model was not trained to enlarge, or the picture cannot be read.
    """
    part = _part(pipeline, "low_resolution", "enlarge pictures")
    factor = part.config["factor"]
    picture = read_picture(image, pipeline.codec.image_channels, "image")
    height, width = picture.shape[1:]
    small = _continued(picture, multiple(pipeline) // math.gcd(multiple(pipeline), factor))  # (c, h', w')
    size = {"height": small.shape[1] * factor, "width": small.shape[2] * factor}
    large = pipeline(low_resolution=[small], output_type="pt", **size, **settings).images[0]
    return large[:, : height * factor, : width * factor]


def inpaint(pipeline: LatentDiffusionPipeline, image: Any, mask: Any, **settings: Any) -> Float[Tensor, "c h w"]:
    """Fill the holes of a picture of any size; everything outside of them comes back untouched.

    Args:
        pipeline: trained with `condition: inpainting`.
        image: a PIL picture, a file, or a tensor `(c, h, w)` in [-1, 1].
        mask: a PIL picture, a file, or a tensor `(h, w)`, bright where the holes are.
        settings: of the pipeline's call: `steps`, `seed`, ...

    Raises:
        LatelierError: if the model was not trained to inpaint, a file cannot be read, or the mask has another size or
            no hole.
    """
    _part(pipeline, "inpainting", "fill holes")
    picture, hole = read_picture(image, pipeline.codec.image_channels, "image"), read_hole(mask, "mask")
    height, width = picture.shape[1:]
    if hole.shape != (height, width):
        raise LatelierError(
            f"The mask is {hole.shape[0]} x {hole.shape[1]} (height x width), but the picture {height} x {width}; "
            "make them equal."
        )
    if not hole.any():
        raise LatelierError("The mask has no hole; paint in white what is to be filled.")
    whole = _continued(picture, multiple(pipeline))  # (c, h', w')
    holes = F.pad(hole, (0, whole.shape[2] - width, 0, whole.shape[1] - height))  # (h', w')
    size = {"height": whole.shape[1], "width": whole.shape[2]}
    drawn = pipeline(inpainting=[(whole, holes)], output_type="pt", **size, **settings).images[0]
    return drawn[:, :height, :width]


def multiple(pipeline: LatentDiffusionPipeline) -> int:
    """What the sides of pictures must be divisible by, for the tokenizer and the denoiser."""
    config = pipeline.denoiser.config
    levels = config.get("block_out_channels")
    inner = 2 ** (len(levels) - 1) if levels else config.get("patch_size", 1)
    return pipeline.codec.factor * inner


def read_layout(text: str) -> list[Any]:
    """Boxes from a JSON file, or from words: `owl 0.1 0.2 0.5 0.9; red apple 0.6 0.5 0.9 0.8`.

    Raises:
        LatelierError: for a part that is not a class and four numbers.
    """
    if text.endswith(".json"):
        try:
            return json.loads(Path(text).read_text())
        except (OSError, ValueError) as error:
            raise LatelierError(f"The layout {text} cannot be read ({error}).") from None
    boxes = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        *name, x0, y0, x1, y1 = ["", "", "", "", *part.split()]
        try:
            boxes.append((" ".join(filter(None, name)), *map(float, (x0, y0, x1, y1))))
        except ValueError:
            raise LatelierError(f"Layout {part!r} is not a class and four numbers, such as 'owl 0 0 0.5 1'.") from None
    return boxes


def _part(pipeline: LatentDiffusionPipeline, name: str, does: str) -> Any:
    known = parts(pipeline.conditioner)
    if name not in known:
        told = " and ".join(known) or "nothing"
        raise LatelierError(f"This model was not trained to {does}: it is told {told}, not {name}.")
    return known[name]


def _continued(image: Float[Tensor, "c h w"], step: int) -> Float[Tensor, "c k l"]:
    """The picture with its last row and column repeated until `step` divides both sides."""
    down, right = (-side % step for side in image.shape[1:])
    return F.pad(image[None], (0, right, 0, down), mode="replicate")[0]
