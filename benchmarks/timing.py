"""Medians of interleaved runs, so that a drifting machine hurts both sides alike."""

import statistics
import time
from collections.abc import Callable

import torch


def seconds(runs: dict[str, Callable[[], object]], rounds: int = 5, warm: int = 1) -> dict[str, float]:
    """Median seconds of each function, measured in turns.

    Args:
        runs: what is compared, by name.
        rounds: how often each is timed.
        warm: untimed calls before.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(-warm, rounds):
        for name, function in runs.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= 0:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def matmul(device: str, dtype: torch.dtype, size: int = 4096) -> tuple[Callable[[], object], int]:
    """A square matrix product, whose speed is the peak that training steps are held against, and its FLOPs."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return lambda: a @ b, 2 * size**3


def default_device() -> str:
    """The GPU when there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"
