"""Objectives: `forward(batch) -> Terms`.

A tokenizer that is trained has one; its constructor takes the tokenizer, its recipe section, a seed, and LPIPS and
the adversary, or None for each. MAETok's takes the targets of its auxiliary decoders, too.
"""

import importlib
from typing import TYPE_CHECKING

from latelier.tokenizers import freeze

if TYPE_CHECKING:
    from torch import nn

    from latelier.data.loader import ImageDataset
    from latelier.recipe import TrainedTokenizer

OBJECTIVES = {
    "vmae": "latelier.objectives.vmae:VMAEObjective",
    "conv": "latelier.objectives.autoencoder:AutoencoderObjective",
    "dcae": "latelier.objectives.dcae:DCAEObjective",
    "maetok": "latelier.objectives.maetok:MAETokObjective",
}


def build_perceptual(section: "TrainedTokenizer") -> "nn.Module | None":
    """LPIPS, where it has a weight."""
    if not section.perceptual_weight:
        return None
    from latelier.losses.perceptual import LPIPS

    return LPIPS("vgg")


def build_objective(
    section: "TrainedTokenizer",
    seed: int,
    tokenizer: "nn.Module",
    perceptual: "nn.Module | None" = None,
    dataset: "ImageDataset | None" = None,
) -> "nn.Module":
    """The objective of a recipe's tokenizer section; what `section.train` leaves out is frozen."""
    freeze(tokenizer, section.train)
    options = {}
    if section.kind == "maetok":
        from latelier.objectives.targets import build_targets

        options["targets"] = build_targets(section, tokenizer.config, dataset)  # type: ignore[arg-type]
    module, name = OBJECTIVES[section.kind].split(":")
    return getattr(importlib.import_module(module), name)(tokenizer, section, seed, perceptual, None, **options)
