"""Convolutional tokenizers: presets on diffusers' AutoencoderKL and VQModel, and no tokenizer at all (pixels).

The classes are diffusers' own, so `AutoencoderKL.from_pretrained(run)` opens what is trained here. A preset whose name
begins with `vq` is a VQModel: its latents are continuous, and its decoder begins with the nearest code. One objective
of explicit terms gives AE, DAE, VAE, SD-VAE, and LDM's KL-reg and VQ-reg.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin, VQModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from latelier.errors import LatelierError
from latelier.keyed_random import KeyedRandom
from latelier.losses.codebook import CodebookUse, perplexity, quantise
from latelier.losses.reconstruction import ReconstructionLoss, mean_kl
from latelier.losses.regularise import Regularisers, build_regularisers
from latelier.losses.terms import LossTerms
from latelier.sections import Count, Kind, TrainedTokenizer, Weight, open_init, preset_arguments
from latelier.tokenizers import TokenizerInfo

IMAGE = 256  # pixels; LDM counts the resolutions that have attention from here


def _kl(channels: list[int], latent: int, layers: int = 2, attention: tuple[int, ...] = (), **rest) -> dict:
    """Arguments of an AutoencoderKL with a level for each width in `channels`, at half the side of the one before.

    A level has `layers` residual blocks, the decoder's one more, and attention after each block where its side, for
    images of 256 pixels, is in `attention`.
    """
    attends = [IMAGE >> level in attention for level in range(len(channels))]
    return {
        "block_out_channels": channels,
        "down_block_types": [f"{'Attn' * a}DownEncoderBlock2D" for a in attends],
        "up_block_types": [f"{'Attn' * a}UpDecoderBlock2D" for a in reversed(attends)],
        "layers_per_block": layers,
        "latent_channels": latent,
        "scaling_factor": 1.0,
        **rest,
    }


def _vq(channels: list[int], latent: int, codes: int, **rest) -> dict:
    """The same for a VQModel with `codes` codes."""
    return _kl(channels, latent, num_vq_embeddings=codes, **rest)


_SD3: dict[str, Any] = {"use_quant_conv": False, "use_post_quant_conv": False, "force_upcast": False}
_LIGHT: dict[str, Any] = {"layers": 1, "mid_block_add_attention": False}  # for training on a CPU
_KL_LIGHT = {**_LIGHT, **_SD3}
# Groups of four channels or more; a group of one normalises each channel by itself, and so drops its mean.
_GROUPS: dict[str, Any] = {"norm_num_groups": 8}
_F16 = [128, 128, 256, 256, 512]
_KL_F8 = _kl([128, 256, 512, 512], 4)

PRESETS = {
    # LDM (Rombach et al. 2022), table 8 and the released configurations. Nothing was released for f = 2: the latents
    # are the paper's, the widths go on from those of f = 4.
    "kl-f2": _kl([128, 256], 2),
    "kl-f4": _kl([128, 256, 512], 3),
    "kl-f8": _KL_F8,
    "kl-f16": _kl(_F16, 16, attention=(16,)),
    "kl-f32": _kl([*_F16, 512], 64, attention=(16, 8)),
    "vq-f2": _vq([128, 256], 2, 2048),
    "vq-f2-n64": _vq([128, 256], 2, 64),
    "vq-f4": _vq([128, 256, 512], 3, 8192),
    "vq-f4-noattn": _vq([128, 256, 512], 3, 8192, mid_block_add_attention=False),
    "vq-f8": _vq([128, 256, 256, 512], 4, 16384, attention=(32,)),
    "vq-f8-n256": _vq([128, 256, 256, 512], 4, 256, attention=(32,)),
    "vq-f16": _vq(_F16, 8, 16384, attention=(16,)),
    "kl-f8c4": _KL_F8,  # as Stable Diffusion 1 and 2 know it
    "kl-f8c16": _kl([128, 256, 512, 512], 16, **_SD3),  # Stable Diffusion 3; the baselines of LDMAE
    "kl-f4c4-small": _kl([32, 64, 128], 4, **_KL_LIGHT),
    "kl-f8c16-small": _kl([32, 64, 128, 128], 16, **_KL_LIGHT),
    "kl-f8c16-tiny": _kl([32, 32, 32, 32], 16, **_KL_LIGHT),
    "kl-f2-small": _kl([32, 64], 2, **{**_KL_LIGHT, **_GROUPS, "layers": 2}),
    "kl-f4-small": _kl([32, 64, 128], 3, **_KL_LIGHT, **_GROUPS),
    "kl-f8-small": _kl([32, 64, 128, 128], 4, **_KL_LIGHT, **_GROUPS),
    "kl-f16-small": _kl([32, 64, 128, 128, 128], 16, **_KL_LIGHT, **_GROUPS),
    "vq-f4-small": _vq([32, 64, 128], 3, 512, **_LIGHT, **_GROUPS),
    "vq-f8-small": _vq([32, 64, 128, 128], 4, 512, **_LIGHT, **_GROUPS),
}


class ConvSection(TrainedTokenizer):
    """Convolutional autoencoder on diffusers' AutoencoderKL or VQModel: AE, DAE, VAE, SD-VAE, LDM's KL-reg and VQ-reg.

    LDM's methods have the paper's weights and discriminator (Rombach et al. 2022, appendix G). When the discriminator
    starts differs between the released models; the recipe sets it. A given `adversarial` replaces the method's whole.
    """

    METHODS: ClassVar[dict[str, dict[str, Any]]] = {
        "ae": {"reconstruction": "l2", "perceptual_weight": 0, "kl_weight": 0},
        "dae": {"reconstruction": "l2", "perceptual_weight": 0, "kl_weight": 0, "input_noise": 0.2},
        "vae": {"reconstruction": "l2", "perceptual_weight": 0, "kl_weight": 1e-6},
        "sd-vae": {"reconstruction": "l1", "perceptual_weight": 1.0, "kl_weight": 1e-6, "adversarial": {}},
        "kl-reg": {
            "reconstruction": "l1", "perceptual_weight": 1.0, "kl_weight": 1e-6, "kl_per_pixel": True,
            "adversarial": {"weight": 0.5, "norm": "batch"},
        },
        "vq-reg": {
            "reconstruction": "l1", "perceptual_weight": 1.0, "codebook_weight": 1.0, "codebook_beta": 0.25,
            "codebook_form": "legacy", "adversarial": {"weight": 0.75, "norm": "batch"},
        },
    }  # fmt: skip

    kind: Literal["conv"]
    preset: str = "kl-f8c4"
    reconstruction: Literal["l1", "l2"] = "l1"
    perceptual_weight: Weight = 1.0
    kl_weight: Weight = Field(1e-6, description="of the KL, summed over a latent; 0: a plain autoencoder")
    kl: Literal["standard", "free-mean"] = "standard"
    kl_per_pixel: bool = Field(False, description="divide kl_weight by c h w, as where pixel errors are summed (LDM)")
    codebook_weight: float = Field(1.0, gt=0, description="of the codebook's term (`vq` presets)")
    codebook_beta: Weight = Field(0.25, description="of the smaller half of that term")
    codebook_form: Literal["legacy", "fixed"] = Field(
        "legacy", description="what beta weighs: the codes' move (LDM's), or the encoder's (as in the VQ-VAE)"
    )
    codebook_window: int = Field(10_000, ge=1, description="images over which `codebook_usage` counts used codes")
    codebook_restart: Count = Field(0, description="images without use after which a code restarts; 0: never")
    input_noise: Weight = Field(0.0, description="standard deviation of noise on the encoder's input (DAE)")

    @property
    def quantised(self) -> bool:
        """Whether there is a codebook, as the preset's name says."""
        return self.preset.startswith("vq")

    @property
    def deterministic(self) -> bool:
        """Whether the posterior's spread is neither used nor trained."""
        return not self.kl_weight and not self.quantised

    @model_validator(mode="after")
    def _check_method(self) -> ConvSection:
        if self.method and (self.method == "vq-reg") != self.quantised:
            kind = "vq" if self.method == "vq-reg" else "kl"
            raise LatelierError(
                f"tokenizer.method = {self.method!r} is not for preset {self.preset!r}; "
                f"use a preset whose name begins with {kind}."
            )
        return self


class IdentitySection(Kind):
    """No tokenizer: diffusion in pixel space (f = 1)."""

    kind: Literal["identity"]


class IdentityTokenizer(ModelMixin, ConfigMixin):
    """f = 1: the latents are the pixels, so that every denoiser also runs in pixel space."""

    @register_to_config
    def __init__(self, in_channels: int = 3, latent_channels: int = 3):
        super().__init__()
        self.register_buffer("one", torch.ones(1))  # gives the module a device and its weights file a content

    @property
    def info(self) -> TokenizerInfo:
        """Its factor is 1, and it has no layers."""
        return TokenizerInfo(1, self.config["latent_channels"], self.config["in_channels"], decoder_modules=())

    def encode(self, images: Float[Tensor, "b c h w"]) -> VQEncoderOutput:
        """The images themselves."""
        return VQEncoderOutput(latents=images)

    def decode(self, z: Float[Tensor, "b c h w"]) -> DecoderOutput:
        """The latents themselves."""
        return DecoderOutput(sample=z)


SECTIONS, MODELS = (ConvSection, IdentitySection), (IdentityTokenizer,)


def build(
    section: ConvSection | IdentitySection, channels: int, image_size: Sequence[int] = ()
) -> AutoencoderKL | VQModel | IdentityTokenizer:
    """A tokenizer for images of any size, fresh or from `init`.

    Raises:
        LatelierError: for an unknown preset or argument, or if the number of widths is not that of levels.
    """
    if isinstance(section, IdentitySection):
        return IdentityTokenizer(channels, channels)
    model = VQModel if section.quantised else AutoencoderKL
    if section.init:
        return open_init(model, section.init)
    arguments = preset_arguments(model, PRESETS, section.preset, section.model)
    levels, widths = len(arguments["down_block_types"]), len(arguments["block_out_channels"])
    if not levels == widths == len(arguments["up_block_types"]):
        raise LatelierError(
            f"tokenizer.model.block_out_channels has {widths} entries, but {section.preset} has {levels} levels; "
            "give as many, or down_block_types and up_block_types as well."
        )
    return model(**{**arguments, "in_channels": channels, "out_channels": channels})


def objective(
    section: ConvSection, tokenizer: ModelMixin, perceptual: nn.Module | None, seed: int, dataset: Any = None
) -> ConvObjective:
    """The objective of a recipe's section."""
    names = (
        "kl", "kl_weight", "kl_per_pixel", "codebook_weight", "codebook_beta", "codebook_form", "codebook_window",
        "codebook_restart", "input_noise",
    )  # fmt: skip
    loss = ReconstructionLoss(section.reconstruction, perceptual, section.perceptual_weight, section.perceptual_every)
    regularise = build_regularisers(section, tokenizer, seed, dataset)
    settings = {name: getattr(section, name) for name in names}
    return ConvObjective(tokenizer, loss, seed, regularise=regularise, **settings)


class ConvObjective(nn.Module):
    """L1 or L2 + LPIPS + KL or codebook; noise on the encoder's input makes it a denoising autoencoder.

    Pixel errors are means over c h w values. LDM's KL models sum them (and LPIPS, broadcast over them) instead; divided
    by c h w, their loss is ours with the KL's weight divided by c h w: `kl_per_pixel`. A common factor changes nothing
    under Adam, nor in the adaptive adversarial weight, which follows the reconstruction's gradient. LDM's VQ models
    take means as we do.

    Args:
        tokenizer: the model to train. A VQModel decodes the codes nearest to its latents.
        reconstruction_loss: of pixels and LPIPS.
        seed: of the noise.
        others: as in `ConvSection`; see `gaussian_kl` and `quantise`.
    """

    def __init__(
        self,
        tokenizer: AutoencoderKL | VQModel,
        reconstruction_loss: ReconstructionLoss,
        seed: int,
        kl: str = "standard",
        kl_weight: float = 1e-6,
        kl_per_pixel: bool = False,
        codebook_weight: float = 1.0,
        codebook_beta: float = 0.25,
        codebook_form: str = "legacy",
        codebook_window: int = 10_000,
        codebook_restart: int = 0,
        input_noise: float = 0.0,
        regularise: Regularisers | None = None,
    ):
        super().__init__()
        self.tokenizer, self.reconstruction_loss, self.seed = tokenizer, reconstruction_loss, seed
        self.kl, self.kl_weight, self.kl_per_pixel, self.input_noise = kl, kl_weight, kl_per_pixel, input_noise
        self.codebook_weight, self.codebook_beta, self.codebook_form = codebook_weight, codebook_beta, codebook_form
        self.codebook_window, self.codebook_restart = codebook_window, codebook_restart
        self.regularise = regularise or Regularisers()
        if isinstance(tokenizer, VQModel):
            self.use = CodebookUse(tokenizer.config["num_vq_embeddings"], seed)

    def forward(self, batch: dict[str, Any]) -> LossTerms:
        """L = |x - y|^p + w_p LPIPS(x, y) + w_kl KL(q(z | x), N(0, 1)), or + w_c codebook(z); y decodes z.

        `batch["image"]` is `(b, c, h, w)`, `sample_id` keys the random numbers, `seen` counts images.
        """
        x = self.regularise.images(batch)  # (b, c, h, w)
        rng = KeyedRandom(self.seed, batch["sample_id"], x.device)
        noisy = x + self.input_noise * rng.normal("input", *x.shape[1:]) if self.input_noise else x
        quantised = isinstance(self.tokenizer, VQModel)
        z, of_latents = (self.tokenizer.encode(noisy).latents.float(), {}) if quantised else self._drawn(noisy, rng)
        latent = self.regularise(z, x, batch)
        if quantised:
            y, of_latents = self._codes(latent.z, batch)
        else:
            y = self._decode(latent.z)  # (b, c, h, w)
        losses = self.reconstruction_loss(y, latent.target, batch["sample_id"]) | of_latents
        weights = {
            "l1": 1.0, "l2": 1.0, "kl": self.kl_weight / (latent.target[0].numel() if self.kl_per_pixel else 1),
            "codebook": self.codebook_weight, "lpips": self.reconstruction_loss.perceptual_weight,
        }  # fmt: skip
        terms = LossTerms(losses, {k: w for k, w in weights.items() if k in losses}, reconstruction=y)
        return self.regularise.add(terms, latent, batch, self.tokenizer, self._decode, self.reconstruction_loss)

    def _drawn(
        self, images: Float[Tensor, "b c h w"], rng: KeyedRandom
    ) -> tuple[Float[Tensor, "b k i j"], dict[str, Tensor]]:
        """A draw of the posterior, or its mean where there is no KL, and the KL."""
        posterior = self.tokenizer.encode(images).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()  # (b, k, h/f, w/f)
        if not self.kl_weight:
            return mean, {}
        z = mean + (0.5 * logvar).exp() * rng.normal("posterior", *mean.shape[1:])
        return z, {"kl": mean_kl(mean, logvar, self.kl)}

    def _decode(self, z: Float[Tensor, "b k i j"]) -> Float[Tensor, "b c h w"]:
        """Images of latents, of a VQModel through the nearest codes."""
        if not isinstance(self.tokenizer, VQModel):
            return self.tokenizer.decode(z).sample.float()
        codes = quantise(z, self.tokenizer.quantize.embedding.weight).z
        return self.tokenizer.decode(codes, force_not_quantize=True).sample.float()

    def _codes(
        self, latents: Float[Tensor, "b k i j"], batch: dict[str, Any]
    ) -> tuple[Float[Tensor, "b c h w"], dict[str, Tensor]]:
        """Reconstruction through the nearest codes, the codebook's loss, and, for the log, how much of it is used."""
        seen, codebook = batch["seen"], self.tokenizer.quantize.embedding.weight  # (codes, k)
        if self.codebook_restart and self.training and codebook.requires_grad:
            self.use.restart(codebook.data, latents, batch["sample_id"], seen, self.codebook_restart)
        quantised = quantise(latents, codebook, self.codebook_beta, self.codebook_form)
        reconstruction = self.tokenizer.decode(quantised.z, force_not_quantize=True).sample.float()
        used = perplexity(self.use.count(quantised.indices, seen))
        usage = self.use.share(seen, self.codebook_window)
        return reconstruction, {"codebook": quantised.loss, "codebook_perplexity": used, "codebook_usage": usage}
