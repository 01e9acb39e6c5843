"""What sources, loaders and caches agree on: records, batches, and the training stream.

The stream is endless; its samples are numbered 0, 1, 2, ... (`sample_id`).
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypedDict, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from torch import Tensor

from latelier.errors import LatelierError
from latelier.keyed_random import fold_in

VAL_NAMES = ("val", "valid", "validation", "test")  # names of validation splits, looked for in this order
ORIENTATION = 0x0112  # in EXIF
UNREADABLE = (  # what PIL and numpy raise for files that are damaged, cut off, or so large that they must be an attack
    OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, OverflowError, MemoryError,
    RuntimeError, struct.error, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip


class Record(TypedDict, total=False):
    """One image of a source and what is known of it; only `image` is always there. n counts objects."""

    image: Image.Image | UInt8[np.ndarray, "h w c"]  # opened, not decoded
    label: int  # position in `class_names`
    caption: str
    caption_mirrored: str  # the caption of the mirror image, if it is another
    boxes: Float[np.ndarray, "n 4"]  # x0 y0 x1 y1, relative to the upright image
    box_labels: Int[np.ndarray, " n"]  # positions in `box_names`
    box_flags: Int[np.ndarray, " n"]  # bits of `latelier.data.boxes.FLAGS`
    segmentation: Int[np.ndarray, "h w"]  # class ids
    mask: Int[np.ndarray, "h w"]
    map: UInt8[np.ndarray, "h w *c"]  # depth, edges, ...; 8 or 16 bits


class Batch(TypedDict, total=False):
    """Every key that a batch may have. Images, maps and `low` are in [-1, 1]."""

    # from images: `ImageDataset.stream`, `once`, `follow`
    image: Float[Tensor, "b c h w"]
    sample_id: Int[Tensor, " b"]  # number in the training stream, the key of all random choices; not in single passes
    index: Int[Tensor, " b"]  # number in the source
    label: Int[Tensor, " b"]
    caption: list[str]
    boxes: list[Float[Tensor, "n 4"]]  # x0 y0 x1 y1, relative to the cropped image
    box_labels: list[Int[Tensor, " n"]]
    box_flags: list[Int[Tensor, " n"]]
    segmentation: Int[Tensor, "b h w"]  # class ids
    mask: Int[Tensor, "b h w"]
    map: Float[Tensor, "b k h w"]
    # from the latent cache, or encoded on the fly
    mean: Float[Tensor, "b c *grid"]  # of the normalised posterior
    std: Float[Tensor, "b c *grid"]
    # from a conditioner's `prepare`, and from the training loop
    hole: Float[Tensor, "b 1 h w"]  # 1 where inpainting fills in
    hole_grid: Float[Tensor, "b 1 i j"]  # the same on the latent grid
    masked: Float[Tensor, "b c i j"]  # latents of the image without the hole
    low: Float[Tensor, "b c i j"]  # the small image of super-resolution
    seen: int  # images seen before this step


@runtime_checkable
class Source(Protocol):
    """A finite sequence of records.

    It may also have `box_names` (index = box label), `segmentation_classes` (how many ids label maps have),
    `captions(indices)`, which opens no image, `uncaptioned`: indices of images without a caption where others have
    one, and `mirrored_captions`: whether records have `caption_mirrored`.
    """

    class_names: list[str] | None  # index = label; None without labels
    labels: list[int] | None  # of every record; None without labels, or if they are not known before a record is read
    fingerprint: str  # changes when the images change

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Record `index`, see `Record`; raises what PIL raises if the image cannot be read."""

    def name(self, index: int) -> str:
        """What to call the image in messages."""


@runtime_checkable
class Images(Protocol):
    """Batches of images: `latelier.data.loader.ImageDataset`, or anything that the latent cache can encode."""

    class_names: list[str] | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(c, h, w)` of every image."""

    def __len__(self) -> int: ...

    def once(self, batch: int, process: int, processes: int) -> Iterator[dict[str, Any]]:
        """One pass over every `processes`-th image from the `process`-th on: `image`, `index`, `label`, `caption`."""

    def stream(self, batch: int, start: int, process: int, processes: int, accumulation: int) -> Iterator[dict]:
        """Training batches without end: `image`, `sample_id`."""


def permuted_index(sample_ids: Int[Tensor, " b"], size: int, seed: int) -> Int[Tensor, " b"]:
    """Which of `size` images each sample shows: epoch `n // size` shows every image once, in its own order."""
    epochs = torch.div(sample_ids, size, rounding_mode="floor")
    index = torch.empty_like(sample_ids)
    for epoch in epochs.unique().tolist():
        inside = epochs == epoch
        index[inside] = _permutation(size, seed, epoch)[sample_ids[inside] - epoch * size]
    return index


def mirrored(sample_ids: Int[Tensor, " b"], seed: int) -> Bool[Tensor, " b"]:
    """Which samples are mirrored, each with probability 1/2; image stream and latent cache agree by this function."""
    return torch.tensor([bool(fold_in(seed, "flip", n) & 1) for n in sample_ids.tolist()], dtype=torch.bool)


def share(batch: int, process: int, processes: int, accumulation: int) -> list[range]:
    """This process's micro-batches as ranges of offsets within an optimiser step of `batch` samples."""
    size, rest = divmod(batch, processes * accumulation)
    if rest or not size:
        raise LatelierError(
            f"batch = {batch} cannot be split into {processes} processes x {accumulation} micro-batches; "
            f"use a multiple of {processes * accumulation}."
        )
    starts = [(micro * processes + process) * size for micro in range(accumulation)]
    return [range(start, start + size) for start in starts]


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(fold_in(seed, "order", epoch)))


def digest(*parts: Any) -> str:
    """A short stable hash of JSON-like values."""
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def file_facts(paths: Sequence[Path], root: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of files, for fingerprints; of links that lead nowhere, those of the link."""
    stats = (path.stat() if path.exists() else path.lstat() for path in paths)
    return [(os.path.relpath(p, root), stat.st_size, stat.st_mtime_ns) for p, stat in zip(paths, stats)]


def name_hash(name: str) -> float:
    """A number in [0, 1) that depends on the name only."""
    return int.from_bytes(hashlib.md5(name.encode("utf-8", "surrogateescape")).digest()[:4], "big") / 2**32


def check_classes(classes: list[str], known: list[str] | None) -> None:
    """Refuse classes that are not known."""
    if known is None:
        raise LatelierError("data.classes is set, but the images have no labels; set data.label_key or remove it.")
    for name in classes:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.5)
            all_names = f"known: {', '.join(known[:20])}; data.classes=null takes all."
            hint = f"did you mean {near[0]!r}?" if near else all_names
            raise LatelierError(f"Unknown class {name!r}; {hint}")


def number_classes(named: list[str], class_names: list[str] | None) -> tuple[list[str], list[int]]:
    """Class names, by default all that are found, sorted, and the images' labels: positions in them."""
    found = sorted(set(named))
    if class_names and (other := [name for name in found if name not in class_names]):
        known = ", ".join([*class_names[:5], *["..."] * (len(class_names) > 5)])
        wrong = f"The held-out images have the class {other[0]!r}, which the training images do not have ({known})"
        raise LatelierError(f"{wrong}; sort both into folders of the same names, or set data.val_source.")
    number = {name: i for i, name in enumerate(class_names or found)}
    return class_names or found, [number[name] for name in named]


def open_bytes(content: bytes) -> Image.Image:
    """An image whose header is read and whose pixels are not decoded yet."""
    return Image.open(io.BytesIO(content))


def orientation(image: Image.Image) -> int:
    """EXIF orientation (how the camera was held): 1 is upright, from 5 on width and height are exchanged."""
    return image.getexif().get(ORIENTATION, 1) if image.format in ("JPEG", "MPO", "TIFF", "WEBP") else 1
