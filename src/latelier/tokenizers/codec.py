"""The only door to a tokenizer, and large images through it tile by tile.

Whatever the tokenizer is (KL, VQ, deterministic, masked, identity), behind a `Codec` it is one thing: images in [-1, 1]
to normalised latents `(b, c, *grid)`, and back. Statistics are measured once after training, stored beside the weights,
and applied here and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from jaxtyping import Float
from torch import Tensor

from latelier.errors import LatelierError, reading
from latelier.layers import fast_bf16
from latelier.publish import MANIFEST, damage
from latelier.sections import open_model
from latelier.tokenizers import TokenizerInfo, model_class, tokenizer_info
from latelier.tokenizers.statistics import fit_statistic, load_statistics, save_statistics


class Point:
    """A posterior without spread: the latents of a deterministic tokenizer."""

    def __init__(self, mean: Float[Tensor, "b c *grid"]):
        self.mean = mean
        self.logvar = torch.full_like(mean, -30.0)
        self.std = torch.zeros_like(mean)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """The point itself."""
        return self.mean

    def mode(self) -> Tensor:
        """The point itself."""
        return self.mean


Posterior: TypeAlias = Point | DiagonalGaussianDistribution


class Codec:
    """A tokenizer with its latent statistics.

    Args:
        tokenizer: a diffusers-style autoencoder: `encode(images)` gives `latent_dist`, `latents` or `latent`, and
            `decode(z)` gives `sample`.
        mean: mean of the latents over the training set, `(c,)`, or `(c, *grid)` for each element of latents of one
            size; None leaves latents as they are.
        std: standard deviation of sampled latents, in the same shape.
        receipt: how the statistics were measured; stored with them.
        precision: `bf16` runs the tokenizer under autocast, `fp32` does not, `auto` takes what the device is fast at.
    """

    def __init__(
        self,
        tokenizer: torch.nn.Module,
        mean: Float[Tensor, " c *grid"] | None = None,
        std: Float[Tensor, " c *grid"] | None = None,
        receipt: dict[str, Any] | None = None,
        precision: str = "fp32",
    ):
        self.tokenizer = tokenizer
        self.mean = None if mean is None else mean.detach()
        self.std = None if std is None else std.detach()
        self.receipt, self.precision = receipt or {}, precision

    def posterior(self, images: Float[Tensor, "b c h w"]) -> Posterior:
        """The distribution of raw latents, float32.

        Raises:
            LatelierError: if the tokenizer has no latents for images of this size, see `latent_shape`.
        """
        self.latent_shape(*images.shape[-2:])
        with self._autocast():
            output = self.tokenizer.encode(images.contiguous(memory_format=self._memory_format))
        distribution = getattr(output, "latent_dist", None)
        if distribution is None:
            latents = output.latents if hasattr(output, "latents") else output.latent
            return Point(latents.float().contiguous())
        return DiagonalGaussianDistribution(distribution.parameters.float().contiguous())

    def encode(
        self, images: Float[Tensor, "b c h w"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "b k *grid"]:
        """Normalised latents: the posterior's mean, or a sample of it when a generator is given."""
        posterior = self.posterior(images)
        return self.normalise(posterior.mode() if generator is None else posterior.sample(generator))

    def decode(self, latents: Float[Tensor, "b k *grid"], channels: int | None = None) -> Float[Tensor, "b c h w"]:
        """Images of normalised latents, float32, not clamped.

        Args:
            latents: `(b, c, *grid)`, or only their first `channels` channels.
            channels: decode only the first k channels; the others are zero before the decoder.

        Raises:
            LatelierError: if the latents have fewer channels.
        """
        return self.decode_raw(self.raw(latents, channels))

    def raw(self, latents: Float[Tensor, "b k *grid"], channels: int | None = None) -> Float[Tensor, "b c *grid"]:
        """Raw latents of normalised ones; arguments and errors are those of `decode`."""
        if channels is None:
            return self.denormalise(latents)
        if not 0 < channels <= latents.shape[1]:
            raise LatelierError(f"channels = {channels} is not a prefix of {latents.shape[1]} latent channels.")
        z = self.denormalise(latents[:, :channels])  # (b, k, *grid)
        return torch.cat([z, z.new_zeros(len(z), self.channels - channels, *z.shape[2:])], dim=1)  # (b, c, *grid)

    def decode_raw(self, z: Float[Tensor, "b k *grid"]) -> Float[Tensor, "b c h w"]:
        """Images of raw latents, float32, not clamped."""
        with self._autocast():
            if z.ndim == 4:
                z = z.contiguous(memory_format=self._memory_format)
            return self.tokenizer.decode(z).sample.float().contiguous()

    def normalise(self, z: Float[Tensor, "b c *grid"]) -> Float[Tensor, "b c *grid"]:
        """Raw to normalised latents."""
        return z if self.mean is None else (z - fit_statistic(self.mean, z)) / fit_statistic(self.std, z)

    def denormalise(self, z: Float[Tensor, "b c *grid"]) -> Float[Tensor, "b c *grid"]:
        """Normalised to raw latents."""
        return z if self.mean is None else z * fit_statistic(self.std, z) + fit_statistic(self.mean, z)

    def scale(self, std: Float[Tensor, "b c *grid"]) -> Float[Tensor, "b c *grid"]:
        """Standard deviations of raw latents to those of normalised ones."""
        return std if self.std is None else std / fit_statistic(self.std, std)

    @property
    def info(self) -> TokenizerInfo:
        """Factor, channels and layers of the tokenizer."""
        return tokenizer_info(self.tokenizer)

    @property
    def factor(self) -> int:
        """Pixels along one side of a latent position; image sizes must be multiples of it."""
        return self.info.factor

    @property
    def image_channels(self) -> int:
        """Channels of the images."""
        return self.info.image_channels

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return self.info.latent_channels

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """`(c, *grid)` of an image's latents.

        Raises:
            LatelierError: if the tokenizer's factor does not divide the size, or 1-D latents decode to another size.
        """
        info = self.info
        check_size((height, width), info.factor)
        if info.decoder_size not in (None, (height, width)):
            raise LatelierError(
                f"This tokenizer decodes to {' x '.join(map(str, info.decoder_size or ()))} pixels, whatever the size "
                f"of the image, here {height} x {width}; resize it, or use tokenizer.resized({(height, width)})."
            )
        return info.latent_shape(height, width)

    @property
    def device(self) -> torch.device:
        """Where the tokenizer is."""
        return next((p.device for p in self.tokenizer.parameters()), torch.device("cpu"))

    def to(self, device: torch.device | str) -> Codec:
        """Move the tokenizer."""
        self.tokenizer.to(device=device)
        return self

    def hash(self) -> str:
        """16 hex digits that change with any weight, the configuration or the statistics."""
        digest = hashlib.sha256()
        config = {k: v for k, v in self.tokenizer.config.items() if not k.startswith("_")}
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.tokenizer.state_dict().items()):
            digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
        for tensor in (self.mean, self.std):
            digest.update(b"" if tensor is None else tensor.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save_pretrained(self, folder: str | Path) -> None:
        """Weights and config as diffusers writes them, and the statistics beside them."""
        self.tokenizer.save_pretrained(folder)
        if self.mean is not None and self.std is not None:
            save_statistics(folder, self.mean, self.std, self.receipt)

    @classmethod
    def from_pretrained(cls, path: str | Path, precision: str = "fp32", **kwargs: Any) -> Codec:
        """Open one of our folders, or any diffusers autoencoder from a folder or the Hub.

        Args:
            path: folder or Hub name.
            precision: see the class.
            kwargs: passed to diffusers (`subfolder`, `revision`, ...).

        Raises:
            LatelierError: if there is no tokenizer that can be opened.
        """
        folder = Path(path, kwargs.get("subfolder", ""))
        advice = (
            "give a run's folder tokenizer/ (train it first if it is not there), or a diffusers autoencoder's folder "
            "or Hub name"
        )
        refuse_damage(folder)
        with reading(f"No tokenizer can be opened at {path}", advice):
            tokenizer = open_model(model_class(AutoencoderKL.load_config(str(path), **kwargs)), path, **kwargs)
            info = tokenizer_info(tokenizer)
            shape = info.latent_shape(info.factor, info.factor)
        mean, std, about = load_statistics(folder, shape) or (None, None, None)
        return cls(tokenizer, mean, std, about, precision)

    @property
    def _memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.info.channels_last else torch.contiguous_format

    def _autocast(self):
        device = self.device.type
        if self.precision == "fp32" or (self.precision == "auto" and not fast_bf16(device)):
            return nullcontext()
        return torch.autocast(device, torch.bfloat16)


def refuse_damage(folder: Path) -> None:
    """Refuse a published folder whose files are not as they were written; one without a manifest is a stranger's."""
    advice = "copy it again, or delete it and run its recipe again"
    with reading(f"{folder} is damaged", advice):
        wrong = damage(folder) if (folder / MANIFEST).is_file() else None
    if wrong:
        raise LatelierError(f"{folder} {wrong}; {advice}.")


def check_size(size: tuple[int, ...] | torch.Size, factor: int) -> None:
    """Refuse image sizes that the tokenizer's factor does not divide."""
    if any(side < 1 or side % factor for side in size):
        near = " x ".join(str(max(factor, round(side / factor) * factor)) for side in size)
        raise LatelierError(
            f"Image size {' x '.join(map(str, size))} is not divisible by the tokenizer's factor {factor}; use {near}."
        )


# Tiles overlap. At an inner border, the last quarter of the overlap, where a tile sees padding instead of the image, is
# thrown away, and over the half in the middle one tile fades into the next. So the result is that of the whole image
# where the receptive field reaches no further than a quarter of the overlap. Global attention and group normalisation
# see their tile only; there the result is near, not equal.


def decode_tiled(
    codec: Codec, latents: Float[Tensor, "b k *grid"], tile: int, overlap: int, channels: int | None = None
) -> Float[Tensor, "b c h w"]:
    """`codec.decode` in tiles, with memory bounded by the tile.

    Args:
        codec: a tokenizer with latents on a 2-D grid.
        latents: normalised latents of any size.
        tile: side of a tile in latent positions; best that of training, or more.
        overlap: latent positions that neighbours share at least.
        channels: decode only the first k, see `Codec.decode`.

    Raises:
        LatelierError: for 1-D latents, and for an overlap that is as large as the tile.
    """
    _check_tiles(latents.shape[1:], tile, overlap)
    return _tiled(codec.decode_raw, codec.raw(latents, channels), (tile, overlap), (1, codec.factor))


def decode_within(
    codec: Codec, latents: Float[Tensor, "b k *grid"], window: int | None, channels: int | None = None
) -> Float[Tensor, "b c h w"]:
    """`codec.decode`; latents larger than `window` positions in tiles of that side, which overlap by half."""
    if window is None or max(latents.shape[2:]) <= window:
        return codec.decode(latents, channels)
    return torch.cat([decode_tiled(codec, row, window, window // 2, channels) for row in latents.split(1)])


def encode_tiled(codec: Codec, images: Float[Tensor, "b c h w"], tile: int, overlap: int) -> Float[Tensor, "b k *grid"]:
    """`codec.encode` in tiles: the posterior's mean, since two tiles would draw different noise where they overlap.

    Arguments and errors are those of `decode_tiled`; the tokenizer's factor must divide the image size.
    """
    _check_tiles(codec.latent_shape(images.shape[-2], images.shape[-1]), tile, overlap)
    raw = _tiled(lambda part: codec.posterior(part).mode(), images, (tile, overlap), (codec.factor, 1))
    return codec.normalise(raw)


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin so that they cover `length`: every `stride`, the last flush with the end."""
    return [0] if window >= length else [*range(0, length - window, stride), length - window]


def _tiled(convert: Callable[[Tensor], Tensor], x: Tensor, tile: tuple[int, int], units: tuple[int, int]) -> Tensor:
    """Convert `x` `(b, c, h, w)` tile by tile and blend; `units` is one latent position in `x` and in the result."""
    side, overlap = tile
    before, after = units
    grid = [length // before for length in x.shape[-2:]]
    if all(side >= length for length in grid):
        return convert(x)
    total, weights = torch.zeros(0), torch.zeros(0)
    for corner in product(*(starts(length, side, side - overlap) for length in grid)):
        size = [min(side, length) for length in grid]
        part = convert(x[_slices(corner, size, before)])  # (b, k, th, tw)
        if not total.numel():
            whole = [length * after for length in grid]
            total, weights = part.new_zeros(*part.shape[:2], *whole), part.new_zeros(*whole)
        rows, columns = (_fade(*line, overlap, after).to(part) for line in zip(corner, size, grid))
        weight = rows[:, None] * columns  # (th, tw)
        inside = _slices(corner, size, after)
        total[inside] += weight * part
        weights[inside[2:]] += weight
    return total / weights


def _fade(start: int, size: int, length: int, overlap: int, unit: int) -> Float[Tensor, " n"]:
    """A tile's weight along one side, `(size unit,)`: 1, falling to 0 towards ends that are not the image's."""
    weight = torch.ones(size * unit)
    if not overlap:
        return weight
    distance = (torch.arange(size * unit) + 0.5) / unit  # from the border, in latent positions
    ramp = ((distance - overlap / 4) / (overlap / 2)).clamp(0, 1)  # 0 in the outer quarter of the overlap
    if start > 0:
        weight = weight * ramp
    return weight * ramp.flip(0) if start + size < length else weight


def _slices(corner: tuple[int, ...], size: list[int], unit: int) -> tuple[slice, ...]:
    inner = (slice(start * unit, (start + side) * unit) for start, side in zip(corner, size))
    return (slice(None), slice(None), *inner)


def _check_tiles(shape: tuple[int, ...] | torch.Size, tile: int, overlap: int) -> None:
    if len(shape) != 3:
        raise LatelierError(
            f"Latents of shape {tuple(shape)} do not lie on a plane, so this tokenizer cannot work in tiles; "
            "leave tiling off."
        )
    if tile < 1 or not 0 <= overlap < tile:
        raise LatelierError(f"overlap = {overlap} does not go with tile = {tile}; choose 0 <= overlap < tile.")
