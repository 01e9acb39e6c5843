"""A deep-compression autoencoder: what freezing saves in training, our Codec, and linear attention's cost curve.

Weights are random: none of what is measured depends on them.
"""

import gc
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from functools import partial

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC
from diffusers.models.attention_processor import SanaMultiscaleLinearAttention
from torch import nn

from benchmarks.timing import default_device, seconds
from latelier.layers import fast_bf16
from latelier.losses.reconstruction import ReconstructionLoss
from latelier.tokenizers import freeze
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.dcae import PRESETS, DCAEObjective

STEP = {"cpu": ("dcae15-f32c128-tiny", 256, 4), "cuda": ("dcae-f32c32", 512, 8)}  # preset, side, batch
CODEC = ("dcae-f32c32", "dcae15-f64c128")
WIDTH, HEAD = 512, 32  # of the attention: that of DC-AE 1.0's coarse levels


def phases(preset: str, side: int, batch: int, rounds: int = 5) -> list[tuple[str, float]]:
    """A training step of phase 1, where everything learns, and of phase 2, where only the layers around the latent do.

    Memory is what a step keeps for its backward pass, weights left out, and gradients with the optimiser's state: in
    phase 2 no activation of the encoder is kept, but those of the decoder are, through which the gradient comes.

    Args:
        preset: of the tokenizer.
        side: of the images in pixels.
        batch: images in a step.
        rounds: timed steps of each.
    """
    runs, kept, learnt = {}, {}, {}
    for train in ("all", "middle"):
        tokenizer = AutoencoderDC(**PRESETS[preset]).to(default_device())
        freeze(tokenizer, train)
        runs[train] = training_step(tokenizer, side, batch)
        kept[train] = saved_bytes(runs[train], tokenizer)
        learnt[train] = sum(3 * p.numel() * p.element_size() for p in tokenizer.parameters() if p.requires_grad)
    time = seconds(runs, rounds)
    return [
        (f"{preset} step, {side} px, batch {batch}, img/s", batch / time["all"]),
        (f"{preset} step, everything / phase 2: seconds", time["all"] / time["middle"]),
        (f"{preset} step, activations kept, GB", kept["all"] / 1e9),
        (f"{preset} step, everything / phase 2: activations kept", kept["all"] / kept["middle"]),
        (f"{preset} step, gradients and AdamW's state, GB", learnt["all"] / 1e9),
        (f"{preset} step, everything / phase 2: gradients and state", learnt["all"] / learnt["middle"]),
    ]


def training_step(tokenizer: AutoencoderDC, side: int, batch: int) -> Callable[[], object]:
    """L1 only, as LPIPS costs the same in both: forward, backward, optimiser."""
    device = default_device()
    objective = DCAEObjective(tokenizer, ReconstructionLoss("l1"), 0).train()
    optimizer = torch.optim.AdamW([p for p in tokenizer.parameters() if p.requires_grad], lr=1e-5, fused=True)
    images = torch.rand(batch, 3, side, side, device=device) * 2 - 1
    record = {"image": images, "sample_id": torch.arange(batch, device=device), "seen": 0}

    def step() -> None:
        with torch.autocast(device, torch.bfloat16) if fast_bf16(device) else nullcontext():
            terms = objective(record)
        terms.total.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def saved_bytes(step: Callable[[], object], model: nn.Module) -> int:
    """Bytes that autograd keeps from forward to backward; each storage counts once, weights do not."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(kept.values())


@torch.no_grad()
def codec_against_plain(preset: str, side: int = 512, rounds: int = 3) -> list[tuple[str, float]]:
    """Images per second of our Codec, and how many times those of diffusers' model as it comes, in fp32."""
    device = default_device()
    plain = AutoencoderDC(**PRESETS[preset]).eval().to(device)
    codec = Codec(deepcopy(plain), precision="auto")
    images = torch.rand(1, 3, side, side, device=device) * 2 - 1
    z = torch.randn(1, *codec.latent_shape(side, side), device=device)
    encode = seconds({"plain": lambda: plain.encode(images).latent, "codec": lambda: codec.encode(images)}, rounds)
    decode = seconds({"plain": lambda: plain.decode(z).sample, "codec": lambda: codec.decode(z)}, rounds)
    rows = []
    for what, time in (("encode", encode), ("decode", decode)):
        rows.append((f"{preset} {what}, {side} px, img/s", 1 / time["codec"]))
        rows.append((f"{preset} {what}, Codec / plain diffusers (aim 3)", time["plain"] / time["codec"]))
    return rows


@torch.no_grad()
def attention_curve(sides: tuple[int, ...] = (8, 16, 32, 64), rounds: int = 5) -> list[tuple[str, float]]:
    """Cost of linear and of softmax attention of the same width against the number of positions, fp32, one image.

    The quadratic one is `scaled_dot_product_attention` between the same projections, with heads of the same width.
    """
    device = default_device()
    linear = SanaMultiscaleLinearAttention(
        WIDTH, WIDTH, attention_head_dim=HEAD, kernel_sizes=(), norm_type="rms_norm", residual_connection=True
    )
    layers = {"linear": linear.eval().to(device), "softmax": SoftmaxAttention().eval().to(device)}
    rows, first = [], dict[str, float]()
    for side in sides:
        x = torch.randn(1, WIDTH, side, side, device=device)
        time = seconds({name: partial(layer, x) for name, layer in layers.items()}, rounds)
        first = first or time
        for name in layers:
            rows.append(
                (f"{name} attention, {side} x {side} positions, over {sides[0]} x {sides[0]}", time[name] / first[name])
            )
        rows.append((f"softmax / linear attention, {side} x {side} positions", time["softmax"] / time["linear"]))
    return rows


class SoftmaxAttention(nn.Module):
    """The linear attention's projections, norm and residual, around attention that grows with the square."""

    def __init__(self):
        super().__init__()
        self.to_qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.to_out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm = nn.RMSNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(b, c, h, w)` to the same."""
        b, c, h, w = x.shape
        qkv = self.to_qkv(x.flatten(2).transpose(1, 2))  # (b, n, 3 c)
        q, k, v = qkv.view(b, h * w, 3, c // HEAD, HEAD).permute(2, 0, 3, 1, 4)  # (b, heads, n, c / heads) each
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h * w, c)  # (b, n, c)
        return x + self.norm(self.to_out(out)).transpose(1, 2).view_as(x)


def run() -> list[tuple[str, float]]:
    """All of this file."""
    rows = phases(*STEP[default_device()])
    for preset in CODEC:
        gc.collect()  # half a billion weights at a time
        rows += codec_against_plain(preset)
    return [*rows, *attention_curve()]


if __name__ == "__main__":
    for label, value in run():
        print(f"{label}: {value:.2f}")
