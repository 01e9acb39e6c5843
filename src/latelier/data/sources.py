"""Where images come from: a source is a sequence of records; `open_source` finds the one that a recipe means.

A record is a dict with `image` and any of `label`, `caption`, `boxes`, `box_labels`, `box_flags`, `segmentation`,
`mask`, `map`. Images are opened but not decoded here; `latelier.data.transforms` does that.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from latelier.errors import LatelierError
from latelier.recipe import Data

if TYPE_CHECKING:
    from latelier.data.tables import StreamSource

VAL_NAMES = ("val", "valid", "validation", "test")  # looked for in this order
GENERATED_LENGTH = 20_000


@runtime_checkable
class Source(Protocol):
    """A finite sequence of records.

    A source may also have `box_names` (names of the classes of boxes, index = box label), `segmentation_classes` (how
    many ids its label maps have), and `captions(indices)`, which yields captions without opening images.

    Attributes:
        class_names: names of the classes, index = label; None if there are no labels.
        labels: the label of every record; None if there are none, or if they are not known before a record is read.
        fingerprint: changes when the images change.
    """

    class_names: list[str] | None
    labels: list[int] | None
    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Record `index`; raises what PIL raises if the image cannot be read."""

    def name(self, index: int) -> str:
        """What to call the image in messages."""


class Selection:
    """Some records of a source, in a given order, with labels renumbered if `classes` is given.

    Args:
        source: all records.
        indices: which to use.
        classes: the new class names, among the source's; every selected record must have one of them.
    """

    def __init__(self, source: Source, indices: Sequence[int], classes: list[str] | None = None):
        self.source, self.indices = source, list(indices)
        old = source.class_names
        self.class_names = classes or old
        self.box_names: list[str] | None = getattr(source, "box_names", None)
        self.segmentation_classes: int | None = getattr(source, "segmentation_classes", None)
        self._new = {old.index(name): i for i, name in enumerate(classes)} if classes and old else None
        self.labels = None if source.labels is None else [self._label(source.labels[i]) for i in self.indices]
        self.fingerprint = digest(source.fingerprint, self.indices, classes)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.source[self.indices[index]]
        return {**record, "label": self._label(record["label"])} if "label" in record else record

    def captions(self, indices: Iterable[int]) -> Iterator[str]:
        """Captions of these records; none if there are none."""
        return captions_of(self.source, [self.indices[i] for i in indices])

    def name(self, index: int) -> str:
        """The name that the source gives it."""
        return self.source.name(self.indices[index])

    def _label(self, label: int) -> int:
        return label if self._new is None else self._new[label]


def open_source(data: Data, split: str = "train") -> Source | StreamSource:
    """The images of a recipe.

    Args:
        data: the recipe's section.
        split: `train`, or `val`: the source's own validation split, `val_source`, or what is held out.

    Returns:
        A `Source`, or with `data.streaming` a `latelier.data.tables.StreamSource`.

    Raises:
        LatelierError: if there is no such source, it has no images, or a class is unknown.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split must be 'train' or 'val', not {split!r}.")
    _check_annotations(data)
    if data.streaming:
        from latelier.data.tables import open_stream

        if data.source in ("emoji", "scenes"):
            raise LatelierError(f"data.streaming is for datasets; set it to false for the source {data.source!r}.")
        return open_stream(data, split)
    if data.source == "scenes":
        from latelier.data.scenes import SceneSource

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
        from latelier.data.emoji import EmojiSource

        return EmojiSource(split)
    source, has_own = _open(data, data.source, "train")
    if split == "train":
        return source if has_own or data.val_source else hold_out(source, data.val_fraction, "train")
    if data.val_source or has_own:
        return _open(data, data.val_source or data.source, "val", source)[0]
    if not data.val_fraction:
        raise LatelierError(
            f"{data.source} has no validation split; set data.val_split, data.val_source or data.val_fraction."
        )
    return hold_out(source, data.val_fraction, "val")


def _open(data: Data, where: str, split: str, like: Source | None = None) -> tuple[Source, bool]:
    """One split of a folder or dataset, numbered like another, and whether it has a validation split of its own."""
    from latelier.data.boxes import SPLIT, annotation_file
    from latelier.data.folder import FolderSource, split_folders

    class_names, box_names = (like.class_names, getattr(like, "box_names", None)) if like else (None, None)
    path = Path(where).expanduser()
    if where == "emoji":
        from latelier.data.emoji import EmojiSource

        return EmojiSource(split), True
    if not path.is_dir():
        from latelier.data.tables import open_table

        return open_table(data, where, split, class_names, box_names)
    if where == data.val_source and data.val_split is None:
        return FolderSource(path, data, class_names, split, box_names=box_names), False
    folders = split_folders(path, data)
    has_val = folders["val"] is not None
    if folders["train"] is None and SPLIT in (data.boxes or ""):  # one folder; which images, the files say
        file = annotation_file(data, "val")
        has_val = file is not None and file.is_file()
    return FolderSource(folders[split] or path, data, class_names, split, path, box_names), has_val


def _check_annotations(data: Data) -> None:
    """Refuse files of annotations for images that are not in files, and grounds of images that have theirs."""
    if data.backgrounds is not None and data.source != "scenes":
        raise LatelierError(f"data.backgrounds is for the source scenes; remove it for the source {data.source!r}.")
    for key in ("boxes", "segmentation", "maps"):
        if getattr(data, key) is not None and data.source in ("emoji", "scenes"):
            raise LatelierError(f"data.{key} is for folders and datasets; remove it for the source {data.source!r}.")


def captions_of(source: Source, indices: Iterable[int]) -> Iterator[str]:
    """Captions of some records, without opening images where the source can; none if there are none."""
    if hasattr(source, "captions"):
        yield from source.captions(indices)
        return
    for index in indices:
        record = source[index]
        if "caption" in record:
            yield record["caption"]


def select_classes(source: Source, classes: list[str] | None) -> Source:
    """Only the records of these classes, labels numbered in this order.

    Raises:
        LatelierError: if there are no classes, or not this one.
    """
    if classes is None:
        return source
    check_classes(classes, source.class_names)
    assert source.class_names is not None
    assert source.labels is not None
    wanted = {source.class_names.index(name) for name in classes}
    return Selection(source, [i for i, label in enumerate(source.labels) if label in wanted], classes)


def check_classes(classes: list[str], known: list[str] | None) -> None:
    """Refuse classes that are not known.

    Raises:
        LatelierError: naming the first of them and the nearest known one.
    """
    if known is None:
        raise LatelierError("data.classes is set, but the images have no labels; set data.label_key or remove it.")
    for name in classes:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.5)
            everything = f"known: {', '.join(known[:20])}; data.classes=null takes all."
            hint = f"did you mean {near[0]!r}?" if near else everything
            raise LatelierError(f"Unknown class {name!r}; {hint}")


def subsample(source: Source, length: int) -> Source:
    """`length` records, spread evenly over the source."""
    size = len(source)
    return source if length >= size else Selection(source, [i * size // length for i in range(length)])


def hold_out(source: Source, fraction: float, split: str) -> Source:
    """A part of a source that does not change when images are added: chosen by a hash of their names.

    Args:
        source: all images.
        fraction: share that belongs to `val`; at least one image does if it is above 0.
        split: `train` or `val`.
    """
    if not fraction:
        return source
    places = [name_hash(source.name(i)) for i in range(len(source))]
    limit = max(fraction, min(places) + 2**-32)
    return Selection(source, [i for i, place in enumerate(places) if (place < limit) == (split == "val")])


def name_hash(name: str) -> float:
    """A number in [0, 1) that depends on the name only."""
    return int.from_bytes(hashlib.md5(name.encode("utf-8", "surrogateescape")).digest()[:4], "big") / 2**32


def digest(*parts: Any) -> str:
    """A short stable hash of JSON-like values."""
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def file_facts(paths: Sequence[Path], root: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of files: what a fingerprint of them is made from."""
    facts = []
    for path in paths:
        status = path.stat()
        facts.append((os.path.relpath(path, root), status.st_size, status.st_mtime_ns))
    return facts


def looks_like_hub_name(where: str) -> bool:
    """`user/name`, which is not a file here."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", where)) and not Path(where).exists()
