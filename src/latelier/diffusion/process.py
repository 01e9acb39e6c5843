"""Diffusion processes: how data become noise, what a denoiser learns, and which diffusers scheduler goes back.

Time t runs from 0 (data) to 1 (noise) for every process.

Flow   x_t = (1 - t) z + t eps                     target eps - z                 (linear path, rectified flow)
DDPM   x_t = sqrt(a_k) z + sqrt(1 - a_k) eps       target eps, v or z             (k = 1000 t, a = cumulative alpha)
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from latelier.diffusion import Latents, Levels, schedulers
from latelier.diffusion.schedulers import LAST_STEP, TIMESTEPS, Scheduler
from latelier.errors import LatelierError


@dataclass(frozen=True)
class Flow:
    """Linear flow matching (Lipman et al. 2023; Liu et al. 2023).

    Args:
        t_distribution: density of training times, `uniform` or `logit-normal` (Esser et al. 2024, section 3.1).
        shift: training times become `shift t / (1 + (shift - 1) t)`; above 1 means more noise.
    """

    t_distribution: Literal["uniform", "logit-normal"] = "logit-normal"
    shift: float = 1.0

    def noise(self, z: Latents, t: Levels, eps: Latents) -> Latents:
        """x_t = (1 - t) z + t eps."""
        return torch.lerp(z, eps, _like(t, z))

    def target(self, z: Latents, t: Levels, eps: Latents) -> Latents:
        """The velocity dx_t/dt = eps - z."""
        return eps - z

    def denoised(self, x_t: Latents, t: Levels, prediction: Latents) -> Latents:
        """The estimate of z that a velocity means: x_t - t v."""
        return x_t - _like(t, x_t) * prediction

    def sample_t(self, uniform: Levels) -> Levels:
        """Training times of uniform numbers in [0, 1), by the inverse of the distribution function."""
        t = torch.sigmoid(torch.special.ndtri(uniform)) if self.t_distribution == "logit-normal" else uniform
        return schedulers.shifted(t, self.shift)

    def scheduler(
        self, steps: int = 50, sampler: str = "auto", shift: float = 1.0, eta: float = 0.0, last_step: float = LAST_STEP
    ) -> Scheduler:
        """A diffusers scheduler with its timesteps set, which are 1000 t; refuses what does not go with a flow."""
        kind = schedulers.choose_sampler(sampler, "flow", shift, eta, last_step)
        scheduler = schedulers.flow_scheduler(kind, last_step)
        self.set_timesteps(scheduler, steps, shift)
        return scheduler

    def set_timesteps(self, scheduler: Scheduler, steps: int, shift: float = 1.0) -> None:
        """Put a scheduler onto its grid, see `place_flow`."""
        schedulers.place_flow(scheduler, steps, shift)

    def alpha_sigma(self, t: Levels, like: Tensor) -> tuple[Tensor, Tensor]:
        """The shares of z and eps in x_t, 1 - t and t, `(b, 1, ...)`."""
        return _like(1 - t, like), _like(t, like)


@dataclass(frozen=True)
class DDPM:
    """Variance-preserving diffusion in 1000 discrete noise levels (Ho et al. 2020).

    Args:
        beta_schedule: `linear`, `scaled_linear` (linear in sqrt(beta), LDM) or `cosine` (Nichol & Dhariwal 2021).
        beta_start, beta_end: ends of the linear schedules.
        prediction: what is learned: `epsilon`, `v` (Salimans & Ho 2022) or `sample` (z).
    """

    beta_schedule: Literal["linear", "scaled_linear", "cosine"] = "scaled_linear"
    beta_start: float = 0.0015
    beta_end: float = 0.0195
    prediction: Literal["epsilon", "v", "sample"] = "epsilon"
    num_train_timesteps: int = TIMESTEPS

    @property
    def alphas_cumprod(self) -> Tensor:
        """Share of the data's variance that is left at each noise level, `(k,)`."""
        return _alphas_cumprod(self, torch.device("cpu"))

    def noise(self, z: Latents, t: Levels, eps: Latents) -> Latents:
        """x_t = sqrt(a) z + sqrt(1 - a) eps."""
        alpha, sigma = self.alpha_sigma(t, z)
        return alpha * z + sigma * eps

    def target(self, z: Latents, t: Levels, eps: Latents) -> Latents:
        """eps, z, or v = sqrt(a) eps - sqrt(1 - a) z."""
        if self.prediction == "epsilon":
            return eps
        if self.prediction == "sample":
            return z
        alpha, sigma = self.alpha_sigma(t, z)
        return alpha * eps - sigma * z

    def denoised(self, x_t: Latents, t: Levels, prediction: Latents) -> Latents:
        """The estimate of z that a prediction means."""
        if self.prediction == "sample":
            return prediction
        alpha, sigma = self.alpha_sigma(t, x_t)
        if self.prediction == "epsilon":
            return (x_t - sigma * prediction) / alpha
        return alpha * x_t - sigma * prediction

    def sample_t(self, uniform: Levels) -> Levels:
        """Training times k / 1000, k uniform in 0..999."""
        levels = self.num_train_timesteps
        return (uniform * levels).floor().clamp(max=levels - 1) / levels

    def scheduler(
        self, steps: int = 50, sampler: str = "auto", shift: float = 1.0, eta: float = 0.0, last_step: float = LAST_STEP
    ) -> Scheduler:
        """As `Flow.scheduler`; `shift` and `last_step` are refused, since they act in flows only."""
        kind = schedulers.choose_sampler(sampler, "ddpm", shift, eta, last_step)
        scheduler = schedulers.ddpm_scheduler(kind, self._scheduler_arguments())
        self.set_timesteps(scheduler, steps)
        return scheduler

    def set_timesteps(self, scheduler: Scheduler, steps: int, shift: float = 1.0) -> None:
        """Put a scheduler onto its grid, see `place_ddpm`."""
        schedulers.place_ddpm(scheduler, steps)

    def alpha_sigma(self, t: Levels, like: Tensor) -> tuple[Tensor, Tensor]:
        """The shares of z and eps in x_t, sqrt(a) and sqrt(1 - a), `(b, 1, ...)`."""
        level = (t * self.num_train_timesteps).round().long().clamp(0, self.num_train_timesteps - 1)  # (b,)
        a = _alphas_cumprod(self, t.device)[level]  # (b,)
        return _like(a.sqrt(), like), _like((1 - a).sqrt(), like)

    def _scheduler_arguments(self) -> dict[str, Any]:
        schedule = "squaredcos_cap_v2" if self.beta_schedule == "cosine" else self.beta_schedule
        prediction = "v_prediction" if self.prediction == "v" else self.prediction
        betas = {"beta_schedule": schedule, "beta_start": self.beta_start, "beta_end": self.beta_end}
        return {"num_train_timesteps": self.num_train_timesteps, **betas, "prediction_type": prediction}


def build_process(
    kind: str = "flow", t_distribution: Any = "logit-normal", shift: float | str = 1.0, prediction: str | None = None,
    beta_schedule: Any = "scaled_linear", beta_start: float = 0.0015, beta_end: float = 0.0195,
    latent_shape: tuple[int, ...] | None = None,
) -> Flow | DDPM:  # fmt: skip
    """The process of a recipe's `denoiser.process`, or of a saved pipeline's config.

    `shift: dimension` is that of `latent_shape`, `(c, *grid)`; a saved process has the number.
    """
    if isinstance(shift, str):
        if kind != "flow" or latent_shape is None:
            raise LatelierError(
                "denoiser.process.shift = 'dimension' is for training a flow; leave it out with kind: ddpm, and give a "
                "number where no latents are known."
            )
        shift = dimension_shift(latent_shape)
    if kind == "flow":
        if prediction not in (None, "velocity"):
            raise LatelierError(
                f"denoiser.process.prediction = {prediction!r} is not for a flow, which predicts the velocity; "
                "leave it out, or set kind: ddpm."
            )
        return Flow(t_distribution, shift)
    if prediction == "velocity":
        raise LatelierError(
            "denoiser.process.prediction = 'velocity' is for a flow; with kind: ddpm choose epsilon, v or sample."
        )
    return DDPM(beta_schedule, beta_start, beta_end, prediction or "epsilon")  # type: ignore[arg-type]


def dimension_shift(latent_shape: tuple[int, ...]) -> float:
    """alpha = sqrt(m / 4096) for latents of m numbers (Zheng et al. 2025, "RAE", section 4; Esser et al. 2024).

    Noise of one level hides less of a latent of more numbers, so times move towards noise. The reference asserts that
    alpha is 1 or more; here smaller latents are not shifted.
    """
    return max(1.0, math.sqrt(math.prod(latent_shape) / 4096))


def describe_process(process: Flow | DDPM) -> dict[str, Any]:
    """The arguments with which `build_process` makes it again."""
    about = asdict(process)
    about.pop("num_train_timesteps", None)
    return {"kind": "flow" if isinstance(process, Flow) else "ddpm", **about}


@lru_cache(maxsize=16)
def _alphas_cumprod(process: DDPM, device: torch.device) -> Tensor:
    return DDPMScheduler(**process._scheduler_arguments()).alphas_cumprod.to(device)


def _like(values: Tensor, like: Tensor) -> Tensor:
    """`(b,)` to `(b, 1, ...)`."""
    return values.view(-1, *[1] * (like.ndim - 1))
