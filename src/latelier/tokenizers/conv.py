"""Convolutional tokenizers: presets on diffusers' AutoencoderKL and VQModel, and no tokenizer at all (pixels).

The classes are diffusers' own, so `AutoencoderKL.from_pretrained(run)` opens what is trained here. A preset whose name
begins with `vq` is a VQModel: its latents are continuous, and its decoder begins with the nearest code.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin, VQModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from jaxtyping import Float
from torch import Tensor

from latelier.errors import LatelierError
from latelier.presets import open_init, preset_arguments
from latelier.recipe import ConvRecipe, Data, IdentityRecipe

IMAGE = 256  # pixels; LDM counts the resolutions that have attention from here


def _kl(channels: list[int], latent: int, layers: int = 2, attention: tuple[int, ...] = (), **rest) -> dict:
    """Arguments of an AutoencoderKL with one level per entry of `channels`, each half as high and wide as the last.

    Args:
        channels: width of each level.
        latent: channels of the latents.
        layers: residual blocks of each level; the decoder has one more.
        attention: sides, for images of 256 pixels, of the levels with attention after each block.
        rest: further arguments.
    """
    attends = [IMAGE >> level in attention for level in range(len(channels))]
    return {
        "block_out_channels": channels,
        "down_block_types": [f"{'Attn' * a}DownEncoderBlock2D" for a in attends],
        "up_block_types": [f"{'Attn' * a}UpDecoderBlock2D" for a in reversed(attends)],
        "layers_per_block": layers,
        "latent_channels": latent,
        "scaling_factor": 1.0,
        **rest,
    }


def _vq(channels: list[int], latent: int, codes: int, **rest) -> dict:
    """The same for a VQModel with so many codes."""
    return _kl(channels, latent, num_vq_embeddings=codes, **rest)


_SD3: dict[str, Any] = {"use_quant_conv": False, "use_post_quant_conv": False, "force_upcast": False}
_LIGHT: dict[str, Any] = {"layers": 1, "mid_block_add_attention": False}  # for two cores of a CPU
_KL_LIGHT = {**_LIGHT, **_SD3}
# Groups of four channels or more; a group of one normalises each channel by itself, and so drops its mean.
_GROUPS: dict[str, Any] = {"norm_num_groups": 8}
_F16 = [128, 128, 256, 256, 512]
_KL_F8 = _kl([128, 256, 512, 512], 4)

PRESETS = {
    # LDM (Rombach et al. 2022), table 8 and the released configurations. Nothing was released for f = 2: the latents
    # are the paper's, the widths go on from those of f = 4.
    "kl-f2": _kl([128, 256], 2),
    "kl-f4": _kl([128, 256, 512], 3),
    "kl-f8": _KL_F8,
    "kl-f16": _kl(_F16, 16, attention=(16,)),
    "kl-f32": _kl([*_F16, 512], 64, attention=(16, 8)),
    "vq-f2": _vq([128, 256], 2, 2048),
    "vq-f2-n64": _vq([128, 256], 2, 64),
    "vq-f4": _vq([128, 256, 512], 3, 8192),
    "vq-f4-noattn": _vq([128, 256, 512], 3, 8192, mid_block_add_attention=False),
    "vq-f8": _vq([128, 256, 256, 512], 4, 16384, attention=(32,)),
    "vq-f8-n256": _vq([128, 256, 256, 512], 4, 256, attention=(32,)),
    "vq-f16": _vq(_F16, 8, 16384, attention=(16,)),
    "kl-f8c4": _KL_F8,  # as Stable Diffusion 1 and 2 know it
    "kl-f8c16": _kl([128, 256, 512, 512], 16, **_SD3),  # Stable Diffusion 3; the baselines of LDMAE
    "kl-f4c4-small": _kl([32, 64, 128], 4, **_KL_LIGHT),
    "kl-f8c16-small": _kl([32, 64, 128, 128], 16, **_KL_LIGHT),
    "kl-f8c16-tiny": _kl([32, 32, 32, 32], 16, **_KL_LIGHT),
    "kl-f2-small": _kl([32, 64], 2, **{**_KL_LIGHT, **_GROUPS, "layers": 2}),
    "kl-f4-small": _kl([32, 64, 128], 3, **_KL_LIGHT, **_GROUPS),
    "kl-f8-small": _kl([32, 64, 128, 128], 4, **_KL_LIGHT, **_GROUPS),
    "kl-f16-small": _kl([32, 64, 128, 128, 128], 16, **_KL_LIGHT, **_GROUPS),
    "vq-f4-small": _vq([32, 64, 128], 3, 512, **_LIGHT, **_GROUPS),
    "vq-f8-small": _vq([32, 64, 128, 128], 4, 512, **_LIGHT, **_GROUPS),
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


def build(recipe: ConvRecipe, data: Data) -> AutoencoderKL | VQModel:
    """An autoencoder for these images, fresh or from `init`.

    Raises:
        LatelierError: for an unknown preset or argument, or as many widths as there are no levels.
    """
    model = VQModel if recipe.quantised else AutoencoderKL
    if recipe.init:
        return open_init(model, recipe.init)
    arguments = preset_arguments(model, PRESETS, recipe.preset, recipe.model)
    levels, widths = len(arguments["down_block_types"]), len(arguments["block_out_channels"])
    if not levels == widths == len(arguments["up_block_types"]):
        raise LatelierError(
            f"tokenizer.model.block_out_channels has {widths} entries, but {recipe.preset} has {levels} levels; "
            "give as many, or down_block_types and up_block_types as well."
        )
    return model(**{**arguments, "in_channels": data.channels, "out_channels": data.channels})


def build_identity(recipe: IdentityRecipe, data: Data) -> IdentityTokenizer:
    """Pixel space."""
    return IdentityTokenizer(data.channels, data.channels)
