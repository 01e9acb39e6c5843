"""Holes for inpainting: thick strokes and boxes, as LaMa draws them (Suvorov et al. 2022, section 2.3).

A mask is made either of strokes or of boxes. A stroke is a walk of a few segments that turns this way and that (Yu et
al. 2019, free-form masks). Lengths are meant for an image of a certain side and scale with the image.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image, ImageDraw
from torch import Tensor

from latelier.errors import LatelierError
from latelier.keyed_random import fold_in


@dataclass(frozen=True)
class MaskSetting:
    """How masks are drawn; ranges are inclusive, lengths are pixels of an image whose shorter side is `side`.

    Attributes:
        side: that lengths are meant for.
        box_share: probability that a mask is made of boxes.
        strokes: how many, if it is made of strokes.
        boxes: how many, if it is made of boxes.
        margin: that boxes keep from the image's edges.
        most: the largest share of the image that may be a hole.
        length, width, segments: of a stroke's segments.
        angle: of a segment's direction, at most, in radians.
        box_side: of a box.
    """

    side: int
    box_share: float
    strokes: tuple[int, int]
    boxes: tuple[int, int]
    margin: int
    most: float
    length: tuple[int, int] = (10, 200)
    width: tuple[int, int] = (5, 100)
    segments: tuple[int, int] = (1, 5)
    angle: float = 4.0
    box_side: tuple[int, int] = (30, 150)


# LaMa gives strokes : boxes as 1 : 1 and 1 : 0.3. Its evaluation sets leave out masks of more than half the image.
SETTINGS = {
    "train": MaskSetting(side=256, box_share=1 / 2, strokes=(1, 5), boxes=(1, 4), margin=10, most=1.0),
    "thick": MaskSetting(side=256, box_share=0.3 / 1.3, strokes=(1, 5), boxes=(1, 3), margin=10, most=0.5),
    "medium": MaskSetting(side=512, box_share=0.3 / 1.3, strokes=(4, 10), boxes=(1, 5), margin=0, most=0.5),
}


def draw_masks(
    setting: MaskSetting, size: tuple[int, int], seed: int, numbers: Int[Tensor, " b"]
) -> Float[Tensor, "b 1 h w"]:
    """One mask for each number of the stream, 1 in holes; row i depends on `(seed, numbers[i])` only.

    Args:
        setting: one of `SETTINGS`, or another.
        size: height and width in pixels.
        seed: the run's seed.
        numbers: `(b,)` stream numbers.
    """
    rows = [draw_mask(setting, size, np.random.default_rng(fold_in(seed, "mask", n))) for n in numbers.tolist()]
    return torch.from_numpy(np.array(rows, np.float32).reshape(-1, 1, *size))  # (b, 1, h, w)


def draw_mask(setting: MaskSetting, size: tuple[int, int], rng: np.random.Generator) -> Bool[np.ndarray, "h w"]:
    """A mask, true in holes; drawn again until it is neither empty, nor everything, nor more than `setting.most`.

    Args:
        setting: one of `SETTINGS`, or another.
        size: height and width in pixels.
        rng: where the random numbers come from.

    Raises:
        LatelierError: if the image is too small to be a part hole.
    """
    if size[0] * size[1] < 2:
        raise LatelierError(f"An image of {size[0]} x {size[1]} pixels has no room for a hole beside a rest.")
    scale = min(size) / setting.side
    while True:
        canvas = Image.new("1", (size[1], size[0]))
        if rng.random() < setting.box_share:
            _draw_boxes(canvas, setting, scale, rng)
        else:
            _draw_strokes(canvas, setting, scale, rng)
        mask = np.array(canvas)  # (h, w)
        if mask.any() and not mask.all() and mask.mean() <= setting.most:
            return mask


def _draw_strokes(canvas: Image.Image, setting: MaskSetting, scale: float, rng: np.random.Generator) -> None:
    """Walks with round joints; every other segment's angle is counted the other way round."""
    draw, edge = ImageDraw.Draw(canvas), np.array(canvas.size) - 1
    for _ in range(rng.integers(*setting.strokes, endpoint=True)):
        here = rng.uniform(0, edge)  # (2,) x, y
        for number in range(rng.integers(*setting.segments, endpoint=True)):
            angle = rng.uniform(0, setting.angle) * (-1) ** number
            length, width = rng.uniform(*setting.length) * scale, max(1, round(rng.uniform(*setting.width) * scale))
            there = (here + length * np.array([np.sin(angle), np.cos(angle)])).clip(0, edge)
            draw.line([*here, *there], fill=1, width=width)
            for x, y in (here, there):
                draw.ellipse([x - width / 2, y - width / 2, x + width / 2, y + width / 2], fill=1)
            here = there


def _draw_boxes(canvas: Image.Image, setting: MaskSetting, scale: float, rng: np.random.Generator) -> None:
    """Upright boxes, anywhere within the margin."""
    draw, margin = ImageDraw.Draw(canvas), round(setting.margin * scale)
    room = np.array(canvas.size) - 2 * margin
    for _ in range(rng.integers(*setting.boxes, endpoint=True)):
        sides = np.rint(rng.uniform(*setting.box_side, size=2) * scale).astype(int).clip(1, room)  # (2,)
        low = rng.integers(margin, margin + room - sides, endpoint=True)
        draw.rectangle([*low.tolist(), *(low + sides - 1).tolist()], fill=1)
