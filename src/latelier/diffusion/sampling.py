"""Sampling: from one seed per image to latents, through any diffusers scheduler.

Latents are drawn normalised: the Codec takes mean and standard deviation out of every channel, in training and here,
so the signal-to-noise ratio of a process is the same for all tokenizers and no `scale_factor` (LDM, appendix G) is
needed, neither for KL latents of large variance nor for sizes beyond that of training.

What is sampled is a function `(x_t, t) -> prediction`, made by composition:

    denoiser = tiled(denoiser, tile)                        larger images than those of training, tiled.py
    predict = guided(denoiser, cond, uncond, scale)         classifier-free guidance, cfg.py
    predict = loss_guidance.guide(predict, process)         towards an image, loss_guidance.py
    predict = watched(predict, process, watch)              see the image come about
    latents = sample_latents(predict, process.scheduler(steps), shape, seeds)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor

from latelier.diffusion import Latents, Predict
from latelier.diffusion.process import DDPM, Flow
from latelier.diffusion.schedulers import TIMESTEPS, DormandPrince, Scheduler


def initial_noise(shape: tuple[int, ...], generators: list[torch.Generator]) -> Latents:
    """Standard normal latents on the CPU, each from its own generator."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


@torch.no_grad()
def sample_latents(
    predict: Predict, scheduler: Scheduler, shape: tuple[int, ...], seeds: list[int],
    device: torch.device | str = "cpu", eta: float = 0.0, progress: Callable[[int, int], None] | None = None,
) -> Latents:  # fmt: skip
    """Normalised latents, one for each seed.

    The state stays float32, or what the scheduler makes of it between its steps; for the precision of the denoiser,
    open an autocast around this.

    Args:
        predict: `(x_t, t) -> prediction`, `t` in [0, 1] `(b,)`.
        scheduler: with its timesteps set, as `process.scheduler` makes it.
        shape: `(c, *grid)` of one image's latents.
        seeds: an image's initial noise, and all noise of stochastic samplers, is drawn from its own seed, on the CPU,
            so that it depends neither on the batch nor on the device.
        device: where the denoiser is.
        eta: of the ddim sampler.
        progress: called after each evaluation with how many are done and how many there are.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    x = initial_noise(shape, generators).to(device) * getattr(scheduler, "init_noise_sigma", 1.0)  # (b, c, *grid)

    def predict_at(x_t: Tensor, time: float) -> Tensor:
        return predict(x_t, torch.full((len(seeds),), time, device=device)).float()

    if isinstance(scheduler, DormandPrince):
        return scheduler.integrate(predict_at, x, progress)
    known = inspect.signature(scheduler.step).parameters
    options = {name: value for name, value in {"generator": generators, "eta": eta}.items() if name in known}
    # Schedulers of sigma space (Karras et al. 2022) keep x = z + sigma eps; the denoiser wants alpha z + sigma' eps.
    scale_input = getattr(scheduler, "scale_model_input", lambda x, timestep: x)
    for done, timestep in enumerate(scheduler.timesteps, 1):
        prediction = predict_at(scale_input(x, timestep), float(timestep) / TIMESTEPS)  # (b, c, *grid)
        x = scheduler.step(prediction, timestep, x, **options).prev_sample  # (b, c, *grid)
        if progress is not None:
            progress(done, len(scheduler.timesteps))
    return x.float()


def watched(predict: Predict, process: Flow | DDPM, watch: Callable[[int, Tensor], None]) -> Predict:
    """`predict`, which calls `watch` with the evaluations so far and the estimate of the latents `(b, c, *grid)`."""
    evaluations = count(1)

    def watched_predict(x_t: Tensor, t: Tensor) -> Tensor:
        prediction = predict(x_t, t).float()
        watch(next(evaluations), process.denoised(x_t, t, prediction).float())
        return prediction

    return watched_predict
