"""Tokenizers: images to latents and back.

A new one is a file with a `ModelMixin, ConfigMixin` class, a line in `CLASSES` (so that saved folders open), and a
line in `TOKENIZERS` (so that recipes name it).
"""

import importlib
from typing import TYPE_CHECKING

from latelier.errors import LatelierError

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from torch import Tensor, nn

    from latelier.recipe import Recipe

CLASSES = {
    "VMAE": "latelier.tokenizers.vmae:VMAE",
    "MAETok": "latelier.tokenizers.maetok:MAETok",
    "IdentityTokenizer": "latelier.tokenizers.conv:IdentityTokenizer",
}

TOKENIZERS = {
    "vmae": "latelier.tokenizers.vmae:build",
    "maetok": "latelier.tokenizers.maetok:build",
    "conv": "latelier.tokenizers.conv:build",
    "dcae": "latelier.tokenizers.dcae:build",
    "identity": "latelier.tokenizers.conv:build_identity",
}


def build_tokenizer(recipe: "Recipe") -> "ModelMixin":
    """A tokenizer with fresh weights (or those of `init`), as the recipe describes it."""
    module, function = TOKENIZERS[recipe.tokenizer.kind].split(":")
    tokenizer = getattr(importlib.import_module(module), function)(recipe.tokenizer, recipe.data)
    if getattr(recipe.tokenizer, "deterministic", False) and not getattr(recipe.tokenizer, "init", None):
        remove_spread(tokenizer)
    return tokenizer


def remove_spread(tokenizer: "nn.Module") -> None:
    """Make a posterior a point: log-variance -30, whatever the image.

    Where nothing trains the log-variance, it would otherwise keep what its random weights say, about 0: noise as large
    as the latents, which everything that samples the posterior would see.
    """
    layer = (
        getattr(tokenizer, "to_latent", None) or getattr(tokenizer, "quant_conv", None) or tokenizer.encoder.conv_out
    )
    half = len(layer.weight) // 2
    layer.weight.data[half:] = 0.0
    layer.bias.data[half:] = -30.0


def decoder_parts(tokenizer: "nn.Module") -> tuple[str, ...]:
    """Names of the modules that make images of latents; the rest makes latents of images."""
    if hasattr(tokenizer, "decoder_parts"):
        return tokenizer.decoder_parts
    codebook = ("quantize",) if hasattr(tokenizer, "quantize") else ()  # a VQModel's decoder begins with the codes
    return (*codebook, "decoder", "post_quant_conv")


def last_layer(tokenizer: "nn.Module") -> "Tensor":
    """The weight nearest to the pixels, where the gradients of loss terms are compared."""
    if hasattr(tokenizer, "last_layer"):
        return tokenizer.last_layer
    last = tokenizer.decoder.conv_out
    return getattr(last, "conv", last).weight  # an AutoencoderDC may shuffle pixels behind it


def parts_of(tokenizer: "nn.Module", train: str | list[str]) -> list[str]:
    """Names of the modules that a recipe's `train` means.

    `middle` are the layers on both sides of the latent, `head` those next to the pixels (the second and third phase of
    DC-AE); its paper does not list them, this is the usual reading.
    """
    names = {
        "all": [""],
        "decoder": list(decoder_parts(tokenizer)),
        "middle": ["encoder.conv_out", "quant_conv", "post_quant_conv", "decoder.conv_in", "to_latent", "from_latent"],
        "head": ["decoder.norm_out", "decoder.conv_norm_out", "decoder.conv_out", "decoder_norm", "head", "smoother"],
    }
    return names[train] if isinstance(train, str) else train


def freeze(tokenizer: "nn.Module", train: str | list[str]) -> None:
    """Let only some modules learn.

    Args:
        tokenizer: the model.
        train: `all`, `decoder`, `middle`, `head`, or names of modules such as `decoder.conv_out`; see `parts_of`.

    Raises:
        LatelierError: for a name that no weight's name begins with.
    """
    wanted = parts_of(tokenizer, train)
    names = [name for name, _ in tokenizer.named_parameters()]
    for part in wanted if isinstance(train, list) else ():
        if not any(_belongs(name, part) for name in names):
            known = ", ".join(dict.fromkeys(name.split(".")[0] for name in names))
            raise LatelierError(f"tokenizer.train: no weight belongs to {part!r}; the tokenizer has {known}.")
    for name, parameter in tokenizer.named_parameters():
        parameter.requires_grad_(any(_belongs(name, part) for part in wanted))


def _belongs(name: str, part: str) -> bool:
    return not part or name == part or name.startswith(part + ".")
