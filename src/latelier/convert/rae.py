"""RAE's official decoders to `latelier.tokenizers.rae.RAE`, and a RAE to diffusers' `AutoencoderRAE`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderRAE
from torch import Tensor

from latelier.convert import Converted, count_blocks, load_exactly, need, read_checkpoint
from latelier.errors import LatelierError, reading
from latelier.terminal import console
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.diffusers_classes import correct_positions
from latelier.tokenizers.rae import RAE
from latelier.tokenizers.rae_encoder import open_encoder
from latelier.tokenizers.statistics import read_statistics

HEADS = {768: 12, 1024: 16, 1152: 16}  # of the released sizes, by width
TYPES = {"dinov2_with_registers": "dinov2", "vit_mae": "mae", "siglip_vision_model": "siglip2"}  # diffusers' names
ASIDE = ("layernorm.", "post_layernorm.", "vision_model.post_layernorm.", "pooler.", "head.")  # they drop, or never use
EPSILON = 1e-5  # of the original, in sqrt(var + e); diffusers divides by std + e
BASE = 16  # the only grid for which diffusers' table of positions is right


def convert(weights: dict[str, Tensor], config: dict[str, Any]) -> Converted:
    """Build and fill a RAE.

    `config`: `encoder` (as in a recipe, its weights are not in the file), `stat` (file of the latents' `mean` and
    `var`), `heads`, `image` if no position table is stored.
    """
    dim, _ = need(weights, "decoder_embed.weight", "RAE").shape
    if "encoder" not in config:
        raise LatelierError(
            "A RAE checkpoint holds the decoder only; name its encoder, such as "
            "--set encoder=facebook/dinov2-with-registers-base."
        )
    heads = config.get("heads", HEADS.get(dim))
    if heads is None:
        raise LatelierError(
            f"A decoder of width {dim} is of no released size; give its number of heads (--set heads=)."
        )
    encoder, own = open_encoder(str(config["encoder"]))
    patch = math.isqrt(need(weights, "decoder_pred.weight", "RAE").shape[0] // len(encoder["mean"]))
    table = weights.get("decoder_pos_embed")
    side = config.get("image", 256) if table is None else math.isqrt(table.shape[1] - 1) * patch
    hidden = need(weights, "decoder_layers.0.intermediate.dense.weight", "RAE").shape[0]
    model = RAE(
        encoder, (side, side), patch, decoder_dim=dim, decoder_depth=count_blocks(weights, "decoder_layers."),
        decoder_heads=heads, decoder_hidden=hidden,
    )  # fmt: skip
    model.encoder.load_state_dict(own)
    load_exactly(model.decoder, decoder_weights(weights))
    model.eval()
    if "stat" not in config:
        return Converted(model)
    path = Path(str(config["stat"]))
    moments = read_checkpoint(path)
    with reading(f"{path} holds no statistics of these latents", "give the file stat.pt that belongs to the decoder"):
        std = (moments["var"].double() + EPSILON).sqrt().float()
        mean, std = read_statistics({"mean": moments["mean"], "std": std}, model.info.latent_shape(side, side))
    return Converted(model, codec=Codec(model, mean, std, {"source": path.name}))


def decoder_names(depth: int, diffusers: bool = False) -> dict[str, list[str]]:
    """`RAEDecoder`'s names to the original's, or diffusers'; ours has queries, keys and values in one tensor."""
    attention = "attention" if diffusers else "attention.attention"
    qkv = ("to_q", "to_k", "to_v") if diffusers else ("query", "key", "value")
    blocks = {
        "attn.qkv": [f"{attention}.{part}" for part in qkv],
        "attn.proj": ["attention.to_out.0" if diffusers else "attention.output.dense"],
        "mlp.fc1": ["intermediate.dense"], "mlp.fc2": ["output.dense"],
        "norm1": ["layernorm_before"], "norm2": ["layernorm_after"],
    }  # fmt: skip
    layers = {"embed": ["decoder_embed"], "norm": ["decoder_norm"], "head": ["decoder_pred"]}
    for i in range(depth):
        layers |= {f"blocks.{i}.{k}": [f"decoder_layers.{i}.{name}" for name in v] for k, v in blocks.items()}
    names = {f"{k}.{part}": [f"{name}.{part}" for name in v] for k, v in layers.items() for part in ("weight", "bias")}
    return {"cls_token": ["trainable_cls_token"], **names}


def decoder_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The original's tensors by the names of `RAEDecoder`; unknown ones keep theirs, fixed positions are dropped."""
    names = decoder_names(count_blocks(weights, "decoder_layers."))
    known = {"decoder_pos_embed", *(name for parts in names.values() for name in parts)}
    ours = {new: torch.cat([need(weights, name, "RAE") for name in parts]) for new, parts in names.items()}
    return ours | {name: tensor for name, tensor in weights.items() if name not in known}


def to_diffusers(codec: Codec) -> AutoencoderRAE:
    """A RAE and its latent statistics as diffusers' `AutoencoderRAE`, which takes and makes images in [0, 1].

    Raises:
        LatelierError: if it is no RAE, or its encoder or its layers are not among those of that class.
    """
    model, advice = codec.tokenizer, "keep it as a tokenizer of latelier"
    if not isinstance(model, RAE):
        raise LatelierError(f"{type(model).__name__} is no RAE, so it is no AutoencoderRAE; {advice}.")
    config, encoder = model.config, model.config["encoder_config"]
    kind = TYPES.get(encoder["config"].get("model_type", ""))
    depth = model.encoder.depth if kind else 0
    if kind is None or config["affine"] or config["layers"] not in (1, [depth]) or len(set(model.grid)) > 1:
        raise LatelierError(
            f"AutoencoderRAE has DINOv2 with registers, MAE and SigLIP2, their last layer, without gains, on square "
            f"images; {encoder['name']} with layers = {config['layers']} is another, so {advice}."
        )
    sizes = {key: config[f"decoder_{old}"] for key, old in (("hidden_size", "dim"), ("num_hidden_layers", "depth"),
             ("num_attention_heads", "heads"), ("intermediate_size", "hidden"))}  # fmt: skip
    grid, shape = model.grid[0], (-1, 1, 1)
    statistics: dict[str, Any] = {}
    if codec.mean is not None and codec.std is not None:
        mean, std = (t if t.ndim > 1 else t.view(shape) for t in (codec.mean, codec.std))
        statistics = {"latents_mean": mean.cpu(), "latents_std": std.cpu() - EPSILON}
    with reading(f"{encoder['name']} cannot be saved as AutoencoderRAE", advice):
        other = AutoencoderRAE(
            encoder_type=kind, encoder_hidden_size=encoder["dim"], encoder_patch_size=encoder["patch"],
            encoder_num_hidden_layers=depth, **{f"decoder_{key}": value for key, value in sizes.items()},
            patch_size=config["patch_size"], encoder_input_size=grid * encoder["patch"],
            encoder_norm_mean=encoder["mean"], encoder_norm_std=encoder["std"], **statistics,
        )  # fmt: skip
        _check_same(model.encoder.model.config, other.encoder.config)
        kept = {k: v for k, v in model.encoder.model.state_dict().items() if not k.startswith(ASIDE)}
        load_exactly(other.encoder, kept, tuple(k for k in other.encoder.state_dict() if k.startswith(ASIDE)))
        own, names = model.decoder.state_dict(), decoder_names(config["decoder_depth"], diffusers=True)
        parts = ((theirs, own[name].chunk(len(theirs))) for name, theirs in names.items())
        load_exactly(other.decoder, {name: part for theirs, chunks in parts for name, part in zip(theirs, chunks)})
    if grid != BASE:
        console.print(f"diffusers decodes a grid of {grid} x {grid} with wrong positions; only latelier corrects them.")
    return correct_positions(other.eval())


def _check_same(ours: Any, theirs: Any) -> None:
    """Refuse an encoder that computes something else from the same weights."""
    for key in ("num_attention_heads", "hidden_act", "layer_norm_eps", "use_swiglu_ffn", "num_register_tokens"):
        have, want = (getattr(config, key, None) for config in (ours, theirs))
        if have != want:
            raise LatelierError(f"its encoder has {key} = {have}, and diffusers' {want}")
