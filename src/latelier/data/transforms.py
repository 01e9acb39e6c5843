"""From an opened image to uint8 pixels of the wanted size, and to floats in [-1, 1].

Everything random depends on `(seed, sample_id)` alone. Boxes, segmentation, mask and map get the same crop and flip.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from latelier.data.records import digest, mirrored, orientation
from latelier.errors import LatelierError
from latelier.keyed_random import fold_in

GREYS = {"white": 255, "black": 0, "gray": 128}
PLANES = ("segmentation", "mask")  # planes of numbers, which are not interpolated
BOXES = ("boxes", "box_labels", "box_flags")  # one row per object
SLIVER = 1e-6  # what is left of a box that only touches the crop, by rounding
Box = tuple[float, float, float, float]  # x0, y0, x1, y1


class Transform:
    """Decode, crop, flip and composite images.

    Args:
        size: height and width in pixels.
        crop: `random` is for training; outside of it, it is `center`.
        crop_scale: least and largest share of the area that a random crop keeps.
        flip: mirror half of the training stream.
        background: behind transparent images; `random` is another colour for each sample.
    """

    def __init__(
        self, size: tuple[int, int], channels: int = 3, crop: Literal["center", "random", "resize"] = "center",
        crop_scale: tuple[float, float] = (0.75, 1.0), flip: bool = True,
        background: Literal["white", "black", "gray", "random"] = "white", seed: int = 0,
    ):  # fmt: skip
        self.height, self.width = size
        self.channels, self.crop, self.crop_scale = channels, crop, crop_scale
        self.flip, self.background, self.seed = flip, background, seed
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise LatelierError(f"data.crop_scale = {crop_scale} must be two shares of the area, 0 < low <= high <= 1.")
        self.deep = channels + (background == "random" and channels in (1, 3))  # alpha is kept as the last channel
        kind = "resize" if crop == "resize" else "center"  # the fingerprint is that of evaluation
        self.fingerprint = digest("transform", 1, self.height, self.width, channels, kind, background)

    def flipped(self, sample_ids: Int[Tensor, " b"]) -> list[bool]:
        """Which samples of the training stream are mirrored."""
        return mirrored(sample_ids, self.seed).tolist() if self.flip else [False] * len(sample_ids)

    def record(self, record: dict[str, Any], sample_id: int | None = None) -> dict[str, Any]:
        """Decode and crop a record, see `pixels` for its image; the record itself is not changed."""
        image, region = self.pixels(record["image"], sample_id)
        return {**record, **self._cropped(record, region), "image": image}

    def pixels(
        self, image: Image.Image | np.ndarray, sample_id: int | None = None
    ) -> tuple[UInt8[Tensor, "d h w"], Box]:
        """Decoded, cropped pixels (alpha last if the background is random), and the region they show, relative.

        Without a `sample_id` the crop is deterministic. An image that cannot be read raises one of `UNREADABLE`.
        """
        bands = self._open(image)
        (width, height), size = bands[0].size, (self.width, self.height)
        if self.crop == "random" and sample_id is not None:
            box = self._random_box(width, height, sample_id)
            done = [resize(band, box, size) for band in bands]
            region = (box[0] / width, box[1] / height, box[2] / width, box[3] / height)
        elif self.crop == "resize":
            whole, region = (0.0, 0.0, float(width), float(height)), (0.0, 0.0, 1.0, 1.0)
            done = [resize(band, whole, size) for band in bands]
        else:
            done, region = [center_crop(band, size) for band in bands], _center_region(width, height, *size)
        array = np.concatenate([np.atleast_3d(np.asarray(band)) for band in done], axis=2)  # (h, w, k)
        return self._channels(torch.from_numpy(array.transpose(2, 0, 1).copy())), region  # (d, h, w)

    def finish(
        self, pixels: UInt8[Tensor, "b d h w"], flipped: list[bool], sample_ids: Int[Tensor, " b"]
    ) -> Float[Tensor, "b c h w"]:
        """Mirror, composite on the random background if there is one, and scale to [-1, 1]."""
        if any(flipped):
            pixels = torch.where(torch.tensor(flipped)[:, None, None, None], pixels.flip(-1), pixels)
        if self.deep > self.channels:
            numbers, channels = sample_ids.tolist(), range(self.channels)
            colours = [[fold_in(self.seed, f"background {c}", n) & 255 for c in channels] for n in numbers]
            pixels = composite(pixels, torch.tensor(colours, dtype=torch.uint8))
        return to_float(pixels)

    def _open(self, image: Image.Image | np.ndarray) -> list[Image.Image]:
        """The decoded image, whole, as one PIL image or one for each channel."""
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim not in (2, 3):
                raise ValueError(f"arrays must be (h, w, c) of uint8, not {image.shape} of {image.dtype}")
            self._check_channels(1 if image.ndim == 2 else image.shape[2])
            return [Image.fromarray(band) for band in np.atleast_3d(image).transpose(2, 0, 1)]
        turn = orientation(image)
        if image.format in ("JPEG", "MPO"):  # let the decoder shrink by 2, 4 or 8: it saves most of the work
            share = self.crop_scale[0] ** 0.5 if self.crop == "random" else 1.0
            wanted = int(np.ceil(self.width / share)), int(np.ceil(self.height / share))
            image.draft("L" if self.channels == 1 else "RGB", wanted[::-1] if turn >= 5 else wanted)
        image.load()
        if turn != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise ValueError(f"images of mode {image.mode} (32 bits) have no fixed range; store 8 or 16 bits")
        if image.mode in ("P", "PA"):
            image = image.convert("RGBA" if self.channels == 4 or image.has_transparency_data else "RGB")
        if self.channels not in (1, 3):
            self._check_channels(len(image.getbands()))
            return [image]
        return [image.convert("RGBA" if image.has_transparency_data else "L" if self.channels == 1 else "RGB")]

    def _check_channels(self, found: int) -> None:
        if (known := self.channels) != found:
            raise ValueError(f"data.channels = {known}, but the image has {found} channels; set it to {found}")

    def _random_box(self, width: int, height: int, sample_id: int) -> Box:
        """A box of the target's aspect ratio at a random position, with a random share of the largest one's area."""
        low, high = self.crop_scale
        share, right, down = (fold_in(self.seed, f"crop {part}", sample_id) / 2**63 for part in ("area", "x", "y"))
        scale = min(width / self.width, height / self.height) * (low + (high - low) * share) ** 0.5
        w, h = self.width * scale, self.height * scale
        x, y = right * (width - w), down * (height - h)
        return x, y, min(x + w, float(width)), min(y + h, float(height))

    def _channels(self, pixels: UInt8[Tensor, "k h w"]) -> UInt8[Tensor, "d h w"]:
        """RGBA pixels on the background; alpha is kept if the background is random."""
        if self.channels not in (1, 3) or len(pixels) == self.deep == self.channels:
            return pixels
        if self.channels == 1 and len(pixels) == 4:  # luminance (ITU-R 601) and alpha
            luma = pixels[:3].permute(1, 2, 0).numpy()
            pixels = torch.cat([torch.from_numpy(np.array(Image.fromarray(luma).convert("L")))[None], pixels[3:]])
        if len(pixels) == self.channels:
            return torch.cat([pixels, torch.full_like(pixels[:1], 255)])
        if self.deep > self.channels:
            return pixels
        colour = torch.full((1, self.channels), GREYS[self.background], dtype=torch.uint8)
        return composite(pixels[None], colour)[0]

    def _cropped(self, record: dict[str, Any], region: Box) -> dict[str, Any]:
        """Boxes, segmentation, mask and map of the region."""
        done: dict[str, Any] = {}
        if "boxes" in record:
            boxes, kept = crop_boxes(np.asarray(record["boxes"], np.float32).reshape(-1, 4), region)
            done["boxes"] = torch.from_numpy(boxes)
            numbers = {key: np.asarray(record[key], np.int64)[kept] for key in BOXES[1:] if key in record}
            done |= {key: torch.from_numpy(values) for key, values in numbers.items()}
        for key, crop in (*((key, nearest) for key in PLANES), ("map", smooth)):
            if key in record:
                done[key] = torch.from_numpy(crop(np.asarray(record[key]), region, (self.height, self.width)))
        return done


def center_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The centre of an image at a size (width, height), as ADM does it (Dhariwal and Nichol 2021), for any shape.

    Halve with a box filter while it is at least twice too large, cover the target with bicubic, cut out the middle.
    """
    width, height = size
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    covering = _covering(image.width, image.height, width, height)
    if covering != image.size:
        image = image.resize(covering, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def resize(image: Image.Image, box: Box, size: tuple[int, int]) -> Image.Image:
    """A box of an image at a size (width, height), antialiased."""
    return image.resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)


def composite(pixels: UInt8[Tensor, "b d h w"], colours: UInt8[Tensor, "b c"]) -> UInt8[Tensor, "b c h w"]:
    """Pixels whose last channel is alpha, on plain colours: `(a x + (255 - a) y) / 255`, rounded."""
    alpha = pixels[:, -1:].to(torch.int32)  # (b, 1, h, w)
    under = colours[..., None, None].to(torch.int32)  # (b, c, 1, 1)
    mixed = alpha * pixels[:, :-1].to(torch.int32) + (255 - alpha) * under + 127  # (b, c, h, w)
    return torch.div(mixed, 255, rounding_mode="floor").to(torch.uint8)


def to_float(pixels: UInt8[Tensor, "*b c h w"]) -> Float[Tensor, "*b c h w"]:
    """0..255 to [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1)


def mirror(record: dict[str, Any]) -> dict[str, Any]:
    """The record of the mirror image, apart from `image`."""
    done = dict(record)
    if "boxes" in record:
        x0, y0, x1, y1 = record["boxes"].unbind(-1)
        done["boxes"] = torch.stack([1 - x1, y0, 1 - x0, y1], -1)
    done |= {key: record[key].flip(-1) for key in (*PLANES, "map") if key in record}
    if "caption_mirrored" in record:
        done["caption"], done["caption_mirrored"] = record["caption_mirrored"], record["caption"]
    return done


def crop_boxes(boxes: np.ndarray, region: Box) -> tuple[np.ndarray, np.ndarray]:
    """Relative boxes `(n, 4)` seen from a region of the image, cut at its edges, and which of them are in it."""
    x0, y0, x1, y1 = region
    offset, scale = np.array([x0, y0, x0, y0], np.float32), np.array([x1 - x0, y1 - y0] * 2, np.float32)
    boxes = ((boxes - offset) / scale).clip(0, 1)
    kept = (boxes[:, 2:] - boxes[:, :2] > SLIVER).all(1)
    return boxes[kept], kept


def nearest(plane: np.ndarray, region: Box, size: tuple[int, int]) -> np.ndarray:
    """A region of a plane `(h, w)` of ids at a size (height, width), by the nearest neighbour."""
    x0, y0, x1, y1 = region
    rows = ((y0 + (np.arange(size[0]) + 0.5) / size[0] * (y1 - y0)) * plane.shape[0]).astype(int)
    columns = ((x0 + (np.arange(size[1]) + 0.5) / size[1] * (x1 - x0)) * plane.shape[1]).astype(int)
    return plane[rows.clip(0, plane.shape[0] - 1)][:, columns.clip(0, plane.shape[1] - 1)]


def smooth(plane: np.ndarray, region: Box, size: tuple[int, int]) -> np.ndarray:
    """A region of a map, `(h, w)` or `(h, w, c)`, antialiased: `(c, height, width)`, uint8 or, for 16 bits, int32."""
    h, w = plane.shape[:2]
    box = (region[0] * w, region[1] * h, min(region[2] * w, float(w)), min(region[3] * h, float(h)))
    small = plane.dtype == np.uint8
    bands = [Image.fromarray(b if small else b.astype(np.float32)) for b in np.atleast_3d(plane).transpose(2, 0, 1)]
    done = [np.asarray(band.resize(size[::-1], Image.Resampling.BILINEAR, box=box)) for band in bands]
    return np.stack(done if small else [band.round().astype(np.int32) for band in done])


def _covering(width: int, height: int, target_width: int, target_height: int) -> tuple[int, int]:
    """The size at which an image just covers the target."""
    scale = max(target_width / width, target_height / height)
    return max(target_width, round(width * scale)), max(target_height, round(height * scale))


def _center_region(width: int, height: int, target_width: int, target_height: int) -> Box:
    """The region of an image that `center_crop` shows, relative, in whole pixels of the scaled image."""
    while width >= 2 * target_width and height >= 2 * target_height:
        width, height = width // 2, height // 2
    width, height = _covering(width, height, target_width, target_height)
    left, top = (width - target_width) // 2, (height - target_height) // 2
    return left / width, top / height, (left + target_width) / width, (top + target_height) / height
