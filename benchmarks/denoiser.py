"""A training step of LightningDiT-B/1 on 1,024 tokens: achieved FLOP/s over the matrix-product peak."""

from contextlib import nullcontext

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import default_device, matmul, seconds
from latelier.denoisers.dit import SIZES, SWITCHES, DiT
from latelier.layers import fast_bf16


def run() -> list[tuple[str, float]]:
    """Utilisation of the step: forward, backward, optimiser."""
    device = default_device()
    batch = 4 if device == "cpu" else 32
    model = DiT(16, (32, 32), **SIZES["B"], **SWITCHES["lightning-dit"]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    x, t = torch.randn(batch, 16, 32, 32, device=device), torch.rand(batch, device=device)
    bf16 = fast_bf16(device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16) if bf16 else nullcontext():
            prediction = model(x, t)
        prediction.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    product, product_flops = matmul(device, torch.bfloat16 if bf16 else torch.float32)
    with FlopCounterMode(display=False) as counter:
        step()
    time = seconds({"step": step, "product": product}, 5)
    achieved, peak = counter.get_total_flops() / time["step"], product_flops / time["product"]
    return [
        ("matrix-product peak, TFLOP/s", peak / 1e12),
        ("LightningDiT-B/1 step, TFLOP/s", achieved / 1e12),
        ("LightningDiT-B/1 step / peak (aim 0.4)", achieved / peak),
    ]
