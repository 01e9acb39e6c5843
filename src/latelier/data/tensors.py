"""Images that are in memory already, as a dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from latelier.data.loader import ImageDataset
from latelier.data.reading import Job
from latelier.errors import LatelierError
from latelier.recipe import Data

IN_MEMORY = "images in memory"  # what recipes call their source


class TensorSource:
    """A tensor `(n, c, h, w)` as a sequence of records."""

    class_names: list[str] | None = None
    labels: list[int] | None = None

    def __init__(self, images: Tensor):
        self.images = images
        self.fingerprint = hashlib.sha256(images.numpy().tobytes()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Record `index`."""
        return {"image": ((self.images[index] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()}

    def name(self, index: int) -> str:
        """What to call the image in messages."""
        return f"image {index}"


class TensorImages(ImageDataset):
    """Images `(n, c, h, w)` in [-1, 1], which are given out as they are, without rounding to 8 bits."""

    def __init__(self, images: Tensor):
        if images.ndim != 4 or not len(images) or not images.is_floating_point():
            kind = str(images.dtype).removeprefix("torch.")
            raise LatelierError(f"images has shape {tuple(images.shape)} and {kind}; give floats (n, c, h, w).")
        images = images.detach().cpu().float().contiguous()
        low, high = images.min().item(), images.max().item()
        if not -1 <= low <= high <= 1:  # NaN, too
            raise LatelierError(f"images has values from {low:g} to {high:g}; give them in [-1, 1].")
        size = (images.shape[2], images.shape[3])
        data = Data(source=IN_MEMORY, image_size=size, channels=images.shape[1], flip=False)
        super().__init__(TensorSource(images), data)
        self.images = images

    def _run(self, jobs: Iterable[Job], *_: Any, **__: Any) -> Iterator[dict[str, Any]]:
        for job in jobs:
            yield {"image": self.images[job.index], "index": job.index, "sample_id": job.sample_ids}
