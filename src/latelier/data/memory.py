"""All images of a source, decoded once and kept as 8-bit pixels."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from latelier.data.reading import Failures, Job, columns, finish, missing_image, reason
from latelier.data.sources import Source
from latelier.data.transforms import UNREADABLE, Transform
from latelier.errors import LatelierError

CHUNK = 1024
PATIENCE = 5.0  # seconds before a progress bar is shown


class Memory:
    """Pixels and records of a whole source, with the deterministic crop.

    Args:
        source: the records.
        transform: what is done to them.
        progress: show a bar if it takes long.

    Attributes:
        failures: index and reason of images that cannot be read.
    """

    def __init__(self, source: Source, transform: Transform, progress: bool = True):
        self.source, self.transform = source, transform
        size = len(source)
        self._pixels = torch.zeros(size, transform.deep, transform.height, transform.width, dtype=torch.uint8)
        self._rows: list[dict[str, Any] | None] = []
        self.failures: Failures = []
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for start in _with_bar(range(0, size, CHUNK), size, progress):
                self._rows += pool.map(self._read, range(start, min(size, start + CHUNK)))
        self.failures.sort()
        self._readable = torch.tensor([row is not None for row in self._rows])
        self._next = _next_readable(self._readable)

    def batch(self, job: Job) -> dict[str, Any] | None:
        """The batch of a job; None if none of its images can be read.

        Raises:
            LatelierError: if the job is to be done as a whole and an image cannot be read.
        """
        if job.training:
            index, places = self._next[job.index], list(range(len(job.index)))
        else:
            places = self._readable[job.index].nonzero()[:, 0].tolist()
            index = job.index[places]
        if job.whole and len(places) < len(job.index):
            lost = int(job.index[~self._readable[job.index]][0])
            raise LatelierError(missing_image(self.source.name(lost), dict(self.failures)[lost]))
        if not places:
            return None
        rows = [row for i in index.tolist() if (row := self._rows[i]) is not None]
        flipped = [job.flipped[place] for place in places]
        return {**finish(self._pixels[index], places, job, self.transform), **columns(rows, flipped)}

    def _read(self, index: int) -> dict[str, Any] | None:
        try:
            row = self.transform.record(self.source[index])
        except UNREADABLE as error:
            self.failures.append((index, reason(error)))
            return None
        self._pixels[index] = row.pop("image")
        return {**row, "index": index}


def _next_readable(readable: torch.Tensor) -> torch.Tensor:
    """For each index the next one, itself included, that is readable, going round at the end."""
    size = len(readable)
    if not readable.any():
        raise LatelierError(f"None of the {size} images can be read; check data.source.")
    index = torch.arange(2 * size)
    index[~readable.repeat(2)] = 2 * size
    following = index.flip(0).cummin(0).values.flip(0)  # (2 n,)
    return following[:size] % size


def _with_bar(starts: Iterable[int], total: int, progress: bool) -> Iterator[int]:
    """The same numbers, with a progress bar once it takes longer than a moment."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    begin = time.perf_counter()
    bar = Progress(
        TextColumn("Decoding images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), transient=True
    )
    task = bar.add_task("", total=total)
    try:
        for start in starts:
            bar.update(task, completed=start)
            if progress and not bar.live.is_started and time.perf_counter() - begin > PATIENCE:
                bar.start()
            yield start
    finally:
        if bar.live.is_started:
            bar.stop()
