"""Sampling: from one seed per picture to latents, through any diffusers scheduler."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latelier import recipe
from latelier.conditioning.condition import Condition
from latelier.diffusion.guidance import guided
from latelier.diffusion.process import DDPM, TIMESTEPS, Flow, Scheduler


def initial_noise(shape: tuple[int, ...], seeds: list[int]) -> Float[Tensor, "b c *grid"]:
    """Standard normal latents `(b, *shape)` on the CPU; picture i depends on `seeds[i]` only."""
    return _normal(shape, _generators(seeds))


@torch.no_grad()
def sample_latents(
    denoiser: nn.Module,
    process: Flow | DDPM,
    sample: recipe.Sample,
    shape: tuple[int, ...],
    condition: Condition | None,
    null: Condition | None,
    seeds: list[int],
    device: torch.device | str,
    progress: Callable[[int, int], None] | None = None,
    scheduler: Scheduler | None = None,
) -> Float[Tensor, "b c *grid"]:
    """Normalised latents, one for each seed.

    The state stays float32; the precision of the denoiser is the caller's, who may open an autocast around this.

    Args:
        denoiser: `forward(x_t, t, condition) -> prediction`.
        process: what the denoiser was trained with.
        sample: steps, sampler, guidance and so on; `count`, `batch`, `classes` and `seed` are not read.
        shape: `(c, *grid)` of one picture's latents.
        condition: for all pictures, `(b, ...)`; None is unconditional.
        null: the condition that says nothing, for guidance.
        seeds: one for each picture. A picture's initial noise, and all noise of stochastic samplers, is drawn from
            its own seed, on the CPU, so that it depends neither on the batch nor on the device.
        device: where the denoiser is.
        progress: called after each evaluation with how many are done and how many there are.
        scheduler: a diffusers scheduler with timesteps set, instead of the one that `sample.sampler` names.
    """
    scheduler = scheduler or process.scheduler(sample)
    generators = _generators(seeds)
    x = _normal(shape, generators).to(device) * getattr(scheduler, "init_noise_sigma", 1.0)  # (b, c, *grid)
    options = _step_options(scheduler, generators, sample.eta)
    total = len(scheduler.timesteps)
    for done, timestep in enumerate(scheduler.timesteps, 1):
        t = torch.full((len(seeds),), float(timestep) / TIMESTEPS, device=device)  # (b,)
        prediction = guided(
            denoiser, x, t, condition, null, sample.guidance, sample.guidance_interval, sample.guidance_channels
        )
        x = scheduler.step(prediction.float(), timestep, x, **options).prev_sample  # (b, c, *grid)
        if progress is not None:
            progress(done, total)
    return x


def _generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _normal(shape: tuple[int, ...], generators: list[torch.Generator]) -> Tensor:
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def _step_options(scheduler: Scheduler, generators: list[torch.Generator], eta: float) -> dict[str, Any]:
    """The optional arguments that this scheduler's `step` takes."""
    known = inspect.signature(scheduler.step).parameters
    options = {"generator": generators, "eta": eta}
    return {name: value for name, value in options.items() if name in known}
