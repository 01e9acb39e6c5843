"""Parity with LDM's own DDIM and PLMS on an analytic noise model."""

import json
from pathlib import Path

import numpy as np
import pytest
import synth
import torch
from torch import nn

from latelier.conditioning.condition import Condition
from latelier.diffusion import sampling
from latelier.diffusion.process import DDPM
from latelier.recipe import Sample
from sampled import sampled

ARRAYS = np.load(Path(__file__).parent / "golden" / "ldm_samplers.npz")
META = json.loads(bytes(ARRAYS["meta"]))
PROCESS = DDPM("scaled_linear", META["inputs"]["linear_start"], META["inputs"]["linear_end"])


class Analytic(nn.Module):
    """eps(x, t) = 0.8 (1 + 0.1 t) x + 0.05 c."""

    def forward(self, x_t, t, condition):
        shift = 0 if condition is None else 0.05 * condition.spatial
        return 0.8 * (1 + 0.1 * t[:, None, None, None]) * x_t + shift


def normal(tag):
    return torch.from_numpy(synth.normal((2, 4, 8, 8), 140, tag))


def check(name, value):
    about = META["outputs"][name]
    np.testing.assert_allclose(np.asarray(value), ARRAYS[name], 1e-4, about.get("suggested_atol", 0))


@pytest.fixture(autouse=True)
def _their_noise(monkeypatch):
    """Their x_T, and their noise of each step of eta 1, in the place of ours."""
    steps = iter(range(20))
    monkeypatch.setattr(sampling, "initial_noise", lambda shape, generators: normal("ddim/x"))
    monkeypatch.setattr(
        "latelier.diffusion.schedulers.randn_tensor", lambda *_, **__: normal(f"ddim/noise/{next(steps)}")
    )


def draw(sample, cond=None, uncond=None):
    return sampled(Analytic(), PROCESS, sample, (4, 8, 8), [0, 1], cond, uncond)


def test_schedule():
    check("alphas_cumprod", PROCESS.alphas_cumprod)
    scheduler = PROCESS.scheduler(steps=20)
    levels = scheduler.timesteps.flip(0)
    check("ddim20_timesteps", levels)
    a, below = (PROCESS.alphas_cumprod[x] for x in (levels, torch.tensor([scheduler.below[x.item()] for x in levels])))
    check("ddim20_alphas", a)
    check("ddim20_alphas_prev", below)
    check("ddim20_sigmas_eta1", ((1 - below) / (1 - a) * (1 - a / below)).sqrt())


@pytest.mark.parametrize(
    ("name", "sample"),
    [
        ("ddim20_eta0", Sample(steps=20)),
        ("ddim20_eta1", Sample(steps=20, eta=1.0)),
        ("ddim50_eta0", Sample(steps=50)),
        ("plms20", Sample(steps=20, sampler="plms")),
    ],
)
def test_samples(name, sample):
    check(name, draw(sample))


def test_guided():
    cond, uncond = Condition(spatial=normal("ddim/cond")), Condition(spatial=normal("ddim/uncond"))
    check("ddim20_eta0_guided", draw(Sample(steps=20, guidance=3.0), cond, uncond))


def test_where_their_grid_has_more_steps_than_were_asked_for():
    """400 of theirs are 500, a stride of two; ours are 400, over the same range."""
    theirs, ours = ARRAYS["timesteps_S400"], PROCESS.scheduler(steps=400).timesteps.flip(0).numpy()
    assert (len(theirs), len(ours)) == (500, 400)
    assert ours[0] == theirs[0] == 1
    assert abs(int(ours[-1]) - int(theirs[-1])) <= 2
    np.testing.assert_array_equal(theirs, PROCESS.scheduler(steps=500).timesteps.flip(0).numpy())
