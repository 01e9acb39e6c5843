"""The transformer over tokens of latent diffusion's conditioners (Rombach et al. 2022): captions and layouts.

It is trained along with the denoiser, whose cross-attention reads what comes out at every position.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from latelier.layers import MLP, attention


class TokenTransformer(ModelMixin, ConfigMixin):
    """Token and position embeddings, pre-norm blocks, a last norm.

    Args:
        vocabulary: number of different tokens.
        length: longest sequence, the size of the position table.
        dim: width of the embeddings and of the result.
        layers: number of blocks.
        heads, head_dim: of attention, whose inner width, their product, need not be `dim`.
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks = ["TokenBlock"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self, vocabulary: int = 30522, length: int = 77, dim: int = 640, layers: int = 32, heads: int = 8,
        head_dim: int = 64,
    ):  # fmt: skip
        super().__init__()
        self.token_embed = nn.Embedding(vocabulary, dim)
        self.pos_embed = nn.Embedding(length, dim)
        self.blocks = nn.ModuleList(TokenBlock(dim, heads, head_dim) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.gradient_checkpointing = False
        for table in (self.token_embed, self.pos_embed):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: Int[Tensor, "b n"], mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n d"]:
        """Embeddings of all positions; `mask` is true where a token may be attended to, at least one in each row."""
        x = self.token_embed(tokens) + self.pos_embed.weight[: tokens.shape[1]]  # (b, n, d)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, mask)
            else:
                x = block(x, mask)
        return self.norm(x)


class TokenBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with an MLP four times as wide."""

    def __init__(self, dim: int, heads: int, head_dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = TokenAttention(dim, heads, head_dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, 4 * dim)

    def forward(self, x: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n d"]:
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class TokenAttention(nn.Module):
    """Multi-head self-attention of an inner width of its own; queries, keys and values have no bias."""

    def __init__(self, dim: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, dim)

    def forward(self, x: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n d"]:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x (b, h, n, k)
        q, k, v = qkv.unbind(0)
        if mask is None:
            x = attention(q, k, v)  # (b, h, n, k)
        else:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])  # (b, h, n, k)
        return self.out(x.transpose(1, 2).flatten(2))  # (b, n, d)
