"""Layouts: boxes with classes as a sequence of tokens for a transformer (Rombach et al. 2022, after Esser et al. 2021).

An object is three tokens: its class (with flags such as "a group of"), its top-left and its bottom-right corner on a
grid. Two more tokens may say which part of the image is seen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from latelier.conditioning.condition import Condition, DataSpec, class_index
from latelier.conditioning.spatial import blank, grid_of, require_grid
from latelier.conditioning.text import TokenTransformer
from latelier.errors import LatelierError
from latelier.keyed_random import fold_in
from latelier.layers import sincos_positions
from latelier.sections import Section, Unit

# Bits of a box's flags that a class token carries: 1 group of, 2 occluded, 4 depiction, 8 inside.
FLAG_BITS = {"coco": 0b0001, "openimages": 0b1111}
WHOLE = (0.0, 0.0, 1.0, 1.0)


class LayoutCondition(Section):
    """Boxes with classes, as tokens, and as a map on the latents' grid if `layout_map_channels` is set."""

    kind: Literal["layout"]
    form: Literal["coco", "openimages"] = Field("coco", description="which flags of a box its class token may carry")
    objects: int = Field(30, ge=1, description="the most that an image may have; the smallest beyond it are left out")
    crop: bool = Field(True, description="whether two more tokens say which part of the image is seen")
    tokens: int = Field(8192, ge=16, description="size of the vocabulary; its root is the grid of corners")
    dim: int = Field(512, ge=1)
    layers: int = Field(16, ge=1)
    heads: int = Field(8, ge=1)
    head_dim: int = Field(64, ge=1)
    layout_map_channels: int = Field(0, ge=0, description="channels of a map of the boxes beside the tokens; 0: none")
    dropout: Unit = Field(0.1, description="share of images whose layout is empty")


def layout_tokens(
    boxes: Float[Tensor, "n 4"], labels: Int[Tensor, " n"], flags: Int[Tensor, " n"] | None, n_classes: int,
    form: str = "openimages", tokens: int = 8192, objects: int = 30, with_crop: bool = True,
    crop: Sequence[float] = WHOLE, flip: bool = False, order: Sequence[int] | None = None,
) -> Int[Tensor, " m"]:  # fmt: skip
    """The `3 * objects` tokens of one image's layout, and two more for the crop.

    Objects outside of the crop are left out. When there are more than `objects`, the largest stay; the original leaves
    such images out of the training set.

    Args:
        boxes: x0 y0 x1 y1 relative to the whole image.
        labels, flags: classes in [0, n_classes), and bits of `FLAG_BITS`; a class token is class + n_classes * flags.
        tokens: size of the vocabulary; the last one stands for nothing.
        with_crop: boxes are relative to the whole image, and two more tokens give the crop; else relative to the crop.
        crop: x0 y0 x1 y1 of the part that is seen.
        flip: whether the image is mirrored, after it was cropped.
        order: permutation of the boxes; by default they keep their order.
    """
    boxes, frame = boxes.double(), torch.tensor(crop, dtype=torch.float64)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)  # (n,)
    seen = (torch.minimum(boxes[:, 2:], frame[2:]) > torch.maximum(boxes[:, :2], frame[:2])).all(dim=1)  # (n,)
    kept = [i for i in (range(len(boxes)) if order is None else order) if seen[i]]
    largest = set(sorted(kept, key=lambda i: -area[i])[:objects])
    kept = [i for i in kept if i in largest]
    boxes = boxes[kept]  # (k, 4)
    if not with_crop:
        boxes = _within(boxes, frame)
    kinds = labels[kept]
    if flags is not None:
        kinds = kinds + n_classes * (flags[kept] & FLAG_BITS[form])
    triples = torch.cat([kinds[:, None], _corners(boxes, tokens, flip)], dim=1)  # (k, 3)
    out = torch.full((3 * objects + 2 * with_crop,), tokens - 1)
    out[: triples.numel()] = triples.flatten()
    if with_crop:
        out[-2:] = _corners(frame[None], tokens, flip)[0]
    return out


def _corners(boxes: Float[Tensor, "n 4"], tokens: int, flip: bool) -> Int[Tensor, "n 2"]:
    """Tokens of the top-left and the bottom-right corner on a `side` x `side` grid: row * side + column."""
    side = grid_side(tokens)
    x0, y0, x1, y1 = boxes.clamp(0, 1).unbind(dim=1)
    if flip:
        x0, x1 = 1 - x1, 1 - x0
    corners = torch.stack([torch.stack([x0, x1], dim=1), torch.stack([y0, y1], dim=1)])  # (2, n, 2)
    column, row = (corners * (side - 1)).round().long()  # halves to the even number, as the original
    return row * side + column


def _within(boxes: Float[Tensor, "n 4"], frame: Float[Tensor, " 4"]) -> Float[Tensor, "n 4"]:
    """Boxes relative to a crop. A corner before the crop's is moved to it but the size stays, as in the original."""
    size = frame[2:] - frame[:2]  # (2,)
    corner = ((boxes[:, :2] - frame[:2]) / size).clamp(0, 1)  # (n, 2)
    return torch.cat([corner, corner + (boxes[:, 2:] - boxes[:, :2]) / size], dim=1)


def grid_side(tokens: int) -> int:
    """Side of the grid of corners: 90 of 8192 tokens, of which the last stands for nothing."""
    return math.isqrt(tokens - 1)


class LayoutConditioner(ModelMixin, ConfigMixin):
    """Tokens of layouts through a `TokenTransformer`; no padding is masked.

    Args:
        names: of the classes of boxes, index = label.
        form, objects, crop, tokens: see `layout_tokens`.
        seed: of the order of objects, which is another one each time an image is seen.
        layout_map_channels: of a map of the boxes on the latents' grid, concatenated to `x_t`; 0 is the paper's, tokens
            alone. With the map, the model need not learn which positions a box means, which takes long.
        latent_factor: pixels along a side of a latent position, of the map.
    """

    input_name = "layouts"
    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self, names: list[str], form: str = "coco", objects: int = 30, crop: bool = True, tokens: int = 8192,
        dim: int = 512, layers: int = 16, heads: int = 8, head_dim: int = 64, seed: int = 0,
        layout_map_channels: int = 0, latent_factor: int = 1,
    ):  # fmt: skip
        super().__init__()
        self.token_width, self.spatial_channels = dim, layout_map_channels
        kinds = len(names) * (FLAG_BITS[form] + 1)
        if kinds >= tokens:
            raise LatelierError(
                f"condition.tokens = {tokens} has no room for {len(names)} classes in form {form}; set it over {kinds}."
            )
        self.length = 3 * objects + 2 * crop
        self.transformer = TokenTransformer(tokens, self.length, dim, layers, heads, head_dim)
        self._init_tables(kinds)
        self.map_proj = nn.Conv2d(len(names), layout_map_channels, 1, bias=False) if layout_map_channels else None

    def _init_tables(self, kinds: int) -> None:
        """Corners begin as the sinusoids of their positions, so that neighbours are alike from the start.

        Classes, nothing, and positions in the sequence begin as large as those: only the position says what a token is
        (class, first or second corner, of which object), which is lost if it is small.
        """
        side, tokens = grid_side(self.config["tokens"]), self.transformer.token_embed.weight  # (tokens, d)
        with torch.no_grad():
            if tokens.shape[1] % 4 == 0:
                tokens[: side * side].copy_(sincos_positions(tokens.shape[1], (side, side))[0])
            for table in (tokens[:kinds], tokens[-1:], self.transformer.pos_embed.weight):
                nn.init.normal_(table, std=0.5**0.5)  # the standard deviation of sinusoids

    def inputs(self, wanted: list[Any], size: tuple[int, int]) -> dict[str, list[Tensor]]:
        """Layouts, one for each image of `size` (height, width), as record entries.

        A layout is a list of `(class, x0, y0, x1, y1)` or `{"class": ..., "box": [x0, y0, x1, y1], "flags": bits}`,
        the class by name or index, the box relative to the image; or a text or JSON file of them, see `read_layout`.
        """
        entries: dict[str, list[Tensor]] = {"boxes": [], "box_labels": [], "box_flags": [], "layout_size": []}
        for layout in wanted:
            layout = read_layout(layout) if isinstance(layout, str) else layout
            if not isinstance(layout, Sequence):
                raise LatelierError(f"layouts has {layout!r}; give a list of objects (class, x0, y0, x1, y1) for each.")
            if len(layout) > (most := self.config["objects"]):
                raise LatelierError(f"A layout has {len(layout)} objects, but this model reads {most} at most.")
            objects = [self._object(item) for item in layout]
            entries["boxes"].append(torch.tensor([box for _, box, _ in objects]).view(-1, 4))  # (n, 4)
            entries["box_labels"].append(torch.tensor([label for label, _, _ in objects], dtype=torch.int64))
            entries["box_flags"].append(torch.tensor([flags for _, _, flags in objects], dtype=torch.int64))
            entries["layout_size"].append(torch.tensor(size))
        return entries

    def _object(self, item: Any) -> tuple[int, list[float], int]:
        """Class, box and flags of one object."""
        try:
            if isinstance(item, Mapping):
                kind, sides, flags = item["class"], item["box"], int(item.get("flags", 0))
            else:
                (kind, *sides), flags = item, 0
            box = x0, y0, x1, y1 = [float(side) for side in sides]
        except (KeyError, TypeError, ValueError):
            raise LatelierError(
                f"layouts has the object {item!r}; give (class, x0, y0, x1, y1) or {{'class': ..., 'box': [...]}}."
            ) from None
        if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
            raise LatelierError(f"The box {box} of {kind!r} is not x0 < x1, y0 < y1 within [0, 1].")
        allowed = FLAG_BITS[self.config["form"]]
        if not 0 <= flags <= allowed:
            raise LatelierError(f"flags = {flags} of {kind!r} is not within 0..{allowed}.")
        names = self.config["names"]
        return class_index(kind, names, len(names), "class of boxes"), box, flags

    @torch.no_grad()
    def prepare(self, batch: Mapping[str, Any], codec: Any = None) -> dict[str, Tensor]:
        """`layout_tokens (b, n)` int64 of a batch's boxes and, if there is a map, `layout_map (b, classes, *grid)`.

        Boxes are relative to what is seen. That is the whole image, unless the batch has `crop`, `(b, 4)` x0 y0 x1 y1
        in the image it was cut from. Objects are shuffled, keyed by `batch["sample_id"]` if there is one.
        """
        rows = [self._row(batch, i) for i in range(len(batch["boxes"]))]
        entries = {"layout_tokens": torch.stack(rows).to(self.device)}  # (b, n)
        if self.map_proj is not None:
            size = batch["image"].shape[2:] if "image" in batch else batch["layout_size"][0].tolist()
            grid = grid_of((size[0], size[1]), self.config["latent_factor"])
            kinds = len(self.config["names"])
            maps = [draw_layout_map(b, k, kinds, grid) for b, k in zip(batch["boxes"], batch["box_labels"])]
            entries["layout_map"] = torch.stack(maps).to(self.device)  # (b, k, *grid)
        return entries

    def _row(self, batch: Mapping[str, Any], i: int) -> Int[Tensor, " m"]:
        boxes, labels = batch["boxes"][i].cpu().double(), batch["box_labels"][i].cpu()  # (n, 4), (n,)
        order, crop = None, WHOLE
        if "sample_id" in batch:
            seed = fold_in(self.config["seed"], "order of objects", int(batch["sample_id"][i]))
            order = torch.randperm(len(boxes), generator=torch.Generator().manual_seed(seed)).tolist()
        if "crop" in batch and self.config["crop"]:
            corner, end = batch["crop"][i].cpu().double().split(2)  # (2,), (2,)
            boxes = corner.repeat(2) + boxes * (end - corner).repeat(2)  # (n, 4), in the whole image
            crop = (*corner.tolist(), *end.tolist())
        flags = batch["box_flags"][i].cpu() if "box_flags" in batch else None
        names, form, tokens, objects, seen = (self.config[k] for k in ("names", "form", "tokens", "objects", "crop"))
        return layout_tokens(boxes, labels, flags, len(names), form, tokens, objects, seen, crop, order=order)

    def forward(self, batch: Mapping[str, Any], drop: Bool[Tensor, " b"] | None = None) -> Condition:
        """Tokens `(b, n, d)`, and the map if there is one; rows where `drop` is true get those of no layout at all."""
        tokens = batch["layout_tokens"].to(self.device)  # (b, n)
        if drop is not None:
            tokens = tokens.masked_fill(drop.to(tokens.device)[:, None], self.config["tokens"] - 1)
        spatial = None
        if self.map_proj is not None:
            spatial = blank(self.map_proj(batch["layout_map"].to(self.map_proj.weight)), drop)  # (b, c, *grid)
        return Condition(tokens=self.transformer(tokens), spatial=spatial)


def draw_layout_map(
    boxes: Float[Tensor, "n 4"], labels: Int[Tensor, " n"], kinds: int, grid: tuple[int, int]
) -> Float[Tensor, "k h w"]:
    """How much of each position's square the boxes of every class cover; where several do, the one that covers most.

    Boxes are x0 y0 x1 y1 relative to what is seen, labels in [0, kinds), `grid` is height and width of the latents.
    """
    height, width = grid
    x0, y0, x1, y1 = (side[:, None] for side in boxes.float().cpu().unbind(dim=1))  # (n, 1)

    def share(low: Tensor, high: Tensor, count: int) -> Tensor:
        begin = torch.arange(count)  # of each square
        return (torch.minimum(high * count, begin + 1) - torch.maximum(low * count, begin)).clamp(0, 1)  # (n, count)

    covered = share(y0, y1, height)[:, :, None] * share(x0, x1, width)[:, None]  # (n, h, w)
    found = torch.zeros(kinds, height, width)
    for label, part in zip(labels.tolist(), covered):
        found[label] = torch.maximum(found[label], part)
    return found


def read_layout(text: str) -> list[Any]:
    """Objects from a JSON file, or from words: `owl 0.1 0.2 0.5 0.9; red apple 0.6 0.5 0.9 0.8`."""
    if text.endswith(".json"):
        try:
            return json.loads(Path(text).read_text())
        except (OSError, ValueError) as error:
            raise LatelierError(f"The layout {text} cannot be read ({error}).") from None
    objects = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        try:
            *name, x0, y0, x1, y1 = part.split()
            objects.append((" ".join(name), *map(float, (x0, y0, x1, y1))))
        except ValueError:
            raise LatelierError(f"Layout {part!r} is not a class and four numbers, such as 'owl 0 0 0.5 1'.") from None
    return objects


def build(section: LayoutCondition, spec: DataSpec) -> LayoutConditioner:
    """The conditioner of a recipe's section; an error if the data have no boxes, or too many classes."""
    if spec.box_names is None:
        raise LatelierError(
            "denoiser.condition is layout, but the data have no boxes; give them by data.boxes or a column `objects`."
        )
    if section.layout_map_channels:
        require_grid(spec, section.kind)
    settings = section.model_dump(exclude={"kind", "dropout"})
    return LayoutConditioner(names=list(spec.box_names), seed=spec.seed, latent_factor=spec.factor, **settings)


SECTIONS = (LayoutCondition,)
