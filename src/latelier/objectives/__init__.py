"""Objectives: `forward(batch) -> Terms`.

A tokenizer that is trained has one; its constructor takes the tokenizer, its recipe section, a seed, and LPIPS and
the adversary, or None for each. MAETok's takes the targets of its auxiliary decoders, too.
"""

import importlib
from typing import TYPE_CHECKING

from latelier.errors import LatelierError
from latelier.tokenizers import freeze, last_layer

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


def build_objective(
    section: "TrainedTokenizer", seed: int, tokenizer: "nn.Module", dataset: "ImageDataset | None" = None
) -> "nn.Module":
    """The objective of a recipe's tokenizer section; what `section.train` leaves out is frozen.

    Args:
        section: weights and forms.
        seed: of the objective's random choices.
        tokenizer: the model to train.
        dataset: what it is trained on; targets learn words from its captions, and which images stay as they are.
    """
    freeze(tokenizer, section.train)
    perceptual = None
    if section.perceptual_weight:
        from latelier.losses.perceptual import LPIPS

        perceptual = LPIPS("vgg")
    adversary = None
    if section.adversarial is not None:
        from latelier.objectives.adversarial import Adversary

        if section.adversarial.adaptive and not last_layer(tokenizer).requires_grad:
            raise LatelierError(
                "tokenizer.adversarial.adaptive compares gradients at the tokenizer's last layer, which "
                f"tokenizer.train = {section.train} freezes; set adaptive: false, or train that layer too."
            )
        adversary = Adversary(section.adversarial, seed, tokenizer.config["in_channels"])  # type: ignore[index]
    options = {}
    if section.kind == "maetok":
        from latelier.objectives.targets import build_targets

        options["targets"] = build_targets(section, tokenizer.config, dataset)  # type: ignore[arg-type]
    module, name = OBJECTIVES[section.kind].split(":")
    return getattr(importlib.import_module(module), name)(tokenizer, section, seed, perceptual, adversary, **options)
