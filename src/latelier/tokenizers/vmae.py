"""VMAE: the variational masked autoencoder of "Latent Diffusion Models with Masked AutoEncoders" (ICCV 2025).

A ViT encoder sees only the visible patches (dropped tokens cost nothing), `to_latent` turns each token into the mean
and log-variance of its latent, and a ViT decoder fills in mask tokens for the rest and decodes the whole image. At
inference nothing is masked and the latents form a grid `(c, h / p, w / p)`. The objective, with v = `visible_weight`:

    L = (1 - v) MSE(masked patches) + v MSE(visible patches) + w_p LPIPS(whole image) + w_kl KL

where the KL leaves the mean free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from latelier.errors import check_whole
from latelier.keyed_random import KeyedRandom
from latelier.layers import (
    TransformerBlock,
    init_linear,
    patchify,
    resize_positions,
    resized,
    run_block,
    sincos_positions,
    unpatchify,
)
from latelier.losses.reconstruction import ReconstructionLoss, gaussian_kl
from latelier.losses.regularise import Regularisers, build_regularisers
from latelier.losses.terms import LossTerms
from latelier.sections import TrainedTokenizer, Unit, Weight, open_init, preset_arguments
from latelier.tokenizers import TokenizerInfo


def _preset(patch: int, latent: int, dim: int, heads: int, depth: int = 12) -> dict:
    """Symmetric encoder and decoder, as in the paper."""
    sizes = {"dim": dim, "depth": depth, "heads": heads}
    return {"patch_size": patch, "latent_channels": latent, **sizes, **{f"decoder_{k}": v for k, v in sizes.items()}}


PRESETS = {
    "vmae-f8d16": _preset(8, 16, 192, 12),  # the paper's, 10.8M trainable parameters
    "vmae-f8d16-small": _preset(8, 16, 96, 8),
    "vmae-f8d16-large": _preset(8, 16, 384, 16),
    "vmae-f8d32": _preset(8, 32, 192, 12),
    "vmae-f16d32": _preset(16, 32, 192, 12),
    "vmae-f8d16-tiny": _preset(8, 16, 128, 4, depth=2),  # minutes on a laptop's CPU
}


class VMAESection(TrainedTokenizer):
    """Variational masked autoencoder (LDMAE, ICCV 2025)."""

    METHODS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"mask_ratio": 0.6, "kl": "free-mean", "kl_weight": 1e-6, "perceptual_weight": 0.5},
        "released": {"mask_ratio": 0.25, "kl": "fixed-std", "kl_weight": 1e-6, "perceptual_weight": 0.5},
    }

    kind: Literal["vmae"]
    preset: str = "vmae-f8d16"
    mask_ratio: float = Field(0.6, ge=0, lt=1)
    visible_weight: Unit = Field(0.5, description="v in (1 - v) * masked MSE + v * visible MSE")
    kl_weight: Weight = 1e-6
    kl: Literal["free-mean", "standard", "fixed-std"] = "free-mean"
    fixed_std: float = Field(1e-3, gt=0, description="s of `kl: fixed-std`")
    sample_posterior: bool = Field(True, description="decode a draw of the posterior in training; false: its mean")

    @property
    def deterministic(self) -> bool:
        """Whether the posterior's spread is neither used nor trained."""
        return not self.sample_posterior and not self.kl_weight


class VMAE(ModelMixin, ConfigMixin):
    """Variational masked autoencoder on patches.

    Args:
        image_size: `(h, w)` in pixels of the position tables; for other multiples of the patch they are interpolated.
        patch_size: side of a patch in pixels, the compression factor f.
        in_channels, latent_channels: of images and latents.
        dim, depth, heads: of the encoder.
        decoder_dim, decoder_depth, decoder_heads: of the decoder.
        mlp_ratio: hidden width of the MLPs over the width.
        smooth: whether a 3x3 convolution on the image follows the linear head ("smooth output").

    Differs from the reference: patches are embedded by a Linear (the same function as a strided convolution), the mask
    token is always there, and attention runs through `layers.attention`.
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks = ["TransformerBlock"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        image_size: Sequence[int] = (256, 256),
        patch_size: int = 8,
        in_channels: int = 3,
        latent_channels: int = 16,
        dim: int = 192,
        depth: int = 12,
        heads: int = 12,
        decoder_dim: int = 192,
        decoder_depth: int = 12,
        decoder_heads: int = 12,
        mlp_ratio: float = 4.0,
        smooth: bool = True,
    ):
        super().__init__()
        check_whole(patch_size=patch_size, in_channels=in_channels, latent_channels=latent_channels)
        check_whole(dim=dim, heads=heads, decoder_dim=decoder_dim, decoder_heads=decoder_heads)
        check_whole(0, depth=depth, decoder_depth=decoder_depth)
        self.grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        patch_values = in_channels * patch_size**2
        self.patch_embed = nn.Linear(patch_values, dim)
        self.blocks = nn.ModuleList(TransformerBlock(dim, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.to_latent = nn.Linear(dim, 2 * latent_channels)

        self.from_latent = nn.Linear(latent_channels, dim)
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder_blocks = nn.ModuleList(
            TransformerBlock(decoder_dim, decoder_heads, mlp_ratio) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.head = nn.Linear(decoder_dim, patch_values)
        self.smoother = nn.Conv2d(in_channels, in_channels, 3, padding=1) if smooth else nn.Identity()

        self.register_buffer("pos_embed", sincos_positions(dim, self.grid))
        self.register_buffer("decoder_pos_embed", sincos_positions(decoder_dim, self.grid))
        self.gradient_checkpointing = False
        init_linear(self)
        nn.init.normal_(self.mask_token, std=0.02)

    @property
    def info(self) -> TokenizerInfo:
        """Sizes and layer names."""
        return TokenizerInfo(
            factor=self.config["patch_size"],
            latent_channels=self.config["latent_channels"],
            image_channels=self.config["in_channels"],
            decoder_modules=(
                "from_latent", "decoder_embed", "mask_token", "decoder_blocks", "decoder_norm", "head", "smoother",
            ),
            middle=("to_latent", "from_latent"),
            head=("decoder_norm", "head", "smoother"),
            last_layer="smoother.weight" if self.config["smooth"] else "head.weight",
            variance_layer="to_latent",
        )  # fmt: skip

    def resized(self, image_size: Sequence[int]) -> VMAE:
        """This model for another size of images, position tables interpolated; there both compute the same."""
        return resized(self, image_size, ("pos_embed", "decoder_pos_embed"))

    def moments(
        self, images: Float[Tensor, "b c h w"], keep: Int[Tensor, "b k"] | None = None
    ) -> Float[Tensor, "b k m"]:
        """Mean and log-variance `(b, k, 2 c)` of each visible token's latent.

        Args:
            images: in [-1, 1].
            keep: raster indices of the visible patches, in the order in which the encoder sees them; None keeps all.
        """
        p = self.config["patch_size"]
        patches = patchify(images, p)  # (b, n, c p p)
        grid = (images.shape[2] // p, images.shape[3] // p)
        positions = resize_positions(self.pos_embed, self.grid, grid)  # (1, n, d)
        if keep is not None:
            patches, positions = _take(patches, keep), _take(positions.expand(len(keep), -1, -1), keep)
        x = self.patch_embed(patches) + positions  # (b, k, d)
        for block in self.blocks:
            x = run_block(self, block, x)
        return self.to_latent(self.norm(x))  # (b, k, 2 c)

    def decode_tokens(
        self, z: Float[Tensor, "b k l"], grid: tuple[int, int], keep: Int[Tensor, "b k"] | None = None
    ) -> Float[Tensor, "b c h w"]:
        """The whole image from the latents of the visible tokens."""
        x = self.decoder_embed(self.from_latent(z))  # (b, k, d)
        if keep is not None:
            canvas = self.mask_token.to(x.dtype).repeat(len(x), grid[0] * grid[1], 1)  # (b, n, d)
            x = canvas.scatter(1, keep[..., None].expand_as(x), x)
        x = x + resize_positions(self.decoder_pos_embed, self.grid, grid)
        for block in self.decoder_blocks:
            x = run_block(self, block, x)
        x = self.head(self.decoder_norm(x))  # (b, n, p p c)
        return self.smoother(unpatchify(x, self.config["patch_size"], grid))  # (b, c, h, w)

    def encode(self, images: Float[Tensor, "b c h w"]) -> AutoencoderKLOutput:
        """`latent_dist` over the latent grid `(b, c, h / p, w / p)`; nothing is masked."""
        p = self.config["patch_size"]
        moments = self.moments(images)  # (b, n, 2 c)
        moments = moments.transpose(1, 2).unflatten(2, (images.shape[2] // p, images.shape[3] // p))
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments.float()))

    def decode(self, z: Float[Tensor, "b c *grid"]) -> DecoderOutput:
        """`sample`: images of a latent grid."""
        return DecoderOutput(sample=self.decode_tokens(z.flatten(2).transpose(1, 2), tuple(z.shape[2:])))

    def forward(self, images: Float[Tensor, "b c h w"]) -> DecoderOutput:
        """Reconstruction through the posterior's mean."""
        return self.decode(self.encode(images).latent_dist.mode())


SECTIONS, MODELS = (VMAESection,), (VMAE,)


def build(section: VMAESection, channels: int, image_size: Sequence[int]) -> VMAE:
    """A VMAE for these images, fresh or from `init`."""
    if section.init:
        return open_init(VMAE, section.init)
    arguments = preset_arguments(VMAE, PRESETS, section.preset, section.model)
    return VMAE(**{**arguments, "image_size": tuple(image_size), "in_channels": channels})


def objective(
    section: VMAESection, tokenizer: VMAE, perceptual: nn.Module | None, seed: int, dataset: Any = None
) -> VMAEObjective:
    """The objective of a recipe's section."""
    return VMAEObjective(
        tokenizer, seed, section.mask_ratio, section.visible_weight, section.kl, section.kl_weight, section.fixed_std,
        section.sample_posterior, perceptual, section.perceptual_weight, section.perceptual_every,
        build_regularisers(section, tokenizer, seed, dataset),
    )  # fmt: skip


class VMAEObjective(nn.Module):
    """Loss terms of a VMAE.

    Args:
        tokenizer: the model to train.
        seed: of the masks and the posterior's noise.
        perceptual: LPIPS, or None.
        others: as in `VMAESection`; see `gaussian_kl` and `ReconstructionLoss`.
    """

    def __init__(
        self,
        tokenizer: VMAE,
        seed: int,
        mask_ratio: float = 0.6,
        visible_weight: float = 0.5,
        kl: str = "free-mean",
        kl_weight: float = 1e-6,
        fixed_std: float = 1e-3,
        sample_posterior: bool = True,
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 0.5,
        perceptual_every: int = 1,
        regularise: Regularisers | None = None,
    ):
        super().__init__()
        self.tokenizer, self.seed, self.mask_ratio = tokenizer, seed, mask_ratio
        self.kl, self.fixed_std, self.sample_posterior = kl, fixed_std, sample_posterior
        self.reconstruction_loss = ReconstructionLoss(None, perceptual, perceptual_weight, perceptual_every)
        self.regularise = regularise or Regularisers()
        if not mask_ratio:
            tokenizer.mask_token.requires_grad_(False)  # nothing stands in for a missing patch
        v = visible_weight if mask_ratio else 1.0
        self.weights = {"mse_visible": v, "mse_masked": 1 - v, "lpips": perceptual_weight, "kl": kl_weight}

    def forward(self, batch: dict[str, Any]) -> LossTerms:
        """Terms of `batch["image"]` `(b, c, h, w)`; `sample_id` keys the random numbers."""
        images, p = self.regularise.images(batch), self.tokenizer.config["patch_size"]
        patches = (images.shape[2] // p) * (images.shape[3] // p)
        rng = KeyedRandom(self.seed, batch["sample_id"], images.device)
        keep = visible_patches(rng.uniform("mask", patches), self.mask_ratio) if self.mask_ratio else None
        tokens = patches if keep is None else keep.shape[1]
        latent = (tokens, self.tokenizer.config["latent_channels"])
        noise = rng.normal("posterior", *latent) if self.sample_posterior else None
        return self.terms(images, keep, noise, batch)

    def terms(
        self,
        images: Float[Tensor, "b c h w"],
        keep: Int[Tensor, "b k"] | None,
        noise: Float[Tensor, "b k l"] | None,
        batch: dict[str, Any] | None = None,
    ) -> LossTerms:
        """L = (1 - v) MSE(masked) + v MSE(visible) + w_p LPIPS + w_kl KL (LDMAE), mask and posterior's noise given."""
        batch = batch or {"sample_id": None}
        p = self.tokenizer.config["patch_size"]
        grid = (images.shape[2] // p, images.shape[3] // p)
        mean, logvar = self.tokenizer.moments(images, keep).float().chunk(2, dim=-1)  # (b, k, c)
        logvar = logvar.clamp(-30, 20)
        z = mean if noise is None else mean + (0.5 * logvar).exp() * noise
        latents = z.transpose(1, 2)  # (b, c, k)
        latent = self.regularise(latents if keep is not None else latents.unflatten(2, grid), images, batch, keep)
        reconstruction = self._decode(latent.z, keep, grid)  # (b, c, h, w)

        losses = {"kl": gaussian_kl(mean, logvar, self.kl, self.fixed_std).sum(-1).mean()}
        losses |= self._measure(reconstruction, latent.target, batch["sample_id"], keep)
        terms = LossTerms(losses, {name: self.weights[name] for name in losses}, reconstruction=reconstruction)
        return self.regularise.add(terms, latent, batch, self.tokenizer, self._decode, self._measure)

    def _decode(
        self, z: Float[Tensor, "b l *grid"], keep: Int[Tensor, "b k"] | None = None, grid: tuple[int, ...] = ()
    ) -> Float[Tensor, "b c h w"]:
        """Images of latents on a grid, or of the visible patches of one, `(b, c, k)`, with its rows and columns."""
        rows, columns = z.shape[2:] if keep is None else grid
        return self.tokenizer.decode_tokens(z.flatten(2).transpose(1, 2), (rows, columns), keep).float()

    def _measure(
        self,
        reconstruction: Float[Tensor, "b c h w"],
        images: Float[Tensor, "b c h w"],
        sample_id: Int[Tensor, " b"] | None,
        keep: Int[Tensor, "b k"] | None = None,
    ) -> dict[str, Tensor]:
        """Errors of visible and masked patches, and LPIPS."""
        squared = patch_errors(reconstruction, images, self.tokenizer.config["patch_size"])  # (b, n)
        losses = {}
        if keep is None:
            losses["mse_visible"] = squared.mean()
        else:
            visible = torch.zeros_like(squared).scatter(1, keep, 1.0)
            losses["mse_visible"] = (squared * visible).sum() / visible.sum()
            losses["mse_masked"] = (squared * (1 - visible)).sum() / (1 - visible).sum()
        return losses | self.reconstruction_loss(reconstruction, images, sample_id)


def visible_patches(order: Float[Tensor, "b n"], mask_ratio: float) -> Int[Tensor, "b k"]:
    """MAE's random masking: the int(n (1 - ratio)) patches with the smallest random numbers stay visible."""
    n = order.shape[1]
    return order.argsort(dim=1)[:, : max(1, int(n * (1 - mask_ratio)))]


def patch_errors(x: Float[Tensor, "b c h w"], y: Float[Tensor, "b c h w"], patch: int) -> Float[Tensor, "b n"]:
    """Mean squared error of each patch, raster order."""
    return nn.functional.avg_pool2d((x - y).square().mean(1, keepdim=True), patch).flatten(1)


def _take(tokens: Float[Tensor, "b n d"], keep: Int[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
    return tokens.gather(1, keep[..., None].expand(-1, -1, tokens.shape[2]))
