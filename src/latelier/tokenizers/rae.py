"""RAE: "Diffusion Transformers with Representation Autoencoders" (ICLR 2026), and RAEv2's sums of layers.

A frozen vision encoder is the tokenizer: the latents are its patch tokens, normalised to mean 0 and variance 1, as
many numbers as it has channels and patches. Only a ViT decoder is trained, on tokens with noise added, so that it
bears what a diffusion model leaves over:

    L = L1 + w_p LPIPS + adversarial term,     of D(z + sigma eps), sigma ~ U(0, tau) or |N(0, tau^2)| for each image
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, EncoderOutput
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from latelier.errors import LatelierError, check_whole
from latelier.keyed_random import KeyedRandom
from latelier.layers import TransformerBlock, init_linear, resized, run_block, sincos_positions, unpatchify
from latelier.losses.reconstruction import ReconstructionLoss
from latelier.losses.terms import LossTerms
from latelier.sections import TrainedTokenizer, Weight, hint, open_init, preset_arguments
from latelier.tokenizers import TokenizerInfo
from latelier.tokenizers.rae_encoder import VGG16, build_encoder, open_encoder


def _preset(dim: int, depth: int, heads: int, hidden: int, patch: int = 16) -> dict[str, int]:
    sizes = {"decoder_dim": dim, "decoder_depth": depth, "decoder_heads": heads, "decoder_hidden": hidden}
    return {"patch_size": patch, **sizes}


PRESETS = {
    "vit-xl": _preset(1152, 28, 16, 4096),  # the released decoders
    "vit-l": _preset(1024, 24, 16, 4096),
    "vit-b": _preset(768, 12, 12, 3072),
    "vit-s": _preset(384, 12, 6, 1536),
    "vit-tiny-p8": _preset(192, 3, 4, 768, 8),  # minutes on a laptop's CPU, images of 64 pixels
}


class RAESection(TrainedTokenizer):
    """Representation autoencoder (RAE, ICLR 2026): a frozen vision encoder, and a ViT decoder that is trained."""

    kind: Literal["rae"]
    preset: str = "vit-xl"
    encoder: str = Field(
        "facebook/dinov2-with-registers-base", description="a ViT, a vmae or maetok run, vgg16, vgg16-relu3_3"
    )
    layers: int | list[int] = Field(1, description="the last k blocks, or their numbers, of which 1 is the first")
    combine: Literal["mean", "sum"] = Field("mean", description="of several layers, each normalised")
    final_norm: Literal["plain", "affine"] = Field("plain", description="with or without the encoder's gain and bias")
    statistics: Literal["element", "channel"] = Field("element", description="what has mean 0 and variance 1")
    noise_tau: Weight = Field(0.8, description="noise on the latents in training: the largest sigma, or its scale")
    noise_law: Literal["uniform", "half-normal"] = Field("uniform", description="sigma ~ U(0, tau) or |N(0, tau^2)|")
    train: Literal["decoder", "head"] = Field("decoder", description="the encoder is frozen always")  # type: ignore[assignment]
    perceptual_weight: Weight = 1.0


class RAE(ModelMixin, ConfigMixin):
    """A frozen encoder with a decoder.

    Args:
        encoder_config: what describes the encoder, see `rae_encoder`.
        image_size: `(h, w)` in pixels of the images that the decoder is trained on.
        patch_size: pixels along the side of a patch that the decoder makes of one token; the encoder sees images of its
            own patch times this grid.
        layers, combine, affine: which of the encoder's tokens, see `ViTEncoder`.
        statistics: whether latents are normalised by `element` (the paper) or by `channel`.
        decoder_dim, decoder_depth, decoder_heads, decoder_hidden: of the decoder, `decoder_hidden` of its MLPs.

    Differs from the reference: images are in [-1, 1]; an image of another size has a latent grid and a table of
    positions of its own, where the original resizes latents to the grid of training (`RAEDecoder.forward`).
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks = ["TransformerBlock"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        encoder_config: Mapping[str, Any],
        image_size: Sequence[int] = (256, 256),
        patch_size: int = 16,
        layers: int | list[int] = 1,
        combine: str = "mean",
        affine: bool = False,
        statistics: str = "element",
        decoder_dim: int = 1152,
        decoder_depth: int = 28,
        decoder_heads: int = 16,
        decoder_hidden: int = 4096,
    ):
        super().__init__()
        check_whole(patch_size=patch_size, decoder_dim=decoder_dim, decoder_heads=decoder_heads)
        check_whole(decoder_hidden=decoder_hidden)
        check_whole(0, decoder_depth=decoder_depth)
        self.grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        self.encoder = build_encoder(encoder_config, layers, combine, affine).requires_grad_(False).eval()
        self.decoder = RAEDecoder(
            encoder_config["dim"], len(encoder_config["mean"]), self.grid, patch_size, decoder_dim, decoder_depth,
            decoder_heads, decoder_hidden,
        )  # fmt: skip
        for name in ("mean", "std"):
            numbers = torch.tensor(encoder_config[name], dtype=torch.float32).view(-1, 1, 1)  # (c, 1, 1)
            self.register_buffer(f"pixel_{name}", numbers, persistent=False)

    @property
    def info(self) -> TokenizerInfo:
        """Sizes and layer names."""
        return TokenizerInfo(
            factor=self.config["patch_size"],
            latent_channels=self.config["encoder_config"]["dim"],
            image_channels=len(self.config["encoder_config"]["mean"]),
            middle=("decoder.embed",),
            head=("decoder.norm", "decoder.head"),
            last_layer="decoder.head.weight",
            statistics=self.config["statistics"],
        )

    def train(self, mode: bool = True) -> RAE:
        """The encoder stays in eval mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    def resized(self, image_size: Sequence[int]) -> RAE:
        """This model for another size of images."""
        return resized(self, image_size, ())

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b c h w"]) -> EncoderOutput:
        """`latent` `(b, d, h / p, w / p)`: the encoder's tokens of images in [-1, 1]."""
        patch, own = self.config["patch_size"], self.config["encoder_config"]["patch"]
        grid = (images.shape[2] // patch, images.shape[3] // patch)
        pixels = (images.float() + 1) / 2
        if (size := (grid[0] * own, grid[1] * own)) != tuple(images.shape[2:]):
            pixels = F.interpolate(pixels, size, mode="bicubic")  # (b, c, i, j)
        tokens = self.encoder((pixels - self.pixel_mean) / self.pixel_std, grid)  # (b, n, d)
        return EncoderOutput(latent=tokens.transpose(1, 2).unflatten(2, grid))

    def decode(self, z: Float[Tensor, "b d i j"]) -> DecoderOutput:
        """`sample`: images in [-1, 1], not clamped."""
        pixels = self.decoder(z) * self.pixel_std + self.pixel_mean  # (b, c, h, w), in [0, 1]
        return DecoderOutput(sample=2 * pixels - 1)

    def forward(self, images: Float[Tensor, "b c h w"]) -> DecoderOutput:
        """Reconstruction."""
        return self.decode(self.encode(images).latent)


class RAEDecoder(nn.Module):
    """A pre-norm ViT with a CLS token and fixed positions, from tokens to the pixels of their patches."""

    def __init__(
        self, width: int, channels: int, grid: tuple[int, int], patch: int, dim: int, depth: int, heads: int,
        hidden: int,
    ):  # fmt: skip
        super().__init__()
        self.grid, self.patch = grid, patch
        self.embed = nn.Linear(width, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(TransformerBlock(dim, heads, hidden / dim, eps=1e-12) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.head = nn.Linear(dim, patch**2 * channels)
        self.register_buffer("pos_embed", sincos_positions(dim, grid), persistent=False)
        self.gradient_checkpointing = False
        init_linear(self)

    def forward(self, z: Float[Tensor, "b d i j"], grid: tuple[int, int] | None = None) -> Float[Tensor, "b c h w"]:
        """Pixels in the encoder's normalisation.

        Args:
            z: latents as the encoder makes them.
            grid: of the patches that are made; tokens of another grid are resized after the embedding, as the original
                does to keep its size. None: that of `z`.
        """
        x = self.embed(z.flatten(2).transpose(1, 2))  # (b, n, d)
        if grid is not None and tuple(grid) != tuple(z.shape[2:]):
            planes = x.transpose(1, 2).unflatten(2, z.shape[2:])  # (b, d, i, j)
            x = F.interpolate(planes, grid, mode="bilinear").flatten(2).transpose(1, 2)  # (b, n, d)
        grid = grid or (z.shape[2], z.shape[3])
        table = self.pos_embed if grid == self.grid else sincos_positions(x.shape[2], grid).to(x)  # (1, n, d)
        x = torch.cat([self.cls_token.to(x.dtype).expand(len(x), -1, -1), x + table], dim=1)  # (b, 1 + n, d)
        for block in self.blocks:
            x = run_block(self, block, x)
        return unpatchify(self.head(self.norm(x))[:, 1:], self.patch, grid)  # (b, c, h, w)


SECTIONS, MODELS = (RAESection,), (RAE,)


def build(section: RAESection, channels: int, image_size: Sequence[int]) -> RAE:
    """A fresh decoder on the encoder's weights, or what `init` holds.

    On the meta device, where a recipe's `model` is tried, VGG16 stands for the encoder, which is not looked for.

    Raises:
        LatelierError: if there is no such encoder, or it takes images of other channels.
    """
    if section.init:
        return open_init(RAE, section.init)
    for key in section.model:
        if key not in (known := list(PRESETS["vit-b"])):  # what else the constructor takes are keys of the section
            raise LatelierError(f"Unknown key 'tokenizer.model.{key}'; {hint(str(key), known)}")
    arguments = preset_arguments(RAE, PRESETS, section.preset, section.model)
    if (width := arguments["decoder_dim"]) % 4:
        raise LatelierError(f"tokenizer.model.decoder_dim = {width} makes no table of positions; use a multiple of 4.")
    arguments |= {"image_size": tuple(image_size)}
    if torch.empty(0).is_meta:
        return RAE(VGG16, **arguments)
    encoder, weights = open_encoder(section.encoder)
    if len(encoder["mean"]) != channels:
        raise LatelierError(
            f"tokenizer.encoder = {section.encoder} takes images of {len(encoder['mean'])} channels, not {channels}; "
            "change data.channels."
        )
    chosen = {"layers": section.layers, "combine": section.combine, "affine": section.final_norm == "affine"}
    model = RAE(encoder, **arguments, **chosen, statistics=section.statistics)
    model.encoder.load_state_dict(weights)
    return model


def objective(
    section: RAESection, tokenizer: RAE, perceptual: nn.Module | None, seed: int, dataset: Any = None
) -> RAEObjective:
    """The objective of a recipe's section."""
    loss = ReconstructionLoss("l1", perceptual, section.perceptual_weight, section.perceptual_every)
    return RAEObjective(tokenizer, loss, seed, section.noise_tau, section.noise_law)


class RAEObjective(nn.Module):
    """L1 + w_p LPIPS of what the decoder makes of noisy latents; the loop adds the adversarial term.

    Args:
        tokenizer: whose decoder is trained.
        reconstruction_loss: `l1` of the pixels, and LPIPS.
        seed: of the noise.
        tau, law: see `noise_levels`; 0 adds no noise.
    """

    def __init__(
        self, tokenizer: RAE, reconstruction_loss: ReconstructionLoss, seed: int, tau: float = 0.0, law: str = "uniform"
    ):
        super().__init__()
        self.tokenizer, self.reconstruction_loss = tokenizer, reconstruction_loss
        self.seed, self.tau, self.law = seed, tau, law

    def forward(self, batch: dict[str, Any]) -> LossTerms:
        """Terms of `batch["image"]` `(b, c, h, w)`; `sample_id` keys the noise.

        The paper's images are in [0, 1] and ours in [-1, 1], so that its L1 of weight 1 has a half here.
        """
        images = batch["image"]
        z = self.tokenizer.encode(images).latent  # (b, d, i, j)
        if self.tau:
            rng = KeyedRandom(self.seed, batch["sample_id"], images.device)
            sigma = noise_levels(rng, self.tau, self.law).view(-1, 1, 1, 1)  # (b, 1, 1, 1)
            z = z + sigma * rng.normal("latent noise", *z.shape[1:])
        reconstruction = self.tokenizer.decode(z).sample.float()  # (b, c, h, w)
        losses = self.reconstruction_loss(reconstruction, images, batch["sample_id"])
        weights = {"l1": 0.5, "lpips": self.reconstruction_loss.perceptual_weight}
        return LossTerms(losses, {name: weights[name] for name in losses}, reconstruction=reconstruction)


def noise_levels(rng: KeyedRandom, tau: float, law: str) -> Float[Tensor, " b"]:
    """sigma of each image: U(0, tau) (the released code) or |N(0, tau^2)| (the paper's text)."""
    if law == "half-normal":
        return tau * rng.normal("noise level", 1)[:, 0].abs()
    return tau * rng.uniform("noise level", 1)[:, 0]
