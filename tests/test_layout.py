"""Layouts as tokens: closed forms, the original's tokens, and what users ask for."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from latelier.conditioning import layout
from latelier.conditioning.layout import LayoutCondition, LayoutConditioner, build, layout_tokens
from tiny import data_spec, refused

GOLDEN = Path(__file__).parent / "golden"
SIZES = {"tokens": 101, "objects": 3, "dim": 16, "layers": 1, "heads": 2, "head_dim": 4}
BOXES = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.1, 0.2, 0.3, 0.4]])
NOTHING = 100  # the last of 101 tokens; corners are on a grid of 10 x 10


@pytest.mark.parametrize("kind", ["plain", "flags", "nocrop"])
@pytest.mark.parametrize("how", ["full", "crop", "crop_flip"])
def test_golden_tokens(kind, how):
    arrays = np.load(GOLDEN / "ldm_layout_tokens.npz")
    inputs = json.loads(bytes(arrays["meta"]))["inputs"]
    corner, size = torch.tensor(inputs["boxes"], dtype=torch.float64).split(2, dim=1)  # x y, w h
    labels, flags = torch.tensor(inputs["categories"]), None
    if kind == "flags":
        labels, flags = labels % 180, torch.tensor(inputs["flags"]).long() @ torch.tensor([1, 2, 4, 8])
    x, y, w, h = (0.0, 0.0, 1.0, 1.0) if how == "full" else inputs["crop"]
    found = layout_tokens(
        torch.cat([corner, corner + size], dim=1), labels, flags, 180 if kind == "flags" else 600,
        with_crop=kind != "nocrop", crop=(x, y, x + w, y + h), flip=how == "crop_flip",
    )  # fmt: skip
    np.testing.assert_array_equal(found.numpy(), arrays[f"{kind}_{how}"])


def tokens(boxes=BOXES, labels=(3, 4), flags=None, form="coco", **options):
    labels, flags = torch.tensor(labels), None if flags is None else torch.tensor(flags)
    return layout_tokens(boxes, labels, flags, 5, form, 101, 3, **options).tolist()


def test_a_layout_by_hand():
    # Row * 10 + column, rows and columns are 9 times the coordinate: .1 -> 1 (.9), .2 -> 2 (1.8), .3 -> 3, .4 -> 4.
    assert tokens() == [3, 0, 99, 4, 21, 43, NOTHING, NOTHING, NOTHING, 0, 99]
    assert tokens(with_crop=False) == [3, 0, 99, 4, 21, 43, NOTHING, NOTHING, NOTHING]
    assert tokens(flip=True)[3:6] == [4, 26, 48]  # x .1..3 becomes .7..9: columns 6 and 8
    assert tokens(order=[1, 0])[:6] == [4, 21, 43, 3, 0, 99]
    assert layout.grid_side(8192) == 90


def test_only_the_flags_of_the_form_are_told():
    assert tokens(flags=[3, 8])[0::3][:2] == [3 + 5, 4]  # group; coco has no other flag
    assert tokens(flags=[3, 8], form="openimages")[0::3][:2] == [3 + 5 * 3, 4 + 5 * 8]


def test_a_crop_drops_what_is_outside_and_is_in_the_tokens():
    right = (0.5, 0.0, 1.0, 1.0)
    assert tokens(crop=right) == [3, 0, 99, *[NOTHING] * 6, 4, 99]  # column 4.5 is rounded to the even 4
    assert tokens(crop=right, flip=True)[-2:] == [0, 94]  # the seen half is now on the left
    touching = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.25, 0.0, 0.5625, 0.5]])
    assert tokens(touching, crop=right)[:9:3] == [4, NOTHING, NOTHING]  # what only touches the crop is outside


def test_of_too_many_objects_the_largest_stay_in_their_order():
    side = torch.tensor([0.1, 0.5, 0.2, 0.9, 0.6])
    boxes = torch.stack([torch.zeros(5), torch.zeros(5), side, side], dim=1)
    assert tokens(boxes, [0, 1, 2, 3, 4])[:9:3] == [1, 3, 4]
    assert tokens(boxes, [0, 1, 2, 3, 4], order=[4, 0, 3, 2, 1])[:9:3] == [4, 3, 1]


@pytest.fixture
def conditioner():
    return LayoutConditioner(["cat", "dog", "cow"], **SIZES)


def test_what_users_ask_for(conditioner):
    wanted = [[("dog", 0, 0, 1, 1), {"class": 2, "box": [0.1, 0.2, 0.3, 0.4], "flags": 1}], []]
    batch = conditioner.inputs(wanted, (32, 32))
    made = conditioner.prepare(batch)["layout_tokens"]
    assert made[0].tolist() == [1, 0, 99, 2 + 3, 21, 43, NOTHING, NOTHING, NOTHING, 0, 99]
    assert made[1].tolist() == [*[NOTHING] * 9, 0, 99]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ([("hen", 0, 0, 1, 1)], "Unknown class of boxes 'hen'; this model knows: cat, dog, cow"),
        ([(3, 0, 0, 1, 1)], "Unknown class of boxes 3"),
        ([("cat", 0, 0, 1.2, 1)], r"\[0.0, 0.0, 1.2, 1.0\] of 'cat'"),
        ([("cat", 0.5, 0, 0.5, 1)], "x0 < x1"),
        ([("cat", 0, float("nan"), 1, 1)], "nan"),
        ([("cat", 0, 0, 1)], r"the object \('cat', 0, 0, 1\)"),
        ([{"box": [0, 0, 1, 1]}], r"the object \{'box'"),
        ([{"class": "cat", "box": [0, 0, 1, 1], "flags": 2}], r"flags = 2 of 'cat' is not within 0..1"),
        ([("cat", 0, 0, 1, 1)] * 4, "4 objects, but this model reads 3 at most"),
        ("a cat", "'a cat'"),
    ],
)
def test_layouts_that_are_none(conditioner, layout, message):
    refused(message, conditioner.inputs, [layout], (32, 32))


def records(draw):
    three = torch.cat([BOXES, torch.tensor([[0.5, 0.5, 0.7, 0.7]])])
    boxes, labels = [three] * len(draw), [torch.tensor([0, 1, 2])] * len(draw)
    return {"boxes": boxes, "box_labels": labels, "sample_id": torch.tensor(draw)}


def test_the_order_is_addressed_by_draw(conditioner):
    made = conditioner.prepare(records(list(range(40))))["layout_tokens"]  # (40, 11)
    again = conditioner.prepare(records([7, 3]))["layout_tokens"]
    assert torch.equal(again, made[[7, 3]])
    orders = {tuple(row[:9:3].tolist()) for row in made}
    assert len(orders) == 6  # every order of three objects, and no other
    assert all(sorted(order) == [0, 1, 2] for order in orders)


def test_a_crop_in_the_batch_carries_boxes_to_the_whole_image(conditioner):
    batch = records([0])
    batch["boxes"], batch["box_labels"] = [torch.tensor([[0.0, 0.0, 1.0, 0.5]])], [torch.tensor([1])]
    batch["crop"] = torch.tensor([[0.0, 0.4, 0.5, 0.9]])
    made = conditioner.prepare(batch)["layout_tokens"][0].tolist()
    assert made[:3] == [1, 40, 64]  # y .4 to .65: rows 4 (3.6) and 6 (5.85); x 0 to .5: columns 0 and 4
    assert made[-2:] == [40, 84]  # y .9: row 8 (8.1)


def test_dropped_rows_are_told_nothing_at_all(conditioner):
    batch = conditioner.prepare(records([0, 1]))
    told = conditioner(batch).tokens  # (2, 11, 16)
    dropped = conditioner(batch, torch.tensor([True, False])).tokens
    nothing = conditioner({"layout_tokens": torch.full((1, 11), NOTHING)}).tokens
    assert told.shape == (2, 11, 16)
    torch.testing.assert_close(dropped[0], nothing[0])
    torch.testing.assert_close(dropped[1], told[1])
    assert not torch.allclose(dropped[0], told[0])


def test_neighbouring_corners_begin_alike():
    conditioner = LayoutConditioner(["cat", "dog"], tokens=257, dim=64, layers=1, heads=2, head_dim=8)
    table = conditioner.transformer.token_embed.weight[:256].view(16, 16, 64)
    similar = torch.nn.functional.cosine_similarity(table[7, 7], table, dim=-1)  # (16, 16)
    assert similar[7, 8] > similar[7, 10] > similar[7, 14]
    assert similar[8, 7] > similar[10, 7] > similar[14, 7]
    nothing = torch.nn.functional.cosine_similarity(conditioner.transformer.token_embed.weight[256], table, dim=-1)
    assert nothing.max() < similar[7, 10]  # it has no place


def test_what_a_token_is_begins_as_loud_as_what_it_says():
    transformer = LayoutConditioner(["cat", "dog"], tokens=257, dim=64, layers=1, heads=2, head_dim=8).transformer
    tokens, order = transformer.token_embed.weight, transformer.pos_embed.weight
    corners, classes = tokens[16:256], tokens[:2]
    for table in (classes, order):
        assert 0.7 < table.std() / corners.square().mean().sqrt() < 1.4


def test_folder_round_trip(conditioner, tmp_path):
    conditioner.save_pretrained(tmp_path)
    opened = LayoutConditioner.from_pretrained(tmp_path)
    batch = conditioner.prepare(records([5]))
    assert torch.equal(opened.prepare(records([5]))["layout_tokens"], batch["layout_tokens"])
    torch.testing.assert_close(opened(batch).tokens, conditioner.eval()(batch).tokens)


def test_built_for_a_recipe():
    section = LayoutCondition(kind="layout", form="openimages", **SIZES)
    built = build(section, data_spec(box_names=["cat", "dog"]))
    assert (built.config["names"], built.config["seed"]) == (["cat", "dog"], 5)
    assert (built.token_width, built.spatial_channels) == (16, 0)
    refused(r"no boxes; give them by data\.boxes", build, section, data_spec())
    seven, row = data_spec(box_names=list("abcdefg")), data_spec(box_names=["cat"], latent_shape=(8, 32))
    refused("tokens = 101 has no room for 7 classes in form openimages", build, section, seven)
    refused("choose a tokenizer with a 2-D grid", build, LayoutCondition(kind="layout", layout_map_channels=4), row)


def test_boxes_are_painted_by_how_much_they_cover():
    boxes = torch.tensor([[0.0, 0.0, 0.5, 0.25], [0.375, 0.5, 0.75, 1.0], [0.25, 0.5, 0.5, 1.0]])
    found = layout.draw_layout_map(boxes, torch.tensor([1, 0, 0]), 3, (4, 4))
    assert found[1].tolist() == [[1, 1, 0, 0], [0] * 4, [0] * 4, [0] * 4]
    assert found[0].tolist() == [[0] * 4, [0] * 4, [0, 1, 1, 0], [0, 1, 1, 0]]  # the larger share of 1 and a half
    assert not found[2].any()
    wide = layout.draw_layout_map(boxes[:1], torch.tensor([2]), 3, (2, 8))
    assert wide[2].tolist() == [[0.5] * 4 + [0] * 4, [0] * 8]


def test_a_painted_layout_is_concatenated_and_dropped_with_its_tokens():
    conditioner = LayoutConditioner(["cat", "dog"], **SIZES, layout_map_channels=5, latent_factor=8)
    assert conditioner.spatial_channels == 5
    asked = [[("cat", 0.0, 0.0, 0.5, 0.5)], [("dog", 0.5, 0.5, 1.0, 1.0)]]
    batch = conditioner.inputs(asked, (16, 32))
    batch |= conditioner.prepare(batch)
    cond, dropped = conditioner(batch), conditioner(batch, torch.tensor([True, False]))
    assert cond.spatial.shape == (2, 5, 2, 4)
    assert cond.spatial[0, :, 0, :2].abs().min() > 0
    assert not cond.spatial[0, :, 1].any()
    assert not dropped.spatial[0].any()
    assert torch.equal(dropped.spatial[1], cond.spatial[1])
    images = {**batch, "image": torch.zeros(2, 3, 32, 32)}
    assert conditioner.prepare(images)["layout_map"].shape == (2, 2, 4, 4)
