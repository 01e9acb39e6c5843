"""Latents to one feature vector for each patch: the decoder of MAETok, and the body of its auxiliary decoders.

A ViT whose sequence has a learned mask token for each patch, then the latents. The blocks are those of MoVQ: norms
have no gains; instead each latent scales and shifts the normed activations at its own token (ICML 2025, section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn

from latelier.errors import LatelierError
from latelier.keyed_random import KeyedRandom
from latelier.layers import (
    MLP,
    Attention,
    axial_frequencies,
    init_linear,
    mixed_frequencies,
    mixed_rope_table,
    resize_positions,
    run_block,
    sincos_positions,
)

POSITIONS = ("mixed", "axial", "absolute")


class LatentDecoder(nn.Module):
    """A ViT over mask tokens and latents.

    Args:
        latent_tokens, latent_channels: l latents of c numbers.
        grid: rows and columns of patches.
        dim, depth, heads: of the transformer.
        mlp_ratio: hidden width of the MLPs over the width.
        positions: of patches: `mixed` (learned rotary frequencies), `axial` (fixed ones), `absolute` (a learned table).
        cls_token: whether the sequence begins with one more learned token.
        drop_path: share of images for which the last block's branches are left out in training (stochastic depth);
            it rises linearly from 0 at the first block.
        latent_scale: initial scale with which latents modulate their tokens. At 0, the paper's, patches do not depend
            on latents at first; 1 suits short trainings.

    Differs from the reference: entries that cannot reach a patch (a patch embedding, the modulation of latents in the
    final norm, a position table beside rotary positions) are left out.
    """

    def __init__(
        self,
        latent_tokens: int,
        latent_channels: int,
        grid: tuple[int, int],
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        positions: str = "mixed",
        cls_token: bool = False,
        drop_path: float = 0.0,
        latent_scale: float = 0.0,
    ):
        super().__init__()
        self.grid, self.drop_path = grid, drop_path
        self.input = nn.Linear(latent_channels, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.latent_pos_embed = nn.Parameter(torch.empty(1, latent_tokens, dim))
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if cls_token else None
        table = torch.empty(1, cls_token + grid[0] * grid[1], dim)  # (1, 1 + n, d)
        self.pos_embed = nn.Parameter(table) if positions == "absolute" else None
        add_frequencies(self, positions, depth, heads, dim)
        self.blocks = nn.ModuleList(ModulatedBlock(dim, heads, latent_channels, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.gradient_checkpointing = False
        init_linear(self)
        for block in self.blocks:
            nn.init.zeros_(block.modulation.weight)
            nn.init.constant_(block.modulation.bias.view(4, dim)[1::2], latent_scale)
        for table in (self.mask_token, self.latent_pos_embed, self.cls_token):
            if table is not None:
                nn.init.normal_(table, std=0.02)
        if self.pos_embed is not None:
            init_table(self.pos_embed, grid)

    def forward(
        self, z: Float[Tensor, "b l c"], grid: tuple[int, int] | None = None, rng: KeyedRandom | None = None
    ) -> Float[Tensor, "b n d"]:
        """Features of the patches in raster order, after the final norm.

        Args:
            z: raw latents.
            grid: rows and columns to decode; None for the decoder's own.
            rng: random numbers of stochastic depth, which acts in training mode where they are given.
        """
        grid = grid or self.grid
        wanted = (self.latent_pos_embed.shape[1], self.input.in_features)
        if tuple(z.shape[1:]) != wanted:
            raise LatelierError(
                f"The decoder takes {wanted[0]} latents of {wanted[1]} channels, not {z.shape[1]} of {z.shape[2]}."
            )
        x = self.input(z) + self.latent_pos_embed  # (b, l, d)
        canvas = self._canvas(grid)  # (1, k + n, d), with k = 1 for the CLS token
        x = torch.cat([canvas.to(x.dtype).expand(len(x), -1, -1), x], dim=1)  # (b, k + n + l, d)
        first = 0 if self.cls_token is None else 1
        for block, rope, kept in zip(self.blocks, rope_tables(self, grid), self._kept(rng)):
            x = run_block(self, block, x, z, rope, first, kept)
        return self.norm(x[:, first : first + grid[0] * grid[1]])

    def _canvas(self, grid: tuple[int, int]) -> Float[Tensor, "1 n d"]:
        """The tokens before the latents."""
        canvas = self.mask_token.expand(-1, grid[0] * grid[1], -1)  # (1, n, d)
        if self.cls_token is not None:
            canvas = torch.cat([self.cls_token, canvas], dim=1)
        return canvas if self.pos_embed is None else canvas + resize_positions(self.pos_embed, self.grid, grid)

    def _kept(self, rng: KeyedRandom | None) -> Sequence[Tensor | None]:
        """For each block, factors `(2, b, 1, 1)` of its two branches: 0, or 1 / (1 - rate) so that the mean stays."""
        depth = len(self.blocks)
        if rng is None or not self.drop_path or not self.training:
            return [None] * depth
        rates = torch.linspace(0, self.drop_path, depth, device=rng.device)[:, None]  # (depth, 1)
        kept = (rng.uniform("drop-path", depth, 2) >= rates) / (1 - rates)  # (b, depth, 2)
        return kept.permute(1, 2, 0)[..., None, None].unbind()


def init_table(table: Float[Tensor, "1 m d"], grid: tuple[int, int]) -> None:
    """A learned table of positions begins as the fixed one, with zeros for tokens before the patches."""
    with torch.no_grad():
        table.zero_()
        table[:, -grid[0] * grid[1] :].copy_(sincos_positions(table.shape[2], grid))


class ModulatedBlock(nn.Module):
    """Pre-norm block in which latents modulate their own tokens (MoVQ, Zheng et al. 2022).

    Normed activations x of a latent's token become scale x + shift, both linear in SiLU of the raw latent and zero at
    first; those of patches stay. There are no gates.
    """

    def __init__(self, dim: int, heads: int, latent_channels: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(dim, heads)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.modulation = nn.Linear(latent_channels, 4 * dim)

    def forward(
        self,
        x: Float[Tensor, "b m d"],
        z: Float[Tensor, "b l c"],
        rope: Complex[Tensor, "n h k"] | None = None,
        first: int = 0,
        kept: Float[Tensor, "2 b 1 1"] | None = None,
    ) -> Float[Tensor, "b m d"]:
        """`x` ends with the tokens of the l latents `z`, its patches begin at `first`; `kept` is stochastic depth."""
        shift1, scale1, shift2, scale2 = self.modulation(nn.functional.silu(z)).chunk(4, dim=-1)  # (b, l, d)
        branch = self.attn(self._modulated(x, shift1, scale1), rope, first)
        x = x + (branch if kept is None else branch * kept[0])
        branch = self.mlp(self._modulated(x, shift2, scale2))
        return x + (branch if kept is None else branch * kept[1])

    def _modulated(self, x: Tensor, shift: Float[Tensor, "b l d"], scale: Float[Tensor, "b l d"]) -> Tensor:
        patches, latents = self.norm(x).split([x.shape[1] - shift.shape[1], shift.shape[1]], dim=1)
        return torch.cat([patches, latents * scale + shift], dim=1)  # not 1 + scale


def add_frequencies(module: nn.Module, positions: str, depth: int, heads: int, dim: int) -> None:
    """Give a module `freqs` `(2, depth, heads * head_dim / 2)`: learned (`mixed`), fixed (`axial`), or None."""
    if positions not in POSITIONS:
        raise LatelierError(f"tokenizer.model.positions = {positions!r} is not known; allowed: {', '.join(POSITIONS)}.")
    if dim % heads:
        raise LatelierError(f"A width of {dim} is not divisible by {heads} heads; change one of them.")
    if positions != "absolute" and dim // heads % 4:
        raise LatelierError(
            f"Rotary positions need heads whose width is a multiple of 4, but {dim} / {heads} is {dim // heads}; "
            "take other heads, or positions: absolute."
        )
    if positions == "mixed":
        module.freqs = nn.Parameter(mixed_frequencies(depth, heads, dim // heads))
    else:
        module.register_buffer("freqs", axial_frequencies(depth, heads, dim // heads) if positions == "axial" else None)


def rope_tables(module: nn.Module, grid: tuple[int, int]) -> Sequence[Tensor | None]:
    """For each block, the turns `(n, h, k)` of the patches of this grid; positions are whole numbers on any grid."""
    if module.freqs is None or not len(module.blocks):
        return [None] * len(module.blocks)
    return mixed_rope_table(module.freqs, grid, module.blocks[0].attn.heads).unbind()
