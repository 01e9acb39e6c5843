"""Official SiT, LightningDiT and MAETok-SiT checkpoints to `latelier.denoisers.dit.DiT` and a class conditioner.

SiT and LightningDiT run time from noise (0) to data (1) and predict data - noise; `reversed_time` turns both, so the
converted model speaks our convention while the weights stay as they are.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from latelier.conditioning.condition import ClassConditioner
from latelier.convert import Converted, count_blocks, load_exactly, need
from latelier.denoisers.dit import SWITCHES, DiT

RENAMED = {
    "x_embedder.proj.": "x_embed.",
    "x_embedder.": "x_embed.",
    "t_embedder.mlp.0.": "t_embed.fc1.",
    "t_embedder.mlp.2.": "t_embed.fc2.",
    "final_layer.adaLN_modulation.1.": "modulation.",
    "final_layer.norm_final.": "final_norm.",
    "final_layer.linear.": "head.",
}
FIXED = ("pos_embed", "feat_rope.")  # computed by the constructor


def convert_sit(weights: dict[str, Tensor], config: dict[str, Any]) -> Converted:
    """SiT (Ma et al. 2024)."""
    return _convert(weights, config, {**SWITCHES["sit"], "reversed_time": True})


def convert_maetok_sit(weights: dict[str, Tensor], config: dict[str, Any]) -> Converted:
    """The 1-D SiT of MAETok, whose time already runs from data to noise."""
    return _convert(weights, config, SWITCHES["sit"])


def convert_dcae_sit(weights: dict[str, Tensor], config: dict[str, Any]) -> Converted:
    """DC-AE's SiT, whose table of positions is the file's: its constructor leaves zeros, unlike SiT's own."""
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


def _convert(weights: dict[str, Tensor], config: dict[str, Any], switches: dict[str, Any]) -> Converted:
    flat = "x_embedder.proj.weight" not in weights
    embed = need(weights, "x_embedder.weight" if flat else "x_embedder.proj.weight", "DiT")
    dim, channels = embed.shape[:2]
    patch = 1 if flat else embed.shape[2]
    head = need(weights, "final_layer.linear.weight", "DiT").shape[0]
    model = DiT(
        in_channels=channels,
        grid=_grid(weights, config, patch, flat),
        patch_size=patch,
        dim=dim,
        depth=count_blocks(weights, "blocks."),
        heads=config.get("heads") or _heads(weights, dim),
        learn_sigma=head == 2 * channels * patch ** (1 if flat else 2),
        **switches,
    )
    ours = {_rename(name): value for name, value in weights.items() if not name.startswith((*FIXED, "y_embedder."))}
    ours["x_embed.weight"] = ours["x_embed.weight"].flatten(1)
    load_exactly(model, ours, optional=FIXED)
    return Converted(model, _conditioner(weights, config))


def _conditioner(weights: dict[str, Tensor], config: dict[str, Any]) -> ClassConditioner | None:
    table = weights.get("y_embedder.embedding_table.weight")
    if table is None:
        return None
    rows, dim = table.shape
    classes = config.get("classes") or max(1, rows - 1)
    conditioner = ClassConditioner(classes, dim, null=rows > classes)
    load_exactly(conditioner, {"embedding_table.weight": table})
    return conditioner


def _grid(weights: dict[str, Tensor], config: dict[str, Any], patch: int, flat: bool) -> tuple[int, ...]:
    """Latent grid, off the position table where the checkpoint has it."""
    positions = weights.get("pos_embed")
    if flat:
        return (positions.shape[1] if positions is not None else config.get("tokens", config.get("input", 128)),)
    side = math.isqrt(positions.shape[1]) * patch if positions is not None else config.get("input", 32)
    return (side, side)


def _heads(weights: dict[str, Tensor], dim: int) -> int:
    """Head width is 64 for S, B and L; XL has 72; qk-norm's gain tells it exactly."""
    gain = weights.get("blocks.0.attn.q_norm.weight")
    if gain is not None:
        return dim // len(gain)
    return dim // (72 if dim == 1152 else 64)


def _rename(name: str) -> str:
    old = next((old for old in RENAMED if name.startswith(old)), None)
    name = name if old is None else RENAMED[old] + name[len(old) :]
    return name.replace("adaLN_modulation.1.", "modulation.")
