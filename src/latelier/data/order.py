"""The training stream: which image each sample shows, whether it is mirrored, and which process takes it.

The stream is endless; its samples are numbered 0, 1, 2, ... (`sample_id`).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from latelier.errors import LatelierError
from latelier.keyed_random import fold_in


def permuted_index(sample_ids: Int[Tensor, " b"], size: int, seed: int) -> Int[Tensor, " b"]:
    """Which of `size` images each sample shows.

    Sample n belongs to epoch `n // size`; every epoch shows every image once, in its own order.
    """
    epochs = torch.div(sample_ids, size, rounding_mode="floor")
    index = torch.empty_like(sample_ids)
    for epoch in epochs.unique().tolist():
        inside = epochs == epoch
        index[inside] = _permutation(size, seed, epoch)[sample_ids[inside] - epoch * size]
    return index


def mirrored(sample_ids: Int[Tensor, " b"], seed: int) -> Bool[Tensor, " b"]:
    """Which samples are mirrored, each with probability 1/2; image stream and latent cache agree by this function."""
    return torch.tensor([bool(fold_in(seed, "flip", n) & 1) for n in sample_ids.tolist()], dtype=torch.bool)


def share(batch: int, process: int, processes: int, accumulation: int) -> list[range]:
    """This process's micro-batches as ranges of offsets within an optimiser step of `batch` samples.

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
    return torch.randperm(size, generator=torch.Generator().manual_seed(fold_in(seed, "order", epoch)))
