"""In which order an endless stream visits a finite set of images."""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Int
from torch import Tensor

from latelier.errors import LatelierError
from latelier.keyed_random import fold_in


def permuted_index(numbers: Int[Tensor, " b"], size: int, seed: int) -> Int[Tensor, " b"]:
    """Which image each draw of the stream shows.

    Draw n belongs to epoch `n // size`; every epoch shows every image once, in an order of its own.

    Args:
        numbers: `(b,)` numbers of the draws, 0, 1, 2, ...
        size: how many images there are.
        seed: the run's seed.
    """
    epochs = torch.div(numbers, size, rounding_mode="floor")
    index = torch.empty_like(numbers)
    for epoch in epochs.unique().tolist():
        inside = epochs == epoch
        index[inside] = _permutation(size, seed, epoch)[numbers[inside] - epoch * size]
    return index


def share(batch: int, process: int, processes: int, accumulation: int) -> list[range]:
    """Offsets within an optimiser step's `batch` draws of this process's micro-batches, one range each.

    Raises:
        LatelierError: if the batch cannot be split evenly.
    """
    size, rest = divmod(batch, processes * accumulation)
    if rest or not size:
        raise LatelierError(
            f"batch = {batch} cannot be split into {processes} processes x {accumulation} micro-batches; "
            f"use a multiple of {processes * accumulation}."
        )
    starts = [(micro * processes + process) * size for micro in range(accumulation)]
    return [range(start, start + size) for start in starts]


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(fold_in(seed, "order", epoch))
    return torch.randperm(size, generator=generator)
