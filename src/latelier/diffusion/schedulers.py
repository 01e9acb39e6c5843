"""The samplers of a process: diffusers' schedulers on our grids, LDM's DDIM and PLMS, dopri5, and a flow's reverse SDE.

diffusers' own DDIM and PNDM go down by one fixed stride, so that 300 or 400 steps over 1000 noise levels miss the
noisiest ones. `DDIM` and `PLMS` here know each step's two ends instead; where LDM has a grid they are on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import ConfigMixin, DDIMScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from latelier.diffusion import Latents
from latelier.errors import LatelierError

Scheduler = Any  # a diffusers scheduler; they share `set_timesteps`, `timesteps` and `step` by custom, not by a base
TIMESTEPS = 1000  # diffusers' schedulers count noise levels in thousandths of t
ADAPTIVE = "dopri5"
LAST_STEP = 0.04  # of the sde sampler
FLOW_SAMPLERS = ("euler", "heun", "dpm++", "unipc", "sde", ADAPTIVE)
DDPM_SAMPLERS = ("ddim", "ddpm", "plms", "dpm++", "unipc", "euler", "heun")
MULTISTEP = {"dpm++": diffusers.DPMSolverMultistepScheduler, "unipc": diffusers.UniPCMultistepScheduler}
RELATIVE, ABSOLUTE = 1e-3, 1e-6  # tolerances of dopri5 in SiT and DC-AE
LEAST_LOG_SNR = -5.1  # log(alpha / sigma) where fast solvers begin on a cosine schedule, as diffusers advises for it
BELOW_ONE = 1e-6  # multistep solvers step in log(alpha / sigma), which is infinite at pure noise
_OTHER_GRIDS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas")


class DDIM(DDIMScheduler):
    """DDIM (Song et al. 2021, equation 12) as LDM samples: levels 1, 1 + r, 1 + 2 r, ..., and a_0, not 1, at the end.

    Where r = levels / steps is no whole number, levels are rounded down, so that all steps are equally long to within
    one level. Clipping and thresholding, which are for pixels, are not done.
    """

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Spread the steps over all levels, noisiest first."""
        self.num_inference_steps = num_inference_steps
        grid = ldm_levels(num_inference_steps, self.config["num_train_timesteps"])[::-1].copy()
        self.timesteps = torch.from_numpy(grid).to(device)
        self.below = dict(zip(grid.tolist(), [*grid[1:].tolist(), 0]))  # the level that each level's step ends at

    def step(  # type: ignore[override]
        self, model_output: Latents, timestep: int | Tensor, sample: Latents, eta: float = 0.0, generator: Any = None,
        variance_noise: Latents | None = None,
    ) -> DDIMSchedulerOutput:  # fmt: skip
        """From one level to the next below; `eta` 0 is deterministic, 1 as random as ancestral sampling."""
        level = int(timestep)
        return self._down(sample, self._epsilon(model_output, level, sample), level, eta, generator, variance_noise)

    def _down(
        self, x: Tensor, eps: Tensor, level: int, eta: float = 0.0, generator: Any = None, noise: Tensor | None = None
    ) -> DDIMSchedulerOutput:
        a, a_below = self.alphas_cumprod[level].item(), self.alphas_cumprod[self.below[level]].item()
        z = (x - (1 - a) ** 0.5 * eps) / a**0.5  # (b, c, *grid)
        sigma = eta * ((1 - a_below) / (1 - a) * (1 - a / a_below)) ** 0.5  # equation 16
        x = a_below**0.5 * z + (1 - a_below - sigma**2) ** 0.5 * eps  # (b, c, *grid)
        if eta:
            if noise is None:
                noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            x = x + sigma * noise
        return DDIMSchedulerOutput(prev_sample=x, pred_original_sample=z)

    def _epsilon(self, prediction: Tensor, level: int, x: Tensor) -> Tensor:
        """The noise that a prediction means."""
        a, kind = self.alphas_cumprod[level].item(), self.config["prediction_type"]
        if kind == "epsilon":
            return prediction
        if kind == "v_prediction":
            return a**0.5 * prediction + (1 - a) ** 0.5 * x
        return (x - a**0.5 * prediction) / (1 - a) ** 0.5


class PLMS(DDIM):
    """Pseudo linear multi-step (Liu et al. 2022, "Pseudo Numerical Methods", section 3.3) as LDM samples.

    DDIM steps whose epsilon is extrapolated from the last four. The first step is a pseudo improved Euler step: it is
    made twice, the second time with the mean of the epsilons at both its ends; so there is one evaluation more than
    steps. Predictions of v and z are turned into epsilons first.
    """

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """As DDIM; the second level is visited twice."""
        super().set_timesteps(num_inference_steps, device)
        self.timesteps = torch.cat([self.timesteps[:2], self.timesteps[1:]])
        self.past: list[Tensor] = []  # epsilons, newest last
        self.trial: tuple[int, Tensor] | None = None  # level and x where the first step began
        self.started = False

    def step(self, model_output: Latents, timestep: int | Tensor, sample: Latents) -> DDIMSchedulerOutput:  # type: ignore
        """From one level to the next below, or a second time over the first step."""
        level = int(timestep)
        eps = self._epsilon(model_output, level, sample)
        if self.trial is not None:
            (level, sample), self.trial = self.trial, None
            return self._down(sample, (self.past[-1] + eps) / 2, level)
        self.past = [*self.past[-3:], eps]
        if not self.started:
            self.started, self.trial = True, (level, sample)
        return self._down(sample, adams_bashforth(self.past), level)


def adams_bashforth(slopes: list[Tensor]) -> Tensor:
    """The extrapolated slope of up to four equally spaced ones, newest last."""
    weights = {1: (1,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}
    return sum(weight * slope for weight, slope in zip(weights[len(slopes)], reversed(slopes)))  # type: ignore


class DormandPrince:
    """dopri5: dx/dt = v(x, t) from t = 1 to 0 by Dormand and Prince's method of order 5(4) (SciPy's RK45).

    It takes as many steps as its tolerances ask for, `steps` has no part in it. Its error is measured over all images
    of a batch together, so an image depends a little on its neighbours: by about the tolerance.
    """

    def integrate(
        self, velocity: Callable[[Tensor, float], Tensor], noise: Latents,
        progress: Callable[[int, int], None] | None = None,
    ) -> Latents:  # fmt: skip
        """Latents of noise, the state at t = 1, float32; `velocity` is `(x_t, t) -> dx/dt`.

        `progress` is called with the evaluations so far, twice, since the total is not known.
        """
        from scipy.integrate import solve_ivp

        done = 0

        def slope(t: float, state: np.ndarray) -> np.ndarray:
            nonlocal done
            x = torch.from_numpy(state).to(noise.device, torch.float32).view_as(noise)
            v = velocity(x, t).double().flatten().cpu().numpy()
            if not np.isfinite(v).all():  # the solver would look for a small enough step for ever
                raise LatelierError(
                    f"sample.sampler = {ADAPTIVE}: the denoiser's velocity at t = {t:.4f} is not finite."
                )
            done += 1
            if progress is not None:
                progress(done, done)
            return v

        start = noise.double().flatten().cpu().numpy()
        solution = solve_ivp(slope, (1.0, 0.0), start, "RK45", t_eval=[0.0], rtol=RELATIVE, atol=ABSOLUTE)
        if not solution.success:
            raise LatelierError(f"sample.sampler = {ADAPTIVE} did not arrive ({solution.message}); use euler or heun.")
        return torch.from_numpy(solution.y[:, -1]).to(noise.device, torch.float32).view_as(noise)


class ReverseSDE(SchedulerMixin, ConfigMixin):
    """The reverse SDE of a linear flow, by Euler and Maruyama: the sampler of SiT and MAETok.

    The path x_t = (1 - t) z + t eps has the velocity v = E[eps - z | x_t], whose ODE carries the densities p_t along.
    Its other half, the noise, follows from it, and so does the score s, the gradient of log p_t:

        eps(x_t) = E[eps | x_t] = x_t + (1 - t) v        s = -eps(x_t) / t = -(x_t + (1 - t) v) / t

    Since s p_t is the gradient of p_t, the continuity equation of the ODE may be written with any noise w(t) >= 0,

        -dp_t/dt = div((v - w s / 2) p_t) + w / 2 laplace(p_t),

    which is the Fokker-Planck equation of an SDE that runs backwards, from t to t - h, with the same densities
    (Anderson 1982; Ma et al. 2024, "SiT", section 2):

        x_(t-h) = x_t - h (v - w s / 2) + sqrt(w h) n,        n ~ N(0, 1)

    The noise is w = 2 t here, so that the drift, v - t s = v + eps(x_t), is finite everywhere. From `last_step`, a
    time between 0 and 1, one last step goes to 0 without noise. The state is float64 between the steps, where the
    device has it; `scale_model_input` makes float32 of it for the denoiser.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(self, last_step: float = 0.04, num_train_timesteps: int = 1000):
        if not 0 < last_step < 1:
            raise LatelierError(
                f"sample.last_step = {last_step} leaves the sde sampler no steps with noise and one without; "
                "choose a time between 0 and 1, such as 0.04."
            )
        self.set_timesteps(2)

    def set_timesteps(
        self, num_inference_steps: int, device: torch.device | str | None = None, shift: float = 1.0
    ) -> None:
        """Place the evaluations at even times from 1 to `last_step`, both included; the last one leads to 0.

        `shift`: times become `shift t / (1 + (shift - 1) t)`, of even ones from 1 to where `last_step` comes from, so
        that both ends stay.
        """
        if num_inference_steps < 2:
            raise LatelierError(
                f"sample.steps = {num_inference_steps} is too few for the sde sampler, whose last step has no noise; "
                "use 2 or more."
            )
        end = self.config["last_step"]
        even = np.linspace(1.0, end / (shift + (1 - shift) * end), num_inference_steps)  # the inverse of the shift
        times = shift * even / (1 + (shift - 1) * even)  # (steps,)
        self.num_inference_steps = num_inference_steps
        timesteps = torch.from_numpy(times * self.config["num_train_timesteps"]).float()  # (steps,)
        visited, self.timesteps = timesteps.tolist(), timesteps.to(device)
        self.below = dict(zip(visited, [*visited[1:], 0.0]))  # the timestep that each one's step ends at

    def scale_model_input(self, sample: Latents, timestep: float | Tensor | None = None) -> Latents:
        """The state as a denoiser takes it: the same, in float32."""
        return sample.float() if sample.dtype == torch.float64 else sample

    def step(
        self, model_output: Latents, timestep: float | Tensor, sample: Latents, generator: Any = None
    ) -> DDIMSchedulerOutput:
        """From one time to the next below; from the last to 0 without noise. `model_output` is the velocity."""
        scale, now = self.config["num_train_timesteps"], float(timestep)
        t, h = now / scale, (now - self.below[now]) / scale
        dtype = torch.float32 if sample.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        x, v = sample.to(dtype), model_output.to(dtype)  # (b, c, *grid)
        z, eps = x - t * v, x + (1 - t) * v
        x = x - h * (v + eps)
        if self.below[now] == 0:
            return DDIMSchedulerOutput(prev_sample=x.float(), pred_original_sample=z)
        noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=torch.float32)
        return DDIMSchedulerOutput(prev_sample=x + (2 * t * h) ** 0.5 * noise, pred_original_sample=z)


def ldm_levels(steps: int, levels: int = TIMESTEPS) -> np.ndarray:
    """LDM's grid, `(steps,)` ascending: 1 + floor(i levels / steps); all levels from 0 if there are as many steps."""
    return np.arange(steps) if steps == levels else 1 + np.arange(steps) * levels // steps


def solver_levels(alphas_cumprod: Tensor, steps: int, schedule: str) -> np.ndarray:
    """The levels that fast solvers visit on their way to 0, `(steps,)` descending, as diffusers spreads them.

    A cosine schedule ends in almost pure noise, where x_t says nothing of z: there they begin a little below.
    """
    top = len(alphas_cumprod) - 1
    if schedule == "squaredcos_cap_v2":
        half_log_snr = 0.5 * torch.logit(alphas_cumprod.double())  # log(alpha / sigma), (k,)
        top = int((half_log_snr >= LEAST_LOG_SNR).sum()) - 1
    steps = min(steps, top + 1)
    return np.arange(top, -1, -1) if steps > top else np.linspace(top, 0, steps + 1).round()[:-1].astype(int)


def flow_sigmas(steps: int, shift: float) -> np.ndarray:
    """Noise levels visited by a flow sampler, `(steps + 1,)` from 1 to 0: even ones, shifted once."""
    return shifted(np.linspace(1.0, 0.0, steps + 1), shift)


def shifted(t: Any, shift: float) -> Any:
    """t' = shift t / (1 + (shift - 1) t): 0 and 1 stay, above 1 moves the rest towards noise (Esser et al. 2024)."""
    return t if shift == 1 else shift * t / (1 + (shift - 1) * t)


def choose_sampler(sampler: str, process: str, shift: float, eta: float, last_step: float) -> str:
    """The sampler, `auto` the first of the process; settings that would do nothing are refused."""
    allowed = FLOW_SAMPLERS if process == "flow" else DDPM_SAMPLERS
    kind = allowed[0] if sampler == "auto" else sampler
    if kind not in allowed:
        raise LatelierError(
            f"sample.sampler = {sampler!r} does not go with a {process} process; allowed: auto, {', '.join(allowed)}."
        )
    if eta and kind != "ddim":
        raise LatelierError(f"sample.eta = {eta} acts in the ddim sampler only, not in {kind}; set it to 0.")
    if kind != "sde" and last_step != LAST_STEP:
        raise LatelierError(
            f"sample.last_step = {last_step} acts in the sde sampler only, not in {kind}; leave it out."
        )
    if shift != 1 and process != "flow":
        raise LatelierError(f"sample.shift = {shift} acts in flow processes only; set it to 1.")
    return kind


def flow_scheduler(kind: str, last_step: float = LAST_STEP) -> Scheduler:
    """A scheduler of one of `FLOW_SAMPLERS`, without timesteps; `last_step` is where the noisy steps of `sde` end."""
    if kind == "sde":
        return ReverseSDE(last_step, TIMESTEPS)
    if kind == ADAPTIVE:
        return DormandPrince()
    if kind in ("euler", "heun"):
        name = f"FlowMatch{kind.capitalize()}DiscreteScheduler"
        return getattr(diffusers, name)(num_train_timesteps=TIMESTEPS, shift=1.0)
    return MULTISTEP[kind](prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0)


def ddpm_scheduler(kind: str, arguments: dict[str, Any]) -> Scheduler:
    """A scheduler of one of `DDPM_SAMPLERS`, without timesteps; `arguments` are diffusers' names of the process."""
    if kind in ("ddim", "plms"):  # `set_alpha_to_one`, `steps_offset`: for diffusers' own schedulers of this config
        cls = {"ddim": DDIM, "plms": PLMS}[kind]
        return cls(**arguments, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    if kind == "ddpm":
        return diffusers.DDPMScheduler(**arguments, clip_sample=False)
    if kind in ("euler", "heun"):
        # "leading": initial noise of sqrt(sigma^2 + 1), which is N(0, 1) once the input is scaled, as in training.
        return getattr(diffusers, f"{kind.capitalize()}DiscreteScheduler")(**arguments, timestep_spacing="leading")
    return MULTISTEP[kind](**arguments)


def place_flow(scheduler: Scheduler, steps: int, shift: float) -> None:
    """Put a scheduler onto `flow_sigmas`; one with another shift, or of a kind unknown here, gets its own grid.

    `ReverseSDE` goes evenly from 1 to its `last_step` instead, and from there to 0; dopri5 chooses its steps itself.
    """
    if isinstance(scheduler, DormandPrince):
        return
    if isinstance(scheduler, ReverseSDE):
        scheduler.set_timesteps(steps, shift=shift)
        return
    sigmas, config = flow_sigmas(steps, shift), scheduler.config
    if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler) and config["shift"] == 1:
        scheduler.set_timesteps(sigmas=sigmas[:-1].tolist())  # diffusers appends the 0
        return
    scheduler.set_timesteps(steps)
    if isinstance(scheduler, diffusers.FlowMatchHeunDiscreteScheduler) and config["shift"] == 1:
        # Its own grid cannot be chosen. Inner points are visited twice; the step to 0 is an Euler step.
        points = torch.from_numpy(sigmas).float()
        scheduler.sigmas = torch.cat([points[:1], points[1:-1].repeat_interleave(2), points[-1:]])
        scheduler.timesteps = scheduler.sigmas[:-1] * TIMESTEPS
    elif config.get("use_flow_sigmas"):
        if config["flow_shift"] == 1 and not any(config.get(name) for name in _OTHER_GRIDS[:-1]):
            scheduler.sigmas = torch.from_numpy(sigmas.clip(max=1 - BELOW_ONE)).float()  # (steps + 1,)
        scheduler.timesteps = scheduler.sigmas[:-1] * TIMESTEPS  # diffusers cuts these down to whole numbers


def place_ddpm(scheduler: Scheduler, steps: int) -> None:
    """Spread a scheduler's steps over the noise levels, or refuse steps with which some would be missed."""
    config = scheduler.config
    levels = config["num_train_timesteps"]
    if steps > levels:
        raise LatelierError(f"sample.steps = {steps} is more than the {levels} noise levels of a ddpm process.")
    one_stride = isinstance(scheduler, diffusers.DDIMScheduler | diffusers.PNDMScheduler)
    if one_stride and not isinstance(scheduler, DDIM) and steps * (levels // steps) < 0.9 * levels:
        raise LatelierError(
            f"sample.steps = {steps} cannot be spaced evenly over {levels} noise levels by diffusers' "
            f"{type(scheduler).__name__}; use {levels // (levels // steps + 1)} or {levels // (levels // steps)}, or "
            "name a sampler: ddim or plms."
        )
    if isinstance(scheduler, diffusers.DDPMScheduler):
        scheduler.set_timesteps(timesteps=np.linspace(levels - 1, 0, steps).round().astype(int).tolist())
        return
    plain = not any(config.get(name) for name in _OTHER_GRIDS)
    visited = solver_levels(scheduler.alphas_cumprod, steps, config["beta_schedule"])
    if plain and isinstance(scheduler, diffusers.EulerDiscreteScheduler | diffusers.HeunDiscreteScheduler):
        scheduler.set_timesteps(timesteps=visited.tolist())
        return
    scheduler.set_timesteps(steps)
    multistep = isinstance(scheduler, tuple(MULTISTEP.values()))
    if plain and multistep and config["timestep_spacing"] == "linspace" and config["final_sigmas_type"] == "zero":
        a = scheduler.alphas_cumprod[torch.from_numpy(visited)]  # (steps,)
        scheduler.sigmas = torch.cat([((1 - a) / a).sqrt(), torch.zeros(1)])  # (steps + 1,)
        scheduler.timesteps, scheduler.num_inference_steps = torch.from_numpy(visited), len(visited)
