"""The reverse SDE against closed forms: the discrete steps' own mean and variance, and a hand-written loop."""

import json
from itertools import pairwise

import pytest
import torch
from torch import nn

from latelier.conditioning.condition import ClassConditioner, Condition
from latelier.denoisers.dit import DiT
from latelier.diffusion.loss_guidance import LossGuidance
from latelier.diffusion.process import DDPM, Flow
from latelier.diffusion.schedulers import ReverseSDE
from latelier.diffusion.tiled import tiled
from latelier.pipeline import LatentDiffusionPipeline
from latelier.recipe import Sample
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.conv import IdentityTokenizer
from sampled import sampled, scheduler
from test_sampling import MEAN, STD, GaussianData
from tiny import refused


class Wavy(nn.Module):
    """Some smooth function of everything, position by position."""

    def forward(self, x_t, t, condition):
        out = torch.sin(x_t + 2 * t.view(-1, *[1] * (x_t.ndim - 1)))
        if condition is None:
            return out
        return out + condition.vector.view(-1, 1, *[1] * (x_t.ndim - 2)) + condition.spatial


def draw(sample, model=None, shape=(2, 4, 4), seeds=range(8), **kwargs):
    return sampled(model or Wavy(), Flow(), sample, shape, seeds, **kwargs)


def sde(**settings):
    return Sample(sampler="sde", **settings)


def discrete_variance(times):
    """Variance after all steps, for Gaussian data: each step is linear in x - (1 - t) MEAN, whose mean stays 0."""
    variance = 1.0
    for t, below in pairwise([*times, 0.0]):
        h, exact = t - below, (1 - t) ** 2 * STD**2 + t**2
        variance *= (1 - h * (2 * t - (1 - t) * STD**2) / exact) ** 2
        variance += 2 * t * h if below else 0.0
    return variance


@pytest.mark.parametrize(
    "settings", [{"steps": 2}, {"steps": 5}, {"steps": 20, "shift": 3.0}, {"steps": 40, "last_step": 0.2}]
)
def test_mean_and_variance_of_the_discrete_steps(settings):
    """Few steps are far from the data, and exactly as far as their closed form says: to four standard errors."""
    sample = sde(**settings)
    z = draw(sample, GaussianData(Flow()), shape=(4, 128), seeds=range(64))
    variance = discrete_variance((scheduler(Flow(), sample).timesteps.double() / 1000).tolist())
    assert abs(z.mean() - MEAN) < 4 * (variance / z.numel()) ** 0.5
    assert abs(z.var() / variance - 1) < 4 * (2 / z.numel()) ** 0.5


@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_many_steps_have_the_distribution_of_the_data(shift):
    z = draw(sde(steps=400, last_step=0.01, shift=shift), GaussianData(Flow()), shape=(4, 128), seeds=range(64))
    assert abs(z.mean() - MEAN) < 4 * STD / z.numel() ** 0.5
    assert abs(z.std() - STD) < 4 * STD / (2 * z.numel()) ** 0.5 + 0.004
    rows = z.flatten(1)  # (64, 512)
    correlation = torch.corrcoef(rows)[~torch.eye(64, dtype=torch.bool)].abs().max()
    assert correlation < 5.5 / rows.shape[1] ** 0.5  # one image's noise is not another's


def test_the_hand_written_loop():
    """In the words of the paper: score, drift v - w s / 2, noise sqrt(w h) with w = 2 t; float64 between the steps."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
    x = torch.stack([torch.randn(2, 4, 4, generator=g) for g in generators]).double()
    times = torch.linspace(1, 0.1, 6, dtype=torch.float64)
    for t, below in pairwise([*times.tolist(), 0.0]):
        v = Wavy()(x.float(), torch.full((8,), t), None).double()
        w, score = 2 * t, -(x + (1 - t) * v) / t
        x = x - (t - below) * (v - w * score / 2)
        if below:
            x = x + (w * (t - below)) ** 0.5 * torch.stack([torch.randn(2, 4, 4, generator=g) for g in generators])
    torch.testing.assert_close(draw(sde(steps=6, last_step=0.1)), x.float(), atol=1e-5, rtol=1e-5)


def test_the_last_step_has_no_noise():
    ours, generator = Flow().scheduler(sampler="sde", steps=3, last_step=0.25), torch.Generator().manual_seed(0)
    x, v, before = torch.randn(2, 1, 4), torch.randn(2, 1, 4), generator.get_state()
    last = ours.step(v, ours.timesteps[-1], x, generator).prev_sample
    torch.testing.assert_close(last, x - 0.25 * (v + x + 0.75 * v))
    assert torch.equal(generator.get_state(), before)
    assert not torch.equal(ours.step(v, ours.timesteps[0], x).prev_sample.float(), last)
    ours.step(v, ours.timesteps[0], x, generator)
    assert not torch.equal(generator.get_state(), before)


def test_estimate_of_the_data():
    ours, t = Flow().scheduler(sampler="sde", steps=3, last_step=0.2), torch.tensor([0.6, 0.6])
    z, eps = torch.randn(2, 2, 1, 4)
    x = Flow().noise(z, t, eps)
    estimate = ours.step(eps - z, ours.timesteps[1], x).pred_original_sample
    torch.testing.assert_close(estimate.float(), z, atol=1e-5, rtol=1e-5)


def test_250_steps_are_250_evaluations():
    """MAETok's grid: linspace(1, 0.04, 250), then a step to 0; the denoiser sees float32, whatever the state is."""
    seen, counted = [], []

    class Spy(nn.Module):
        def forward(self, x_t, t, condition):
            seen.append((t[0].item(), x_t.dtype))
            return x_t

    z = draw(sde(steps=250), Spy(), shape=(1, 2), seeds=[0], progress=lambda *count: counted.append(count))
    times = torch.tensor([t for t, _ in seen])
    torch.testing.assert_close(times, torch.linspace(1, 0.04, 250))
    assert {dtype for _, dtype in seen} == {z.dtype} == {torch.float32}
    assert counted == [(i, 250) for i in range(1, 251)]


@pytest.mark.parametrize("shift", [0.5, 1.0, 4.0])
def test_shift_keeps_both_ends(shift):
    times = Flow().scheduler(sampler="sde", steps=9, shift=shift, last_step=0.1).timesteps / 1000
    torch.testing.assert_close(times[[0, -1]], torch.tensor([1.0, 0.1]))
    even = times / (shift + (1 - shift) * times)  # undone
    torch.testing.assert_close(even.diff(), even.diff().mean().expand(8), atol=1e-6, rtol=1e-4)
    assert (times.mean() > torch.linspace(1, 0.1, 9).mean()) == (shift > 1)


def test_conditions_and_tiles():
    """What is concatenated, and tiles: as in every other sampler."""
    shape, cond = (2, 6, 10), Condition(torch.ones(4, 1), spatial=torch.ones(4, 2, 6, 10))
    plain = draw(sde(steps=5), shape=shape, seeds=range(4), cond=cond)
    assert not torch.allclose(plain, draw(sde(steps=5), shape=shape, seeds=range(4)))
    cut = draw(sde(steps=5), tiled(Wavy(), 4, 3), shape, range(4), cond=cond)
    torch.testing.assert_close(cut, plain, atol=1e-5, rtol=1e-5)  # a pointwise denoiser sees no tiles


def test_loss_guidance_pulls():
    """Data N(MEAN, STD^2) seen through y = z + noise of variance v moves to first order by STD^2 (y - MEAN) / v."""
    v, y = 20.0, 4.0
    guide = LossGuidance(lambda z: z, torch.full((1, 1, 8, 8), y), scale=1 / v)
    plain, pulled = (draw(sde(steps=60), GaussianData(Flow()), shape=(1, 8, 8), loss_guidance=g) for g in (None, guide))
    assert (pulled - plain).mean().item() == pytest.approx(STD**2 * (y - MEAN) / v, rel=0.1)


def test_pipeline_with_this_scheduler_is_saved_whole(tmp_path):
    denoiser = DiT(3, (8, 8), patch_size=2, dim=16, depth=1, heads=2)
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, std=0.1)
    parts = (Codec(IdentityTokenizer()), denoiser.eval(), ClassConditioner(3, 16))
    pipeline = LatentDiffusionPipeline.build(*parts, Flow(), (8, 8))
    pipeline.scheduler = ReverseSDE(last_step=0.1)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["latelier.diffusion.schedulers", "ReverseSDE"]
    again = LatentDiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(again.scheduler, ReverseSDE)
    settings = {"steps": 4, "count": 2, "guidance": 2.0, "output_type": "latent", "progress": False, "shift": 2.0}
    ours, theirs = (p(**settings).images for p in (pipeline, again))
    assert torch.equal(ours, theirs)
    named = {**settings, "classes": None}
    for name in ("count", "output_type", "progress"):
        named.pop(name)
    sample = sde(last_step=0.1, count=2, **named)  # the sampler by its name
    assert torch.equal(again(sample=sample, output_type="latent", progress=False).images, ours)
    assert not torch.equal(again(**settings, sampler="euler").images, ours)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Flow().scheduler(sampler="sde", steps=1), "steps = 1 is too few for the sde sampler"),
        (lambda: Flow().scheduler(sampler="sde", last_step=0.0), r"last_step = 0.0 leaves the sde sampler no steps"),
        (lambda: Flow().scheduler(sampler="sde", last_step=1.0), "choose a time between 0 and 1"),
        (lambda: Flow().scheduler(last_step=0.1), "last_step = 0.1 acts in the sde sampler only, not in euler"),
        (lambda: DDPM().scheduler(last_step=0.1), "in the sde sampler only, not in ddim"),
        (lambda: DDPM().scheduler(sampler="sde"), "'sde' does not go with a ddpm process"),
        (lambda: Flow().scheduler(sampler="sde", eta=0.5), "eta = 0.5 acts in the ddim sampler only, not in sde"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    refused(message, call)
