"""Boxes from COCO files, YOLO's text files, metadata and datasets: the same boxes give the same records."""

import io
import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from latelier.data.boxes import relative_entries
from latelier.data.loader import ImageDataset
from latelier.data.sources import open_source
from latelier.recipe import Data
from tiny import refused

SIZE = (64, 32)  # width, height
NAMES = ["cat", "dog"]
# Pixels x, y, w, h and class of the objects in three images; the numbers are such that YOLO's text is exact.
OBJECTS = {
    "a/0.png": [
        ((16, 8, 32, 16), 1),
        ((-8, 8, 16, 16), 0),
        ((48, 0, 32, 40), 1),
        ((4, 4, 0, 8), 0),
        ((70, 4, 8, 8), 0),
    ],
    "a/1.png": [],
    "b/2.png": [((0, 0, 64, 32), 0)],
}


@pytest.fixture(autouse=True)
def _quiet_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def png(mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, SIZE).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def images(tmp_path):
    """`dataset/images` with the three images."""
    root = tmp_path / "dataset" / "images"
    for name in OBJECTS:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png())
    return root


def coco(path, objects=None, names=NAMES, **annotation):
    """A COCO file whose ids are neither dense nor in the order of the labels' names."""
    objects = OBJECTS if objects is None else objects
    images = [{"id": 7 * i, "file_name": n, "width": SIZE[0], "height": SIZE[1]} for i, n in enumerate(objects)]
    annotations = [
        {"image_id": 7 * i, "bbox": list(box), "category_id": 10 + 3 * label, **annotation}
        for i, found in enumerate(objects.values())
        for box, label in found
    ]
    categories = [{"id": 10 + 3 * i, "name": name} for i, name in reversed(list(enumerate(names)))]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def yolo(root, beside=False):
    """Text files in `labels`, or beside the images, for images with objects."""
    for name, found in OBJECTS.items():
        path = (root if beside else root.parent / "labels") / name.replace(".png", ".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"{c} {(x + w / 2) / 64} {(y + h / 2) / 32} {w / 64} {h / 32}" for (x, y, w, h), c in found]
        if lines:
            path.write_text("\n".join(lines) + "\n")


def metadata(root, names=NAMES):
    with (root / "metadata.jsonl").open("w") as file:
        for name, found in OBJECTS.items():
            objects = {"bbox": [box for box, _ in found], "category": [names[label] for _, label in found]}
            file.write(json.dumps({"file_name": name, "objects": objects}) + "\n")


def opened(root, split="train", **options):
    return open_source(Data(source=str(root), **{"val_fraction": 0, "image_size": (32, 64), **options}), split)


def assert_expected(source):
    """The boxes of `OBJECTS`: what lies outside is cut off, what has no area is not there."""
    assert source.box_names == NAMES
    first, second, third = (source[i] for i in range(3))
    assert first["boxes"].tolist() == [[0.25, 0.25, 0.75, 0.75], [0, 0.25, 0.125, 0.75], [0.75, 0, 1, 1]]
    assert (first["box_labels"].tolist(), first["box_flags"].tolist()) == ([1, 0, 1], [0, 0, 0])
    assert second["boxes"].shape == (0, 4)
    assert second["box_labels"].shape == (0,)
    assert (third["boxes"].tolist(), third["box_labels"].tolist()) == ([[0, 0, 1, 1]], [0])
    assert first["boxes"].dtype == np.float32


def test_every_form_gives_the_same_records(images, tmp_path):
    assert_expected(opened(images, boxes=str(coco(tmp_path / "instances.json"))))
    yolo(images)
    (images.parent / "data.yaml").write_text("train: images\nnames: {0: cat, 1: dog}\n")
    assert_expected(opened(images, boxes="yolo"))
    assert opened(images, boxes="yolo").class_names is None
    metadata(images)
    assert_expected(opened(images))
    assert opened(images).class_names == ["a", "b"]


def test_yolo_beside_the_images_is_no_caption(images):
    root = images
    yolo(root, beside=True)
    (root / "classes.txt").write_text("cat\ndog\n")
    source = opened(root, boxes="yolo")
    assert_expected(source)
    assert "caption" not in source[0]
    assert opened(root)[2]["caption"].startswith("0 0.5")
    (root / "a/0.txt").write_text("1 0.5 0.5 0.5\n")
    refused(r"0\.txt, line 1: '1 0.5 0.5 0.5' is not five numbers", source.__getitem__, 0)
    (root / "a/0.txt").write_text("2 0.5 0.5 0.5 0.5\n")
    refused(r"class 2; there are 2 classes", source.__getitem__, 0)
    (root / "classes.txt").unlink()
    refused(r"write .*classes.txt", opened, root, boxes="yolo")


def test_coco_flags_and_images_that_are_not_listed(images, tmp_path):
    path = coco(tmp_path / "one.json", {"a/0.png": [((16, 8, 32, 16), 1)]}, iscrowd=1)
    source = opened(images, boxes=str(path))
    assert (len(source), source.name(0)) == (1, "a/0.png")
    assert source[0]["box_flags"].tolist() == [1]
    elsewhere = coco(tmp_path / "other.json", {"c/9.png": []})
    refused("names none of the images", opened, images, boxes=str(elsewhere))
    (tmp_path / "bad.json").write_text("[]")
    refused(r"bad.json is no COCO annotation file", opened, images, boxes=str(tmp_path / "bad.json"))
    nothing = str(tmp_path / "nothing.json")
    refused(r"nothing.json is no COCO annotation file \(FileNotFoundError", opened, images, boxes=nothing)
    told = json.loads(path.read_text())
    del told["annotations"][0]["bbox"]
    path.write_text(json.dumps(told))
    refused(r"image a/0.png: a `bbox` must be four numbers", opened, images, boxes=str(path))
    (images / "b/0.png").write_bytes(png())
    refused(r"may be .*a/0.png or .*b/0.png", opened, images, boxes=str(coco(tmp_path / "two.json", {"0.png": []})))


def test_a_file_for_each_split(images, tmp_path):
    """Two files may share one folder of images, or go with two folders; labels are numbered as in training."""
    files = str(tmp_path / "instances_{split}.json")
    coco(tmp_path / "instances_train.json", {"a/0.png": OBJECTS["a/0.png"]})
    coco(tmp_path / "instances_val.json", {"a/1.png": [((0, 0, 64, 32), 0)]}, names=["dog"])
    train, val = (opened(images, split, boxes=files) for split in ("train", "val"))
    assert [train.name(i) for i in range(len(train))] == ["a/0.png"]
    assert ([val.name(i) for i in range(len(val))], val.box_names) == (["a/1.png"], NAMES)
    assert val[0]["box_labels"].tolist() == [1]
    data = Data(source=str(images), split="a", val_split="b", boxes=files)
    coco(tmp_path / "instances_a.json", {"0.png": [((0, 0, 64, 32), 0)], "a/1.png": []})
    coco(tmp_path / "instances_b.json", {"2.png": [((0, 0, 64, 32), 0)]}, names=["bird"])
    assert len(open_source(data)) == 2
    refused("the class 'bird', which the training images do not have", open_source, data, "val")


def test_fingerprints_follow_the_boxes(images, tmp_path):
    plain = opened(images).fingerprint
    first = opened(images, boxes=str(coco(tmp_path / "a.json"))).fingerprint
    other = opened(images, boxes=str(coco(tmp_path / "a.json", {"a/0.png": []}))).fingerprint
    assert len({plain, first, other}) == 3


def parquet(path, objects, features=None):
    """A dataset of one image for each of the objects."""
    features = datasets.Features(image=datasets.Image(), **features) if features else None
    columns = {key: [row[key] for row in objects] for key in objects[0]}
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": png(), "path": None}] * len(objects), **columns}, features=features
    )
    rows.cast_column("image", datasets.Image()).to_parquet(path)
    return path


def told(category, **more):
    """`OBJECTS` as a column; `category` makes a class of a label."""
    rows = []
    for found in OBJECTS.values():
        row = {"bbox": [list(map(float, box)) for box, _ in found], "category": [category(label) for _, label in found]}
        rows.append({"objects": row | {key: [value] * len(found) for key, value in more.items()}})
    return rows


BBOX = datasets.List(datasets.List(datasets.Value("float32")))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["lists", "dicts"])
def test_detection_datasets(tmp_path, streaming, form):
    label = datasets.ClassLabel(names=NAMES)
    feature = {"bbox": BBOX, "category": datasets.List(label)}
    rows = told(int)
    if form == "dicts":
        feature = datasets.List({"bbox": datasets.List(datasets.Value("float32")), "category": label})
        pairs = [zip(row["objects"]["bbox"], row["objects"]["category"]) for row in rows]
        rows = [{"objects": [{"bbox": b, "category": c} for b, c in pair]} for pair in pairs]
    path = parquet(tmp_path / "a.parquet", rows, {"objects": feature})
    source = opened(path, streaming=streaming, length=3)
    if not streaming:
        assert_expected(source)
        return
    assert source.box_names == NAMES
    first = source.record(next(source.rows())[1])
    assert first["box_labels"].tolist() == [1, 0, 1]
    assert first["boxes"][0].tolist() == [0.25, 0.25, 0.75, 0.75]


def test_classes_without_names_are_looked_up(tmp_path):
    assert_expected(opened(parquet(tmp_path / "a.parquet", told(NAMES.__getitem__))))
    source = opened(parquet(tmp_path / "b.parquet", told(lambda label: 5 + label, is_occluded=True, is_group_of=-1)))
    assert (source.box_names, source[0]["box_labels"].tolist()) == (["5", "6"], [1, 0, 1])
    assert source[0]["box_flags"].tolist() == [2, 2, 2]
    corners = [{"objects": {"bbox": [[16.0, 8.0, 48.0, 24.0]], "category": ["cat"]}}]
    path = parquet(tmp_path / "c.parquet", corners)
    assert opened(path, box_format="xyxy")[0]["boxes"].tolist() == [[0.25, 0.25, 0.75, 0.75]]
    refused(r"data.boxes is for folders", opened, path, boxes="yolo")
    stream = opened(path, streaming=True, length=1)
    refused(r"data.streaming=false", stream.record, next(stream.rows())[1])


def test_our_own_columns(tmp_path):
    row = {"boxes": [[0.0, 0.0, 0.5, 1.5], [1.0, 0.0, 1.2, 1.0]], "box_labels": [2, 1], "box_flags": [4, 0]}
    source = opened(parquet(tmp_path / "a.parquet", [row]))
    assert source.box_names == ["0", "1", "2"]
    assert {key: source[0][key].tolist() for key in row} == {
        "boxes": [[0, 0, 0.5, 1]], "box_labels": [2], "box_flags": [4],
    }  # fmt: skip
    features = {"boxes": BBOX, "box_labels": datasets.List(datasets.ClassLabel(names=["x", "y", "z"]))}
    named = parquet(tmp_path / "b.parquet", [{k: row[k] for k in ("boxes", "box_labels")}], features)
    assert opened(named).box_names == ["x", "y", "z"]
    assert "box_flags" not in opened(named)[0]


def test_objects_of_the_wrong_form(tmp_path):
    rows = [{"objects": {"bbox": [[1.0, 2.0, 3.0]], "category": ["cat"]}}]
    refused("four numbers, xywh", opened(parquet(tmp_path / "a.parquet", rows)).__getitem__, 0)
    rows = [{"objects": {"bbox": [[1.0, 2.0, 3.0, 4.0]], "category": ["cat", "dog"]}}]
    refused("lists of the same length", opened, parquet(tmp_path / "b.parquet", rows))


def test_what_is_no_box():
    """No area inside the image: left out; cut at its edges; no number: the whole record cannot be read."""
    boxes = np.array([[0.5, 0.5, 0.25, 0.75], [0, 0, 1, 1], [2, 0, 3, 1], [-1e30, 0.5, 1e30, 1]])
    found = relative_entries(boxes, [0, 1, 2, 3], [0, 8, 0, 0])
    assert (found["box_labels"].tolist(), found["boxes"].tolist()) == ([1, 3], [[0, 0, 1, 1], [0, 0.5, 1, 1]])
    for value in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="is not finite"):
            relative_entries(np.array([[0, 0, 1, 1], [value, 0, 1, 1]]), [0, 1], [0, 0])


def test_a_box_that_is_no_number_costs_its_image_alone(images, tmp_path):
    path = coco(tmp_path / "a.json", {**OBJECTS, "a/1.png": [((float("nan"), 0, 8, 8), 0)]})
    data = Data(source=str(images), val_fraction=0, image_size=(32, 64), boxes=str(path))
    source = open_source(data)
    assert source.boxes_without_area == 2
    dataset = ImageDataset(source, data, skip_log=tmp_path / "skipped.jsonl")
    assert [batch["index"].tolist() for batch in dataset.once(3)] == [[0, 2]]
    (entry,) = map(json.loads, (tmp_path / "skipped.jsonl").read_text().splitlines())
    assert (entry["name"], "not finite" in entry["reason"]) == ("a/1.png", True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox": [10**400, 0, 1, 1]}, "four numbers"),
        ({"category_id": [1]}, r"class \[1\]"),
        ({"iscrowd": "yes"}, "no COCO annotation file"),
        ({"image_id": 99}, "no COCO annotation file"),
    ],
)
def test_junk_in_coco_files_is_one_sentence(images, tmp_path, change, message):
    path = coco(tmp_path / "a.json")
    told = json.loads(path.read_text())
    told["annotations"][0] |= change
    path.write_text(json.dumps(told))
    refused(message, opened, images, boxes=str(path))


def test_junk_in_yolo_files_and_objects(images, tmp_path):
    yolo(images)
    for text in ("names: [unclosed", "- a", "names: {1: dog}", "names: [[a], [b]]", "\xff"):
        (images.parent / "data.yaml").write_text(text, encoding="latin1")
        refused(r"data.yaml needs `names`", opened, images, boxes="yolo")
    for objects in (
        {"bbox": 5, "category": [0]},
        {"bbox": [[0, 0, 1, 1]], "category": [[0]]},
        {"bbox": [[0, 0, 1, 1]], "category": ["a"], "iscrowd": ["x"]},
    ):
        (images / "metadata.jsonl").write_text(json.dumps({"file_name": "a/0.png", "objects": objects}))
        refused("`objects`", opened, images)


@pytest.mark.parametrize("options", [{"in_memory": True}, {"in_memory": False}, {"in_memory": False, "workers": 1}])
def test_boxes_in_batches(images, tmp_path, options):
    data = Data(
        source=str(images), val_fraction=0, image_size=(32, 64), boxes=str(coco(tmp_path / "a.json")), **options
    )
    dataset = ImageDataset(open_source(data), data)
    assert dataset.box_names == NAMES
    (batch,) = dataset.once(3)
    (mirrored,) = dataset.once(3, flip=True)
    assert [len(boxes) for boxes in batch["boxes"]] == [3, 0, 1]
    assert [labels.tolist() for labels in batch["box_labels"]] == [[1, 0, 1], [], [0]]
    assert [flags.tolist() for flags in mirrored["box_flags"]] == [[0, 0, 0], [], [0]]
    x0, y0, x1, y1 = batch["boxes"][0].unbind(1)
    assert torch.equal(mirrored["boxes"][0], torch.stack([1 - x1, y0, 1 - x0, y1], 1))
