"""Images and their latents, encoded once: what every measure of a latent space starts from.

Posteriors are kept in raw units, float32; `z` puts them on the scale where each channel has variance 1.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from latelier.errors import LatelierError
from latelier.images import round_to_8_bit, to_uint8
from latelier.keyed_random import KeyedRandom
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.posterior import Point
from latelier.tokenizers.statistics import fit_statistic

PIXELS = 2**20  # of images that are decoded, and looked at by a network, at once
IN_MEMORY = 2**30  # bytes of one array; larger ones lie in a temporary file
MOST_NUMBERS = 2**28  # latent numbers that the analyses of whole latents hold at once, 1 GiB
MOST_DIMS = 512  # principal components that a mixture or a probe is given
STATISTICS_IMAGES = 256  # what the scale of a codec without statistics is measured on
OF_CODEC = "the codec's statistics"
FOREGROUND = "positions that show an id above 0 of the label map"  # in receipts
T = TypeVar("T")


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation of each latent channel, `(c,)`, or element, and where they are from."""

    mean: Float[Tensor, " c *grid"]
    std: Float[Tensor, " c *grid"]
    origin: str

    def of_channels(self) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
        """Mean and standard deviation of each channel; those of elements add up by the law of total variance."""
        mean, std = self.mean.view(len(self.mean), -1), self.std.view(len(self.std), -1)  # (c, 1) or (c, l)
        return mean.mean(1), (std.square().mean(1) + mean.var(1, correction=0)).sqrt()


@dataclass
class LatentSample:
    """Images of one size and the posteriors of their latents, on the CPU."""

    mean: Float[Tensor, "n c *grid"]  # of posteriors, raw
    logvar: Float[Tensor, "n c *grid"] | None  # None where posteriors are points
    labels: Int[Tensor, " n"]  # -1 for none
    index: Int[Tensor, " n"]  # numbers of the images in their source
    sizes: tuple[int, ...]  # of the batches in which the images came
    scale: Scale  # of normalised latents
    image_size: tuple[int, int]  # height and width
    images: Tensor | None = None  # 8-bit levels, or float32 in [-1, 1] where levels are not enough; None if not kept
    scaling_factor: float | None = None  # what the tokenizer's configuration says of its scale
    foreground: Bool[Tensor, "n i j"] | None = None  # see `FOREGROUND`; None without label maps, and for 1-D latents
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))  # where networks run
    cut: bool = False  # whether images were left out for want of memory
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)  # what one measure leaves for the others

    def __len__(self) -> int:
        return len(self.mean)

    def latents(self, rows: slice = slice(None)) -> Float[Tensor, "b c *grid"]:
        """Normalised posterior means."""
        mean = self.mean[rows]
        return (mean - fit_statistic(self.scale.mean, mean)) / fit_statistic(self.scale.std, mean)

    def std(self, rows: slice) -> Float[Tensor, "b c *grid"]:
        """Standard deviations of the posteriors, raw; 0 of points."""
        return torch.zeros_like(self.mean[rows]) if self.logvar is None else torch.exp(0.5 * self.logvar[rows])

    @property
    def z(self) -> Float[Tensor, "n c l"]:
        """Normalised posterior means, positions in raster order."""
        return self.recall("z", lambda: self.latents().flatten(2))

    def flat(self) -> np.ndarray:
        """All numbers of an image in one row, `(n, c l)`, float32."""
        return self.z.flatten(1).numpy()

    def scaled(self, codec: Codec) -> Codec:
        """The codec, with this sample's scale where it has no statistics."""
        if codec.std is not None:
            return codec
        return Codec(codec.tokenizer, self.scale.mean, self.scale.std, precision=codec.precision, norm=codec.norm)

    def about(self) -> dict[str, Any]:
        """What receipts say of whole latents."""
        channels, positions = self.mean.shape[1], math.prod(self.mean.shape[2:])
        about = {"latents": "posterior mean, normalised", "latent_scale": self.scale.origin}
        about |= {"latent_channels": channels, "latent_positions": positions}
        if self.cut:
            about["note"] = f"more than {len(self)} images of {channels * positions} numbers do not fit into memory"
        return about

    def pixels(self, rows: slice) -> Float[Tensor, "b c h w"]:
        """Images in [-1, 1], where networks run."""
        assert self.images is not None, "This sample was collected without its images."
        images = self.images[rows].to(self.device)
        return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images

    def parts(self, pixels: int | None = None, images: int | None = None) -> Iterator[slice]:
        """Rows of one batch after the other, of the first `images` only, in pieces of at most `pixels` pixels."""
        step = max(1, len(self)) if pixels is None else max(1, pixels // math.prod(self.image_size))
        start, end = 0, len(self) if images is None else min(images, len(self))
        for size in self.sizes:
            stop = min(start + size, end)
            for first in range(start, stop, step):
                yield slice(first, min(first + step, stop))
            start = stop

    def __getitem__(self, rows: Tensor | slice) -> LatentSample:
        """Latents of some of the images, by a mask or a slice, on the same scale; without the images."""
        chosen = torch.arange(len(self))[rows]
        batch = torch.repeat_interleave(torch.arange(len(self.sizes)), torch.tensor(self.sizes, dtype=torch.long))
        counts = torch.bincount(batch[chosen], minlength=len(self.sizes))
        fields = {"labels": self.labels[chosen], "index": self.index[chosen], "mean": self.mean[chosen]}
        logvar, foreground = (None if x is None else x[chosen] for x in (self.logvar, self.foreground))
        sizes = tuple(counts[counts > 0].tolist())
        return replace(self, **fields, logvar=logvar, foreground=foreground, sizes=sizes, images=None, cache={})

    def first(self, images: int | None = None) -> LatentSample:
        """The first images, no more than memory holds of their latents."""
        room = max(1, MOST_NUMBERS // max(1, math.prod(self.mean.shape[1:])))
        wanted = len(self) if images is None else min(images, len(self))
        return self if min(room, wanted) == len(self) else replace(self[: min(room, wanted)], cut=room < wanted)

    def on_scale_of(self, other: LatentSample) -> LatentSample:
        """The same images on another sample's scale."""
        same = self.scale.origin == other.scale.origin == OF_CODEC
        return self if same else replace(self, scale=other.scale, cache={})

    def on_own_scale(self) -> LatentSample:
        """The same images on their own scale, unless it is the codec's."""
        if self.scale.origin == OF_CODEC or not len(self):
            return self
        return replace(self, scale=measured_scale(self.mean, self.logvar, self.sizes), cache={})

    def recall(self, key: Any, compute: Callable[[], T]) -> T:
        """What was computed before under this key, or is now."""
        if key not in self.cache:
            self.cache[key] = compute()
        return self.cache[key]


@torch.no_grad()
def collect(
    codec: Codec, batches: Iterable[Mapping[str, Any]], limit: int, images: bool = True,
    known: LatentSample | None = None,
) -> LatentSample:  # fmt: skip
    """Encode at most `limit` images once; an error if there are none.

    Batches are dicts with `image` `(b, c, h, w)` in [-1, 1], of one size, perhaps `label` (-1 for none), `index` and
    `segmentation` `(b, h, w)`, of which the foreground is kept if all have one. `images` says whether these are kept;
    those that are encoded already are found in `known` by their index. Statistics that the codec lacks are measured on
    the first images.
    """
    store = _Store(limit)
    row_of = {} if known is None else {number: row for row, number in enumerate(known.index.tolist())}
    sizes: list[int] = []
    maps: list[Tensor] = []
    for batch in batches:
        read = sum(sizes)
        if read >= limit:
            break
        pixels = batch["image"][: limit - read]  # (b, c, h, w)
        count, size = len(pixels), (pixels.shape[2], pixels.shape[3])
        index = torch.as_tensor(batch.get("index", torch.arange(read, read + count)))[:count].long().cpu()
        labels = torch.as_tensor(batch.get("label", torch.full((count,), -1)))[:count].long().cpu()
        rows = torch.tensor([row_of.get(number, -1) for number in index.tolist()], dtype=torch.long)  # (b,)
        columns = _encode(codec, pixels, rows, known)
        if "segmentation" in batch and columns["mean"].ndim == 4:
            maps.append(_foreground(batch["segmentation"][:count], columns["mean"].shape[2:]))
        if images:
            columns["images"] = _levels(pixels)
        store.add({**columns, "labels": labels, "index": index})
        sizes.append(count)
    if not sizes:
        raise LatelierError("There are no images to collect latents of.")
    found = store.columns()
    if codec.mean is not None and codec.std is not None:
        scale = Scale(codec.mean.cpu(), codec.std.cpu(), OF_CODEC)
    else:
        scale = measured_scale(found["mean"], found.get("logvar"), tuple(sizes))
    return LatentSample(
        found["mean"], found.get("logvar"), found["labels"], found["index"], tuple(sizes), scale, size,
        found.get("images"), codec.tokenizer.config.get("scaling_factor"),
        torch.cat(maps) if len(maps) == len(sizes) else None, codec.device,
    )  # fmt: skip


def _encode(codec: Codec, images: Tensor, rows: Int[Tensor, " b"], known: LatentSample | None) -> dict[str, Tensor]:
    """Posterior mean and log-variance of a batch, of images at `rows` >= 0 as they are known."""
    fresh = rows < 0  # (b,)
    found: dict[str, Tensor] = {}
    if fresh.any():
        posterior = codec.posterior(images[fresh].to(codec.device))
        found["mean"] = posterior.mean.cpu()
        if not isinstance(posterior, Point):
            found["logvar"] = posterior.logvar.cpu()
    if known is None or fresh.all():
        return found
    merged = {}
    for name, values in (("mean", known.mean), ("logvar", known.logvar)):
        if values is not None:
            merged[name] = values[rows.clamp(min=0)]
            if fresh.any():
                merged[name][fresh] = found[name]
    return merged


def _foreground(ids: Integer[Tensor, "b h w"], grid: torch.Size) -> Bool[Tensor, "b i j"]:
    """Positions of the latent that show anything but id 0, which is the background: max pooling."""
    return F.adaptive_max_pool2d((ids > 0).float().cpu(), (grid[0], grid[1])) > 0


def _levels(images: Tensor) -> Tensor:
    """8-bit levels, if that is what the images are made of."""
    return to_uint8(images).cpu() if torch.equal(round_to_8_bit(images), images) else images.float().cpu()


class _Store:
    """Columns of at most `limit` rows that grow batch by batch; large ones lie in temporary files."""

    def __init__(self, limit: int):
        self.limit, self.rows = limit, 0
        self.arrays: dict[str, Tensor] = {}

    def add(self, columns: Mapping[str, Tensor]) -> None:
        count = len(columns["index"])
        for name, values in columns.items():
            array = self.arrays.get(name)
            dtype = values.dtype if array is None else torch.promote_types(array.dtype, values.dtype)
            if array is None or array.dtype != dtype or len(array) < self.rows + count:
                rows = min(self.limit, 2 * (self.rows + count))
                self.arrays[name] = longer = _array((rows, *values.shape[1:]), dtype)
                if array is not None:
                    longer[: self.rows] = _as(array[: self.rows], dtype)
            self.arrays[name][self.rows : self.rows + count] = _as(values, dtype)
        self.rows += count

    def columns(self) -> dict[str, Tensor]:
        return {name: array[: self.rows] for name, array in self.arrays.items()}


def _as(values: Tensor, dtype: torch.dtype) -> Tensor:
    """8-bit levels as images in [-1, 1] where some images need more than levels."""
    return values if values.dtype == dtype else values.float() / 127.5 - 1


def _array(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An array in memory, or in a temporary file."""
    if math.prod(shape) * dtype.itemsize <= IN_MEMORY:
        return torch.empty(shape, dtype=dtype)
    numpy_type = torch.empty(0, dtype=dtype).numpy().dtype
    with tempfile.TemporaryFile() as file:  # the mapping outlives the handle
        return torch.from_numpy(np.memmap(file, numpy_type, "w+", shape=shape))


def measured_scale(mean: Tensor, logvar: Tensor | None, sizes: tuple[int, ...]) -> Scale:
    """The scale of the first images' sampled latents, as in training: their variance is that of the posterior's mean
    plus the mean of its variance.
    """
    sums: list[Tensor] = []
    first = count = 0
    for size in sizes:
        if first >= STATISTICS_IMAGES:
            break
        rows, first = slice(first, first + size), first + size
        means = mean[rows].transpose(0, 1).flatten(1).double()  # (c, b l)
        std = means.new_zeros(())
        if logvar is not None:
            std = torch.exp(0.5 * logvar[rows]).transpose(0, 1).flatten(1).double()
        sums.append(torch.stack([means.sum(1), (means.square() + std.square()).sum(1)]))
        count += means.shape[1]
    centre, square = torch.stack(sums).sum(0) / count  # (c,)
    spread = (square - centre.square()).clamp(min=1e-12).sqrt()  # a dead channel stays finite
    return Scale(centre.float(), spread.float(), f"measured on the first {first} images")


def random_share(n: int, share: float, seed: int, purpose: str) -> Tensor:
    """A mask `(n,)` of `share` of n images, rounded up, chosen by a random number for each."""
    order = KeyedRandom(seed, torch.arange(n)).uniform(purpose).argsort(stable=True)  # (n,)
    chosen = torch.zeros(n, dtype=torch.bool)
    chosen[order[: math.ceil(n * share)]] = True
    return chosen
