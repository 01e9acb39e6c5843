"""MAETok: "Masked Autoencoders Are Effective Tokenizers for Diffusion Models" (ICML 2025).

An image becomes a short sequence of latents instead of a grid: learned latent tokens follow the patches in the
sequence of a ViT, and a linear layer after the last block makes latents of them. In training a share of the patches is
replaced by a mask token, which makes latents semantic; at inference nothing is masked. A ViT of the same size decodes
(`maetok_decoder`). The objective reconstructs all pixels and predicts features of masked patches (`maetok_targets`):

    L = MSE + w_p LPIPS + w_kl KL + sum of w_t L_t over the targets t        (section 3.2), and the adversarial term
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution, EncoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from latelier.errors import LatelierError, check_whole
from latelier.keyed_random import KeyedRandom
from latelier.layers import TransformerBlock, init_linear, patchify, resize_positions, resized, run_block, unpatchify
from latelier.losses.reconstruction import ReconstructionLoss, gaussian_kl
from latelier.losses.regularise import Regularisers, build_regularisers
from latelier.losses.terms import LossTerms
from latelier.sections import Count, TrainedTokenizer, Weight, open_init, preset_arguments
from latelier.tokenizers import TokenizerInfo
from latelier.tokenizers.maetok_decoder import LatentDecoder, add_frequencies, init_table, rope_tables
from latelier.tokenizers.maetok_targets import Masking, MaskShare, Target, TargetSection, build_targets, draw_mask


def _preset(patch: int, latents: int, channels: int, dim: int, depth: int, heads: int, **more: float) -> dict:
    """Symmetric encoder and decoder, as in the paper."""
    sizes = {"dim": dim, "depth": depth, "heads": heads}
    latent = {"latent_tokens": latents, "latent_channels": channels}
    return {"patch_size": patch, **latent, **sizes, **{f"decoder_{k}": v for k, v in sizes.items()}, **more}


PRESETS = {
    "maetok-s-128": _preset(16, 128, 32, 384, 12, 6, decoder_drop_path=0.05),
    "maetok-b-128": _preset(16, 128, 32, 768, 12, 12, decoder_drop_path=0.05),  # the paper's, 173M parameters
    "maetok-l-128": _preset(16, 128, 32, 1024, 24, 16, decoder_drop_path=0.05),
    "maetok-mini-32": _preset(8, 32, 16, 192, 4, 4, latent_scale=1.0),  # images of 64 pixels
    "maetok-tiny-32": _preset(8, 32, 16, 128, 2, 4, latent_scale=1.0),  # minutes on a laptop's CPU
}


class MAETokSection(TrainedTokenizer):
    """One-dimensional masked tokenizer (MAETok, ICML 2025).

    Method `paper` has the paper's targets, weights and discriminator (counts in images: 10k and 30k steps of 512).
    `ae` and `vae` are its baselines without masks and targets.
    """

    METHODS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            "targets": [{"kind": "hog"}, {"kind": "dinov2"}, {"kind": "siglip"}],
            "perceptual_warmup": 5_120_000,
            "adversarial": {
                "kind": "dino", "weight": 0.4, "start": 15_360_000, "betas": (0.9, 0.95), "norm": "batch",
                "augment": ["color", "translation", "cutout"], "augment_share": 0.5, "consistency": 4.0,
                "lecam": 0.001, "lecam_decay": 0.999,
            },
        },
        "ae": {"mask": {"low": 0.0, "high": 0.0, "mode": 0.0}, "targets": []},
        "vae": {"mask": {"low": 0.0, "high": 0.0, "mode": 0.0}, "targets": [], "kl_weight": 1e-6},
    }  # fmt: skip

    kind: Literal["maetok"]
    preset: str = "maetok-b-128"
    mask: Masking = Masking()
    targets: list[TargetSection] = Field([], description="what auxiliary decoders predict: hog, dinov2, ...")
    perceptual_weight: Weight = 1.0
    perceptual_warmup: Count = Field(0, description="images over which LPIPS's weight rises from 0")
    kl_weight: Weight = Field(0.0, description="of the KL, summed over a latent; 0: a plain autoencoder")

    @property
    def variational(self) -> bool:
        """Whether the encoder gives a mean and a variance."""
        return self.kl_weight > 0

    @model_validator(mode="after")
    def _check_targets(self) -> MAETokSection:
        if self.targets and not self.mask.high:
            raise LatelierError(
                "tokenizer.targets are predicted at masked patches, but tokenizer.mask masks none; "
                "set mask.high, or leave the targets out."
            )
        return self


class MAETok(ModelMixin, ConfigMixin):
    """Masked one-dimensional tokenizer.

    Args:
        image_size: `(h, w)` in pixels of the images that it decodes to; `resized` makes one for another size.
        patch_size: side of a patch in pixels.
        in_channels: of images.
        latent_tokens, latent_channels: an image of any size has l latents of c numbers.
        dim, depth, heads: of the encoder.
        decoder_dim, decoder_depth, decoder_heads: of the decoder.
        mlp_ratio: hidden width of the MLPs over the width.
        positions: of patches: `mixed` (rotary, learned frequencies), `axial` (rotary, fixed), `absolute`. The encoder
            has a learned table of positions in any case, the decoder only with `absolute`.
        variational: whether latents have a variance: a VAE instead of the paper's plain autoencoder.
        decoder_cls_token: whether the decoder's sequence begins with a learned token, as the encoder's does.
        decoder_drop_path: stochastic depth at the decoder's last block; see `decode_tokens`.
        layer_scale: initial gains of the encoder's branches.
        latent_scale: initial scale of the decoder's modulation by latents, see `LatentDecoder`.

    Differs from the reference: patches are embedded by a Linear (the same function as a strided convolution),
    attention runs through `layers.attention`, and sizes, numbers of latents and the variational form are free.
    """

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
        check_whole(patch_size=patch_size, in_channels=in_channels, dim=dim, decoder_dim=decoder_dim)
        check_whole(latent_tokens=latent_tokens, latent_channels=latent_channels)
        check_whole(heads=heads, decoder_heads=decoder_heads)
        check_whole(0, depth=depth, decoder_depth=decoder_depth)
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
    def info(self) -> TokenizerInfo:
        """Sizes and layer names."""
        height, width = self.config["image_size"]
        return TokenizerInfo(
            factor=self.config["patch_size"],
            latent_channels=self.config["latent_channels"],
            image_channels=self.config["in_channels"],
            latent_tokens=self.config["latent_tokens"],
            decoder_size=(height, width),
            decoder_modules=("decoder", "head"),
            middle=("to_latent",),
            head=("head",),
            last_layer="head.weight",
            variance_layer="to_latent" if self.config["variational"] else None,
        )

    def resized(self, image_size: Sequence[int]) -> MAETok:
        """This model for another size of images, position tables interpolated; rotary positions count on."""
        return resized(self, image_size, ("pos_embed", "decoder.pos_embed"))

    def moments(
        self, images: Float[Tensor, "b c h w"], mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b l m"]:
        """The latents `(b, l, c)`; if variational, their mean and log-variance side by side `(b, l, 2 c)`.

        `mask` is true where a patch, in raster order, is replaced by the mask token.
        """
        grid = patch_grid(self, images.shape[2:])
        x = self.patch_embed(patchify(images, self.config["patch_size"]))  # (b, n, d)
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
            x = run_block(self, block, x, rope, 1)
        return self.to_latent(self.norm(x[:, -latents.shape[1] :]))  # (b, l, m)

    def decode_tokens(
        self, z: Float[Tensor, "b l k"], grid: tuple[int, int] | None = None, rng: KeyedRandom | None = None
    ) -> Float[Tensor, "b c h w"]:
        """Images of raw latents, on a grid of patches (None: that of `image_size`).

        Stochastic depth (`decoder_drop_path`) acts in training mode, where its random numbers `rng` are given.
        """
        grid = grid or self.grid
        return unpatchify(self.head(self.decoder(z, grid, rng)), self.config["patch_size"], grid)

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
        z = self.moments(images)[..., : self.config["latent_channels"]]  # (b, l, c)
        return DecoderOutput(sample=self.decode_tokens(z, patch_grid(self, images.shape[2:])))


SECTIONS, MODELS = (MAETokSection,), (MAETok,)


def build(section: MAETokSection, channels: int, image_size: Sequence[int]) -> MAETok:
    """A MAETok for these images, fresh or from `init`."""
    if section.init:
        return open_init(MAETok, section.init)
    arguments = {"variational": section.variational, **preset_arguments(MAETok, PRESETS, section.preset, section.model)}
    return MAETok(**{**arguments, "image_size": tuple(image_size), "in_channels": channels})


def objective(
    section: MAETokSection, tokenizer: MAETok, perceptual: nn.Module | None, seed: int, dataset: Any = None
) -> MAETokObjective:
    """The objective of a recipe's section; for errors see `build_targets`."""
    config = tokenizer.config
    targets = build_targets(section.targets, config["patch_size"], config["in_channels"], dataset)
    loss = ReconstructionLoss("mse", perceptual, section.perceptual_weight, section.perceptual_every)
    mask = MaskShare(**section.mask.model_dump()) if section.mask.high else None
    regularise = build_regularisers(section, tokenizer, seed, dataset)
    settings = (section.kl_weight, section.perceptual_warmup, regularise)
    return MAETokObjective(tokenizer, loss, seed, mask, targets, *settings)


class MAETokObjective(nn.Module):
    """Loss terms of a MAETok.

    Auxiliary decoders predict the targets from the latents alone. They are part of the objective and not of the
    tokenizer: optimiser, EMA and checkpoints include them, the saved tokenizer does not, and each phase has fresh ones.

    Args:
        tokenizer: the model to train.
        reconstruction_loss: `mse` of the pixels, and LPIPS.
        seed: of masks and the posterior's noise.
        mask: the share of patches that is masked; None masks nothing.
        targets: are not registered, so their teachers are neither trained nor saved.
        kl_weight: of the KL, summed over a latent's channels; it needs an encoder with a variance.
        perceptual_warmup: images over which LPIPS's weight rises from 0.
    """

    def __init__(
        self,
        tokenizer: MAETok,
        reconstruction_loss: ReconstructionLoss,
        seed: int,
        mask: MaskShare | None = None,
        targets: Sequence[Target] = (),
        kl_weight: float = 0.0,
        perceptual_warmup: int = 0,
        regularise: Regularisers | None = None,
    ):
        super().__init__()
        if kl_weight and not tokenizer.config["variational"]:
            raise LatelierError(
                f"tokenizer.kl_weight = {kl_weight} needs an encoder that gives a variance, and this one gives "
                "none; set kl_weight: 0, or begin with a tokenizer that was built for a KL."
            )
        self.tokenizer, self.reconstruction_loss, self.seed = tokenizer, reconstruction_loss, seed
        self.mask, self.targets, self.kl_weight, self.perceptual_warmup = mask, targets, kl_weight, perceptual_warmup
        self.regularise = regularise or Regularisers()
        self.auxiliary = nn.ModuleDict({target.name: auxiliary_decoder(tokenizer, target) for target in targets})
        if mask is None:
            tokenizer.mask_token.requires_grad_(False)  # nothing stands in for a missing patch

    def forward(self, batch: dict[str, Any]) -> LossTerms:
        """L = MSE + w_p LPIPS + w_kl KL + sum of w_t L_t over the targets (MAETok, section 3.2).

        `batch["image"]` is `(b, c, h, w)`, `sample_id` keys the random numbers, `seen` counts images.
        """
        images = batch["image"]
        grid = patch_grid(self.tokenizer, images.shape[2:])
        rng = KeyedRandom(self.seed, batch["sample_id"], images.device)
        mask, share = None, 0.0
        if self.mask is not None:
            share = self.mask.draw(self.seed, batch["seen"])
            mask = draw_mask(rng.uniform("mask", grid[0] * grid[1]), share)  # (b, n)
        z, losses = self._latents(images, mask, rng)
        z = self.regularise(z.transpose(1, 2), images, batch).z.transpose(1, 2)  # (b, l, c)
        reconstruction = self.tokenizer.decode_tokens(z, grid, rng).float()  # (b, c, h, w)

        rise = min(1.0, batch["seen"] / self.perceptual_warmup) if self.perceptual_warmup else 1.0
        lpips_weight = self.reconstruction_loss.perceptual_weight * rise
        losses |= self.reconstruction_loss(reconstruction, images, batch["sample_id"], lpips_weight > 0)
        if mask is not None and share:
            for target in self.targets:
                predicted = self.auxiliary[target.name](z, target.tokens(grid)).float()  # (b, n, d)
                losses[target.name] = target.error(predicted, target(batch, grid), mask)
        else:  # plus zero through all auxiliary decoders: DDP waits for their gradients
            losses["mse"] = losses["mse"] + sum((0.0 * p.sum() for p in self.auxiliary.parameters()), 0.0)
        weights = {"mse": 1.0, "lpips": lpips_weight, "kl": self.kl_weight}
        weights |= {target.name: target.weight for target in self.targets}
        return LossTerms(losses, {k: weights[k] for k in losses}, reconstruction=reconstruction)

    def _latents(
        self, images: Float[Tensor, "b c h w"], mask: Bool[Tensor, "b n"] | None, rng: KeyedRandom
    ) -> tuple[Float[Tensor, "b l k"], dict[str, Tensor]]:
        """Latents, drawn from the posterior if there is one, and its KL."""
        moments = self.tokenizer.moments(images, mask).float()  # (b, l, c), or (b, l, 2 c)
        if not self.tokenizer.config["variational"]:
            return moments, {}
        mean, logvar = moments.chunk(2, dim=-1)
        logvar = logvar.clamp(-30, 20)
        z = mean + (0.5 * logvar).exp() * rng.normal("posterior", *mean.shape[1:])  # (b, l, c)
        return z, {"kl": gaussian_kl(mean, logvar).sum(-1).mean()}


class AuxiliaryDecoder(nn.Module):
    """A shallow decoder with a CLS token, and a linear head as wide as the target."""

    def __init__(self, body: LatentDecoder, dim: int, width: int):
        super().__init__()
        self.body, self.head = body, nn.Linear(dim, width)
        init_linear(self.head)

    def forward(self, z: Float[Tensor, "b l c"], grid: tuple[int, int]) -> Float[Tensor, "b n d"]:
        return self.head(self.body(z, grid))


class LinearReadout(nn.Module):
    """Each patch's prediction is a linear map of all latents: learned weights mix them, a linear layer widens the mix.

    The paper's decoder without blocks (table 4d, "linear") does not say how patches see the latents without attention;
    this is the simplest map that distinguishes patches. It has one grid.
    """

    def __init__(self, latent_tokens: int, latent_channels: int, grid: tuple[int, int], width: int):
        super().__init__()
        self.grid = grid
        self.mix = nn.Linear(latent_tokens, grid[0] * grid[1])
        self.head = nn.Linear(latent_channels, width)
        init_linear(self)

    def forward(self, z: Float[Tensor, "b l c"], grid: tuple[int, int]) -> Float[Tensor, "b n d"]:
        if tuple(grid) != self.grid:
            have = tuple(grid)
            raise LatelierError(
                f"A target of depth 0 is made for {self.grid} patches, but the image has {have}; give it a depth."
            )
        return self.head(self.mix(z.transpose(1, 2)).transpose(1, 2))  # (b, n, width)


def auxiliary_decoder(tokenizer: MAETok, target: Target) -> nn.Module:
    """A network from this tokenizer's latents to predictions of a target."""
    config, (dim, depth, heads) = tokenizer.config, target.decoder
    grid = target.tokens(patch_grid(tokenizer, config["image_size"]))
    latent = (config["latent_tokens"], config["latent_channels"])
    if not depth:
        return LinearReadout(*latent, grid, target.dim)
    body = LatentDecoder(*latent, grid, dim, depth, heads, cls_token=True, latent_scale=config["latent_scale"])
    return AuxiliaryDecoder(body, dim, target.dim)


def patch_grid(tokenizer: MAETok, size: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of patches in an image of `(h, w)` pixels."""
    p = tokenizer.config["patch_size"]
    return size[0] // p, size[1] // p
