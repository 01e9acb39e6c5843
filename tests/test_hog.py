"""Histograms of oriented gradients: the original's numbers, the definition in loops, directions that are known."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import synth
import torch

from latelier.losses.hog import hog, hog_width
from tiny import refused

FOLDER = Path(__file__).parent / "golden"


def same_but_for(few, one, other, atol=2e-5):
    """A rounding error may carry a pixel over the border of a bin: so many cells may differ."""
    wrong = ((one - other).abs() > atol + 1e-4 * other.abs()).any(-1)
    assert wrong.sum() <= few, f"{wrong.sum()} of {wrong.numel()} differ"


def test_original_implementation():
    golden = np.load(FOLDER / "maetok_hog.npz")
    assert json.loads(bytes(golden["meta"]))["inputs"]["image"] == "synthetic_images(1, 256, 40)"
    same_but_for(3, hog(synth.synthetic_images(1, 256, 40), 16), torch.from_numpy(golden["hog"]))


def test_original_masked_error():
    golden = np.load(FOLDER / "maetok_aux_256.npz")
    mask = torch.from_numpy(golden["token_mask"]).bool()
    squared = (torch.from_numpy(golden["aux_hog"]) - hog(synth.synthetic_images(1, 256, 50), 16)).square().mean(-1)
    np.testing.assert_allclose(squared[mask].mean(), golden["loss_hog"][0], 1e-4, 1.8e-5)


def definition(image, patch):
    """One channel (h, w), pixel by pixel, in double precision."""
    h, w = len(image), len(image[0])
    bell = [math.exp(-((i - 7.5) ** 2) / (2 * 8**2)) for i in range(16)]
    cells = np.zeros((9, h // 8, w // 8))

    def at(y, x):
        y, x = (-i if i < 0 else 2 * (n - 1) - i if i >= n else i for i, n in ((y, h), (x, w)))
        return image[y][x]

    for y in range(h):
        for x in range(w):
            gx = sum(k * (at(y + d, x - 1) - at(y + d, x + 1)) for d, k in ((-1, 1), (0, 2), (1, 1)))
            gy = sum(k * (at(y - 1, x + d) - at(y + 1, x + d)) for d, k in ((-1, 1), (0, 2), (1, 1)))
            bin_ = math.floor(math.atan2(gx, gy) / math.pi * 9) % 9
            weight = bell[y % 16] * bell[x % 16] / sum(bell) ** 2
            cells[bin_, y // 8, x // 8] += math.hypot(gx, gy) * weight
    cells /= np.sqrt((cells**2).sum(0, keepdims=True))
    k = patch // 8
    return [
        [cells[b, i * k + y, j * k + x] for b in range(9) for y in range(k) for x in range(k)]
        for i in range(h // patch)
        for j in range(w // patch)
    ]


@pytest.mark.parametrize(("size", "patch"), [((16, 32), 16), ((24, 16), 8), ((8, 40), 8)])
def test_definition(size, patch):
    images = torch.rand(1, 2, *size) * 2 - 1
    expected = torch.cat([torch.tensor(definition(c.double().tolist(), patch)) for c in images[0]], 1)
    assert hog(images, patch).shape == (1, len(expected), hog_width(patch, 2))
    same_but_for(0, hog(images, patch)[0].double(), expected, 1e-5)


@pytest.mark.parametrize(("axis", "bin_"), [(-1, 4), (-2, 0)])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_ramp_has_one_direction(axis, bin_, sign):
    ramp = sign * torch.linspace(-1, 1, 32)
    images = (ramp if axis == -1 else ramp[:, None]).expand(1, 1, 32, 32)
    expected = torch.zeros(9)
    expected[bin_] = 1.0  # the same for both signs: directions are unsigned
    torch.testing.assert_close(hog(images, 8), expected.expand(1, 16, 9))


def test_only_contours_count():
    for value in (0, 1, 77, 200, 255):
        assert not hog(torch.full((1, 3, 32, 16), value / 127.5 - 1), 16).any()
    images = synth.synthetic_images(1, 64, 3)
    same_but_for(2, hog(0.5 * images + 0.25, 16), hog(images, 16))
    moved = torch.roll(images, 16, -1)  # by one window
    same_but_for(0, hog(moved, 16).view(4, 4, 108)[:, 2:3], hog(images, 16).view(4, 4, 108)[:, 1:2])


def test_patches_group_the_same_cells():
    images = torch.rand(2, 3, 32, 48)
    fine = hog(images, 8).view(2, 2, 2, 3, 2, 27)  # (b, row, y, column, x, channel bin)
    torch.testing.assert_close(hog(images, 16), fine.permute(0, 1, 3, 5, 2, 4).reshape(2, 6, 108))


def test_precision_and_gradients():
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    plain = hog(images, 16)
    assert not plain.requires_grad
    assert plain.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(hog(images, 16), plain)
    norms = plain.view(1, 4, 3, 9, 4).norm(dim=3)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_sizes_that_do_not_fit():
    assert hog_width(16, 3) == 108
    refused(r"divisible by 8.* not 12", hog_width, 12, 3)
    refused("divisible by 8, not 20 x 16", hog, torch.rand(1, 3, 20, 16), 8)
    refused("divisible by 16, not 24 x 32", hog, torch.rand(1, 3, 24, 32), 16)
