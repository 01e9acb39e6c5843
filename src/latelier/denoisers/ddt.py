"""DDT: a transformer makes a condition for each token, and a wide, shallow head denoises with it (RAE's DiT-DH).

A denoiser that is narrower than its tokens cannot fit even one image, however deep it is (Zheng et al. 2025, "RAE",
section 4). The head is as wide as tokens of a vision model ask for, at the cost of two blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float
from torch import Tensor, nn

from latelier.conditioning.condition import Condition
from latelier.denoisers import dit
from latelier.denoisers.dit import Block, cached_rope, check_rope, modulate
from latelier.denoisers.objective import DenoiserSection, build_transformer, transformer_width
from latelier.errors import check_whole
from latelier.layers import RMSNorm, patchify, resize_positions, run_block, sincos_positions, unpatchify
from latelier.prefixes import pad_channels

HEAD = {"decoder_dim": 2048, "decoder_depth": 2, "decoder_heads": 16}
SMALL_HEAD = {"decoder_dim": 512, "decoder_depth": 2, "decoder_heads": 8}
SIZES = {name: {**dit.SIZES[name], **SMALL_HEAD} for name in ("XS", "T")}
SIZES |= {name: {**dit.SIZES[name], **HEAD} for name in ("S", "B", "L", "XL")}


class DDTSection(DenoiserSection):
    """A transformer with a wide, shallow head: DDT, the DiT-DH of representation autoencoders."""

    kind: Literal["ddt"]


SECTIONS = (DDTSection,)


class DDT(ModelMixin, ConfigMixin):
    """LightningDiT blocks and a head of wider ones (DDT, Wang et al. 2025; DiT-DH, Zheng et al. 2025, section 5).

    Args:
        dim, depth, heads: of the transformer that makes the conditions.
        decoder_dim, decoder_depth, decoder_heads: of the head; make it at least as wide as a token of the latents.
        mlp_ratio, qk_norm, spatial_channels, context_dim, prefix_channels: as in `DiT`; tokens of a condition reach
            the transformer, spatial channels both parts.
        in_channels, grid, patch_size: as in `DiT`.

    Differs from the reference: one patch size for both parts; position tables are computed; cross-attention and spatial
    channels are ours; the table of classes belongs to the conditioner.
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks = ["Block"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        in_channels: int = 768,
        grid: Sequence[int] = (16, 16),
        patch_size: int = 1,
        dim: int = 384,
        depth: int = 12,
        heads: int = 6,
        decoder_dim: int = 2048,
        decoder_depth: int = 2,
        decoder_heads: int = 16,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        spatial_channels: int = 0,
        context_dim: int = 0,
        prefix_channels: bool = False,
    ):
        super().__init__()
        check_whole(in_channels=in_channels, patch_size=patch_size, dim=dim, heads=heads)
        check_whole(decoder_dim=decoder_dim, decoder_heads=decoder_heads)
        check_whole(0, depth=depth, decoder_depth=decoder_depth)
        self.grid = tuple(g // patch_size for g in grid)
        check_rope(dim, heads, len(self.grid))
        check_rope(decoder_dim, decoder_heads, len(self.grid))
        volume = patch_size ** len(self.grid)
        width = (in_channels + spatial_channels) * volume
        self.s_embed, self.x_embed = nn.Linear(width, dim), nn.Linear(width, decoder_dim)
        self.t_embed = FourierEmbedding(dim)
        block = (mlp_ratio, "rms", "swiglu", qk_norm)
        self.blocks = nn.ModuleList(Block(dim, heads, *block, context_dim) for _ in range(depth))
        self.s_project = nn.Linear(dim, decoder_dim) if dim != decoder_dim else nn.Identity()
        self.decoder_blocks = nn.ModuleList(Block(decoder_dim, decoder_heads, *block) for _ in range(decoder_depth))
        self.final_norm = RMSNorm(decoder_dim)
        self.modulation = nn.Linear(decoder_dim, 2 * decoder_dim)
        self.head = nn.Linear(decoder_dim, in_channels * volume)
        self.register_buffer("pos_embed", sincos_positions(dim, self.grid), persistent=False)  # (1, n, d)
        self.gradient_checkpointing = False
        self._init_weights()

    def _init_weights(self) -> None:
        for layer in (self.s_embed, self.x_embed):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (self.t_embed.fc1, self.t_embed.fc2):
            nn.init.normal_(layer.weight, std=0.02)
        # Zero gates make every block the identity at the start, a zero head makes the first prediction zero.
        blocks = (*self.blocks, *self.decoder_blocks)
        for layer in (*(block.modulation for block in blocks), self.modulation, self.head):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for block in self.blocks:
            if block.cross is not None:
                nn.init.zeros_(block.cross.proj.weight)
                nn.init.zeros_(block.cross.proj.bias)

    def forward(
        self, x_t: Float[Tensor, "b c *grid"], t: Float[Tensor, " b"], condition: Condition | None = None
    ) -> Float[Tensor, "b c *grid"]:
        """As `DiT.forward`; the head sees `x_t`, without positions, and a condition for each of its tokens."""
        channels, p, condition = x_t.shape[1], self.config["patch_size"], condition or Condition()
        grid = tuple(g // p for g in x_t.shape[2:])
        x_t = pad_channels(x_t, self.config["in_channels"], self.config["prefix_channels"])
        if condition.spatial is not None:
            x_t = torch.cat([x_t, condition.spatial], dim=1)
        patches, time = patchify(x_t, p), self.t_embed(t)  # (b, n, k), (b, d)
        c = time if condition.vector is None else time + condition.vector
        c = F.silu(F.silu(c))[:, None]  # (b, 1, d); the second SiLU is that of each adaLN
        s = self.s_embed(patches) + resize_positions(self.pos_embed, self.grid, grid)  # (b, n, d)
        rope = cached_rope(self, self.config["dim"] // self.config["heads"], grid, s.device)
        for block in self.blocks:
            s = run_block(self, block, s, c, rope, condition.tokens, condition.mask)  # (b, n, d)
        s = F.silu(self.s_project(F.silu(time[:, None] + s)))  # (b, n, e)
        x = self.x_embed(patches)  # (b, n, e)
        rope = cached_rope(self, self.config["decoder_dim"] // self.config["decoder_heads"], grid, x.device)
        for block in self.decoder_blocks:
            x = run_block(self, block, x, s, rope)  # (b, n, e)
        shift, scale = self.modulation(s).chunk(2, dim=-1)  # (b, n, e)
        x = self.head(modulate(self.final_norm(x), shift, scale))  # (b, n, p p c)
        return unpatchify(x, p, grid)[:, :channels].float()  # (b, c, *grid)


class FourierEmbedding(nn.Module):
    """[sin | cos] of 2 pi w t for fixed random w ~ N(0, 1) (Tancik et al. 2020), then Linear, SiLU, Linear."""

    def __init__(self, dim: int, frequencies: int = 256):
        super().__init__()
        self.register_buffer("frequencies", torch.randn(frequencies))  # kept with the weights
        self.fc1 = nn.Linear(2 * frequencies, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, t: Float[Tensor, " b"]) -> Float[Tensor, "b d"]:
        angles = 2 * math.pi * t.float()[:, None] * self.frequencies  # (b, k)
        return self.fc2(F.silu(self.fc1(torch.cat([angles.sin(), angles.cos()], dim=-1))))  # (b, d)


def build(
    section: DenoiserSection, latent_shape: tuple[int, ...], token_width: int, spatial_channels: int, vector: bool
) -> DDT:
    """A DDT for latents `(c, *grid)`, fresh or from `init`; see `build_denoiser`. Every DDT takes a vector."""
    wanted = {"context_dim": token_width, "spatial_channels": spatial_channels}
    return build_transformer(DDT, SIZES, section, latent_shape, wanted)


def vector_width(section: DenoiserSection) -> int:
    """Width of the time embedding, to which a condition's vector is added."""
    return transformer_width(DDT, SIZES, section)
