"""Diffusion transformers: one class whose switches give DiT, SiT and LightningDiT, on 2-D grids and 1-D latents.

DiT / SiT      LayerNorm without affine, GELU MLP
LightningDiT   RMSNorm, SwiGLU, rotary positions on top of the fixed table, optional qk-norm
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from jaxtyping import Bool, Float
from torch import Tensor, nn

from latelier.conditioning.condition import Condition
from latelier.denoisers.objective import DenoiserSection, build_transformer, transformer_width
from latelier.errors import LatelierError, check_whole
from latelier.layers import (
    MLP,
    Attention,
    CrossAttention,
    RMSNorm,
    SwiGLU,
    TimeEmbedding,
    init_linear,
    patchify,
    resize_positions,
    rope_table,
    run_block,
    sincos_positions,
    unpatchify,
)
from latelier.prefixes import pad_channels

SIZES = {
    "XS": {"dim": 256, "depth": 4, "heads": 4},
    "T": {"dim": 256, "depth": 8, "heads": 4},
    "S": {"dim": 384, "depth": 12, "heads": 6},
    "B": {"dim": 768, "depth": 12, "heads": 12},
    "L": {"dim": 1024, "depth": 24, "heads": 16},
    "XL": {"dim": 1152, "depth": 28, "heads": 16},
    "1p0B": {"dim": 1536, "depth": 24, "heads": 24},
    "1p6B": {"dim": 1792, "depth": 28, "heads": 28},
}
SWITCHES = {
    "dit": {"norm": "layer", "mlp": "gelu", "rope": False, "qk_norm": False},
    "sit": {"norm": "layer", "mlp": "gelu", "rope": False, "qk_norm": False},
    "lightning-dit": {"norm": "rms", "mlp": "swiglu", "rope": True, "qk_norm": True},
}


class DiTSection(DenoiserSection):
    """A diffusion transformer: DiT, SiT or LightningDiT."""

    kind: Literal["dit", "sit", "lightning-dit"] = "lightning-dit"


SECTIONS = (DiTSection,)


class DiT(ModelMixin, ConfigMixin):
    """Diffusion transformer with adaLN-zero (Peebles & Xie 2023, section 3.2).

    Args:
        in_channels: of `x_t` and the prediction.
        grid: `(h, w)` or `(l,)` of the latents that the position tables are made for; others are interpolated.
        patch_size: side of a patch in latent positions.
        dim, depth, heads: of the transformer.
        mlp_ratio: hidden width of the MLPs over the width; SwiGLU has two thirds of it, so that parameters agree.
        norm: `layer` (no affine) or `rms`.
        mlp: `gelu` (tanh) or `swiglu`.
        rope: rotary positions in attention.
        qk_norm: RMS norm of queries and keys.
        spatial_channels: channels that a condition concatenates to `x_t`.
        context_dim: width of a condition's tokens, to which every block attends; 0: no cross-attention.
        learn_sigma: the head has twice the channels, the second half is dropped (DiT and SiT checkpoints).
        reversed_time: the weights were trained with t = 0 noise and predict data - noise (SiT, LightningDiT): time is
            reversed and the prediction negated, so that callers see our convention.
        time_scale: what t in [0, 1] is multiplied by before its embedding (1000 for weights trained on 0..999).
        prefix_channels: whether `x_t` may have fewer channels, the first ones (DC-AE 1.5's augmented training).
        own_positions: the position table is kept with the weights instead of being computed (DC-AE's SiT).
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks = ["Block"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        in_channels: int = 16,
        grid: Sequence[int] = (32, 32),
        patch_size: int = 1,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        norm: str = "rms",
        mlp: str = "swiglu",
        rope: bool = True,
        qk_norm: bool = True,
        spatial_channels: int = 0,
        context_dim: int = 0,
        learn_sigma: bool = False,
        reversed_time: bool = False,
        time_scale: float = 1.0,
        prefix_channels: bool = False,
        own_positions: bool = False,
    ):
        super().__init__()
        check_whole(in_channels=in_channels, patch_size=patch_size, dim=dim, heads=heads)
        check_whole(0, depth=depth)
        self.grid = tuple(g // patch_size for g in grid)
        if rope:
            check_rope(dim, heads, len(self.grid))
        if norm not in ("rms", "layer") or mlp not in ("swiglu", "gelu"):
            raise LatelierError(f"norm = {norm!r} is not rms or layer, or mlp = {mlp!r} not swiglu or gelu.")
        volume = patch_size ** len(self.grid)
        self.x_embed = nn.Linear((in_channels + spatial_channels) * volume, dim)
        self.t_embed = TimeEmbedding(dim)
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio, norm, mlp, qk_norm, context_dim) for _ in range(depth))
        self.final_norm = _norm(norm, dim)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.head = nn.Linear(dim, in_channels * (1 + learn_sigma) * volume)
        table = sincos_positions(dim, self.grid)  # (1, n, d)
        self.register_buffer("pos_embed", torch.zeros_like(table) if own_positions else table, persistent=own_positions)
        self.gradient_checkpointing = False
        self._init_weights()

    def _init_weights(self) -> None:
        init_linear(self)
        for layer in (self.t_embed.fc1, self.t_embed.fc2):
            nn.init.normal_(layer.weight, std=0.02)
        # Zero gates make every block the identity at the start, a zero head makes the first prediction zero.
        for layer in (*(block.modulation for block in self.blocks), self.modulation, self.head):
            nn.init.zeros_(layer.weight)
        for block in self.blocks:
            if block.cross is not None:
                nn.init.zeros_(block.cross.proj.weight)

    def forward(
        self, x_t: Float[Tensor, "b c *grid"], t: Float[Tensor, " b"], condition: Condition | None = None
    ) -> Float[Tensor, "b c *grid"]:
        """Predict the process's target.

        Args:
            x_t: noisy normalised latents, or their first channels where `prefix_channels` is set.
            t: noise level in [0, 1], 0 data, 1 noise.
            condition: `vector` is added to the time embedding, `spatial` concatenated to `x_t`, `tokens` attended to.
        """
        channels, p = x_t.shape[1], self.config["patch_size"]
        grid = tuple(g // p for g in x_t.shape[2:])
        x_t = pad_channels(x_t, self.config["in_channels"], self.config["prefix_channels"])
        if condition is not None and condition.spatial is not None:
            x_t = torch.cat([x_t, condition.spatial], dim=1)
        x = self.x_embed(patchify(x_t, p)) + resize_positions(self.pos_embed, self.grid, grid)  # (b, n, d)
        c = self.t_embed((1 - t if self.config["reversed_time"] else t) * self.config["time_scale"])  # (b, d)
        if condition is not None and condition.vector is not None:
            c = c + condition.vector
        c = F.silu(c)[:, None]  # (b, 1, d)
        width = self.config["dim"] // self.config["heads"]
        rope = cached_rope(self, width, grid, x.device) if self.config["rope"] else None
        context = (None, None) if condition is None else (condition.tokens, condition.mask)
        for block in self.blocks:
            x = run_block(self, block, x, c, rope, *context)
        shift, scale = self.modulation(c).chunk(2, dim=-1)  # (b, 1, d)
        x = self.head(modulate(self.final_norm(x), shift, scale))  # (b, n, p p c)
        prediction = unpatchify(x, p, grid)[:, :channels].float()  # (b, c, *grid)
        return -prediction if self.config["reversed_time"] else prediction


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition (adaLN-zero).

    `c` has one row for all tokens, or one for each (DDT). With a context, cross-attention lies between them, its output
    zero at the start (PixArt, Chen et al. 2024).
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float, norm: str, mlp: str, qk_norm: bool, context: int = 0):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1 = _norm(norm, dim)
        self.attn = Attention(dim, heads, qk_norm)
        self.cross = CrossAttention(dim, heads, context) if context else None
        self.norm2 = _norm(norm, dim)
        self.mlp = SwiGLU(dim, int(2 / 3 * hidden)) if mlp == "swiglu" else MLP(dim, hidden, "tanh")
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        c: Float[Tensor, "b rows d"],
        rope: Tensor | None,
        tokens: Float[Tensor, "b m k"] | None = None,
        mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=-1)  # (b, rows, d)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), rope)
        if self.cross is not None and tokens is not None:
            x = x + self.cross(x, tokens, mask)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


def modulate(x: Float[Tensor, "b n d"], shift: Float[Tensor, "b rows d"], scale: Float[Tensor, "b rows d"]) -> Tensor:
    """x (1 + scale) + shift."""
    return torch.addcmul(shift.to(x.dtype), x, 1 + scale.to(x.dtype))


def check_rope(dim: int, heads: int, axes: int) -> None:
    """Refuse heads of which an axis of the grid cannot rotate an equal, even part."""
    if dim // heads % (2 * axes):
        raise LatelierError(f"heads = {heads} are {dim // heads} wide, but rope needs a multiple of {2 * axes}.")


def cached_rope(model: Any, head_dim: int, grid: tuple[int, ...], device: torch.device) -> Tensor:
    """`rope_table` of a grid, made once for each width of heads."""
    cache = model.__dict__.setdefault("_ropes", {})
    if cache.get(head_dim, (None,))[0] != (grid, device):
        cache[head_dim] = (grid, device), rope_table(head_dim, grid, model.grid).to(device)
    return cache[head_dim][1]


def _norm(kind: str, dim: int) -> nn.Module:
    return RMSNorm(dim) if kind == "rms" else nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)


def build(
    section: DenoiserSection, latent_shape: tuple[int, ...], token_width: int, spatial_channels: int, vector: bool
) -> DiT:
    """A DiT for latents `(c, *grid)`, fresh or from `init`; see `build_denoiser`. Every DiT takes a vector."""
    wanted = {"context_dim": token_width, "spatial_channels": spatial_channels}
    return build_transformer(DiT, _sizes(section), section, latent_shape, wanted)


def vector_width(section: DenoiserSection) -> int:
    """Width of the time embedding, to which a condition's vector is added."""
    return transformer_width(DiT, _sizes(section), section)


def _sizes(section: DenoiserSection) -> dict[str, dict[str, Any]]:
    return {name: {**SWITCHES[section.kind], **size} for name, size in SIZES.items()}
