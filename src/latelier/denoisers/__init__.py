"""Denoisers: `forward(x_t, t, condition) -> prediction`.

A new one is a file with a `ModelMixin, ConfigMixin` class, functions `build` and `vector_width`, and a line in
`DENOISERS`.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from latelier.errors import LatelierError

if TYPE_CHECKING:
    from diffusers import ModelMixin

    from latelier.recipe import DenoiserRecipe

DENOISERS = {
    "dit": "latelier.denoisers.dit",
    "sit": "latelier.denoisers.dit",
    "lightning-dit": "latelier.denoisers.dit",
    "uvit": "latelier.denoisers.uvit",
    "usit": "latelier.denoisers.uvit",
    "unet": "latelier.denoisers.unet",
}


def build_denoiser(
    recipe: "DenoiserRecipe",
    latent_shape: tuple[int, ...],
    token_width: int = 0,
    spatial_channels: int = 0,
    vector: bool = False,
) -> "ModelMixin":
    """A denoiser with fresh weights, or those of `init`.

    Args:
        recipe: kind, size and overrides.
        latent_shape: `(c, *grid)` of one image.
        token_width: of the tokens that a condition has; 0 for none.
        spatial_channels: how many channels a condition concatenates to `x_t`.
        vector: whether a condition has a vector.

    Raises:
        LatelierError: if the recipe's denoiser does not fit the latents or the condition.
    """
    grid = latent_shape[1:]
    if any(side % recipe.patch for side in grid):
        raise LatelierError(
            f"denoiser.patch = {recipe.patch} does not divide the latent grid {' x '.join(map(str, grid))}; "
            "choose a patch that does, or another image_size."
        )
    model = _module(recipe).build(recipe, latent_shape, token_width, spatial_channels, vector)
    if recipe.prefixes is not None:
        model.register_to_config(prefix_channels=True)  # a model from `init` learns prefixes from here on
    return model


def vector_width(recipe: "DenoiserRecipe") -> int:
    """Width that a condition's vector must have: that of the time embedding to which it is added."""
    return _module(recipe).vector_width(recipe)


def _module(recipe: "DenoiserRecipe") -> ModuleType:
    return importlib.import_module(DENOISERS[recipe.kind])
