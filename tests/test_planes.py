"""Label maps and image-like maps, from folders and datasets."""

import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from latelier.data.folder import LabelMaps, read_map
from latelier.data.loader import ImageDataset
from latelier.data.sources import open_source
from latelier.errors import LatelierError
from latelier.recipe import Data
from tiny import refused

IDS = np.array([[0, 1, 2], [2, 255, 1]], np.uint8)


def rules(**options):
    return LabelMaps(options.get("segmentation_classes"), options.get("ignore_id"))


def opened(root, split="train", **options):
    return open_source(Data(source=str(root), **{"val_fraction": 0, "image_size": (2, 3), **options}), split)


def save(path, array, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if mode == "P":
        image.putpalette(bytes(range(256)) * 3)
    image.save(path)
    return path


@pytest.fixture
def images(tmp_path):
    """`images/train/0.png`, `images/train/1.png`, `images/val/2.png` and their label maps in `ids`."""
    rng = np.random.default_rng(0)
    for name in ("train/0.png", "train/1.png", "val/2.png"):
        save(tmp_path / "images" / name, rng.integers(0, 256, (2, 3, 3), np.uint8))
        save(tmp_path / "ids" / name, IDS, "P")
    return tmp_path / "images"


def test_what_ids_may_be():
    assert rules().count is None
    assert np.array_equal(rules().read(IDS, "x"), IDS)
    voc = rules(segmentation_classes=["sky", "road", "car"], ignore_id=255)
    assert voc.count == 4  # "nobody knows" is a class of its own
    assert voc.read(IDS, "x").tolist() == [[0, 1, 2], [2, 3, 1]]
    with pytest.raises(LatelierError, match=r"map of x has the id 255, but data.segmentation_classes = 3 allows 0..2"):
        rules(segmentation_classes=3).read(IDS, "x")
    many = rules(segmentation_classes=1000)
    assert many.read(Image.fromarray(np.full((2, 2), 999, np.uint16)), "x").max() == 999
    palette = Image.fromarray(IDS)
    palette.putpalette(bytes(range(256)) * 3)
    assert np.array_equal(rules(segmentation_classes=256).read(palette, "x"), IDS)
    refused("one channel of ids", many.read, np.zeros((2, 2, 3), np.uint8), "x")
    refused(r"ignore_id = 255 needs", rules, ignore_id=255)


def test_label_maps_of_a_folder(images, tmp_path):
    """Names may be relative to the folder of the splits, or to that of one split."""
    options = {"segmentation": str(tmp_path / "ids"), "segmentation_classes": 3, "ignore_id": 255}
    for split, count in (("train", 2), ("val", 1)):
        source = opened(images, split, **options)
        assert (len(source), source.segmentation_classes) == (count, 4)
        assert source[0]["segmentation"].tolist() == [[0, 1, 2], [2, 3, 1]]
    assert len(opened(images / "train", **{**options, "segmentation": str(tmp_path / "ids/train")})) == 2
    inside = images / "ids"
    (tmp_path / "ids").rename(inside)  # label maps below the images' folder are no images
    assert len(opened(images, split="train", **{**options, "segmentation": str(inside)})) == 2
    everything = {**options, "segmentation": str(inside / "train")}
    (images / "val/2.png").unlink()
    assert len(opened(images / "train", **everything)) == 2
    refused(r"needs data.segmentation_classes", opened, images, segmentation=str(inside))
    (inside / "train/1.png").unlink()
    refused(r"has no file for the image .*train/1.png", opened, images, **{**options, "segmentation": str(inside)})


@pytest.mark.parametrize("options", [{"in_memory": True}, {"in_memory": False, "workers": 1}])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_maps_become_floats(images, tmp_path, dtype, options):
    top = np.iinfo(dtype).max
    depth = np.array([[0, top, top], [top, 0, 0]], dtype)
    for name in ("0", "1"):
        save(tmp_path / "depth" / f"{name}.png", depth)
    data = Data(
        source=str(images / "train"), val_fraction=0, image_size=(2, 3), maps=str(tmp_path / "depth"), **options
    )
    dataset = ImageDataset(open_source(data), data)
    (batch,), (mirrored,) = dataset.once(2), dataset.once(2, flip=True)
    assert batch["map"].shape == (2, 1, 2, 3)
    assert batch["map"][1, 0].tolist() == [[-1, 1, 1], [1, -1, -1]]
    assert torch.equal(mirrored["map"], batch["map"].flip(-1))


def test_maps_that_do_not_fit(images, tmp_path):
    save(tmp_path / "edges/0.png", np.zeros((2, 3), np.uint8))
    save(tmp_path / "edges/1.png", np.zeros((2, 3, 3), np.uint8))
    for workers in (0, 1):
        data = Data(source=str(images / "train"), val_fraction=0, image_size=(2, 3), maps=str(tmp_path / "edges"),
                    workers=workers, in_memory=False)  # fmt: skip
        refused(r"^data.maps: some maps have 1 channels, others 3", list, ImageDataset(open_source(data), data).once(2))
    assert read_map(np.zeros((2, 2), np.uint16), "x").dtype == np.uint16
    refused(r"map of x must be .* of float32", read_map, np.zeros((2, 2), np.float32), "x")


def test_fingerprints_follow_the_maps(images, tmp_path):
    save(tmp_path / "depth/train/0.png", IDS)
    save(tmp_path / "depth/train/1.png", IDS)
    found = {opened(images).fingerprint, opened(images, maps=str(tmp_path / "depth")).fingerprint}
    for options in ({"segmentation_classes": 256}, {"segmentation_classes": 3, "ignore_id": 255}):
        found.add(opened(images, segmentation=str(tmp_path / "ids"), **options).fingerprint)
    assert len(found) == 4
    for key in ("boxes", "segmentation", "maps"):
        refused(f"data.{key} is for folders and datasets", open_source, Data(source="scenes", **{key: str(images)}))


@pytest.mark.parametrize("name", ["annotation", "ids"])
def test_columns_of_label_maps_and_maps(tmp_path, monkeypatch, name):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    file = io.BytesIO()
    Image.fromarray(IDS).save(file, "PNG")
    content = {"bytes": file.getvalue(), "path": None}
    rows = {"image": [content], name: [content], "depth": [content]}
    features = datasets.Features({key: datasets.Image() for key in rows})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    options = {"maps": "depth", "segmentation_classes": 3, "ignore_id": 255, "image_key": "image"}
    if name == "ids":
        options["segmentation"] = "ids"
    source = opened(tmp_path / "a.parquet", **options)
    assert source.segmentation_classes == 4
    assert source[0]["segmentation"].tolist() == [[0, 1, 2], [2, 3, 1]]
    assert np.array_equal(source[0]["map"], IDS)
    stream = opened(tmp_path / "a.parquet", streaming=True, length=1, **options)
    assert stream.segmentation_classes == 4
    assert stream.record(next(stream.rows())[1])["segmentation"].tolist() == [[0, 1, 2], [2, 3, 1]]
    refused(r"data.maps = 'nope' is no column", opened, tmp_path / "a.parquet", maps="nope")
