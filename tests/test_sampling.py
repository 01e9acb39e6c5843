"""Sampling against closed forms and hand-written loops."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from latelier.diffusion.process import DDPM, Flow
from latelier.diffusion.schedulers import flow_sigmas
from latelier.recipe import Sample
from sampled import initial_noise, sampled, scheduler

MEAN, STD = 1.5, 0.4


class GaussianData(nn.Module):
    """The optimal prediction when the data are N(MEAN, STD^2) in every coordinate: E[target | x_t]."""

    def __init__(self, process):
        super().__init__()
        self.process = process

    def forward(self, x_t, t, condition):
        shape = (-1, *[1] * (x_t.ndim - 1))
        if isinstance(self.process, Flow):
            alpha, sigma = (1 - t).view(shape), t.view(shape)
        else:
            a = self.process.alphas_cumprod[(t * 1000).round().long()].view(shape)
            alpha, sigma = a.sqrt(), (1 - a).sqrt()
        variance = alpha**2 * STD**2 + sigma**2
        z = MEAN + alpha * STD**2 * (x_t - alpha * MEAN) / variance
        eps = sigma * (x_t - alpha * MEAN) / variance
        return self.process.target(z, t, eps)


class Wavy(nn.Module):
    """Some smooth function of everything."""

    def forward(self, x_t, t, condition):
        shape = (-1, *[1] * (x_t.ndim - 1))
        shift = 0 if condition is None else condition.vector[:, :1].view(shape)
        return torch.sin(x_t + 2 * t.view(shape)) + shift


def draw(process, sample, model=None, shape=(2, 4, 4), seeds=tuple(range(8)), **kwargs):
    return sampled(model or Wavy(), process, sample, shape, seeds, **kwargs)


def flowed(process, x, begin, end):
    """Where the probability flow takes x from noise level `begin` to `end`: (x - its mean) / deviation is kept."""
    levels = []
    for level in (begin, end):
        alpha, sigma = process.alpha_sigma(torch.tensor([float(level)]), x) if level is not None else (1.0, 0.0)
        levels.append((alpha * MEAN, (torch.as_tensor(alpha) ** 2 * STD**2 + torch.as_tensor(sigma) ** 2).sqrt()))
    (mean, deviation), (mean_below, deviation_below) = levels
    return mean_below + deviation_below * (x - mean) / deviation


def errors_of(process, sampler, numbers, reference, **settings):
    x = initial_noise((2, 4, 4), list(range(8)))
    drawn = [draw(process, Sample(steps=n, sampler=sampler, **settings), GaussianData(process)) for n in numbers]
    return [(z - reference(x, n)).abs().max().item() for z, n in zip(drawn, numbers)]


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpm++", "unipc", "euler", "heun"])
def test_samplers_of_ddpm_converge_to_the_exact_solution(sampler, prediction):
    """The whole way from N(0, 1) to the data, or for LDM's own two to their last level, a_0."""
    process = DDPM(prediction=prediction)
    end = 0.0 if sampler in ("ddim", "plms") else None
    few, many = errors_of(process, sampler, (20, 500), lambda x, n: flowed(process, x, 0.999, end))
    assert many < 0.03
    assert many < few / 10


@pytest.mark.parametrize("sampler", ["dpm++", "unipc", "heun"])
@pytest.mark.parametrize("steps", [40, 100])
def test_fast_samplers_of_ddpm_are_better_than_euler(sampler, steps):
    """Down to the lowest level that they visit; the step from there, to the estimate of z, is the same for all."""
    process = DDPM()

    def reference(x, n):
        levels = scheduler(process, Sample(steps=n, sampler=sampler)).timesteps / 1000
        last = flowed(process, x, levels[0], levels[-1])
        t = levels[-1].float().expand(len(x))
        return process.denoised(last, t, GaussianData(process)(last, t, None))

    fast, slow = (errors_of(process, kind, (steps,), reference)[0] for kind in (sampler, "euler"))
    assert fast < 0.005
    assert fast < slow / 5


@pytest.mark.parametrize(("sampler", "gain"), [("euler", 7), ("heun", 50), ("dpm++", 5), ("unipc", 5)])
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_samplers_of_a_flow_converge_to_the_exact_solution(sampler, gain, shift):
    few, many = errors_of(Flow(), sampler, (20, 160), lambda x, n: flowed(Flow(), x, 1.0, 0.0), shift=shift)
    assert many < 0.02
    assert many < few / gain  # multistep solvers are good already with 20


@pytest.mark.parametrize(
    ("process", "sample"),
    [
        (DDPM(), Sample(steps=1000, sampler="ddpm")),
        (DDPM("linear", 1e-4, 0.02), Sample(steps=1000, sampler="ddpm")),
        (DDPM(), Sample(steps=1000, eta=1.0)),
        (DDPM(), Sample(steps=700, eta=0.5)),
        (DDPM(prediction="v"), Sample(steps=500, eta=1.0)),
    ],
)
def test_random_samplers_have_the_exact_distribution(process, sample):
    """Mean and deviation of 64 x 256 numbers, to within four standard errors and the steps' own error."""
    z = draw(process, sample, GaussianData(process), shape=(4, 64), seeds=range(64))
    assert abs(z.mean() - MEAN) < 4 * STD / z.numel() ** 0.5 + 0.002
    assert abs(z.std() - STD) < 4 * STD / (2 * z.numel()) ** 0.5 + 0.003


@pytest.mark.parametrize("sampler", ["dpm++", "unipc", "euler", "heun"])
def test_cosine_is_sampled_from_a_little_below_pure_noise(sampler):
    process = DDPM("cosine", prediction="v")
    z = draw(process, Sample(steps=60, sampler=sampler), GaussianData(process), shape=(4, 64), seeds=range(64))
    assert abs(z.mean() - MEAN) < 0.03
    assert abs(z.std() - STD) < 0.03


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_input_is_scaled_as_in_training(sampler):
    """Whatever space a scheduler keeps x in, the denoiser sees alpha z + sigma eps: here, of z = 0, eps itself."""
    process, seen = DDPM(), []

    class Spy(nn.Module):
        def forward(self, x_t, t, condition):
            _, sigma = process.alpha_sigma(t, x_t)
            seen.append((x_t / sigma).std().item())
            return x_t / sigma  # the eps of z = 0

    draw(process, Sample(steps=5, sampler=sampler), Spy(), shape=(4, 64))
    assert seen == pytest.approx(seen[:1] * len(seen), rel=1e-4)
    assert seen[0] == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("sampler", "close"), [("euler", {}), ("heun", {"atol": 1e-4, "rtol": 1e-4})])
def test_euler_and_heun_are_the_hand_written_loops(sampler, close):
    x = initial_noise((2, 4, 4), list(range(8)))
    for now, after in pairwise(torch.from_numpy(flow_sigmas(7, 2.0)).float()):
        slope = Wavy()(x, now.expand(8), None)
        if sampler == "heun" and after > 0:
            slope = (slope + Wavy()(x + (after - now) * slope, after.expand(8), None)) / 2
        x = x + (after - now) * slope
    torch.testing.assert_close(draw(Flow(), Sample(steps=7, shift=2.0, sampler=sampler)), x, **close)


def test_ddim_is_the_hand_written_loop():
    process = DDPM()
    a = process.alphas_cumprod
    x = initial_noise((2, 4, 4), list(range(8)))
    levels = [*range(901, 0, -100)]
    for level, below in zip(levels, [*levels[1:], 0]):
        eps = Wavy()(x, torch.full((8,), level / 1000), None)
        z = (x - (1 - a[level]).sqrt() * eps) / a[level].sqrt()
        x = a[below].sqrt() * z + (1 - a[below]).sqrt() * eps
    torch.testing.assert_close(draw(process, Sample(steps=10)), x, atol=1e-4, rtol=1e-4)


def test_what_is_random_and_what_is_not():
    assert torch.equal(draw(DDPM(), Sample(steps=10)), draw(DDPM(), Sample(steps=10)))
    noisy = draw(DDPM(), Sample(steps=10, eta=1.0))
    assert not torch.allclose(noisy, draw(DDPM(), Sample(steps=10)))
    assert torch.equal(noisy, draw(DDPM(), Sample(steps=10, eta=1.0)))


@pytest.mark.parametrize(
    ("process", "sample"),
    [
        (Flow(), Sample(steps=6)),
        (Flow(), Sample(steps=6, sampler="sde")),
        (DDPM(), Sample(steps=10, eta=1.0)),
        (DDPM(), Sample(steps=10, sampler="ddpm")),
    ],
)
def test_an_image_does_not_depend_on_its_batch(process, sample):
    together = draw(process, sample, seeds=[3, 4, 5])
    alone = torch.cat([draw(process, sample, seeds=[seed]) for seed in (3, 4, 5)])
    torch.testing.assert_close(alone, together)


def test_progress_counts_evaluations():
    seen = []
    draw(Flow(), Sample(steps=3, sampler="heun"), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 5) for i in range(1, 6)]


def test_time_that_the_denoiser_sees():
    seen = []

    class Spy(nn.Module):
        def forward(self, x_t, t, condition):
            seen.append(t[0].item())
            return x_t

    draw(Flow(), Sample(steps=4), Spy())
    assert seen == pytest.approx([1, 0.75, 0.5, 0.25])
    seen.clear()
    draw(DDPM(), Sample(steps=4), Spy())
    assert seen == pytest.approx([0.751, 0.501, 0.251, 0.001])


def test_a_scheduler_of_the_caller():
    from diffusers import UniPCMultistepScheduler

    theirs = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    Flow().set_timesteps(theirs, 30)
    z = draw(Flow(), Sample(), GaussianData(Flow()), shape=(4, 64), seeds=range(64), scheduler=theirs)
    assert abs(z.mean() - MEAN) < 0.05
    assert abs(z.std() - STD) < 0.05
