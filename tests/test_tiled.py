"""Tiled sampling of latents that are larger than those of training."""

import pytest
import torch
from torch import nn

from latelier.conditioning.condition import Condition
from latelier.diffusion.process import Flow
from latelier.diffusion.tiled import LEAST, MOST, border_weight, tiled
from latelier.errors import LatelierError
from latelier.recipe import Sample
from latelier.tokenizers.codec import starts
from sampled import sampled
from tiny import refused


class Pointwise(nn.Module):
    """A denoiser of each position alone; notes how many rows of which size it sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x_t, t, condition):
        self.seen.append(tuple(x_t.shape))
        out = torch.sin(x_t) + t[:, None, None, None]
        if condition is None:
            return out
        tokens = condition.tokens.mean((1, 2))[:, None, None, None]
        return out * condition.vector[:, :, None, None] + condition.spatial + tokens


def some_condition(b, grid):
    return Condition(
        torch.randn(b, 1), torch.randn(b, 3, 2), torch.ones(b, 3, dtype=torch.bool), torch.randn(b, 1, *grid)
    )


@pytest.mark.parametrize("grid", [(8, 8), (9, 13), (4, 21), (3, 30)])
@pytest.mark.parametrize(("tile", "stride", "batch"), [(4, 2, 5), (5, 5, 1), (8, 3, 64)])
def test_a_pointwise_denoiser_is_itself(grid, tile, stride, batch):
    x, t, cond = torch.randn(3, 2, *grid), torch.tensor([0.2, 0.5, 0.9]), some_condition(3, grid)
    inner = Pointwise()
    torch.testing.assert_close(tiled(inner, tile, stride, batch)(x, t, cond), Pointwise()(x, t, cond))
    assert all(shape[0] <= max(batch, 3) and max(shape[2:]) <= tile for shape in inner.seen)


def test_memory_is_bounded_by_the_tile():
    inner = Pointwise()
    tiled(inner, 4, 2, batch=6)(torch.randn(2, 3, 12, 20), torch.rand(2), None)
    assert {shape[1:] for shape in inner.seen} == {(3, 4, 4)}
    assert sum(shape[0] for shape in inner.seen) == 2 * 5 * 9  # tiles of two images
    assert max(shape[0] for shape in inner.seen) == 6


def test_one_tile_is_the_denoiser_itself():
    x, t, cond = torch.randn(2, 1, 6, 5), torch.rand(2), some_condition(2, (6, 5))
    inner = nn.Conv2d(1, 1, 3, padding=1)
    assert tiled(inner, None) is inner

    class Convolution(nn.Module):
        def forward(self, x_t, t, condition):
            return inner(x_t)

    assert torch.equal(tiled(Convolution(), 6)(x, t, cond), inner(x))
    assert not torch.allclose(tiled(Convolution(), 4)(x, t, cond), inner(x))  # tiles end where images do not


def test_predictions_are_blended_by_the_distance_from_the_border():
    """Two tiles of 4 with stride 2 on a line of 6: a constant each, mixed where both are."""

    class Numbered(nn.Module):
        def forward(self, x_t, t, condition):
            return x_t[:, :, :, :1].expand_as(x_t)  # the value of a tile's first column: 0 or 2

    x = torch.arange(6.0).expand(1, 1, 1, 6)
    out = tiled(Numbered(), 4, 2)(x, torch.zeros(1), None)[0, 0, 0]
    near = [0.125, 0.375, 0.375, 0.125]
    mixed = [2 * near[i] / (near[i] + near[i + 2]) for i in (0, 1)]
    torch.testing.assert_close(out, torch.tensor([0, 0, *mixed, 2, 2]))


def test_weights():
    weight = border_weight((4, 100))
    assert weight.shape == (4, 100)
    assert weight.min() == pytest.approx(LEAST)
    assert weight.max() <= MOST
    torch.testing.assert_close(weight, weight.flip(0, 1))
    assert (weight[1, 50], weight[0, 50]) == (0.375, 0.125)


@pytest.mark.parametrize("length", range(1, 30))
def test_every_position_is_covered(length):
    for tile in range(1, 9):
        for stride in range(1, tile + 1):
            first = starts(length, tile, stride)
            assert {i for s in first for i in range(s, min(s + tile, length))} == set(range(length))
            assert max(first) + tile <= max(length, tile)
            assert first == sorted(set(first))


def test_what_does_not_fit_is_refused():
    refused("tile_stride = 5 leaves gaps between tiles of 4", tiled, Pointwise(), 4, 5)
    with pytest.raises(LatelierError, match=r"tile = 4 cuts latents that lie on a plane, .* makes 16 1-D latents"):
        sampled(tiled(Pointwise(), 4), Flow(), Sample(steps=2), (2, 16), [0])
    assert Sample(tile=4, tile_stride=3).tile_stride == 3
    for wrong in ({"tile_stride": 3}, {"tile": 2, "tile_stride": 3}):
        with pytest.raises(ValueError, match=r"at most sample.tile"):
            Sample(**wrong)
