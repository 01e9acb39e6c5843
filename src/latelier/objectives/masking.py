"""Which patches are masked: one share for a whole batch, and for each image that many patches of its own."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from latelier.keyed_random import KeyedRandom
from latelier.recipe import Masking

FAR = 2**62  # stands for an unbounded count of images, with which a check tries the far end of training


def draw_share(masking: Masking, seed: int, seen: int | float) -> float:
    """Share of the patches to mask in the step that begins at `seen` images.

    It depends on nothing else, so that all processes and micro-batches of a step mask equally many patches.

    Args:
        masking: a normal distribution around `mode`, cut off at `low` and `high` (MAETok: 0.4 to 0.6 around 0.6), or
            a linear fall from `high` to 0 over the first `fade` images (MAETok's decoder fine-tuning).
        seed: of the draw.
        seen: images seen in this phase.

    Returns:
        A number from `low` to `high`; while fading, and ever after, from 0 to `high`.
    """
    if masking.fade:
        return masking.high * max(0.0, 1 - seen / masking.fade)
    if masking.low == masking.high:
        return masking.high
    from scipy.stats import truncnorm

    uniform = KeyedRandom(seed, torch.tensor([int(min(seen, FAR))])).uniform("mask share").item()
    low, high = ((end - masking.mode) / masking.std for end in (masking.low, masking.high))
    return float(truncnorm.ppf(uniform, low, high, masking.mode, masking.std))  # the inverse of the distribution


def draw_mask(order: Float[Tensor, "b n"], share: float) -> Bool[Tensor, "b n"]:
    """Mask the ceil(n share) patches of each row that have the smallest random numbers.

    Args:
        order: random numbers, one for each patch.
        share: from 0 to 1.
    """
    count = math.ceil(order.shape[1] * share * (1 - 1e-12))  # 100 x 0.07 is 7.000000000000001 in floating point
    first = order.argsort(dim=1)[:, :count]  # (b, count)
    return torch.zeros_like(order, dtype=torch.bool).scatter(1, first, True)
