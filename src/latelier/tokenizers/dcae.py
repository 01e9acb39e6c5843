"""Deep-compression autoencoders: presets of DC-AE (ICLR 2025) and DC-AE 1.5 (ICCV 2025) on diffusers' AutoencoderDC.

A plain autoencoder (no KL, no codebook) of factor 8 to 128. Its down- and upsampling have shortcuts that need no
weights: pixels go into channels and their means are added. DC-AE 1.5 is the same class without the shortcuts around
the latent and without attention; it is trained so that any prefix of its channels decodes.
"""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderDC

from latelier.errors import LatelierError
from latelier.presets import open_init, preset_arguments
from latelier.recipe import Data, DCAERecipe

FINE = 3  # levels, from the pixels on, that have convolutions; below them DC-AE 1.0 has linear attention


def _attentive(channels: int, deeper: tuple[int, ...] = ()) -> dict[str, Any]:
    """DC-AE 1.0: residual convolutions in the three finest levels, linear attention in the others."""
    widths = (128, 256, 512, 512, 1024, 1024, *deeper)
    depth = len(widths)
    blocks = ("ResBlock",) * FINE + ("EfficientViTBlock",) * (depth - FINE)
    return {
        "latent_channels": channels,
        **_both("block_out_channels", widths), **_both("block_types", blocks),
        **_both("qkv_multiscales", ((),) * depth),
        "encoder_layers_per_block": (0, 4, 8) + (2,) * (depth - FINE),
        "decoder_layers_per_block": (0, 5, 10) + (2,) * (depth - FINE),
        "decoder_norm_types": ("batch_norm",) * FINE + ("rms_norm",) * (depth - FINE),
        "decoder_act_fns": ("relu",) * FINE + ("silu",) * (depth - FINE),
    }  # fmt: skip


def _sana() -> dict[str, Any]:
    """SANA's f32: attention that also looks at 5 x 5 means, strided convolutions instead of shuffled pixels."""
    blocks, scales = ("ResBlock",) * FINE + ("EfficientViTBlock",) * 3, ((),) * FINE + ((5,),) * 3
    return {
        "latent_channels": 32, **_both("block_types", blocks), **_both("qkv_multiscales", scales),
        "downsample_block_type": "conv", "upsample_block_type": "interpolate",
    }  # fmt: skip


def _convolutional(channels: int, widths: tuple[int, ...], layers: tuple[int, ...]) -> dict[str, Any]:
    """DC-AE 1.1 and 1.5: convolutions only, no shortcuts around the latent, whose channels are free to be ordered."""
    return {
        "latent_channels": channels, **_both("block_out_channels", widths), **_both("layers_per_block", layers),
        **_both("qkv_multiscales", ((),) * len(widths)), "encoder_out_shortcut": False, "decoder_in_shortcut": False,
        "decoder_conv_act_fn": "silu",
    }  # fmt: skip


def _both(name: str, value: Any) -> dict[str, Any]:
    return {f"encoder_{name}": value, f"decoder_{name}": value}


PRESETS = {
    "dcae-f32c32": _attentive(32),
    "dcae-f64c128": _attentive(128, (2048,)),
    "dcae-f128c512": _attentive(512, (2048, 2048)),
    "dcae-f32c32-sana": _sana(),
    "dcae15-f32c128": _convolutional(128, (128, 256, 512, 512, 1024, 1024), (0, 5, 10, 4, 4, 4)),
    "dcae15-f64c128": _convolutional(128, (128, 256, 512, 512, 1024, 1024, 1024), (0, 5, 10, 4, 4, 4, 4)),
    # For images of 64 to 128 pixels and few cores.
    "dcae15-f8c32-tiny": _convolutional(32, (16, 32, 64, 128), (0, 1, 1, 2)),
    "dcae15-f16c64-tiny": _convolutional(64, (16, 32, 64, 128, 256), (0, 1, 1, 2, 2)),
    "dcae15-f32c128-tiny": _convolutional(128, (16, 32, 64, 128, 256, 256), (0, 1, 1, 2, 2, 2)),
}


def build(recipe: DCAERecipe, data: Data) -> AutoencoderDC:
    """An autoencoder for these images, fresh or from `init`.

    Raises:
        LatelierError: for an unknown preset or argument, or widths that the shortcuts cannot divide.
    """
    if recipe.init:
        return open_init(AutoencoderDC, recipe.init)
    arguments = {**preset_arguments(AutoencoderDC, PRESETS, recipe.preset, recipe.model), "in_channels": data.channels}
    levels = {key: len(value) for key, value in arguments.items() if isinstance(value, tuple | list)}
    if len(set(levels.values())) > 1:
        told = ", ".join(f"{key} {count}" for key, count in levels.items())
        raise LatelierError(f"tokenizer.model does not fit preset {recipe.preset}: levels differ ({told}).")
    try:
        return AutoencoderDC(**arguments)
    except (AssertionError, ValueError) as error:
        raise LatelierError(
            f"tokenizer.model does not fit preset {recipe.preset} ({error or 'a width is no multiple of 4'}); with "
            "shuffled pixels each width must be a multiple or a part of the one before, and of 4."
        ) from None
