"""Classifier-free guidance (Ho & Salimans 2022): away from what the model would draw without its condition."""

from __future__ import annotations

import torch
from torch import nn

from latelier.conditioning.condition import Condition
from latelier.diffusion import Latents, Levels, Predict
from latelier.errors import LatelierError


def guided(
    denoiser: nn.Module, cond: Condition | None, uncond: Condition | None, scale: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0), channels: int | None = None,
) -> Predict:  # fmt: skip
    """`(x_t, t) -> u + w (c - u)`, with c and u the predictions with `cond` and `uncond`, from one doubled batch.

    Args:
        denoiser: `forward(x_t, t, condition) -> prediction`.
        cond: the condition; None is an unconditional model.
        uncond: the condition of dropped rows; None switches guidance off.
        scale: w; 1 is no guidance and costs one forward pass, not two.
        interval: noise levels at which guidance acts, ends included (Kynkäänniemi et al. 2024).
        channels: guide only the first k channels, as the code of DiT and LightningDiT does; default all.
    """

    def predict(x_t: Latents, t: Levels) -> Latents:
        if channels is not None and channels > x_t.shape[1]:
            raise LatelierError(f"guidance_channels = {channels}, but the latents have only {x_t.shape[1]} channels.")
        acts = (t >= interval[0]) & (t <= interval[1])  # (b,)
        if scale == 1 or cond is None or uncond is None or not acts.any():
            return denoiser(x_t, t, cond)
        both = Condition.cat([cond, uncond])
        c, u = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)  # (b, c, *grid) each
        weight = torch.where(acts, scale, 1.0).to(c).view(-1, *[1] * (x_t.ndim - 1))  # (b, 1, ...)
        prediction = torch.lerp(u, c, weight)  # (b, c, *grid)
        if channels is None or channels == x_t.shape[1]:
            return prediction
        return torch.cat([prediction[:, :channels], c[:, channels:]], dim=1)  # (b, c, *grid)

    return predict
