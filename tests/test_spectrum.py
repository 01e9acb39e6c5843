"""Effective ranks in closed form."""

import pytest
import torch

from latelier.errors import LatelierError
from latelier.evaluation.spectrum import (
    channel_covariance,
    covariance_eigenvalues,
    effective_rank,
    measure_spectrum,
    subsample,
)
from latelier.recipe import Evaluate
from test_mixture import batches, codec, noise


def rank(images, flat=False):
    return [m.value for m in measure_spectrum(codec(flat), batches(images), Evaluate(samples=5000), "toy")]


def test_white_noise_uses_all_directions():
    whole, channels = measure_spectrum(codec(), batches(noise(4000)), Evaluate(samples=4000), "toy/val", {"run": 7})
    assert (whole.name, channels.name) == ("effective-rank", "channel-rank")
    assert whole.value == pytest.approx(8, abs=0.05)
    assert channels.value == pytest.approx(2, abs=0.01)
    assert (whole.receipt["n"], whole.receipt["dims"], whole.receipt["run"]) == (4000, 8, 7)
    assert channels.receipt["channel_std"] == [(1, pytest.approx(1, abs=0.05)), (2, pytest.approx(1, abs=0.05))]
    assert [number for number, _ in whole.receipt["spectrum"]] == list(range(1, 9))
    assert sum(share for _, share in whole.receipt["spectrum"]) == pytest.approx(1)
    assert "warning" not in whole.receipt


def test_one_direction_is_rank_one():
    direction = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    line = torch.linspace(-1, 3, 50).view(-1, 1, 1, 1) * direction
    assert rank(line) == pytest.approx([1, 1])


def test_two_equal_directions_are_rank_two():
    images = torch.zeros(40, 2, 2, 2)
    images[::4, 0, 0, 1], images[1::4, 0, 0, 1] = 3, -3
    images[2::4, 1, 1, 0], images[3::4, 1, 1, 0] = 3, -3
    assert rank(images) == pytest.approx([2, 2])
    images[:, 1] = 0  # and one of them gone
    assert rank(images, flat=True) == pytest.approx([1, 1])


def test_a_channel_that_follows_another_is_not_counted():
    images = noise(3000)
    images[:, 1] = -5 * images[:, 0] + 2
    assert rank(images) == pytest.approx([4, 1], abs=0.05)


def test_entropy_of_unequal_eigenvalues():
    assert effective_rank(torch.tensor([4.0, 2.0, 2.0, 0.0])) == pytest.approx(2**1.5)


def test_more_dimensions_than_images():
    x = torch.randn(30, 200, generator=torch.Generator().manual_seed(0))
    values = covariance_eigenvalues(x)  # through the Gram matrix
    assert values.shape == (30,)
    assert values == pytest.approx(torch.linalg.eigvalsh(x.double().T.cov()).flip(0)[:30], abs=1e-6)
    images = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    whole, channels = measure_spectrum(codec(), batches(images), Evaluate(), "toy")
    assert 3 < whole.value <= 4
    assert "n = 5 images show at most 4 of 32" in whole.receipt["warning"]
    assert "warning" not in channels.receipt


def test_channels_are_counted_over_positions_of_all_images():
    z = torch.randn(600, 3, 5, generator=torch.Generator().manual_seed(0)) + 4
    assert channel_covariance(z) == pytest.approx(z.double().transpose(0, 1).flatten(1).cov(), abs=1e-6)


def test_long_spectra_are_thinned():
    values = torch.arange(1000.0)
    short = subsample(values)
    assert len(short) <= 64
    assert short[0] == (1, 0.0)
    assert short[-1] == (1000, 999.0)
    assert all(value == number - 1 for number, value in short)


def test_nothing_to_see():
    with pytest.raises(LatelierError, match="at least 2 images"):
        measure_spectrum(codec(), batches(noise(1)), Evaluate(), "toy")
    with pytest.raises(LatelierError, match="equal, or not finite"):
        measure_spectrum(codec(), batches(torch.ones(9, 2, 2, 2)), Evaluate(), "toy")
