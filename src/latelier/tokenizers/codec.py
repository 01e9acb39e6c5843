"""The only door to a tokenizer.

Whatever the tokenizer is (KL, VQ, deterministic, variational masked, identity), behind a `Codec` it is one thing:
images in [-1, 1] to normalised latents `(b, c, *grid)`, and back. Statistics are measured once after training,
stored beside the weights, and applied here and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from jaxtyping import Float
from torch import Tensor

from latelier.errors import LatelierError
from latelier.tokenizers import TokenizerInfo, model_class, tokenizer_info

STATISTICS_FILE = "latent_statistics.json"


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
        mean: `(c,)` mean of the latents over the training set; None leaves latents as they are.
        std: `(c,)` standard deviation of sampled latents.
        receipt: how the statistics were measured; stored with them.
        precision: `bf16` runs the tokenizer under autocast, `fp32` does not, `auto` takes what the device is fast at.
    """

    def __init__(
        self,
        tokenizer: torch.nn.Module,
        mean: Float[Tensor, " c"] | None = None,
        std: Float[Tensor, " c"] | None = None,
        receipt: dict[str, Any] | None = None,
        precision: str = "fp32",
    ):
        self.tokenizer = tokenizer
        self.mean = None if mean is None else mean.detach()
        self.std = None if std is None else std.detach()
        self.receipt = receipt or {}
        self.precision = precision

    # -- images to latents and back -----------------------------------------------------------------------------------

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
        if channels is not None and not 0 < channels <= latents.shape[1]:
            raise LatelierError(f"channels = {channels} is not a prefix of {latents.shape[1]} latent channels.")
        z = self.denormalise(latents if channels is None else latents[:, :channels])  # (b, k, *grid)
        if channels is not None:
            lacking = self.channels - channels
            z = torch.cat([z, z.new_zeros(len(z), lacking, *z.shape[2:])], dim=1)  # (b, c, *grid)
        with self._autocast():
            if z.ndim == 4:
                z = z.contiguous(memory_format=self._memory_format)
            return self.tokenizer.decode(z).sample.float().contiguous()

    def normalise(self, z: Float[Tensor, "b c *grid"]) -> Float[Tensor, "b c *grid"]:
        """Raw to normalised latents."""
        return z if self.mean is None else (z - self._like(self.mean, z)) / self._like(self.std, z)

    def denormalise(self, z: Float[Tensor, "b c *grid"]) -> Float[Tensor, "b c *grid"]:
        """Normalised to raw latents."""
        return z if self.mean is None else z * self._like(self.std, z) + self._like(self.mean, z)

    def scale(self, std: Float[Tensor, "b c *grid"]) -> Float[Tensor, "b c *grid"]:
        """Standard deviations of raw latents to those of normalised ones."""
        return std if self.std is None else std / self._like(self.std, std)

    # -- what it looks like -------------------------------------------------------------------------------------------

    @property
    def info(self) -> TokenizerInfo:
        """What is to be known of the tokenizer."""
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
            LatelierError: if the tokenizer's factor does not divide the size, or if its latents are 1-D, which do not
                keep a size, and it decodes them to images of another one.
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

    # -- folders ------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Weights and config as diffusers writes them, and the statistics beside them."""
        self.tokenizer.save_pretrained(folder)
        if self.mean is not None and self.std is not None:
            content = {"mean": self.mean.tolist(), "std": self.std.tolist(), **self.receipt}
            (Path(folder) / STATISTICS_FILE).write_text(json.dumps(content, indent=2))

    @classmethod
    def from_pretrained(cls, path: str | Path, precision: str = "fp32", **kwargs: Any) -> Codec:
        """Open a folder of ours, or any diffusers autoencoder from a folder or the Hub.

        Args:
            path: folder or Hub name.
            precision: see the class.
            kwargs: passed to diffusers (`subfolder`, `revision`, ...).

        Raises:
            LatelierError: if there is no tokenizer that can be opened.
        """
        try:
            config = AutoencoderKL.load_config(str(path), **kwargs)
            tokenizer = model_class(config).from_pretrained(str(path), **kwargs).eval()
        except (OSError, ValueError) as error:  # also of names that cannot be the Hub's
            raise LatelierError(
                f"No tokenizer can be opened at {path} ({str(error).splitlines()[0].rstrip('.')}); give a run's folder "
                "tokenizer/ (train it first if it is not there), or a diffusers autoencoder's folder or Hub name."
            ) from None
        statistics = Path(path) / kwargs.get("subfolder", "") / STATISTICS_FILE
        if not statistics.is_file():
            return cls(tokenizer, precision=precision)
        content = json.loads(statistics.read_text())
        mean, std = (torch.tensor(content.pop(key)) for key in ("mean", "std"))
        return cls(tokenizer, mean, std, receipt=content, precision=precision)

    # -- inside -------------------------------------------------------------------------------------------------------

    @property
    def _memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.info.channels_last else torch.contiguous_format

    def _autocast(self):
        device = self.device.type
        if self.precision == "fp32" or (self.precision == "auto" and not fast_bf16(device)):
            return nullcontext()
        return torch.autocast(device, torch.bfloat16)

    @staticmethod
    def _like(statistic: Tensor, z: Tensor) -> Tensor:
        """Statistics of the channels that are there: all, or a prefix."""
        return statistic[: z.shape[1]].to(z).view(-1, *[1] * (z.ndim - 2))


def check_size(size: tuple[int, ...] | torch.Size, factor: int) -> None:
    """Refuse image sizes that the tokenizer's factor does not divide."""
    if any(side % factor for side in size):
        near = " x ".join(str(max(factor, round(side / factor) * factor)) for side in size)
        raise LatelierError(
            f"Image size {' x '.join(map(str, size))} is not divisible by the tokenizer's factor {factor}; use {near}."
        )


def fast_bf16(device: str) -> bool:
    """Whether bf16 matrix products are faster than fp32 on this device."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False
