"""Holes: never empty, never everything, the same for the same number, and as large as the settings say."""

import dataclasses

import numpy as np
import pytest
import torch

from latelier.data.corruptions import SETTINGS, draw_mask, draw_masks
from latelier.errors import LatelierError


@pytest.mark.parametrize("name", list(SETTINGS))
@pytest.mark.parametrize("size", [(64, 64), (48, 80), (8, 8), (1, 2)])
def test_part_of_the_image_is_a_hole(name, size):
    masks = draw_masks(SETTINGS[name], size, seed=3, numbers=torch.arange(60))
    assert masks.shape == (60, 1, *size)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    share = masks.mean((1, 2, 3))
    assert share.min() > 0
    assert share.max() < 1
    if name != "train":
        assert share.max() <= 0.5


def test_row_depends_on_its_number_only():
    numbers = torch.tensor([5, 0, 2**40])
    together = draw_masks(SETTINGS["train"], (32, 32), 1, numbers)
    alone = torch.cat([draw_masks(SETTINGS["train"], (32, 32), 1, n[None]) for n in numbers])
    assert torch.equal(together, alone)
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together, draw_masks(SETTINGS["train"], (32, 32), 2, numbers))
    assert draw_masks(SETTINGS["train"], (32, 32), 1, numbers[:0]).shape == (0, 1, 32, 32)


def test_one_box_is_a_rectangle_within_limits():
    setting = dataclasses.replace(SETTINGS["train"], box_share=1.0, boxes=(1, 1))
    for number in range(40):
        mask = draw_mask(setting, (256, 300), np.random.default_rng(number))
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert 30 <= len(rows) <= 150
        assert 30 <= len(columns) <= 150
        assert rows[0] >= 10
        assert rows[-1] < 246
        assert columns[0] >= 10
        assert columns[-1] < 290


def test_one_segment_is_as_thick_as_wanted():
    setting = dataclasses.replace(
        SETTINGS["train"], box_share=0.0, strokes=(1, 1), segments=(1, 1), width=(20, 20), length=(0, 0)
    )
    areas = [draw_mask(setting, (256, 256), np.random.default_rng(n)).sum() for n in range(40)]
    assert max(areas) == pytest.approx(np.pi * 10.5**2, rel=0.1)  # a dot where no edge cuts it
    halved = [draw_mask(setting, (128, 128), np.random.default_rng(n)).sum() for n in range(40)]
    assert max(halved) == pytest.approx(np.pi * 5.5**2, rel=0.15)


def test_masks_scale_with_the_image():
    small, large = (
        draw_masks(SETTINGS["thick"], (side, side), 0, torch.arange(150)).mean().item() for side in (64, 256)
    )
    assert small == pytest.approx(large, abs=0.05)


def test_boxes_are_as_frequent_as_the_setting_says():
    only_boxes = [
        draw_mask(dataclasses.replace(SETTINGS["train"], box_share=share), (64, 64), np.random.default_rng(n))
        for share in (0.0, 1.0)
        for n in range(50)
    ]
    straight = [_straight(mask) for mask in only_boxes]
    assert sum(straight[:50]) < 5
    assert sum(straight[50:]) == 50


def _straight(mask):
    """Whether all edges are those of a few boxes: hardly any two rows differ."""
    return len(np.unique(mask, axis=0)) <= 2 * 4 + 1


def test_no_room():
    with pytest.raises(LatelierError, match="1 x 1 pixels has no room"):
        draw_mask(SETTINGS["train"], (1, 1), np.random.default_rng(0))
