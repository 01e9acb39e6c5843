"""What encoders return, whatever the class: a distribution of raw latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from jaxtyping import Float
from torch import Tensor


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


def read_posterior(output: Any, arrange: Callable[[Tensor], Tensor] = lambda latents: latents) -> Posterior:
    """The distribution that an encoder returned, float32; `arrange` changes shapes of latents and of parameters."""
    found = getattr(output, "latent_dist", output)
    if hasattr(found, "parameters") and hasattr(found, "logvar"):
        return DiagonalGaussianDistribution(arrange(found.parameters.float()).contiguous())
    if hasattr(found, "mode") and not isinstance(found, Tensor):  # of diffusers' own distributions without spread
        found = found.mode()
    elif isinstance(found, tuple):
        found = found[0]
    elif not isinstance(found, Tensor):
        found = found.latents if hasattr(found, "latents") else found.latent
    return Point(arrange(found.float()).contiguous())
