"""The recipe's `denoiser` section: the diffusion process, the model, its conditions, how it is trained."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from latelier.errors import LatelierError
from latelier.recipe.base import Section, Training, Weight
from latelier.recipe.condition import Conditions
from latelier.recipe.prefixes import Prefixes


class Process(Section):
    """The diffusion process and its training target."""

    kind: Literal["flow", "ddpm"] = "flow"
    t_distribution: Literal["uniform", "logit-normal"] = Field("logit-normal", description="flow: density of t")
    shift: float = Field(1.0, gt=0, description="flow: t' = shift t / (1 + (shift - 1) t) in training")
    prediction: Literal["velocity", "epsilon", "v", "sample"] | None = Field(None, description="ddpm: what is learned")
    beta_schedule: Literal["linear", "scaled_linear", "cosine"] = "scaled_linear"
    beta_start: float = Field(0.0015, gt=0, lt=1)
    beta_end: float = Field(0.0195, gt=0, lt=1)


class DenoiserRecipe(Training):
    """A latent diffusion model."""

    kind: Literal["dit", "sit", "lightning-dit", "uvit", "usit", "unet"] = "lightning-dit"
    size: str = Field("B", description="of the transformer, or the preset of the U-Net")
    patch: int = Field(1, ge=1, description="side of a transformer's patch in latent positions")
    model: dict[str, Any] = Field(default_factory=dict, description="overrides of the size's architecture")
    init: str | None = None
    process: Process = Process()
    condition: Conditions = Field(
        ["class"], description="what the denoiser is conditioned on: `none`, a kind, a section, or a list"
    )
    loss: Literal["l2", "l1"] = Field("l2", description="squared or absolute error of the prediction")
    cosine_weight: Weight = Field(0.0, description="weight of 1 - cos(prediction, target), LightningDiT")
    prefixes: Prefixes | None = Field(
        None, description="augmented training: random prefixes of the latents' channels (DC-AE 1.5)"
    )
    sample_posterior: bool = Field(True, description="draw z anew each time; false uses the posterior's mean")
    cache: bool = Field(True, description="encode once to disk; false encodes on the fly, with all augmentations")
    snapshots: int = Field(
        0, ge=0, description="n: keep the averaged weights n times on the way, at equal distances, the last at the end"
    )

    @model_validator(mode="after")
    def _check_snapshots(self) -> DenoiserRecipe:
        if self.snapshots > self.images // self.batch:
            raise LatelierError(
                f"denoiser.snapshots = {self.snapshots}, but {self.images:,} images are only "
                f"{self.images // self.batch} steps of {self.batch}; keep fewer."
            )
        return self

    def snapshots_at(self) -> list[int]:
        """Images seen at each snapshot, ascending; whole steps, so distances differ by a step at most."""
        steps, n = self.images // self.batch, self.snapshots
        return [-(-k * steps // n) * self.batch for k in range(1, n + 1)]
