"""Deep-compression autoencoders: presets of DC-AE (ICLR 2025) and DC-AE 1.5 (ICCV 2025) on diffusers' AutoencoderDC.

A plain autoencoder (no KL, no codebook) of factor 8 to 128. Its down- and upsampling have shortcuts that need no
weights: pixels go into channels and their means are added. DC-AE 1.5 is the same class without the shortcuts around
the latent and without attention; it is trained so that any prefix of its channels decodes (structured latents): the
decoder sees a random prefix of the channels, the others being zero,

    L = l(x, D(mask_{c,c'} E(x)))        c' drawn anew in each step

so that the first channels carry what matters most. The encoder runs once a step, the decoder once for each draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from diffusers import AutoencoderDC
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from latelier.errors import LatelierError
from latelier.losses.reconstruction import ReconstructionLoss
from latelier.losses.regularise import Regularisers, build_regularisers
from latelier.losses.terms import LossTerms
from latelier.prefixes import RandomPrefixes, keep_prefix, random_prefixes
from latelier.sections import Prefixes, TrainedTokenizer, Weight, open_init, preset_arguments

FINE = 3  # levels, from the pixels on, with convolutions; below them DC-AE 1.0 has linear attention


def _attentive(channels: int, deeper: tuple[int, ...] = ()) -> dict[str, Any]:
    """DC-AE 1.0: residual convolutions in the three finest levels, linear attention in the others."""
    widths = (128, 256, 512, 512, 1024, 1024, *deeper)
    depth = len(widths)
    blocks = ("ResBlock",) * FINE + ("EfficientViTBlock",) * (depth - FINE)
    return {
        "latent_channels": channels,
        **_both("block_out_channels", widths), **_both("block_types", blocks),
        **_both("qkv_multiscales", ((),) * depth),
        "encoder_layers_per_block": (0, 4, 8) + (2,) * (depth - FINE),
        "decoder_layers_per_block": (0, 5, 10) + (2,) * (depth - FINE),
        "decoder_norm_types": ("batch_norm",) * FINE + ("rms_norm",) * (depth - FINE),
        "decoder_act_fns": ("relu",) * FINE + ("silu",) * (depth - FINE),
    }  # fmt: skip


def _sana() -> dict[str, Any]:
    """SANA's f32: attention that also looks at 5 x 5 means, strided convolutions instead of shuffled pixels."""
    blocks, scales = ("ResBlock",) * FINE + ("EfficientViTBlock",) * 3, ((),) * FINE + ((5,),) * 3
    return {
        "latent_channels": 32, **_both("block_types", blocks), **_both("qkv_multiscales", scales),
        "downsample_block_type": "conv", "upsample_block_type": "interpolate",
    }  # fmt: skip


def _convolutional(channels: int, widths: tuple[int, ...], layers: tuple[int, ...]) -> dict[str, Any]:
    """DC-AE 1.1 and 1.5: convolutions only, no shortcuts around the latent, whose channels are free to be ordered."""
    return {
        "latent_channels": channels, **_both("block_out_channels", widths), **_both("layers_per_block", layers),
        **_both("qkv_multiscales", ((),) * len(widths)), "encoder_out_shortcut": False, "decoder_in_shortcut": False,
        "decoder_conv_act_fn": "silu",
    }  # fmt: skip


def _both(name: str, value: Any) -> dict[str, Any]:
    return {f"encoder_{name}": value, f"decoder_{name}": value}


PRESETS = {
    "dcae-f32c32": _attentive(32),
    "dcae-f64c128": _attentive(128, (2048,)),
    "dcae-f128c512": _attentive(512, (2048, 2048)),
    "dcae-f32c32-sana": _sana(),
    "dcae15-f32c128": _convolutional(128, (128, 256, 512, 512, 1024, 1024), (0, 5, 10, 4, 4, 4)),
    "dcae15-f64c128": _convolutional(128, (128, 256, 512, 512, 1024, 1024, 1024), (0, 5, 10, 4, 4, 4, 4)),
    # For images of 64 to 128 pixels and few cores.
    "dcae15-f8c32-tiny": _convolutional(32, (16, 32, 64, 128), (0, 1, 1, 2)),
    "dcae15-f16c64-tiny": _convolutional(64, (16, 32, 64, 128, 256), (0, 1, 1, 2, 2)),
    "dcae15-f32c128-tiny": _convolutional(128, (16, 32, 64, 128, 256, 256), (0, 1, 1, 2, 2, 2)),
}


class DCAESection(TrainedTokenizer):
    """Deep-compression autoencoder (DC-AE, ICLR 2025). Method `structured` is DC-AE 1.5's: random channel prefixes."""

    METHODS: ClassVar[dict[str, dict[str, Any]]] = {"plain": {"prefixes": None}, "structured": {"prefixes": {}}}

    kind: Literal["dcae"]
    preset: str = "dcae-f32c32"
    reconstruction: Literal["l1", "l2"] = "l1"
    perceptual_weight: Weight = 0.5
    prefixes: Prefixes | None = Field(None, description="structured latents: any prefix of the channels decodes")


SECTIONS, MODELS = (DCAESection,), ()


def build(section: DCAESection, channels: int, image_size: Sequence[int] = ()) -> AutoencoderDC:
    """An autoencoder for images of any size, fresh or from `init`; an error for widths that shortcuts cannot divide."""
    if section.init:
        return open_init(AutoencoderDC, section.init)
    arguments = {**preset_arguments(AutoencoderDC, PRESETS, section.preset, section.model), "in_channels": channels}
    levels = {key: len(value) for key, value in arguments.items() if isinstance(value, tuple | list)}
    if len(set(levels.values())) > 1:
        counts = ", ".join(f"{key} {count}" for key, count in levels.items())
        raise LatelierError(f"tokenizer.model does not fit preset {section.preset}: levels differ ({counts}).")
    try:
        return AutoencoderDC(**arguments)
    except (AssertionError, ValueError) as error:
        raise LatelierError(
            f"tokenizer.model does not fit preset {section.preset} ({error or 'a width is no multiple of 4'}); with "
            "shuffled pixels each width must be a multiple or a part of the one before, and of 4."
        ) from None


def objective(
    section: DCAESection, tokenizer: AutoencoderDC, perceptual: nn.Module | None, seed: int, dataset: Any = None
) -> DCAEObjective:
    """The objective of a recipe's section; an error if its prefixes do not fit the latents."""
    loss = ReconstructionLoss(section.reconstruction, perceptual, section.perceptual_weight, section.perceptual_every)
    prefixes = random_prefixes(section.prefixes, tokenizer.config["latent_channels"])
    return DCAEObjective(tokenizer, loss, seed, prefixes, build_regularisers(section, tokenizer, seed, dataset))


class DCAEObjective(nn.Module):
    """L1 or L2 + LPIPS, averaged over the prefixes of a step (structured latents); None: all channels in every step."""

    def __init__(
        self,
        tokenizer: AutoencoderDC,
        reconstruction_loss: ReconstructionLoss,
        seed: int,
        prefixes: RandomPrefixes | None = None,
        regularise: Regularisers | None = None,
    ):
        super().__init__()
        self.tokenizer, self.reconstruction_loss, self.seed = tokenizer, reconstruction_loss, seed
        self.prefixes, self.regularise = prefixes, regularise or Regularisers()

    def train(self, mode: bool = True) -> DCAEObjective:
        """Batch norms with frozen weights keep their statistics."""
        super().train(mode)
        for module in self.tokenizer.modules():
            if isinstance(module, nn.BatchNorm2d) and not module.weight.requires_grad:
                module.eval()
        return self

    def forward(self, batch: dict[str, Any]) -> LossTerms:
        """L = mean over lengths c' of l(x, D(mask_{c,c'} E(x))) (DC-AE 1.5); an adversarial loss sees the first one.

        `batch["image"]` is `(b, c, h, w)`; `seen` keys the lengths.
        """
        x = self.regularise.images(batch)  # (b, c, h, w)
        latent = self.regularise(self.tokenizer.encode(x).latent, x, batch)
        z = latent.z  # (b, k, h/f, w/f)
        lengths = [z.shape[1]] if self.prefixes is None else self.prefixes.draw(self.seed, batch["seen"])
        decoded = [self._decode(keep_prefix(z, length)) for length in lengths]  # (b, c, h, w)
        each = [self.reconstruction_loss(y, latent.target, batch["sample_id"]) for y in decoded]
        losses = {name: torch.stack([terms[name] for terms in each]).mean() for name in each[0]}
        weights = {name: self.reconstruction_loss.perceptual_weight if name == "lpips" else 1.0 for name in losses}
        if self.prefixes is not None:
            losses["prefix"] = z.new_tensor(lengths, dtype=torch.float32).mean()  # in the log only
        terms = LossTerms(losses, weights, reconstruction=decoded[0])
        return self.regularise.add(terms, latent, batch, self.tokenizer, self._decode, self.reconstruction_loss)

    def _decode(self, z: Float[Tensor, "b k i j"]) -> Float[Tensor, "b c h w"]:
        return self.tokenizer.decode(z).sample.float()
