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
from typing import Any

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor

from latelier.errors import LatelierError, reading
from latelier.layers import fast_bf16
from latelier.publish import MANIFEST, damage
from latelier.sections import open_model
from latelier.tokenizers import TokenizerInfo, model_class, tokenizer_info
from latelier.tokenizers.diffusers_classes import CLASSES, PLAIN, DiffusersClass
from latelier.tokenizers.posterior import Point, Posterior
from latelier.tokenizers.statistics import (
    NORMS,
    REMEASURE,
    Statistics,
    fit_statistic,
    load_statistics,
    read_statistics,
    rms_normalise,
    save_statistics,
)
from latelier.tokenizers.wrapped import Method, Wrapped


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
        norm: `rms`: latents have root mean square 1 at each position, and no spread; `rms-both`: what is decoded too.
    """

    def __init__(
        self,
        tokenizer: torch.nn.Module,
        mean: Float[Tensor, " c *grid"] | None = None,
        std: Float[Tensor, " c *grid"] | None = None,
        receipt: dict[str, Any] | None = None,
        precision: str = "fp32",
        norm: str | None = None,
    ):
        self.tokenizer = tokenizer
        self.mean = None if mean is None else mean.detach()
        self.std = None if std is None else std.detach()
        self.receipt, self.precision, self.norm = receipt or {}, precision, norm

    @classmethod
    def wrap(
        cls, module: torch.nn.Module, encode: Method = "encode", decode: Method = "decode", *, factor: int,
        channels: int, value_range: tuple[float | int, float | int] = (-1.0, 1.0), mean: Tensor | None = None,
        std: Tensor | None = None, precision: str = "fp32", **sizes: Any,
    ) -> Codec:  # fmt: skip
        """A codec of any module.

        Args:
            module: what has the weights.
            encode: a function, or the name of a method, of images `(b, c, h, w)` to latents `(b, channels, *grid)`, or
                to what diffusers' encoders return.
            decode: of latents to images.
            factor: pixels along one side of a latent position.
            channels: of the latents.
            value_range: what `encode` and `decode` call black and white; the codec's images are in [-1, 1].
            mean, std, precision: see the class.
            sizes: other fields of `TokenizerInfo`: `image_channels`, `latent_tokens` and `decoder_size` of 1-D latents,
                `decoder_modules`, `statistics`, ...

        Raises:
            LatelierError: for a method that the module lacks, and once latents have another shape than was said.
        """
        low, high = map(float, value_range)
        info = TokenizerInfo(factor, channels, value_range=(low, high), **{"needs_numbers": True, **sizes})
        return cls(Wrapped(module, encode, decode, info), mean, std, None, precision)

    def posterior(self, images: Float[Tensor, "b c h w"]) -> Posterior:
        """The distribution of raw latents, float32.

        Raises:
            LatelierError: if the tokenizer has no latents for images of this size, see `latent_shape`.
        """
        self.latent_shape(*images.shape[-2:])
        x = self._scale_pixels(images, (-1.0, 1.0), self.info.value_range)
        with self._autocast():
            posterior = self._class.encode(self.tokenizer, self._laid_out(x))
        return Point(rms_normalise(posterior.mode())) if self.norm else posterior

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
        z = rms_normalise(z) if self.norm == "rms-both" else z
        with self._autocast():
            images = self._class.decode(self.tokenizer, self._laid_out(z)).float().contiguous()
        return self._scale_pixels(images, self.info.value_range, (-1.0, 1.0))

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
    def name(self) -> str:
        """Of the tokenizer's class."""
        return str(self.tokenizer.config.get("_class_name") or type(self.tokenizer).__name__)

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
            also = f", or use tokenizer.resized({(height, width)})" if hasattr(self.tokenizer, "resized") else ""
            raise LatelierError(
                f"This tokenizer decodes to {' x '.join(map(str, info.decoder_size or ()))} pixels, whatever the size "
                f"of the image, here {height} x {width}; resize it{also}."
            )
        return info.latent_shape(height, width)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; images and latents are cast to it, and what comes out is float32."""
        return next((p.dtype for p in self.tokenizer.parameters() if p.is_floating_point()), torch.float32)

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
        digest.update((self.norm or "").encode())
        return digest.hexdigest()[:16]

    def save_pretrained(self, folder: str | Path) -> None:
        """Weights and config as diffusers writes them, and the statistics beside them."""
        self.tokenizer.save_pretrained(folder)
        mean, std, receipt = self.mean, self.std, self.receipt
        if self.norm:  # which lies with the statistics, those that change nothing if there are no others
            receipt = {**receipt, "norm": self.norm}
            mean, std = (torch.zeros(self.channels), torch.ones(self.channels)) if mean is None else (mean, std)
        if mean is not None and std is not None:
            save_statistics(folder, mean, std, receipt)

    @classmethod
    def from_pretrained(cls, path: str | Path, precision: str = "fp32", **kwargs: Any) -> Codec:
        """Open a run's tokenizer, or any diffusers autoencoder of images from a folder or the Hub.

        Its statistics are those beside the weights, else those that the model itself carries (`latents_mean` and
        `latents_std`, FLUX.2's batch normalisation), else none. A `scaling_factor` is not taken for statistics.

        Args:
            path: a run folder, a tokenizer folder, or a Hub name.
            precision: see the class.
            kwargs: passed to diffusers: `subfolder`, where the tokenizer is inside `path`, such as `vae` of a
                pipeline; `torch_dtype`, `revision`, ...

        Raises:
            LatelierError: if there is no tokenizer that can be opened.
        """
        path = path if kwargs.get("subfolder") else tokenizer_folder(path)
        folder = Path(path, kwargs.get("subfolder") or "")
        advice = (
            "give a run's folder tokenizer/ (train it first if it is not there), or a diffusers autoencoder's folder "
            "or Hub name"
        )
        refuse_damage(folder)
        with reading(f"No tokenizer can be opened at {path}", advice):
            tokenizer = open_model(model_class(AutoencoderKL.load_config(str(path), **kwargs)), path, **kwargs)
            info = tokenizer_info(tokenizer)
            shape = info.latent_shape(info.factor, info.factor)
            carried: Statistics | None = None
            if (own := CLASSES.get(type(tokenizer).__name__, PLAIN).statistics(tokenizer)) is not None:
                carried = (*read_statistics(dict(zip(("mean", "std"), own)), shape), {"origin": "the model's own"})
        mean, std, about = load_statistics(folder, shape) or carried or (None, None, {})
        norm = about.pop("norm", None)
        if norm not in NORMS:
            raise LatelierError(f"{folder} says that its latents have a norm {norm!r}, not known here; {REMEASURE}.")
        return cls(tokenizer, mean, std, about, precision, norm)

    @property
    def _class(self) -> DiffusersClass:
        return CLASSES.get(type(self.tokenizer).__name__, PLAIN)

    def _laid_out(self, x: Tensor) -> Tensor:
        """In the weights' dtype and the memory layout that suits them."""
        channels_last = x.ndim == 4 and self.info.channels_last
        return x.to(self.dtype).contiguous(
            memory_format=torch.channels_last if channels_last else torch.contiguous_format
        )

    @staticmethod
    def _scale_pixels(x: Tensor, old: tuple[float, float], new: tuple[float, float]) -> Tensor:
        return x if old == new else (x - old[0]) * ((new[1] - new[0]) / (old[1] - old[0])) + new[0]

    def _autocast(self):
        device = self.device.type
        if self.precision == "fp32" or (self.precision == "auto" and not fast_bf16(device)):
            return nullcontext()
        return torch.autocast(device, torch.bfloat16)


def tokenizer_folder(path: str | Path) -> str | Path:
    """The tokenizer inside a run folder; any other folder or name is the tokenizer's own."""
    inside = Path(path, "tokenizer")
    return inside if inside.is_dir() else path


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
