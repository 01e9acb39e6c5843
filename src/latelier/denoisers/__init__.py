"""Denoisers: `forward(x_t, t, condition) -> prediction`.

A new one is a file with a `ModelMixin, ConfigMixin` class and a line in `DENOISERS`.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import ModelMixin

    from latelier.recipe import DenoiserRecipe

DENOISERS = {
    "dit": "latelier.denoisers.dit:build",
    "sit": "latelier.denoisers.dit:build",
    "lightning-dit": "latelier.denoisers.dit:build",
}


def build_denoiser(recipe: "DenoiserRecipe", latent_shape: tuple[int, ...]) -> "ModelMixin":
    """A denoiser with fresh weights (or those of `init`) for latents `(c, *grid)`."""
    module, function = DENOISERS[recipe.kind].split(":")
    return getattr(importlib.import_module(module), function)(recipe, latent_shape)
