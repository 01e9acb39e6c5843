"""A whole official latent diffusion checkpoint (`model.ckpt`) to a pipeline that samples.

first_stage_model.*             the autoencoder, KL or VQ by what it has
model.diffusion_model.*         the U-Net; its averages `model_ema.*` are taken where there are any
cond_stage_model.*              class embedding, text or layout transformer, rescaler of label maps
betas, scale_factor             the noise schedule, and what latents were multiplied by
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from latelier.conditioning.spatial import InpaintingConditioner, LowResolutionConditioner, SegmentationConditioner
from latelier.convert import Converted, below, load_exactly, need
from latelier.convert.ldm_autoencoder import convert_kl, convert_vq
from latelier.convert.ldm_text import layout_conditioner, text_conditioner
from latelier.convert.ldm_unet import convert as convert_unet
from latelier.errors import LatelierError
from latelier.pipeline import LatentDiffusionPipeline
from latelier.tokenizers.codec import Codec

FIRST, STAGE = "first_stage_model.", "cond_stage_model."


def convert(weights: dict[str, Tensor], config: dict[str, Any]) -> Converted:
    """Build the pipeline.

    Args:
        weights: original names, prefixes included.
        config: what the shapes do not tell: `heads` or `num_head_channels` of the U-Net, `image_size` of the latents;
            `vocabulary`, the folder or Hub name of the text tokenizer; `box_names`, the classes of layouts; `betas`, a
            pair of the schedule's ends, and `scale_factor`, if the checkpoint lacks them.
    """
    from latelier.diffusion.process import DDPM

    unet = convert_unet(weights, config)
    first = below(weights, FIRST)
    if not first:
        raise LatelierError(
            "This checkpoint has a U-Net but no autoencoder (keys that begin with first_stage_model.); "
            "convert it as ldm-unet, and the autoencoder's own checkpoint as ldm-kl or ldm-vq."
        )
    tokenizer = (convert_vq if "quantize.embedding.weight" in first else convert_kl)(first, config).model
    conditioner = unet.conditioner or _conditioner(weights, config, Codec(tokenizer).factor)
    if conditioner is None:
        conditioner = _concatenated(unet.model, tokenizer)
    start, end = _betas(weights, config)
    process = DDPM("scaled_linear", start, end)
    codec = _codec(tokenizer, weights, config)
    side = config.get("image_size", 64) * codec.factor
    pipeline = LatentDiffusionPipeline.build(
        codec, unet.model, conditioner, process, (side, side), _dropped(conditioner)
    )
    return Converted(unet.model, conditioner, pipeline)


def _codec(tokenizer: ModelMixin, weights: dict[str, Tensor], config: dict[str, Any]) -> Codec:
    """z times `scale_factor` is what the U-Net saw: a standard deviation of its inverse, and a mean of zero."""
    stored = weights.get("scale_factor")
    factor = float(stored) if stored is not None else config.get("scale_factor", 1.0)
    channels = tokenizer.config["latent_channels"]  # type: ignore[index]
    return Codec(tokenizer, torch.zeros(channels), torch.full((channels,), 1 / factor))


def _betas(weights: dict[str, Tensor], config: dict[str, Any]) -> tuple[float, float]:
    """Both ends of the schedule."""
    if "betas" in config:
        return float(config["betas"][0]), float(config["betas"][1])
    betas = need(weights, "betas", "latent diffusion")
    return round(float(betas[0]), 6), round(float(betas[-1]), 6)


def _conditioner(weights: dict[str, Tensor], config: dict[str, Any], factor: int) -> ModelMixin | None:
    """What belongs to the keys under `cond_stage_model.`; the class embedding is the U-Net converter's."""
    if f"{STAGE}transformer.token_emb.weight" in weights:
        if "box_names" in config:
            return layout_conditioner(weights, config["box_names"])
        if "vocabulary" in config:
            return text_conditioner(weights, config["vocabulary"])
        raise LatelierError(
            "The checkpoint's transformer reads tokens whose meaning it does not hold: give vocabulary=<folder or Hub "
            "name of bert-base-uncased> for a text model, or box_names=[...] for a layout model."
        )
    kernel = weights.get(f"{STAGE}channel_mapper.weight")  # (channels, classes, 1, 1)
    if kernel is None:
        return None
    conditioner = SegmentationConditioner(kernel.shape[1], kernel.shape[0], factor)
    load_exactly(conditioner, {"projection.weight": kernel})
    return conditioner


def _concatenated(unet: ModelMixin, tokenizer: ModelMixin) -> ModelMixin | None:
    """Inpainting and super-resolution learn nothing beside the U-Net; its further channels tell which it is."""
    channels = unet.config["in_channels"] - unet.config["out_channels"]  # type: ignore[index]
    latent, image = (tokenizer.config[key] for key in ("latent_channels", "in_channels"))  # type: ignore[index]
    if channels == latent + 1:  # masked latents and mask
        return InpaintingConditioner("thick", latent, image)
    if channels == image:  # a small image at the size of the latents
        factor = Codec(tokenizer).factor
        return LowResolutionConditioner(factor, "bsrgan-light", image, factor)
    if channels:
        raise LatelierError(
            f"The U-Net takes {channels} channels beside {latent} of latents, which is neither a small image "
            f"({image}) nor masked latents and mask ({latent + 1}); convert it as ldm-unet."
        )
    return None


def _dropped(conditioner: ModelMixin | None) -> list[str]:
    """Class and text models of latent diffusion can be guided: they know the null class or the empty caption."""
    input_name = getattr(conditioner, "input_name", None)
    if input_name == "classes":
        return ["classes"] if conditioner.config["null"] else []  # type: ignore[union-attr, index]
    return ["prompts"] if input_name == "prompts" else []
