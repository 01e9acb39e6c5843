"""Tokenizers: images to latents and back.

A new one is a file with a `ModelMixin, ConfigMixin` class, a line in `CLASSES` (so that saved folders open), and a
line in `TOKENIZERS` (so that recipes name it).
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import ModelMixin

    from latelier.recipe import Recipe

CLASSES = {
    "VMAE": "latelier.tokenizers.vmae:VMAE",
    "IdentityTokenizer": "latelier.tokenizers.conv:IdentityTokenizer",
}

TOKENIZERS = {
    "vmae": "latelier.tokenizers.vmae:build",
    "conv": "latelier.tokenizers.conv:build",
    "identity": "latelier.tokenizers.conv:build_identity",
}


def build_tokenizer(recipe: "Recipe") -> "ModelMixin":
    """A tokenizer with fresh weights (or those of `init`), as the recipe describes it."""
    module, function = TOKENIZERS[recipe.tokenizer.kind].split(":")
    return getattr(importlib.import_module(module), function)(recipe.tokenizer, recipe.data)
