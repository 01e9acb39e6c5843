"""Official U-Nets of latent diffusion to `latelier.denoisers.unet`, and the class embedding of ImageNet's models.

LDM numbers its blocks in one row; with R residual blocks on each of L levels
    input_blocks    0 is the first convolution, then R blocks and a downsampler for each level
    output_blocks   R + 1 blocks for each level, the last of them followed by an upsampler
A block's members are 0 residual block, 1 attention, and the upsampler after them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from latelier.convert import Converted, class_conditioner, count_blocks, load_exactly, need, rename
from latelier.denoisers.unet import SIZES, CrossAttentionUNet, UNet, architecture
from latelier.errors import LatelierError

UNET = re.compile(r"(time_embed\.[02]|(in|out)put_blocks\.\d+\.\d+|middle_block\.[012]|out\.[02])\..+")
EXPECTED = "time_embed.*, input_blocks.<i>.<j>.*, middle_block.<i>.*, output_blocks.<i>.<j>.*, out.*"
PREFIX = "model.diffusion_model."
EMA = "model_ema."
AVERAGED = f"{EMA}diffusion_model"  # followed by the parameter's name without its dots
CLASSES = "cond_stage_model.embedding.weight"
# What else there is in a checkpoint of the whole system: conditioner, first stage, constants of the schedule.
BESIDE = (
    EMA, "cond_stage_model.", "first_stage_model.",
    "encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.", "loss.",
    "betas", "alphas_cumprod", "sqrt_", "log_one_minus_", "posterior_", "scale_factor", "logvar", "lvlb_weights",
)  # fmt: skip
RULES = {  # transformers have the same names here and there
    "in_layers.0.": "norm1.", "in_layers.2.": "conv1.", "emb_layers.1.": "time_emb_proj.", "out_layers.0.": "norm2.",
    "out_layers.3.": "conv2.", "skip_connection.": "conv_shortcut.", "op.": "conv.", "conv.": "conv.",
}  # fmt: skip
ATTENTION = {"norm.": "group_norm.", "proj_out.": "to_out.0."}
ENDS = {
    "time_embed.0.": "time_embedding.linear_1.", "time_embed.2.": "time_embedding.linear_2.",
    "middle_block.0.": "mid_block.resnets.0.", "middle_block.1.": "mid_block.attentions.0.",
    "middle_block.2.": "mid_block.resnets.1.", "input_blocks.0.0.": "conv_in.",
    "out.0.": "conv_norm_out.", "out.2.": "conv_out.",
}  # fmt: skip


def convert(weights: dict[str, Tensor], config: dict[str, Any]) -> Converted:
    """Build and fill a U-Net, with averaged weights where there are any, from its own checkpoint or the whole system's.

    `config` may have `num_head_channels` or `num_heads` (known for the released models' shapes), `image_size` (of the
    latents), `classes` (of a class embedding, without the null class), and `use_new_attention_order`.
    """
    embedding = weights.get(CLASSES)
    weights = _averaged({name.removeprefix(PREFIX): tensor for name, tensor in weights.items()})
    first, last = (need(weights, name, "LDM U-Net") for name in ("input_blocks.0.0.weight", "out.2.weight"))
    read = _read(weights)
    read |= _heads(read, config)
    cls = CrossAttentionUNet if read["token_width"] else UNet
    sizes = {"in_channels": first.shape[1], "out_channels": last.shape[0], "sample_size": config.get("image_size")}
    model = cls(**architecture(**read), **sizes)
    ours: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        place = _place(name, read["layers"], RULES if read["token_width"] else {**RULES, **ATTENTION})
        if place.endswith(("qkv.weight", "qkv.bias")):
            heads = read.get("heads") or len(tensor) // 3 // read["head_width"]
            ours |= _split(place, tensor, heads, bool(config.get("use_new_attention_order")))
        else:
            is_linear = place.endswith("to_out.0.weight") and tensor.ndim == 3  # a convolution over one position
            ours[place] = tensor.squeeze(-1) if is_linear else tensor
    load_exactly(model, ours)
    # ImageNet's class token: 1000 rows, or 1001 of which the last is the null class (LDM-4 with guidance)
    classes = config.get("classes") or (0 if embedding is None else min(len(embedding), 1000))
    return Converted(model, class_conditioner(embedding, classes, inject="tokens"))


def _averaged(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The U-Net's weights, from the moving average if there is one."""
    ours = {name: tensor for name, tensor in weights.items() if UNET.fullmatch(name)}
    unknown = next((name for name in weights if name not in ours and not name.startswith(BESIDE)), None)
    if unknown is not None:
        raise LatelierError(f"Not a checkpoint of an LDM U-Net: expected {EXPECTED}, but it has {unknown!r}.")
    if not any(name.startswith(AVERAGED) for name in weights):
        return ours
    return {name: need(weights, AVERAGED + name.replace(".", ""), "complete LDM") for name in ours}


def _read(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of `architecture`, all but the heads, off names and shapes."""
    blocks, inputs = count_blocks(weights, "output_blocks."), count_blocks(weights, "input_blocks.")
    plain, residual = (  # the first block with an upsampler of either kind
        next((i for i in range(blocks) if any(f"output_blocks.{i}.{m}.{leaf}.weight" in weights for m in (1, 2))), None)
        for leaf in ("conv", "in_layers.0")
    )
    up = residual if plain is None else plain
    per_level = blocks if up is None else up + 1
    if per_level < 2 or blocks % per_level or inputs != blocks:
        raise LatelierError(
            f"{inputs} input_blocks and {blocks} output_blocks, {per_level} to a level, are no LDM U-Net; expected are "
            "equal numbers of both, a multiple of num_res_blocks + 1."
        )
    levels = [1 + level * per_level for level in range(blocks // per_level)]  # the first block of each
    middle = "middle_block.1.transformer_blocks."
    context = weights.get(f"{middle}0.attn2.to_k.weight")
    convolution = need(weights, "middle_block.0.out_layers.3.bias", "LDM U-Net")
    return {
        "widths": tuple(len(need(weights, f"input_blocks.{i}.0.out_layers.3.bias", "LDM U-Net")) for i in levels),
        "attention": tuple(2**level for level, i in enumerate(levels) if f"input_blocks.{i}.1.norm.weight" in weights),
        "layers": per_level - 1,
        "depth": max(1, count_blocks(weights, middle)),
        "scale_shift": need(weights, "middle_block.0.emb_layers.1.bias", "LDM U-Net").shape != convolution.shape,
        "updown": residual is not None,
        "token_width": 0 if context is None else context.shape[1],
    }


def _heads(read: dict[str, Any], config: dict[str, Any]) -> dict[str, int]:
    """Heads as the configuration says, or those of the released model with these shapes."""
    for theirs, ours in (("num_head_channels", "head_width"), ("num_heads", "heads"), ("heads", "heads")):
        if (config.get(theirs) or -1) > 0:
            return {ours: config[theirs]}
    defaults: dict[str, Any] = {"layers": 2, "depth": 1, "scale_shift": False, "updown": False, "token_width": 0}
    for size in SIZES.values():
        heads: dict[str, int] = {key: size[key] for key in ("heads", "head_width") if key in size}
        if {**defaults, **size} == {**read, **heads}:
            return heads
    raise LatelierError(
        "The number of attention heads cannot be read off a U-Net's weights; give num_head_channels or num_heads."
    )


def _place(name: str, layers: int, rules: dict[str, str]) -> str:
    """Our name of one of LDM's."""
    for old, new in ENDS.items():
        if name.startswith(old):
            return new + rename(name[len(old) :], rules)
    side, index, member, leaf = name.split(".", 3)
    down = side == "input_blocks"
    level, block = divmod(int(index) - down, layers + 1)
    module = f"{'resnets' if member == '0' else 'attentions'}.{block}"
    if down and block == layers:
        module = "downsamplers.0"
    elif not down and member != "0" and leaf.startswith(tuple(RULES)):
        module = "upsamplers.0"
    return f"{'down' if down else 'up'}_blocks.{level}.{module}.{rename(leaf, rules)}"


def _split(place: str, qkv: Tensor, heads: int, new_order: bool) -> dict[str, Tensor]:
    """Query, key and value of one matrix `(3c, c, 1)` or bias `(3c,)`.

    Its rows are usually in the order [head][q, k, v][dim], in the new order [q, k, v][head][dim].
    """
    stem, leaf = place.rsplit("qkv.", 1)
    rows = qkv.squeeze(-1) if qkv.ndim == 3 else qkv
    split = rows.unflatten(0, (3, -1)) if new_order else rows.unflatten(0, (heads, 3, -1)).transpose(0, 1)
    parts = split.reshape(3, len(rows) // 3, *rows.shape[1:])  # (3, c, c) or (3, c)
    return {f"{stem}to_{letter}.{leaf}": part.contiguous() for letter, part in zip("qkv", parts)}
