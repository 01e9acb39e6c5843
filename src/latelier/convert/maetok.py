"""Official MAETok checkpoints, released or from training, to `latelier.tokenizers.maetok.MAETok`."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from latelier.convert import Converted, below, count_blocks, load_exactly, need
from latelier.errors import LatelierError
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.maetok import MAETok
from latelier.tokenizers.maetok_decoder import LatentDecoder

KIND = "MAETok"
# Teachers and heads of the training graph, and a quantiser that other models of that code base have.
NOT_OURS = re.compile(
    r"(repa_model|projection|clip_model|quantize|hog_generator|(decoder|post_quant_conv|to_pixel)_\w+)\."
)
ENCODER = {
    r"^encoder\.latent_tokens$": "latent_queries",
    r"^encoder\.model\.patch_embed\.proj\.": "patch_embed.",
    r"^encoder\.(model\.)?": "",
    r"\.ls([12])\.gamma$": r".scale\1",
    r"^quant_conv\.": "to_latent.",
}
DECODER = {r"^model\.": "", r"\.adaLN_modulation\.1\.": ".modulation."}  # under the decoder's own prefix
# Entries that cannot influence a pixel: a patch embedding, a classifier, how the final norm modulates latents.
INERT = re.compile(r"model\.(patch_embed|norm|head)\.|to_pixel\.")
TABLES = re.compile(r"freqs_t_[xy]$")  # integer grids, which are made anew for any size


def convert(weights: dict[str, Tensor], config: dict[str, Any]) -> Converted:
    """Build and fill a MAETok, with learned rotary frequencies (the paper) or absolute positions.

    `config` may have `heads`, `decoder_heads` (64 channels each by default), `image` (pixels, an integer or `[h, w]`,
    read off the position table of square images), and `vq_mean` and `vq_std`, which become latent statistics.
    """
    channels, latent = need(weights, "post_quant_conv.weight", KIND).shape[1], need(weights, "quant_conv.weight", KIND)
    if len(latent) not in (channels, 2 * channels):
        wanted = f"{channels} or {2 * channels}"
        raise LatelierError(f"A {KIND} has {wanted} channels before the decoder, not {len(latent)}.")
    patch = need(weights, "encoder.model.patch_embed.proj.weight", KIND)
    dim, image_channels, size, _ = patch.shape
    body = _decoder_weights(weights, "decoder", "post_quant_conv")
    decoder_dim = len(body["input.weight"])
    model = MAETok(
        image_size=_image_size(weights, size, config), patch_size=size, in_channels=image_channels,
        latent_tokens=need(weights, "encoder.latent_tokens", KIND).shape[1], latent_channels=channels,
        dim=dim, depth=count_blocks(weights, "encoder.model.blocks."), heads=config.get("heads", dim // 64),
        decoder_dim=decoder_dim, decoder_depth=count_blocks(body, "blocks."),
        decoder_heads=config.get("decoder_heads", config.get("heads", decoder_dim // 64)),
        mlp_ratio=len(need(weights, "encoder.model.blocks.0.mlp.fc1.weight", KIND)) / dim,
        positions="mixed" if "encoder.freqs" in weights else "absolute",
        variational=len(latent) == 2 * channels, decoder_cls_token="cls_token" in body,
    )  # fmt: skip
    elsewhere = ("decoder.", "post_quant_conv.")
    kept = {k: v for k, v in weights.items() if not (k.startswith(elsewhere) or NOT_OURS.match(k) or TABLES.search(k))}
    ours = {_rename(k, ENCODER): v for k, v in kept.items()}
    ours["patch_embed.weight"] = patch.flatten(1)
    ours |= {f"decoder.{name}": tensor for name, tensor in body.items()}
    ours |= {f"head.{part}": need(weights, f"decoder.to_pixel.model.{part}", KIND) for part in ("weight", "bias")}
    load_exactly(model, ours, optional=("mask_token",))  # which is needed in training only
    return Converted(model, codec=_codec(model, config))


def convert_auxiliary(
    weights: dict[str, Tensor], config: dict[str, Any] | None = None
) -> dict[str, tuple[LatentDecoder, nn.Linear]]:
    """The auxiliary decoders of a training checkpoint, by name (`hog`, `dino`, `clip`), each with its linear head.

    `config` may have `aux_heads` (64 channels each by default), and `image` as in `convert`.
    """
    config = config or {}
    size = need(weights, "encoder.model.patch_embed.proj.weight", KIND).shape[-1]
    height, width = _image_size(weights, size, config)
    grid = (height // size, width // size)
    found = (re.match(r"post_quant_conv_(\w+)\.weight$", name) for name in weights)
    converted = {}
    for name in (match[1] for match in found if match):
        ours = _decoder_weights(weights, f"decoder_{name}", f"post_quant_conv_{name}")
        dim, channels = ours["input.weight"].shape
        body = LatentDecoder(
            need(ours, "latent_pos_embed", KIND).shape[1], channels, grid, dim, count_blocks(ours, "blocks."),
            config.get("aux_heads", dim // 64), len(need(ours, "blocks.0.mlp.fc1.weight", KIND)) / dim,
            "mixed" if "freqs" in ours else "absolute", "cls_token" in ours,
        )  # fmt: skip
        load_exactly(body, ours)
        head = {part: need(weights, f"to_pixel_{name}.{part}", KIND) for part in ("weight", "bias")}
        converted[name] = body, nn.Linear(dim, len(head["weight"]))
        load_exactly(converted[name][1], head)
    return converted


def _decoder_weights(weights: dict[str, Tensor], decoder: str, linear: str) -> dict[str, Tensor]:
    """Weights of a `LatentDecoder`: those under the decoder's prefix, and the linear layer before it."""
    inside = below(weights, f"{decoder}.")
    ours = {_rename(k, DECODER): v for k, v in inside.items() if not (INERT.match(k) or TABLES.match(k))}
    if "freqs" in ours:
        ours.pop("pos_embed", None)  # kept there, and not used
    return ours | {f"input.{part}": need(weights, f"{linear}.{part}", KIND) for part in ("weight", "bias")}


def _rename(name: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        name = re.sub(old, new, name)
    return name


def _image_size(weights: dict[str, Tensor], patch: int, config: dict[str, Any]) -> tuple[int, int]:
    patches = need(weights, "encoder.model.pos_embed", KIND).shape[1] - 1  # one position is the CLS token's
    given = config.get("image", math.isqrt(patches) * patch)
    height, width = given if isinstance(given, list | tuple) else (given, given)
    if (height // patch) * (width // patch) != patches:
        raise LatelierError(
            f"The checkpoint has positions for {patches} patches of {patch} pixels, which is not an image of "
            f"{height} x {width}; give its size as image=[h, w]."
        )
    return height, width


def _codec(model: MAETok, config: dict[str, Any]) -> Codec | None:
    """The scalars by which the original's diffusion models normalise latents."""
    if not {"vq_mean", "vq_std"} & set(config):
        return None
    ones = torch.ones(model.config["latent_channels"])
    mean, std = float(config.get("vq_mean", 0.0)), float(config.get("vq_std", 1.0))
    return Codec(model, mean * ones, std * ones, {"source": "vq_mean and vq_std of the original configuration"})
