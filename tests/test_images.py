"""8-bit conversion, grids, PNG files."""

import numpy as np
import torch
from PIL import Image

from latelier.images import make_grid, make_pairs, round_to_8_bit, save_png, to_uint8


def test_levels_survive_the_round_trip_through_floats_and_are_clamped():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(levels.float() / 127.5 - 1), levels)
    assert to_uint8(torch.tensor([[[[-3.0, 3.0, 0.0]]]])).flatten().tolist() == [0, 255, 128]


def test_rounding_is_idempotent():
    images = torch.rand(2, 3, 8, 8) * 3 - 1.5
    once = round_to_8_bit(images)
    assert torch.equal(round_to_8_bit(once), once)
    assert (once - images.clamp(-1, 1)).abs().max() <= 0.5 / 127.5 + 1e-6


def test_grid_places_images_row_by_row():
    images = torch.stack([torch.full((3, 4, 6), value) for value in (-1.0, 0.0, 1.0)])
    grid = make_grid(images, columns=2, padding=1)
    assert grid.size == (2 * 6 + 1, 2 * 4 + 1)
    pixels = np.asarray(grid)
    assert (pixels[0, 0].tolist(), pixels[0, 7].tolist()) == ([0, 0, 0], [128, 128, 128])
    assert pixels[5, 0].tolist() == [255, 255, 255]


def test_one_column_without_padding_is_the_image():
    assert all(make_grid(torch.zeros(2, channels, 4, 4)).mode == "RGB" for channels in (1, 2, 3, 4, 7))
    image = torch.rand(1, 3, 5, 7) * 2 - 1
    assert torch.equal(torch.from_numpy(np.array(make_grid(image, 1, padding=0))).permute(2, 0, 1), to_uint8(image)[0])


def test_pairs_stand_above_each_other():
    upper, lower = torch.full((5, 3, 2, 2), 1.0), torch.full((5, 3, 2, 2), -1.0)
    pixels = np.asarray(make_pairs(upper, lower, columns=3))  # rows of 2 pixels, gaps of 2
    assert [pixels[y, 0, 0] for y in (0, 4, 8, 12)] == [255, 0, 255, 0]
    assert make_pairs(upper, lower, columns=8).size == (5 * 4 - 2, 2 * 4 - 2)


def test_png_is_whole_and_alone(tmp_path):
    path = save_png(Image.new("RGB", (3, 2), (1, 2, 3)), tmp_path / "deep" / "a.png")
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]
    assert Image.open(path).getpixel((0, 0)) == (1, 2, 3)
