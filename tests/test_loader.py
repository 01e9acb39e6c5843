"""The stream is addressed by images seen; nothing else about how it is read may matter."""

import io
import json
import multiprocessing
import os
import signal
from itertools import islice

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from latelier.data.loader import ImageDataset
from latelier.data.records import Batch
from latelier.data.sources import open_source
from latelier.errors import LatelierError
from latelier.recipe import Data


@pytest.fixture
def folder(tmp_path):
    """Twelve images in two classes, with captions; number i is filled with 20 i, its left half is brighter."""
    for i in range(12):
        path = tmp_path / "images" / f"class {i % 2}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        array = np.full((10, 12, 3), 20 * i, np.uint8)
        array[:, :6] += 15
        Image.fromarray(array).save(path)
        path.with_suffix(".txt").write_text(f"number {i}")
    return tmp_path / "images"


def opened(source, seed=0, skip_log=None, split="train", **options):
    data = Data(source=str(source), **{"image_size": (10, 12), "val_fraction": 0, "workers": 0, **options})
    return ImageDataset(open_source(data, split), data, seed, skip_log)


def take(dataset, count, *arguments, **options):
    return list(islice(dataset.stream(*arguments, **options), count))


def joined(batches, key):
    values = [batch[key] for batch in batches]
    return torch.cat(values) if torch.is_tensor(values[0]) else [x for value in values for x in value]


def assert_same(one, other):
    assert one[0].keys() == other[0].keys()
    for key in one[0]:
        a, b = joined(one, key), joined(other, key)
        if torch.is_tensor(a):
            assert torch.equal(a, b), key
        elif torch.is_tensor(a[0]):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), key
        else:
            assert a == b, key


def spoil(folder, *names):
    """Cut files off in the middle."""
    for name in names:
        path = next(folder.rglob(name))
        path.write_bytes(path.read_bytes()[:50])


# -- order --------------------------------------------------------------------------------------------------------


def test_every_epoch_shows_every_image_once(folder):
    batches = take(opened(folder), 6, 4)
    index = joined(batches, "index").reshape(2, 12)
    assert (index.sort(1).values == torch.arange(12)).all()
    assert not torch.equal(index[0], index[1])
    assert torch.equal(joined(batches, "sample_id"), torch.arange(24))
    other = joined(take(opened(folder, seed=1), 3, 4), "index")
    assert not torch.equal(index[0], other)


def test_records_stay_together(folder):
    dataset = opened(folder, flip=True)
    for batch in take(dataset, 6, 4):
        for i, index in enumerate(batch["index"].tolist()):
            image = ((batch["image"][i] + 1) * 127.5).round()
            number = index * 2 if index < 6 else index * 2 - 11  # sorted by class folder
            assert {image[0, 0, 0].item(), image[0, 0, -1].item()} == {20 * number, 20 * number + 15}
            assert batch["label"][i] == number % 2
            assert batch["caption"][i] == f"number {number}"
    assert dataset.class_names == ["class 0", "class 1"]
    assert dataset.shape == (3, 10, 12)
    assert len(dataset) == 12


@pytest.mark.parametrize("options", [{"in_memory": True}, {"in_memory": False, "crop": "random"}])
def test_starting_anywhere_is_going_on(folder, options):
    whole = take(opened(folder, **options), 8, 4)
    assert_same(whole[5:], take(opened(folder, **options), 3, 4, start=20))


@pytest.mark.parametrize("options", [{"in_memory": True}, {"in_memory": False, "crop": "random"}])
def test_processes_and_accumulation_split_the_same_batches(folder, options):
    whole = take(opened(folder, **options), 3, 8)
    parts = [iter(take(opened(folder, **options), 6, 8, process=p, processes=2, accumulation=2)) for p in range(2)]
    assert_same(whole, [next(parts[p]) for _ in range(6) for p in range(2)])
    with pytest.raises(LatelierError, match="batch = 8"):
        take(opened(folder), 1, 8, processes=3)


def test_workers_change_nothing(folder):
    options = {"in_memory": False, "crop": "random", "background": "random"}
    assert_same(take(opened(folder, **options), 5, 4), take(opened(folder, **options, workers=2), 5, 4))


def test_workers_leave_signals_to_the_main_process(folder):
    """Slurm, systemd and Ctrl-C signal the whole process group."""
    options = {"in_memory": False, "crop": "random"}
    batches = opened(folder, **options, workers=2).stream(4)
    got = [next(batches)]
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker, number in zip(workers * 2, [signal.SIGTERM] * 2 + [signal.SIGINT] * 2):
        os.kill(worker.pid, number)
    got += islice(batches, 7)
    assert_same(got, take(opened(folder, **options), 8, 4))
    batches.close()
    assert not any(worker.is_alive() for worker in workers)  # they still end with the loader


@pytest.mark.parametrize("background", ["white", "random"])
@pytest.mark.parametrize("channels", [1, 3])
def test_memory_changes_nothing(background, channels):
    options = {"image_size": 32, "length": 40, "background": background, "channels": channels}
    one, other = (opened("emoji", **options, in_memory=m) for m in (True, False))
    assert_same(take(one, 4, 16), take(other, 4, 16))
    assert_same(list(one.once(7)), list(other.once(7)))
    assert one.fingerprint == other.fingerprint


def test_scenes_in_memory_and_not():
    one, other = (opened("scenes", image_size=32, length=12, in_memory=m) for m in (True, False))
    batches = take(one, 2, 12)
    assert set(batches[0]) <= set(Batch.__annotations__)
    assert_same(batches, take(other, 2, 12))
    assert batches[0]["segmentation"].shape == (12, 32, 32)
    assert [len(b) for b in batches[0]["boxes"]] == [len(b) for b in batches[0]["box_labels"]]


# -- single passes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"in_memory": True}, {"in_memory": False, "crop": "random"}])
def test_once_is_in_order_and_not_random(folder, options):
    dataset = opened(folder, **options)
    batches = list(dataset.once(5))
    assert [len(b["image"]) for b in batches] == [5, 5, 2]
    assert torch.equal(joined(batches, "index"), torch.arange(12))
    assert "sample_id" not in batches[0]
    flipped = list(dataset.once(5, flip=True))
    assert torch.equal(joined(flipped, "image"), joined(batches, "image").flip(-1))
    parts = [joined(dataset.once(2, process, 3), "index") for process in range(3)]
    assert torch.equal(torch.stack(parts, 1).flatten(), torch.arange(12))
    assert joined(dataset.once(2, limit=4), "index").tolist() == [0, 3, 6, 9]


def test_default_is_memory_where_it_fits(folder):
    assert opened(folder).in_memory
    assert not opened(folder, crop="random").in_memory
    assert not opened(folder, image_size=8192).in_memory
    with pytest.raises(LatelierError, match="in_memory"):
        opened(folder, crop="random", in_memory=True)


def test_fingerprint_says_what_evaluation_sees(folder):
    base = opened(folder).fingerprint
    same = [
        opened(folder, flip=False),
        opened(folder, crop="random"),
        opened(folder, seed=1),
        opened(folder, workers=2),
    ]
    assert {dataset.fingerprint for dataset in same} == {base}
    others = [{"background": "black"}, {"image_size": 8}, {"channels": 1}, {"crop": "resize"}, {"length": 5}]
    assert len({base, *(opened(folder, **options).fingerprint for options in others)}) == 6


# -- images in a given order ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"in_memory": True}, {"in_memory": False}, {"in_memory": False, "workers": 2}])
@pytest.mark.parametrize("source", ["folder", "scenes"])
def test_following_is_once_in_another_order(folder, source, options):
    """Any crop of the recipe, any plan: the images of `once`, mirrored where the plan says it."""
    if not options["in_memory"]:
        options = {**options, "crop": "random", "background": "random"}
    dataset = opened(folder if source == "folder" else source, length=12, **{"image_size": 32, **options})
    sides = [next(dataset.once(12, flip=flip)) for flip in (False, True)]
    asked = []

    def plan():
        for n in range(40):
            index = torch.tensor([(5 * n + k) % 12 for k in range(4)])
            flipped = [bool((n + k) % 3) for k in range(4)]
            asked.append((index, flipped))
            yield index, flipped

    batches = list(islice(dataset.follow(plan()), 6))
    assert len(asked) < 20  # an endless plan is taken as it is needed
    for batch, (index, flipped) in zip(batches, asked):
        assert batch.keys() == sides[0].keys()
        assert torch.equal(batch["index"], index)
        for row, (i, flip) in enumerate(zip(index.tolist(), flipped)):
            for key, values in batch.items():
                a, b = values[row], sides[flip][key][i]
                assert torch.equal(a, b) if torch.is_tensor(a) else a == b, key


@pytest.mark.parametrize("options", [{"in_memory": True}, {"in_memory": False}, {"in_memory": False, "workers": 1}])
def test_a_image_that_is_gone_is_named(folder, options):
    spoil(folder, "02.png")
    dataset = opened(folder, max_skipped=0.5, **options)
    plan = [(torch.tensor([0]), [False]), (torch.tensor([0, 1]), [False, False])]
    batches = dataset.follow(plan)
    assert len(next(batches)["image"]) == 1
    with pytest.raises(LatelierError, match=r"^class 0/02.png could be read when .* encode again\.$"):
        next(batches)


def test_streams_cannot_be_followed(tmp_path):
    dataset = opened(parquet(tmp_path / "a.parquet", 4), streaming=True, length=4, image_size=8)
    with pytest.raises(LatelierError, match=r"data.streaming.*denoiser.cache=false"):
        next(dataset.follow([(torch.tensor([0]), [False])]))


def test_captions(folder, tmp_path):
    assert sorted(opened(folder).captions()) == sorted(f"number {i}" for i in range(12))
    some = opened(folder, length=3)
    assert list(some.captions()) == joined(some.once(3), "caption")
    chosen = opened(folder, classes=["class 1"])
    assert list(chosen.captions()) == joined(chosen.once(3), "caption")
    spoil(folder, *(f"{i:02d}.png" for i in range(12)))
    assert len(list(opened(folder).captions())) == 12  # no image is read
    emoji = opened("emoji", length=5, image_size=32)
    assert list(emoji.captions()) == joined(emoji.once(5), "caption")
    texts = [f"text {i}" for i in range(5)]
    for options in ({}, {"streaming": True, "length": 5}):
        path = parquet(tmp_path / "a.parquet", 5, text=texts)
        assert list(opened(path, **options).captions()) == texts
    assert list(opened(parquet(tmp_path / "b.parquet", 5)).captions()) == []


def test_many_boxes_take_few_files():
    """A worker that handed over each of 3 x 512 small tensors by itself would need as many open files."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, before[1]), before[1]))
    try:
        dataset = opened("scenes", image_size=16, length=512, in_memory=False, workers=1)
        (batch,) = dataset.once(512)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    expected = [dataset.source[i]["boxes"] for i in range(512)]
    assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(batch["boxes"], expected, strict=True))


# -- damaged files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"in_memory": True}, {"in_memory": False}, {"in_memory": False, "workers": 2}])
def test_unreadable_images_are_replaced_and_written_down(folder, tmp_path, options):
    spoil(folder, "02.png", "04.png")  # indices 1 and 2
    log = tmp_path / "run" / "skipped.jsonl"
    dataset = opened(folder, skip_log=log, max_skipped=0.2, **options)
    expected = joined(take(opened(folder, max_skipped=0.2, in_memory=False), 6, 4), "index")
    index = joined(take(dataset, 6, 4), "index")
    assert torch.equal(index, expected)
    assert not {1, 2} & set(index.tolist())
    assert (index == 3).sum() == 6  # in two epochs, for itself and both others
    assert joined(dataset.once(4), "index").tolist() == [0, *range(3, 12)]
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted((e["index"], e["name"]) for e in entries) == [(1, "class 0/02.png"), (2, "class 0/04.png")]
    assert all(entry["reason"] for entry in entries)
    take(opened(folder, skip_log=log, max_skipped=0.2, **options), 6, 4)  # as after a restart
    assert len(log.read_text().splitlines()) == 2


@pytest.mark.parametrize("options", [{"in_memory": True}, {"in_memory": False}, {"in_memory": False, "workers": 1}])
def test_too_many_unreadable_images(folder, options):
    spoil(folder, "02.png", "04.png", "05.png")
    assert len(take(opened(folder, max_skipped=0.2, **options), 6, 4)) == 6  # 2.4 images, rounded up
    spoil(folder, "06.png")
    with pytest.raises(LatelierError, match=r"4 of 12 images.*0.2.*class 0/0[246].png"):
        take(opened(folder, max_skipped=0.2, **options), 6, 4)
    spoil(folder, *(f"{i:02d}.png" for i in range(12)))
    with pytest.raises(LatelierError, match=r"12 of 12 images cannot be read.*Error"):
        take(opened(folder, max_skipped=1, **options), 6, 4)


def test_bombs_are_refused(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(LatelierError, match="DecompressionBomb"):
        take(opened(folder, in_memory=False), 1, 4)


@pytest.mark.parametrize("options", [{"in_memory": True}, {"in_memory": False}, {"in_memory": False, "workers": 1}])
def test_arrays_of_another_kind_are_skipped_and_named(folder, tmp_path, options):
    """As many channels as `data.channels`, of uint8; a header that claims terabytes is no reason to take them."""
    np.save(folder / "class 0" / "float.npy", np.zeros((8, 8, 3)))
    np.save(folder / "class 0" / "four.npy", np.zeros((8, 8, 4), np.uint8))
    np.save(folder / "class 0" / "good.npy", np.zeros((8, 8, 3), np.uint8))
    np.save(folder / "class 1" / "huge.npy", np.zeros((8, 8, 3), np.uint8))
    huge = folder / "class 1" / "huge.npy"
    huge.write_bytes(huge.read_bytes().replace(b"(8, 8, 3), }            ", b"(999999, 999999, 3), }  "))
    dataset = opened(folder, skip_log=tmp_path / "skipped.jsonl", max_skipped=0.3, **options)
    assert len(joined(dataset.once(16), "index")) == 13
    reasons = {e["name"]: e["reason"] for e in map(json.loads, (tmp_path / "skipped.jsonl").read_text().splitlines())}
    assert sorted(reasons) == ["class 0/float.npy", "class 0/four.npy", "class 1/huge.npy"]
    assert "data.channels = 3, but the image has 4 channels; set it to 4" in reasons["class 0/four.npy"]
    with pytest.raises(LatelierError, match=r"16 of 16 images cannot be read.*set it to 3"):
        list(opened(folder, channels=5, max_skipped=1, **options).once(16))


@pytest.mark.parametrize("options", [{"in_memory": True}, {"in_memory": False}])
def test_following_may_leave_out_what_cannot_be_read(folder, options):
    spoil(folder, "02.png")
    plan = [(torch.tensor([1]), [False]), (torch.tensor([0, 1, 2]), [False] * 3)]
    (batch,) = opened(folder, max_skipped=0.1, **options).follow(plan, whole=False)
    assert batch["index"].tolist() == [0, 2]


def test_some_images_without_a_caption(folder):
    """Only what reads captions minds."""
    (folder / "class 0" / "02.txt").unlink()
    (folder / "class 0" / "04.txt").write_text("")  # an empty caption is meant
    dataset = opened(folder)
    assert joined(dataset.once(12), "caption")[1:3] == ["", ""]
    for narrower in ({}, {"classes": ["class 0"]}, {"length": 11}):
        with pytest.raises(LatelierError, match=r"^1 of \d+ images have no caption, the first class 0/02.png"):
            next(opened(folder, **narrower).captions())
    assert len(list(opened(folder, classes=["class 1"]).captions())) == 6
    assert list(opened(folder, empty_captions=True).captions())[1:3] == ["", ""]


def test_captions_that_are_no_text_cost_their_image_alone(folder):
    (folder / "class 0" / "02.txt").write_bytes(b"\xff\xfe\x00\xd8")
    dataset = opened(folder, max_skipped=0.1)
    assert len(list(dataset.captions())) == 11
    assert 1 not in joined(dataset.once(12), "index")


# -- streams ------------------------------------------------------------------------------------------------------


def parquet(path, count, broken=(), **columns):
    rows = []
    for i in range(count):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (i, i, i)).save(file, "PNG")
        rows.append({"bytes": file.getvalue()[: 40 if i in broken else None], "path": None})
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["x", "y"]))
    features |= {name: datasets.Value("string") for name in columns}
    table = {"image": rows, "label": [i % 2 for i in range(count)], **columns}
    datasets.Dataset.from_dict(table, features=features).to_parquet(path)
    return path


@pytest.mark.parametrize("workers", [0, 1])
def test_streamed_data_resume_and_split_alike(tmp_path, workers):
    path = parquet(tmp_path / "a.parquet", 30)
    options = {"streaming": True, "length": 30, "image_size": 8, "workers": workers}
    whole = take(opened(path, **options), 12, 8)
    values = ((joined(whole, "image")[:, 0, 0, 0] + 1) * 127.5).round().long()
    assert torch.equal(values, joined(whole, "index"))
    assert torch.equal(values % 2, joined(whole, "label"))
    assert sorted(values[:30].tolist()) == list(range(30))
    assert sorted(values[30:60].tolist()) == list(range(30))
    assert_same(whole[9:], take(opened(path, **options), 3, 8, start=72))
    parts = [iter(take(opened(path, **options), 8, 8, process=p, processes=2, accumulation=2)) for p in range(2)]
    assert_same(whole[:4], [next(parts[p]) for _ in range(8) for p in range(2)])
    once = joined(opened(path, **options).once(7, 1, 2), "index")
    assert once.tolist() == list(range(1, 30, 2))


def test_streamed_data_with_damaged_rows(tmp_path):
    path, log = parquet(tmp_path / "a.parquet", 20, broken=(3,)), tmp_path / "skipped.jsonl"
    options = {"streaming": True, "length": 20, "image_size": 8}
    dataset = opened(path, skip_log=log, max_skipped=0.05, **options)
    index = joined(take(dataset, 10, 4), "index")
    assert len(index) == 40
    assert 3 not in index
    assert 3 not in joined(dataset.once(4), "index")
    assert [json.loads(line)["index"] for line in log.read_text().splitlines()] == [3]
    with pytest.raises(LatelierError, match="1 of 20"):
        take(opened(path, max_skipped=0, **options), 10, 4)
