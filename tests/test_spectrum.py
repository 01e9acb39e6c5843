"""Effective ranks in closed form."""

import pytest
import torch

from latelier.analysis.sample import collect
from latelier.analysis.statistics import channel_covariance, covariance_eigenvalues, effective_rank, spectrum, subsample
from test_mixture import batches, codec, noise
from tiny import refused


def measure(images, flat=False):
    found = spectrum(collect(codec(flat), batches(images), 5000))
    assert list(found) == ["effective-rank", "channel-rank"]
    return list(found.values())


def rank(images, flat=False):
    return [result.value for result in measure(images, flat)]


def test_white_noise_uses_all_directions():
    whole, channels = measure(noise(4000))
    assert (whole.value, channels.value) == (pytest.approx(8, abs=0.05), pytest.approx(2, abs=0.01))
    assert (whole.details["n"], whole.details["dims"]) == (4000, 8)
    assert channels.details["channel_std"] == [(1, pytest.approx(1, abs=0.05)), (2, pytest.approx(1, abs=0.05))]
    assert [number for number, _ in whole.details["spectrum"]] == list(range(1, 9))
    assert sum(share for _, share in whole.details["spectrum"]) == pytest.approx(1)
    assert "warning" not in whole.details


def test_ranks_of_few_directions():
    assert effective_rank(torch.tensor([4.0, 2.0, 2.0, 0.0])) == pytest.approx(2**1.5)  # the entropy of unequal ones
    direction = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    line = torch.linspace(-1, 3, 50).view(-1, 1, 1, 1) * direction
    assert rank(line) == pytest.approx([1, 1])
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
    z = torch.randn(600, 3, 5, generator=torch.Generator().manual_seed(0)) + 4  # over positions of all images
    assert channel_covariance(z) == pytest.approx(z.double().transpose(0, 1).flatten(1).cov(), abs=1e-6)


def test_more_dimensions_than_images():
    x = torch.randn(30, 200, generator=torch.Generator().manual_seed(0))
    values = covariance_eigenvalues(x)  # through the Gram matrix
    assert values.shape == (30,)
    assert values == pytest.approx(torch.linalg.eigvalsh(x.double().T.cov()).flip(0)[:30], abs=1e-6)
    images = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    whole, channels = measure(images)
    assert 3 < whole.value <= 4
    assert "n = 5 images show at most 4 of 32" in whole.details["warning"]
    assert "warning" not in channels.details


def test_long_spectra_are_thinned():
    values = torch.arange(1000.0)
    short = subsample(values)
    assert len(short) <= 64
    assert short[0] == (1, 0.0)
    assert short[-1] == (1000, 999.0)
    assert all(value == number - 1 for number, value in short)


def test_nothing_to_see():
    refused("at least 2 images", measure, noise(1))
    refused("equal, or not finite", measure, torch.ones(9, 2, 2, 2))
