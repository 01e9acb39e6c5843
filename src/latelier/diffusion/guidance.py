"""Classifier-free guidance (Ho & Salimans 2022): away from what the model would draw without being told."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latelier.conditioning.condition import Condition
from latelier.errors import LatelierError


def guided(
    denoiser: nn.Module,
    x_t: Float[Tensor, "b c *grid"],
    t: Float[Tensor, " b"],
    condition: Condition | None,
    null: Condition | None,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
    channels: int | None = None,
) -> Float[Tensor, "b c *grid"]:
    """u + w (c - u), with c and u the predictions with `condition` and with `null`, from one doubled batch.

    Args:
        denoiser: `forward(x_t, t, condition) -> prediction`.
        x_t: noisy latents.
        t: noise levels in [0, 1].
        condition: what is asked for; None is an unconditional model.
        null: the condition that says nothing; None switches guidance off.
        scale: w; 1 is no guidance and costs one forward pass, not two.
        interval: noise levels at which guidance acts, ends included (Kynkäänniemi et al. 2024).
        channels: guide only the first so many channels, as the code of DiT and LightningDiT does; default all.

    Raises:
        LatelierError: if there are fewer channels than `channels`.
    """
    if channels is not None and channels > x_t.shape[1]:
        raise LatelierError(f"guidance_channels = {channels}, but the latents have only {x_t.shape[1]} channels.")
    acts = (t >= interval[0]) & (t <= interval[1])  # (b,)
    if scale == 1 or condition is None or null is None or not acts.any():
        return denoiser(x_t, t, condition)
    both = Condition.cat([condition, null])
    told, untold = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)  # (b, c, *grid) each
    weight = torch.where(acts, scale, 1.0).to(told).view(-1, *[1] * (x_t.ndim - 1))  # (b, 1, ...)
    prediction = torch.lerp(untold, told, weight)  # (b, c, *grid)
    if channels is None or channels == x_t.shape[1]:
        return prediction
    return torch.cat([prediction[:, :channels], told[:, channels:]], dim=1)  # (b, c, *grid)
