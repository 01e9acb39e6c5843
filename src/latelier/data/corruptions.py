"""What inpainting and super-resolution start from: images with holes, and small images.

Holes are LaMa's (Suvorov et al. 2022, section 2.3): thick strokes (Yu et al. 2019, free-form masks), or boxes. Small
images are `bicubic`, or `bsrgan-light`, what the LDM paper trains its blind model on: a weak form of BSRGAN's random
degradation (Zhang et al. 2021, section 3), a shuffled chain of blur, resizing, noise and JPEG.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from PIL import Image, ImageDraw
from torch import Tensor

from latelier.errors import LatelierError
from latelier.keyed_random import fold_in

KINDS = ("bicubic", "bsrgan-light")
QUALITY = (80, 95)  # of JPEG


@dataclass(frozen=True)
class MaskSetting:
    """How masks are drawn; ranges are inclusive, lengths are pixels of an image whose shorter side is `side`."""

    side: int
    box_share: float  # probability that a mask is made of boxes
    strokes: tuple[int, int]  # how many
    boxes: tuple[int, int]
    margin: int  # between boxes and the image's edges
    most: float  # the largest share of the image that may be a hole
    length: tuple[int, int] = (10, 200)  # of a stroke's segment
    width: tuple[int, int] = (5, 100)
    segments: tuple[int, int] = (1, 5)  # of a stroke
    angle: float = 4.0  # of a segment's direction, at most, in radians
    box_side: tuple[int, int] = (30, 150)


# LaMa gives strokes : boxes as 1 : 1 and 1 : 0.3. Its evaluation sets leave out masks of more than half the image.
SETTINGS = {
    "train": MaskSetting(side=256, box_share=1 / 2, strokes=(1, 5), boxes=(1, 4), margin=10, most=1.0),
    "thick": MaskSetting(side=256, box_share=0.3 / 1.3, strokes=(1, 5), boxes=(1, 3), margin=10, most=0.5),
    "medium": MaskSetting(side=512, box_share=0.3 / 1.3, strokes=(4, 10), boxes=(1, 5), margin=0, most=0.5),
}


def draw_masks(
    setting: MaskSetting, size: tuple[int, int], seed: int, sample_ids: Int[Tensor, " b"]
) -> Float[Tensor, "b 1 h w"]:
    """One mask of a size (height, width) for each sample, 1 in holes; row i depends on `(seed, sample_ids[i])` only."""
    rows = [draw_mask(setting, size, np.random.default_rng(fold_in(seed, "mask", n))) for n in sample_ids.tolist()]
    return torch.from_numpy(np.array(rows, np.float32).reshape(-1, 1, *size))  # (b, 1, h, w)


def draw_mask(setting: MaskSetting, size: tuple[int, int], rng: np.random.Generator) -> Bool[np.ndarray, "h w"]:
    """A mask, true in holes; drawn again until it is neither empty, nor everything, nor more than `setting.most`."""
    if size[0] * size[1] < 2:
        raise LatelierError(f"An image of {size[0]} x {size[1]} pixels is too small for a hole.")
    scale = min(size) / setting.side
    while True:
        canvas = Image.new("1", (size[1], size[0]))
        draw = _draw_boxes if rng.random() < setting.box_share else _draw_strokes
        draw(canvas, setting, scale, rng)
        mask = np.array(canvas)  # (h, w)
        if mask.any() and not mask.all() and mask.mean() <= setting.most:
            return mask


def _draw_strokes(canvas: Image.Image, setting: MaskSetting, scale: float, rng: np.random.Generator) -> None:
    """Walks with round joints; every other segment's angle is negated."""
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


def degrade(
    images: Float[Tensor, "b c h w"], factor: int, kind: str, seed: int, sample_ids: Int[Tensor, " b"]
) -> Float[Tensor, "b c i j"]:
    """Images in [-1, 1] made `factor` times smaller; row i depends on `(seed, sample_ids[i])` only."""
    if kind not in KINDS:
        raise LatelierError(f"Unknown degradation {kind!r}; there are: {', '.join(KINDS)}.")
    return bicubic(images, factor) if kind == "bicubic" else bsrgan_light(images, factor, seed, sample_ids)


def bicubic(images: Float[Tensor, "b c h w"], factor: int) -> Float[Tensor, "b c i j"]:
    """Antialiased bicubic downsampling, PIL's up to its rounding to 8 bits."""
    size = smaller(images, factor)
    return F.interpolate(images.float(), size=size, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)


def bsrgan_light(
    images: Float[Tensor, "b c h w"], factor: int, seed: int, sample_ids: Int[Tensor, " b"]
) -> Float[Tensor, "b c i j"]:
    """Blur, random resizing, noise and JPEG in random order, then JPEG once more."""
    size, channels = smaller(images, factor), images.shape[1]
    if channels not in (1, 3):
        raise LatelierError(
            f"The degradation bsrgan-light saves JPEG, which has 1 or 3 channels, but the images have {channels}; "
            "use degradation: bicubic."
        )
    rows = []
    for image, sample_id in zip(images.detach().float().cpu().split(1), sample_ids.tolist()):
        rng = np.random.default_rng(fold_in(seed, "degradation", sample_id))
        with torch.autocast("cpu", enabled=False):
            rows.append(_bsrgan_light((image + 1) / 2, factor, size, rng) * 2 - 1)
    return torch.cat(rows).to(images.device) if rows else images.new_zeros(0, channels, *size)


def smaller(images: Float[Tensor, "b c h w"], factor: int) -> tuple[int, int]:
    """Height and width of the small images."""
    height, width = images.shape[-2:]
    if height % factor or width % factor:
        near = " x ".join(str(max(factor, round(side / factor) * factor)) for side in (height, width))
        raise LatelierError(f"Image size {height} x {width} is not divisible by the factor {factor}; use {near}.")
    return height // factor, width // factor


def _bsrgan_light(
    x: Float[Tensor, "1 c h w"], factor: int, size: tuple[int, int], rng: np.random.Generator
) -> Float[Tensor, "1 c i j"]:
    """The chain for one image in [0, 1]."""
    scale = factor
    if factor % 2 == 0 and factor >= 4 and rng.random() < 0.25:
        x, scale = resize(x, (x.shape[2] // 2, x.shape[3] // 2), rng), factor // 2
    steps: list[Callable[[Tensor, np.random.Generator], Tensor]] = [
        lambda x, rng: blur(x, scale, rng),
        lambda x, rng: shrink(x, scale, rng),
        lambda x, rng: resize(x, size, rng),
        noise,
        lambda x, rng: jpeg(x, rng) if rng.random() < 0.9 else x,
    ]
    order = rng.permutation(len(steps)).tolist()
    first, second = sorted((order.index(1), order.index(2)))
    order[first], order[second] = 1, 2  # the wanted size is always reached after the random resize
    for i in order:
        x = steps[i](x, rng).clamp(0, 1)
    return jpeg(x, rng)


def blur(x: Float[Tensor, "1 c h w"], scale: int, rng: np.random.Generator) -> Float[Tensor, "1 c h w"]:
    """Round or elongated Gaussian, with a quarter of BSRGAN's widths."""
    size = 2 * int(rng.integers(2, 6, endpoint=True)) + 1  # 5..13
    if rng.random() < 0.5:
        variances, angle = rng.uniform(0, (4 + scale) / 4, size=2), rng.uniform(0, np.pi)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        covariance = turn @ np.diag(variances) @ turn.T
    else:
        covariance = np.eye(2) * rng.uniform(0, (2 + 0.2 * scale) / 4) ** 2
    return convolve(x, gaussian(size, covariance))


def shrink(x: Float[Tensor, "1 c h w"], scale: int, rng: np.random.Generator) -> Float[Tensor, "1 c i j"]:
    """To between 1 and 1 / (2 scale) of a side, or, in a fifth of cases, every `scale`-th pixel after a wide blur."""
    if rng.random() < 0.8:
        ratio = rng.uniform(1, 2 * scale)
        return resize(x, (max(1, round(x.shape[2] / ratio)), max(1, round(x.shape[3] / ratio))), rng)
    kernel = gaussian(25, np.eye(2) * rng.uniform(0.1, 0.6 * scale) ** 2)
    return convolve(x, kernel)[..., ::scale, ::scale]


def resize(x: Float[Tensor, "1 c h w"], size: tuple[int, int], rng: np.random.Generator) -> Float[Tensor, "1 c i j"]:
    """To a size by one of three filters, not antialiased: aliasing is part of the task."""
    mode = ("bilinear", "bicubic", "area")[rng.integers(3)]
    return F.interpolate(x, size=size, mode=mode, align_corners=None if mode == "area" else False)


def noise(x: Float[Tensor, "1 c h w"], rng: np.random.Generator) -> Float[Tensor, "1 c h w"]:
    """Gaussian noise of 1 or 2 grey levels: each channel its own, all the same, or correlated (BSRGAN, section 3.3)."""
    channels, level, kind = x.shape[1], int(rng.integers(1, 2, endpoint=True)) / 255, rng.random()
    drawn = rng.standard_normal((1, 1 if kind < 0.4 else channels, *x.shape[2:]))  # (1, c or 1, h, w)
    if kind >= 0.8:  # covariance U^T D U
        turn, variances = np.linalg.qr(rng.standard_normal((channels, channels)))[0], rng.random(channels)
        drawn = np.einsum("bchw,c,ck->bkhw", drawn, variances**0.5, turn)
    return x + level * torch.from_numpy(drawn).to(x)


def jpeg(x: Float[Tensor, "1 c h w"], rng: np.random.Generator) -> Float[Tensor, "1 c h w"]:
    """Saved as JPEG of a random quality, and opened again; 1 or 3 channels."""
    pixels = (x[0] * 255).round().clamp(0, 255).to(torch.uint8).movedim(0, -1)  # (h, w, c)
    file, image = io.BytesIO(), Image.fromarray((pixels.squeeze(-1) if len(x[0]) == 1 else pixels).numpy())
    image.save(file, "JPEG", quality=int(rng.integers(*QUALITY, endpoint=True)))
    array = np.atleast_3d(np.array(Image.open(file)))  # (h, w, c)
    return torch.from_numpy(array).movedim(-1, 0)[None].to(x) / 255  # (1, c, h, w)


def gaussian(size: int, covariance: Float[np.ndarray, "2 2"]) -> Float[Tensor, "k k"]:
    """A centred Gaussian kernel that sums to 1; its covariance is in pixels squared."""
    inverse = np.linalg.inv(covariance + 1e-4 * np.eye(2))
    axis = np.arange(size) - (size - 1) / 2
    place = np.stack(np.meshgrid(axis, axis), -1)  # (k, k, 2) x, y
    kernel = np.exp(-0.5 * np.einsum("ija,ab,ijb->ij", place, inverse, place))  # (k, k)
    return torch.from_numpy(kernel / kernel.sum()).float()


def convolve(x: Float[Tensor, "1 c h w"], kernel: Float[Tensor, "k k"]) -> Float[Tensor, "1 c h w"]:
    """Every channel with the same kernel of odd size, with replicated edges."""
    padded = F.pad(x, (kernel.shape[0] // 2,) * 4, mode="replicate").movedim(1, 0)  # (c, 1, h + k - 1, w + k - 1)
    return F.conv2d(padded, kernel[None, None]).movedim(0, 1)  # (1, c, h, w)
