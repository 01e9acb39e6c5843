"""Masks for inpainting, and small images for super-resolution, against closed forms."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from latelier.data import corruptions
from latelier.data.corruptions import SETTINGS, bicubic, convolve, degrade, draw_mask, draw_masks, gaussian
from latelier.errors import LatelierError
from latelier.images import to_uint8
from tiny import refused


@pytest.mark.parametrize("name", list(SETTINGS))
@pytest.mark.parametrize("size", [(64, 64), (48, 80), (8, 8), (1, 2)])
def test_part_of_the_image_is_a_hole(name, size):
    masks = draw_masks(SETTINGS[name], size, seed=3, sample_ids=torch.arange(60))
    assert masks.shape == (60, 1, *size)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    share = masks.mean((1, 2, 3))
    assert share.min() > 0
    assert share.max() < 1
    if name != "train":
        assert share.max() <= 0.5


def test_mask_depends_on_its_number_only():
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
        for found, side in ((rows, 256), (columns, 300)):
            assert 30 <= len(found) <= 150
            assert 10 <= found[0] < found[-1] < side - 10


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
    for share, fewest, most in ((0.0, 0, 4), (1.0, 50, 50)):
        setting = dataclasses.replace(SETTINGS["train"], box_share=share)
        masks = [draw_mask(setting, (64, 64), np.random.default_rng(n)) for n in range(50)]
        # Where all edges are those of a few boxes, hardly any two rows differ.
        assert fewest <= sum(len(np.unique(mask, axis=0)) <= 2 * 4 + 1 for mask in masks) <= most


def smooth(count=3, channels=3, height=32, width=48):
    """Images with some structure at every scale."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.rand(count, channels, height // k, width // k, generator=generator) for k in (1, 4, 16)]
    parts = [torch.nn.functional.interpolate(part, (height, width), mode="bicubic") for part in parts]
    return (sum(parts) / 3 * 2 - 1).clamp(-1, 1)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_bicubic_is_that_of_pil(factor):
    pixels = to_uint8(smooth())  # (b, c, h, w)
    ours = to_uint8(bicubic(pixels / 127.5 - 1, factor))
    for mine, source_image in zip(ours, pixels):
        image = Image.fromarray(source_image.movedim(0, -1).numpy())
        theirs = np.asarray(image.resize((48 // factor, 32 // factor), Image.Resampling.BICUBIC))
        assert np.abs(mine.movedim(0, -1).numpy().astype(int) - theirs).max() <= 1


@pytest.mark.parametrize(
    ("kind", "channels"), [("bicubic", 1), ("bicubic", 3), ("bicubic", 5), ("bsrgan-light", 1), ("bsrgan-light", 3)]
)
def test_range_size_and_determinism(kind, channels):
    images, numbers = smooth(4, channels).sign(), torch.tensor([7, 8, 9, 2**45])  # black and white: filters overshoot
    low = degrade(images, 4, kind, 0, numbers)
    assert (low.shape, low.dtype) == ((4, channels, 8, 12), torch.float32)
    assert -1 <= low.min() < low.max() <= 1
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(low, degrade(images, 4, kind, 0, numbers))


def test_degraded_row_depends_on_its_number_only():
    images, numbers = smooth(3), torch.tensor([4, 5, 6])
    together = degrade(images, 4, "bsrgan-light", 0, numbers)
    alone = [degrade(image, 4, "bsrgan-light", 0, n) for image, n in zip(images.split(1), numbers.split(1))]
    assert torch.equal(together, torch.cat(alone))
    same = degrade(images[:1].expand(3, -1, -1, -1), 4, "bsrgan-light", 0, numbers)
    assert not torch.equal(same[0], same[1])
    assert not torch.equal(together, degrade(images, 4, "bsrgan-light", 1, numbers))
    assert degrade(images[:0], 4, "bsrgan-light", 0, numbers[:0]).shape == (0, 3, 8, 12)


@pytest.mark.parametrize("factor", [2, 3, 4, 8])
def test_constant_images_stay_constant_but_for_noise(factor):
    grey = torch.full((6, 3, 24, 48), 0.2)
    torch.testing.assert_close(bicubic(grey, factor), grey[..., : 24 // factor, : 48 // factor])
    low = degrade(grey, factor, "bsrgan-light", 0, torch.arange(6))
    assert (low - 0.2).abs().mean() < 3 * 2 / 127.5  # noise of at most two grey levels, and JPEG
    assert (low.mean() - 0.2).abs() < 0.02


def test_light_degradation_keeps_the_image():
    images = smooth(8, height=64, width=64)
    low = degrade(images, 4, "bsrgan-light", 0, torch.arange(8))
    clean = bicubic(images, 4)
    near = (low - clean).pow(2).mean((1, 2, 3))
    far = (low.roll(1, 0) - clean).pow(2).mean((1, 2, 3))
    assert (near < far).all()
    assert (near > 0).all()


def test_noise_has_one_or_two_levels():
    x, rng = torch.full((1, 3, 64, 64), 0.5), np.random.default_rng(0)
    alike, levels = 0, set()
    for _ in range(60):
        added = (corruptions.noise(x, rng) - x)[0]  # (c, h, w)
        if torch.equal(added[0], added[1]):
            alike += 1
            levels.add(round(added.std().item() * 255))
        assert added.std() * 255 < 2.2
        assert added.mean().abs() * 255 < 0.2
    assert levels == {1, 2}
    assert 12 <= alike <= 36  # four of ten


def test_gaussian_kernels():
    round_one = gaussian(13, np.eye(2) * 2.0)
    assert round_one.sum().item() == pytest.approx(1)
    torch.testing.assert_close(round_one, round_one.T)
    place = torch.arange(13) - 6.0
    assert (round_one.sum(0) * place**2).sum().item() == pytest.approx(2.0, rel=0.01)
    wide = gaussian(13, np.diag([3.0, 0.5]))  # x, y
    assert (wide.sum(0) * place**2).sum().item() == pytest.approx(3.0, rel=0.05)
    assert (wide.sum(1) * place**2).sum().item() == pytest.approx(0.5, rel=0.05)
    point = gaussian(5, np.zeros((2, 2)))
    assert point[2, 2] == 1
    x = smooth(1)
    torch.testing.assert_close(convolve(x, point), x)
    torch.testing.assert_close(convolve(torch.ones(1, 2, 3, 4), round_one), torch.ones(1, 2, 3, 4))


def test_jpeg_is_near_and_8_bit():
    x = smooth(1) / 2 + 0.5
    saved = corruptions.jpeg(x, np.random.default_rng(0))
    assert 0 < (saved - x).abs().mean() < 0.1
    torch.testing.assert_close(saved * 255, (saved * 255).round(), atol=1e-4, rtol=0)


def test_errors_say_what_to_do():
    numbers = torch.arange(1)
    refused("1 x 1 pixels is too small", draw_mask, SETTINGS["train"], (1, 1), np.random.default_rng(0))
    refused("1 or 3 channels, but the images have 4", degrade, torch.zeros(1, 4, 8, 8), 4, "bsrgan-light", 0, numbers)
    with pytest.raises(LatelierError, match="30 x 32 is not divisible by the factor 4; use 32 x 32"):
        degrade(torch.zeros(1, 3, 30, 32), 4, "bicubic", 0, numbers)
    with pytest.raises(LatelierError, match="Unknown degradation 'blur'; there are: bicubic, bsrgan-light"):
        degrade(torch.zeros(1, 3, 32, 32), 4, "blur", 0, numbers)
