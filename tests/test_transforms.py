"""Crops, flips, backgrounds and channels, against closed forms."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from latelier.data.transforms import Transform, center_crop, composite, crop_boxes, mirror, nearest, smooth, to_float
from tiny import refused


def transform(seed=0, **options):
    size = options.pop("image_size", 64)
    return Transform((size, size) if isinstance(size, int) else size, **options, seed=seed)


def ramp(width, height):
    """An image whose red is its relative x and whose green is its relative y."""
    x, y = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    array = np.stack([*np.broadcast_arrays(x[None] * 255, y[:, None] * 255), np.zeros((height, width))], -1)
    return Image.fromarray(array.round().astype(np.uint8))


def stored(image, format="JPEG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return Image.open(io.BytesIO(file.getvalue()))


# -- crops --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 64), (300, 200), (200, 300), (31, 50), (129, 128)])
@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_center_crop_covers_the_target(shape, size):
    """The image's centre stays in the centre, and the pixels' pitch is the same along both axes."""
    done = np.asarray(center_crop(ramp(*shape), size)).astype(float)
    assert done.shape == (size[1], size[0], 3)
    pitch = max(size[0] / shape[0], size[1] / shape[1])
    x, y = done[size[1] // 2, :, 0] / 255 * shape[0], done[:, size[0] // 2, 1] / 255 * shape[1]
    assert abs(x.mean() - shape[0] / 2) < 1 / pitch + 0.5
    assert abs(y.mean() - shape[1] / 2) < 1 / pitch + 0.5
    for line, pixels in ((x, size[0]), (y, size[1])):
        assert np.ptp(line) == pytest.approx((pixels - 1) / pitch, rel=0.08)


def test_center_crop_halves_with_boxes_first():
    """ADM's crop of an image exactly 2^k times as large is the mean of its blocks."""
    array = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    done = np.asarray(center_crop(Image.fromarray(array), (16, 16)))
    halves = array.reshape(32, 2, 32, 2).mean((1, 3))
    quarters = halves.reshape(16, 2, 16, 2).mean((1, 3))
    assert np.abs(done - quarters).max() <= 2  # four roundings


def test_a_image_of_the_right_size_is_not_touched():
    array = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    pixels, region = transform(image_size=(32, 48)).pixels(Image.fromarray(array))
    assert np.array_equal(pixels.permute(1, 2, 0), array)
    assert region == (0, 0, 1, 1)


def test_resize_keeps_everything():
    pixels, region = transform(crop="resize", image_size=(20, 40)).pixels(ramp(100, 100))
    assert pixels.shape == (3, 20, 40)
    assert region == (0, 0, 1, 1)
    assert pixels[0, 0, 0] < 8
    assert pixels[0, 0, -1] > 247


@pytest.mark.parametrize("shape", [(200, 100), (90, 130)])
def test_random_crops_have_the_asked_area_and_shape(shape):
    t = transform(crop="random", crop_scale=(0.5, 0.8), image_size=(32, 48))
    largest = min(shape[0] / 48, shape[1] / 32) ** 2 * 48 * 32
    areas, corners = [], set()
    for draw in range(40):
        pixels, (x0, y0, x1, y1) = t.pixels(ramp(*shape), draw)
        w, h = (x1 - x0) * shape[0], (y1 - y0) * shape[1]
        assert w / h == pytest.approx(48 / 32, rel=1e-6)
        assert min(x0, y0) >= 0
        assert max(x1, y1) <= 1
        areas.append(w * h / largest)
        corners.add((round(x0, 6), round(y0, 6)))
        seen = pixels[:, 16, 24] / 255  # the pixel in the middle shows where the crop is
        assert seen[0].item() == pytest.approx((x0 + x1) / 2, abs=0.03)
        assert seen[1].item() == pytest.approx((y0 + y1) / 2, abs=0.03)
    assert 0.5 <= min(areas) < 0.56
    assert 0.74 < max(areas) <= 0.8 + 1e-6
    assert len(corners) == 40


def test_random_choices_depend_on_seed_and_draw():
    image, options = ramp(90, 70), {"crop": "random", "image_size": 32}
    one = transform(0, **options).pixels(image, 5)[0]
    assert torch.equal(one, transform(0, **options).pixels(image, 5)[0])
    assert not torch.equal(one, transform(1, **options).pixels(image, 5)[0])
    assert not torch.equal(one, transform(0, **options).pixels(image, 6)[0])
    assert torch.equal(transform(0, **options).pixels(image)[0], transform(0, image_size=32).pixels(image)[0])
    flips = transform(0).flipped(torch.arange(1000))
    assert 420 < sum(flips) < 580
    assert flips[10:20] == transform(0).flipped(torch.arange(10, 20))
    assert not any(transform(0, flip=False).flipped(torch.arange(100)))


# -- JPEG ---------------------------------------------------------------------------------------------------------


def test_draft_decoding_looks_like_full_decoding():
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (3, 4, 3), np.uint8)).resize((500, 375), Image.Resampling.BICUBIC)
    t = transform(image_size=64)
    opened = stored(smooth, quality=95)
    fast = t.pixels(opened)[0].float()
    assert opened.size == (125, 94)  # a quarter of the pixels each way was decoded
    full = t.pixels(stored(smooth, quality=95).convert("RGB"))[0].float()
    assert (fast - full).abs().mean() < 3  # they may differ by a part of a pixel


@pytest.mark.parametrize("options", [{}, {"crop": "random", "crop_scale": (0.25, 0.25)}, {"crop": "resize"}])
def test_draft_never_leaves_too_few_pixels(options):
    opened = stored(ramp(520, 260))
    pixels, region = transform(image_size=(64, 64), **options).pixels(opened, 3)
    assert (region[2] - region[0]) * opened.width >= 64
    assert (region[3] - region[1]) * opened.height >= 64
    assert pixels.shape == (3, 64, 64)


def test_camera_orientation_is_undone():
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned a quarter to the left
    opened = stored(ramp(400, 300).transpose(Image.Transpose.ROTATE_90), exif=exif)
    upright = transform(image_size=(30, 40)).pixels(opened)[0].float()
    expected = transform(image_size=(30, 40)).pixels(ramp(400, 300))[0].float()
    assert (upright - expected).abs().mean() < 3


# -- channels and backgrounds -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("background", "value"), [("white", 255), ("black", 0), ("gray", 128)])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("channels", [1, 3])
def test_transparent_images_get_the_background(background, value, mode, channels):
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    image.paste((200, 200, 200, 255), (8, 0, 16, 16))
    image = stored(image.quantize(8) if mode == "P" else image.convert(mode), "PNG")
    t = transform(background=background, channels=channels, image_size=16)
    pixels = t.pixels(image)[0]
    assert pixels.shape == (channels, 16, 16)
    assert (pixels[..., :8] == value).all()
    assert (pixels[..., 8:] == 200).all()


def test_composite_is_the_weighted_mean():
    pixels = torch.randint(0, 256, (5, 4, 6, 7), dtype=torch.uint8)
    colours = torch.randint(0, 256, (5, 3), dtype=torch.uint8)
    a = pixels[:, 3:].double() / 255
    expected = a * pixels[:, :3] + (1 - a) * colours[..., None, None]
    assert (composite(pixels, colours) - expected).abs().max() <= 0.5
    opaque = pixels.clone()
    opaque[:, 3] = 255
    assert torch.equal(composite(opaque, colours), pixels[:, :3])


def test_random_background_is_drawn_for_each_draw():
    t = transform(background="random", image_size=8)
    clear = t.pixels(Image.new("RGBA", (8, 8)))[0]
    opaque = t.pixels(Image.new("RGB", (8, 8), (10, 20, 30)))[0]
    assert clear.shape == opaque.shape == (4, 8, 8)
    done = t.finish(torch.stack([clear, clear, opaque]), [False] * 3, torch.tensor([1, 2, 3]))
    assert not torch.equal(done[0], done[1])
    assert (done[0] == done[0][:, :1, :1]).all()
    assert torch.equal(done[2], to_float(opaque[:3]))
    assert torch.equal(t.finish(clear[None], [False], torch.tensor([2])), done[1:2])


def test_grey_and_deep_images():
    grey = transform(channels=1, image_size=16)
    assert grey.pixels(ramp(20, 20))[0].shape == (1, 16, 16)
    wide = Image.fromarray(np.full((16, 16), 40_000, np.uint16))
    assert (grey.pixels(wide)[0] == 40_000 >> 8).all()
    array = np.random.default_rng(0).integers(0, 256, (16, 16, 5), np.uint8)
    assert np.array_equal(transform(channels=5, image_size=16).pixels(array)[0], array.transpose(2, 0, 1))
    rgba = Image.fromarray(array[..., :4])
    assert np.array_equal(transform(channels=4, image_size=16).pixels(rgba)[0], array[..., :4].transpose(2, 0, 1))


def test_wrong_number_of_channels():
    with pytest.raises(ValueError, match=r"data.channels = 4.*3 channels"):
        transform(channels=4).pixels(ramp(8, 8))
    with pytest.raises(ValueError, match=r"data.channels = 3.*5 channels"):
        transform().pixels(np.zeros((8, 8, 5), np.uint8))
    with pytest.raises(ValueError, match="float64"):
        transform().pixels(np.zeros((8, 8, 3)))


def test_refused_crops():
    refused(r"crop_scale = \(0.9, 0.5\)", transform, crop_scale=(0.9, 0.5))


def test_to_float():
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    done = to_float(values)
    assert (done.min(), done.max()) == (-1, 1)
    assert torch.allclose(done.flatten(), torch.linspace(-1, 1, 256), atol=1e-6)


# -- what lies in the image's plane -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(120, 64), (63, 171), (333, 251)])
@pytest.mark.parametrize("crop", ["center", "random", "resize"])
@pytest.mark.parametrize("flip", [False, True])
def test_a_rectangle_stays_in_its_box(shape, crop, flip):
    """Pixels, box, label map and a map of half the size show the same rectangle, whatever is done to the image."""
    w, h = shape
    x0, y0, x1, y1 = w // 3, h // 3, w // 3 + w // 4, h // 3 + h // 3
    image = Image.new("RGB", shape)
    image.paste((255, 0, 0), (x0, y0, x1, y1))
    plane = (np.asarray(image)[..., 0] > 0).astype(np.uint8)
    small = np.asarray(image.getchannel(0).resize((-(-w // 2), -(-h // 2)), Image.Resampling.BOX))
    record = {
        "image": image,
        "boxes": np.array([[0, 0, 0, 0], [x0 / w, y0 / h, x1 / w, y1 / h]], np.float32),
        "box_labels": np.array([0, 1]),
        "box_flags": np.array([0, 8]),
        "segmentation": plane,
        "map": small,
    }
    for draw in range(4):
        done = transform(crop=crop, image_size=(40, 40)).record(record, draw)
        done = mirror(done) | {"image": done["image"].flip(-1)} if flip else done
        red = done["image"][0].float() / 255
        assert (done["box_labels"].tolist(), done["box_flags"].tolist()) == ([1], [8])
        centres = (torch.arange(40) + 0.5) / 40
        left, top, right, bottom = done["boxes"][0].tolist()
        boxed = ((centres > left) & (centres < right)) & ((centres > top) & (centres < bottom))[:, None]
        covered = torch.tensor([right - left, bottom - top]).prod() * 1600  # pixels
        rim = 2 * 40 * (right - left + bottom - top)
        assert (boxed.float() - red).abs().sum() < 0.5 * rim
        assert red.sum().item() == pytest.approx(covered.item(), rel=0.04)
        assert (done["segmentation"].float() - red).abs().sum() < 0.5 * rim
        assert (done["map"][0].float() / 255 - red).abs().sum() < 0.5 * rim
        for axis, (low, high) in enumerate(((left, right), (top, bottom))):  # centres of mass
            if low > 0.01 and high < 0.99:
                planes = ((red, 0.25), (done["map"][0].float(), 0.25), (done["segmentation"].float(), 0.55))
                for seen, pixels in planes:  # whole pixels are all that a map without mixing can show
                    mass = seen.sum(axis)
                    assert (mass * centres).sum() / mass.sum() == pytest.approx((low + high) / 2, abs=pixels / 40)


def test_maps_of_one_and_two_bytes_alike():
    plane = np.random.default_rng(0).integers(0, 256, (30, 20, 2), np.uint8)
    region, size = (0.1, 0.2, 0.8, 0.9), (8, 9)
    one, two = smooth(plane, region, size), smooth(plane.astype(np.uint16) * 257, region, size)
    assert (one.dtype, two.dtype, one.shape) == (np.uint8, np.int32, (2, 8, 9))
    assert np.abs(two / 257 - one).max() <= 1
    flat = smooth(np.full((7, 5), 65535, np.uint16), region, size)
    assert (flat == 65535).all()


def test_mirror():
    record = {
        "boxes": torch.tensor([[0.1, 0.2, 0.4, 0.8]]),
        "box_flags": torch.tensor([1]),
        "segmentation": torch.arange(6).reshape(2, 3),
        "map": torch.arange(6).reshape(1, 2, 3),
        "caption": "left",
        "caption_mirrored": "right",
        "label": 3,
    }
    done = mirror(record)
    assert torch.allclose(done["boxes"], torch.tensor([[0.6, 0.2, 0.9, 0.8]]))
    assert done["segmentation"].tolist() == [[2, 1, 0], [5, 4, 3]]
    assert (done["map"].tolist(), done["box_flags"].tolist()) == ([[[2, 1, 0], [5, 4, 3]]], [1])
    assert (done["caption"], done["label"]) == ("right", 3)
    again = mirror(done)
    assert torch.allclose(again["boxes"], record["boxes"])
    assert again["caption"] == "left"


def test_crop_boxes_and_nearest():
    boxes, kept = crop_boxes(np.array([[0.25, 0, 1, 1], [0, 0, 0.2, 0.2]], np.float32), (0.5, 0.5, 1.0, 1.0))
    assert (kept.tolist(), boxes.tolist()) == ([True, False], [[0, 0, 1, 1]])
    _, kept = crop_boxes(np.array([[0.1, 0, 0.3, 1], [0.3, 0, 0.31, 1]], np.float32), (0.3, 0.0, 0.9, 1.0))
    assert kept.tolist() == [False, True]  # the first only touches the crop
    plane = np.arange(16).reshape(4, 4)
    assert nearest(plane, (0.5, 0.0, 1.0, 0.5), (2, 2)).tolist() == [[2, 3], [6, 7]]
    assert np.array_equal(nearest(plane, (0.0, 0.0, 1.0, 1.0), (8, 8)), plane.repeat(2, 0).repeat(2, 1))
