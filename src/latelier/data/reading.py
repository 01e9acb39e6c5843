"""Read records, decode them, and make batches: in worker processes, in order from a stream, or from memory."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import Dataset

from latelier.data.records import UNREADABLE, Source
from latelier.data.tables import StreamSource
from latelier.data.transforms import BOXES, PLANES, Transform, mirror
from latelier.errors import LatelierError
from latelier.terminal import images_bar

Failures = list[tuple[int, str]]  # index and reason of images that cannot be read
DECODING_THREADS = 4
CHUNK = 256  # images between two updates of the progress bar
PATIENCE = 5.0  # seconds before a progress bar is shown


class Job(NamedTuple):
    """One micro-batch to be made."""

    sample_ids: Tensor  # (b,) numbers in the training stream; in a single pass the same as `index`
    index: Tensor  # (b,) which images
    training: bool  # crop at random, and replace unreadable images instead of leaving them out
    flipped: list[bool]  # which are mirrored
    whole: bool = False  # an image that cannot be read is an error


class Reader(Dataset):
    """A source whose items are the batches of jobs, with the `failures`; `tries` unreadable images in a row end one."""

    def __init__(self, source: Source, transform: Transform, tries: int):
        self.source, self.transform, self.tries = source, transform, tries

    def __getitem__(self, job: Job) -> dict[str, Any]:
        size, tries = len(self.source), min(self.tries, len(self.source)) if job.training else 1
        candidates = [[(index + k) % size for k in range(tries)] for index in job.index.tolist()]
        return _assemble(job, candidates, self.source.__getitem__, self.transform, self.source.name, map)


class RowReader:
    """Batches of a dataset that is read in order; see `ImageDataset`."""

    def __init__(self, source: StreamSource, transform: Transform):
        self.source, self.transform = source, transform

    def stream(self, batch: int, start: int, parts: list[range]) -> Iterator[dict[str, Any]]:
        """Without end; a row that cannot be read is replaced by the next readable one of its step."""
        rows = self._endless()
        next(itertools.islice(rows, start, start), None)  # skip
        while True:
            step = list(itertools.islice(rows, batch))
            for part in parts:
                sample_ids = torch.arange(start + part.start, start + part.stop)
                job = Job(sample_ids, sample_ids, True, self.transform.flipped(sample_ids))
                yield self._batch(job, [step[offset:] + step[:offset] for offset in part])
            start += batch

    def once(self, batch: int, process: int, processes: int, flip: bool, limit: int | None) -> Iterator[dict[str, Any]]:
        mine = itertools.islice(self.source.rows(), process, limit, processes)
        while rows := list(itertools.islice(mine, batch)):
            index = torch.tensor([number for number, _ in rows])
            yield self._batch(Job(index, index, False, [flip] * len(rows)), [[row] for row in rows])

    def _endless(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for epoch in itertools.count():
            empty = True
            for row in self.source.rows(epoch, self.transform.seed):
                yield row
                empty = False
            if empty:
                raise LatelierError(f"{self.source.name(0)} is not there: the dataset has no rows to stream.")

    def _batch(self, job: Job, candidates: list[list[tuple[int, dict[str, Any]]]]) -> dict[str, Any]:
        """One micro-batch; of each slot's candidates, the first that can be read."""
        rows = {index: row for slot in candidates for index, row in slot}
        numbers, opened = [[index for index, _ in slot] for slot in candidates], lambda i: self.source.record(rows[i])
        with ThreadPoolExecutor(DECODING_THREADS) as pool:
            return _assemble(job, numbers, opened, self.transform, self.source.name, pool.map)


class Memory:
    """Pixels and records of a whole source, decoded once, with the deterministic crop; `failures` cannot be read."""

    def __init__(self, source: Source, transform: Transform, progress: bool = True):
        self.source, self.transform = source, transform
        size = len(source)
        self._pixels = torch.zeros(size, transform.deep, transform.height, transform.width, dtype=torch.uint8)
        self._rows: list[dict[str, Any] | None] = []
        self.failures: Failures = []
        bar = images_bar("decoding", size, progress, PATIENCE)
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool, bar as advance:
            for row in pool.map(self._read, range(size)):
                self._rows.append(row)
                if len(self._rows) % CHUNK == 0:
                    advance(CHUNK)
        self.failures.sort()
        self._readable = torch.tensor([row is not None for row in self._rows])
        index = torch.arange(2 * size)
        index[~self._readable.repeat(2)] = 2 * size
        following = index.flip(0).cummin(0).values.flip(0)  # (2 n,)
        self._next = following[:size] % size  # of each index the next one, itself included, that is readable

    def batch(self, job: Job) -> dict[str, Any] | None:
        """The batch of a job; None if none of its images can be read."""
        if job.training:
            index, slots = self._next[job.index], list(range(len(job.index)))
        else:
            slots = self._readable[job.index].nonzero()[:, 0].tolist()
            index = job.index[slots]
        if job.whole and len(slots) < len(job.index):
            lost = int(job.index[~self._readable[job.index]][0])
            raise _lost(self.source.name(lost), dict(self.failures)[lost])
        if not slots:
            return None
        rows = [row for i in index.tolist() if (row := self._rows[i]) is not None]
        return _finish(self._pixels[index], rows, slots, job, self.transform)

    def _read(self, index: int) -> dict[str, Any] | None:
        try:
            row = self.transform.record(self.source[index])
        except UNREADABLE as error:
            self.failures.append((index, reason(error)))
            return None
        self._pixels[index] = row.pop("image")
        return {**row, "index": index}


def _assemble(
    job: Job, candidates: list[list[int]], opened: Callable[[int], dict[str, Any]], transform: Transform,
    name: Callable[[int], str], over: Callable[..., Iterable[Any]],
) -> dict[str, Any]:  # fmt: skip
    """A job's batch with its `failures`, or its `error`.

    Of each row's candidates the first that can be read is taken. `opened` gives the record of an index, `name` what to
    call it, and `over` is `map`, or that of a pool.
    """

    def first(indices: list[int], sample_id: int | None) -> tuple[dict[str, Any] | None, Failures]:
        failures: Failures = []
        for index in indices:
            try:
                return {**transform.record(opened(index), sample_id), "index": index}, failures
            except UNREADABLE as error:
                if job.whole:
                    raise _lost(name(index), reason(error)) from None
                failures.append((index, reason(error)))
        return None, failures

    try:
        found = list(over(first, candidates, job.sample_ids.tolist() if job.training else [None] * len(candidates)))
        slots = [slot for slot, (row, _) in enumerate(found) if row is not None]
        rows = [row for row, _ in found if row is not None]
        batch: dict[str, Any] = {"failures": [failure for _, failed in found for failure in failed]}
        if rows:
            batch |= _finish(torch.stack([row["image"] for row in rows]), rows, slots, job, transform)
        return batch
    except LatelierError as error:  # a worker's exception would arrive with its traceback as its message
        return {"error": str(error)}


def _finish(
    pixels: UInt8[Tensor, "b d h w"], rows: list[dict[str, Any]], slots: list[int], job: Job, transform: Transform
) -> dict[str, Any]:
    """The batch: `image`, in training `sample_id`, and all else that the records hold."""
    flipped, sample_ids = [job.flipped[slot] for slot in slots], job.sample_ids[slots]
    batch: dict[str, Any] = {"image": transform.finish(pixels, flipped, sample_ids)}  # (b, c, h, w)
    if job.training:
        batch["sample_id"] = sample_ids
    rows = [mirror(row) if flip else row for row, flip in zip(rows, flipped)]
    batch |= {key: torch.tensor([row[key] for row in rows]) for key in ("index", "label") if key in rows[0]}
    batch |= {key: [row[key] for row in rows] for key in ("caption", *BOXES) if key in rows[0]}
    batch |= {key: torch.stack([row[key] for row in rows]) for key in PLANES if key in rows[0]}
    if "map" in rows[0]:
        maps = [row["map"] for row in rows]  # 8 bits (uint8) or 16 bits (int32)
        depths = sorted(set(map(len, maps)))
        if len(depths) > 1:
            few, many = depths[0], depths[-1]
            raise LatelierError(f"data.maps: some maps have {few} channels, others {many}; make them alike.")
        batch["map"] = torch.stack([m.float() / (127.5 if m.dtype == torch.uint8 else 32767.5) - 1 for m in maps])
    return batch


class Ragged(NamedTuple):
    """Tensors of different lengths as one (`pack`), so that a worker hands over one piece of shared memory."""

    values: Tensor
    lengths: list[int]


def pack(batch: dict[str, Any]) -> dict[str, Any]:
    ragged = {key: Ragged(torch.cat(batch[key]), list(map(len, batch[key]))) for key in BOXES if key in batch}
    return {**batch, **ragged}


def unpack(batch: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v.values.split(v.lengths)) if isinstance(v, Ragged) else v for k, v in batch.items()}


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _lost(name: str, why: str) -> LatelierError:
    return LatelierError(
        f"{name} could be read when the latents were made and now it cannot ({why}); put it back or encode again."
    )
