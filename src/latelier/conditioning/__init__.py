"""Conditioners: what a denoiser is told beside `x_t` and `t`, made from a record or from what a user asks for.

A conditioner is a `ModelMixin, ConfigMixin` class with

    asks               the pipeline's argument by which users say what they want
    token_width        width of the tokens it makes, 0 for none
    spatial_channels   channels it concatenates to `x_t`, 0 for none
    inputs(wanted, size) -> record entries      what a user asks for, as training has it
    prepare(batch, codec) -> batch entries      without gradients, before the step: degraded images, masks, token ids
    forward(batch, drop) -> Condition           the learned part; dropped rows are told nothing

A new one is a file, a line in `CONDITIONERS` (how it is built for a recipe) and its section in `recipe/condition.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from latelier.errors import LatelierError

if TYPE_CHECKING:
    from diffusers import ModelMixin

    from latelier.recipe.condition import ConditionSection

CONDITIONERS = {
    "class": "latelier.conditioning.condition:build",
    "text": "latelier.conditioning.text:build",
    "layout": "latelier.conditioning.layout:build",
    "segmentation": "latelier.conditioning.segmentation:build_segmentation",
    "low-resolution": "latelier.conditioning.low_resolution:build_low_resolution",
    "inpainting": "latelier.conditioning.inpainting:build_inpainting",
    "map": "latelier.conditioning.spatial:build_map",
}
# What a latent cache holds beside latents; conditioners that ask for anything else need the images' records.
CACHED = ("classes", "prompts")


@dataclass(frozen=True)
class DataSpec:
    """What conditioners are built for.

    Attributes:
        class_names: of the images, index = label; None without labels.
        box_names: of the classes of boxes; None without boxes.
        segmentation_classes: how many ids the label maps have; None without maps.
        captions: one pass over the training captions; None without captions.
        latent_shape: `(c, *grid)`.
        factor: pixels along a side of a latent position.
        image_channels: of the images.
        vector_width: width of the denoiser's time embedding.
        prefers_tokens: whether the denoiser has cross-attention by nature (U-Nets) rather than adaLN.
        seed: the run's.
    """

    class_names: list[str] | None
    box_names: list[str] | None
    segmentation_classes: int | None
    captions: Callable[[], Iterator[str]] | None
    latent_shape: tuple[int, ...]
    factor: int
    image_channels: int
    vector_width: int
    prefers_tokens: bool
    seed: int


def build_conditioner(sections: Sequence[ConditionSection], spec: DataSpec) -> ModelMixin | None:
    """One conditioner for all sections of a recipe; None for none.

    Raises:
        LatelierError: if the data lack what a section needs, or two sections do not go together.
    """
    from latelier.conditioning.composite import CompositeConditioner

    built: list = []
    for section in sections:
        module, function = CONDITIONERS[section.kind].split(":")
        built.append(getattr(importlib.import_module(module), function)(section, spec))
    kinds = [section.kind for section in sections]
    if len(set(kinds)) < len(kinds):
        raise LatelierError(f"denoiser.condition names a kind twice: {', '.join(kinds)}.")
    if len({conditioner.token_width for conditioner in built if conditioner.token_width}) > 1:
        widths = ", ".join(f"{k} {c.token_width}" for k, c in zip(kinds, built) if c.token_width)
        raise LatelierError(f"The tokens of denoiser.condition must be equally wide, not {widths}; set their `dim`.")
    if len(built) < 2:
        return built[0] if built else None
    return CompositeConditioner.of(built)


def parts(conditioner: ModelMixin | None) -> dict[str, ModelMixin]:
    """A conditioner's parts by what they ask for; one that is no `Together` is its only part."""
    if conditioner is None:
        return {}
    inner = conditioner._modules.get("parts")
    return dict(inner.items()) if inner is not None else {conditioner.input_name: conditioner}  # type: ignore[dict-item]
