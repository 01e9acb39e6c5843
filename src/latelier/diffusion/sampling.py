"""Sampling: from one seed per image to latents, through any diffusers scheduler.

Latents are drawn normalised: the Codec takes mean and standard deviation out of every channel, in training and here,
so the signal-to-noise ratio of a process is the same for all tokenizers and no `scale_factor` (LDM, appendix G) is
needed, neither for KL latents of large variance nor for sizes beyond that of training.

Beside classifier-free guidance there are two wrappers: `windows.windowed` around the denoiser, for images larger
than those of training, and `guiding.Guide`, which pulls towards an image.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latelier import recipe
from latelier.conditioning.condition import Condition
from latelier.diffusion.adaptive import ADAPTIVE, integrate
from latelier.diffusion.guidance import guided
from latelier.diffusion.guiding import Guide
from latelier.diffusion.process import DDPM, TIMESTEPS, Flow, Scheduler
from latelier.errors import LatelierError


def initial_noise(shape: tuple[int, ...], seeds: list[int]) -> Float[Tensor, "b c *grid"]:
    """Standard normal latents `(b, *shape)` on the CPU; image i depends on `seeds[i]` only."""
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
    guide: Guide | None = None,
    watch: Callable[[int, Tensor], None] | None = None,
) -> Float[Tensor, "b c *grid"]:
    """Normalised latents, one for each seed.

    The state stays float32, or what the scheduler makes of it between its steps; the precision of the denoiser is the
    caller's, who may open an autocast around this.

    Args:
        denoiser: `forward(x_t, t, condition) -> prediction`.
        process: what the denoiser was trained with.
        sample: steps, sampler, guidance and so on; `count`, `batch`, `classes` and `seed` are not read.
        shape: `(c, *grid)` of one image's latents.
        condition: for all images, `(b, ...)`; None is unconditional.
        null: the condition that says nothing, for guidance.
        seeds: one for each image. An image's initial noise, and all noise of stochastic samplers, is drawn from
            its own seed, on the CPU, so that it depends neither on the batch nor on the device.
        device: where the denoiser is.
        progress: called after each evaluation with how many are done and how many there are.
        scheduler: a diffusers scheduler with timesteps set, instead of the one that `sample.sampler` names.
        guide: pulls the images towards what it holds; None leaves them alone.
        watch: called after each evaluation with how many are done and with the estimate of the latents `(b, c, *grid)`
            that the prediction means.

    Raises:
        LatelierError: if settings do not fit: a sampler of another process, windows over latents without a plane.
    """
    if sample.window is not None and len(shape) != 3:
        raise LatelierError(
            f"sample.window = {sample.window} cuts latents that lie on a plane, but this tokenizer makes "
            f"{shape[1]} of them in a row; leave it out."
        )
    scheduler = scheduler or process.scheduler(sample)
    generators = _generators(seeds)
    x = _normal(shape, generators).to(device) * getattr(scheduler, "init_noise_sigma", 1.0)  # (b, c, *grid)
    options = _step_options(scheduler, generators, sample.eta)
    # Schedulers of sigma space (Karras et al. 2022) keep x = z + sigma eps; the denoiser wants alpha z + sigma' eps.
    scale_input = getattr(scheduler, "scale_model_input", lambda x, timestep: x)
    total, evaluations = len(scheduler.timesteps), count(1)

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        return guided(
            denoiser, x_t, t, condition, null, sample.guidance, sample.guidance_interval, sample.guidance_channels
        )

    def predict_at(x_t: Tensor, time: float) -> Tensor:
        t = torch.full((len(seeds),), time, device=device)  # (b,)
        prediction = (predict(x_t, t) if guide is None else guide(predict, x_t, t, process)).float()
        if watch is not None:
            watch(next(evaluations), process.denoised(x_t, t, prediction).float())
        return prediction

    if sample.sampler == ADAPTIVE:
        return integrate(predict_at, x, progress)
    for done, timestep in enumerate(scheduler.timesteps, 1):
        prediction = predict_at(scale_input(x, timestep), float(timestep) / TIMESTEPS)  # (b, c, *grid)
        x = scheduler.step(prediction, timestep, x, **options).prev_sample  # (b, c, *grid)
        if progress is not None:
            progress(done, total)
    return x.float()


def _generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _normal(shape: tuple[int, ...], generators: list[torch.Generator]) -> Tensor:
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def _step_options(scheduler: Scheduler, generators: list[torch.Generator], eta: float) -> dict[str, Any]:
    """The optional arguments that this scheduler's `step` takes."""
    known = inspect.signature(scheduler.step).parameters
    options = {"generator": generators, "eta": eta}
    return {name: value for name, value in options.items() if name in known}
