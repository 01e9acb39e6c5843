"""What worker processes do: read records, decode them, and make batches of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from latelier.data.sources import Source
from latelier.data.tables import StreamSource
from latelier.data.transforms import BOXES, PLANAR, UNREADABLE, Transform, mirror
from latelier.errors import LatelierError

Failures = list[tuple[int, str]]  # index and reason of images that cannot be read
DECODING_THREADS = 4


class Job(NamedTuple):
    """One micro-batch to be made.

    Attributes:
        numbers: `(b,)` draws of the training stream; in a single pass the same as `index`.
        index: `(b,)` which images.
        training: draw crops at random, and replace unreadable images instead of leaving them out.
        flipped: which are mirrored.
        whole: nothing may be left out: an image that cannot be read is an error.
    """

    numbers: Tensor
    index: Tensor
    training: bool
    flipped: list[bool]
    whole: bool = False


class Reader(Dataset):
    """A source whose items are the batches of jobs; a batch also says which images could not be read (`failures`).

    Args:
        source: the records.
        transform: what is done to them.
        tries: how many images in a row may be unreadable before the search for a replacement is given up.
    """

    def __init__(self, source: Source, transform: Transform, tries: int):
        self.source, self.transform, self.tries = source, transform, tries

    def __getitem__(self, job: Job) -> dict[str, Any]:
        rows, places, failures = [], [], []
        try:
            for place, (number, index) in enumerate(zip(job.numbers.tolist(), job.index.tolist())):
                tries = min(self.tries, len(self.source)) if job.training else 1
                for candidate in ((index + k) % len(self.source) for k in range(tries)):
                    try:
                        record = self.source[candidate]
                        row = self.transform.record(record, number if job.training else None)
                    except UNREADABLE as error:
                        if job.whole:
                            raise LatelierError(missing_image(self.source.name(candidate), reason(error))) from None
                        failures.append((candidate, reason(error)))
                        continue
                    rows.append({**row, "index": candidate})
                    places.append(place)
                    break
            return {**assemble(rows, places, job, self.transform), "failures": failures}
        except LatelierError as error:  # a worker's exception would arrive with its traceback as its message
            return {"error": str(error)}


class RowReader:
    """Batches of a dataset that is read in order.

    Args:
        source: its rows.
        transform: what is done to them.
    """

    def __init__(self, source: StreamSource, transform: Transform):
        self.source, self.transform = source, transform

    def stream(self, batch: int, start: int, parts: list[range]) -> Iterator[dict[str, Any]]:
        """See `ImageDataset.stream`; a row that cannot be read is replaced by the next readable one of its step."""
        rows = self._endless()
        next(itertools.islice(rows, start, start), None)  # skip
        while True:
            step = list(itertools.islice(rows, batch))
            for part in parts:
                draws = torch.arange(start + part.start, start + part.stop)
                job = Job(draws, draws, True, self.transform.flipped(draws))
                yield self._batch(job, [step[offset:] + step[:offset] for offset in part])
            start += batch

    def once(self, batch: int, process: int, processes: int, flip: bool, limit: int | None) -> Iterator[dict[str, Any]]:
        """See `ImageDataset.once`."""
        mine = itertools.islice(self.source.rows(), process, limit, processes)
        while rows := list(itertools.islice(mine, batch)):
            index = torch.tensor([number for number, _ in rows])
            yield self._batch(Job(index, index, False, [flip] * len(rows)), [[row] for row in rows])

    def _endless(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Epoch after epoch."""
        for epoch in itertools.count():
            empty = True
            for row in self.source.rows(epoch, self.transform.seed):
                yield row
                empty = False
            if empty:
                raise LatelierError(f"{self.source.name(0)} is not there: the dataset has no rows to stream.")

    def _batch(self, job: Job, candidates: list[list[tuple[int, dict[str, Any]]]]) -> dict[str, Any]:
        """One micro-batch; of each place's candidates, the first that can be read."""
        try:
            with ThreadPoolExecutor(DECODING_THREADS) as pool:
                found = list(pool.map(self._first, candidates, job.numbers.tolist(), [job.training] * len(candidates)))
            failures = [failure for _, failed in found for failure in failed]
            places = [place for place, (row, _) in enumerate(found) if row is not None]
            rows = [row for row, _ in found if row is not None]
            return {**assemble(rows, places, job, self.transform), "failures": failures}
        except LatelierError as error:
            return {"error": str(error)}

    def _first(
        self, candidates: list[tuple[int, dict[str, Any]]], number: int, training: bool
    ) -> tuple[dict[str, Any] | None, Failures]:
        failures: Failures = []
        for index, row in candidates:
            try:
                record = self.transform.record(self.source.record(row), number if training else None)
                return {**record, "index": index}, failures
            except UNREADABLE as error:
                failures.append((index, reason(error)))
        return None, failures


def assemble(rows: list[dict[str, Any]], places: list[int], job: Job, transform: Transform) -> dict[str, Any]:
    """A batch of records that `Transform.record` made; empty if there are none.

    Args:
        rows: the records, with their `index`.
        places: the job's row of each.
        job: which draws they are and which are mirrored.
        transform: finishes the images.
    """
    if not rows:
        return {}
    pixels = torch.stack([row["image"] for row in rows])  # (b, d, h, w)
    return {**finish(pixels, places, job, transform), **columns(rows, [job.flipped[place] for place in places])}


def finish(pixels: UInt8[Tensor, "b d h w"], places: list[int], job: Job, transform: Transform) -> dict[str, Any]:
    """`image`, and in training `draw`, of a batch."""
    numbers = job.numbers[places]
    image = transform.finish(pixels, [job.flipped[place] for place in places], numbers)  # (b, c, h, w)
    return {"image": image, "sample_id": numbers} if job.training else {"image": image}


def columns(rows: list[dict[str, Any]], flipped: list[bool]) -> dict[str, Any]:
    """Everything in a batch but its images."""
    rows = [mirror(row) if flip else row for row, flip in zip(rows, flipped)]
    batch: dict[str, Any] = {"index": torch.tensor([row["index"] for row in rows])}
    if "label" in rows[0]:
        batch["label"] = torch.tensor([row["label"] for row in rows])
    for key in ("caption", *BOXES):
        if key in rows[0]:
            batch[key] = [row[key] for row in rows]
    for key in PLANAR:
        if key in rows[0]:
            batch[key] = torch.stack([row[key] for row in rows])
    if "map" in rows[0]:
        batch["map"] = _stack_maps([row["map"] for row in rows])  # (b, c, h, w)
    return batch


def _stack_maps(maps: list[Tensor]) -> Float[Tensor, "b c h w"]:
    """Maps of 8 bits (uint8) and 16 bits (int32), to [-1, 1].

    Raises:
        LatelierError: if they do not have the same number of channels.
    """
    depths = sorted({len(m) for m in maps})
    if len(depths) > 1:
        raise LatelierError(f"data.maps: some maps have {depths[0]} channels, others {depths[-1]}; make them alike.")
    return torch.stack([m.float() / (127.5 if m.dtype == torch.uint8 else 32767.5) - 1 for m in maps])


class Ragged(NamedTuple):
    """Tensors of different lengths as one, so that a worker process hands over one piece of shared memory."""

    values: Tensor
    lengths: list[int]


def pack(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch whose lists of tensors are `Ragged`."""
    packed = dict(batch)
    for key in BOXES:
        if key in batch:
            packed[key] = Ragged(torch.cat(batch[key]), [len(values) for values in batch[key]])
    return packed


def unpack(batch: dict[str, Any]) -> dict[str, Any]:
    """What was packed."""
    return {k: list(v.values.split(v.lengths)) if isinstance(v, Ragged) else v for k, v in batch.items()}


def missing_image(name: str, why: str) -> str:
    """What to say of an image that was there when latents were made of it."""
    return f"{name} could be read when the latents were made and now it cannot ({why}); put it back or encode again."


def reason(error: BaseException) -> str:
    """Why an image cannot be read, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
