"""How long `latelier inspect` takes with its default list of measures, of a fixed tiny tokenizer and the emoji data.

    python -m benchmarks.inspection                    # this checkout
    python -m benchmarks.inspection OTHER/bin/python   # and another checkout's, in turn, by its interpreter

Both inspect the same tokenizer folder, each in a process of its own with an empty cache of features, so that imports
count as they do for a user. Times are of this machine as it is: let it do nothing else.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from latelier.tokenizers.codec import Codec
from latelier.tokenizers.vmae import VMAE

SIZE, SAMPLES, ROUNDS = 64, 100, 2
MODEL = {"dim": 64, "depth": 2, "heads": 4, "decoder_dim": 64, "decoder_depth": 2, "decoder_heads": 4}


def make_tokenizer(folder: Path) -> None:
    """A tokenizer of fixed random weights."""
    torch.manual_seed(0)
    Codec(VMAE(image_size=(SIZE, SIZE), **MODEL), torch.zeros(16), torch.ones(16)).save_pretrained(folder)


def inspect_seconds(python: str, tokenizer: Path, samples: int = SAMPLES) -> float:
    """Wall-clock seconds of one inspection by the latelier that an interpreter finds."""
    with tempfile.TemporaryDirectory() as folder:
        out, cache = Path(folder) / "inspection", Path(folder) / "cache"
        command = [python, "-m", "latelier", "inspect", str(tokenizer), "--data", "emoji", "--size", str(SIZE)]
        command += ["--samples", str(samples), "--out", str(out)]
        begin = time.perf_counter()
        subprocess.run(
            command, check=True, cwd=folder, capture_output=True, env={**os.environ, "LATELIER_CACHE": str(cache)}
        )
        return time.perf_counter() - begin


def run(others: list[str] | None = None) -> list[tuple[str, float]]:
    """Seconds of each interpreter, the least of some rounds in turn, and how many times faster this checkout is."""
    interpreters = [sys.executable, *(others or [])]
    times: dict[str, list[float]] = {python: [] for python in interpreters}
    with tempfile.TemporaryDirectory() as folder:
        make_tokenizer(Path(folder))
        for _ in range(ROUNDS):
            for python, measured in times.items():
                measured.append(inspect_seconds(python, Path(folder)))
    best = {python: min(measured) for python, measured in times.items()}
    rows = [(f"inspect, {SAMPLES} images of {SIZE} px, seconds, {python}", best[python]) for python in interpreters]
    mine = best[sys.executable]
    return rows + [(f"faster than {python}", best[python] / mine) for python in interpreters[1:]]


if __name__ == "__main__":
    for label, value in run(sys.argv[1:]):
        print(f"{label}: {value:.2f}")
