"""Official VMAE checkpoints (stage 1 with mask token, or tuned without) to `latelier.tokenizers.vmae.VMAE`."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from latelier.convert import Converted, count_blocks, load_exactly, need, rename
from latelier.tokenizers.vmae import VMAE

RENAMED = {
    "patch_embed.proj.": "patch_embed.",
    "decoder_pred.linear_pred.": "head.",
    "decoder_pred.conv_smoother.": "smoother.",
    "decoder_pred.": "head.",  # variants without the smoother
}
NOT_OURS = "perceptual_loss."  # LPIPS was a sub-module of the training model


def convert(weights: dict[str, Tensor], config: dict[str, Any]) -> Converted:
    """Build and fill a VMAE; `config`: `image` (pixels, without a position table), `heads`, `decoder_heads`."""
    patch = need(weights, "patch_embed.proj.weight", "VMAE")
    dim, channels, size, _ = patch.shape
    decoder_dim = need(weights, "decoder_embed.weight", "VMAE").shape[0]
    positions = weights.get("pos_embed")
    side = math.isqrt(positions.shape[1]) * size if positions is not None else config.get("image", 256)
    heads = config.get("heads", 12)
    model = VMAE(
        image_size=(side, side), patch_size=size, in_channels=channels,
        latent_channels=need(weights, "from_latent.weight", "VMAE").shape[1],
        dim=dim, depth=count_blocks(weights, "blocks."), heads=heads, decoder_dim=decoder_dim,
        decoder_depth=count_blocks(weights, "decoder_blocks."), decoder_heads=config.get("decoder_heads", heads),
        mlp_ratio=need(weights, "blocks.0.mlp.fc1.weight", "VMAE").shape[0] / dim,
        smooth="decoder_pred.conv_smoother.weight" in weights,
    )  # fmt: skip
    ours = {rename(name, RENAMED): tensor for name, tensor in weights.items() if not name.startswith(NOT_OURS)}
    ours["patch_embed.weight"] = ours["patch_embed.weight"].flatten(1)
    load_exactly(model, ours, optional=("pos_embed", "decoder_pos_embed", "mask_token"))
    return Converted(model)
