"""A folder of images: class folders become labels, captions come from text files or a metadata table.

Boxes (see `latelier.data.boxes`), label maps (ids) and image-like maps (depth, edges, ...) come from other files.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from PIL import Image

from latelier.data.boxes import SPLIT, Boxes, CocoBoxes, ObjectBoxes, YoloBoxes, annotation_file
from latelier.data.records import UNREADABLE, VAL_NAMES, digest, file_facts, number_classes, open_bytes
from latelier.errors import LatelierError
from latelier.recipe import Data

SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".avif", ".jp2", ".npy",
}  # fmt: skip
LARGEST_FILE = 2**31  # bytes of an image; its pixels are limited by PIL
LONGEST_CAPTION = 10_000  # characters; no text encoder reads what is beyond, and tokenizers take long for it
METADATA = ("metadata.csv", "metadata.jsonl")
CAPTION_NAMES = ("caption", "text")
Metadata = dict[Path, dict[str, Any]]  # rows of the metadata tables by the image's path


class FolderSource:
    """Images below a folder, sorted by name.

    The folder of an image, relative to the root, is its class, unless images lie in the root itself. A
    `metadata.csv` or `metadata.jsonl` with a `file_name` column, as in Hugging Face's `imagefolder`, gives captions
    and labels; so does, for captions, a `.txt` file beside each image. Multi-channel images that PIL cannot open
    may be `.npy` files of `(h, w, c)` uint8. With `data.boxes: yolo` text files hold boxes instead, and folders such as
    `images` are no classes. With a COCO file only the images that it lists are used.

    `class_names` and `box_names` number the classes, by default all that are found, sorted. The names of label maps and
    maps may be relative to `top`, the folder of the splits.
    """

    def __init__(
        self, root: Path, data: Data, class_names: list[str] | None = None, split: str = "train",
        top: Path | None = None, box_names: list[str] | None = None,
    ):  # fmt: skip
        self.root, top = root, top or root
        split_name = root.name if root != top else data.split if split == "train" else data.val_split or split
        given = {"data.segmentation": data.segmentation, "data.maps": data.maps}
        planes = {k: Path(os.path.expanduser(f.replace(SPLIT, split_name))) for k, f in given.items() if f}
        apart = tuple(os.path.join(os.path.realpath(folder), "") for folder in planes.values())
        paths = [path for path in list_images(root) if not (apart and os.path.realpath(path).startswith(apart))]
        if not paths:
            needs = "it needs files such as .jpg, .png or .webp"
            if shards := [path for path in sorted(root.glob("*")) if path.suffix in (".tar", ".parquet")]:
                needs = f"for its shards set data.source='{root}/*{shards[0].suffix}'"
            raise LatelierError(f"There are no images in {root}; {needs}.")
        metadata, metadata_files = _read_metadata(root)
        file = annotation_file(data.boxes, split, data.split, data.val_split, root.name if root != top else None)
        self._boxes: Boxes | None = None
        if data.boxes is not None:
            self._boxes = CocoBoxes(file, root, paths, box_names) if file else YoloBoxes(root, paths, box_names)
        elif any(row.get("objects") is not None for row in metadata.values()):
            self._boxes = ObjectBoxes(metadata, data.box_format, box_names)
        self.box_names = self._boxes.names if self._boxes else None
        self.boxes_without_area = self._boxes.without_area if self._boxes else 0
        self.paths = [path for path in paths if self._boxes is None or self._boxes.knows(path)]
        self._sidecars = data.boxes != "yolo"  # else text files hold boxes
        self._captions = self._read_captions(metadata, data.caption_key)
        named = self._class_of_each(metadata, data.label_key)
        self.class_names: list[str] | None = None
        self.labels: list[int] | None = None
        if named is not None:
            self.class_names, self.labels = number_classes(named, class_names)
        self._label_maps = LabelMaps(data.segmentation_classes, data.ignore_id)
        self.segmentation_classes = self._label_maps.count if data.segmentation else None
        if data.segmentation and self.segmentation_classes is None:
            raise LatelierError("data.segmentation needs data.segmentation_classes, how many ids the label maps have.")
        partners = {key: _partners(key, folder, self.paths, [top, root]) for key, folder in planes.items()}
        self._segmentation, self._maps = partners.get("data.segmentation"), partners.get("data.maps")
        self.fingerprint = digest(*self._facts(metadata_files))

    def _facts(self, metadata_files: list[Path]) -> Iterator[Any]:
        """What the fingerprint depends on."""
        beside = self.paths if self._captions and self._sidecars else []
        texts = [path for path in map(_sidecar, beside) if path.is_file()]
        yield from (file_facts([*self.paths, *metadata_files, *texts], self.root), self.class_names)
        if self._boxes is not None:
            yield ["boxes", file_facts(self._boxes.files, self.root), self.box_names]
        if self._segmentation is not None:
            yield [file_facts(list(self._segmentation.values()), self.root), vars(self._label_maps)]
        if self._maps is not None:
            yield ["maps", file_facts(list(self._maps.values()), self.root)]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        record: dict[str, Any] = {"image": open_file(path)}
        if self.labels is not None:
            record["label"] = self.labels[index]
        if self._captions is not None:
            record["caption"] = self._caption(path) or ""
        if self._boxes is not None:
            record |= self._boxes.entries(path, record["image"])
        if self._segmentation is not None:
            file = self._segmentation[path]
            record["segmentation"] = self._label_maps.read(open_file(file), str(file))
        if self._maps is not None:
            record["map"] = read_map(open_file(self._maps[path]), str(self._maps[path]))
        return record

    def captions(self, indices: Iterable[int]) -> Iterator[str]:
        """Captions of these images, which are not opened; without those that cannot be read."""
        for i in indices if self._captions is not None else ():
            with suppress(*UNREADABLE):
                yield self._caption(self.paths[i]) or ""

    @cached_property
    def uncaptioned(self) -> list[int]:
        """Images that have no caption where others have one; an empty text file is one."""
        known = set(self.paths) if self._captions is None else self._captions
        lacking = ((i, path) for i, path in enumerate(self.paths) if path not in known)
        return [i for i, path in lacking if not (self._sidecars and _sidecar(path).is_file())]

    def name(self, index: int) -> str:
        return self.paths[index].relative_to(self.root).as_posix()

    def _caption(self, path: Path) -> str | None:
        """From the metadata, or from the text file beside the image; None if neither has one."""
        known, sidecar = (self._captions or {}).get(path), _sidecar(path)
        if known is not None or not self._sidecars or not sidecar.is_file():
            return known
        with sidecar.open(encoding="utf-8") as file:
            return file.read(LONGEST_CAPTION).strip()

    def _read_captions(self, metadata: Metadata, key: str | None) -> dict[Path, str] | None:
        """Captions of the metadata; None if there are no captions at all, not even in text files."""
        names = (key,) if key else CAPTION_NAMES[::-1]  # the last one counts
        rows = ((path, row[name]) for path, row in metadata.items() for name in names if row.get(name) is not None)
        found = {path: str(text)[:LONGEST_CAPTION] for path, text in rows}
        if key and not found:
            raise LatelierError(f"data.caption_key = {key!r} is in no metadata.csv or metadata.jsonl.")
        beside = self._sidecars and any(_sidecar(path).is_file() for path in self.paths)
        return found if found or beside else None

    def _class_of_each(self, metadata: Metadata, label_key: str | None) -> list[str] | None:
        """The class name of every image, from the metadata's label column or else from its folder."""
        key = label_key or "label"
        known = {path: str(row[key]) for path, row in metadata.items() if row.get(key) not in (None, "")}
        if known:
            if (path := next((path for path in self.paths if path not in known), None)) is not None:
                raise LatelierError(f"{path} has no {key!r} in the metadata of {self.root}; every image needs one.")
            return [known[path] for path in self.paths]
        if label_key:
            raise LatelierError(f"data.label_key = {key!r}, but no metadata file in {self.root} has that column.")
        names = [path.parent.relative_to(self.root).as_posix() for path in self.paths]
        return None if "." in names or not self._sidecars else names


class LabelMaps:
    """Which ids label maps may have; `classes` is their number or names, if known.

    Pixels of the id `ignored` (VOC, COCO-stuff and Cityscapes mark unlabelled pixels with 255) become one more class,
    the last, so that "unknown" is not mistaken for one of the classes. `count` includes it.
    """

    def __init__(self, classes: int | list[str] | None, ignored: int | None = None):
        self._classes = len(classes) if isinstance(classes, list) else classes
        self._ignored = ignored
        if self._classes is None and ignored is not None:
            raise LatelierError(f"data.ignore_id = {ignored} needs data.segmentation_classes, how many ids there are.")
        self.count = None if self._classes is None else self._classes + (ignored is not None)

    def read(self, stored: Image.Image | np.ndarray, name: str) -> np.ndarray:
        """Ids `(h, w)`: uint8 where they fit, else int32."""
        ids = np.asarray(stored)
        if ids.ndim != 2 or not (np.issubdtype(ids.dtype, np.integer) or ids.dtype == bool):
            raise LatelierError(f"The label map of {name} must be one channel of ids, not {ids.shape} of {ids.dtype}.")
        if self._classes is None or self.count is None:
            return ids.astype(np.uint8) if ids.dtype == bool else ids
        ignored = np.zeros(ids.shape, bool) if self._ignored is None else ids == self._ignored
        wrong = ((ids < 0) | (ids >= self._classes)) & ~ignored
        if wrong.any():
            allows = f"data.segmentation_classes = {self._classes} allows 0..{self._classes - 1}"
            hint = f"but {allows}; raise it, or set data.ignore_id."
            raise LatelierError(f"The label map of {name} has the id {ids[wrong][0]}, {hint}")
        ids = ids.astype(np.int32)
        ids[ignored] = self._classes
        return ids.astype(np.uint8) if self.count <= 256 else ids


def read_map(stored: Image.Image | np.ndarray, name: str) -> np.ndarray:
    """An image-like map, `(h, w)` or `(h, w, c)`, uint8 or uint16; other numbers have no fixed range."""
    if isinstance(stored, Image.Image):
        if stored.mode in ("P", "PA", "1"):
            stored = stored.convert("L" if stored.mode == "1" else "RGB")
        wide = stored.mode == "I" and stored.format == "PNG"  # how older versions of PIL open 16 bits
        stored = np.asarray(stored).astype(np.uint16) if wide else np.asarray(stored)
    if stored.dtype not in (np.uint8, np.uint16) or stored.ndim not in (2, 3):
        wanted, found = "(h, w) or (h, w, c) of 8 or 16 bits without sign", f"{stored.shape} of {stored.dtype}"
        raise LatelierError(f"The map of {name} must be {wanted}, not {found}.")
    return stored


def list_images(root: Path) -> list[Path]:
    """All image files below a folder, sorted, without hidden ones."""
    return sorted(path for path in _files_below(root) if path.suffix.lower() in SUFFIXES)


def _files_below(root: Path) -> Iterator[Path]:
    """All files that are not hidden. Links to folders are followed, but not back into a folder that they lie in."""
    above = {os.fspath(root): {os.path.realpath(root)}}  # real paths of a folder and of those that lead to it
    for folder, folders, files in os.walk(root, followlinks=True):
        within = above.pop(folder)
        real = {name: os.path.realpath(os.path.join(folder, name)) for name in folders if not name.startswith(".")}
        folders[:] = sorted(name for name in real if real[name] not in within)
        above |= {os.path.join(folder, name): within | {real[name]} for name in folders}
        yield from (Path(folder, name) for name in files if not name.startswith("."))


def split_folders(root: Path, split: str, val_split: str | None) -> dict[str, Path | None]:
    """Sub-folders that are the splits of a folder: `train` is None where the folder itself is the training split."""
    if not (root / split).is_dir():
        if split == "train" and val_split is None:
            return {"train": None, "val": None}
        raise LatelierError(f"The recipe names splits of {root}, but there is no folder {root / split}.")
    names = VAL_NAMES if val_split is None else (val_split,)
    val = next((root / name for name in names if name != split and (root / name).is_dir()), None)
    if val_split is not None and val is None:
        raise LatelierError(f"data.val_split = {val_split!r}, but there is no other folder {root / val_split}.")
    return {"train": root / split, "val": val}


def _read_metadata(root: Path) -> tuple[Metadata, list[Path]]:
    """All metadata tables below a folder, and their files."""
    rows: Metadata = {}
    files = sorted(path for path in _files_below(root) if path.name in METADATA and path.is_file())
    for path in files:
        with path.open(encoding="utf-8", newline="") as file:
            try:
                csv_rows = path.suffix == ".csv"
                table = list(csv.DictReader(file)) if csv_rows else [json.loads(s) for s in file if s.strip()]
            except (ValueError, RecursionError, csv.Error) as error:
                raise LatelierError(f"{path} cannot be read ({error}).") from None
        for row in table:
            if not isinstance(row, dict) or not isinstance(row.get("file_name"), str) or not row["file_name"]:
                raise LatelierError(f"{path} needs a column `file_name` with a value in every row.")
            rows[path.parent / row["file_name"]] = row
    return rows, files


def _partners(key: str, folder: Path, paths: list[Path], roots: list[Path]) -> dict[Path, Path]:
    """For each image the file in another folder with its name relative to one of the roots, whatever the suffix."""
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


def open_file(path: Path) -> Any:
    """An image, not decoded yet, or a memory-mapped array."""
    if not path.is_file():
        raise FileNotFoundError("it is a link that leads nowhere, or no file")  # a pipe might never end
    if (size := path.stat().st_size) > LARGEST_FILE:
        raise ValueError(f"the file has {size:,} bytes")
    # Mapped, an array whose header claims more than the file holds is refused before any memory is taken.
    return open_memmap(path, mode="r") if path.suffix.lower() == ".npy" else open_bytes(path.read_bytes())


def _sidecar(path: Path) -> Path:
    return path.with_suffix(".txt")
