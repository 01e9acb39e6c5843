"""dopri5: exact where the field is known, and a sampler like the others."""

import pytest
import torch

from latelier.diffusion.process import DDPM, Flow
from latelier.diffusion.schedulers import DormandPrince
from latelier.errors import LatelierError
from latelier.recipe import Sample
from sampled import sampled

MEAN, STD = 1.5, 0.4


def gaussian_velocity(x, t):
    """dx/dt of a flow whose data are N(MEAN, STD^2): E[eps - z | x_t]."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    slope = (t - (1 - t) * STD**2) / variance
    return slope * (x - (1 - t) * MEAN) - MEAN


def test_a_known_flow_is_followed_to_its_end():
    noise = torch.randn(4, 3, 2, 2)
    calls = []
    latents = DormandPrince().integrate(gaussian_velocity, noise, lambda done, total: calls.append(done))
    torch.testing.assert_close(latents, MEAN + STD * noise, atol=5e-3, rtol=0)  # the flow map of Gaussians is affine
    assert calls == list(range(1, len(calls) + 1))
    assert len(calls) > 10


def test_it_is_a_sampler_of_flows():
    class Known(torch.nn.Module):
        def forward(self, x_t, t, condition=None):
            return gaussian_velocity(x_t, t.view(-1, 1, 1, 1))

    sample = Sample(sampler="dopri5")
    latents = sampled(Known(), Flow(), sample, (3, 2, 2), [0, 1])
    heun = sampled(Known(), Flow(), Sample(sampler="heun", steps=400), (3, 2, 2), [0, 1])
    torch.testing.assert_close(latents, heun, atol=5e-3, rtol=0)
    with pytest.raises(LatelierError, match="'dopri5' does not go with a ddpm process"):
        sampled(Known(), DDPM(), sample, (3, 2, 2), [0])


def test_a_field_that_is_not_finite_is_refused():
    with pytest.raises(LatelierError, match=r"velocity at t = 1\.0000 is not finite"):
        DormandPrince().integrate(lambda x, t: x * float("nan"), torch.ones(1, 1, 1, 1))
