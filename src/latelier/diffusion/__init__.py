"""Diffusion processes, samplers and guidance, and the types that they share."""

from collections.abc import Callable
from typing import TypeAlias

from jaxtyping import Float
from torch import Tensor

Latents: TypeAlias = Float[Tensor, "b c *grid"]
Levels: TypeAlias = Float[Tensor, " b"]  # noise levels t in [0, 1], one for each image
Predict: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # noisy latents and their levels -> prediction
