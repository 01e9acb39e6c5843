"""Building blocks shared by the transformers: attention, positions, norms, MLPs, patches, time embedding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Complex, Float
from torch import Tensor, nn

from latelier.errors import LatelierError

EXPLICIT_TOKENS = 512  # up to here, the backward pass of the fused attention is several times slower on a CPU


def attention(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m d"]
) -> Float[Tensor, "b h n d"]:
    """softmax(q k^T / sqrt(d)) v; plain products in training on a CPU with few tokens, where they are faster."""
    if q.device.type == "cpu" and q.requires_grad and torch.is_grad_enabled() and k.shape[2] <= EXPLICIT_TOKENS:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (b, h, n, m)
        return scores.softmax(dim=-1).to(v.dtype) @ v  # (b, h, n, d)
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention with packed projections, optional per-head RMS norm of q and k, optional RoPE."""

    def __init__(self, dim: int, heads: int, qk_norm: bool = False, qkv_bias: bool = True):
        super().__init__()
        if dim % heads:
            raise LatelierError(f"dim = {dim} is not divisible by {heads} heads; change one of them.")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.q_norm = RMSNorm(dim // heads) if qk_norm else None
        self.k_norm = RMSNorm(dim // heads) if qk_norm else None

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        rope: Complex[Tensor, "m *h k"] | None = None,
        first: int = 0,
        mask: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Attend to all tokens where `mask` is true; a table `rope` rotates the m tokens from `first` on."""
        b, n, d = x.shape
        qk, v = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).split([2, 1], dim=2)  # (b, n, 2 and 1, h, k)
        if self.q_norm is not None and self.k_norm is not None:
            gains = torch.stack([self.q_norm.weight, self.k_norm.weight])[:, None]  # (2, 1, k)
            qk = rms_norm(qk, gains, self.q_norm.eps)
        if rope is not None:
            qk = rotate(qk, rope, first)
        q, k = qk.to(v.dtype).permute(2, 0, 3, 1, 4)  # 2 x (b, h, n, k)
        v = v[:, :, 0].transpose(1, 2)  # (b, h, n, k)
        if mask is None:
            x = attention(q, k, v)  # (b, h, n, k)
        else:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])  # (b, h, n, k)
        return self.proj(x.transpose(1, 2).reshape(b, n, d))


class CrossAttention(nn.Module):
    """Tokens of an image attend to those of a condition, `(b, m, context)`, where the mask is true."""

    def __init__(self, dim: int, heads: int, context: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(context, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "b n d"], tokens: Float[Tensor, "b m k"], mask: Bool[Tensor, "b m"] | None = None
    ) -> Float[Tensor, "b n d"]:
        b, n, d = x.shape
        q = self.q(x).view(b, n, self.heads, -1).transpose(1, 2)  # (b, h, n, d / h)
        k, v = self.kv(tokens).view(b, tokens.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)  # (b, h, m, d / h)
        allowed = None if mask is None else mask[:, None, None]  # (b, 1, 1, m)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)  # (b, h, n, d / h)
        return self.proj(x.transpose(1, 2).reshape(b, n, d))


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, computed in float32."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return rms_norm(x, self.weight, self.eps).to(x.dtype)


def rms_norm(x: Float[Tensor, "*b d"], weight: Float[Tensor, "*w d"], eps: float) -> Float[Tensor, "*b d"]:
    """x / sqrt(mean(x^2) + eps) * weight in float32; `weight` broadcasts against x.

    PyTorch has a fused kernel on GPUs only; elsewhere the gradient is written out, with half of autograd's passes.
    """
    if x.device.type == "cuda" and weight.ndim == 1:
        return F.rms_norm(x.float(), weight.shape, weight.float(), eps)
    return _RMSNormFunction.apply(x, weight, eps)


class _RMSNormFunction(torch.autograd.Function):
    """With u = x / rms(x) and g the gradient of u: dx = (g - u mean(g u)) / rms(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = (norm.square() / x.shape[-1] + eps).rsqrt()  # (*b, 1)
        ctx.save_for_backward(x, weight, inverse)
        return x.float().mul(inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        outer = outer.contiguous()  # after attention it is permuted, and strided element-wise passes are slow
        u = x.float() * inverse
        gain = _sum_like(outer * u, weight)
        g = outer * weight
        along = torch.linalg.vecdot(g, u)[..., None].div_(x.shape[-1])
        return g.addcmul_(u, along, value=-1).mul_(inverse).to(x.dtype), gain, None


def _sum_like(x: Tensor, weight: Tensor) -> Tensor:
    """Sum over the axes along which `weight` was broadcast; the leading ones by a matrix product, which is fastest."""
    trailing = x.shape[x.ndim - weight.ndim :]
    flat = x.reshape(-1, trailing.numel())
    return (flat.new_ones(len(flat)) @ flat).view(trailing).sum_to_size(weight.shape)


class MLP(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, dim: int, hidden: int, approximate: str = "none"):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.approximate = approximate

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class SwiGLU(nn.Module):
    """w3(silu(a) * b), where a and b are the halves of w12(x) (Shazeer 2020)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


class TransformerBlock(nn.Module):
    """Pre-norm ViT block: x + attention(norm(x)), then x + mlp(norm(x)).

    Both branches have learned gains that begin at `layer_scale` (LayerScale, Touvron et al. 2021); None: no gains.
    """

    def __init__(
        self, dim: int, heads: int, mlp_ratio: float = 4.0, layer_scale: float | None = None, eps: float = 1e-6
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.scale1, self.scale2 = (
            None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale)) for _ in range(2)
        )

    def forward(
        self, x: Float[Tensor, "b n d"], rope: Complex[Tensor, "m *h k"] | None = None, first: int = 0
    ) -> Float[Tensor, "b n d"]:
        branch = self.attn(self.norm1(x), rope, first)
        x = x + (branch if self.scale1 is None else branch * self.scale1)
        branch = self.mlp(self.norm2(x))
        return x + (branch if self.scale2 is None else branch * self.scale2)


def patchify(x: Float[Tensor, "b c *grid"], p: int) -> Float[Tensor, "b n k"]:
    """Images `(b, c, h, w)` or sequences `(b, c, l)` to tokens in raster order, channel first inside a patch."""
    if x.ndim == 3:
        return x.unflatten(2, (-1, p)).permute(0, 2, 1, 3).flatten(2)  # (b, l/p, c p)
    b, c, h, w = x.shape
    x = x.view(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)  # (b, h/p, w/p, c, p, p)
    return x.reshape(b, (h // p) * (w // p), c * p * p)


def unpatchify(tokens: Float[Tensor, "b n k"], p: int, grid: tuple[int, ...]) -> Float[Tensor, "b c *grid"]:
    """Tokens with the channel last inside a patch (the layout of MAE and DiT heads) to images or sequences."""
    b = tokens.shape[0]
    if len(grid) == 1:
        return tokens.view(b, grid[0], p, -1).permute(0, 3, 1, 2).flatten(2)  # (b, c, l)
    h, w = grid
    x = tokens.view(b, h, w, p, p, -1).permute(0, 5, 1, 3, 2, 4)  # (b, c, h, p, w, p)
    return x.reshape(b, -1, h * p, w * p)


def sincos_1d(dim: int, positions: Float[Tensor, " n"]) -> Float[Tensor, "n d"]:
    """[sin | cos] of positions times 10000^(-2i/dim), float64 inside."""
    omega = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angles = positions.double()[:, None] * omega  # (n, dim / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def sincos_positions(dim: int, grid: tuple[int, ...]) -> Float[Tensor, "1 n d"]:
    """Fixed position table of a grid in raster order.

    2-D (MAE, DiT): half of the channels from the column, half from the row, each [sin | cos]. 1-D (MAETok's SiT): sin
    and cos interleaved.
    """
    if min(grid) < 1 or dim % (2 * len(grid)):
        raise LatelierError(
            f"dim = {dim} and {grid} patches make no table of positions; use multiples of 4, and 1 patch."
        )
    if len(grid) == 1:
        table = sincos_1d(dim, torch.arange(grid[0]).double())
        return table.view(-1, 2, dim // 2).transpose(1, 2).reshape(1, -1, dim)
    rows, columns = torch.meshgrid(*(torch.arange(g).double() for g in grid), indexing="ij")
    halves = [sincos_1d(dim // 2, axis.flatten()) for axis in (columns, rows)]
    return torch.cat(halves, dim=1)[None]


def resize_positions(
    table: Float[Tensor, "1 n d"], old: tuple[int, ...], new: tuple[int, ...]
) -> Float[Tensor, "1 m d"]:
    """A position table for another grid by (bi)linear interpolation, corners not aligned; tokens before it stay."""
    if tuple(old) == tuple(new):
        return table
    before, inner = table.tensor_split([table.shape[1] - math.prod(old)], dim=1)
    image = inner.transpose(1, 2).unflatten(2, old)  # (1, d, *old)
    image = F.interpolate(image, tuple(new), mode="bilinear" if len(old) == 2 else "linear")  # (1, d, *new)
    return torch.cat([before, image.flatten(2).transpose(1, 2)], dim=1)


def resized(model: Any, image_size: Sequence[int], tables: Sequence[str]) -> Any:
    """A tokenizer's weights in a new one for another image size, with its position tables (by name) interpolated."""
    settings = {key: value for key, value in model.config.items() if key[0] != "_"}
    other = type(model)(**{**settings, "image_size": tuple(image_size)})
    state = model.state_dict()
    for name in set(tables) & set(state):
        state[name] = resize_positions(state[name], model.grid, other.grid)
    other.load_state_dict(state)
    return other.to(model.device)


def rope_table(
    head_dim: int, grid: tuple[int, ...], trained: tuple[int, ...], theta: float = 10000.0
) -> Complex[Tensor, "n k"]:
    """exp(i angle) of axial rotary positions (EVA-02), `(n, head_dim / 2)`: half from the row, half from the column.

    On a grid other than the trained one, positions are scaled to the trained extent.
    """
    part = head_dim // len(grid)
    omega = theta ** -(torch.arange(0, part, 2).float() / part)  # (part / 2)
    axes = [torch.arange(new).float() * (old / new) for new, old in zip(grid, trained)]
    angles = [axis[:, None] * omega for axis in axes]  # each (g, part / 2)
    if len(grid) == 2:
        h, w = grid
        angles = [angles[0][:, None].expand(h, w, -1), angles[1][None].expand(h, w, -1)]
    table = torch.cat(angles, dim=-1).reshape(-1, head_dim // 2)  # (n, head_dim / 2)
    return torch.polar(torch.ones_like(table), table)


def mixed_frequencies(depth: int, heads: int, head_dim: int, theta: float = 10.0) -> Float[Tensor, "2 depth k"]:
    """Initial frequencies of mixed rotary positions (Heo et al. 2024), k = heads * head_dim / 2.

    Magnitudes theta^(-4 i / head_dim), i < head_dim / 4, once along an axis of random direction for each head, and once
    across it. Row 0 belongs to columns, row 1 to rows of the grid.
    """
    size = theta ** -(torch.arange(0, head_dim, 4).float() / head_dim)  # (head_dim / 4,)
    phi = torch.empty(depth, heads, 1)
    nn.init.uniform_(phi, 0, 2 * math.pi)
    angles = torch.cat([phi.expand(-1, -1, len(size)), phi.expand(-1, -1, len(size)) + math.pi / 2], dim=2)
    return (torch.stack([angles.cos(), angles.sin()]) * torch.cat([size, size])).flatten(2)


def axial_frequencies(depth: int, heads: int, head_dim: int, theta: float = 100.0) -> Float[Tensor, "2 depth k"]:
    """The same layout, fixed: half of a head's pairs rotate with the column, half with the row."""
    size = theta ** -(torch.arange(0, head_dim, 4).float() / head_dim)  # (head_dim / 4,)
    zero = torch.zeros_like(size)
    return torch.stack([torch.cat([size, zero]), torch.cat([zero, size])])[:, None].repeat(1, depth, heads)


def mixed_rope_table(
    frequencies: Float[Tensor, "2 depth k"], grid: tuple[int, int], heads: int
) -> Complex[Tensor, "depth n h j"]:
    """exp(i (column f_0 + row f_1)) for every block, patch in raster order, head and pair; whole numbers, unscaled."""
    axes = (torch.arange(g, device=frequencies.device).float() for g in grid)
    rows, columns = torch.meshgrid(*axes, indexing="ij")  # (h, w)
    x, y = frequencies.float()[:, :, None]  # 2 x (depth, 1, k)
    angles = columns.reshape(-1, 1) * x + rows.reshape(-1, 1) * y  # (depth, n, k)
    return torch.polar(torch.ones_like(angles), angles).unflatten(2, (heads, -1))


def rotate(
    x: Float[Tensor, "b n *heads d"], table: Complex[Tensor, "m *h k"], first: int = 0
) -> Float[Tensor, "b n *heads d"]:
    """Rotate neighbouring pairs (x1, x2) of the m tokens from `first` on, in float32: a complex product.

    A table `(m, k)` rotates all heads alike, one of `(m, h, k)` each by its own angles.
    """
    end = first + len(table)
    inner = x[:, first:end] if len(table) < x.shape[1] else x
    pairs = torch.view_as_complex(inner.float().unflatten(-1, (-1, 2)).contiguous())  # (b, m, *heads, d / 2)
    table = table.view(len(table), *[1] * (x.ndim - 1 - table.ndim), *table.shape[1:])
    turned = torch.view_as_real(pairs * table).flatten(-2)  # (b, m, *heads, d)
    return turned if inner is x else torch.cat([x[:, :first], turned, x[:, end:]], dim=1)


class TimeEmbedding(nn.Module):
    """`sinusoid` of t, then Linear, SiLU, Linear (DiT)."""

    def __init__(self, dim: int, frequencies: int = 256):
        super().__init__()
        self.frequencies = frequencies
        self.fc1 = nn.Linear(frequencies, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, t: Float[Tensor, " b"]) -> Float[Tensor, "b d"]:
        return self.fc2(F.silu(self.fc1(sinusoid(t, self.frequencies))))


def sinusoid(t: Float[Tensor, " b"], dim: int) -> Float[Tensor, "b d"]:
    """[cos | sin] of t with periods up to 10000."""
    half = dim // 2
    omega = torch.exp(-math.log(10000.0) * torch.arange(half, device=t.device) / half)  # (half,)
    angles = t.float()[:, None] * omega  # (b, half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)  # (b, d)


def init_linear(module: nn.Module) -> None:
    """Xavier-uniform weights and zero bias for every Linear, through torch.nn.init only (safe on meta)."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
            if child.bias is not None:
                nn.init.zeros_(child.bias)


def run_block(model: Any, block: nn.Module, *inputs: Any) -> Tensor:
    """`block(*inputs)`; where the model checkpoints gradients, activations are computed again in the backward pass.

    `model.taps` has lists, by block, to which outputs are appended.
    """
    checkpointed = model.gradient_checkpointing and torch.is_grad_enabled()
    x = model._gradient_checkpointing_func(block, *inputs) if checkpointed else block(*inputs)
    taps = model.__dict__.get("taps", {})
    if block in taps:
        taps[block].append(x)
    return x


def fast_bf16(device: str) -> bool:
    """Whether bf16 matrix products are faster than fp32 on this device."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False
