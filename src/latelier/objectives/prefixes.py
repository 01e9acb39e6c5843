"""Which prefixes of the latent channels a training step uses (DC-AE 1.5, structured latent space)."""

from __future__ import annotations

import torch
from accelerate import PartialState
from jaxtyping import Float
from torch import Tensor

from latelier.keyed_random import KeyedRandom
from latelier.recipe import Prefixes


def draw_lengths(section: Prefixes, channels: int, seed: int, seen: int | float) -> list[int]:
    """Lengths for the step that begins at `seen` images, each uniform over the section's list.

    With `full_share` s, a draw takes all channels with probability s, and asks the list otherwise.

    They depend on nothing else, so a resumed run draws the same; all micro-batches of a step share them, and all
    processes, unless `per_process`.

    Args:
        section: the list, how many are drawn, whether all channels are always among them.
        channels: of the latents.
        seed: of the draw.
        seen: images seen by the stage.
    """
    lengths = section.of(channels)
    place = f" of process {PartialState().process_index}" if section.per_process else ""
    number = torch.tensor([int(min(seen, 2**62))])
    uniform = KeyedRandom(seed, number).uniform("prefix" + place, section.draws)[0]  # (draws,)
    rest = [(u - section.full_share) / (1 - section.full_share) for u in uniform.tolist()]  # below 0: all channels
    drawn = [lengths[int(u * len(lengths))] if u >= 0 else channels for u in rest]
    return [channels, *drawn] if section.always_full else drawn


def keep_prefix(z: Float[Tensor, "b c *grid"], length: int) -> Float[Tensor, "b c *grid"]:
    """The first so many channels, the others zero; to those no gradient goes."""
    if length == z.shape[1]:
        return z
    return torch.cat([z[:, :length], torch.zeros_like(z[:, length:])], dim=1)
