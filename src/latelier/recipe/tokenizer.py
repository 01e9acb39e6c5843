"""The recipe's `tokenizer` section: one model for each kind of tokenizer."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from latelier.errors import LatelierError
from latelier.recipe.base import Count, Section, Unit, Weight
from latelier.recipe.dcae import DCAERecipe
from latelier.recipe.maetok import MAETokRecipe
from latelier.recipe.trained import TrainedTokenizer


class VMAERecipe(TrainedTokenizer):
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


class ConvRecipe(TrainedTokenizer):
    """Convolutional autoencoder on diffusers' AutoencoderKL or VQModel: AE, DAE, VAE, SD-VAE, LDM's KL-reg and VQ-reg.

    LDM's methods are the paper's weights and discriminator (Rombach et al. 2022, appendix G); when the discriminator
    starts differs from one released model to the next, and is the recipe's to say. An `adversarial` that is given
    replaces the method's as a whole.
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
    kl_per_pixel: bool = Field(
        False, description="divide kl_weight by an image's c h w, as where pixel errors are summed (LDM)"
    )
    codebook_weight: float = Field(1.0, gt=0, description="of the codebook's term (`vq` presets)")
    codebook_beta: Weight = Field(0.25, description="of the smaller half of that term")
    codebook_form: Literal["legacy", "fixed"] = Field(
        "legacy", description="what beta weighs: the codes' move (LDM's), or the encoder's (as in the VQ-VAE)"
    )
    codebook_window: int = Field(
        10_000, ge=1, description="images over which `codebook_usage` counts the codes that were used"
    )
    codebook_restart: Count = Field(0, description="images without use after which a code is born again; 0: never")
    input_noise: Weight = Field(0.0, description="standard deviation of noise on the encoder's input (DAE)")

    @property
    def quantised(self) -> bool:
        """Whether there is a codebook, as the preset's name says."""
        return self.preset.startswith("vq")

    @property
    def deterministic(self) -> bool:
        """Whether there is a posterior whose spread is neither used nor trained."""
        return not self.kl_weight and not self.quantised

    @model_validator(mode="after")
    def _check_method(self) -> ConvRecipe:
        if self.method and (self.method == "vq-reg") != self.quantised:
            kind = "vq" if self.method == "vq-reg" else "kl"
            raise LatelierError(
                f"tokenizer.method = {self.method!r} is not for preset {self.preset!r}; "
                f"use a preset whose name begins with {kind}."
            )
        return self


class IdentityRecipe(Section):
    """No tokenizer: diffusion in pixel space (f = 1)."""

    kind: Literal["identity"]


class PretrainedRecipe(Section):
    """A tokenizer that is trained already: a folder of ours, or any diffusers autoencoder by Hub name."""

    kind: Literal["pretrained"]
    path: str
    subfolder: str | None = None


TokenizerRecipe = Annotated[
    VMAERecipe | MAETokRecipe | DCAERecipe | ConvRecipe | IdentityRecipe | PretrainedRecipe, Field(discriminator="kind")
]
