"""Fewer channels than the denoiser was built for: the first ones (DC-AE 1.5, augmented diffusion training).

An input layer that uses its first k columns is one whose other inputs are zero, so a prefix is filled up with zeros;
of the prediction the first k channels count.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from latelier.errors import LatelierError


def pad_channels(x_t: Float[Tensor, "b k *grid"], channels: int, allowed: bool) -> Float[Tensor, "b c *grid"]:
    """`x_t` with `channels` channels, those that lack zero.

    Args:
        x_t: noisy latents, or their first channels.
        channels: of the denoiser.
        allowed: whether it was trained on prefixes.

    Raises:
        LatelierError: if there are more channels, or fewer and the denoiser was not trained on prefixes.
    """
    have = x_t.shape[1]
    if have == channels:
        return x_t
    if have > channels:
        raise LatelierError(f"Latents of {have} channels do not fit a denoiser of {channels}.")
    if not allowed:
        raise LatelierError(
            f"Latents of {have} channels do not fit a denoiser of {channels} that was not trained on prefixes of the "
            "channels; train it with denoiser.prefixes."
        )
    return F.pad(x_t, (0, 0) * (x_t.ndim - 2) + (0, channels - have))
