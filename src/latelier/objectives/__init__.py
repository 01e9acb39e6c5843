"""Objectives: `forward(batch) -> Terms`.

A tokenizer that is trained has one; its constructor takes the tokenizer, its recipe section, a seed, and LPIPS or
None.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from latelier.recipe import TrainedTokenizer

OBJECTIVES = {
    "vmae": "latelier.objectives.vmae:VMAEObjective",
    "conv": "latelier.objectives.autoencoder:AutoencoderObjective",
}


def build_objective(section: "TrainedTokenizer", seed: int, tokenizer: "nn.Module") -> "nn.Module":
    """The objective of a recipe's tokenizer section."""
    perceptual = None
    if section.perceptual_weight:
        from latelier.losses.perceptual import LPIPS

        perceptual = LPIPS("vgg")
    module, name = OBJECTIVES[section.kind].split(":")
    return getattr(importlib.import_module(module), name)(tokenizer, section, seed, perceptual)
