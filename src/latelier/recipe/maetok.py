"""The recipe's `tokenizer` section of kind `maetok`: masks, targets, weights."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from latelier.errors import LatelierError
from latelier.recipe.base import Count, Section, Unit, Weight
from latelier.recipe.trained import TrainedTokenizer

TEACHERS = {
    "dinov2": "facebook/dinov2-large",
    "siglip": "google/siglip-so400m-patch14-224",
    "clip": "openai/clip-vit-large-patch14",
}


class Masking(Section):
    """Which share of the patches is masked: one number for a batch, of a normal distribution cut off at both ends."""

    low: Unit = 0.4
    high: Unit = 0.6
    mode: Unit = Field(0.6, description="mean of the normal distribution before it is cut off")
    std: float = Field(0.25, gt=0, description="its standard deviation")
    fade: Count = Field(0, description="images over which the share falls from `high` to 0 instead of being drawn")

    @model_validator(mode="after")
    def _check(self) -> Masking:
        if self.low > self.high:
            raise LatelierError(f"tokenizer.mask: low = {self.low} is above high = {self.high}.")
        if self.high >= 1:
            raise LatelierError("tokenizer.mask.high = 1 would mask every patch; use less, such as 0.75.")
        return self


class Target(Section):
    """What a shallow auxiliary decoder predicts at the masked patches, from the latents alone."""

    kind: Literal["hog", "dinov2", "siglip", "clip", "features", "caption"]
    weight: float = Field(1.0, gt=0)
    loss: Literal["mse", "cosine", "cross-entropy"] | None = Field(
        None, description="by default mse for hog, cosine for features, cross-entropy for captions"
    )
    teacher: str | None = Field(
        None, description="Hub name or folder of a vision model of `transformers`; of a tokenizer for captions"
    )
    cache: bool = Field(True, description="keep an image's features in memory, where images are not augmented")
    dim: int = Field(192, ge=1, description="width of the auxiliary decoder")
    depth: int = Field(3, ge=0, description="its blocks; 0: a linear layer on the decoder's input")
    heads: int = Field(3, ge=1)
    length: int = Field(32, ge=1, description="caption: tokens that are predicted")
    vocabulary_size: int = Field(4096, ge=64, description="caption: word pieces, when they are learnt from the data")

    @property
    def error(self) -> str:
        """The loss, the default resolved."""
        return self.loss or {"hog": "mse", "caption": "cross-entropy"}.get(self.kind, "cosine")

    @model_validator(mode="after")
    def _check(self) -> Target:
        if (self.error == "cross-entropy") != (self.kind == "caption"):
            raise LatelierError(f"tokenizer.targets: loss {self.error!r} does not go with kind {self.kind!r}.")
        if self.kind == "hog" and self.teacher:
            raise LatelierError("tokenizer.targets: hog is computed from the image and has no teacher; leave it out.")
        if self.teacher is None:
            self.teacher = TEACHERS.get(self.kind)
        if self.kind == "features" and self.teacher is None:
            raise LatelierError("tokenizer.targets: kind 'features' needs `teacher`, a Hub name or a folder.")
        return self


class MAETokRecipe(TrainedTokenizer):
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
    targets: list[Target] = Field([], description="what auxiliary decoders predict: hog, dinov2, siglip, clip, ...")
    perceptual_weight: Weight = 1.0
    perceptual_warmup: Count = Field(0, description="images over which LPIPS's weight rises from 0")
    kl_weight: Weight = Field(0.0, description="of the KL, summed over a latent; 0: a plain autoencoder")

    @property
    def variational(self) -> bool:
        """Whether the encoder gives a mean and a variance."""
        return self.kl_weight > 0

    @model_validator(mode="after")
    def _check_targets(self) -> MAETokRecipe:
        if self.targets and not self.mask.high:
            raise LatelierError(
                "tokenizer.targets are predicted at masked patches, but tokenizer.mask masks none; "
                "set mask.high, or leave the targets out."
            )
        return self
