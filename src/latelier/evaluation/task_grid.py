"""What was asked above what was drawn above what there was, image by image, for looking at."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from PIL import Image, ImageDraw
from torch import Tensor

from latelier.conditioning.condition import components
from latelier.errors import LatelierError
from latelier.evaluation.regions import Region, box_regions
from latelier.evaluation.tasks import draw_records
from latelier.images import make_grid
from latelier.recipe import Sample

COLUMNS = 8
LEAST_WIDTH = 160  # of an image in the grid; smaller ones are enlarged, so that words fit in
GOLDEN = 0.618034  # of a turn of hue from one class to the next: neighbours differ, none comes again
BACKGROUND = 235


class TaskGrid(NamedTuple):
    """An image to look at, and what its columns were drawn from where that is words.

    Attributes:
        image: the grid.
        captions: one for each column; empty for models that are told no captions.
    """

    image: Image.Image
    captions: list[str]


def task_grid(pipeline: Any, records: Iterable[Mapping[str, Any]], sample: Sample, seed: int = 0) -> TaskGrid:
    """Draw the first records: a column for each, with a row for each thing that can be seen of what was asked.

    Those are the small image, enlarged; the image with grey holes; boxes and their classes; the label map; the map.

    Args:
        pipeline: a `LatentDiffusionPipeline`.
        records: batches of records; the first `COLUMNS` images are drawn.
        sample: how images are drawn; image i from seed `sample.seed + i`.
        seed: of the holes, `evaluate.seed`.

    Raises:
        LatelierError: if there are no records.
    """
    known = components(pipeline.conditioner)
    rows: dict[str, list[Tensor]] = {}
    captions: list[str] = []
    for batch, drawn in draw_records(pipeline, records, sample, COLUMNS, seed):
        size = (drawn.shape[2], drawn.shape[3])
        zoom = -(-LEAST_WIDTH // size[1])
        large = (size[0] * zoom, size[1] * zoom)
        asked = {name: _asked(name, part, batch, large) for name, part in known.items()}
        shown = {name: tiles for name, tiles in asked.items() if tiles is not None}
        for name, tiles in {**shown, "drawn": drawn, "original": batch["image"]}.items():
            rows.setdefault(name, []).append(_fit(_rgb(tiles.cpu().float()), large))
        captions += batch["caption"] if "prompts" in known and "caption" in batch else []
    if not rows:
        raise LatelierError("There are no records to draw and show.")
    whole = [torch.cat(tiles) for tiles in rows.values()]  # each (n, 3, H, W)
    return TaskGrid(make_grid(torch.cat(whole), columns=len(whole[0])), captions)


def _asked(name: str, part: Any, batch: Mapping[str, Any], size: tuple[int, int]) -> Float[Tensor, "b c h w"] | None:
    """Images of what was asked; None for classes and captions."""
    if name == "low_resolution":
        return batch["low"]
    if name == "inpainting":
        return torch.where(batch["hole"] > 0.5, 0.0, batch["image"].cpu().float())
    if name == "layouts":
        names = part.config.get("names")
        regions = [box_regions(boxes, labels, size) for boxes, labels in zip(batch["boxes"], batch["box_labels"])]
        return torch.stack([draw_boxes(one, size, names) for one in regions])
    if name == "segmentations":
        return colour_map(batch["segmentation"])
    return batch["map"] if name == "maps" else None


def draw_boxes(regions: Sequence[Region], size: tuple[int, int], names: list[str] | None) -> Float[Tensor, "3 h w"]:
    """Rectangles in their classes' colours, with the classes' names or numbers, in [-1, 1].

    Args:
        regions: boxes in pixels.
        size: height and width.
        names: of the classes.
    """
    canvas = Image.new("RGB", (size[1], size[0]), (BACKGROUND,) * 3)
    draw = ImageDraw.Draw(canvas)
    for label, (x0, y0, x1, y1) in regions:
        draw.rectangle([x0, y0, x1 - 1, y1 - 1], outline=colour(label), width=2)
    for label, (x0, y0, *_) in regions:  # words on top of all lines
        words = str(names[label]) if names and label < len(names) else str(label)
        left = max(0, min(x0 + 4, size[1] - math.ceil(draw.textlength(words))))  # whole words at the right edge too
        draw.rectangle(draw.textbbox((left, y0 + 2), words), fill=(BACKGROUND,) * 3)
        draw.text((left, y0 + 2), words, fill=colour(label))
    pixels = torch.from_numpy(np.array(canvas)).movedim(-1, 0)  # (3, h, w)
    return pixels.float() / 127.5 - 1


def colour_map(ids: Integer[Tensor, "b h w"]) -> Float[Tensor, "b 3 h w"]:
    """Label maps in the classes' colours, in [-1, 1]; 0, the background, is light grey."""
    count = int(ids.max()) + 1
    palette = torch.tensor([(BACKGROUND,) * 3, *(colour(i) for i in range(1, count))])  # (k, 3)
    return palette[ids.cpu().long()].movedim(-1, 1).float() / 127.5 - 1


def colour(label: int) -> tuple[int, int, int]:
    """A class's colour, always the same; dark enough for words on a light background."""
    red, green, blue = colorsys.hsv_to_rgb(label * GOLDEN % 1, 0.9, 0.75)
    return round(255 * red), round(255 * green), round(255 * blue)


def _rgb(images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 h w"]:
    """Three channels to look at; one or two are shown as grey (the first)."""
    return images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)


def _fit(images: Float[Tensor, "b c i j"], size: tuple[int, int]) -> Float[Tensor, "b c h w"]:
    """Enlarged with square pixels, so that each can be seen."""
    return F.interpolate(images, size=size, mode="nearest-exact")
