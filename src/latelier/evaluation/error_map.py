"""Where a tokenizer errs: images, their reconstructions, and the error of every pixel as a colour.

The scale is the same for all tokenizers, so that two maps compare at a glance.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from latelier.errors import LatelierError
from latelier.images import make_columns, round_to_8_bit, save_png
from latelier.tokenizers.codec import Codec

ERRORS = "error-map.png"  # the file in a run's folder
SHOWN = 8  # images
BRIGHTEST = 64.0  # 8-bit levels, of 255: errors from here on have the last colour
TICKS = (0, 4, 16, 36, 64)  # levels that the scale names; colours follow the square root, so that these lie evenly
COLOURS = "inferno"  # of matplotlib: black to yellow, readable in grey
BAR, TEXT, PADDING, NARROWEST = 10, 12, 4, 260  # pixels of the scale below the images
PAPER, INK = (255, 255, 255), (29, 31, 35)


@torch.no_grad()
def draw_errors(codec: Codec, batches: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Originals, reconstructions and error maps below each other, and the scale.

    Args:
        codec: the tokenizer.
        batches: dicts with `image`, `(b, c, h, w)` in [-1, 1]; the first few are shown.
        path: of the PNG.

    Raises:
        LatelierError: if there are no images.
    """
    images = next((batch["image"] for batch in batches), torch.zeros(0, 3, 1, 1))[:SHOWN].cpu()  # (b, c, h, w)
    if not len(images):
        raise LatelierError("There are no images to draw errors of.")
    reconstructions = codec.decode(codec.encode(images.to(codec.device))).clamp(-1, 1).cpu()  # (b, c, h, w)
    error = pixel_errors(reconstructions, images)  # (b, h, w)
    grid = make_columns([_coloured(images), _coloured(reconstructions), heat(error)], columns=len(images))
    words = f"mean {error.mean():.1f}, largest {error.max():.0f} of 255 levels"
    save_png(_with_scale(grid, words), path)


def pixel_errors(images: Float[Tensor, "b c h w"], reference: Float[Tensor, "b c h w"]) -> Float[Tensor, "b h w"]:
    """Absolute error of each pixel in 8-bit levels, the mean over its channels."""
    return (round_to_8_bit(images) - round_to_8_bit(reference)).abs().mean(1) * 127.5


def heat(error: Float[Tensor, "*b h w"]) -> Float[Tensor, "*b 3 h w"]:
    """Errors in 8-bit levels as colours in [-1, 1]: black for none, the last colour from `BRIGHTEST` on."""
    from matplotlib import colormaps

    place = (error / BRIGHTEST).clamp(0, 1).sqrt()  # the eye should see small errors too
    colours = torch.from_numpy(colormaps[COLOURS](place.numpy())[..., :3])  # (*b, h, w, 3) in [0, 1]
    return (2 * colours - 1).float().movedim(-1, -3)


def _coloured(images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 h w"]:
    """As `make_grid` shows images: one or two channels as grey, more as their first three."""
    return images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)


def _with_scale(grid: Image.Image, words: str) -> Image.Image:
    """The images, below them a bar of colours with its levels, and words."""
    font = ImageFont.load_default(TEXT)
    width = max(grid.width, NARROWEST)
    image = Image.new("RGB", (width, grid.height + 5 * PADDING + BAR + 2 * TEXT), PAPER)
    image.paste(grid, (0, 0))
    left, right, top = PADDING, min(width, 2 * NARROWEST) - 6 * PADDING, grid.height + PADDING
    levels = torch.linspace(0, 1, right - left).square() * BRIGHTEST  # (w,): evenly spaced in colour
    bar = (heat(levels.expand(BAR, -1)).movedim(0, -1) + 1) * 127.5  # (h, w, 3)
    image.paste(Image.fromarray(bar.round().to(torch.uint8).numpy()), (left, top))
    draw = ImageDraw.Draw(image)
    for level in TICKS:
        text = f"{level}+" if level == BRIGHTEST else str(level)
        x = left + (level / BRIGHTEST) ** 0.5 * (right - left)
        draw.text((x, top + BAR + 1), text, INK, font, anchor="ma" if level else "la")
    draw.text((left, top + BAR + TEXT + 2 * PADDING), words, INK, font)
    return image
