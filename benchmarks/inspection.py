"""How long `latelier inspect` takes with its default list of measures, of a fixed tiny tokenizer at 64 px.

    python -m benchmarks.inspection                    # this checkout
    python -m benchmarks.inspection OTHER/bin/python   # and another checkout's, in turn, by its interpreter

Once on 100 of the emoji held out, and once on 500 images of a folder, which learn from 500 more. All inspect the same
tokenizer folder, each in a process of its own with an empty cache of features, so that imports count as they do for a
user. Seconds are of this machine as it is: let it do nothing else. CPU seconds suffer less from others.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from latelier.data.loader import ImageDataset
from latelier.data.sources import open_source
from latelier.images import make_grid, save_png
from latelier.recipe import Data
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.vmae import VMAE

SIZE, ROUNDS = 64, 2
FEW, MANY = 100, 500  # images
MODEL = {"dim": 64, "depth": 2, "heads": 4, "decoder_dim": 64, "decoder_depth": 2, "decoder_heads": 4}


def make_tokenizer(folder: Path) -> None:
    """A tokenizer of fixed random weights."""
    torch.manual_seed(0)
    Codec(VMAE(image_size=(SIZE, SIZE), **MODEL), torch.zeros(16), torch.ones(16)).save_pretrained(folder)


def make_images(folder: Path, count: int) -> None:
    """Emoji of the training split as files, in a folder for each class."""
    data = Data(source="emoji", image_size=SIZE, flip=False)
    images = ImageDataset(open_source(data, "train"), data)
    for batch in images.once(100, limit=count):
        for image, label, number in zip(batch["image"], batch["label"].tolist(), batch["index"].tolist()):
            save_png(make_grid(image[None], columns=1, padding=0), folder / f"{label:02d}" / f"{number:05d}.png")


def inspect_seconds(python: str, tokenizer: Path, images: str | Path, samples: int) -> tuple[float, float]:
    """Wall-clock and CPU seconds of one inspection by the latelier that an interpreter finds."""
    with tempfile.TemporaryDirectory() as folder:
        out, cache = Path(folder) / "inspection", Path(folder) / "cache"
        command = [python, "-m", "latelier", "inspect", str(tokenizer), "--data", str(images), "--size", str(SIZE)]
        command += ["--samples", str(samples), "--out", str(out)]
        begin, used = time.perf_counter(), _cpu_seconds()
        subprocess.run(
            command, check=True, cwd=folder, capture_output=True, env={**os.environ, "LATELIER_CACHE": str(cache)}
        )
        return time.perf_counter() - begin, _cpu_seconds() - used


def _cpu_seconds() -> float:
    """Of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(others: list[str] | None = None) -> list[tuple[str, float]]:
    """Seconds of each interpreter, the least of some rounds in turn, and how many times faster this checkout is."""
    interpreters, rows = [sys.executable, *(others or [])], []
    with tempfile.TemporaryDirectory() as folder:
        make_tokenizer(Path(folder) / "tokenizer")
        make_images(Path(folder) / "images", 2 * MANY)
        for images, samples in (("emoji", FEW), (Path(folder) / "images", MANY)):
            times: dict[str, list[tuple[float, float]]] = {python: [] for python in interpreters}
            for _ in range(ROUNDS):
                for python, measured in times.items():
                    measured.append(inspect_seconds(python, Path(folder) / "tokenizer", images, samples))
            for i, unit in enumerate(("seconds", "CPU seconds")):
                best = {python: min(pair[i] for pair in measured) for python, measured in times.items()}
                label = f"inspect, {samples} images of {SIZE} px, {unit}"
                rows += [(f"{label}, {python}", value) for python, value in best.items()]
                rows += [
                    (f"{label}, over {python}", best[python] / best[sys.executable]) for python in interpreters[1:]
                ]
    return rows


if __name__ == "__main__":
    for label, value in run(sys.argv[1:]):
        print(f"{label}: {value:.2f}")
