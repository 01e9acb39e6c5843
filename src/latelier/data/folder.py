"""A folder of images: class folders become labels, captions come from text files or a metadata table.

Boxes, label maps and maps come from files that are named in the recipe, see `latelier.data.boxes` and
`latelier.data.planes`.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latelier.data.boxes import annotation_file, folder_boxes
from latelier.data.planes import LabelMaps, open_plane, partners, read_map
from latelier.data.sources import VAL_NAMES, check_classes, digest, file_facts
from latelier.errors import LatelierError
from latelier.recipe import Data

SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".avif", ".jp2", ".npy",
}  # fmt: skip
METADATA = ("metadata.csv", "metadata.jsonl")
CAPTION_NAMES = ("caption", "text")


class FolderSource:
    """Images below a folder, sorted by name.

    The folder of an image, relative to the root, is its class, unless images lie in the root itself. A
    `metadata.csv` or `metadata.jsonl` with a `file_name` column, as in Hugging Face's `imagefolder`, gives captions
    and labels; so does, for captions, a `.txt` file beside each image. Multi-channel images that PIL cannot open
    may be `.npy` files of `(h, w, c)` uint8. With `data.boxes: yolo` text files hold boxes instead, and folders such as
    `images` are no classes. With a COCO file only the images that it lists are used.

    Args:
        root: the folder.
        data: the recipe's section, for `label_key`, `caption_key`, `boxes`, `segmentation` and `maps`.
        class_names: numbering of the classes; by default all classes found, sorted.
        split: `train` or `val`, for COCO files that have the split in their name.
        top: folder of the splits, to which the names of label maps and maps may be relative; by default `root`.
        box_names: numbering of the classes of boxes; by default as the files have it.

    Raises:
        LatelierError: if there are no images, a class is not in `class_names`, or what the recipe names is not there.
    """

    def __init__(
        self,
        root: Path,
        data: Data,
        class_names: list[str] | None = None,
        split: str = "train",
        top: Path | None = None,
        box_names: list[str] | None = None,
    ):
        self.root, top = root, top or root
        maps = [Path(folder).expanduser().resolve() for folder in (data.segmentation, data.maps) if folder]
        paths = [path for path in list_images(root) if not _lies_in(path, maps)]
        if not paths:
            raise LatelierError(f"There are no images in {root}; it needs files such as .jpg, .png or .webp.")
        metadata, metadata_files = _read_metadata(root)
        file = annotation_file(data, split, root.name if root != top else None)
        self._boxes = folder_boxes(data, file, root, paths, metadata, box_names)
        self.box_names = self._boxes.names if self._boxes else None
        self.paths = [path for path in paths if self._boxes is None or self._boxes.knows(path)]
        self._sidecars = data.boxes != "yolo"  # else text files hold boxes
        self._captions = _captions(self.paths, metadata, data)
        self._number(_class_of_each(self.paths, root, metadata, data), class_names)
        beside = self._captions and self._sidecars
        extra = [path for path in map(_sidecar, self.paths) if path.is_file()] if beside else []
        facts = [file_facts([*self.paths, *metadata_files, *extra], root), self.class_names]
        self._open_planes(data, [top, root])
        self.fingerprint = digest(*facts, *self._more_facts())

    def _number(self, named: list[str] | None, class_names: list[str] | None) -> None:
        """Labels from the images' class names."""
        self.class_names: list[str] | None = None
        self.labels: list[int] | None = None
        if named is not None:
            self.class_names = class_names or sorted(set(named))
            check_classes(sorted(set(named)), self.class_names)
            number = {name: i for i, name in enumerate(self.class_names)}
            self.labels = [number[name] for name in named]

    def _open_planes(self, data: Data, roots: list[Path]) -> None:
        """Find the images' label maps and maps."""
        self._label_maps = LabelMaps(data)
        self.segmentation_classes = self._label_maps.count if data.segmentation else None
        if data.segmentation and self.segmentation_classes is None:
            raise LatelierError("data.segmentation needs data.segmentation_classes, how many ids the label maps have.")
        self._segmentation, self._maps = (
            partners(f"data.{key}", Path(folder).expanduser(), self.paths, roots) if folder else None
            for key, folder in (("segmentation", data.segmentation), ("maps", data.maps))
        )

    def _more_facts(self) -> list[Any]:
        """What the fingerprint depends on beside images, captions and classes."""
        facts: list[Any] = []
        if self._boxes is not None:
            facts.append(["boxes", file_facts(self._boxes.files, self.root), self.box_names])
        if self._segmentation is not None:
            facts.append([file_facts(list(self._segmentation.values()), self.root), vars(self._label_maps)])
        if self._maps is not None:
            facts.append(["maps", file_facts(list(self._maps.values()), self.root)])
        return facts

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        record: dict[str, Any] = {"image": np.load(path) if path.suffix == ".npy" else open_bytes(path.read_bytes())}
        if self.labels is not None:
            record["label"] = self.labels[index]
        if self._captions is not None:
            record["caption"] = self._caption(path)
        if self._boxes is not None:
            record |= self._boxes.entries(path, record["image"])
        if self._segmentation is not None:
            file = self._segmentation[path]
            record["segmentation"] = self._label_maps.read(open_plane(file), str(file))
        if self._maps is not None:
            file = self._maps[path]
            record["map"] = read_map(open_plane(file), str(file))
        return record

    def captions(self, indices: Iterable[int]) -> Iterator[str]:
        """Captions of these images, which are not opened; none if there are none."""
        if self._captions is not None:
            yield from (self._caption(self.paths[i]) for i in indices)

    def _caption(self, path: Path) -> str:
        known = (self._captions or {}).get(path)
        if known is not None or not self._sidecars:
            return known or ""
        return _sidecar_text(path)

    def name(self, index: int) -> str:
        return self.paths[index].relative_to(self.root).as_posix()


def open_bytes(content: bytes) -> Image.Image:
    """An image whose header is read and whose pixels are not decoded yet."""
    return Image.open(io.BytesIO(content))


def list_images(root: Path) -> list[Path]:
    """All image files below a folder, sorted; hidden files and folders are left out."""
    found = []
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            Path(folder, name)
            for name in files
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES
        ]
    return sorted(found)


def _lies_in(path: Path, folders: list[Path]) -> bool:
    """Whether a file is a label map or a map: they may be kept below the folder of images."""
    return bool(folders) and any(path.resolve().is_relative_to(folder) for folder in folders)


def split_folders(root: Path, data: Data) -> dict[str, Path | None]:
    """Sub-folders that are the splits of a folder: `train` is None where the folder itself is the training split.

    Raises:
        LatelierError: if a split that the recipe names is not there.
    """
    if not (root / data.split).is_dir():
        if data.split == "train" and data.val_split is None:
            return {"train": None, "val": None}
        raise LatelierError(f"The recipe names splits of {root}, but there is no folder {root / data.split}.")
    vals = VAL_NAMES if data.val_split is None else (data.val_split,)
    val = next((root / name for name in vals if name != data.split and (root / name).is_dir()), None)
    if data.val_split is not None and val is None:
        raise LatelierError(
            f"data.val_split = {data.val_split!r}, but there is no other folder {root / data.val_split}."
        )
    return {"train": root / data.split, "val": val}


def _read_metadata(root: Path) -> tuple[dict[Path, dict[str, Any]], list[Path]]:
    """Rows of all metadata tables below a folder, by the image's path."""
    rows: dict[Path, dict[str, Any]] = {}
    files = sorted(path for name in METADATA for path in root.rglob(name))
    for path in files:
        with path.open(encoding="utf-8", newline="") as file:
            try:
                table = (
                    list(csv.DictReader(file)) if path.suffix == ".csv" else [json.loads(s) for s in file if s.strip()]
                )
            except (ValueError, csv.Error) as error:
                raise LatelierError(f"{path} cannot be read ({error}).") from None
        for row in table:
            if not row.get("file_name"):
                raise LatelierError(f"{path} needs a column `file_name` with a value in every row.")
            rows[path.parent / row["file_name"]] = row
    return rows, files


def _class_of_each(paths: list[Path], root: Path, metadata: dict[Path, dict[str, Any]], data: Data) -> list[str] | None:
    """The class name of every image, from the metadata's label column or else from its folder."""
    key = data.label_key or "label"
    if any(row.get(key) not in (None, "") for row in metadata.values()):
        for path in paths:
            if metadata.get(path, {}).get(key) in (None, ""):
                raise LatelierError(f"{path} has no {key!r} in the metadata of {root}; every image needs one.")
        return [str(metadata[path][key]) for path in paths]
    if data.label_key:
        raise LatelierError(f"data.label_key = {data.label_key!r}, but no metadata file in {root} has that column.")
    if data.boxes == "yolo":
        return None
    names = [path.parent.relative_to(root).as_posix() for path in paths]
    return None if "." in names else names


def _captions(paths: list[Path], metadata: dict[Path, dict[str, Any]], data: Data) -> dict[Path, str] | None:
    """Captions known from the metadata; None if the images have no captions at all, not even beside them."""
    keys = (data.caption_key,) if data.caption_key else CAPTION_NAMES
    found = {}
    for path, row in metadata.items():
        text = next((row[key] for key in keys if row.get(key) is not None), None)
        if text is not None:
            found[path] = str(text)
    if data.caption_key and not found:
        raise LatelierError(f"data.caption_key = {data.caption_key!r} is in no metadata.csv or metadata.jsonl.")
    return found if found or (data.boxes != "yolo" and any(_sidecar(path).is_file() for path in paths)) else None


def _sidecar(path: Path) -> Path:
    return path.with_suffix(".txt")


def _sidecar_text(path: Path) -> str:
    """The text beside an image; without a text file an image's caption is empty."""
    sidecar = _sidecar(path)
    return sidecar.read_text(encoding="utf-8").strip() if sidecar.is_file() else ""
