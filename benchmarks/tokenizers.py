"""VMAE against the SD3-shaped AutoencoderKL, our Codec against plain diffusers, and what dropped tokens save."""

from contextlib import nullcontext

import torch
from diffusers import AutoencoderKL

from benchmarks.timing import default_device, seconds
from latelier.layers import fast_bf16
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.conv import PRESETS as CONV
from latelier.tokenizers.vmae import PRESETS, VMAE, VMAEObjective

BATCH = {"cpu": 2, "cuda": 32}


def vmae_against_kl() -> list[tuple[str, float]]:
    """Throughput of VMAE f8d16 over that of an AutoencoderKL f8c16, 256 px, same precision, best layout each."""
    device = default_device()
    images = torch.rand(BATCH[device], 3, 256, 256, device=device) * 2 - 1
    vmae = Codec(VMAE((256, 256), **PRESETS["vmae-f8d16"]).eval().to(device), precision="auto")
    kl = AutoencoderKL(**CONV["kl-f8c16"]).eval().to(device, memory_format=torch.channels_last)
    codec = Codec(kl, precision="auto")
    z = torch.randn(BATCH[device], 16, 32, 32, device=device)
    with torch.no_grad():
        encode = seconds({"vmae": lambda: vmae.encode(images), "kl": lambda: codec.encode(images)})
        decode = seconds({"vmae": lambda: vmae.decode(z), "kl": lambda: codec.decode(z)})
    return [
        ("VMAE f8d16 encode, img/s", BATCH[device] / encode["vmae"]),
        ("VMAE f8d16 decode, img/s", BATCH[device] / decode["vmae"]),
        ("VMAE f8d16 encode / AutoencoderKL f8c16 (aim 4)", encode["kl"] / encode["vmae"]),
        ("VMAE f8d16 decode / AutoencoderKL f8c16 (aim 4)", decode["kl"] / decode["vmae"]),
    ]


def codec_against_plain() -> list[tuple[str, float]]:
    """Our Codec around an AutoencoderKL against the same model called as a diffusers user would call it."""
    device = default_device()
    images = torch.rand(1, 3, 256, 256, device=device) * 2 - 1
    plain = AutoencoderKL(**CONV["kl-f8c4"]).eval().to(device)
    codec = Codec(AutoencoderKL.from_config(plain.config).eval().to(device), precision="auto")
    codec.tokenizer.to(memory_format=torch.channels_last)
    z = torch.randn(1, 4, 32, 32, device=device)
    with torch.no_grad():
        encode = seconds(
            {"codec": lambda: codec.encode(images), "plain": lambda: plain.encode(images).latent_dist.mode()}, 3
        )
        decode = seconds({"codec": lambda: codec.decode(z), "plain": lambda: plain.decode(z).sample}, 3)
    return [
        ("Codec encode / plain diffusers (aim 4)", encode["plain"] / encode["codec"]),
        ("Codec decode / plain diffusers (aim 4)", decode["plain"] / decode["codec"]),
    ]


def dropped_tokens() -> list[tuple[str, float]]:
    """A VMAE training step at mask ratio 0 over one at 0.75: encoder tokens that are dropped must cost nothing."""
    device = default_device()
    images = torch.rand(16, 3, 128, 128, device=device) * 2 - 1
    batch = {"image": images, "sample_id": torch.arange(len(images))}
    # The encoder is what masking saves; a shallow decoder keeps the rest of the step small, as in MAE.
    sizes = {**PRESETS["vmae-f8d16"], "decoder_depth": 2}
    tokenizer = VMAE((128, 128), **sizes).to(device)

    def step(ratio: float):
        objective = VMAEObjective(tokenizer, seed=0, mask_ratio=ratio)

        def run() -> None:
            with torch.autocast(device, torch.bfloat16) if fast_bf16(device) else nullcontext():
                terms = objective(batch)
            terms.total.backward()
            tokenizer.zero_grad()

        return run

    time = seconds({"all": step(0.0), "quarter": step(0.75)})
    return [("VMAE step, mask 0 / mask 0.75 (at least 1.8)", time["all"] / time["quarter"])]


def training_layout() -> list[tuple[str, float]]:
    """A training step of a small AutoencoderKL in channels_last over one in the contiguous layout, 64 px."""
    device = default_device()
    images = torch.rand(32, 3, 64, 64, device=device) * 2 - 1

    def step(layout: torch.memory_format):
        tokenizer = AutoencoderKL(**CONV["kl-f8c16-tiny"]).to(device, memory_format=layout)

        def run() -> None:
            with torch.autocast(device, torch.bfloat16) if fast_bf16(device) else nullcontext():
                error = (tokenizer(images.contiguous(memory_format=layout)).sample.float() - images).square().mean()
            error.backward()
            tokenizer.zero_grad()

        return run

    time = seconds({"last": step(torch.channels_last), "contiguous": step(torch.contiguous_format)})
    return [("AutoencoderKL step, channels_last / contiguous", time["last"] / time["contiguous"])]


def run() -> list[tuple[str, float]]:
    """All of this file."""
    return [*vmae_against_kl(), *codec_against_plain(), *dropped_tokens(), *training_layout()]
