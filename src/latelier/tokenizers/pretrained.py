"""Trained tokenizers: our own folders, and diffusers' autoencoders.

For another class of diffusers, add an entry to `DIFFUSERS` that makes a `TokenizerInfo` of its config.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

from latelier.sections import Kind
from latelier.tokenizers import TokenizerInfo


class PretrainedSection(Kind):
    """A trained tokenizer: one of our folders, or any diffusers autoencoder by Hub name."""

    kind: Literal["pretrained"]
    path: str
    subfolder: str | None = None


SECTIONS, MODELS = (PretrainedSection,), ()


def _kl(config: Mapping[str, Any]) -> TokenizerInfo:
    """AutoencoderKL."""
    before, after = config.get("use_quant_conv", True), config.get("use_post_quant_conv", True)
    return TokenizerInfo(
        factor=2 ** (len(config["block_out_channels"]) - 1),
        latent_channels=config["latent_channels"],
        image_channels=config["in_channels"],
        decoder_modules=("decoder", "post_quant_conv") if after else ("decoder",),
        middle=("encoder.conv_out", "quant_conv", "post_quant_conv", "decoder.conv_in"),
        head=("decoder.conv_norm_out", "decoder.conv_out"),
        last_layer="decoder.conv_out.weight",
        variance_layer="quant_conv" if before else "encoder.conv_out",
        channels_last=True,
    )


def _vq(config: Mapping[str, Any]) -> TokenizerInfo:
    """VQModel: its latents, of `vq_embed_dim` channels, are continuous; its decoder begins with the nearest codes."""
    channels, decoder = config["vq_embed_dim"] or config["latent_channels"], ("quantize", "decoder", "post_quant_conv")
    return replace(_kl(config), latent_channels=channels, decoder_modules=decoder, variance_layer=None)


def _dc(config: Mapping[str, Any]) -> TokenizerInfo:
    """AutoencoderDC; without blocks at the finest level its last convolution also shuffles pixels."""
    layers = config["decoder_layers_per_block"]
    shuffles = not (layers if isinstance(layers, int) else layers[0])
    return TokenizerInfo(
        factor=2 ** (len(config["encoder_block_out_channels"]) - 1),
        latent_channels=config["latent_channels"],
        image_channels=config["in_channels"],
        middle=("encoder.conv_out", "decoder.conv_in"),
        head=("decoder.norm_out", "decoder.conv_out"),
        last_layer="decoder.conv_out.conv.weight" if shuffles else "decoder.conv_out.weight",
        channels_last=True,
    )


def _tiny(config: Mapping[str, Any]) -> TokenizerInfo:
    """AutoencoderTiny (TAESD): no posterior."""
    factor = 2 ** (len(config["encoder_block_out_channels"]) - 1)
    return TokenizerInfo(factor, config["latent_channels"], config["in_channels"], channels_last=True)


def _asymmetric(config: Mapping[str, Any]) -> TokenizerInfo:
    """AsymmetricAutoencoderKL: an AutoencoderKL with a larger decoder."""
    return _kl({**config, "block_out_channels": config["down_block_out_channels"]})


def _consistency(config: Mapping[str, Any]) -> TokenizerInfo:
    """ConsistencyDecoderVAE: AutoencoderKL's encoder, a consistency model as decoder."""
    return TokenizerInfo(
        factor=2 ** (len(config["encoder_block_out_channels"]) - 1),
        latent_channels=config["latent_channels"],
        image_channels=config["encoder_in_channels"],
        decoder_modules=("decoder_unet",),
        variance_layer="quant_conv",
        channels_last=True,
    )


def _rae(config: Mapping[str, Any]) -> TokenizerInfo:
    """AutoencoderRAE: one size of images, in [0, 1]; its own statistics are inside."""
    side = config["patch_size"] * (config["encoder_input_size"] // config["encoder_patch_size"])
    return TokenizerInfo(
        factor=config["patch_size"],
        latent_channels=config["encoder_hidden_size"],
        image_channels=config["num_channels"],
        decoder_size=(side, side),
        value_range=(0.0, 1.0),
        middle=("decoder.decoder_embed",),
        head=("decoder.decoder_norm", "decoder.decoder_pred"),
        last_layer="decoder.decoder_pred.weight",
        statistics="element",
    )


def correct_positions(tokenizer: Any) -> Any:
    """Put right AutoencoderRAE's fixed positions, which diffusers scales to a grid of 16 x 16; others stay as they are.

    The table is not saved, so this is done after each loading. On 16 x 16 patches nothing changes.
    """
    if type(tokenizer).__name__ == "AutoencoderRAE":
        from latelier.layers import sincos_positions

        table = tokenizer.decoder.decoder_pos_embed  # (1, 1 + n, d), the first for CLS
        side = math.isqrt(table.shape[1] - 1)
        table[:, 1:] = sincos_positions(table.shape[2], (side, side)).to(table)
    return tokenizer


DIFFUSERS: dict[str, Callable[[Mapping[str, Any]], TokenizerInfo]] = {
    "AutoencoderKL": _kl,
    "VQModel": _vq,
    "AutoencoderDC": _dc,
    "AutoencoderTiny": _tiny,
    "AsymmetricAutoencoderKL": _asymmetric,
    "ConsistencyDecoderVAE": _consistency,
    "AutoencoderRAE": _rae,
}
