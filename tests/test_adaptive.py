"""dopri5: exact where the field is known, and a sampler like the others."""

import pytest
import torch

from latelier.diffusion.process import DDPM, Flow
from latelier.diffusion.schedulers import DormandPrince
from latelier.errors import LatelierError
from latelier.recipe import Sample
from sampled import sampled
from test_sampling import MEAN, STD, GaussianData
from tiny import refused


def test_a_known_flow_is_followed_to_its_end():
    noise, model, calls = torch.randn(4, 3, 2, 2), GaussianData(Flow()), []
    latents = DormandPrince().integrate(
        lambda x, t: model(x, torch.full((4,), t), None), noise, lambda done, total: calls.append(done)
    )
    torch.testing.assert_close(latents, MEAN + STD * noise, atol=5e-3, rtol=0)  # the flow map of Gaussians is affine
    assert calls == list(range(1, len(calls) + 1))
    assert len(calls) > 10


def test_it_is_a_sampler_of_flows():
    model, sample = GaussianData(Flow()), Sample(sampler="dopri5")
    latents = sampled(model, Flow(), sample, (3, 2, 2), [0, 1])
    heun = sampled(model, Flow(), Sample(sampler="heun", steps=400), (3, 2, 2), [0, 1])
    torch.testing.assert_close(latents, heun, atol=5e-3, rtol=0)
    refused("'dopri5' does not go with a ddpm process", sampled, model, DDPM(), sample, (3, 2, 2), [0])


def test_a_field_that_is_not_finite_is_refused():
    with pytest.raises(LatelierError, match=r"velocity at t = 1\.0000 is not finite"):
        DormandPrince().integrate(lambda x, t: x * float("nan"), torch.ones(1, 1, 1, 1))
