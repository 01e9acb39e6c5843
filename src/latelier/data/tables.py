"""Images from any dataset of Hugging Face's `datasets`: the Hub, parquet files, webdataset shards, streams."""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from latelier.data.boxes import TableBoxes
from latelier.data.folder import CAPTION_NAMES, LONGEST_CAPTION, LabelMaps, read_map
from latelier.data.records import VAL_NAMES, check_classes, digest, file_facts, name_hash, number_classes, open_bytes
from latelier.errors import LatelierError
from latelier.keyed_random import fold_in
from latelier.recipe import Data

BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # user/name
LABEL_NAMES = ("label", "cls")
KNOWN = ("boxes", "box_labels", "segmentation", "mask", "box_flags")
LABEL_MAPS = ("segmentation", "annotation", "label_map")
CAPTIONS_AT_ONCE = 1_000
SHUFFLE_BUFFER = 1_000
ROW_NUMBER = "row number"


class _RowSource:
    """A table, called `where` in messages, and which of its columns hold what."""

    def __init__(self, features: Any, data: Data, where: str):
        from datasets import Image

        if data.boxes is not None:
            columns = "columns, `objects` or `boxes`"
            raise LatelierError(f"data.boxes is for folders; boxes of {where} are {columns}; remove it.")
        images = [name for name, feature in features.items() if isinstance(feature, Image)]
        alone = data.image_key == "image" and len(images) == 1
        for key in ("label_key", "caption_key", "segmentation", "maps", *(() if alone else ("image_key",))):
            if (name := getattr(data, key)) is not None and name not in features:
                raise LatelierError(f"data.{key} = {name!r} is no column of {where}; it has: {', '.join(features)}.")
        if data.maps is not None and data.maps not in images:
            raise LatelierError(f"data.maps = {data.maps!r} is no column of images.")
        self.image = data.image_key if data.image_key in features else images[0]
        self.label = data.label_key or next((name for name in LABEL_NAMES if name in features), None)
        self.caption = data.caption_key or next((n for n in (*CAPTION_NAMES, "txt") if n in features), None)
        self.others = [name for name in KNOWN if name in features]
        self.label_names: list[str] | None = getattr(features[self.label], "names", None) if self.label else None
        self.boxes = TableBoxes(features, data.box_format, where)
        label_maps = ["segmentation"] if "segmentation" in features else [n for n in LABEL_MAPS if n in images]
        self.segmentation, self.map = data.segmentation or next(iter(label_maps), None), data.maps
        self._label_maps = LabelMaps(data.segmentation_classes, data.ignore_id)
        self._where, self._form = where, data.box_format
        self.segmentation_classes = self._label_maps.count if self.segmentation else None
        self.class_names: list[str] | None = None
        self.box_names = self.boxes.names

    def name(self, index: int) -> str:
        return f"row {index} of {self._where}"

    def about(self) -> list[Any]:
        """What a fingerprint depends on."""
        keys = ("image", "label", "caption", "others", "label_names")
        more: list[Any] = []
        if self.map or self.segmentation_classes or self.segmentation not in (None, "segmentation"):
            more.append([self.map, self.segmentation, vars(self._label_maps)])
        if self.boxes.columns == ["objects"]:
            more.append([self._form, self.boxes.names])
        return [{key: getattr(self, key) for key in keys}, *more]

    def undecoded(self, table: Any) -> Any:
        """The same table without unused columns, its images as file contents."""
        from datasets import Image

        wanted = [self.image, self.label, self.caption, *self.others, *self.boxes.columns, self.segmentation, self.map]
        table = table.select_columns(list(dict.fromkeys(name for name in wanted if name is not None)))
        for name in (self.image, self.segmentation, self.map):
            if name is not None and isinstance(table.features[name], Image):
                table = table.cast_column(name, Image(decode=False))
        return table

    def _record(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row as a record; its label is not numbered yet and left out."""
        image = self._opened(row[self.image])
        record: dict[str, Any] = {"image": image}
        if self.caption is not None:
            record["caption"] = self._text(row[self.caption])
        if self.boxes.columns:
            record |= self.boxes.entries(row, image)
        if self.segmentation is not None:
            stored = row[self.segmentation]
            plane = self._opened(stored) if isinstance(stored, dict) else np.asarray(stored)
            record["segmentation"] = self._label_maps.read(plane, f"a row of {self._where}")
        if "mask" in self.others:
            record["mask"] = np.asarray(row["mask"])
        if self.map is not None:
            record["map"] = read_map(self._opened(row[self.map]), f"a row of {self._where}")
        return record

    def _text(self, caption: Any) -> str:
        if not isinstance(caption, str | None):
            raise LatelierError(f"{self._where}: captions must be text, not {caption!r:.40}; see data.caption_key.")
        return (caption or "")[:LONGEST_CAPTION]

    def _opened(self, stored: Any) -> Image:
        """The image in a row: bytes, by themselves or as `datasets` keeps them. No file that a row names is opened,
        except one of a dataset of the Hub where `datasets` has put it.
        """
        content, path = (stored.get("bytes"), stored.get("path")) if isinstance(stored, dict) else (stored, None)
        if isinstance(content, bytes):
            return open_bytes(content)
        real = Path(os.path.realpath(path or ""))
        if path and any(real.is_relative_to(folder) for folder in _downloads(self._where)):
            return open_bytes(real.read_bytes())
        if path or isinstance(content, str):
            raise ValueError(f"the row names a file, {path or content!r:.200}, instead of holding the image")
        raise ValueError("there is no image in this row")


class TableSource(_RowSource):
    """Rows of a `datasets.Dataset`, identified by `facts`.

    `class_names` and `box_names` number the classes; by default the column's own names do, or its values, sorted.
    """

    def __init__(
        self, table: Any, data: Data, facts: list[Any], where: str, class_names: list[str] | None = None,
        box_names: list[str] | None = None,
    ):  # fmt: skip
        super().__init__(table.features, data, where)
        self._table = self.undecoded(table)
        self.labels: list[int] | None = None
        if self.label is not None:
            raw, names = table[self.label][:], self.label_names
            own = names or [str(value) for value in sorted(set(raw))]
            if any(value is None or (names and value < 0) for value in raw):
                raise LatelierError("Some rows have no label; choose another data.split or data.label_key.")
            named = [names[value] if names else str(value) for value in raw]
            self.class_names, self.labels = number_classes(named, class_names or own)
        self.boxes.number(table, box_names)
        self.box_names = self.boxes.names
        about, *more = self.about()
        self.fingerprint = digest(facts, len(table), about, self.class_names, *more)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._record(self._table[index])
        return record if self.labels is None else {**record, "label": self.labels[index]}

    def captions(self, indices: Iterable[int]) -> Iterator[str]:
        """Captions of these rows, whose images are not read."""
        if (column := self.caption) is not None:
            texts, wanted = self._table.select_columns([column]), iter(indices)
            while numbers := list(islice(wanted, CAPTIONS_AT_ONCE)):
                yield from map(self._text, texts[numbers][column])

    @cached_property
    def uncaptioned(self) -> list[int]:
        """Rows that have no caption; an empty one is one."""
        texts = self._table.select_columns([self.caption] if self.caption else []).with_format("arrow")[:]
        return [i for column in texts.columns for i in np.flatnonzero(column.is_null().to_numpy()).tolist()]


class StreamSource(_RowSource):
    """Rows of a `datasets.IterableDataset`, in an order that only depends on seed and epoch.

    Attributes are those of a `Source`, as far as known before rows are read: integers and strings are labels only if
    `data.classes` lists them. `length` is how many rows there are, or how many of the first are used, if that is known;
    `keep` tells which row numbers belong to the split.
    """

    def __init__(
        self, table: Any, data: Data, facts: list[Any], where: str, length: int | None = None,
        keep: Callable[[int], bool] | None = None,
    ):  # fmt: skip
        if table.features is None:
            raise LatelierError(f"The columns of {where} are not known before it is read; set data.streaming=false.")
        super().__init__(table.features, data, where)
        self._keep, self._length = keep, length
        self.class_names = self.label_names if data.classes is None else data.classes
        if data.classes is not None:
            check_classes(data.classes, self.label_names or (data.classes if self.label else None))
        table = self.undecoded(table if length is None else table.take(length))
        self._table = table.map(_with_number, with_indices=True)
        about, *more = self.about()
        self.fingerprint = digest("stream", facts, about, data.classes, length, *more)

    def __len__(self) -> int:
        """How many rows the split has, including those of classes that are not used."""
        if self._length is None:
            raise LatelierError(f"{self._where} is streamed, so its length is not known; set data.length.")
        return self._length if self._keep is None else sum(map(self._keep, range(self._length)))

    def rows(self, epoch: int | None = None, seed: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        """Row numbers and rows, not decoded, in one pass; with an `epoch` shuffled through a buffer."""
        table = self._table
        if epoch is not None:
            table = table.shuffle(seed=fold_in(seed, "order", epoch) % 2**32, buffer_size=SHUFFLE_BUFFER)
        with _opening(self._where):
            for row in table:
                number = row.pop(ROW_NUMBER)
                if self._keep is not None and not self._keep(number):
                    continue
                if self.class_names is None or self._class_of(row) in self.class_names:
                    yield number, row

    def captions(self) -> Iterator[str]:
        if self.caption is not None:
            yield from (self._text(row[self.caption]) for _, row in self.rows())

    def record(self, row: dict[str, Any]) -> dict[str, Any]:
        record = self._record(row)
        if self.class_names is not None:
            record["label"] = self.class_names.index(self._class_of(row))
        return record

    def _class_of(self, row: dict[str, Any]) -> str:
        value = row[str(self.label)]
        return self.label_names[value] if self.label_names else str(value)


def open_table(
    data: Data, where: str, split: str, class_names: list[str] | None = None, box_names: list[str] | None = None
) -> tuple[TableSource, bool]:
    """One split (`train`, `val`) of a Hub name, file or glob, and whether it has a validation split of its own."""
    table, facts, has_val = _load(data, where, split, streaming=False)
    return TableSource(table, data, facts, where, class_names, box_names), has_val


def open_stream(data: Data, split: str) -> StreamSource:
    """A split of a streamed dataset; without a validation split, rows are held out by a hash of their number."""
    where = data.val_source if split == "val" and data.val_source else data.source
    if os.path.isdir(os.path.expanduser(where)):
        raise LatelierError(f"data.streaming is for datasets; {where} is a folder, which needs no streaming.")
    has_val = _load(data, data.source, "train", streaming=True)[2] or data.val_source is not None
    fraction, val = data.val_fraction, split == "val"
    table, facts, _ = _load(data, where, split if has_val else "train", streaming=True)
    if val and not has_val and not fraction:
        raise LatelierError(f"{where} has no validation split; set data.val_split, data.val_source or val_fraction.")
    keep = None if has_val or not fraction else partial(_belongs, fraction, val)
    stated = getattr((table.info.splits or {}).get(str(table.split)), "num_examples", None)
    length = (None if val and has_val else data.length) or stated
    return StreamSource(table, data, [facts, split, fraction], where, length, keep)


def _downloads(where: str) -> list[str]:
    """Folders of the files of a dataset of the Hub; none for files of the user."""
    from datasets import config
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE, f"datasets--{where.replace('/', '--')}")
    return [*map(os.path.realpath, (folder, config.EXTRACTED_DATASETS_PATH))] if folder.is_dir() else []


def _load(data: Data, where: str, split: str, streaming: bool) -> tuple[Any, list[Any], bool]:
    """The split's dataset, what identifies it, and whether there is a validation split."""
    import datasets

    files = _files(where)
    arguments: dict[str, Any] = {"path": where}
    if files:
        arguments = {"path": BUILDERS[files[0].suffix], "data_files": [str(path) for path in files]}
    elif not HUB_NAME.fullmatch(where) or os.path.isdir(os.path.dirname(where)) or _near(where):
        # What is meant as a path is refused now: the Hub would be asked again and again.
        known = "neither emoji nor scenes, and there is no such folder, file or Hub name"
        raise LatelierError(f"data.source = {where!r} is {known}{_near(where)}.")
    with _opening(where):
        names = ["train"] if files else datasets.get_dataset_split_names(where)
        wanted, has_val = ("train", False) if files else _split_name(data, where, split, names)
        table = datasets.load_dataset(**arguments, split=wanted, streaming=streaming)
    facts: list[Any] = [wanted, str(table.info.version)]
    facts += file_facts(files, files[0].parent) if files else [where, sorted(table.info.download_checksums or {})]
    return table, facts, has_val


@contextmanager
def _opening(where: str) -> Iterator[None]:
    """What damaged files raise in pyarrow, tarfile and `datasets` has no class in common; it becomes one sentence."""
    try:
        yield
    except LatelierError:
        raise
    except Exception as error:
        words = str(error.__cause__ or error).splitlines() or [type(error).__name__]
        raise LatelierError(f"Dataset {where!r} cannot be opened ({words[0].rstrip('.')}).") from None


def _near(where: str) -> str:
    """A hint if the path exists with its first missing name replaced by the nearest one beside it."""
    path = Path(os.path.expanduser(where))
    folder = next(folder for folder in path.parents if os.path.isdir(folder))
    missing, *rest = path.relative_to(folder).parts
    near = difflib.get_close_matches(missing, os.listdir(folder), 1)
    found = Path(folder, *near, *rest)
    return f" (did you mean {str(found)!r}?)" if near and os.path.exists(found) else ""


def _files(where: str) -> list[Path]:
    """The files of a path or glob, all of one kind; none if it is neither."""
    found = map(Path, glob.glob(os.path.expanduser(where), recursive=True))
    paths = sorted(path for path in found if path.is_file())
    kinds = sorted({path.suffix for path in paths})
    if not paths and Path(where).suffix in BUILDERS:
        braces = re.sub(r"\{.*?\}", "*", where)
        hint = f"; shards are named by a glob, {braces!r}" if braces != where else _near(where)
        raise LatelierError(f"data.source = {where!r}: there is no such file{hint}.")
    if len(kinds) > 1 or not set(kinds) <= set(BUILDERS):
        raise LatelierError(f"data.source = {where!r} must be .parquet or .tar files, not {', '.join(kinds)}.")
    return paths


def _split_name(data: Data, where: str, split: str, names: list[str]) -> tuple[str, bool]:
    """The dataset's name for `train` or `val`, and whether it has one for `val`."""
    val = next((name for name in VAL_NAMES if name in names and name != data.split), None)
    if data.val_split is not None and (not data.val_source or split == "val"):
        val = data.val_split
    wanted = data.split if split == "train" or val is None else val
    for name in (wanted, val):
        if name is not None and name not in names:
            raise LatelierError(f"{where} has no split {name!r}; it has: {', '.join(names)}.")
    return wanted, val is not None


def _belongs(fraction: float, val: bool, number: int) -> bool:  # at module level, as worker processes pickle it
    return (name_hash(str(number)) < fraction) == val


def _with_number(row: dict[str, Any], number: int) -> dict[str, Any]:
    return {**row, ROW_NUMBER: number}
