"""Moves in front of and behind an encoder: exact ones, unrelated ones, and errors in closed form."""

import pytest
import torch
import torch.nn.functional as F

from latelier.analysis.equivariance import equivariance, moves
from latelier.analysis.sample import collect
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.conv import IdentityTokenizer
from test_mixture import batches
from test_mixture import codec as same
from test_one_dimensional import make_codec
from tiny import autoencoder, refused

F2 = ["shift", "half-shift", "flip", "scale"]


class Pool(torch.nn.Module):
    """Latents are means of 2 x 2 pixels, perhaps with signs that alternate along an axis; images are enlarged."""

    def __init__(self, axis=None):
        super().__init__()
        self.axis, self.config = axis, {"in_channels": 1, "latent_channels": 1, "patch_size": 2}

    def encode(self, images):
        return type("Encoded", (), {"latents": self.sign(F.avg_pool2d(images, 2))})

    def decode(self, z):
        return type("Decoded", (), {"sample": self.sign(z).repeat_interleave(2, 2).repeat_interleave(2, 3)})

    def sign(self, z):
        if self.axis is None:
            return z
        return z * (1 - 2 * (torch.arange(z.shape[self.axis]) % 2)).view((-1, 1) if self.axis == 2 else (1, -1))


def codec_of(tokenizer):
    """With statistics of the means of four numbers that lie evenly in [-1, 1]."""
    return Codec(tokenizer, torch.zeros(1), torch.full((1,), 12**-0.5))


def noise(n=200, size=8):
    return torch.rand(n, 1, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def measure(codec, images, size=100):
    return equivariance(collect(codec, batches(images, size), 5000), codec)


def test_means_of_pixels_move_with_the_image():
    found = measure(Codec(Pool()), noise())
    assert list(found) == [name for move in F2 for name in (f"equivariance-{move}", f"psnr-after-{move}")]
    for move in ("shift", "flip", "scale"):
        assert found[f"equivariance-{move}"].value == pytest.approx(0, abs=1e-10)
    shift = found["equivariance-shift"]
    assert shift.details["n"] == 200
    assert shift.details["latent_scale"] == "measured on the first 200 images"
    assert shift.details["moves"][0] == "round by 2 pixels down, 0 right"
    for move in ("shift", "flip"):  # the decoder enlarges pixels: it moves with them too
        after = found[f"psnr-after-{move}"]
        assert after.value == pytest.approx(after.details["reconstruction_psnr"], abs=1e-4)
        assert after.interval[0] < after.value < after.interval[1]


def test_half_a_position_of_white_noise():
    """Of pixels p of variance v along the way: a = (p1 + p2) / 2, b = (p0 + p1 + p2 + p3) / 4.

    Their difference has the variance v / 4, they themselves v / 2 and v / 4.
    """
    found = measure(Codec(Pool()), noise(256, 32))
    assert found["equivariance-half-shift"].value == pytest.approx(0.25 / 0.375, abs=0.01)


def test_signs_of_places_stay_where_they_are():
    """Where rows have alternating signs, of all moves one position downwards alone turns them."""
    found = measure(codec_of(Pool(axis=2)), noise())
    assert found["equivariance-shift"].value == pytest.approx(4 / 3, abs=0.01)  # of three shifts 4, 0, 0
    assert found["equivariance-flip"].value == pytest.approx(0, abs=1e-10)
    assert found["psnr-after-shift"].value < found["psnr-after-flip"].value - 1
    columns = measure(codec_of(Pool(axis=3)), noise())
    assert columns["equivariance-flip"].value == pytest.approx(4, abs=0.01)  # the flip of an even row turns all signs
    assert columns["psnr-after-flip"].value < 10


class Unrelated(Pool):
    """Latents in which the places, and so the images, are mixed by a rotation."""

    def encode(self, images):
        z = F.avg_pool2d(images, 2)
        numbers = z[0].numel()
        turn = torch.linalg.qr(torch.randn(numbers, numbers, generator=torch.Generator().manual_seed(3)))[0]
        return type("Encoded", (), {"latents": (z.flatten(1) @ turn).view_as(z)})


def test_latents_that_know_no_places_are_unrelated():
    found = measure(codec_of(Unrelated()), noise(256, 16))
    for move in ("shift", "flip", "scale"):
        assert found[f"equivariance-{move}"].value == pytest.approx(2, abs=0.2)


def test_scale_and_shift_of_latents_and_batches_change_nothing():
    class Loud(Pool):
        def encode(self, images):
            return type("Encoded", (), {"latents": 50 * super().encode(images).latents + 7})

        def decode(self, z):
            return super().decode((z - 7) / 50)

    images = noise(60, 16)
    one, other = measure(Codec(Pool()), images), measure(Codec(Loud()), images, 7)
    assert {n: m.value for n, m in other.items()} == pytest.approx({n: m.value for n, m in one.items()}, abs=1e-4)


def test_moves_are_those_that_the_size_allows():
    assert list(moves((16, 16), (8, 8))) == F2
    assert list(moves((8, 8), (8, 8))) == ["shift", "flip", "scale"]  # a position is one pixel
    assert list(moves((24, 16), (3, 2))) == ["shift", "half-shift", "flip"]  # half of 3 is not whole
    assert (list(moves((16, 16), (1, 1))), len(moves((16, 16), (2, 2))["shift"])) == ([], 3)
    assert len({move.words for move in moves((32, 32), (2, 2))["shift"]}) == 3
    x = torch.arange(16.0).view(1, 1, 4, 4)
    down, right, both = moves((4, 4), (4, 4))["shift"]
    assert (down.image(x)[0, 0, 1, 0], right.image(x)[0, 0, 0, 1]) == (0, 0)
    assert both.latent(x)[0, 0, 2, 2] == 0


def test_pixel_space_moves_with_itself():
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = measure(Codec(IdentityTokenizer()), images)
    assert [m.value for name, m in found.items() if "equi" in name] == pytest.approx([0, 0, 0], abs=1e-10)
    assert found["psnr-after-flip"].value == pytest.approx(100)


def test_autoencoders_straight_from_diffusers_and_latents_in_a_row():
    found = measure(Codec(autoencoder(2, in_channels=1, out_channels=1)), noise(6, 16))
    assert list(found) == [name for move in F2 for name in (f"equivariance-{move}", f"psnr-after-{move}")]
    assert 0 < found["equivariance-shift"].value < 4
    assert len(found["equivariance-shift"].details["by_channel"]) == 4
    refused("are all equal", measure, Codec(Pool()), torch.zeros(3, 1, 8, 8))
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert (measure(make_codec(), images), measure(same(flat=True), images[:, :2])) == ({}, {})
