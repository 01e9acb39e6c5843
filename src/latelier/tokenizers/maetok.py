"""MAETok: "Masked Autoencoders Are Effective Tokenizers for Diffusion Models" (ICML 2025).

An image becomes a short sequence of latents instead of a grid: learned latent tokens stand behind the patches in the
sequence of a ViT, and what they have gathered after the last block, through a linear layer, is the latent. In training
a share of the patches is replaced by a mask token, which makes the latents say what the image means and not only how
it looks; at inference nothing is masked. A ViT of the same size paints the image (`latent_decoder`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution, EncoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from jaxtyping import Bool, Float
from torch import Tensor, nn

from latelier.errors import LatelierError
from latelier.layers import TransformerBlock, init_linear, patchify, resize_positions, resized, unpatchify
from latelier.presets import open_init, preset_arguments
from latelier.recipe import Data, MAETokRecipe
from latelier.tokenizers.latent_decoder import (
    LatentDecoder,
    add_frequencies,
    init_table,
    rope_tables,
    run,
)

if TYPE_CHECKING:
    from latelier.keyed_random import KeyedRandom


def _preset(patch: int, latents: int, channels: int, dim: int, depth: int, heads: int, **more: float) -> dict:
    """Symmetric encoder and decoder, as in the paper."""
    sizes = {"dim": dim, "depth": depth, "heads": heads}
    decoder = {"decoder_" + key: value for key, value in sizes.items()}
    latent = {"latent_tokens": latents, "latent_channels": channels}
    return {"patch_size": patch, **latent, **sizes, **decoder, **more}


PRESETS = {
    "maetok-s-128": _preset(16, 128, 32, 384, 12, 6, decoder_drop_path=0.05),
    "maetok-b-128": _preset(16, 128, 32, 768, 12, 12, decoder_drop_path=0.05),  # the paper's, 173M parameters
    "maetok-l-128": _preset(16, 128, 32, 1024, 24, 16, decoder_drop_path=0.05),
    "maetok-mini-32": _preset(8, 32, 16, 192, 4, 4, latent_scale=1.0),  # images of 64 pixels
    "maetok-tiny-32": _preset(8, 32, 16, 128, 2, 4, latent_scale=1.0),  # minutes on a laptop's CPU
}


class MAETok(ModelMixin, ConfigMixin):
    """Masked one-dimensional tokenizer.

    Args:
        image_size: `(h, w)` in pixels of the images that it paints; `resized` makes one for another size.
        patch_size: side of a patch in pixels.
        in_channels: image channels.
        latent_tokens: l latents of an image, whatever its size.
        latent_channels: c numbers in each.
        dim, depth, heads: of the encoder.
        decoder_dim, decoder_depth, decoder_heads: of the decoder.
        mlp_ratio: hidden width of the MLPs over the width.
        positions: of patches: `mixed` (rotary, learned frequencies), `axial` (rotary, fixed), `absolute`. The encoder
            has a learned table of positions in any case, the decoder only with `absolute`.
        variational: whether latents have a variance: a VAE instead of the paper's plain autoencoder.
        decoder_cls_token: whether the decoder's sequence begins with a learned token, as the encoder's does.
        decoder_drop_path: stochastic depth in the decoder, at its last block; see `paint`.
        layer_scale: where the gains of the encoder's branches begin.
        latent_scale: where the decoder's modulation by latents begins, see `LatentDecoder`.

    Differs from the reference: patches are embedded by a Linear (the same function as a strided convolution),
    attention runs through `layers.attention`, and sizes, numbers of latents and the variational form are free.
    """

    decoder_parts = ("decoder", "head")
    _supports_gradient_checkpointing = True
    _repeated_blocks = ["TransformerBlock", "ModulatedBlock"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        image_size: Sequence[int] = (256, 256),
        patch_size: int = 16,
        in_channels: int = 3,
        latent_tokens: int = 128,
        latent_channels: int = 32,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        decoder_dim: int = 768,
        decoder_depth: int = 12,
        decoder_heads: int = 12,
        mlp_ratio: float = 4.0,
        positions: str = "mixed",
        variational: bool = False,
        decoder_cls_token: bool = False,
        decoder_drop_path: float = 0.0,
        layer_scale: float = 1e-5,
        latent_scale: float = 0.0,
    ):
        super().__init__()
        self.grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        patch_values = in_channels * patch_size**2
        self.patch_embed = nn.Linear(patch_values, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.grid[0] * self.grid[1], dim))
        self.latent_queries = nn.Parameter(torch.empty(1, latent_tokens, dim))
        self.latent_pos_embed = nn.Parameter(torch.empty(1, latent_tokens, dim))
        add_frequencies(self, positions, depth, heads, dim)
        self.blocks = nn.ModuleList(TransformerBlock(dim, heads, mlp_ratio, layer_scale) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.to_latent = nn.Linear(dim, 2 * latent_channels if variational else latent_channels)
        init_linear(self)
        for table in (self.mask_token, self.cls_token, self.latent_queries, self.latent_pos_embed):
            nn.init.normal_(table, std=0.02)
        init_table(self.pos_embed, self.grid)

        self.decoder = LatentDecoder(
            latent_tokens, latent_channels, self.grid, decoder_dim, decoder_depth, decoder_heads, mlp_ratio,
            positions, decoder_cls_token, decoder_drop_path, latent_scale,
        )  # fmt: skip
        self.head = nn.Linear(decoder_dim, patch_values)
        init_linear(self.head)
        self.gradient_checkpointing = False

    @property
    def last_layer(self) -> Tensor:
        """The weight nearest to the pixels."""
        return self.head.weight

    def latent_shape(self, height: int, width: int) -> tuple[int, int]:
        """`(c, l)`, whatever the size."""
        return (self.config["latent_channels"], self.config["latent_tokens"])

    def resized(self, image_size: Sequence[int]) -> MAETok:
        """The same weights for another size of images, position tables carried over by bilinear interpolation.

        What it computes at that size is what this model computes there; rotary positions count on beyond the old grid.
        """
        return resized(self, image_size, ("pos_embed", "decoder.pos_embed"))

    # -- the masked forms that training uses --------------------------------------------------------------------------

    def moments(
        self, images: Float[Tensor, "b c h w"], mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b l m"]:
        """The latents `(b, l, c)`; if variational, their mean and log-variance side by side `(b, l, 2 c)`.

        Args:
            images: in [-1, 1], any size that the patch divides.
            mask: true where a patch, in raster order, is replaced by the mask token.

        Raises:
            LatelierError: if the mask has not one entry for each patch.
        """
        p = self.config["patch_size"]
        grid = (images.shape[2] // p, images.shape[3] // p)
        x = self.patch_embed(patchify(images, p))  # (b, n, d)
        if mask is not None:
            if mask.shape != x.shape[:2]:
                raise LatelierError(
                    f"A mask of {tuple(mask.shape)} does not fit {len(x)} images of {x.shape[1]} patches each; "
                    "it needs one entry for every patch."
                )
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        table = resize_positions(self.pos_embed, self.grid, grid)  # (1, 1 + n, d)
        cls = (self.cls_token + table[:, :1]).expand(len(x), -1, -1)  # (b, 1, d)
        latents = (self.latent_queries + self.latent_pos_embed).expand(len(x), -1, -1)  # (b, l, d)
        x = torch.cat([cls, x + table[:, 1:], latents], dim=1)  # (b, 1 + n + l, d)
        for block, rope in zip(self.blocks, rope_tables(self, grid)):
            x = run(self, block, x, rope, 1)
        return self.to_latent(self.norm(x[:, -latents.shape[1] :]))  # (b, l, m)

    def decode_tokens(
        self, z: Float[Tensor, "b l k"], grid: tuple[int, int] | None = None, draws: KeyedRandom | None = None
    ) -> Float[Tensor, "b c h w"]:
        """The image of raw latents.

        Args:
            z: raw latents.
            grid: rows and columns of patches; None for `image_size`.
            draws: random numbers of the images, from which stochastic depth (`decoder_drop_path`) is drawn; without
                them, and outside of training mode, it does not act.
        """
        grid = grid or self.grid
        return unpatchify(self.head(self.decoder(z, grid, draws)), self.config["patch_size"], grid)

    # -- the diffusers interface --------------------------------------------------------------------------------------

    def encode(
        self, images: Float[Tensor, "b c h w"], mask: Bool[Tensor, "b n"] | None = None
    ) -> EncoderOutput | AutoencoderKLOutput:
        """`latent` `(b, c, l)`, or `latent_dist` over it if variational; see `moments`."""
        moments = self.moments(images, mask).transpose(1, 2)  # (b, m, l)
        if self.config["variational"]:
            return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments.float()))
        return EncoderOutput(latent=moments)

    def decode(self, z: Float[Tensor, "b c l"]) -> DecoderOutput:
        """`sample`: images of `image_size`."""
        return DecoderOutput(sample=self.decode_tokens(z.transpose(1, 2)))

    def forward(self, images: Float[Tensor, "b c h w"]) -> DecoderOutput:
        """Reconstruction, through the posterior's mean if there is one, at the images' own size."""
        p = self.config["patch_size"]
        z = self.moments(images)[..., : self.config["latent_channels"]]  # (b, l, c)
        return DecoderOutput(sample=self.decode_tokens(z, (images.shape[2] // p, images.shape[3] // p)))


def build(recipe: MAETokRecipe, data: Data) -> MAETok:
    """A MAETok for these images, fresh or from `init`."""
    if recipe.init:
        return open_init(MAETok, recipe.init)
    arguments = {"variational": recipe.variational, **preset_arguments(MAETok, PRESETS, recipe.preset, recipe.model)}
    return MAETok(**{**arguments, "image_size": tuple(data.image_size), "in_channels": data.channels})
