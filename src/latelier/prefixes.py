"""Prefixes of the latent channels: structured latents and augmented diffusion training (DC-AE 1.5, ICCV 2025).

A tokenizer whose decoder sees only the first k channels in a training step puts what matters most into those; a
denoiser trained on prefixes learns them first. The recipe's section is `latelier.sections.Prefixes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import PartialState
from jaxtyping import Float
from torch import Tensor

from latelier.errors import LatelierError
from latelier.keyed_random import KeyedRandom
from latelier.sections import Prefixes


@dataclass(frozen=True)
class RandomPrefixes:
    """Which prefixes a training step uses; `lengths` ascend to all channels. See `latelier.sections.Prefixes`."""

    lengths: Sequence[int]
    draws: int = 1
    always_full: bool = False
    full_share: float = 0.0
    per_process: bool = False

    def draw(self, seed: int, seen: int | float) -> list[int]:
        """Lengths for the step that begins at `seen` images of the stage, the same for all its micro-batches."""
        channels = self.lengths[-1]
        process = f" of process {PartialState().process_index}" if self.per_process else ""
        number = torch.tensor([int(min(seen, 2**62))])
        uniform = KeyedRandom(seed, number).uniform("prefix" + process, self.draws)[0]  # (draws,)
        rest = [(u - self.full_share) / (1 - self.full_share) for u in uniform.tolist()]  # below 0: all channels
        drawn = [self.lengths[int(u * len(self.lengths))] if u >= 0 else channels for u in rest]
        return [channels, *drawn] if self.always_full else drawn


def random_prefixes(section: Prefixes | None, channels: int) -> RandomPrefixes | None:
    """The prefixes of a recipe's section for latents of `channels` channels; for errors see `Prefixes.of`."""
    if section is None:
        return None
    return RandomPrefixes(**section.model_dump(exclude={"first", "step", "lengths"}), lengths=section.of(channels))


def keep_prefix(z: Float[Tensor, "b c *grid"], length: int) -> Float[Tensor, "b c *grid"]:
    """The first `length` channels; the others are zero and get no gradient."""
    if length == z.shape[1]:
        return z
    return torch.cat([z[:, :length], torch.zeros_like(z[:, length:])], dim=1)


def pad_channels(x_t: Float[Tensor, "b k *grid"], channels: int, allowed: bool) -> Float[Tensor, "b c *grid"]:
    """`x_t` with zeros for missing channels: an input layer then uses its first k columns only.

    Fewer channels are an error unless `allowed`: the denoiser was trained on prefixes.
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
