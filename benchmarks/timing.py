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


def matmul_peak(device: str, dtype: torch.dtype, size: int = 4096, rounds: int = 5) -> float:
    """FLOP/s of a square matrix product: the peak that training steps are held against."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds({"matmul": lambda: a @ b}, rounds)["matmul"]


def default_device() -> str:
    """The GPU when there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"
