"""Batches of images: an endless training stream, numbered by images seen, and single passes.

A batch depends on `(seed, sample_id)` alone. Decoded images are kept in memory where they fit; otherwise worker
processes decode them again each time. Both give the same images.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from latelier.data.reading import Failures, Job, Memory, Reader, RowReader, pack, unpack
from latelier.data.records import Source, digest, permuted_index, share
from latelier.data.sources import captions_of
from latelier.data.tables import StreamSource
from latelier.data.transforms import Transform
from latelier.errors import LatelierError
from latelier.recipe import Data
from latelier.terminal import blocked

MEMORY_LIMIT = 1_000_000_000  # bytes of pixels
NAMED_IN_ERRORS = 3
WORTH_LEAVING = 2048  # a pass that leaves out more images than this does not decode the whole source first


class ImageDataset:
    """Images of a source as tensors in [-1, 1]; `latelier.data.records.Batch` tells what batches hold.

    Args:
        source: from `latelier.data.sources.open_source`.
        skip_log: unreadable images are appended to this file, one JSON object `{index, name, reason}` each.

    Attributes:
        class_names, box_names, segmentation_classes: of the source; None where it has none or does not know them.
        fingerprint: changes when evaluation would see other images.
        shape: `(c, h, w)`.
        flips_latents: whether a latent cache should hold mirror images too: it stores one caption per image, so not
            where the mirror image has another caption (scenes: left and right). The image stream swaps the captions.
    """

    def __init__(self, source: Source | StreamSource, data: Data, seed: int = 0, skip_log: Path | None = None):
        self.source, self.data, self.seed, self.skip_log = source, data, seed, skip_log
        self.transform = Transform(
            data.image_size, data.channels, data.crop, data.crop_scale, data.flip, data.background, seed
        )
        self.shape: tuple[int, int, int] = (data.channels, *data.image_size)
        self.class_names: list[str] | None = source.class_names
        self.box_names: list[str] | None = getattr(source, "box_names", None)
        self.segmentation_classes: int | None = getattr(source, "segmentation_classes", None)
        self.flips_latents: bool = data.flip and not getattr(source, "mirrored_captions", False)
        self.fingerprint: str = digest(source.fingerprint, self.transform.fingerprint)
        possible = data.crop != "random" and not isinstance(source, StreamSource)
        if data.in_memory and not possible:
            raise LatelierError("data.in_memory = true needs data.crop other than random and data.streaming = false.")
        fits = possible and len(source) * self.transform.deep * self.shape[1] * self.shape[2] < MEMORY_LIMIT
        self.in_memory = fits if data.in_memory is None else data.in_memory  # whether decoded images are kept
        self._memory: Memory | None = None
        self._failed: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.source)

    def stream(
        self, batch: int, start: int = 0, process: int = 0, processes: int = 1, accumulation: int = 1
    ) -> Iterator[dict[str, Any]]:
        """Training micro-batches without end; every epoch has its own order.

        An image that cannot be read is replaced by the next one of the source that can; more than `max_skipped` of
        them are an error.

        Args:
            batch: images per optimiser step over all processes, of which `process` gets its share.
            start: images seen so far.
            accumulation: micro-batches per optimiser step.
        """
        parts = share(batch, process, processes, accumulation)
        if isinstance(self.source, StreamSource):
            rows = _Rows(RowReader(self.source, self.transform).stream, batch, start, parts)
            yield from self._load(rows, processes)
        else:
            yield from self._run(self._jobs(batch, start, parts), process, processes)

    def once(
        self, batch: int, process: int = 0, processes: int = 1, flip: bool = False, limit: int | None = None,
        whole: bool = False,
    ) -> Iterator[dict[str, Any]]:  # fmt: skip
        """One pass in the source's order, with the deterministic crop; unreadable images are left out.

        Args:
            batch: images per batch; the last one may have fewer.
            process, processes: every `processes`-th image, from the `process`-th on, is this process's.
            flip: give mirror images.
            limit: at most this many images, spread evenly over the source (streamed: the first).
            whole: share batches rather than images, so that they are the same for any number of processes.
        """
        if isinstance(self.source, StreamSource):
            part = (0, 1) if whole else (process, processes)
            rows = _Rows(RowReader(self.source, self.transform).once, batch, *part, flip, limit)
            batches = self._load(rows, processes)
            yield from islice(batches, process, None, processes) if whole else batches
            return
        count = len(self) if limit is None else min(limit, len(self))
        index = torch.arange(count) * len(self) // max(count, 1)
        parts = index.split(batch)[process::processes] if whole else index[process::processes].split(batch)
        jobs = [Job(part, part, False, [flip] * len(part)) for part in parts if len(part)]
        few = self._memory is None and len(self) - count > WORTH_LEAVING  # decoding all of them would take longer
        yield from self._run(jobs, process, processes, len(jobs), self.in_memory and not few)

    def follow(
        self, plan: Iterable[tuple[Tensor, list[bool]]], process: int = 0, processes: int = 1, whole: bool = True
    ) -> Iterator[dict[str, Any]]:
        """Images in a given order, with the crop of `once`: those that cached latents were made from.

        `plan` tells for each batch which images `(b,)` int64 and which of them are mirrored; it may have no end. An
        image that cannot be read any more is an error, or else (`whole=False`) left out.
        """
        if isinstance(self.source, StreamSource):
            raise LatelierError(
                "data.streaming = true: streamed images cannot be looked up by number, so cached latents cannot be "
                "given their boxes, maps or images; set denoiser.cache=false."
            )
        jobs = (Job(index, index, False, list(flipped), whole) for index, flipped in plan)
        yield from self._run(jobs, process, processes)

    def captions(self) -> Iterator[str]:
        """One pass over the captions, without decoding images; nothing if there are none.

        Images without one, where others have one, are an error, unless `data.empty_captions` allows them.
        """
        lacking: list[int] = [] if self.data.empty_captions else getattr(self.source, "uncaptioned", [])
        if lacking:
            raise LatelierError(
                f"{len(lacking):,} of {len(self):,} images have no caption, the first {self.source.name(lacking[0])}; "
                "write them (an empty text file is a caption), or set data.empty_captions=true."
            )
        if isinstance(self.source, StreamSource):
            yield from self.source.captions()
        else:
            yield from captions_of(self.source, range(len(self)))

    def _jobs(self, batch: int, start: int, parts: list[range]) -> Iterator[Job]:
        while True:
            for part in parts:
                sample_ids = torch.arange(start + part.start, start + part.stop)  # (b,)
                index = permuted_index(sample_ids, len(self), self.seed)
                yield Job(sample_ids, index, True, self.transform.flipped(sample_ids))
            start += batch

    def _run(
        self, jobs: Iterable[Job], process: int, processes: int, most_workers: int | None = None,
        in_memory: bool | None = None,
    ) -> Iterator[dict[str, Any]]:  # fmt: skip
        """The batches of jobs, from memory or from worker processes."""
        assert not isinstance(self.source, StreamSource)
        if not (self.in_memory if in_memory is None else in_memory):
            reader = Reader(self.source, self.transform, tries=self._allowed() + 1)
            yield from self._load(reader, processes, jobs, most_workers)
            return
        if self._memory is None:
            memory = Memory(self.source, self.transform, progress=process == 0)
            self._note(memory.failures, log=process == 0)
            self._memory = memory
        yield from (batch for job in jobs if (batch := self._memory.batch(job)) is not None)

    def _load(
        self, dataset: Dataset, processes: int, jobs: Iterable[Job] | None = None, most_workers: int | None = None
    ) -> Iterator[dict[str, Any]]:
        """Batches that worker processes prepare ahead; unreadable images are noted here."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = max(1, min(16, cores // processes)) if self.data.workers is None else self.data.workers
        most_workers = 1 if isinstance(dataset, IterableDataset) else most_workers
        workers = workers if most_workers is None else min(workers, most_workers)
        loader = DataLoader(
            dataset, sampler=jobs, batch_size=None, num_workers=workers, collate_fn=pack,
            persistent_workers=workers > 0, pin_memory=torch.cuda.is_available(),
        )  # fmt: skip
        with blocked():
            batches = iter(loader)
        for batch in batches:
            if "error" in batch:
                raise LatelierError(batch["error"])
            self._note(batch.pop("failures"), log=True)
            if "image" in batch:
                yield unpack(batch)

    def _allowed(self) -> int:
        return math.ceil(self.data.max_skipped * len(self))

    def _note(self, failures: Failures, log: bool) -> None:
        """Remember images that could not be read, write them down, and give up if they are too many."""
        new = {index: reason for index, reason in failures if index not in self._failed}
        if not new:
            return
        self._failed.update(new)
        if log and (path := self.skip_log) is not None:  # lines for images that the file does not name yet
            path.parent.mkdir(parents=True, exist_ok=True)
            known = {json.loads(line)["name"] for line in path.read_text().splitlines()} if path.is_file() else set()
            entries = [{"index": i, "name": self.source.name(i), "reason": reason} for i, reason in new.items()]
            with path.open("a") as file:
                file.writelines(json.dumps(entry) + "\n" for entry in entries if entry["name"] not in known)
        if len(self._failed) > self._allowed() or len(self._failed) == len(self):
            first = [f"{self.source.name(i)} ({reason})" for i, reason in list(self._failed.items())[:NAMED_IN_ERRORS]]
            raise LatelierError(
                f"{len(self._failed)} of {len(self)} images cannot be read, more than data.max_skipped = "
                f"{self.data.max_skipped:g} allows; the first: {'; '.join(first)}."
            )


class _Rows(IterableDataset):
    """Batches of a dataset that is read in order, in one worker."""

    def __init__(self, batches: Callable[..., Iterator[dict[str, Any]]], *arguments: Any):
        self.batches, self.arguments = batches, arguments

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            yield from self.batches(*self.arguments)
        except LatelierError as error:  # as in `latelier.data.reading`
            yield {"error": str(error)}
