"""Official U-ViT and USiT checkpoints, as DC-AE has them, to `latelier.denoisers.uvit.UViT` and a class conditioner."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from latelier.conditioning.condition import ClassConditioner
from latelier.convert import Converted, count_blocks, load_exactly, need
from latelier.denoisers.uvit import UViT

RENAMED = {"patch_embed.proj.": "x_embed.", "decoder_pred.": "head."}
HEADS = {1152: 16}  # of the others, heads are 64 wide


def convert_uvit(weights: dict[str, Tensor], config: dict[str, Any]) -> Converted:
    """U-ViT, trained to predict eps at levels 0..1000."""
    return _convert(weights, config, time_scale=1000.0)


def convert_usit(weights: dict[str, Tensor], config: dict[str, Any]) -> Converted:
    """USiT: the same network as a flow from noise (0) to data (1)."""
    return _convert(weights, config, reversed_time=True)


def _convert(weights: dict[str, Tensor], config: dict[str, Any], **switches: Any) -> Converted:
    embed = need(weights, "patch_embed.proj.weight", "U-ViT")  # (d, c, p, p)
    dim, channels, patch, _ = embed.shape
    table = weights.get("label_emb.embedding_table.weight")
    tokens = need(weights, "pos_embed", "U-ViT").shape[1] - 1 - (table is not None)
    side = math.isqrt(tokens) * patch
    model = UViT(
        in_channels=channels,
        grid=(side, side),
        patch_size=patch,
        dim=dim,
        depth=2 * count_blocks(weights, "in_blocks."),
        heads=config.get("heads") or HEADS.get(dim, dim // 64),
        vector_token=table is not None,
        prefix_channels=bool(config.get("adaptive_channel", False)),
        **switches,
    )
    ours = {_rename(name): value for name, value in weights.items() if not name.startswith("label_emb.")}
    ours["x_embed.weight"] = ours["x_embed.weight"].flatten(1)
    load_exactly(model, ours)
    if table is None:
        return Converted(model)
    rows = table.shape[0]
    classes = config.get("classes") or max(1, rows - 1)
    conditioner = ClassConditioner(classes, dim, null=rows > classes)
    load_exactly(conditioner, {"embedding_table.weight": table})
    return Converted(model, conditioner)


def _rename(name: str) -> str:
    old = next((old for old in RENAMED if name.startswith(old)), None)
    return name if old is None else RENAMED[old] + name[len(old) :]
