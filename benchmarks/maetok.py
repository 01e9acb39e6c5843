"""A MAETok: what one pass instead of two saves in training, how much of the peak a step reaches, images per second.

The released training script of the paper runs the encoder twice in each step and takes the mask from the second pass.
The wasteful steps here do that in our code, with everything else as it is: the first result is thrown away. A second
form lets the pixel decoder and the auxiliary decoders run twice as well, as where each loss makes its own prediction.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import default_device, matmul, seconds
from latelier.layers import fast_bf16
from latelier.tokenizers import build_objective
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.maetok import PRESETS, MAETok, MAETokSection

MINI, BASE = ("maetok-mini-32", 64), ("maetok-b-128", 256)  # preset and side of the images
BATCH = {"cpu": 4, "cuda": 32}  # of the base model


def training_step(preset: str, side: int, batch: int, waste: str = "") -> Callable[[], object]:
    """A step with HOG as the target: forward, backward, optimiser.

    Args:
        preset: of the tokenizer.
        side: of the images in pixels.
        batch: images in a step.
        waste: what is run a second time for nothing: `encoder`, `all` (the decoders too), or nothing.
    """
    device = default_device()
    tokenizer = MAETok((side, side), **PRESETS[preset])
    section = MAETokSection(kind="maetok", preset=preset, targets=[{"kind": "hog"}], perceptual_weight=0)
    objective = build_objective(section, 0, tokenizer).to(device)
    if waste:
        run_twice(tokenizer, "moments")
    if waste == "all":
        run_twice(tokenizer, "paint")
        for decoder in objective.auxiliary.values():  # type: ignore[union-attr, operator]
            run_twice(decoder, "forward")
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=1e-4, fused=True)
    numbers = torch.arange(batch, device=device)
    images = torch.rand(batch, 3, side, side, device=device) * 2 - 1
    record = {"image": images, "sample_id": numbers, "index": numbers, "seen": 0}

    def step() -> None:
        with autocast(device):
            terms = objective(record)
        terms.total.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def run_twice(module: nn.Module, name: str) -> None:
    """Let a method do its work, forget it, and do it again."""
    method = getattr(module, name)

    def twice(*args: Any, **kwargs: Any) -> Any:
        method(*args, **kwargs)
        return method(*args, **kwargs)

    setattr(module, name, twice)


def autocast(device: str) -> AbstractContextManager:
    """bf16 where the device is fast at it."""
    return torch.autocast(device, torch.bfloat16) if fast_bf16(device) else nullcontext()


def one_pass(preset: str = MINI[0], side: int = MINI[1], batch: int = 32, rounds: int = 7) -> list[tuple[str, float]]:
    """A training step that runs each network once, and the same with networks run a second time."""
    steps = {waste: training_step(preset, side, batch, waste) for waste in ("", "encoder", "all")}
    time = seconds(steps, rounds)
    return [
        (f"{preset} step, {side} px, img/s", batch / time[""]),
        (f"{preset} step, encoder twice / once (as the released script)", time["encoder"] / time[""]),
        (f"{preset} step, encoder and decoders twice / once", time["all"] / time[""]),
    ]


def utilisation(preset: str, side: int, batch: int, rounds: int = 5) -> list[tuple[str, float]]:
    """FLOP/s of a training step over those of a square matrix product in the same precision and process."""
    device = default_device()
    step = training_step(preset, side, batch)
    # The fused attention of the CPU is not counted; its definition in matrix products is.
    definition = sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext()
    with FlopCounterMode(display=False) as counter, definition:
        step()
    product, product_flops = matmul(device, torch.bfloat16 if fast_bf16(device) else torch.float32)
    time = seconds({"step": step, "product": product}, rounds)
    achieved, peak = counter.get_total_flops() / time["step"], product_flops / time["product"]
    return [
        (f"{preset} step, {side} px, batch {batch}, TFLOP/s", achieved / 1e12),
        (f"{preset} step / matrix-product peak (aim 0.4)", achieved / peak),
    ]


def throughput(preset: str, side: int, batch: int, rounds: int = 5) -> list[tuple[str, float]]:
    """Images per second of encoder and decoder, without gradients."""
    device = default_device()
    codec = Codec(MAETok((side, side), **PRESETS[preset]).eval().to(device), precision="auto")
    images = torch.rand(batch, 3, side, side, device=device) * 2 - 1
    z = torch.randn(batch, *codec.latent_shape(side, side), device=device)
    with torch.no_grad():
        time = seconds({"encode": lambda: codec.encode(images), "decode": lambda: codec.decode(z)}, rounds)
    return [(f"{preset} {what}, {side} px, img/s", batch / time[what]) for what in ("encode", "decode")]


def run() -> list[tuple[str, float]]:
    """All of this file."""
    batch = BATCH[default_device()]
    return [
        *one_pass(),
        *utilisation(*MINI, 32),
        *utilisation(*BASE, batch, rounds=3),
        *throughput(*MINI, 32),
        *throughput(*BASE, batch, rounds=3),
    ]
