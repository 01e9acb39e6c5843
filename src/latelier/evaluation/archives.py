"""`.npz` files of images and of feature statistics, in the form of the ADM evaluator (guided-diffusion).

    samples      `arr_0` uint8 (n, h, w, 3), perhaps `arr_1` int64 labels (n,)
    reference    `mu` (2048,), `sigma` (2048, 2048), `mu_s` (2023,), `sigma_s` (2023, 2023) of all training images, in
                 FID's Inception; perhaps `arr_0`, some of the images, for precision and recall

50,000 images of 256 pixels are 9.8 GB, so they are read and written batch by batch.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.lib import format as npy
from torch import Tensor

from latelier.errors import LatelierError, reading
from latelier.publish import replaced

IMAGES, LABELS = "arr_0", "arr_1"
SIZES = {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}
ADVICE = "give an .npz with arr_0, uint8 of shape (n, h, w, 3), as numpy.savez writes it"


class Archive:
    """An `.npz` file, nothing of which is unpickled.

    Attributes:
        shape: `(n, h, w, 3)` of its images, or None.
        statistics: the four arrays of a reference, as far as they are there, float64.

    Raises:
        LatelierError: if it is no such file, or holds neither images nor statistics.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with reading(f"{path} cannot be read as .npz", ADVICE), zipfile.ZipFile(path) as file:
            names = {name.removesuffix(".npy") for name in file.namelist()}
            self.shape: tuple[int, ...] | None = None
            if IMAGES in names:
                with file.open(f"{IMAGES}.npy") as member:
                    self.shape, order, dtype = _header(member)
                if dtype != np.uint8 or order or len(self.shape) != 4 or self.shape[3] != 3:
                    raise LatelierError(f"arr_0 is {dtype} of shape {self.shape}{' in Fortran order' * order}")
            self.statistics = {key: self._statistic(key) for key in SIZES if key in names}
        if self.shape is None and not {"mu", "sigma"} <= self.statistics.keys():
            raise LatelierError(f"{path} has neither arr_0 nor mu and sigma, but {', '.join(sorted(names))}; {ADVICE}.")

    def _statistic(self, key: str) -> Tensor:
        with np.load(self.path, allow_pickle=False) as arrays:
            values = np.asarray(arrays[key], dtype=np.float64)
        if values.shape != SIZES[key] or not np.isfinite(values).all():
            raise LatelierError(f"{key} has shape {values.shape}, not {SIZES[key]}, or numbers that are not finite")
        if values.ndim == 2 and not np.allclose(values, values.T, rtol=1e-4, atol=1e-6):
            raise LatelierError(f"{key} is not symmetric")
        return torch.from_numpy(values)

    def batches(self, size: int) -> Iterator[UInt8[Tensor, "b h w 3"]]:
        """The images in their order."""
        assert self.shape is not None
        n, *shape = self.shape
        bytes_each = int(np.prod(shape))
        damaged = reading(f"{self.path} is damaged", "write it again")
        with damaged, zipfile.ZipFile(self.path) as file, file.open(f"{IMAGES}.npy") as member:
            _header(member)
            for start in range(0, n, size):
                count = min(size, n - start)
                content = _exactly(member, count * bytes_each)
                yield torch.from_numpy(np.frombuffer(content, np.uint8).reshape(count, *shape).copy())


@contextmanager
def write_images(path: str | Path, labels: Any = None) -> Iterator[Callable[[UInt8[Tensor, "b h w 3"]], None]]:
    """Write images of one size to `arr_0`, labels `(n,)` to `arr_1`: call what this yields with each batch.

    The file appears whole, or not at all. The number of images stands in front of them, so they wait in a plain file.
    """
    path = Path(path)
    shapes: list[tuple[int, ...]] = []
    with replaced(path) as temporary:
        pixels = temporary.with_name(f"{temporary.name}.pixels")
        try:
            with pixels.open("wb") as file:

                def add(batch: UInt8[Tensor, "b h w 3"]) -> None:
                    shapes.append(tuple(batch.shape))
                    file.write(batch.cpu().contiguous().numpy().tobytes())

                yield add
            if not shapes:
                raise LatelierError(f"There are no images to write to {path}.")
            _pack(temporary, pixels, (sum(shape[0] for shape in shapes), *shapes[0][1:]), labels)
        finally:
            pixels.unlink(missing_ok=True)


def _pack(path: Path, pixels: Path, shape: tuple[int, ...], labels: Any) -> None:
    """The archive of levels that lie in a plain file."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(f"{IMAGES}.npy", "w", force_zip64=True) as member, pixels.open("rb") as file:
            npy.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": shape})
            while block := file.read(2**24):
                member.write(block)
        if labels is not None:
            with archive.open(f"{LABELS}.npy", "w") as member:
                npy.write_array(member, np.asarray(labels, dtype=np.int64), allow_pickle=False)


def _header(member: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = npy.read_magic(member)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read is None:
        raise LatelierError(f"its arrays have the format {version}")
    return read(member)


def _exactly(member: Any, count: int) -> bytes:
    content = member.read(count)
    if len(content) != count:
        raise LatelierError(f"it ends {count - len(content):,} bytes too early")
    return content
