"""Conditions that are concatenated to the noisy latents: label maps, small images, holes, image-like maps."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from latelier.conditioning import spatial as spatial_conditions
from latelier.conditioning.inputs import read_image, read_mask
from latelier.conditioning.spatial import (
    InpaintingConditioner,
    LowResolutionConditioner,
    MapConditioner,
    SegmentationConditioner,
    class_shares,
)
from latelier.data.corruptions import SETTINGS, bicubic, draw_masks
from latelier.errors import LatelierError
from latelier.sections import ByKind
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.conv import IdentityTokenizer
from tiny import autoencoder, data_spec, refused

MAPS = {"map_channels": 2, "channels": 5}
KINDS = {"segmentation": {}, "low-resolution": {"factor": 2}, "inpainting": {}, "map": MAPS}


@pytest.fixture
def codec():
    """Four pixels to a latent position, statistics that are not trivial."""
    return Codec(autoencoder(), torch.tensor([0.1, -0.2, 0.3, 0.0]), torch.tensor([0.5, 1.0, 2.0, 0.7]))


def spec(**changes):
    return data_spec(**{"segmentation_classes": 7, "latent_shape": (4, 6, 8), "seed": 3, **changes})


def batch(count=3, height=24, width=32):
    generator = torch.Generator().manual_seed(1)
    return {
        "image": torch.rand(count, 3, height, width, generator=generator) * 2 - 1,
        "segmentation": torch.randint(0, 7, (count, height, width), generator=generator),
        "map": torch.rand(count, 2, height, width, generator=generator) * 2 - 1,
        "sample_id": torch.arange(10, 10 + count),
    }


def build(kind, about=None, **settings):
    section = ByKind("latelier.conditioning:CONDITIONERS").section(kind)(kind=kind, **(settings or KINDS[kind]))
    return spatial_conditions.build(section, about or spec())


@torch.no_grad()
def prepared(conditioner, entries, codec):
    return {**entries, **conditioner.prepare(entries, codec)}


# -- what all of them do -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("size", [(24, 32), (40, 8)])
def test_channels_on_the_grid_of_the_image(kind, size, codec):
    conditioner = build(kind)
    condition = conditioner(prepared(conditioner, batch(3, *size), codec))
    assert condition.spatial.shape == (3, conditioner.spatial_channels, size[0] // 4, size[1] // 4)
    assert condition.vector is condition.tokens is condition.mask is None
    assert conditioner.token_width == 0


@pytest.mark.parametrize("kind", list(KINDS))
def test_rows_do_not_see_each_other(kind, codec):
    conditioner, entries = build(kind), batch()
    together = conditioner(prepared(conditioner, entries, codec)).spatial
    for i in range(3):
        alone = prepared(conditioner, {key: value[i : i + 1] for key, value in entries.items()}, codec)
        torch.testing.assert_close(conditioner(alone).spatial[0], together[i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", list(KINDS))
def test_dropped_rows_are_empty(kind, codec):
    conditioner = build(kind)
    entries = prepared(conditioner, batch(), codec)
    cond = conditioner(entries).spatial
    dropped = conditioner(entries, torch.tensor([False, True, False])).spatial
    assert torch.equal(dropped[[0, 2]], cond[[0, 2]])
    nothing = torch.zeros_like(cond[1])
    if kind == "inpainting":
        nothing[-1] = 1  # all of it is a hole
    assert torch.equal(dropped[1], nothing)
    assert not torch.equal(cond[1], nothing)


@pytest.mark.parametrize("kind", list(KINDS))
def test_folder_and_half_precision_give_the_same(kind, codec, tmp_path):
    conditioner, entries = build(kind), batch()
    conditioner.save_pretrained(tmp_path)
    again = type(conditioner).from_pretrained(tmp_path)
    ours, theirs = (c(prepared(c, entries, codec)).spatial for c in (conditioner, again))
    assert torch.equal(ours, theirs)
    half = conditioner.to(torch.bfloat16)(prepared(again, entries, codec)).spatial
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), ours, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("kind", list(KINDS))
def test_only_projections_learn(kind, codec):
    conditioner, entries = build(kind), batch()
    spatial = conditioner(prepared(conditioner, entries, codec)).spatial
    names = [name for name, _ in conditioner.named_parameters()]
    assert names == (["projection.weight"] if kind in ("segmentation", "map") else [])
    if names:
        spatial.square().sum().backward()
        assert conditioner.projection.weight.grad.abs().sum() > 0
    assert not spatial.requires_grad or names
    assert all(p.grad is None for p in codec.tokenizer.parameters())


@pytest.mark.parametrize("kind", list(KINDS))
def test_latents_in_a_row_and_data_without_the_entry_are_refused(kind, codec):
    refused(f"{kind}.*makes 64 1-D latents", build, kind, spec(latent_shape=(16, 64)))
    key = "image" if kind in ("inpainting", "low-resolution") else kind
    refused(f"needs data with '{key}'", build(kind).prepare, {"sample_id": torch.arange(1)}, codec)


# -- segmentation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1, 2, 8])
def test_shares_are_the_halved_one_hot_map(factor):
    ids = batch()["segmentation"]
    slow = F.one_hot(ids, 7).movedim(-1, 1).float()  # (b, k, h, w)
    for _ in range(factor.bit_length() - 1):
        slow = F.interpolate(slow, scale_factor=0.5, mode="bilinear")
    torch.testing.assert_close(class_shares(ids, 7, factor), slow)


def test_shares_for_other_factors_are_areas():
    ids = torch.randint(0, 4, (2, 12, 18))
    slow = F.interpolate(F.one_hot(ids, 4).movedim(-1, 1).float(), size=(2, 3), mode="area")
    torch.testing.assert_close(class_shares(ids, 4, 6), slow)


def test_one_class_gives_its_column():
    conditioner = SegmentationConditioner(5, 3, 4)
    spatial = conditioner({"segmentation": torch.full((1, 8, 8), 2, dtype=torch.uint8)}).spatial
    expected = conditioner.projection.weight[:, 2].expand(3, 2, 2)  # (k, 1, 1) each
    torch.testing.assert_close(spatial[0], expected)


def test_label_maps_of_users(tmp_path):
    conditioner = SegmentationConditioner(256, 3, 4)
    ids = np.array([[0, 1], [2, 200]])
    expected = torch.from_numpy(ids.repeat(4, 0).repeat(2, 1))  # (8, 4)
    grey, palette = Image.fromarray(ids.astype(np.uint8)), Image.fromarray(ids.astype(np.uint8)).convert("P")
    palette.putdata(ids.flatten().tolist())
    palette.save(tmp_path / "map.png")
    deep = Image.fromarray(ids.astype(np.int32))
    for entry in (ids, torch.from_numpy(ids), ids.astype(np.uint8), grey, palette, deep, str(tmp_path / "map.png")):
        assert torch.equal(conditioner.inputs([entry], (8, 4))["segmentation"][0], expected)
    assert conditioner.inputs([ids, grey], (2, 2))["segmentation"].shape == (2, 2, 2)


def test_label_maps_that_are_none(codec, tmp_path):
    conditioner = build("segmentation")
    cases = {
        "id 7, but ids go from 0 to 6": np.array([[0, 7]]),
        "id -1, but ids go": np.array([[0, -1]]),
        "1 x 2 of float64": np.array([[0.5, 1.0]]),
        "2 x 1 x 1 of int64": np.zeros((2, 1, 1), int),
        "this image is RGB": Image.new("RGB", (4, 4)),
        "no file": str(tmp_path / "none.png"),
        "not float": 0.5,
    }
    for message, entry in cases.items():
        with pytest.raises(LatelierError, match=message):
            conditioner.prepare(conditioner.inputs([entry], (8, 8)), codec)
    refused("id 255", conditioner.prepare, {"segmentation": torch.full((1, 8, 8), 255)}, codec)
    refused("do not say how many classes", build, "segmentation", spec(segmentation_classes=None))
    chosen = build("segmentation", classes=9)
    assert chosen.config["classes"] == 9


# -- low resolution ----------------------------------------------------------------------------------------------------


def test_equal_sizes_are_kept_and_larger_ones_folded_without_loss(codec):
    conditioner, entries = LowResolutionConditioner(4, latent_factor=4), batch()
    spatial = conditioner(prepared(conditioner, entries, codec)).spatial
    assert torch.equal(spatial, bicubic(entries["image"], 4))
    conditioner, low = LowResolutionConditioner(2, latent_factor=8), torch.rand(2, 3, 12, 16)
    spatial = conditioner({"low": low}).spatial
    assert spatial.shape == (2, 48, 3, 4)
    assert conditioner.spatial_channels == 48
    assert torch.equal(F.pixel_shuffle(spatial, 4), low)


def test_smaller_ones_are_enlarged():
    conditioner = LowResolutionConditioner(6, image_channels=1, latent_factor=4)
    spatial = conditioner({"low": torch.full((2, 1, 4, 2), 0.3)}).spatial
    torch.testing.assert_close(spatial, torch.full((2, 1, 6, 3), 0.3))
    ramp = torch.arange(8.0).expand(1, 1, 8, 8) / 8
    assert (LowResolutionConditioner(4, image_channels=1, latent_factor=1)({"low": ramp}).spatial.diff() >= 0).all()


def test_given_small_images_are_kept(codec):
    assert build("low-resolution").prepare({**batch(), "low": torch.zeros(3, 3, 12, 16)}, codec) == {}


def test_degradations_follow_draw_and_seed(codec):
    first, other = (LowResolutionConditioner(4, "bsrgan-light", seed=seed) for seed in (0, 1))
    entries = batch()
    low = first.prepare(entries, codec)["low"]
    assert torch.equal(first.prepare(entries, codec)["low"], low)
    assert not torch.equal(other.prepare(entries, codec)["low"], low)
    assert not torch.equal(first.prepare({**entries, "sample_id": entries["sample_id"] + 1}, codec)["low"], low)


def test_small_images_of_users(tmp_path):
    conditioner = LowResolutionConditioner(4)
    image = Image.fromarray(np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3))
    image.save(tmp_path / "low.png")
    expected = torch.from_numpy(np.array(image)).movedim(-1, 0).float() / 127.5 - 1
    for entry in (image, tmp_path / "low.png", np.asarray(image), expected, (expected * 0.999).double()):
        low = conditioner.inputs([entry, entry], (32, 24))["low"]
        torch.testing.assert_close(low, torch.stack([expected] * 2), atol=2e-3, rtol=0)
    message = "factor 4 draws images of 64 x 64 pixels from 16 x 16 ones; this one is 8 x 6: .*height=32, width=24"
    refused(message, conditioner.inputs, [image], (64, 64))
    refused("from none, as 4 does not divide it", conditioner.inputs, [image], (30, 24))
    refused("factor = 3 does not divide the tokenizer's factor 8", LowResolutionConditioner, 3, latent_factor=8)
    refused("factor = 3 does not divide", build, "low-resolution", spec(factor=8), factor=3)


# -- inpainting --------------------------------------------------------------------------------------------------------


def test_masked_latents_and_mask(codec):
    conditioner, entries = build("inpainting"), batch()
    done = prepared(conditioner, entries, codec)
    hole = draw_masks(SETTINGS["train"], (24, 32), 3, entries["sample_id"])
    assert torch.equal(done["hole"], hole)
    black = ((entries["image"] + 1) / 2 * (1 - hole)) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(done["masked"], codec.encode(black))
    assert torch.equal(done["hole_grid"], hole[..., ::4, ::4] * 2 - 1)
    spatial = conditioner(done).spatial
    assert torch.equal(spatial, torch.cat([done["masked"], done["hole_grid"]], 1))
    assert conditioner.spatial_channels == 5


def test_what_is_in_holes_is_not_seen(codec):
    conditioner, entries = build("inpainting"), batch()
    done = prepared(conditioner, entries, codec)
    elsewhere = torch.where(done["hole"] > 0.5, torch.rand(3, 3, 24, 32), entries["image"])
    again = prepared(conditioner, {**entries, "image": elsewhere}, codec)
    assert torch.equal(conditioner(again).spatial, conditioner(done).spatial)


def test_given_holes_in_pixel_space():
    conditioner, pixels = InpaintingConditioner(latent_channels=3), Codec(IdentityTokenizer(3, 3))
    hole = torch.zeros(1, 1, 4, 4)
    hole[..., :2] = 1
    done = prepared(conditioner, {"image": torch.full((1, 3, 4, 4), 0.5), "hole": hole}, pixels)
    spatial = conditioner(done).spatial
    expected = torch.full((1, 4, 4, 4), 0.5)
    expected[..., :2] = -1
    expected[:, 3] = hole[:, 0] * 2 - 1
    assert torch.equal(spatial, expected)


def test_latents_are_as_exact_as_the_codec(codec):
    conditioner, entries = build("inpainting"), batch()
    plain = prepared(conditioner, entries, codec)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prepared(conditioner, entries, codec)["masked"], plain["masked"])


def test_pairs_of_users(tmp_path):
    conditioner = build("inpainting")
    hole = torch.zeros(8, 12, dtype=torch.bool)
    hole[2:5, 3:] = True
    white = Image.fromarray(hole.numpy().astype(np.uint8) * 255)
    white.save(tmp_path / "mask.png")
    image = Image.new("RGB", (12, 8), (255, 0, 255))
    masks = [white, white.convert("1"), white.convert("RGB"), tmp_path / "mask.png", np.asarray(white)]
    masks += [hole, hole[None], hole.float() * 0.8, hole.to(torch.uint8), hole.to(torch.uint8) * 200]
    for mask in masks:
        given = conditioner.inputs([(image, mask)], (8, 12))
        assert torch.equal(given["hole"][0, 0], hole.float())
        assert given["image"][0, :, 0, 0].tolist() == [1, -1, 1]


def test_pairs_that_are_none():
    conditioner, image = build("inpainting"), Image.new("RGB", (12, 8))
    cases = {
        r"mask is 8 x 9 \(height x width\), but its image is 8 x 12": (image, Image.new("L", (9, 8))),
        "image is 4 x 4 .* not 8 x 12; .*height=4, width=4": (torch.zeros(3, 4, 4), torch.zeros(4, 4)),
        "pairs .image, mask., not Image": image,
        "pairs .image, mask., not tuple": (image,),
        "floats are in .0, 1., but these go from -1 to 0": (image, torch.zeros(8, 12) - torch.eye(8, 12)),
        "of torch.int64": (image, torch.zeros(8, 12, dtype=torch.int64)),
        "not 2 x 8 x 12 of torch.float32": (image, torch.zeros(2, 8, 12)),
    }
    for message, entry in cases.items():
        refused(message, conditioner.inputs, [entry], (8, 12))
    refused("Unknown masks 'thin'; there are: train, thick, medium", InpaintingConditioner, "thin")
    assert not read_mask(torch.zeros(4, 4), "inpainting").any()
    grey, half = Image.new("L", (4, 4), 200), Image.fromarray(np.repeat(np.uint8([[0, 255]] * 4), 2, axis=1))
    erased = Image.merge("LA", (grey, half))  # transparent on the left, as editors and other interfaces mark holes
    assert torch.equal(read_mask(erased, "mask"), torch.from_numpy(np.asarray(half) == 0))
    for alpha in (255, 0):  # says nothing: brightness counts
        assert torch.equal(
            read_mask(Image.merge("LA", (half, Image.new("L", (4, 4), alpha))), "mask"),
            torch.from_numpy(np.asarray(half) == 255),
        )


# -- maps --------------------------------------------------------------------------------------------------------------


def test_maps_are_averaged(codec):
    conditioner = MapConditioner(2, None, 4)
    entries = batch()
    spatial = conditioner(prepared(conditioner, entries, codec)).spatial
    torch.testing.assert_close(spatial, F.avg_pool2d(entries["map"], 4))
    assert not list(conditioner.parameters())
    projected = MapConditioner(2, 5, 4)
    weight = projected.projection.weight[:, :, 0, 0]  # (k, c)
    torch.testing.assert_close(projected(entries).spatial, torch.einsum("kc,bcij->bkij", weight, spatial))


def test_maps_of_users(codec):
    conditioner = build("map", map_channels=1)
    grey = Image.new("L", (10, 6), 255)
    deep = Image.fromarray(np.full((6, 10), 65535, np.uint16))
    for entry in (grey, deep, grey.convert("RGB"), torch.ones(1, 24, 32), np.full((5, 5), 255, np.uint8)):
        given = conditioner.inputs([entry], (24, 32))
        torch.testing.assert_close(given["map"], torch.ones(1, 1, 24, 32))
    refused("have 2 channels, but the model was made for 1; set the condition's", conditioner.prepare, batch(), codec)


# -- images of users -------------------------------------------------------------------------------------------------


def test_images_are_upright(tmp_path):
    stored = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    stored.save(tmp_path / "turned.png", exif=exif)
    pixels = read_image(tmp_path / "turned.png", 1, "maps")
    assert ((pixels[0] + 1) * 127.5).round().tolist() == [[3, 0], [4, 1], [5, 2]]


def test_images_that_are_none(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    cases = {
        "there is no file": "none.png",
        "cannot be read as an image": tmp_path / "text.png",
        "must have 3 channels.*this one is 4 x 4 x 3": torch.zeros(4, 4, 3),
        "mode F .32 bits.": Image.new("F", (4, 4)),
        "transparent pixels": clear,
        "float32 from 0 to 2": torch.zeros(3, 2, 2) + torch.tensor([0.0, 2.0]),
        "int64 from 0 to 0": torch.zeros(3, 2, 2, dtype=torch.int64),
        "not int": 3,
    }
    for message, entry in cases.items():
        refused(message, read_image, entry, 3, "low_resolution")
    opaque = Image.new("RGBA", (4, 4), (255, 0, 0, 255))
    assert read_image(opaque, 3, "low_resolution")[:, 0, 0].tolist() == [1, -1, -1]
    assert read_image(opaque, 4, "low_resolution")[:, 0, 0].tolist() == [1, -1, -1, 1]
