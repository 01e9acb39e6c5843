"""Evaluation on several processes, with the numbers of one.

Images are cut into the same batches whatever the number of processes W, and process p works on batches p, p + W, ...
What it makes of them (features, errors: some numbers for each image) goes to the main process, which counts batches
in their order. So sums are the very same as on one process, to the last bit, and only one process needs the memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def rank() -> tuple[int, int]:
    """This process's number and how many there are."""
    from accelerate import PartialState

    state = PartialState()
    return state.process_index, state.num_processes


def gather_in_order(results: Iterator[dict[str, Any]], shared: bool) -> Iterator[dict[str, Any]]:
    """The results of all processes in the order of batches, on the main process; nothing on the others.

    Args:
        results: dicts of tensors (dicts of them, too) of this process's batches: batches p, p + W, ... of the whole.
        shared: whether all processes take part, which must then all go through it to its end.
    """
    if not shared or rank()[1] == 1:
        yield from results
        return
    from accelerate.utils import gather_object

    while True:
        row = gather_object([_on_cpu(next(results, None))])  # one batch of each process, in order
        if all(batch is None for batch in row):
            return
        if rank()[0] == 0:
            yield from (batch for batch in row if batch is not None)


def agreed(value: T, shared: bool) -> T:
    """The main process's value, on all processes."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0] if shared and rank()[1] > 1 else value


def is_main(shared: bool) -> bool:
    """Whether this process counts, measures and writes."""
    return not shared or rank()[0] == 0


def _on_cpu(content: Any) -> Any:
    """Tensors where every process can read them."""
    if isinstance(content, dict):
        return {key: _on_cpu(value) for key, value in content.items()}
    return content.cpu() if isinstance(content, torch.Tensor) else content
