"""A generation metric that no network can blur: which objects do generated scenes show?

In the built-in `scenes` with single emoji as classes, every object is known to the pixel. A sprite of known class and
size is searched at every position. Its score is the share of the variance of the pixels in and around it that "this
sprite on a flat colour" explains,

    1 - (sum over the sprite |x - t|² + sum over its surrounding ring |x - mean of the ring|²) / sum |x - mean|²

which is 1 for the sprite itself and not defined where nothing is to be seen. The threshold is calibrated on held-out
originals: 99 % of their objects pass, and scrambled ones must not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from latelier.data.builtin import MAIN_SIZE, OPAQUE, OTHER_SIZE, SceneSource, list_emoji, sprite
from latelier.errors import NotMeasurable
from latelier.evaluation.results import Result, mean_with_interval

MOST_CLASSES = 64  # sprites of every class and size are searched in every image
STEP = 1.1  # from one size to the next
RING = 2  # pixels around a sprite
FLAT = 1e-3  # mean variance around a sprite, in [-1, 1], below which nothing is to be seen
OVERLAP = 0.2  # intersection over union from which two finds are the same object
MOST_OBJECTS = 6  # that are looked for in an image; scenes have one to three
PASS = 0.99  # share of real objects above the threshold
UNEXPLAINED = 0.2  # distance in [-1, 1] from the plain background's colour from which a pixel needs an object
CELLS = 3  # places are counted on a grid of so many cells a side
BATCH = 32


class Found(NamedTuple):
    """An object in an image: class, box x0 y0 x1 y1 in pixels, score."""

    label: int
    box: tuple[int, int, int, int]
    score: float


@dataclass
class Sprites:
    """Sprites of all classes of one size, centred on a square: masks, rings, and colours inside the mask."""

    mask: Float[Tensor, "k s s"]
    ring: Float[Tensor, "k s s"]
    colour: Float[Tensor, "k 3 s s"]  # in [-1, 1], 0 outside of the mask
    boxes: list[tuple[int, int, int, int]]  # of the opaque pixels in the square


class ObjectFinder:
    """Searches sprites of some classes at all sizes that scenes have.

    Args:
        classes: names of single emoji, at most 64.
        size: height and width of images in pixels.

    Raises:
        NotMeasurable: for categories of emoji, of which there are too many to look for.
    """

    def __init__(self, classes: Sequence[str], size: tuple[int, int]):
        emoji = {one.name: one for one in list_emoji()}
        wide = [name for name in classes if name not in emoji]
        if wide or len(classes) > MOST_CLASSES:
            what = f"{wide[0]!r} is a category" if wide else f"there are {len(classes)} classes"
            raise NotMeasurable(
                f"objects looks for single emoji, and {what}; name at most {MOST_CLASSES} in data.classes."
            )
        self.classes, self.size = list(classes), size
        low, high = (round(min(size) * share) for share in (OTHER_SIZE[0], MAIN_SIZE[1]))
        count = 1 + math.ceil(math.log(high / low) / math.log(STEP))
        sides = sorted({max(4, round(low * (high / low) ** (i / (count - 1)))) for i in range(count)})
        self.sprites = [_sprites([emoji[name] for name in classes], side) for side in sides]
        self.threshold = 0.5

    def find(self, images: Float[Tensor, "b 3 h w"]) -> list[list[Found]]:
        """The objects of each image, best first: those above the threshold that do not overlap."""
        candidates: list[list[Found]] = [[] for _ in images]
        for sprites in self.sprites:
            scores = _scores(images, sprites)  # (b, k, y, x)
            best, label = scores.max(1)  # (b, y, x)
            peaks = (best == F.max_pool2d(best[:, None], 5, 1, 2)[:, 0]) & (best > self.threshold)
            for row, y, x in peaks.nonzero().tolist():
                k = int(label[row, y, x])
                x0, y0, x1, y1 = sprites.boxes[k]
                shift = sprites.mask.shape[1] // 2
                box = (x0 + x - shift, y0 + y - shift, x1 + x - shift, y1 + y - shift)
                candidates[row].append(Found(k, box, float(best[row, y, x])))
        return [_distinct(rows) for rows in candidates]

    def find_all(self, images: Float[Tensor, "n 3 h w"]) -> list[list[Found]]:
        """The same, batch by batch."""
        return [rows for part in images.split(BATCH) for rows in self.find(part)]

    def calibrate(self, images: Float[Tensor, "n 3 h w"], objects: Sequence[Sequence[Found]]) -> dict[str, float]:
        """Set the threshold on originals whose objects are known; shares of real and of scrambled objects above it."""
        self.threshold = 0.0
        real = torch.tensor(
            [
                max(
                    (found.score for found in rows if found.label == known.label and _iou(found.box, known.box) > 0.5),
                    default=0.0,
                )
                for rows, those in zip(self.find_all(images), objects)
                for known in those
            ]
        )
        false = torch.tensor([max((f.score for f in rows), default=0.0) for rows in self.find_all(scramble(images))])
        self.threshold = float(real.quantile(1 - PASS))
        return {
            "threshold": self.threshold, "real_pass": float((real >= self.threshold).double().mean()),
            "scrambled_fail": float((false < self.threshold).double().mean()),
        }  # fmt: skip


@torch.no_grad()
def measure_objects(
    generated: Float[Tensor, "n 3 h w"], originals: SceneSource, training: Iterable[Sequence[Found]], count: int
) -> dict[str, Result]:
    """What generated scenes show, higher is better but for copies.

    `objects`: share of images with one to three objects and, on plain backgrounds, nothing else; `objects-counts`,
    `objects-classes`, `objects-places`: 1 - total variation between the distributions of generated and original images
    (how many objects, which, and where on a grid of 3 x 3); `objects-copies`: share of images whose objects are those
    of a training image, at the same places.

    Args:
        generated: images in [-1, 1].
        originals: held-out scenes of the same kind, of which `count` are looked at.
        training: the objects of training images, see `known_objects`.
        count: of originals.
    """
    finder = ObjectFinder(originals.class_names or [], originals.size)
    real = torch.stack([_image(originals[i]["image"]) for i in range(count)])  # (m, 3, h, w)
    known = [known_objects(originals, i) for i in range(count)]
    about: dict[str, Any] = {"n": len(generated), "n_reference": count, **finder.calibrate(real, known)}
    ours, theirs = finder.find_all(generated), finder.find_all(real)
    plain = originals.backgrounds == "plain"
    about["unexplained"] = limit = _quantile(unexplained(real, theirs)) if plain else None
    about["originals"] = float(_recognised(real, theirs, limit).mean())
    shown = _recognised(generated, ours, limit)
    seen = list(training)
    copies, about["copies_of_originals"] = _copies(ours, seen), float(_copies(theirs, seen).mean())
    alike = {"counts": _counts, "classes": _classes, "places": _places}
    found = {"objects": Result(*mean_with_interval(shown), about)}
    for name, histogram in alike.items():
        value = 1 - 0.5 * (histogram(ours, finder) - histogram(theirs, finder)).abs().sum()
        found[f"objects-{name}"] = Result(float(value), None, about)
    found["objects-copies"] = Result(*mean_with_interval(copies), about)
    return found


def known_objects(source: SceneSource, index: int) -> list[Found]:
    """The objects of a scene, as it was made."""
    return [Found(placed.label, placed.box, 1.0) for placed in source._scene(index)[1]]


def scramble(images: Float[Tensor, "n c h w"], tiles: int = 8) -> Float[Tensor, "n c h w"]:
    """Images whose tiles are shuffled: the colours of objects without their shapes."""
    n, c, h, w = images.shape
    side = max(2, min(h, w) // tiles)
    rows, columns = h // side, w // side
    x = images[:, :, : rows * side, : columns * side].unflatten(3, (columns, side)).unflatten(2, (rows, side))
    x = x.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # (n, tiles, c, side, side)
    order = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(0))
    x = x[:, order].unflatten(1, (rows, columns)).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(n, c, rows * side, columns * side)


def unexplained(images: Float[Tensor, "n 3 h w"], found: Sequence[Sequence[Found]]) -> Float[Tensor, " n"]:
    """Share of an image's pixels that are neither its plain background nor in the box of an object."""
    background = images.flatten(2).median(2).values[:, :, None, None]  # (n, 3, 1, 1)
    smooth = F.avg_pool2d(images - background, 3, 1, 1)  # (n, 3, h, w), so that noise is no object
    other = smooth.abs().amax(1) > UNEXPLAINED  # (n, h, w)
    for row, objects in zip(other, found):
        for x0, y0, x1, y1 in (one.box for one in objects):
            row[max(0, y0 - RING) : y1 + RING, max(0, x0 - RING) : x1 + RING] = False
    return other.double().mean((1, 2))


def _recognised(images: Tensor, found: Sequence[Sequence[Found]], limit: float | None) -> Float[Tensor, " n"]:
    few = torch.tensor([float(1 <= len(rows) <= 3) for rows in found], dtype=torch.float64)
    return few if limit is None else few * (unexplained(images, found) <= limit)


def _quantile(values: Tensor) -> float:
    return float(values.quantile(PASS))


def _counts(found: Sequence[Sequence[Found]], finder: ObjectFinder) -> Float[Tensor, " k"]:
    return _share([min(len(rows), MOST_OBJECTS) for rows in found], MOST_OBJECTS + 1)


def _classes(found: Sequence[Sequence[Found]], finder: ObjectFinder) -> Float[Tensor, " k"]:
    return _share([one.label for rows in found for one in rows], len(finder.classes))


def _places(found: Sequence[Sequence[Found]], finder: ObjectFinder) -> Float[Tensor, " k"]:
    height, width = finder.size
    cells = []
    for x0, y0, x1, y1 in (one.box for rows in found for one in rows):
        row, column = (y0 + y1) / 2 / height * CELLS, (x0 + x1) / 2 / width * CELLS
        cells.append(min(max(int(row), 0), CELLS - 1) * CELLS + min(max(int(column), 0), CELLS - 1))
    return _share(cells, CELLS**2)


def _share(values: list[int], bins: int) -> Float[Tensor, " k"]:
    counts = torch.bincount(torch.tensor(values, dtype=torch.long), minlength=bins).double()
    return counts / counts.sum().clamp(min=1)


def _copies(found: Sequence[Sequence[Found]], training: list[Sequence[Found]]) -> Float[Tensor, " n"]:
    """1 for images whose objects are, one to one, those of a training image at nearly the same place."""
    by_classes: dict[tuple[int, ...], list[Sequence[Found]]] = {}
    for objects in training:
        by_classes.setdefault(tuple(sorted(one.label for one in objects)), []).append(objects)

    def copied(rows: Sequence[Found]) -> bool:
        same = by_classes.get(tuple(sorted(one.label for one in rows)), [])
        return bool(rows) and any(
            all(any(_iou(a.box, b.box) > 0.85 and a.label == b.label for b in other) for a in rows) for other in same
        )

    return torch.tensor([float(copied(rows)) for rows in found], dtype=torch.float64)


def _sprites(emoji: Sequence[Any], side: int) -> Sprites:
    """All sprites of a size on squares with a ring's margin."""
    square = side + 2 * RING
    mask, colour = torch.zeros(len(emoji), square, square), torch.zeros(len(emoji), 3, square, square)
    boxes = []
    for k, one in enumerate(emoji):
        image = sprite(one, side)
        top, left = (square - image.height) // 2, (square - image.width) // 2
        pixels = torch.tensor(list(image.getdata()), dtype=torch.float32).view(image.height, image.width, 4)
        window = (slice(top, top + image.height), slice(left, left + image.width))
        mask[(k, *window)] = (pixels[..., 3] >= OPAQUE).float()
        colour[(k, slice(None), *window)] = (pixels[..., :3] / 127.5 - 1).permute(2, 0, 1) * mask[(k, *window)]
        boxes.append((left, top, left + image.width, top + image.height))
    ring = F.max_pool2d(mask[:, None], 2 * RING + 1, 1, RING)[:, 0] - mask
    return Sprites(mask, ring, colour, boxes)


def _scores(images: Float[Tensor, "b 3 h w"], sprites: Sprites) -> Float[Tensor, "b k h w"]:
    """The score of every sprite centred at every pixel."""
    b, _, h, w = images.shape
    pad = sprites.mask.shape[1] // 2
    x = F.pad(images, (pad,) * 4, mode="replicate")
    kernels = torch.cat([sprites.mask, sprites.ring])[:, None]  # (2k, 1, s, s)
    k = len(sprites.mask)

    def sums(y: Tensor) -> Tensor:
        return F.conv2d(y, kernels)[..., :h, :w]

    first = sums(x.flatten(0, 1)[:, None]).unflatten(0, (b, 3))  # (b, 3, 2k, h, w)
    second = sums(x.square().sum(1, keepdim=True))  # (b, 2k, h, w)
    cross = F.conv2d(x, sprites.colour)[..., :h, :w]  # (b, k, h, w): sum over mask and channels of x t
    inside, around = (part.sum((1, 2)).view(-1, 1, 1) for part in (sprites.mask, sprites.ring))  # (k, 1, 1)
    square = sprites.colour.square().sum((1, 2, 3)).view(-1, 1, 1)  # (k, 1, 1)
    of_sprite = second[:, :k] - 2 * cross + square  # (b, k, h, w)
    of_ring = second[:, k:] - first[:, :, k:].square().sum(1) / around
    total = first[:, :, :k] + first[:, :, k:]  # (b, 3, k, h, w)
    spread = second[:, :k] + second[:, k:] - total.square().sum(1) / (inside + around)
    return torch.where(spread > FLAT * 3 * (inside + around), 1 - (of_sprite + of_ring) / spread, -torch.inf)


def _distinct(found: list[Found]) -> list[Found]:
    """The best of those that overlap, at most `MOST_OBJECTS`."""
    kept: list[Found] = []
    for one in sorted(found, key=lambda f: -f.score):
        if len(kept) < MOST_OBJECTS and all(_iou(one.box, other.box) <= OVERLAP for other in kept):
            kept.append(one)
    return kept


def _iou(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """Intersection over union of two boxes."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inner = max(0, width) * max(0, height)
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return inner / (areas - inner) if areas > inner else 0.0


def _image(image: Any) -> Float[Tensor, "3 h w"]:
    """A PIL image in [-1, 1]."""
    pixels = torch.tensor(list(image.getdata()), dtype=torch.float32)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1) / 127.5 - 1
