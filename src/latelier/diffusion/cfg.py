"""Guidance: away from what the model would draw without its condition (Ho & Salimans 2022), or from a weaker model."""

from __future__ import annotations

import torch
from torch import nn

from latelier.conditioning.condition import Condition
from latelier.diffusion import Latents, Levels, Predict
from latelier.errors import LatelierError


def guided(
    denoiser: nn.Module, cond: Condition | None, uncond: Condition | None, scale: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0), channels: int | None = None, weak: Predict | None = None,
) -> Predict:  # fmt: skip
    """`(x_t, t) -> u + w (c - u)`, with c and u the predictions with `cond` and `uncond`, from one doubled batch.

    With `weak`, u is the prediction of a weaker model, with its own condition: autoguidance.

    Args:
        denoiser: `forward(x_t, t, condition) -> prediction`.
        cond: the condition; None is an unconditional model.
        uncond: the condition of dropped rows; None switches guidance off, unless there is a weaker model.
        scale: w; 1 is no guidance and costs one forward pass, not two.
        interval: noise levels at which guidance acts, ends included (Kynkäänniemi et al. 2024).
        channels: guide only the first k channels, as the code of DiT and LightningDiT does; default all.
        weak: `(x_t, t) -> prediction` of a weaker model, see `autoguidance`; it is not asked where guidance is off.
    """

    def predict(x_t: Latents, t: Levels) -> Latents:
        if channels is not None and channels > x_t.shape[1]:
            raise LatelierError(f"guidance_channels = {channels}, but the latents have only {x_t.shape[1]} channels.")
        acts = (t >= interval[0]) & (t <= interval[1])  # (b,)
        possible = weak is not None or (cond is not None and uncond is not None)
        if scale == 1 or not possible or not acts.any():
            return denoiser(x_t, t, cond)
        if weak is not None:
            c, u = denoiser(x_t, t, cond), weak(x_t, t)  # (b, c, *grid) each
        else:
            both = Condition.cat([cond, uncond])  # type: ignore[list-item]
            c, u = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)  # (b, c, *grid) each
        weight = torch.where(acts, scale, 1.0).to(c).view(-1, *[1] * (x_t.ndim - 1))  # (b, 1, ...)
        prediction = torch.lerp(u, c, weight)  # (b, c, *grid)
        if channels is None or channels == x_t.shape[1]:
            return prediction
        return torch.cat([prediction[:, :channels], c[:, channels:]], dim=1)  # (b, c, *grid)

    return predict
