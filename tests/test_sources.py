"""Folders and datasets as sources."""

import io
import json
import os
import tarfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from latelier.data.folder import list_images
from latelier.data.loader import ImageDataset
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
    with pytest.raises(LatelierError, match=r"held-out images have the class 'c'.*\(a, b\)"):
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


def test_links(tmp_path):
    """Each real folder at most once along a path; what leads nowhere is found out when the image is read."""
    write(tmp_path / "root", "a/1.png", "b/2.png")
    write(tmp_path / "elsewhere", "3.png", "deeper/4.png")
    (tmp_path / "root/a/loop").symlink_to("..")
    (tmp_path / "root/c").symlink_to(tmp_path / "elsewhere")  # datasets may be put together by links
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "root")
    (tmp_path / "root/b/nowhere.png").symlink_to("gone.png")
    (tmp_path / "root/b/itself.png").symlink_to("itself.png")
    os.mkfifo(tmp_path / "root/b/pipe.png")
    source = opened(tmp_path / "root")
    unreadable = ["b/itself.png", "b/nowhere.png", "b/pipe.png"]
    assert names(source) == ["a/1.png", "b/2.png", *unreadable, "c/3.png", "c/deeper/4.png"]
    for index in range(2, 5):
        with pytest.raises(FileNotFoundError, match="leads nowhere"):
            source[index]
    assert value(source[1]) == 1


def test_long_captions_are_cut(tmp_path):
    write(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "a.txt").write_text("word " * 300_000)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "b.png", "text": "x" * 10**6}))
    assert [len(caption) for caption in opened(tmp_path).captions(range(3))] == [9_999, 10_000, 0]
    path = table(tmp_path / "a.parquet", 1, text=["y" * 10**6])
    assert [len(caption) for caption in opened(path).captions([0])] == [len(opened(path)[0]["caption"])] == [10_000]


def test_junk_in_metadata(tmp_path):
    write(tmp_path, "a.png")
    for line in ("[1]", '{"file_name": 5}', "{", "\xff", "[" * 100_000):
        (tmp_path / "metadata.jsonl").write_text(line, encoding="latin1")
        with pytest.raises(LatelierError, match=r"metadata.jsonl (cannot be read|needs a column)"):
            opened(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "../../secret.png", "text": "no"}\n{"file_name": "/x.png"}')
    assert names(opened(tmp_path)) == ["a.png"]


def test_the_split_in_the_names_of_map_folders(tmp_path):
    write(tmp_path, "images/train/1.png", "images/val/2.png", "labels_train/1.png", "labels_val/2.png")
    for split, number in (("train", 1), ("val", 2)):
        source = opened(tmp_path / "images", split, maps=str(tmp_path / "labels_{split}"))
        assert names(source) == [f"{number}.png"]
        assert source[0]["map"][0, 0, 0] == number + 1


def test_paths_that_are_mistaken(tmp_path, monkeypatch):
    """Without a word to the Hub, which would be asked again and again."""
    write(tmp_path, "photos/train/a.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: pytest.fail(f"asked for {name}"))
    for wrong, right in (
        ("./photoz", "photos"),
        ("photos/trian", "photos/train"),
        ("photoz/train", "photos/train"),
        (str(tmp_path / "photo"), str(tmp_path / "photos")),
    ):
        with pytest.raises(LatelierError, match=rf"no such folder, .*\(did you mean '{right}'\?\)\.$"):
            opened(wrong)
    for wrong in ("photos/validation", "~nobody at all/x", "x" * 5000, "/nothing/at/all"):
        with pytest.raises(LatelierError, match=r"no such folder, file or Hub name\.$"):
            opened(wrong)


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
    (tmp_path / "empty" / "x-000.tar").touch()
    with pytest.raises(LatelierError, match=r"set data.source='.*/empty/\*.tar'"):
        opened(tmp_path / "empty")
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
    for shard in range(2):
        with tarfile.open(tmp_path / f"shard-{shard:03d}.tar", "w") as tar:
            for i in (2 * shard, 2 * shard + 1):
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
    with pytest.raises(LatelierError, match=r"no such file; shards are named by a glob, .*shard-\*.tar"):
        opened(tmp_path / "shard-{000..001}.tar")


def test_columns_of_bytes_and_rows_that_name_files(tmp_path):
    """Bytes are images with and without the type; a file on this machine is never read for a row that names it."""
    secret = str(write(tmp_path / "elsewhere", "secret.png") / "secret.png")
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"image": [png(3), png(4)], "text": ["a", None]}).to_parquet(path)
    source = opened(path)
    assert [value(source[i]) for i in range(2)] == [3, 4]
    assert source.uncaptioned == [1]
    told = [{"bytes": None, "path": secret}, {"bytes": None, "path": None}, {"bytes": png(5), "path": secret}]
    typed = datasets.Features(image=datasets.Image()).arrow_schema
    for number, schema in enumerate((typed, typed.remove_metadata())):
        pq.write_table(pa.Table.from_pylist([{"image": row} for row in told], schema), tmp_path / f"{number}.parquet")
        source = opened(tmp_path / f"{number}.parquet")
        with pytest.raises(ValueError, match=r"names a file, .*secret.png.*, instead of holding the image"):
            source[0]
        with pytest.raises(ValueError, match="no image"):
            source[1]
        assert value(source[2]) == 5
    datasets.Dataset.from_dict({"image": [secret]}).to_parquet(tmp_path / "c.parquet")
    with pytest.raises(ValueError, match="names a file"):
        opened(tmp_path / "c.parquet")[0]


@pytest.mark.parametrize("kind", ["parquet", "tar"])
@pytest.mark.parametrize("streaming", [False, True])
def test_junk_archives_are_one_sentence(tmp_path, kind, streaming):
    whole = tmp_path / f"whole.{kind}"
    if kind == "parquet":
        table(whole, 3)
    else:
        with tarfile.open(whole, "w") as tar:
            tar.add(write(tmp_path / "images", "a.png") / "a.png", "a.png")
    content = whole.read_bytes()
    cut = 550 if kind == "tar" else len(content) // 2  # the padding of an archive is long
    for number, junk in enumerate((b"", b"junk" * 500, content[:cut], content[cut:])):
        path = tmp_path / f"{number}.{kind}"
        path.write_bytes(junk)
        data = Data(source=str(path), val_fraction=0, image_size=8, streaming=streaming, length=3, workers=0)
        with pytest.raises(LatelierError, match=r"cannot be opened|no column|no images left|columns .* not known"):
            list(ImageDataset(open_source(data), data).once(3))


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
