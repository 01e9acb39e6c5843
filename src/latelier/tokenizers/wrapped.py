"""Any module as a tokenizer, see `Codec.wrap`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from latelier.errors import LatelierError, check_whole
from latelier.tokenizers import TokenizerInfo
from latelier.tokenizers.posterior import Posterior, read_posterior

Method = str | Callable[[Tensor], Any]


class Wrapped(nn.Module):
    """A module whose `encode` and `decode` are functions, or methods that are named; `info` says its sizes."""

    def __init__(self, module: nn.Module, encode: Method, decode: Method, info: TokenizerInfo):
        super().__init__()
        check_whole(1, factor=info.factor, channels=info.latent_channels)
        self.module, self.methods, self.sizes = module, (encode, decode), info
        self.config = {"_class_name": type(module).__name__, **asdict(info)}
        for name in self.methods:
            if isinstance(name, str) and not callable(getattr(module, name, None)):
                raise LatelierError(
                    f"{type(module).__name__} has no method {name!r}; name another, or give a function."
                )

    @property
    def info(self) -> TokenizerInfo:
        """As it was given."""
        return self.sizes

    def encode(self, images: Tensor) -> Posterior:
        """The posterior of latents whose shape is as promised."""
        posterior = read_posterior(self._call(0, images))
        shape, wanted = tuple(posterior.mean.shape[1:]), self.info.latent_shape(images.shape[2], images.shape[3])
        if shape != wanted:
            raise LatelierError(f"encode gives latents of shape {shape}, not {wanted}; check factor and channels.")
        return posterior

    def decode(self, z: Tensor) -> Any:
        """Images, or what holds them as `sample`."""
        return self._call(1, z)

    def _call(self, number: int, x: Tensor) -> Any:
        method = self.methods[number]
        return (getattr(self.module, method) if isinstance(method, str) else method)(x)

    def save_pretrained(self, folder: str | Path) -> None:
        """The module's own way of saving itself; an error for one that has none."""
        if not hasattr(self.module, "save_pretrained"):
            name = type(self.module).__name__
            raise LatelierError(
                f"{name} has no save_pretrained, so its codec cannot be saved; save the weights yourself."
            )
        self.module.save_pretrained(folder)  # type: ignore[operator]
