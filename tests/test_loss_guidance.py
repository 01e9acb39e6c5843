"""Loss guidance against closed forms: Gaussian data, a linear decoder."""

import pytest
import torch
from torch import nn

from latelier.conditioning.condition import Condition
from latelier.diffusion.loss_guidance import LossGuidance
from latelier.diffusion.process import DDPM, Flow
from latelier.diffusion.tiled import tiled
from latelier.recipe import Sample
from latelier.tokenizers.codec import Codec
from sampled import sampled
from tiny import autoencoder, refused

MEAN, STD, GAIN = 0.5, 0.8, 2.0
PROCESSES = [Flow(), DDPM(), DDPM(prediction="v"), DDPM(prediction="sample"), DDPM("cosine", prediction="v")]


class GaussianPrior(nn.Module):
    """The optimal prediction for data N(MEAN, STD^2), with a weight, so that gradients would have where to go."""

    def __init__(self, process):
        super().__init__()
        self.process, self.one = process, nn.Parameter(torch.ones(1))

    def forward(self, x_t, t, condition):
        alpha, sigma = self.process.alpha_sigma(t, x_t)
        pull = self.one * (x_t - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        return self.process.target(MEAN + alpha * STD**2 * pull, t, sigma * pull)


def decode(z):
    return GAIN * z


@pytest.mark.parametrize("process", PROCESSES)
def test_shift_in_closed_form(process):
    """z' = z - sigma^2 / alpha s grad E, with grad E = dz/dx GAIN (GAIN z - y), and eps' from the same x_t."""
    model, guide = GaussianPrior(process), LossGuidance(decode, torch.full((1, 1, 4, 4), 3.0), scale=0.7)
    x, t = torch.randn(3, 1, 4, 4), torch.tensor([0.1, 0.4, 0.8])
    moved = guide.guide(lambda x_t, t: model(x_t, t, None), process)(x, t)
    alpha, sigma = process.alpha_sigma(t, x)
    z = process.denoised(x, t, model(x, t, None))
    slope = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)  # dz/dx
    gradient = slope * GAIN * (GAIN * z - 3.0)
    torch.testing.assert_close(
        process.denoised(x, t, moved), z - 0.7 * sigma**2 / alpha * gradient, atol=1e-4, rtol=1e-4
    )
    eps = (x - alpha * z) / sigma
    expected = process.target(z - 0.7 * sigma**2 / alpha * gradient, t, eps + 0.7 * sigma * gradient)
    torch.testing.assert_close(moved, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("process", "sample"),
    [
        (Flow(), Sample(steps=30)),
        (Flow(), Sample(steps=30, sampler="unipc")),
        (DDPM(), Sample(steps=50)),
        (DDPM(), Sample(steps=50, eta=1.0)),
        (DDPM(prediction="v"), Sample(steps=50, sampler="plms")),
        (DDPM(), Sample(steps=50, sampler="euler")),
        (DDPM(), Sample(steps=50, sampler="heun")),
        (DDPM(prediction="sample"), Sample(steps=50, sampler="dpm++")),
    ],
)
def test_samples_are_pulled_towards_the_target(process, sample):
    model, target, drawn = GaussianPrior(process), torch.full((1, 1, 8, 8), 4.0), []
    for scale in (0.0, 0.2, 1.0):
        guide = LossGuidance(decode, target, scale=scale)
        z = sampled(model, process, sample, (1, 8, 8), range(16), loss_guidance=guide)
        drawn.append((decode(z) - 4.0).abs().mean().item())
    assert drawn[0] > 1.5 * drawn[1] > 1.5**2 * drawn[2]
    assert model.one.grad is None


def test_exact_posterior_when_the_target_is_certain_of_little():
    """Data N(MEAN, STD^2) seen through y = GAIN z + noise of variance v: E gives the posterior's mean to first order
    in 1 / v, MEAN + STD^2 GAIN (y - GAIN MEAN) / v."""
    process, v, y = Flow(), 400.0, 60.0
    guide = LossGuidance(decode, torch.full((1, 1, 8, 8), y), scale=1 / v)
    arguments = (GaussianPrior(process), process, Sample(steps=200, sampler="heun"), (1, 8, 8), range(16))
    plain, guided = (sampled(*arguments, loss_guidance=g) for g in (None, guide))
    expected = STD**2 * GAIN * (y - GAIN * MEAN) / v
    assert (guided - plain).mean().item() == pytest.approx(expected, rel=0.03)


def test_scale_of_zero_changes_nothing():
    process = DDPM()
    guide = LossGuidance(decode, torch.zeros(1, 1, 4, 4), scale=0.0)
    draw = [
        sampled(GaussianPrior(process), process, Sample(steps=5), (1, 4, 4), [0, 1], loss_guidance=g)
        for g in (None, guide)
    ]
    assert torch.equal(*draw)
    assert not draw[1].requires_grad


def test_pure_noise_is_left_alone():
    process = Flow()
    model, guide = GaussianPrior(process), LossGuidance(decode, torch.full((1, 1, 4, 4), 9.0))
    x, t = torch.randn(2, 1, 4, 4), torch.tensor([1.0, 0.9])
    moved = guide.guide(lambda x_t, t: model(x_t, t, None), process)(x, t)
    plain = model(x, t, None)
    assert torch.equal(moved[0], plain[0])
    assert not torch.allclose(moved[1], plain[1])
    assert moved.isfinite().all()


def test_a_smaller_target_is_compared_with_means_of_blocks():
    guide, z = LossGuidance(decode, torch.ones(1, 1, 2, 2), factor=2), torch.zeros(3, 1, 4, 4)
    refused("factor = 0", LossGuidance, decode, z, factor=0)
    refused(r"scale = -1.0", LossGuidance, decode, z, scale=-1.0)
    torch.testing.assert_close(guide.energy(z), torch.full((3,), 0.5 * 4))
    z[0, 0, :2, :2] = torch.tensor([[2.0, 0.0], [0.0, 0.0]])  # a block with mean 0.5, decoded 1
    torch.testing.assert_close(guide.energy(z), torch.tensor([1.5, 2.0, 2.0]))
    refused(r"target of loss guidance is \(1, 1, 2, 2\).* are \(3, 1, 4, 4\)", guide.energy, torch.zeros(3, 1, 8, 8))


def test_through_a_codec_and_tiles_with_a_condition():
    """The real parts together: decoder, tiles, classifier-free guidance; no weight gathers a gradient."""
    model = autoencoder(1, 2, norm_num_groups=2, mid_block_add_attention=False)
    codec, inner = Codec(model, torch.zeros(2), torch.full((2,), 3.0)), nn.Conv2d(2, 2, 3, padding=1)

    class Conditional(nn.Module):
        def forward(self, x_t, t, condition):
            return inner(x_t) + condition.vector[:, :, None, None]

    cond, uncond = Condition(torch.ones(2, 2)), Condition(torch.zeros(2, 2))
    guide = LossGuidance(codec.decode, torch.full((2, 3, 5, 6), 0.5), factor=2, scale=0.1)
    draw = [
        sampled(tiled(Conditional(), 8), Flow(), Sample(steps=10, guidance=2.0), (2, 10, 12), [0, 1], cond, uncond, g)
        for g in (None, guide)
    ]
    assert (guide.energy(draw[1]) < guide.energy(draw[0])).all()
    assert all(p.grad is None for module in (model, inner) for p in module.parameters())


def test_perceptual_energy(monkeypatch):
    """Any distance that is differentiable in the images goes: here a stand-in for LPIPS's weights."""

    class Distance(nn.Module):
        def __init__(self, net):
            super().__init__()

        def forward(self, images, reference):
            return (images.sin() - reference.sin()).square().mean((1, 2, 3))

    monkeypatch.setattr("latelier.losses.perceptual.LPIPS", Distance)
    target = torch.rand(2, 1, 4, 4)
    guide, process = LossGuidance(decode, target, "lpips", scale=20.0), Flow()
    arguments = (GaussianPrior(process), process, Sample(steps=20), (1, 4, 4), [0, 1])
    plain, guided = (sampled(*arguments, loss_guidance=g) for g in (None, guide))
    assert (guide.energy(guided) < 0.3 * guide.energy(plain)).all()
