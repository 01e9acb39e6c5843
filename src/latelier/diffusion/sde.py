"""The reverse SDE of a linear flow, by Euler and Maruyama: the sampler of SiT and MAETok.

The path x_t = (1 - t) z + t eps has the velocity v = E[eps - z | x_t], whose ODE carries the densities p_t along. Its
other half, the noise, follows from it, and so does the score s, the gradient of log p_t:

    eps(x_t) = E[eps | x_t] = x_t + (1 - t) v        s = -eps(x_t) / t = -(x_t + (1 - t) v) / t

Since s p_t is the gradient of p_t, the continuity equation of the ODE may be written with any noise w(t) >= 0,

    -dp_t/dt = div((v - w s / 2) p_t) + w / 2 laplace(p_t),

which is the Fokker-Planck equation of an SDE that runs backwards, from t to t - h, with the same densities (Anderson
1982; Ma et al. 2024, "SiT", section 2):

    x_(t-h) = x_t - h (v - w s / 2) + sqrt(w h) n,        n ~ N(0, 1)

The noise is w = 2 t here, so that the drift, v - t s = v + eps(x_t), is finite everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from latelier.diffusion import Latents
from latelier.errors import LatelierError


@dataclass
class ReverseSDEOutput(BaseOutput):
    """What a step gives."""

    prev_sample: Tensor  # x at the next time; float64 where the device has it, float32 after the last step
    pred_original_sample: Tensor  # the estimate of z, x_t - t v


class ReverseSDE(SchedulerMixin, ConfigMixin):
    """Euler-Maruyama steps of the reverse SDE with w = 2 t, and one last step without noise, the drift alone.

    The state is float64 between the steps; `scale_model_input` makes float32 of it for the denoiser.

    Args:
        last_step: the time where the noisy steps end, so the length of the last one; above 0, below 1.
        num_train_timesteps: timesteps are t times this.
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
        """Place the evaluations at even times from 1 to `last_step`, both included.

        Args:
            num_inference_steps: evaluations; the last of them belongs to the step from `last_step` to 0.
            device: of `timesteps`.
            shift: times become `shift t / (1 + (shift - 1) t)`, of even ones from 1 to where `last_step` comes from, so
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
        self.timesteps = torch.from_numpy(times * self.config["num_train_timesteps"]).float()  # (steps,)
        visited = self.timesteps.tolist()
        self.below = dict(zip(visited, [*visited[1:], 0.0]))  # the timestep that each one's step ends at
        self.timesteps = self.timesteps.to(device)

    def scale_model_input(self, sample: Latents, timestep: float | Tensor | None = None) -> Latents:
        """The state as a denoiser takes it: the same, in float32."""
        return sample.float() if sample.dtype == torch.float64 else sample

    def step(
        self,
        model_output: Latents,
        timestep: float | Tensor,
        sample: Latents,
        generator: Any = None,
    ) -> ReverseSDEOutput:
        """From one time to the next below; from the last to 0 without noise. `model_output` is the velocity."""
        scale, now = self.config["num_train_timesteps"], float(timestep)
        t, h = now / scale, (now - self.below[now]) / scale
        dtype = torch.float32 if sample.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        x, v = sample.to(dtype), model_output.to(dtype)  # (b, c, *grid)
        z, eps = x - t * v, x + (1 - t) * v
        x = x - h * (v + eps)
        if self.below[now] == 0:
            return ReverseSDEOutput(prev_sample=x.float(), pred_original_sample=z)
        noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=torch.float32)
        return ReverseSDEOutput(prev_sample=x + (2 * t * h) ** 0.5 * noise, pred_original_sample=z)
