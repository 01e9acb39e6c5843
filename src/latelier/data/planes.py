"""Files that belong to images pixel by pixel: label maps (ids) and image-like maps (depth, edges, ...)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latelier.errors import LatelierError
from latelier.recipe import Data

BYTE = 256


class LabelMaps:
    """What the ids of label maps may be.

    Pixels of `data.ignore_id` (VOC, COCO-stuff and Cityscapes mark with 255 what nobody labelled) become one more
    class, the last: "unknown" is then an id of its own, and not mistaken for one of the classes.

    Args:
        data: the recipe's section, for `segmentation_classes` and `ignore_id`.

    Attributes:
        count: how many ids there are after that; None if the recipe does not say.

    Raises:
        LatelierError: if an `ignore_id` has no number of classes.
    """

    def __init__(self, data: Data):
        told = data.segmentation_classes
        self._classes = len(told) if isinstance(told, list) else told
        self._ignored = data.ignore_id
        if self._classes is None and self._ignored is not None:
            raise LatelierError(
                f"data.ignore_id = {self._ignored} needs data.segmentation_classes, how many ids there are."
            )
        self.count = None if self._classes is None else self._classes + (self._ignored is not None)

    def read(self, stored: Image.Image | np.ndarray, name: str) -> np.ndarray:
        """Ids `(h, w)`: uint8 where they fit, else int32.

        Raises:
            LatelierError: if the map has colours instead of ids, or an id that is too large.
        """
        ids = np.asarray(stored)
        if ids.ndim != 2 or not (np.issubdtype(ids.dtype, np.integer) or ids.dtype == bool):
            raise LatelierError(f"The label map of {name} must be one channel of ids, not {ids.shape} of {ids.dtype}.")
        if self._classes is None or self.count is None:
            return ids.astype(np.uint8) if ids.dtype == bool else ids
        wrong = (ids < 0) | (ids >= self._classes)
        if self._ignored is not None:
            wrong &= ids != self._ignored
        if wrong.any():
            raise LatelierError(
                f"The label map of {name} has the id {ids[wrong][0]}, but data.segmentation_classes = {self._classes} "
                f"allows 0..{self._classes - 1}; raise it, or set data.ignore_id."
            )
        ids = ids.astype(np.int32)
        if self._ignored is not None:
            ids[np.asarray(stored) == self._ignored] = self._classes
        return ids.astype(np.uint8) if self.count <= BYTE else ids


def read_map(stored: Image.Image | np.ndarray, name: str) -> np.ndarray:
    """An image-like map, `(h, w)` or `(h, w, c)`, uint8 or uint16.

    Raises:
        LatelierError: for other numbers, which have no fixed range.
    """
    if isinstance(stored, Image.Image):
        if stored.mode in ("P", "PA", "1"):
            stored = stored.convert("L" if stored.mode == "1" else "RGB")
        wide = stored.mode == "I" and stored.format == "PNG"  # how older versions of PIL open 16 bits
        stored = np.asarray(stored).astype(np.uint16) if wide else np.asarray(stored)
    if stored.dtype not in (np.uint8, np.uint16) or stored.ndim not in (2, 3):
        raise LatelierError(
            f"The map of {name} must be (h, w) or (h, w, c) of 8 or 16 bits without sign, not {stored.shape} of "
            f"{stored.dtype}."
        )
    return stored


def partners(key: str, folder: Path, paths: list[Path], roots: list[Path]) -> dict[Path, Path]:
    """For each image the file in another folder that has its name, whatever the suffix.

    Args:
        key: of the recipe, for messages.
        folder: where the files are.
        paths: the images.
        roots: folders to which images' names are relative; the first under whose name there is a file counts.

    Raises:
        LatelierError: if there is no such folder, or an image has no file.
    """
    from latelier.data.folder import list_images

    files = {path.relative_to(folder).with_suffix(""): path for path in list_images(folder)}
    if not files:
        raise LatelierError(f"{key} = {str(folder)!r}: there are no files such as .png in this folder.")
    found = {}
    for path in paths:
        names = [path.relative_to(root).with_suffix("") for root in roots]
        file = next((files[name] for name in names if name in files), None)
        if file is None:
            raise LatelierError(f"{key}: {folder} has no file for the image {path}; it would be {names[0]}.png.")
        found[path] = file
    return found


def open_plane(path: Path) -> Any:
    """A file's image, or its array if it is a `.npy`."""
    from latelier.data.folder import open_bytes

    return np.load(path) if path.suffix == ".npy" else open_bytes(path.read_bytes())
