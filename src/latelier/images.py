"""From tensors in [-1, 1] to 8-bit images, grids and PNG files."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from latelier.publish import write_whole

GAP_COLOUR = (128, 128, 128)


def to_uint8(images: Float[Tensor, "*b c h w"]) -> UInt8[Tensor, "*b c h w"]:
    """[-1, 1] to 0..255: clamped, rounded to the nearest."""
    return ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round_().to(torch.uint8)


def round_to_8_bit(images: Float[Tensor, "*b c h w"]) -> Float[Tensor, "*b c h w"]:
    """The image as a PNG holds it: clamped to [-1, 1] and rounded to 256 levels, float32."""
    return to_uint8(images).float() / 127.5 - 1


def make_grid(images: Float[Tensor, "b c h w"], columns: int = 8, padding: int = 2) -> Image.Image:
    """Images in [-1, 1], row by row, with `padding` grey pixels between them, as RGB.

    One or two channels are shown as grey (the first), more as their first three.
    """
    pixels = to_uint8(images).cpu()  # (b, c, h, w)
    pixels = pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)
    pixels = pixels.movedim(1, -1)  # (b, h, w, 3)
    count, height, width, _ = pixels.shape
    columns = max(1, min(columns, count))
    rows = -(-count // columns)
    size = (columns * (width + padding) - padding, rows * (height + padding) - padding)
    canvas = Image.new("RGB", (max(1, size[0]), max(1, size[1])), GAP_COLOUR)
    for i, image in enumerate(pixels):
        corner = (i % columns * (width + padding), i // columns * (height + padding))
        canvas.paste(Image.fromarray(image.numpy()), corner)
    return canvas


def make_pairs(upper: Float[Tensor, "b c h w"], lower: Float[Tensor, "b c h w"], columns: int = 8) -> Image.Image:
    """A grid of rows of `upper`, each with its row of `lower` below it."""
    return make_columns([upper, lower], columns)


def make_columns(layers: list[Float[Tensor, "b c h w"]], columns: int = 8) -> Image.Image:
    """A grid in which the versions of an image, one from each layer, are below each other."""
    layers = [layer.detach().float().cpu() for layer in layers]
    count = len(layers[0])
    if count % columns and count > columns:  # fill the last row, so that columns stay aligned
        blank = torch.zeros_like(layers[0][:1]).expand(columns - count % columns, -1, -1, -1)
        layers = [torch.cat([layer, blank]) for layer in layers]
    rows = [row for versions in zip(*(layer.split(columns) for layer in layers)) for row in versions]
    return make_grid(torch.cat(rows), min(columns, len(layers[0])))


def save_png(image: Image.Image, path: str | Path) -> Path:
    """Write a PNG, whole; folders are made."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return write_whole(Path(path), buffer.getvalue())
