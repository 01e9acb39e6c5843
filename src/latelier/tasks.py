"""Image in, image out: reconstruct with a tokenizer; upscale or inpaint with a pipeline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from latelier.conditioning.condition import components
from latelier.conditioning.inputs import by, read_image, read_mask
from latelier.data.records import UNREADABLE
from latelier.data.transforms import Transform, to_float
from latelier.errors import LatelierError
from latelier.evaluation.reconstruction import psnr
from latelier.images import make_columns, save_png
from latelier.opening import best_device
from latelier.pipeline import LatentDiffusionPipeline
from latelier.tokenizers.codec import Codec


def upscale(pipeline: LatentDiffusionPipeline, image: Any, **settings: Any) -> Float[Tensor, "c h w"]:
    """Enlarge an image of any size by the factor that the model was trained for.

    Images whose sides do not fit the networks are continued at the right and at the bottom, and cut back.

    Args:
        pipeline: trained with `condition: low-resolution`.
        image: a PIL image, a file, or a tensor `(c, h, w)` in [-1, 1].
        settings: of the pipeline's call: `steps`, `seed`, ...

    Returns:
        The image in [-1, 1], `(c, factor h, factor w)`.

    Raises:
        LatelierError: if the model was not trained to upscale, or the image cannot be read.
    """
    factor = _component(pipeline, "low_resolution", "enlarge images").config["factor"]
    source = read_image(image, pipeline.codec.image_channels, "image")
    height, width = source.shape[1:]
    small = _continued(source, multiple(pipeline) // math.gcd(multiple(pipeline), factor))  # (c, h', w')
    size = {"height": small.shape[1] * factor, "width": small.shape[2] * factor}
    large = pipeline(low_resolution=[small], output_type="pt", **size, **settings).images[0]
    return large[:, : height * factor, : width * factor]


def inpaint(pipeline: LatentDiffusionPipeline, image: Any, mask: Any, **settings: Any) -> Float[Tensor, "c h w"]:
    """Fill the holes of an image of any size; everything outside of them comes back untouched.

    Args:
        pipeline: trained with `condition: inpainting`.
        image: a PIL image, a file, or a tensor `(c, h, w)` in [-1, 1].
        mask: a PIL image, a file, or a tensor `(h, w)`, bright where the holes are.
        settings: of the pipeline's call: `steps`, `seed`, ...

    Raises:
        LatelierError: if the model was not trained to inpaint, a file cannot be read, or the mask has another size or
            no hole.
    """
    _component(pipeline, "inpainting", "fill holes")
    source, hole = read_image(image, pipeline.codec.image_channels, "image"), read_mask(mask, "mask")
    height, width = source.shape[1:]
    if hole.shape != (height, width):
        raise LatelierError(
            f"The mask is {by(hole.shape)} (height x width), but the image {height} x {width}; make them equal."
        )
    if not hole.any():
        raise LatelierError("The mask has no hole; paint in white what is to be filled.")
    whole = _continued(source, multiple(pipeline))  # (c, h', w')
    holes = F.pad(hole, (0, whole.shape[2] - width, 0, whole.shape[1] - height))  # (h', w')
    size = {"height": whole.shape[1], "width": whole.shape[2]}
    drawn = pipeline(inpainting=[(whole, holes)], output_type="pt", **size, **settings).images[0]
    return drawn[:, :height, :width]


def multiple(pipeline: LatentDiffusionPipeline) -> int:
    """What the sides of images must be divisible by, for the tokenizer and the denoiser."""
    config = pipeline.denoiser.config
    levels = config.get("block_out_channels")
    inner = 2 ** (len(levels) - 1) if levels else config.get("patch_size", 1)
    return pipeline.codec.factor * inner


def _component(pipeline: LatentDiffusionPipeline, name: str, does: str) -> Any:
    known = components(pipeline.conditioner)
    if name not in known:
        found = " and ".join(known) or "nothing"
        raise LatelierError(f"This model was not trained to {does}: it is conditioned on {found}, not {name}.")
    return known[name]


def _continued(image: Float[Tensor, "c h w"], step: int) -> Float[Tensor, "c k l"]:
    """The image with its last row and column repeated until `step` divides both sides."""
    down, right = (-side % step for side in image.shape[1:])
    return F.pad(image[None], (0, right, 0, down), mode="replicate")[0]


def reconstruct(tokenizer: str, images: list[Path], out: Path, size: int, channels: Sequence[int] = ()) -> list[float]:
    """Pass image files through a tokenizer; originals go to `out`, above what came back.

    Args:
        tokenizer: a run folder, a tokenizer folder, or a diffusers Hub name.
        images: files and folders.
        out: a PNG file.
        size: side in pixels to which images are cropped.
        channels: decode only the first k latent channels, a row of images for each k; nothing decodes all.

    Returns:
        Mean PSNR in dB of each row.

    Raises:
        LatelierError: if the tokenizer or the images cannot be opened, or do not fit.
    """
    folder = Path(tokenizer)
    path = folder / "tokenizer" if (folder / "tokenizer").is_dir() else tokenizer
    codec = Codec.from_pretrained(path, precision="auto").to(best_device())
    codec.latent_shape(size, size)
    originals = _read_images(images, codec.image_channels, size)
    with torch.no_grad():
        latents = [codec.encode(x[None].to(codec.device)) for x in originals]
        lengths: list[int | None] = [*channels] or [None]
        rows = [torch.cat([codec.decode(z, length).clamp(-1, 1).cpu() for z in latents]) for length in lengths]
    save_png(make_columns([originals, *rows], columns=min(8, len(originals))), out)
    return [psnr(row, originals).mean().item() for row in rows]


def _read_images(paths: list[Path], channels: int, size: int) -> Tensor:
    """Image files, and those in folders, centre-cropped to a square, `(n, c, size, size)` in [-1, 1]."""
    transform = Transform((size, size), channels, flip=False)
    files = [f for path in paths for f in (sorted(path.rglob("*")) if path.is_dir() else [path]) if f.is_file()]
    tensors = []
    for file in files:
        try:
            with Image.open(file) as image:
                tensors.append(to_float(transform.pixels(image)[0]))
        except UNREADABLE:
            continue
    if not tensors:
        raise LatelierError(f"No image can be read from {', '.join(map(str, paths)) or 'nothing'}.")
    return torch.stack(tensors)
