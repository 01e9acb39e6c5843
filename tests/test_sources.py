"""Folders and datasets as sources."""

import io
import json
import os
import tarfile

import datasets
import numpy as np
import pytest
from PIL import Image

from latelier.data.folder import list_images
from latelier.data.records import Source
from latelier.data.sources import hold_out, open_source
from latelier.errors import LatelierError
from latelier.recipe import Data


@pytest.fixture(autouse=True)
def _quiet_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def png(value):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(file, "PNG")
    return file.getvalue()


def write(folder, *names):
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
    return folder


def names(source):
    return [source.name(i) for i in range(len(source))]


def opened(tmp_path, split="train", **options):
    return open_source(Data(source=str(tmp_path), **{"val_fraction": 0, **options}), split)


# -- folders ------------------------------------------------------------------------------------------------------


def test_class_folders_become_labels(tmp_path):
    write(tmp_path, "dogs/a.png", "cats/b.PNG", "cats/wild/c.png", "dogs/.hidden.png", ".git/d.png", "dogs/notes.md")
    source = opened(tmp_path)
    assert isinstance(source, Source)
    assert source.class_names == ["cats", "cats/wild", "dogs"]
    assert names(source) == ["cats/b.PNG", "cats/wild/c.png", "dogs/a.png"]
    assert source.labels == [0, 1, 2]
    assert source[2]["label"] == 2
    assert source[2]["image"].getpixel((0, 0)) == (0, 0, 0)
    assert "caption" not in source[0]


def test_a_flat_folder_has_no_labels(tmp_path):
    source = opened(write(tmp_path, "a.png", "b.png", "sub/c.png"))
    assert source.class_names is None
    assert source.labels is None
    with pytest.raises(LatelierError, match="no labels"):
        opened(tmp_path, classes=["sub"])


def test_split_folders(tmp_path):
    write(tmp_path, "train/a/1.png", "train/b/2.png", "val/b/3.png", "test/b/4.png")
    assert names(opened(tmp_path)) == ["a/1.png", "b/2.png"]
    val = opened(tmp_path, "val")
    assert (names(val), val.labels) == (["b/3.png"], [1])  # numbered as in training
    assert names(opened(tmp_path, "val", val_split="test")) == ["b/4.png"]
    with pytest.raises(LatelierError, match="dev"):
        opened(tmp_path, "val", val_split="dev")
    write(tmp_path, "val/c/5.png")
    with pytest.raises(LatelierError, match="'c'"):
        opened(tmp_path, "val")


def test_val_source_may_be_another_folder(tmp_path):
    write(tmp_path, "one/a/1.png", "one/b/2.png", "two/b/3.png")
    options = {"val_source": str(tmp_path / "two"), "val_fraction": 0.5}
    assert names(opened(tmp_path / "one", **options)) == ["a/1.png", "b/2.png"]
    val = opened(tmp_path / "one", "val", **options)
    assert (names(val), val.labels) == (["b/3.png"], [1])


def test_held_out_images_do_not_change_when_others_come(tmp_path):
    write(tmp_path, *(f"{i}.png" for i in range(40)))
    train, val = (set(names(opened(tmp_path, split, val_fraction=0.25))) for split in ("train", "val"))
    assert not train & val
    assert len(train | val) == 40
    assert 3 <= len(val) <= 18
    write(tmp_path, *(f"new {i}.png" for i in range(40)))
    assert val <= set(names(opened(tmp_path, "val", val_fraction=0.25)))
    with pytest.raises(LatelierError, match="no validation split"):
        opened(tmp_path, "val")


def test_something_is_always_held_out(tmp_path):
    source = opened(write(tmp_path, "a.png", "b.png", "c.png"))
    parts = [hold_out(source, 1e-6, split) for split in ("train", "val")]
    assert [len(part) for part in parts] == [2, 1]


def test_sidecar_captions(tmp_path):
    write(tmp_path, "a.png", "b.png")
    (tmp_path / "a.txt").write_text("a house\n")
    source = opened(tmp_path)
    assert [source[i]["caption"] for i in range(2)] == ["a house", ""]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_table(tmp_path, kind):
    write(tmp_path, "a.png", "sub/b.png")
    rows = [
        {"file_name": "a.png", "text": "one", "label": "x"},
        {"file_name": "sub/b.png", "text": "two", "label": "y"},
    ]
    if kind == "csv":
        (tmp_path / "metadata.csv").write_text("file_name,text,label\na.png,one,x\nsub/b.png,two,y\n")
    else:
        (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = opened(tmp_path)
    assert [source[i]["caption"] for i in range(2)] == ["one", "two"]
    assert (source.class_names, source.labels) == (["x", "y"], [0, 1])
    with pytest.raises(LatelierError, match="prompt"):
        opened(tmp_path, caption_key="prompt")
    with pytest.raises(LatelierError, match="breed"):
        opened(tmp_path, label_key="breed")


def test_metadata_without_file_names(tmp_path):
    write(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text("file,text\na.png,one\n")
    with pytest.raises(LatelierError, match="file_name"):
        opened(tmp_path)


def test_fingerprint_follows_the_files(tmp_path):
    write(tmp_path, "a.png", "b.png")
    first = opened(tmp_path).fingerprint
    assert opened(tmp_path).fingerprint == first
    os.utime(tmp_path / "a.png", (1, 1))
    second = opened(tmp_path).fingerprint
    (tmp_path / "b.png").rename(tmp_path / "c.png")
    assert len({first, second, opened(tmp_path).fingerprint}) == 3


def test_missing_and_empty_folders(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(LatelierError, match=r"no images in .*empty"):
        opened(tmp_path / "empty")
    with pytest.raises(LatelierError, match=r"no such folder"):
        opened(tmp_path / "nothing here")
    with pytest.raises(LatelierError, match="no such file"):
        opened(tmp_path / "x.parquet")
    with pytest.raises(LatelierError, match="streaming"):
        opened(write(tmp_path / "some", "a.png"), streaming=True)
    with pytest.raises(LatelierError, match="streaming"):
        open_source(Data(source="emoji", streaming=True))
    assert list_images(tmp_path / "empty") == []


# -- datasets -----------------------------------------------------------------------------------------------------


def table(path, count, labels=None, start=0, **columns):
    """A parquet file whose image i is filled with i."""
    features = {"image": datasets.Image(), **{k: datasets.Value("string") for k in columns}}
    rows = {"image": [{"bytes": png(start + i), "path": None} for i in range(count)], **columns}
    if labels is not None:
        features["label"] = labels
        rows["label"] = [i % 3 for i in range(count)]
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(path)
    return str(path)


def value(record):
    return record["image"].getpixel((0, 0))[0]


def test_parquet_with_class_names(tmp_path):
    path = table(tmp_path / "train.parquet", 9, datasets.ClassLabel(names=["x", "y", "z"]), text=["t"] * 9)
    source = opened(path)
    assert source.class_names == ["x", "y", "z"]
    assert [value(source[i]) for i in range(9)] == list(range(9))
    assert (source[4]["label"], source[4]["caption"]) == (1, "t")
    chosen = opened(path, classes=["z", "x"])
    assert [(value(chosen[i]), chosen[i]["label"]) for i in range(3)] == [(0, 1), (2, 0), (3, 1)]


def test_parquet_with_plain_numbers_and_another_file_for_validation(tmp_path):
    train = table(tmp_path / "train.parquet", 9, datasets.Value("int64"))
    val = table(tmp_path / "val.parquet", 2, datasets.Value("int64"), start=100)
    assert opened(train, val_source=val).class_names == ["0", "1", "2"]
    held_out = opened(train, "val", val_source=val)
    assert (len(held_out), held_out.class_names, value(held_out[0])) == (2, ["0", "1", "2"], 100)


def test_several_parquet_files_and_held_out_rows(tmp_path):
    for i in range(2):
        table(tmp_path / f"part-{i}.parquet", 20, start=20 * i)
    train, val = (opened(tmp_path / "part-*.parquet", split, val_fraction=0.2) for split in ("train", "val"))
    shown = [{value(s[i]) for i in range(len(s))} for s in (train, val)]
    assert not shown[0] & shown[1]
    assert shown[0] | shown[1] == set(range(40))


def test_unknown_columns_are_named(tmp_path):
    path = table(tmp_path / "a.parquet", 3, text=["t"] * 3)
    for key in ("image_key", "label_key", "caption_key"):
        with pytest.raises(LatelierError, match=f"data.{key} = 'nope'.*image, text"):
            opened(path, **{key: "nope"})


def test_the_only_image_column_is_found(tmp_path):
    path = tmp_path / "a.parquet"
    rows = datasets.Dataset.from_dict({"jpg": [{"bytes": png(5), "path": None}]})
    rows.cast_column("jpg", datasets.Image()).to_parquet(path)
    assert value(opened(path)[0]) == 5


def test_labels_that_are_missing(tmp_path):
    path = tmp_path / "a.parquet"
    rows = datasets.Dataset.from_dict({"image": [{"bytes": png(5), "path": None}], "label": [-1]})
    rows.cast(datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["x"]))).to_parquet(path)
    with pytest.raises(LatelierError, match="no label"):
        opened(path)


def test_webdataset_shards(tmp_path):
    with tarfile.open(tmp_path / "shard-0.tar", "w") as tar:
        for i in range(4):
            for name, content in (
                (f"{i}.png", png(i)),
                (f"{i}.txt", f"number {i}".encode()),
                (f"{i}.cls", b"%d" % (i % 2)),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    source = opened(tmp_path / "shard-*.tar")
    assert [value(source[i]) for i in range(4)] == [0, 1, 2, 3]
    assert source[3]["caption"] == "number 3"
    assert source.labels == [0, 1, 0, 1]


def test_streams(tmp_path):
    path = table(tmp_path / "a.parquet", 60, datasets.ClassLabel(names=["x", "y", "z"]))
    source = opened(path, streaming=True, length=50)
    first, again, second = (list(source.rows(epoch, 0)) for epoch in (0, 0, 1))
    assert [n for n, _ in first] == [n for n, _ in again]
    assert [n for n, _ in first] != [n for n, _ in second]
    assert sorted(n for n, _ in first) == list(range(50))
    number, row = first[0]
    assert value(source.record(row)) == number
    assert source.record(row)["label"] == number % 3
    train, val = (opened(path, split, streaming=True, length=50, val_fraction=0.2) for split in ("train", "val"))
    parts = [[n for n, _ in s.rows()] for s in (train, val)]
    assert sorted(parts[0] + parts[1]) == list(range(50))
    assert [len(train), len(val)] == [len(part) for part in parts]
    only = opened(path, streaming=True, classes=["z"])
    assert [n for n, _ in only.rows()] == list(range(2, 60, 3))
    assert {only.record(row)["label"] for _, row in only.rows()} == {0}
    with pytest.raises(LatelierError, match=r"set data.length"):
        len(only)


def test_boxes_and_planes_are_passed_on(tmp_path):
    path = tmp_path / "a.parquet"
    rows = {"image": [{"bytes": png(5), "path": None}], "boxes": [[[0.0, 0.0, 0.5, 1.0]]], "box_labels": [[2]]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(path)
    record = opened(path)[0]
    assert np.array_equal(record["boxes"], [[0, 0, 0.5, 1]])
    assert np.array_equal(record["box_labels"], [2])
