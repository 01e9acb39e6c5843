"""U-ViT: a transformer on tokens of everything (time, class, patches) with long skips (Bao et al. 2023); USiT, a flow.

Each block of the second half sees the output of its counterpart in the first half beside its input. There are no
adaptive norms: time and class are tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from jaxtyping import Bool, Float
from torch import Tensor, nn

from latelier.conditioning.condition import Condition
from latelier.denoisers.objective import DenoiserSection, build_transformer, transformer_width
from latelier.errors import LatelierError, check_whole
from latelier.layers import MLP, Attention, patchify, resize_positions, run_block, sinusoid, unpatchify
from latelier.prefixes import pad_channels

SIZES = {
    "XS": {"dim": 256, "depth": 4, "heads": 4},
    "S": {"dim": 512, "depth": 12, "heads": 8},
    "H": {"dim": 1152, "depth": 28, "heads": 16},
    "2B": {"dim": 2048, "depth": 28, "heads": 32},
    "3B": {"dim": 2048, "depth": 56, "heads": 32},
}


class UViTSection(DenoiserSection):
    """A transformer with long skips: U-ViT or USiT."""

    kind: Literal["uvit", "usit"]


SECTIONS = (UViTSection,)


class UViT(ModelMixin, ConfigMixin):
    """Transformer with long skips.

    Args:
        depth: even; depth / 2 early blocks, one in the middle, depth / 2 late ones.
        vector_token: whether a condition's vector is a token (a class), as time is.
        context_dim: width of a condition's tokens, which join the sequence; 0 for none.
        reversed_time: the weights were trained with t = 0 noise and predict data - noise (USiT).
        others: as in `DiT`.

    Differs from the reference: the table of classes belongs to the conditioner.
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks = ["SkipBlock"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        in_channels: int = 32,
        grid: Sequence[int] = (16, 16),
        patch_size: int = 1,
        dim: int = 512,
        depth: int = 12,
        heads: int = 8,
        mlp_ratio: float = 4.0,
        vector_token: bool = True,
        spatial_channels: int = 0,
        context_dim: int = 0,
        reversed_time: bool = False,
        time_scale: float = 1.0,
        prefix_channels: bool = False,
    ):
        super().__init__()
        check_whole(in_channels=in_channels, patch_size=patch_size, dim=dim, heads=heads)
        check_whole(0, depth=depth)
        if depth % 2:
            raise LatelierError(
                f"denoiser.model.depth = {depth} of a U-ViT must be even: half of it precedes the middle."
            )
        self.grid = tuple(g // patch_size for g in grid)
        volume = patch_size ** len(self.grid)
        self.x_embed = nn.Linear((in_channels + spatial_channels) * volume, dim)
        self.context = nn.Linear(context_dim, dim) if context_dim else None
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + vector_token + math.prod(self.grid), dim))
        self.in_blocks = nn.ModuleList(SkipBlock(dim, heads, mlp_ratio) for _ in range(depth // 2))
        self.mid_block = SkipBlock(dim, heads, mlp_ratio)
        self.out_blocks = nn.ModuleList(SkipBlock(dim, heads, mlp_ratio, skip=True) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.head = nn.Linear(dim, in_channels * volume)
        self.gradient_checkpointing = False
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks in their order."""
        return [*self.in_blocks, self.mid_block, *self.out_blocks]

    def forward(
        self, x_t: Float[Tensor, "b c *grid"], t: Float[Tensor, " b"], condition: Condition | None = None
    ) -> Float[Tensor, "b c *grid"]:
        """As `DiT.forward`; a condition's `vector` is a token, `tokens` join the sequence, `spatial` joins `x_t`."""
        channels, p = x_t.shape[1], self.config["patch_size"]
        grid = tuple(g // p for g in x_t.shape[2:])
        condition = condition or Condition()
        x_t = pad_channels(x_t, self.config["in_channels"], self.config["prefix_channels"])
        if condition.spatial is not None:
            x_t = torch.cat([x_t, condition.spatial], dim=1)
        x, mask = self._sequence(self.x_embed(patchify(x_t, p)), t, condition, grid)  # (b, m, d)
        skips = []
        for block in self.in_blocks:
            x = run_block(self, block, x, mask)
            skips.append(x)
        x = run_block(self, self.mid_block, x, mask)
        for block in self.out_blocks:
            x = run_block(self, block, x, mask, skips.pop())
        x = self.head(self.norm(x[:, -math.prod(grid) :]))  # (b, n, p p c)
        prediction = unpatchify(x, p, grid)[:, :channels].float()  # (b, c, *grid)
        return -prediction if self.config["reversed_time"] else prediction

    def _sequence(
        self, x: Float[Tensor, "b n d"], t: Float[Tensor, " b"], condition: Condition, grid: tuple[int, ...]
    ) -> tuple[Float[Tensor, "b m d"], Bool[Tensor, "b m"] | None]:
        """[class, time, a condition's tokens, patches] with positions, and their mask."""
        time = (1 - t if self.config["reversed_time"] else t) * self.config["time_scale"]
        first = [sinusoid(time, x.shape[2])[:, None].to(x.dtype)]  # (b, 1, d)
        if self.config["vector_token"]:
            if condition.vector is None:
                raise LatelierError("This U-ViT has a token for a condition's vector, but the condition has none.")
            first.insert(0, condition.vector[:, None].to(x.dtype))
        k = len(first)
        table = resize_positions(self.pos_embed[:, k:], self.grid, grid)  # (1, n, d)
        first = [token + self.pos_embed[:, i : i + 1] for i, token in enumerate(first)]
        mask = None
        if self.context is not None and condition.tokens is not None:
            first.append(self.context(condition.tokens))  # (b, m, d); they bring positions of their own
            if condition.mask is not None:
                ones = condition.mask.new_ones(len(x), 1)
                mask = torch.cat([ones.expand(-1, k), condition.mask, ones.expand(-1, x.shape[1])], dim=1)
        return torch.cat([*first, x + table], dim=1), mask


class SkipBlock(nn.Module):
    """Pre-norm block; in the second half a linear layer first joins its input with the skip connection."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, skip: bool = False):
        super().__init__()
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.attn = Attention(dim, heads, qkv_bias=False)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        mask: Bool[Tensor, "b n"] | None = None,
        skip: Float[Tensor, "b n d"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x), mask=mask)
        return x + self.mlp(self.norm2(x))


def build(
    section: DenoiserSection, latent_shape: tuple[int, ...], token_width: int, spatial_channels: int, vector: bool
) -> UViT:
    """A U-ViT for latents `(c, *grid)`, fresh or from `init`; see `build_denoiser`."""
    wanted = {"context_dim": token_width, "spatial_channels": spatial_channels, "vector_token": vector}
    return build_transformer(UViT, SIZES, section, latent_shape, wanted)


def vector_width(section: DenoiserSection) -> int:
    """Width of the tokens, of which a condition's vector is one."""
    return transformer_width(UViT, SIZES, section)
