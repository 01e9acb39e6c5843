"""LDM's and taming-transformers' autoencoders to diffusers' AutoencoderKL and VQModel, and their discriminator to ours.

The architecture is read off names and shapes: widths, blocks of each level, which levels have attention, the codebook.
"""

from __future__ import annotations

import re
from typing import Any

from diffusers import AutoencoderKL, VQModel
from torch import Tensor

from latelier.convert import Converted, below, count_blocks, load_exactly, need
from latelier.errors import LatelierError
from latelier.losses.adversarial import PatchGAN

NOT_OURS = "loss."  # LPIPS, the discriminator and a log-variance were sub-modules of the training model
RENAMED = (  # decoder.up counts from the images there, from the latents here: `_rename` turns it round first
    (r"\.(down|up)\.(\d+)\.block\.", r".\1_blocks.\2.resnets."),
    (r"\.(down|up)\.(\d+)\.attn\.", r".\1_blocks.\2.attentions."),
    (r"\.(down|up)\.(\d+)\.(down|up)sample\.", r".\1_blocks.\2.\3samplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"\.proj_out\.", ".to_out.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
)
EXPECTED = (
    "{encoder,decoder}.{conv_in,norm_out,conv_out}, {encoder.down,decoder.up}.N.block.N.{norm1,conv1,norm2,conv2,"
    "nin_shortcut}, .N.attn.N.{norm,q,k,v,proj_out}, .N.{downsample,upsample}.conv, .mid.{block_1,attn_1,block_2}, "
    "quant_conv, post_quant_conv and, with a codebook, quantize.embedding"
)


def convert_kl(weights: dict[str, Tensor], config: dict[str, Any]) -> Converted:
    """Build and fill an AutoencoderKL, also one without 1 x 1 convolutions around the latents (Stable Diffusion 3).

    `config` may have `resolution`, the side of the images it was trained on.
    """
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith(NOT_OURS)}
    if "quantize.embedding.weight" in weights:
        raise LatelierError("This autoencoder has a codebook (quantize.embedding.weight): its kind is ldm-vq.")
    arguments = _architecture(weights, config, "ldm-kl")
    latent = arguments["latent_channels"]
    need(weights, "encoder.conv_out.weight", "ldm-kl")
    widths = {"encoder.conv_out.weight": 2, "quant_conv.weight": 2, "post_quant_conv.weight": 1}
    if any(len(weights[name]) != width * latent for name, width in widths.items() if name in weights):
        raise LatelierError(
            f"AutoencoderKL has as many channels before as after quant_conv, {latent} here (z_channels of "
            "decoder.conv_in), and twice as many at encoder.conv_out; this checkpoint does not."
        )
    arguments |= {f"use_{name}": f"{name}.weight" in weights for name in ("quant_conv", "post_quant_conv")}
    return _filled(AutoencoderKL(**arguments), weights)


def convert_vq(weights: dict[str, Tensor], config: dict[str, Any]) -> Converted:
    """Build and fill a VQModel; see `convert_kl`."""
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith(NOT_OURS)}
    codes, width = need(weights, "quantize.embedding.weight", "ldm-vq").shape
    arguments = _architecture(weights, config, "ldm-vq")
    return _filled(VQModel(**arguments, num_vq_embeddings=codes, vq_embed_dim=width), weights)


def convert_patchgan(weights: dict[str, Tensor], config: dict[str, Any]) -> Converted:
    """A PatchGAN with batch norm, from its own checkpoint or out of an autoencoder's (`loss.discriminator.`)."""
    weights = below(weights, "loss.discriminator.") or weights
    first = need(weights, "main.0.weight", "patchgan")
    last = count_blocks(weights, "main.") - 1
    if last < 5 or (last - 2) % 3 or weights.get(f"main.{last}.weight", first).shape[0] != 1:
        raise LatelierError(
            f"This is not a patchgan checkpoint: its last layer is main.{last}; expected is a convolution to one "
            "channel at main.8 for two strided layers with batch norm, main.11 for three."
        )
    model = PatchGAN(first.shape[1], first.shape[0], layers=(last - 2) // 3, norm="batch")
    ours = {re.sub(r"^main\.", "body.", n.replace(f"main.{last}.", "head.")): w for n, w in weights.items()}
    load_exactly(model, ours)
    return Converted(model)


def _architecture(weights: dict[str, Tensor], config: dict[str, Any], kind: str) -> dict[str, Any]:
    """What both classes take."""
    need(weights, "encoder.down.0.block.0.conv1.weight", kind)
    levels = count_blocks(weights, "encoder.down.")
    widths = [need(weights, f"encoder.down.{level}.block.0.conv1.weight", kind).shape[0] for level in range(levels)]
    halves = (("encoder", "down", "Down", range(levels)), ("decoder", "up", "Up", reversed(range(levels))))
    types = {}
    for half, way, title, order in halves:
        attentive = [f"{half}.{way}.{level}.attn.0.norm.weight" in weights for level in order]
        types[f"{way}_block_types"] = tuple(f"{'Attn' * a}{title}{half.title()}Block2D" for a in attentive)
    return {
        "in_channels": need(weights, "encoder.conv_in.weight", kind).shape[1],
        "out_channels": need(weights, "decoder.conv_out.weight", kind).shape[0],
        "block_out_channels": tuple(widths),
        "layers_per_block": count_blocks(weights, "encoder.down.0.block."),
        "latent_channels": need(weights, "decoder.conv_in.weight", kind).shape[1],
        "mid_block_add_attention": "encoder.mid.attn_1.norm.weight" in weights,
        "sample_size": config.get("resolution", 256),
        "scaling_factor": 1.0,
        **types,
    }


def _filled(model: AutoencoderKL | VQModel, weights: dict[str, Tensor]) -> Converted:
    levels, known = len(model.config["block_out_channels"]), model.state_dict().keys()
    ours = {}
    for name, tensor in weights.items():
        if (new := _rename(name, levels)) not in known:
            raise LatelierError(f"{name!r} has no place in {type(model).__name__}; expected are {EXPECTED}.")
        # What is a matrix here may be a 1 x 1 convolution there.
        ours[new] = tensor.flatten(1) if re.search(r"\.to_(q|k|v|out\.0)\.weight$", new) else tensor
    load_exactly(model, ours)
    return Converted(model)


def _rename(name: str, levels: int) -> str:
    name = re.sub(r"^decoder\.up\.(\d+)", lambda up: f"decoder.up.{levels - 1 - int(up[1])}", name)
    for old, new in RENAMED:
        name = re.sub(old, new, name)
    return name
