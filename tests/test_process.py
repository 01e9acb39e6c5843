"""The two processes: closed forms, and what diffusers' schedulers make of them."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from latelier import recipe
from latelier.diffusion.process import DDPM, Flow, build_process, describe_process
from latelier.diffusion.schedulers import ReverseSDE, flow_sigmas, shifted
from tiny import refused

PROCESSES = [
    Flow(),
    DDPM("linear", 1e-4, 0.02),
    DDPM("cosine"),
    *(DDPM(prediction=p) for p in ("epsilon", "v", "sample")),
]


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("grid", [(3, 5), (7,)])
def test_the_target_denoises(process, grid):
    z, eps = torch.randn(2, 6, 4, *grid)
    t = torch.tensor([0.0, 0.1, 0.3, 0.5, 0.7, 0.9])
    x_t = process.noise(z, t, eps)
    torch.testing.assert_close(process.denoised(x_t, t, process.target(z, t, eps)), z, atol=1e-4, rtol=1e-4)


def test_flow_is_the_straight_line():
    z, eps, t = torch.randn(4, 2, 3), torch.randn(4, 2, 3), torch.tensor([0.0, 0.25, 0.5, 1.0])
    torch.testing.assert_close(Flow().noise(z, t, eps), (1 - t)[:, None, None] * z + t[:, None, None] * eps)
    assert torch.equal(Flow().target(z, t, eps), eps - z)


@pytest.mark.parametrize(
    ("process", "name"),
    [
        (DDPM("linear", 1e-4, 0.02), "linear"),
        (DDPM("scaled_linear", 0.0015, 0.0195), "scaled_linear"),
        (DDPM("cosine"), "squaredcos_cap_v2"),
    ],
)
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_ddpm_agrees_with_diffusers(process, name, prediction):
    process = DDPM(process.beta_schedule, process.beta_start, process.beta_end, prediction)
    theirs = DDPMScheduler(beta_schedule=name, beta_start=process.beta_start, beta_end=process.beta_end)
    levels = torch.tensor([0, 1, 17, 500, 998, 999])
    z, eps = torch.randn(2, 6, 4, 3, 3)
    torch.testing.assert_close(process.noise(z, levels / 1000, eps), theirs.add_noise(z, eps, levels))
    if prediction == "v":
        torch.testing.assert_close(process.target(z, levels / 1000, eps), theirs.get_velocity(z, eps, levels))


def test_scaled_linear_in_closed_form():
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(DDPM().alphas_cumprod, (1 - betas).cumprod(0).float(), rtol=1e-4, atol=1e-6)


def test_training_times():
    uniform = (torch.arange(100_000) + 0.5) / 100_000
    t = Flow("logit-normal").sample_t(uniform)
    logits = torch.logit(t.double())
    assert abs(logits.mean()) < 1e-3
    assert abs(logits.std() - 1) < 1e-2
    assert torch.equal(Flow("uniform").sample_t(uniform), uniform)
    torch.testing.assert_close(Flow("uniform", shift=3.0).sample_t(torch.tensor([0.0, 0.5])), torch.tensor([0.0, 0.75]))
    assert DDPM().sample_t(torch.tensor([0.0, 0.0005, 0.001, 0.9999])).tolist() == pytest.approx([0, 0, 0.001, 0.999])
    assert Flow().sample_t(torch.zeros(1)).item() == 0  # the end of the distribution is finite


def test_lightning_dit_grid():
    """Its 250 points of data time, s' = 0.3 s / (1 + (0.3 - 1) s), are our 249 steps at shift 1 / 0.3."""
    s = torch.linspace(0, 1, 250, dtype=torch.float64)
    theirs = 1 - 0.3 * s / (1 + (0.3 - 1) * s)
    torch.testing.assert_close(torch.from_numpy(flow_sigmas(249, 1 / 0.3)), theirs)


@pytest.mark.parametrize("steps", [1, 2, 3, 50, 301, 999, 1000])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "plms", "dpm++", "unipc", "euler", "heun"])
@pytest.mark.parametrize("schedule", ["scaled_linear", "cosine"])
def test_ddpm_samplers_stay_inside_the_noise_levels(sampler, steps, schedule):
    scheduler = DDPM(schedule).scheduler(steps=steps, sampler=sampler)
    timesteps = scheduler.timesteps
    assert 0 <= timesteps.min() <= timesteps.max() <= 999
    fast = sampler in ("dpm++", "unipc", "euler", "heun")
    steps = min(steps, 996) if schedule == "cosine" and fast else steps  # it has less than 1000 usable levels
    assert len(timesteps) in ((2 * steps - 1,) if sampler == "heun" else (steps, steps + 1))
    assert len(timesteps.unique()) in (steps, steps + 1)


@pytest.mark.parametrize("steps", range(1, 1001, 37))
def test_every_number_of_steps_is_evenly_spread(steps):
    for sampler in ("ddim", "plms"):
        levels = DDPM().scheduler(steps=steps, sampler=sampler).timesteps.unique()
        assert len(levels) == steps
        assert levels[0] <= 1
        assert 1000 - levels[-1] <= 1000 / steps + 1  # nothing noisier than a step is missed
        if steps > 1:
            assert levels.diff().max() - levels.diff().min() <= 1


@pytest.mark.parametrize("steps", [20, 50, 100, 200, 250])
def test_grid_of_ldm(steps):
    levels = DDPM().scheduler(steps=steps).timesteps.flip(0)
    assert levels.tolist() == list(range(1, 1001, 1000 // steps))


def test_schedulers_of_ours_are_saved_and_opened(tmp_path):
    saved = DDPM("linear", 1e-4, 0.02, "v").scheduler(steps=7, sampler="plms")
    saved.save_pretrained(tmp_path)
    opened = type(saved).from_pretrained(tmp_path)
    assert opened.config["prediction_type"] == "v_prediction"
    torch.testing.assert_close(opened.alphas_cumprod, saved.alphas_cumprod)
    theirs = DDIMScheduler.from_config(saved.config)  # diffusers' own, of the same config, samples alike
    theirs.set_timesteps(50)
    assert torch.equal(theirs.timesteps, DDPM().scheduler(steps=50).timesteps)
    assert theirs.final_alpha_cumprod == saved.alphas_cumprod[0]


def test_an_sde_of_the_caller_keeps_its_last_step():
    ours = ReverseSDE(last_step=0.25)
    Flow().set_timesteps(ours, 4)
    torch.testing.assert_close(ours.timesteps, torch.tensor([1000.0, 750.0, 500.0, 250.0]))


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm++", "unipc"])
def test_samplers_visit_the_flow_grid_which_is_shifted_once(sampler):
    scheduler = Flow().scheduler(steps=7, shift=3.0, sampler=sampler)
    levels = torch.arange(7, -1, -1) / 7
    expected = 3 * levels / (1 + 2 * levels)
    torch.testing.assert_close(scheduler.sigmas.unique().flip(0), expected, atol=2e-6, rtol=0)
    if sampler == "heun":
        assert len(scheduler.timesteps) == 13  # two evaluations for each step but the last
    else:
        torch.testing.assert_close(scheduler.timesteps, 1000 * scheduler.sigmas[:-1])
        assert len(scheduler.sigmas) == 8


def test_cosine_begins_where_diffusers_would():
    theirs = DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2", lambda_min_clipped=-5.1)
    theirs.set_timesteps(20)
    ours = DDPM("cosine").scheduler(steps=20, sampler="dpm++")
    assert torch.equal(ours.timesteps, theirs.timesteps)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas)


@pytest.mark.parametrize("process", PROCESSES)
def test_shares_of_data_and_noise(process):
    z, eps = torch.randn(2, 3, 2, 4)
    t = torch.tensor([0.1, 0.5, 0.9])
    alpha, sigma = process.alpha_sigma(t, z)
    torch.testing.assert_close(process.noise(z, t, eps), alpha * z + sigma * eps)


def test_shift_by_dimension():
    """sqrt(m / 4096); composed shifts multiply, 0 and 1 stay, odds are multiplied, and so the SNR is divided by a^2."""
    shapes = {(768, 16, 16): 6.928203, (768, 32, 32): 13.856406, (1024, 16, 16): 8, (4, 32, 32): 1, (4, 8, 8): 1}
    for shape, alpha in shapes.items():
        assert build_process(shift="dimension", latent_shape=shape).shift == pytest.approx(alpha, abs=1e-6)
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    moved = shifted(t, 6.928203)
    assert (moved[0], moved[-1]) == (0, 1)
    assert (moved.diff() > 0).all()
    torch.testing.assert_close(shifted(shifted(t, 2.0), 3.0), shifted(t, 6.0))
    snr = (((1 - s[1:]) / s[1:]) ** 2 for s in (t, moved))
    torch.testing.assert_close(next(snr) / 6.928203**2, next(snr))
    process = recipe.Process(shift="dimension")
    uniform = torch.rand(5)
    times = build_process(**process.model_dump(), latent_shape=(1024, 16, 16)).sample_t(uniform)
    torch.testing.assert_close(times, shifted(Flow().sample_t(uniform), 8.0))


def test_build_process():
    assert build_process(**recipe.Process(shift=2.0).model_dump()) == Flow("logit-normal", 2.0)
    assert build_process(kind="ddpm", prediction="v") == DDPM(prediction="v")
    assert build_process(**recipe.Process(kind="ddpm").model_dump()).prediction == "epsilon"
    for process in PROCESSES:
        assert build_process(**describe_process(process)) == process


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build_process(prediction="v"), "prediction = 'v' is not for a flow"),
        (lambda: build_process("ddpm", prediction="velocity"), "is for a flow"),
        (lambda: build_process("ddpm", shift="dimension", latent_shape=(4, 8, 8)), "shift = 'dimension' is for"),
        (lambda: build_process(shift="dimension"), "a number where no latents are known"),
        (lambda: Flow().scheduler(sampler="ddim"), "'ddim' does not go with a flow.*auto, euler, heun, dpm.*sde"),
        (lambda: Flow().scheduler(eta=0.5), "eta = 0.5 acts in the ddim sampler only"),
        (lambda: DDPM().scheduler(shift=2.0), "shift = 2.0 acts in flow processes only"),
        (lambda: DDPM().set_timesteps(DDIMScheduler(), 400), "use 333 or 500"),
        (lambda: DDPM().scheduler(steps=1001), "more than the 1000 noise levels"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    refused(message, call)


def test_noise_ends_where_it_should():
    z, eps = torch.full((1, 1, 4), 3.0), torch.randn(1, 1, 4)
    assert torch.equal(Flow().noise(z, torch.ones(1), eps), eps)
    assert DDPM("cosine").alphas_cumprod[-1] < 1e-8
    assert math.isclose(DDPM().alphas_cumprod[0], 1 - 0.0015, rel_tol=1e-5)
