"""Masks: exact counts, and shares that follow their distribution and depend on the images seen alone."""

import math

import pytest
import torch
from scipy import stats

from latelier.keyed_random import KeyedRandom
from latelier.tokenizers.maetok_targets import MaskShare, draw_mask


@pytest.mark.parametrize(
    ("patches", "share", "masked"),
    [(256, 0.4, 103), (256, 0.6, 154), (16, 0.25, 4), (100, 0.07, 7), (9, 0.01, 1), (16, 0.0, 0), (16, 0.99, 16)],
)
def test_every_row_masks_exactly_as_many(patches, share, masked):
    mask = draw_mask(torch.rand(50, patches), share)
    assert (mask.sum(1) == masked).all()
    assert masked == math.ceil(round(patches * share, 9))


def test_positions_are_uniform_and_independent_between_images():
    order = KeyedRandom(0, torch.arange(4000)).uniform("mask", 16)
    mask = draw_mask(order, 0.5).double()
    # 8 of 16 without replacement: mean 1/2, covariance -1/60 of two patches, none between neighbours in the stream.
    torch.testing.assert_close(mask.mean(0), torch.full((16,), 0.5).double(), rtol=0, atol=0.04)
    covariance = mask.T.cov()
    off = ~torch.eye(16, dtype=torch.bool)
    torch.testing.assert_close(covariance[off].mean().item(), -1 / 60, rtol=0.01, atol=0)
    centred = mask - 0.5
    assert (centred[1:] * centred[:-1]).mean().abs() < 0.01
    assert torch.equal(draw_mask(order[7:9], 0.5).double(), mask[7:9])


def test_shares_are_truncated_normal():
    """MAETok's: 0.4 to 0.6 around 0.6 with deviation 0.25, of which the mean is 0.505."""
    shares = [MaskShare().draw(0, step * 512) for step in range(500)]
    assert 0.4 <= min(shares) < 0.405
    assert 0.595 < max(shares) <= 0.6
    normal = torch.distributions.Normal(0.0, 1.0)
    a, b = torch.tensor(-0.8), torch.tensor(0.0)
    density = normal.log_prob(a).exp() - normal.log_prob(b).exp()
    mean = 0.6 + 0.25 * (density / (normal.cdf(b) - normal.cdf(a))).item()
    assert mean == pytest.approx(0.505, abs=5e-4)
    assert sum(shares) / len(shares) == pytest.approx(mean, abs=3 * 0.058 / 500**0.5)
    assert stats.kstest(shares, stats.truncnorm(-0.8, 0, 0.6, 0.25).cdf).pvalue > 0.01


def test_share_depends_on_seed_and_images_alone():
    torch.manual_seed(1)
    first = MaskShare().draw(3, 512)
    torch.manual_seed(2)
    assert MaskShare().draw(3, 512.0) == first
    assert MaskShare().draw(4, 512) != first
    assert MaskShare().draw(3, 1024) != first
    assert 0.4 <= MaskShare().draw(3, math.inf) <= 0.6  # the far end of training, which a check tries


def test_shares_at_the_ends():
    """A far mode presses shares to the nearer end, no spread is a number, and equal numbers are masked all the same."""
    masking = MaskShare(low=0.4, high=0.6, mode=0.0, std=0.01)
    assert all(0.4 <= masking.draw(0, n) < 0.405 for n in range(50))
    assert MaskShare(low=0.5, high=0.5).draw(0, 7) == 0.5
    assert MaskShare(low=0.0, high=0.0, mode=0.0).draw(0, 7) == 0.0
    assert (draw_mask(torch.zeros(3, 10), 0.5).sum(1) == 5).all()


@pytest.mark.parametrize(("seen", "share"), [(0, 0.6), (250, 0.45), (500, 0.3), (1000, 0.0), (5000, 0), (math.inf, 0)])
def test_fading_falls_linearly_to_nothing(seen, share):
    assert MaskShare(low=0.0, fade=1000).draw(0, seen) == pytest.approx(share)
