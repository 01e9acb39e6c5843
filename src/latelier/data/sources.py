"""Where images come from: `open_source` finds the source that a recipe names; `Selection` is some of its records."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from latelier.data.boxes import SPLIT, annotation_file
from latelier.data.builtin import EmojiSource, SceneSource
from latelier.data.folder import FolderSource, split_folders
from latelier.data.records import Source, check_classes, digest, name_hash
from latelier.data.tables import StreamSource, open_stream, open_table
from latelier.errors import LatelierError
from latelier.recipe import Data

GENERATED_LENGTH, BUILT_IN = 20_000, ("emoji", "scenes")


class Selection:
    """Some records of a source, in a given order; `classes`, some of its class names, renumber the labels."""

    def __init__(self, source: Source, indices: Sequence[int], classes: list[str] | None = None):
        self.source, self.indices = source, list(indices)
        old = source.class_names
        self.class_names = classes or old
        self.box_names: list[str] | None = getattr(source, "box_names", None)
        self.segmentation_classes: int | None = getattr(source, "segmentation_classes", None)
        self.boxes_without_area: int = getattr(source, "boxes_without_area", 0)
        self.mirrored_captions: bool = getattr(source, "mirrored_captions", False)
        self._new = {old.index(name): i for i, name in enumerate(classes)} if classes and old else None
        self.labels = None if source.labels is None else [self._label(source.labels[i]) for i in self.indices]
        self.fingerprint = digest(source.fingerprint, self.indices, classes)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.source[self.indices[index]]
        return {**record, "label": self._label(record["label"])} if "label" in record else record

    def captions(self, indices: Iterable[int]) -> Iterator[str]:
        return captions_of(self.source, [self.indices[i] for i in indices])

    @property
    def uncaptioned(self) -> list[int]:
        lacking = set(getattr(self.source, "uncaptioned", ()))
        return [i for i, index in enumerate(self.indices) if index in lacking]

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])

    def _label(self, label: int) -> int:
        return label if self._new is None else self._new[label]


def open_source(data: Data, split: str = "train") -> Source | StreamSource:
    """The images of a recipe's `data` section; a `StreamSource` with `data.streaming`.

    The split is `train`, or `val`: the source's own validation split, `val_source`, or what is held out.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split must be 'train' or 'val', not {split!r}.")
    if data.backgrounds is not None and data.source != "scenes":
        raise LatelierError(f"data.backgrounds is for the source scenes; remove it for the source {data.source!r}.")
    for key in ("boxes", "segmentation", "maps"):
        if getattr(data, key) is not None and data.source in BUILT_IN:
            raise LatelierError(f"data.{key} is for folders and datasets; remove it for the source {data.source!r}.")
    if data.streaming:
        if data.source in BUILT_IN:
            raise LatelierError(f"data.streaming is for datasets; set it to false for the source {data.source!r}.")
        return open_stream(data, split)
    if data.source == "scenes":
        length = GENERATED_LENGTH if data.length is None else data.length
        if split == "val":
            length = max(1, round(length * data.val_fraction))
        return SceneSource(data.image_size, length, split, data.classes, data.backgrounds or "varied")
    source = select_classes(_open_split(data, split), data.classes)
    if split == "train" and data.length is not None:
        source = subsample(source, data.length)
    if not len(source):
        raise LatelierError(f"data.source = {data.source!r} has no images left for its {split} split.")
    return source


def _open_split(data: Data, split: str) -> Source:
    """The split of a source; labels are always numbered as in the training split."""
    if data.source == "emoji" and (split == "train" or not data.val_source):
        return EmojiSource(split)
    source, has_own = _open(data, data.source, "train")
    if split == "train":
        return source if has_own or data.val_source else hold_out(source, data.val_fraction, "train")
    if data.val_source or has_own:
        return _open(data, data.val_source or data.source, "val", source)[0]
    if not data.val_fraction:
        ways = "data.val_split, data.val_source or data.val_fraction"
        raise LatelierError(f"{data.source} has no validation split; set {ways}.")
    return hold_out(source, data.val_fraction, "val")


def _open(data: Data, where: str, split: str, like: Source | None = None) -> tuple[Source, bool]:
    """One split of a folder or dataset, numbered like another, and whether it has a validation split of its own."""
    class_names, box_names = (like.class_names, getattr(like, "box_names", None)) if like else (None, None)
    path = Path(os.path.expanduser(where))  # that of pathlib raises where there is no such user
    if where == "emoji":
        return EmojiSource(split), True
    if not os.path.isdir(path):  # pathlib's raises where a name is too long
        return open_table(data, where, split, class_names, box_names)
    if where == data.val_source and data.val_split is None:
        return FolderSource(path, data, class_names, split, box_names=box_names), False
    folders = split_folders(path, data.split, data.val_split)
    has_val = folders["val"] is not None
    if folders["train"] is None and SPLIT in (data.boxes or ""):  # one folder, whose split the annotation files tell
        file = annotation_file(data.boxes, "val", data.split, data.val_split)
        has_val = file is not None and file.is_file()
    return FolderSource(folders[split] or path, data, class_names, split, path, box_names), has_val


def captions_of(source: Source, indices: Iterable[int]) -> Iterator[str]:
    """Captions of some records, without opening images where the source can."""
    if hasattr(source, "captions"):
        yield from source.captions(indices)
    else:
        yield from (record["caption"] for record in map(source.__getitem__, indices) if "caption" in record)


def select_classes(source: Source, classes: list[str] | None) -> Source:
    """Only the records of these classes, numbered in this order; all for None."""
    if classes is None:
        return source
    check_classes(classes, source.class_names)
    wanted = {(source.class_names or []).index(name) for name in classes}
    return Selection(source, [i for i, label in enumerate(source.labels or []) if label in wanted], classes)


def subsample(source: Source, length: int) -> Source:
    """`length` records, spread evenly over the source."""
    size = len(source)
    return source if length >= size else Selection(source, [i * size // length for i in range(length)])


def hold_out(source: Source, fraction: float, split: str) -> Source:
    """`train` or `val` (a `fraction`, at least one image if it is above 0) of a source without splits.

    Images are held out by a hash of their names, so that added ones do not move others.
    """
    if not fraction:
        return source
    hashes = [name_hash(source.name(i)) for i in range(len(source))]
    limit = max(fraction, min(hashes) + 2**-32)
    return Selection(source, [i for i, value in enumerate(hashes) if (value < limit) == (split == "val")])
