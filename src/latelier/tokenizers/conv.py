"""Convolutional tokenizers: presets on diffusers' AutoencoderKL, and no tokenizer at all (pixels).

The classes are diffusers' own, so `AutoencoderKL.from_pretrained(run)` opens what is trained here.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from jaxtyping import Float
from torch import Tensor

from latelier.presets import open_init, preset_arguments
from latelier.recipe import ConvRecipe, Data, IdentityRecipe


def _kl(channels: list[int], latent: int, layers: int = 2, **rest) -> dict:
    """Arguments of an AutoencoderKL with one level per entry of `channels`."""
    return {
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "layers_per_block": layers,
        "latent_channels": latent,
        "scaling_factor": 1.0,
        **rest,
    }


_SD3 = {"use_quant_conv": False, "use_post_quant_conv": False, "force_upcast": False}

PRESETS = {
    "kl-f8c4": _kl([128, 256, 512, 512], 4),  # Stable Diffusion 1 and 2
    "kl-f8c16": _kl([128, 256, 512, 512], 16, **_SD3),  # Stable Diffusion 3; the baselines of LDMAE
    "kl-f4c4-small": _kl([32, 64, 128], 4, 1, mid_block_add_attention=False, **_SD3),
    "kl-f8c16-small": _kl([32, 64, 128, 128], 16, 1, mid_block_add_attention=False, **_SD3),
    "kl-f8c16-tiny": _kl([32, 32, 32, 32], 16, 1, mid_block_add_attention=False, **_SD3),
}


class IdentityTokenizer(ModelMixin, ConfigMixin):
    """f = 1: the latents are the pixels, so that every denoiser also runs in pixel space.

    Args:
        in_channels: channels of the images, and so of the latents.
    """

    @register_to_config
    def __init__(self, in_channels: int = 3, latent_channels: int = 3):
        super().__init__()
        self.register_buffer("one", torch.ones(1))  # gives the module a device and its weights file a content

    def encode(self, images: Float[Tensor, "b c h w"]) -> VQEncoderOutput:
        """The images themselves."""
        return VQEncoderOutput(latents=images)

    def decode(self, z: Float[Tensor, "b c h w"]) -> DecoderOutput:
        """The latents themselves."""
        return DecoderOutput(sample=z)


def build(recipe: ConvRecipe, data: Data) -> AutoencoderKL:
    """An AutoencoderKL for these pictures, fresh or from `init`."""
    if recipe.init:
        return open_init(AutoencoderKL, recipe.init)
    arguments = preset_arguments(AutoencoderKL, PRESETS, recipe.preset, recipe.model)
    return AutoencoderKL(**{**arguments, "in_channels": data.channels, "out_channels": data.channels})


def build_identity(recipe: IdentityRecipe, data: Data) -> IdentityTokenizer:
    """Pixel space."""
    return IdentityTokenizer(data.channels, data.channels)
