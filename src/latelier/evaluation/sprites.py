"""Finds known sprites in images, wherever they are and however large.

In the built-in `scenes` with single emoji as classes, every object is known to the pixel: a sprite with colours t and
opacity a, painted over something, x = a t + (1 - a) c. How well a sprite fits a place is the share of the variance of
the pixels x in and around it that the sprite over the best flat colour c explains,

    1 - min over c of sum |x - a t - (1 - a) c|² / sum |x - mean x|²

with sums over the sprite and a ring around it, whose pixels count half: 1 for a sprite on one colour. Large sprites are
sought in small images first, at every second size; the best places, with the sizes and pixels beside them, then in
twice as large ones, up to the full resolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image, ImageOps
from torch import Tensor

from latelier.data.builtin import MAIN_SIZE, OTHER_SIZE, Rectangle, list_emoji, sprite

STEP = 1.03
RING, AROUND = 2, 0.5  # pixels around a sprite, and what one of them counts, since backgrounds may vary
FLAT = 1e-3  # mean variance of pixels in [-1, 1] below which nothing is to be seen
LEAST = 0.2  # fit of a place that is looked at more closely
SMALLEST = 7  # pixels of the smallest sprites that are sought
PLACES = 16  # in an image that are looked at more closely
REACH = 2  # pixels to each side of them
OVERLAP = 0.25  # share of the smaller box from which two finds are the same object
BATCH = 16


class Found(NamedTuple):
    """An object in an image: class, box x0 y0 x1 y1 in pixels, fit."""

    label: int
    box: Rectangle
    fit: float = 1.0


class Sprites(NamedTuple):
    """Sprites of one size, centred in squares of even sides, as they look in an image that is smaller by a factor."""

    paint: Float[Tensor, "k 3 s s"]  # a t, in [-1, 1]
    bare: Float[Tensor, "k 1 s s"]  # 1 - a
    weight: Float[Tensor, "k 1 s s"]  # of pixels: 1 in the sprite, less in the ring, 0 elsewhere


class Places(NamedTuple):
    """Where sprites fit best, in pixels of the image that was searched; sizes and sprites by number."""

    fit: Float[Tensor, "b p"]
    size: Int[Tensor, "b p"]
    y: Int[Tensor, "b p"]
    x: Int[Tensor, "b p"]
    sprite: Int[Tensor, "b p"]


class SpriteFinder:
    """Seeks sprites of some classes at all sizes that scenes have.

    Args:
        classes: names of single emoji.
        size: height and width of images in pixels.
        mirrored: whether mirror images of the sprites are sought, too.
    """

    def __init__(self, classes: Sequence[str], size: tuple[int, int], mirrored: bool = False):
        emoji = {one.name: one for one in list_emoji()}
        self.classes, self.size = list(classes), size
        low, high = (max(4, round(min(size) * share)) for share in (OTHER_SIZE[0], MAIN_SIZE[1]))
        steps = math.ceil(math.log(high / low) / math.log(STEP))
        self.sizes = sorted({round(low * (high / low) ** (i / steps)) for i in range(steps + 1)})
        self.factors = [2 ** max(0, int(math.log2(side / SMALLEST))) for side in self.sizes]
        images = [[sprite(emoji[name], side) for name in classes] for side in self.sizes]
        if mirrored:
            images = [row + [ImageOps.mirror(image) for image in row] for row in images]
        self._shapes = torch.tensor([[image.size[::-1] for image in row] for row in images])  # (sizes, k, 2)
        self._sprites = {
            (number, 2**i): _draw(row, self.sizes[number], 2**i)
            for number, row in enumerate(images)
            for i in range(self.factors[number].bit_length())
        }

    @torch.no_grad()
    def find(self, images: Float[Tensor, "n 3 h w"]) -> list[list[Found]]:
        """The objects of images in [-1, 1], best fit first, doubtful ones too; none of an image overlap."""
        return [found for part in images.float().cpu().split(BATCH) for found in self._find(part)]

    def fits(self, images: Float[Tensor, "b 3 h w"], size: int, factor: int = 1) -> Float[Tensor, "b k h w"]:
        """How well the sprites of a size (by number) fit at each pixel of images that are smaller by a factor."""
        sprites = self._sprites[size, factor]
        padded = _pad(images, sprites.paint.shape[2] // 2)
        return _fits(padded, sprites)[:, :, : images.shape[2], : images.shape[3]]

    def found(self, places: Places) -> list[list[Found]]:
        """Objects at places in images of full resolution, without those that overlap better ones."""
        return [self._distinct(Places(*row)) for row in zip(*places)]

    def _find(self, images: Tensor) -> list[list[Found]]:
        places: Places | None = None
        for factor in (2**i for i in reversed(range(max(self.factors).bit_length()))):
            small = F.avg_pool2d(images, factor)  # (b, 3, i, j)
            better = [self._improve(small, factor, places)] if places else []
            sizes = [n for n, own in enumerate(self.factors) if own == factor][:: 2 if factor > 1 else 1]
            places = _best(better + ([self._search(small, factor, sizes)] if sizes else []))
            if factor > 1:
                places = places._replace(y=2 * places.y, x=2 * places.x)
        assert places is not None
        return self.found(places)

    def _search(self, images: Tensor, factor: int, sizes: Sequence[int]) -> Places:
        """The best places of some sizes: those where no place and size beside them is better."""
        fits, label = torch.stack([self.fits(images, n, factor) for n in sizes], 1).max(2)  # (b, n, h, w)
        peaks = fits.masked_fill(fits < F.max_pool3d(fits[:, None], 3, 1, 1)[:, 0], -math.inf)
        best, index = peaks.flatten(1).topk(PLACES)  # (b, p)
        h, w = images.shape[2:]
        size = torch.tensor(sizes)[index // (h * w)]
        return Places(best, size, index // w % h, index % w, label.flatten(1).gather(1, index))

    def _improve(self, images: Tensor, factor: int, places: Places) -> Places:
        """The best of the pixels and sizes beside each place."""
        h, w = images.shape[2:]
        margin = REACH + max(s.paint.shape[2] for (_, f), s in self._sprites.items() if f == factor) // 2
        padded, span = _pad(images, margin), 2 * REACH + 1
        better = Places(torch.full_like(places.fit, -math.inf), *(each.clone() for each in places[1:]))
        for number in range(len(self.sizes)):
            image, which = ((places.size - number).abs().le(2) & places.fit.gt(LEAST)).nonzero().T  # 2 x (m,)
            if not len(image):
                continue
            sprites = self._sprites[number, factor]
            y, x = (each[image, which].clamp(0, limit - 1) for each, limit in ((places.y, h), (places.x, w)))
            side = sprites.paint.shape[2]
            start = margin - side // 2 - REACH
            windows = padded.unfold(2, side + 2 * REACH, 1).unfold(3, side + 2 * REACH, 1)  # (b, 3, i, j, s, s)
            fits = _fits(windows[image, :, y + start, x + start], sprites).flatten(1)  # (m, k * span * span)
            fit, index = fits.max(1)
            found = (fit, torch.full_like(index, number), y + index // span % span - REACH, x + index % span - REACH)
            new = fit > better.fit[image, which]
            for old, value in zip(better, (*found, index // span**2)):
                old[image[new], which[new]] = value[new]
        return better

    def _distinct(self, places: Places) -> list[Found]:
        kept: list[Found] = []
        for n in places.fit.argsort(descending=True).tolist():
            fit, size, y, x, sprite = (each[n].item() for each in places)
            if fit < LEAST:
                break
            height, width = self._shapes[size, sprite].tolist()
            y0, x0 = y - (height + 1) // 2, x - (width + 1) // 2
            one = Found(sprite % len(self.classes), (x0, y0, x0 + width, y0 + height), fit)
            if all(shared(one.box, other.box) <= OVERLAP * min(area(one.box), area(other.box)) for other in kept):
                kept.append(one)
        return kept


def area(box: Rectangle) -> int:
    """Pixels in a box."""
    return (box[2] - box[0]) * (box[3] - box[1])


def shared(a: Rectangle, b: Rectangle) -> int:
    """Pixels in both of two boxes."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def iou(a: Rectangle, b: Rectangle) -> float:
    """Intersection over union of two boxes."""
    both = shared(a, b)
    return both / (area(a) + area(b) - both)


def _best(several: Sequence[Places]) -> Places:
    """The best places of all, at most `PLACES` in an image."""
    columns = [torch.cat(each, 1) for each in zip(*several)]  # each (b, q)
    order = columns[0].topk(min(PLACES, columns[0].shape[1])).indices  # (b, p)
    return Places(*(each.gather(1, order) for each in columns))


def _draw(images: Sequence[Image.Image], side: int, factor: int) -> Sprites:
    """Sprites of a size, as averages of `factor` x `factor` pixels."""
    square = math.ceil((side + 2 * RING) / (2 * factor)) * 2 * factor
    canvas = torch.zeros(len(images), 4, square, square)
    for one, image in zip(canvas, images):
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255  # (4, i, j)
        top, left = (square - image.height) // 2, (square - image.width) // 2
        window = one[:, top : top + image.height, left : left + image.width]
        window[:3], window[3:] = (pixels[:3] * 2 - 1) * pixels[3:], pixels[3:]
    small = F.avg_pool2d(canvas, factor)  # (k, 4, s, s)
    ring = max(1, RING // factor)
    inside = (small[:, 3:] >= 0.5).float()  # (k, 1, s, s)
    weight = torch.maximum(inside, AROUND * F.max_pool2d(inside, 2 * ring + 1, 1, ring))  # (k, 1, s, s)
    return Sprites(small[:, :3], 1 - small[:, 3:], weight)


def _pad(images: Float[Tensor, "b 3 h w"], margin: int) -> Float[Tensor, "b 3 i j"]:
    return F.pad(images, (margin,) * 4, mode="replicate")


def _fits(images: Float[Tensor, "b 3 i j"], sprites: Sprites) -> Float[Tensor, "b k h w"]:
    """How well the sprites fit to each square of the images, by convolutions; -inf where nothing is to be seen."""
    paint, bare, weight = sprites
    k = len(paint)
    sums = F.conv2d(images.flatten(0, 1)[:, None], torch.cat([weight, weight * bare]))  # (3b, 2k, h, w)
    total, around = sums.unflatten(0, (len(images), 3)).split(k, 2)  # (b, 3, k, h, w): sums of x and of (1 - a) x
    square = F.conv2d(images.square().sum(1, keepdim=True), weight)  # (b, k, h, w): sum of x²
    cross = F.conv2d(images, weight * paint)  # (b, k, h, w): sum of x a t
    count, free, own = (_total(weight * each)[:, None, None] for each in (torch.ones(1), bare.square(), paint.square()))
    both = (weight * paint * bare).sum((2, 3)).T[..., None, None]  # (3, k, 1, 1): sum of (1 - a) a t
    left = square - 2 * cross + own - (around - both).square().sum(1) / free  # with the best c
    spread = square - total.square().sum(1) / count
    return torch.where(spread > FLAT * 3 * count, 1 - left / spread, -math.inf)


def _total(x: Float[Tensor, "k c s s"]) -> Float[Tensor, " k"]:
    return x.sum((1, 2, 3))
