"""The recipe section and the training objective of all denoisers."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn

from latelier.conditioning.condition import Condition
from latelier.data.latents import sample_posterior
from latelier.denoisers.align import Align, Alignment, tapped
from latelier.diffusion.process import DDPM, Flow, build_process
from latelier.errors import LatelierError
from latelier.keyed_random import KeyedRandom
from latelier.losses.terms import LossTerms
from latelier.prefixes import RandomPrefixes
from latelier.sections import (
    ByKind,
    Model,
    Prefixes,
    Process,
    Section,
    Training,
    Weight,
    open_init,
    parse_kinds,
    preset_arguments,
)

if TYPE_CHECKING:
    Conditions = list[Any]
else:
    Conditions = Annotated[
        list[Annotated[Section, ByKind("latelier.conditioning:CONDITIONERS")]], BeforeValidator(parse_kinds)
    ]


class DenoiserSection(Training):
    """A latent diffusion model."""

    kind: str = "lightning-dit"
    size: str = Field("B", description="of the transformer, or the preset of the U-Net")
    patch: int = Field(1, ge=1, description="side of a transformer's patch in latent positions")
    model: dict[str, Any] = Field(default_factory=dict, description="overrides of the size's architecture")
    init: str | None = None
    process: Process = Process()
    condition: Conditions = Field(
        [{"kind": "class"}],  # type: ignore[list-item]
        description="what it is conditioned on: `none`, a kind, a section, or a list",
    )
    loss: Literal["l2", "l1"] = Field("l2", description="squared or absolute error of the prediction")
    cosine_weight: Weight = Field(0.0, description="weight of 1 - cos(prediction, target), LightningDiT")
    prefixes: Prefixes | None = Field(
        None, description="augmented training: random prefixes of the latents' channels (DC-AE 1.5)"
    )
    sample_posterior: bool = Field(True, description="draw z anew each time; false uses the posterior's mean")
    cache: bool = Field(True, description="encode once to disk; false encodes on the fly, with all augmentations")
    align: Align | None = Field(None, description="a middle block learns a vision model's features (REPA, iREPA)")
    snapshots: int = Field(
        0, ge=0, description="n: keep the averaged weights n times on the way, at equal distances, the last at the end"
    )

    @model_validator(mode="after")
    def _check(self) -> DenoiserSection:
        build_process(**self.process.model_dump(), latent_shape=(1,))
        kinds = [condition.kind for condition in self.condition]
        if len(set(kinds)) < len(kinds):
            raise LatelierError(f"denoiser.condition names a kind twice: {', '.join(kinds)}.")
        if self.snapshots > self.images // self.batch:
            raise LatelierError(
                f"denoiser.snapshots = {self.snapshots}, but {self.images:,} images are only "
                f"{self.images // self.batch} steps of {self.batch}; keep fewer."
            )
        return self

    def snapshots_at(self, every: int = 0) -> list[int]:
        """Images seen at each snapshot, ascending; whole steps, so distances differ by a step at most.

        Besides those at equal distances there are those at multiples of `every` images and at the end, see
        `evaluate.every`.
        """
        steps, n = self.images // self.batch, self.snapshots
        places = {-(-k * steps // n) * self.batch for k in range(1, n + 1)}
        if every:
            more = range(every, self.images + 1, every)
            places |= {-(-images // self.batch) * self.batch for images in more} | {self.images}
        return sorted(places)


def build_transformer(
    cls: type[Model], sizes: dict, section: DenoiserSection, latent_shape: tuple[int, ...], wanted: dict[str, Any]
) -> Model:
    """A transformer for latents `(c, *grid)` whose config has `wanted`, fresh or from `init`."""
    channels, *grid = latent_shape
    wanted = {"in_channels": channels, **wanted}
    if section.init:
        return open_init(cls, section.init, wanted)
    arguments: dict[str, Any] = {"patch_size": section.patch}
    arguments |= preset_arguments(cls, sizes, section.size, section.model, "denoiser")
    if section.process.kind == "ddpm" and "time_scale" in inspect.signature(cls).parameters:
        arguments.setdefault("time_scale", 1000.0)
    return cls(**{**arguments, **wanted, "grid": tuple(grid)})


def transformer_width(cls: type[Any], sizes: dict, section: DenoiserSection) -> int:
    """Width of the transformer that `build_transformer` makes."""
    if section.init:
        return open_init(cls, section.init).config["dim"]
    return preset_arguments(cls, sizes, section.size, section.model, "denoiser")["dim"]


class DenoisingObjective(nn.Module):
    """Squared or absolute error of the prediction, and LightningDiT's cosine term.

    Args:
        denoiser: the model to train.
        conditioner: makes the condition from the batch; None: unconditional.
        process: adds noise to latents and defines the target.
        seed: of posterior, time, noise and label dropout.
        dropout: probability of the null condition, for each of the conditioner's components.
        loss: `l2`, the mean squared error, or `l1`, the mean absolute error (some models of LDM).
        cosine_weight: weight of mean(1 - cos(prediction, target)) along channels.
        sample_posterior: draw z from the posterior anew each time.
        prefixes: augmented training (DC-AE 1.5): each step learns a random prefix of the channels, on whose length the
            denoiser is not conditioned, with its own noise and time; the loss is the mean over these channels.
        align: aligns a block of the denoiser with `features` of the batch.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        conditioner: nn.Module | None,
        process: Flow | DDPM,
        seed: int,
        dropout: Sequence[float] = (0.1,),
        loss: str = "l2",
        cosine_weight: float = 0.0,
        sample_posterior: bool = True,
        prefixes: RandomPrefixes | None = None,
        align: Alignment | None = None,
    ):
        super().__init__()
        self.denoiser, self.conditioner, self.process = denoiser, conditioner, process
        self.seed, self.dropout, self.loss, self.cosine_weight = seed, tuple(dropout), loss, cosine_weight
        self.sample_posterior, self.prefixes, self.align = sample_posterior, prefixes, align

    def prepare(self, batch: dict[str, Any], codec: Any, seen: int) -> dict[str, Tensor]:
        """What is made from images before the step at `seen` images, without gradients: condition, `features`."""
        made = {} if self.conditioner is None else self.conditioner.prepare(batch, codec)  # type: ignore[operator]
        if self.align is not None and self.align.acts(seen) and "features" not in batch:
            made["features"] = self.align.features(batch["image"])
        return made

    def forward(self, batch: dict[str, Any]) -> LossTerms:
        """L = E |f(x_t, t, condition) - target|^p + w mean(1 - cos), with z ~ q(z | image), x_t = noise(z, t, eps).

        The batch has normalised latents `mean` and `std` `(b, c, *grid)`; `sample_id` keys the random numbers.
        """
        rng = KeyedRandom(self.seed, batch["sample_id"], batch["mean"].device)
        z = sample_posterior(batch, rng) if self.sample_posterior else batch["mean"]  # (b, c, *grid)
        condition = None if self.conditioner is None else self.conditioner(batch, self._drop(rng))
        align, features = self.align, None
        if align is not None and align.acts(batch["seen"]):
            features = batch["features"]
        if self.prefixes is None:
            losses = self._errors(z, rng, condition, features)
        else:
            lengths = self.prefixes.draw(self.seed, batch["seen"])
            inputs = (rng, condition, features)
            each = [self._errors(z[:, :k], *inputs, f" {i}" * (i > 0)) for i, k in enumerate(lengths)]
            losses = {name: torch.stack([errors[name] for errors in each]).mean() for name in each[0]}
        weights = {"l1": 1.0, "mse": 1.0, "cosine": self.cosine_weight, "align": align.weight if align else 0.0}
        return LossTerms(losses, {name: weights[name] for name in losses})

    def _errors(
        self, z: Float[Tensor, "b c *grid"], rng: KeyedRandom, condition: Condition | None,
        features: Float[Tensor, "b n k"] | None = None, again: str = "",
    ) -> dict[str, Tensor]:  # fmt: skip
        """Errors of the prediction for latents, or for a prefix of their channels; `again` names further draws."""
        eps = rng.normal("noise" + again, *z.shape[1:])
        t = self.process.sample_t(rng.uniform("time" + again))  # (b,)
        depth = self.align.depth if self.align is not None and features is not None else None
        with tapped(self.denoiser, depth) as hidden:
            prediction = self.denoiser(self.process.noise(z, t, eps), t, condition).float()
        target = self.process.target(z, t, eps)
        name, distance = ("l1", F.l1_loss) if self.loss == "l1" else ("mse", F.mse_loss)
        losses = {name: distance(prediction, target)}
        if self.cosine_weight:
            losses["cosine"] = (1 - F.cosine_similarity(prediction, target, dim=1)).mean()
        if self.align is not None:
            losses["align"] = self.align(hidden[0] if hidden else None, features)
        return losses

    def _drop(self, rng: KeyedRandom) -> Bool[Tensor, "b ..."] | None:
        """Which images get the null condition: `(b,)`, or `(b, k)` with a column for each of several conditions."""
        if not any(self.dropout):
            return None
        if len(self.dropout) == 1:
            return rng.uniform("drop") < self.dropout[0]  # (b,)
        uniform = rng.uniform("drop", len(self.dropout))  # (b, k)
        return uniform < torch.tensor(self.dropout, device=uniform.device)
