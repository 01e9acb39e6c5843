"""Denoisers: `forward(x_t, t, condition) -> prediction`.

A new denoiser is a file and a line in `DENOISERS`. The file has a `ModelMixin, ConfigMixin` class and

    SECTIONS       classes of its recipe sections: `DenoiserSection` with `kind: Literal["..."]`
    build(section, latent_shape, token_width, spatial_channels, vector) -> model
    vector_width(section) -> width of a condition's vector
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from latelier.errors import LatelierError

if TYPE_CHECKING:
    from diffusers import ModelMixin

    from latelier.denoisers.objective import DenoiserSection

DENOISERS = {
    "dit": "latelier.denoisers.dit",
    "sit": "latelier.denoisers.dit",
    "lightning-dit": "latelier.denoisers.dit",
    "ddt": "latelier.denoisers.ddt",
    "uvit": "latelier.denoisers.uvit",
    "usit": "latelier.denoisers.uvit",
    "unet": "latelier.denoisers.unet",
}


def build_denoiser(
    section: DenoiserSection,
    latent_shape: tuple[int, ...],
    token_width: int = 0,
    spatial_channels: int = 0,
    vector: bool = False,
) -> ModelMixin:
    """A denoiser with fresh weights, or those of `init`.

    Args:
        section: kind, size and overrides.
        latent_shape: `(c, *grid)` of one image.
        token_width: of a condition's tokens; 0 for none.
        spatial_channels: channels that a condition concatenates to `x_t`.
        vector: whether a condition has a vector.
    """
    grid = latent_shape[1:]
    if any(side % section.patch for side in grid):
        raise LatelierError(
            f"denoiser.patch = {section.patch} does not divide the latent grid {' x '.join(map(str, grid))}; "
            "choose a patch that does, or another image_size."
        )
    model = _module(section).build(section, latent_shape, token_width, spatial_channels, vector)
    if section.prefixes is not None:
        model.register_to_config(prefix_channels=True)  # a model from `init` learns prefixes from here on
    return model


def vector_width(section: DenoiserSection) -> int:
    """Width of a condition's vector: that of the time embedding, to which it is added."""
    return _module(section).vector_width(section)


def _module(section: DenoiserSection) -> ModuleType:
    return importlib.import_module(DENOISERS[section.kind])
