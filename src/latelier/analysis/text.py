"""Fine detail that everyone can judge: which letters are still readable after a tokenizer has had them?

After TokBench (2025, arXiv 2505.18142), where errors of small text tell tokenizers apart that FID and PSNR do not.
There an OCR network reads photographs; here capital letters and digits are rendered on plain backgrounds, and each is
read as the template that its pixels correlate with most. Nothing is learnt, and nothing of the data is used.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from latelier.analysis.sample import PIXELS, LatentSample
from latelier.errors import NotMeasurable
from latelier.evaluation.results import Result, mean_with_interval
from latelier.images import round_to_8_bit
from latelier.keyed_random import KeyedRandom
from latelier.tokenizers.codec import Codec

ALPHABET = string.ascii_uppercase + string.digits
HEIGHTS = (6, 8, 12, 16, 24, 32)  # of capital letters, in pixels
LEAST_ACROSS = 2  # glyphs along an image's shorter side: below, a size is left out
ROUNDS = 4  # times that each glyph is shown at a height
INKS = ((-1.0, 1.0), (1.0, -1.0), (-0.5, 0.5), (0.8, 0.2))  # paper and ink of each round
READER = "normalised correlation with templates, of either sign"


@dataclass(frozen=True)
class Sheet:
    """Glyphs of one size in the cells of images."""

    templates: Float[Tensor, "a k l"]  # ink in 0 to 1, of each letter of the alphabet
    images: Float[Tensor, "n h w"]  # in [-1, 1]
    places: Int[Tensor, "g 3"]  # image, upper and left edge of each glyph's cell
    glyphs: Int[Tensor, " g"]  # which one it is

    def read(self, images: Float[Tensor, "n h w"]) -> Int[Tensor, " g"]:
        """For each cell the glyph of the largest normalised correlation, of either sign: ink may be dark or light."""
        height, width = self.templates.shape[1:]
        cells = torch.stack([images[n, y : y + height, x : x + width] for n, y, x in self.places.tolist()])  # (g, k, l)
        return (_unit(cells) @ _unit(self.templates).T).abs().argmax(1)


@torch.no_grad()
def readable_text(sample: LatentSample, codec: Codec) -> dict[str, Result]:
    """`text@<height>`: the share of glyphs of this height in pixels that are read correctly from decoded images of the
    sample's size, and `text`, their mean over heights; higher is better, chance is 1 / 36.

    Details have `originals`, the share that is read from the images themselves. An error for images so small that not
    even the smallest glyphs fit.
    """
    codec, size = sample.scaled(codec), sample.image_size
    about: dict[str, Any] = {"reference": "rendered letters and digits", "data": "built in", "reader": READER}
    about |= {"alphabet": ALPHABET, "chance": 1 / len(ALPHABET)}
    found, means = {}, list[tuple[int, float, float]]()
    for height in HEIGHTS:
        sheet = draw_sheet(height, size)
        if sheet is None:
            continue
        right = (sheet.read(decode(codec, sheet.images)) == sheet.glyphs).float()  # (g,)
        original = (sheet.read(round_to_8_bit(sheet.images)) == sheet.glyphs).float().mean().item()
        means.append((height, right.mean().item(), original))
        details = {**about, "n": len(right), "images": len(sheet.images), "height": height, "originals": original}
        found[f"text@{height}"] = Result(*mean_with_interval(right), details)
    if not found:
        raise NotMeasurable(f"text needs images in which glyphs of {HEIGHTS[0]} pixels fit, not {size[0]} x {size[1]}.")
    _, shares, originals = zip(*means)
    n = sum(result.details["n"] for result in found.values())
    details = {**about, "n": n, "heights": [m[0] for m in means], "originals": sum(originals) / len(means)}
    return {"text": Result(sum(shares) / len(means), None, details), **found}


def draw_sheet(height: int, size: tuple[int, int]) -> Sheet | None:
    """Every glyph `ROUNDS` times, in a random order that depends on nothing else, in as few images as hold them; None
    where fewer than two fit along a side.
    """
    templates = render(height)  # (a, k, l)
    down, across = size[0] // templates.shape[1], size[1] // templates.shape[2]
    if min(down, across) < LEAST_ACROSS:
        return None
    order = KeyedRandom(0, torch.arange(ROUNDS)).uniform(f"text {height}", len(ALPHABET)).argsort(1)  # (r, a)
    pages, places = list[Tensor](), list[list[int]]()
    for (paper, ink), glyphs in zip(INKS, order):
        for chosen in glyphs.split(down * across):
            page = torch.full(size, paper)
            for number, glyph in enumerate(chosen.tolist()):
                y, x = (step * side for step, side in zip(divmod(number, across), templates.shape[1:]))
                page[y : y + templates.shape[1], x : x + templates.shape[2]] += (ink - paper) * templates[glyph]
                places.append([len(pages), y, x])
            pages.append(page)
    return Sheet(templates, torch.stack(pages), torch.tensor(places), order.flatten())


def render(height: int) -> Float[Tensor, "a k l"]:
    """Ink of every glyph, in the middle of a cell with a margin of a quarter of the height to the next one."""
    font = _font(height)
    boxes = [[int(edge) for edge in font.getbbox(glyph)] for glyph in ALPHABET]
    margin = -(-height // 8)
    width, top = max(box[2] - box[0] for box in boxes) + 2 * margin, min(box[1] for box in boxes)
    cells = []
    for glyph, (left, _, right, _) in zip(ALPHABET, boxes):
        cell = Image.new("L", (width, max(box[3] for box in boxes) - top + 2 * margin))
        ImageDraw.Draw(cell).text(((width - right - left) // 2, margin - top), glyph, fill=255, font=font)
        cells.append(torch.from_numpy(np.array(cell)).float() / 255)
    return torch.stack(cells)


def _font(height: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, as large as makes an H this high."""
    fonts = (ImageFont.load_default(size) for size in range(height, 3 * height))
    return next(font for font in fonts if (box := font.getbbox("H"))[3] - box[1] >= height)


def decode(codec: Codec, pages: Float[Tensor, "n h w"]) -> Float[Tensor, "n h w"]:
    """Grey images through the tokenizer, in all of its channels."""
    found = []
    for part in pages.split(max(1, PIXELS // pages[0].numel())):
        images = part[:, None].expand(-1, codec.image_channels, -1, -1).to(codec.device)
        decoded = codec.decode(codec.encode(images.contiguous())).clamp(-1, 1)
        found.append(round_to_8_bit(decoded).float().mean(1).cpu())
    return torch.cat(found)


def _unit(x: Float[Tensor, "m k l"]) -> Float[Tensor, "m d"]:
    """Centred and of length 1; 0 where there is no contrast."""
    x = x.flatten(1).double()
    return F.normalize(x - x.mean(1, keepdim=True), dim=1)
