"""Official SiT, LightningDiT, MAETok-SiT, U-ViT and USiT checkpoints to `DiT` or `UViT`, and a class conditioner.

SiT, LightningDiT and USiT run time from noise (0) to data (1) and predict data - noise; `reversed_time` turns both, so
the converted model speaks our convention while the weights stay as they are.
"""

from __future__ import annotations

import math
import re
from typing import Any

from torch import Tensor

from latelier.convert import Converted, class_conditioner, count_blocks, load_exactly, need, rename
from latelier.denoisers.ddt import DDT, HEAD
from latelier.denoisers.dit import SWITCHES, DiT
from latelier.denoisers.uvit import UViT
from latelier.errors import LatelierError

RENAMED = {
    "x_embedder.proj.": "x_embed.", "x_embedder.": "x_embed.",
    "t_embedder.mlp.0.": "t_embed.fc1.", "t_embedder.mlp.2.": "t_embed.fc2.",
    "final_layer.adaLN_modulation.1.": "modulation.", "final_layer.norm_final.": "final_norm.",
    "final_layer.linear.": "head.",
}  # fmt: skip
FIXED = ("pos_embed", "feat_rope.")  # computed by the constructor
DDT_FIXED = ("pos_embed", "enc_feat_rope.", "dec_feat_rope.")
DDT_RENAMED = {
    "s_embedder.proj.": "s_embed.", "s_projector.": "s_project.", "t_embedder.W": "t_embed.frequencies", **RENAMED,
}  # fmt: skip
UVIT_RENAMED = {"patch_embed.proj.": "x_embed.", "decoder_pred.": "head."}


def convert_sit(weights: dict[str, Tensor], config: dict[str, Any]) -> Converted:
    """SiT (Ma et al. 2024)."""
    return _convert(weights, config, {**SWITCHES["sit"], "reversed_time": True})


def convert_maetok_sit(weights: dict[str, Tensor], config: dict[str, Any]) -> Converted:
    """The 1-D SiT of MAETok, whose time already runs from data to noise."""
    return _convert(weights, config, SWITCHES["sit"])


def convert_dcae_sit(weights: dict[str, Tensor], config: dict[str, Any]) -> Converted:
    """DC-AE's SiT, whose position table comes from the file: its constructor leaves zeros, unlike SiT's own."""
    table = weights.pop("pos_embed", None)
    if table is not None:
        config = {**config, "input": math.isqrt(table.shape[1])}  # its patches are single latents
    converted = _convert(weights, config, {**SWITCHES["sit"], "reversed_time": True, "own_positions": True})
    if table is not None:
        converted.model.pos_embed.copy_(table)
    return converted


def convert_lightning_dit(weights: dict[str, Tensor], config: dict[str, Any]) -> Converted:
    """LightningDiT (Yao et al. 2025)."""
    switches = {**SWITCHES["lightning-dit"], "qk_norm": "blocks.0.attn.q_norm.weight" in weights}
    return _convert(weights, config, {**switches, "reversed_time": True})


def convert_dit_dh(weights: dict[str, Tensor], config: dict[str, Any]) -> Converted:
    """DiT-DH of RAE (Zheng et al. 2025), whose blocks are numbered through: those of the head come last.

    `num_heads` of transformer and head, if they are not those of the released models.
    """
    embed = need(weights, "s_embedder.proj.weight", "DiT-DH")  # (d, c, p, p)
    wide = need(weights, "x_embedder.proj.weight", "DiT-DH")  # (e, c, p, p)
    (dim, channels, patch, _), decoder_dim = embed.shape, wide.shape[0]
    if wide.shape[2] != patch:
        raise LatelierError(
            f"This DiT-DH has patches of {patch} and of {wide.shape[2]} in its head; one size is known."
        )
    blocks = count_blocks(weights, "blocks.")
    depth = sum(len(weights[f"blocks.{i}.norm1.weight"]) == dim for i in range(blocks))
    depth = depth if dim != decoder_dim else blocks - HEAD["decoder_depth"]
    heads, decoder_heads = config.get("num_heads") or (_heads(weights, dim), HEAD["decoder_heads"])
    model = DDT(
        channels, _grid(weights, {"input": config.get("input_size", 16)}, patch, flat=False), patch, dim, depth, heads,
        decoder_dim, blocks - depth, decoder_heads, qk_norm="blocks.0.attn.q_norm.weight" in weights,
    )  # fmt: skip
    ours = {}
    for name, value in weights.items():
        if not name.startswith((*DDT_FIXED, "y_embedder.")):
            name = rename(name, DDT_RENAMED).replace("adaLN_modulation.1.", "modulation.")
            if (number := re.match(r"blocks\.(\d+)\.", name)) and int(number[1]) >= depth:
                name = f"decoder_blocks.{int(number[1]) - depth}.{name[number.end() :]}"
            ours[name] = value
    ours["s_embed.weight"] = ours["s_embed.weight"].flatten(1)
    return _filled(model, ours, weights.get("y_embedder.embedding_table.weight"), config)


def convert_uvit(weights: dict[str, Tensor], config: dict[str, Any]) -> Converted:
    """U-ViT as DC-AE has it, trained to predict eps at levels 0..1000."""
    return _convert_uvit(weights, config, time_scale=1000.0)


def convert_usit(weights: dict[str, Tensor], config: dict[str, Any]) -> Converted:
    """USiT (DC-AE): the same network as a flow."""
    return _convert_uvit(weights, config, reversed_time=True)


def _convert(weights: dict[str, Tensor], config: dict[str, Any], switches: dict[str, Any]) -> Converted:
    flat = "x_embedder.proj.weight" not in weights
    embed = need(weights, "x_embedder.weight" if flat else "x_embedder.proj.weight", "DiT")
    dim, channels, patch = embed.shape[0], embed.shape[1], 1 if flat else embed.shape[2]
    head = need(weights, "final_layer.linear.weight", "DiT").shape[0]
    model = DiT(
        in_channels=channels, grid=_grid(weights, config, patch, flat), patch_size=patch, dim=dim,
        depth=count_blocks(weights, "blocks."), heads=config.get("heads") or _heads(weights, dim),
        learn_sigma=head == 2 * channels * patch ** (1 if flat else 2), **switches,
    )  # fmt: skip
    kept = {name: value for name, value in weights.items() if not name.startswith((*FIXED, "y_embedder."))}
    ours = {rename(n, RENAMED).replace("adaLN_modulation.1.", "modulation."): v for n, v in kept.items()}
    return _filled(model, ours, weights.get("y_embedder.embedding_table.weight"), config)


def _convert_uvit(weights: dict[str, Tensor], config: dict[str, Any], **switches: Any) -> Converted:
    embed = need(weights, "patch_embed.proj.weight", "U-ViT")  # (d, c, p, p)
    dim, channels, patch, _ = embed.shape
    table = weights.get("label_emb.embedding_table.weight")
    tokens = need(weights, "pos_embed", "U-ViT").shape[1] - 1 - (table is not None)
    side = math.isqrt(tokens) * patch
    model = UViT(
        in_channels=channels, grid=(side, side), patch_size=patch, dim=dim,
        depth=2 * count_blocks(weights, "in_blocks."), heads=config.get("heads") or _heads(weights, dim),
        vector_token=table is not None, prefix_channels=bool(config.get("adaptive_channel", False)), **switches,
    )  # fmt: skip
    ours = {rename(n, UVIT_RENAMED): value for n, value in weights.items() if not n.startswith("label_emb.")}
    return _filled(model, ours, table, config)


def _filled(
    model: DiT | DDT | UViT, ours: dict[str, Tensor], table: Tensor | None, config: dict[str, Any]
) -> Converted:
    """The model with its weights, and the conditioner of its class embedding."""
    ours["x_embed.weight"] = ours["x_embed.weight"].flatten(1)
    load_exactly(model, ours, optional=FIXED)
    classes = config.get("classes") or (0 if table is None else max(1, len(table) - 1))
    return Converted(model, class_conditioner(table, classes))


def _grid(weights: dict[str, Tensor], config: dict[str, Any], patch: int, flat: bool) -> tuple[int, ...]:
    """Latent grid, off the position table where the checkpoint has it."""
    positions = weights.get("pos_embed")
    if flat:
        return (positions.shape[1] if positions is not None else config.get("tokens", config.get("input", 128)),)
    side = math.isqrt(positions.shape[1]) * patch if positions is not None else config.get("input", 32)
    return (side, side)


def _heads(weights: dict[str, Tensor], dim: int) -> int:
    """Heads are 64 wide in S, B, L and H, and 72 in XL; the gain of a qk-norm has their width."""
    gain = weights.get("blocks.0.attn.q_norm.weight")
    return dim // (len(gain) if gain is not None else 72 if dim == 1152 else 64)
