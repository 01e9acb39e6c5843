"""Official DC-AE 1.0, 1.1, 1.5 and SANA autoencoders to diffusers' `AutoencoderDC`.

Everything is read off names and shapes. In both, queries, keys and values lie interleaved by head, `[q | k | v]` of 32
rows each: what diffusers calls `to_q`, `to_k` and `to_v` are the thirds of that, not the queries, keys and values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from diffusers import AutoencoderDC
from torch import Tensor

from latelier.convert import Converted, below, count_blocks, load_exactly, need, rename
from latelier.errors import LatelierError

HEAD_WIDTH = 32
RENAMED = {
    "main.conv1.conv.": "conv1.",
    "main.conv2.conv.": "conv2.",
    "main.conv2.norm.": "norm.",
    "main.conv.conv.": "conv.",  # down- and upsampling by shuffled pixels
    "main.conv.": "conv.",
    "context_module.main.proj.conv.": "attn.to_out.",
    "context_module.main.proj.norm.": "attn.norm_out.",
    "local_module.main.inverted_conv.conv.": "conv_out.conv_inverted.",
    "local_module.main.depth_conv.conv.": "conv_out.conv_depth.",
    "local_module.main.point_conv.conv.": "conv_out.conv_point.",
    "local_module.main.point_conv.norm.": "conv_out.norm.",
}
ENDS = {
    "encoder.project_in.conv.conv.": "encoder.conv_in.conv.",
    "encoder.project_in.conv.": "encoder.conv_in.",
    **dict.fromkeys((f"encoder.project_out.{main}op_list.0.conv." for main in ("main.", "")), "encoder.conv_out."),
    **dict.fromkeys((f"decoder.project_in.{main}conv." for main in ("main.", "")), "decoder.conv_in."),
    "decoder.project_out.op_list.0.": "decoder.norm_out.",
    "decoder.project_out.op_list.2.conv.conv.": "decoder.conv_out.conv.",
    "decoder.project_out.op_list.2.conv.": "decoder.conv_out.",
}
AGGREGATION = re.compile(r"context_module\.main\.aggreg\.(\d+)\.([01])\.weight")


def convert(weights: dict[str, Tensor], config: dict[str, Any]) -> Converted:
    """Build and fill an AutoencoderDC; nothing is read from `config`."""
    need(weights, "decoder.project_out.op_list.0.weight", "DC-AE")
    model = AutoencoderDC(**architecture(weights))
    load_exactly(model, {k: v for name, tensor in weights.items() for k, v in _renamed(name, tensor).items()})
    return Converted(model)


def architecture(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments, off names and shapes."""
    sides = {side: _levels(weights, side) for side in ("encoder", "decoder")}
    keys = {"block_out_channels": "width", "layers_per_block": "layers", "block_types": "block"}
    keys |= {"qkv_multiscales": "scales"}
    out = "encoder.project_out.main.op_list.0.conv.weight"
    first = "encoder.project_in.conv.conv.weight"  # of the models that shuffle pixels
    plain = all(level["block"] == "ResBlock" for levels in sides.values() for level in levels)
    batch = [level["batch"] for level in sides["decoder"]]
    latent = next(weights[name] for name in (out, "encoder.project_out.op_list.0.conv.weight") if name in weights)
    return {
        **{f"{s}_{k}": tuple(level[v] for level in levels) for s, levels in sides.items() for k, v in keys.items()},
        "in_channels": need(weights, first if first in weights else "encoder.project_in.conv.weight", "DC-AE").shape[1],
        "latent_channels": latent.shape[0],
        "attention_head_dim": HEAD_WIDTH,
        "encoder_out_shortcut": out in weights,
        "decoder_in_shortcut": "decoder.project_in.main.conv.weight" in weights,
        "downsample_block_type": "pixel_unshuffle" if _shuffles(weights, "encoder") else "conv",
        "upsample_block_type": "pixel_shuffle" if _shuffles(weights, "decoder") else "interpolate",
        "decoder_norm_types": tuple("batch_norm" if b else "rms_norm" for b in batch),
        "decoder_act_fns": tuple("relu" if b else "silu" for b in batch),
        "decoder_conv_act_fn": "silu" if plain else "relu",
    }


def _shuffles(weights: Mapping[str, Tensor], side: str) -> bool:
    """Whether pixels are shuffled into channels: sampling convolutions then have a quarter or four times the width."""
    for name, tensor in weights.items():
        if found := re.match(rf"{side}\.stages\.(\d+)\.op_list\.\d+\.main\.conv\.(conv\.)?weight", name):
            return tensor.shape[0] != _width(weights, side, int(found[1]) + (side == "encoder"))
    raise LatelierError(f"This is not a DC-AE checkpoint: its {side} has no 'stages.1.op_list.0.main.conv...'.")


def _levels(weights: Mapping[str, Tensor], side: str) -> list[dict[str, Any]]:
    """Width, number and kind of blocks of each level, the finest first."""
    if not (number := count_blocks(weights, f"{side}.stages.")):
        raise LatelierError(f"This is not a DC-AE checkpoint: it has no '{side}.stages.1.op_list.0...'.")
    levels: list[dict[str, Any]] = []
    for i in range(number):
        inside = below(weights, f"{side}.stages.{i}.op_list.")
        blocks = {name.split(".")[0] for name in inside if ".conv1." in name or ".local_module." in name}
        attentive = any("context_module" in name for name in inside)
        scales = {m[1]: w.shape[-1] for name, w in inside.items() if (m := AGGREGATION.search(name)) and m[2] == "0"}
        levels.append({
            "width": _width(weights, side, i), "layers": len(blocks),
            "block": "EfficientViTBlock" if attentive else "ResBlock", "scales": tuple(scales.values()),
            "batch": any("running_mean" in name for name in inside),
        })  # fmt: skip
    if not levels[0]["layers"]:  # without blocks no weights tell; so it is in all released models
        levels[0] |= {"width": levels[1]["width"] // 2, "batch": levels[1]["batch"]}
    return levels


def _width(weights: Mapping[str, Tensor], side: str, level: int) -> int:
    """Channels of a level, off its first block."""
    block = r"(main\.conv1|local_module\.main\.inverted_conv)\.conv\.weight"
    pattern = rf"{side}\.stages\.{level}\.op_list\.\d+\.{block}"
    return next((tensor.shape[1] for name, tensor in weights.items() if re.fullmatch(pattern, name)), 0)


def _renamed(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One original tensor as diffusers' one, or as queries, keys and values."""
    found = re.fullmatch(r"(encoder|decoder)\.stages\.(\d+)\.op_list\.(\d+)\.(.*)", name)
    if not found:
        return {rename(name, ENDS): tensor}
    blocks = "down_blocks" if found[1] == "encoder" else "up_blocks"
    prefix, rest = f"{found[1]}.{blocks}.{found[2]}.{found[3]}.", found[4]
    if rest == "context_module.main.qkv.conv.weight":
        return {f"{prefix}attn.to_{x}.weight": third for x, third in zip("qkv", tensor[:, :, 0, 0].chunk(3))}
    if aggregation := AGGREGATION.fullmatch(rest):
        layer = "proj_out" if aggregation[2] == "1" else "proj_in"
        return {f"{prefix}attn.to_qkv_multiscale.{aggregation[1]}.{layer}.weight": tensor}
    if rest == "context_module.main.proj.conv.weight":
        return {f"{prefix}attn.to_out.weight": tensor[:, :, 0, 0]}
    return {prefix + rename(rest, RENAMED): tensor}
