"""Boxes around objects from COCO files, YOLO's text files, and tables of objects.

All become the entries `boxes`, `box_labels` and `box_flags` of a record, cut at the image's edges.
"""

from __future__ import annotations

import json
import os
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from PIL import Image

from latelier.data.records import VAL_NAMES, orientation
from latelier.errors import LatelierError

# Bits of a box's attributes, of COCO (`iscrowd`) and Open Images (the others).
FLAGS = {"iscrowd": 1, "isgroupof": 1, "isoccluded": 2, "isdepiction": 4, "isinside": 8}
OWN = ("boxes", "box_labels", "box_flags")
CATEGORY_KEYS = ("category", "categories", "label", "labels", "category_id")
NAME_FILES = ("data.yaml", "dataset.yaml", "classes.txt", "obj.names")
SPLIT = "{split}"  # in `data.boxes`: the name of the split
Entries = dict[str, np.ndarray]


class Numbering(NamedTuple):
    """Names of box classes, and the label of each value that stands for one in the files."""

    names: list[str]
    labels: dict[Any, int]

    @classmethod
    def of(cls, values: Iterable[Any], own: Sequence[str], like: list[str] | None, where: Any) -> Numbering:
        """Number values whose names are `own`, as in `like` if that is given."""
        names = list(own) if like is None else like
        for name in own:
            if name not in names:
                raise LatelierError(f"{where} has boxes of the class {name!r}, which the training images do not have.")
        return cls(names, {value: names.index(name) for value, name in zip(values, own)})

    def number(self, values: Iterable[Any], where: Any) -> list[int]:
        values = list(values)
        for value in values:
            if not isinstance(value, Hashable) or value not in self.labels:
                raise LatelierError(f"{where} has a box of the class {value!r}; there are {len(self.names)} classes.")
        return [self.labels[value] for value in values]


class Boxes:
    """The boxes of a folder's images."""

    names: list[str]  # of the classes, index = label
    files: list[Path]  # from which they are read, for fingerprints
    without_area = 0  # how many are left out for that, as far as it is known before images are read

    def knows(self, path: Path) -> bool:
        """Whether the image is listed; others are left out of the data."""
        return True

    def entries(self, path: Path, image: Image.Image | np.ndarray) -> Entries:
        raise NotImplementedError


class CocoBoxes(Boxes):
    """A COCO annotation file: `images`, `annotations` with `bbox` (x, y, w, h in pixels), `categories`.

    An image is found by the longest end of its path that is a `file_name`. Classes are in the order of their ids.
    """

    def __init__(self, file: Path, root: Path, paths: list[Path], like: list[str] | None = None):
        self.files = [file]
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            images = {image["id"]: image for image in content["images"]}
            categories = {c["id"]: str(c["name"]) for c in sorted(content["categories"], key=lambda c: c["id"])}
            found: dict[int, list[dict[str, Any]]] = {number: [] for number in images}
            for annotation in content["annotations"]:
                found[annotation["image_id"]].append(annotation)
            by_name = {Path(image["file_name"]).as_posix(): image for image in images.values()}
            flags = {number: list(map(_bits, annotations)) for number, annotations in found.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise LatelierError(f"data.boxes: {file} is no COCO annotation file ({error!r}).") from None
        self._numbering = Numbering.of(categories, list(categories.values()), like, file)
        self.names = self._numbering.names
        matches = {path: by_name[name] for path in paths if (name := _longest_end(path, root, by_name))}
        if not matches:
            raise LatelierError(
                f"data.boxes: {file} names none of the images in {root}; write {SPLIT} in data.boxes where files of "
                "several splits have the split's name."
            )
        first: dict[Any, Path] = {}
        for path, image in matches.items():
            if (other := first.setdefault(image["id"], path)) != path:
                raise LatelierError(f"data.boxes: {file}'s {image['file_name']} may be {other} or {path}.")
        self._entries: dict[Path, Entries | ValueError] = {}
        for path, image in matches.items():
            where, annotations = f"{file}, image {image['file_name']}", found[image["id"]]
            size = image.get("width"), image.get("height")
            if not all(isinstance(side, int | float) and side > 0 for side in size):
                raise LatelierError(f"{where} has no width and height, so its boxes are not known.")
            labels = self._numbering.number([a.get("category_id") for a in annotations], where)
            boxes = [a.get("bbox") for a in annotations]
            try:
                entries = self._entries[path] = pixel_entries(boxes, labels, flags[image["id"]], size, where)
                self.without_area += len(boxes) - len(entries["boxes"])
            except ValueError as error:  # the image is skipped for it, like one that cannot be read
                self._entries[path] = error

    def knows(self, path: Path) -> bool:
        return path in self._entries

    def entries(self, path: Path, image: Image.Image | np.ndarray) -> Entries:
        entries = self._entries[path]
        if isinstance(entries, ValueError):
            raise entries
        return entries


class YoloBoxes(Boxes):
    """Text files with a line `class cx cy w h` for each object, relative to the image's size.

    The file of `images/a/b.jpg` is `labels/a/b.txt`, or else beside the image; an image without one shows no objects.
    Classes are `names` in `data.yaml`, or the lines of `classes.txt`, in the folder of the images, of the labels, or in
    one of the two folders above.
    """

    def __init__(self, root: Path, paths: list[Path], like: list[str] | None = None):
        candidates = ((path, file) for path in paths for file in (path.with_suffix(".txt"), _labels_file(path)))
        self._files = {path: file for path, file in candidates if file and file.is_file()}  # the last one counts
        if not self._files:
            raise LatelierError(f"data.boxes = yolo, but no image in {root} has a file of labels.")
        labels = (_labels_file(root.resolve() / "x.jpg") or root / "x.txt").parent
        folders = [root, labels, root / "labels", *root.resolve().parents[:2]]
        names_files = (folder / name for folder in folders for name in NAME_FILES)
        names_file = next((file for file in names_files if file.is_file()), None)
        if names_file is None:
            file = root / "classes.txt"
            raise LatelierError(f"data.boxes = yolo needs the classes' names: write {file}, one a line.")
        own = _yolo_names(names_file)
        self._numbering = Numbering.of(range(len(own)), own, like, names_file)
        self.names = self._numbering.names
        self.files = [names_file, *self._files.values()]

    def entries(self, path: Path, image: Image.Image | np.ndarray) -> Entries:
        file = self._files.get(path)
        lines = file.read_text().splitlines() if file else []
        rows = [_yolo_line(line, f"{file}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
        labels = self._numbering.number([int(row[0]) for row in rows], file)
        _, centre, size = np.split(np.array(rows).reshape(-1, 5), [1, 3], axis=1)  # (n, 1), (n, 2), (n, 2)
        return relative_entries(np.hstack([centre - size / 2, centre + size / 2]), labels, [0] * len(rows))


class TableBoxes:
    """Boxes of a dataset's rows: a column `objects` as in Hugging Face's detection datasets, or our own columns `boxes`
    (relative x0 y0 x1 y1), `box_labels` and `box_flags`. `form` is `xywh` or `xyxy`, of `objects`.

    `columns` are those that are read, `names` those of the classes, None if they are not known.
    """

    def __init__(self, features: Any, form: str, where: str):
        self._form, self._where = form, where
        self.columns = [name for name in OWN if name in features] if "boxes" in features else []
        labels = features.get("box_labels")
        inner = _inner(features.get("objects"))
        if not self.columns and isinstance(inner, dict) and "bbox" in inner:
            self.columns = ["objects"]
            labels = next((inner[key] for key in CATEGORY_KEYS if key in inner), None)
        own = getattr(_inner(labels), "names", None)
        self._numbering = None if own is None else Numbering.of(range(len(own)), own, None, where)
        self.names: list[str] | None = own

    def number(self, table: Any, like: list[str] | None) -> None:
        """Number the classes like others; where the columns do not name them, all values are looked up."""
        if self.names is not None:
            self._numbering = Numbering.of(range(len(self.names)), self.names, like, self._where)
        elif self.columns == ["objects"]:
            self._numbering = _number_objects(((row, self._where) for row in table["objects"]), like, self._where)
        elif "box_labels" in self.columns:
            count = 1 + max((max(row, default=-1) for row in table["box_labels"]), default=-1)
            self._numbering = Numbering.of(range(count), list(map(str, range(count))), like, self._where)
        self.names = self._numbering.names if self._numbering else None

    def entries(self, row: dict[str, Any], image: Image.Image) -> Entries:
        if self.columns == ["objects"]:
            return object_entries(row["objects"], self._numbering, image, self._form, self._where)
        boxes = np.asarray(row["boxes"], np.float64).reshape(-1, 4)
        labels, flags = (list(row[name]) if name in row else [0] * len(boxes) for name in OWN[1:])
        if self._numbering is not None and "box_labels" in self.columns:
            labels = self._numbering.number(labels, self._where)
        found = relative_entries(boxes, labels, flags)
        return {name: found[name] for name in self.columns}


class ObjectBoxes(Boxes):
    """`objects` of images in a `metadata.jsonl`, as in Hugging Face's `imagefolder`; `form` is `xywh` or `xyxy`."""

    def __init__(self, rows: dict[Path, dict[str, Any]], form: str, like: list[str] | None = None):
        self.files, self._rows, self._form = [], rows, form
        objects = ((row.get("objects"), path) for path, row in rows.items())
        self._numbering = _number_objects(objects, like, "The metadata")
        self.names = self._numbering.names

    def entries(self, path: Path, image: Image.Image | np.ndarray) -> Entries:
        return object_entries(self._rows.get(path, {}).get("objects"), self._numbering, image, self._form, path)


def annotation_file(
    boxes: str | None, split: str, train_name: str, val_name: str | None, folder: str | None = None
) -> Path | None:
    """The COCO file of a split; `{split}` in `boxes` is its folder's name, or else `data.split` or `data.val_split`."""
    if boxes is None or boxes == "yolo":
        return None
    names: tuple[str, ...] = (train_name,) if split == "train" else VAL_NAMES
    if folder or (split == "val" and val_name):
        names = (folder or val_name or "",)
    files = [Path(os.path.expanduser(boxes.replace(SPLIT, name))) for name in names]
    return next((file for file in files if file.is_file()), files[0])


def _number_objects(rows: Iterable[tuple[Any, Any]], like: list[str] | None, where: Any) -> Numbering:
    """Classes that are known by their values alone, sorted."""
    try:
        distinct = {value for objects, name in rows for value in object_columns(objects, name)[1]}
        values = sorted(distinct, key=lambda value: (isinstance(value, str), value))
    except (ValueError, TypeError, IndexError, OverflowError):
        raise LatelierError(f"{where}: `objects` needs a class, and numbers as flags, for each box.") from None
    return Numbering.of(values, list(map(str, values)), like, where)


def object_columns(objects: Any, where: Any) -> tuple[list[Any], list[Any], list[int]]:
    """Boxes, classes and flags of `objects`: lists under `bbox`, `category`, `iscrowd`, ..., or a list of dicts."""
    if objects is None:
        return [], [], []
    if isinstance(objects, list) and all(isinstance(item, dict) for item in objects):
        objects = {key: [item.get(key) for item in objects] for key in (objects[0] if objects else ())}
        objects = objects or {"bbox": [], "category": []}
    key = next((key for key in CATEGORY_KEYS if key in objects), None) if isinstance(objects, dict) else None
    boxes, values = (objects.get("bbox"), objects.get(key)) if key else (None, None)
    if not isinstance(boxes, list) or not isinstance(values, list) or len(boxes) != len(values):
        raise LatelierError(f"{where}: `objects` needs `bbox` and `category`, lists of the same length.")
    flagged = {name: column for name, column in objects.items() if name.replace("_", "").lower() in FLAGS}
    flags = [_bits({name: column[i] for name, column in flagged.items()}) for i in range(len(boxes))]
    return boxes, values, flags


def object_entries(
    objects: Any, numbering: Numbering | None, image: Image.Image | np.ndarray, form: str, where: Any
) -> Entries:
    """The entries of `objects`, whose boxes are pixels of the upright image; cameras may store it turned.

    Without a numbering the values are the labels; `form` is `xywh` (corner and size) or `xyxy` (two corners).
    """
    boxes, values, flags = object_columns(objects, where)
    if numbering is None and any(isinstance(value, str) for value in values):
        raise LatelierError(f"{where}: box classes are not known in a stream; set data.streaming=false.")
    labels = values if numbering is None else numbering.number(values, where)
    size = image.shape[1::-1] if isinstance(image, np.ndarray) else image.size
    upright = size[::-1] if isinstance(image, Image.Image) and orientation(image) >= 5 else size
    return pixel_entries(boxes, labels, flags, upright, where, form)


def pixel_entries(
    boxes: list[Any], labels: list[int], flags: list[int], size: tuple[int, int], where: Any, form: str = "xywh"
) -> Entries:
    try:
        array = np.array(boxes, np.float64).reshape(len(boxes), 4)
    except (ValueError, TypeError, OverflowError):
        raise LatelierError(f"{where}: a `bbox` must be four numbers, {form}.") from None
    if form == "xywh":
        array = np.hstack([array[:, :2], array[:, :2] + array[:, 2:]])
    return relative_entries(array / np.array([*size, *size]), labels, flags)


def relative_entries(boxes: np.ndarray, labels: Sequence[int], flags: Sequence[int]) -> Entries:
    """Entries from relative boxes `(n, 4)`, cut at the image's edges; those without area are left out."""
    if not np.isfinite(boxes).all():
        raise ValueError(f"the box {boxes[~np.isfinite(boxes).all(1)][0].tolist()} is not finite")
    boxes = boxes.clip(0, 1).astype(np.float32)
    kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    numbers = {"box_labels": np.array(labels, np.int64)[kept], "box_flags": np.array(flags, np.int64)[kept]}
    return {"boxes": boxes[kept], **numbers}


def _inner(feature: Any) -> Any:
    """The feature of the items of a column of lists."""
    while hasattr(feature, "feature"):
        feature = feature.feature
    return feature


def _bits(attributes: dict[str, Any]) -> int:
    """The flags of a box; Open Images writes -1 for "not known"."""
    bits = 0
    for name, value in attributes.items():
        flag = FLAGS.get(name.replace("_", "").lower())
        bits |= flag if flag and value is not None and int(value) > 0 else 0
    return bits


def _longest_end(path: Path, root: Path, names: dict[str, Any]) -> str | None:
    """The longest end of a path, from its root's name on, that is one of the names."""
    parts = path.relative_to(root.parent).parts if path.is_relative_to(root.parent) else path.parts
    return next((end for i in range(len(parts)) if (end := "/".join(parts[i:])) in names), None)


def _labels_file(path: Path) -> Path | None:
    """`.../labels/a/b.txt` for `.../images/a/b.jpg`."""
    parts = list(path.parts)
    if "images" not in parts[:-1]:
        return None
    last = len(parts) - 2 - parts[:-1][::-1].index("images")
    return Path(*parts[:last], "labels", *parts[last + 1 :]).with_suffix(".txt")


def _yolo_names(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix != ".yaml":
            return [line.strip() for line in text.splitlines() if line.strip()]
        names = yaml.safe_load(text)["names"]
        if isinstance(names, dict):
            names = [names[i] for i in range(len(names))]
    except (OSError, ValueError, TypeError, KeyError, RecursionError, yaml.YAMLError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str | int | float) for name in names):
        raise LatelierError(f"{file} needs `names`: a list, or a name for each of 0, 1, 2, ...")
    return [str(name) for name in names]


def _yolo_line(line: str, where: str) -> list[float]:
    try:
        label, cx, cy, w, h = map(float, line.split())
    except ValueError:
        raise LatelierError(f"{where}: {line[:40]!r} is not five numbers, class cx cy w h.") from None
    return [label, cx, cy, w, h]
