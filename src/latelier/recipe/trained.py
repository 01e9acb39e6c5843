"""What the recipe's sections of all tokenizers that are trained here share: phases, LPIPS, the discriminator."""

from __future__ import annotations

import re
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationError, model_validator

from latelier.errors import LatelierError
from latelier.recipe.base import Count, Section, Size, Training, Unit, Weight
from latelier.recipe.problems import first_problem


class Adversarial(Section):
    """A discriminator that tells images from reconstructions: of patches (LDM), or on DINO's features (MAETok)."""

    kind: Literal["patch", "dino"] = Field("patch", description="PatchGAN, or heads on the features of a frozen ViT")
    weight: Weight = Field(0.5, description="of the generator's term")
    adaptive: bool = Field(True, description="scale it so that both gradients at the last layer are equally long")
    start: Count = Field(0, description="images seen before the tokenizer feels the discriminator")
    ahead: Count = Field(0, description="images that the discriminator is trained on before that")
    loss: Literal["hinge", "non-saturating"] = "hinge"
    lr: float | None = Field(None, gt=0, description="the discriminator's; by default the tokenizer's")
    betas: tuple[Unit, Unit] = (0.5, 0.9)
    layers: int = Field(3, ge=1, description="strided convolutions: each doubles the patch that is judged")
    channels: int = Field(64, ge=1, description="of the first layer")
    norm: Literal["group", "batch"] = Field("group", description="batch as in LDM; group does not mix images")
    lecam: Weight = Field(0.0, description="LeCAM regularisation, for little data")
    lecam_decay: float = Field(0.99, ge=0, lt=1, description="of the running means of the logits")
    augment: list[Literal["color", "translation", "cutout"]] = Field([], description="DiffAugment, for little data")
    augment_share: Unit = Field(1.0, description="probability of each change, drawn for each image")
    consistency: Weight = Field(0.0, description="of the squared change of the logits when images are augmented")
    teacher: str = Field("facebook/dino-vits16", description="dino: Hub name or folder of a ViT of `transformers`")

    @model_validator(mode="after")
    def _check(self) -> Adversarial:
        for key in {"patch": ("teacher",), "dino": ("layers", "channels")}[self.kind]:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise LatelierError(f"tokenizer.adversarial.{key} means nothing to kind {self.kind!r}; leave it out.")
        return self


class TrainedTokenizer(Training):
    """What the sections of all tokenizers that are trained here share.

    `phases` are trained one after another: each takes over the weights, and every key of this section that it does not
    give itself, except how long, how often and for whom (`images`, the cadences, `init`).
    """

    METHODS: ClassVar[dict[str, dict[str, Any]]] = {}
    OWN: ClassVar[tuple[str, ...]] = ("images", "phases", "init", "log_every", "preview_every", "checkpoint_every")

    kind: str
    preset: str
    method: str | None = Field(None, description="a paper's name for a set of values; keys that are given win")
    init: str | None = Field(None, description="start from this folder or Hub name instead of random weights")
    model: dict[str, Any] = Field(default_factory=dict, description="overrides of the preset's architecture")
    image_size: Size | None = Field(None, description="train at this size; by default that of `data`")
    train: Literal["all", "decoder", "middle", "head"] | list[str] = Field(
        "all", description="what learns: all, the decoder, the layers around the latent, those next to the pixels"
    )
    perceptual_weight: Weight = Field(0.5, description="of LPIPS (VGG16); 0 leaves it out")
    perceptual_every: int = Field(1, ge=1, description="n: LPIPS on every n-th image only, since it costs most")
    adversarial: Adversarial | None = Field(None, description="a discriminator; none by default")
    phases: list[dict[str, Any]] = Field([], description="what follows: `name`, `images`, and any key that changes")

    @model_validator(mode="before")
    @classmethod
    def _method(cls, values: Any) -> Any:
        """The method's values, under those that are given."""
        method = values.get("method") if isinstance(values, dict) else None
        if method is None:
            return values
        if method not in cls.METHODS:
            raise LatelierError(f"tokenizer.method = {method!r} is not known; allowed: {', '.join(cls.METHODS)}.")
        return {**cls.METHODS[method], **values}

    @model_validator(mode="after")
    def _check_phases(self) -> TrainedTokenizer:
        for number in range(len(self.phases)):
            self.phase(number + 1)
        return self

    def phase(self, number: int) -> tuple[str, TrainedTokenizer]:
        """Name and resolved section of a phase; 0 is this section itself.

        Raises:
            LatelierError: if a phase has no name or length, or a key that it cannot have.
        """
        if number == 0:
            return "tokenizer", self
        given = dict(self.phases[number - 1])
        name = str(given.pop("name", ""))
        taken = ["tokenizer", "denoiser", *(str(phase.get("name")) for phase in self.phases[: number - 1])]
        if not re.fullmatch(r"[\w.]+", name) or name in taken:
            raise LatelierError(f"tokenizer.phases: phase {number} needs a `name` of its own, in letters and digits.")
        for key in ("kind", "preset", "model", "method", "init", "phases"):
            if key in given:
                raise LatelierError(f"tokenizer.phases: phase {name!r} cannot change {key!r}.")
        if "images" not in given:
            raise LatelierError(f"tokenizer.phases: phase {name!r} lacks `images`, how long it is trained.")
        inherited = {key: getattr(self, key) for key in type(self).model_fields if key not in self.OWN}
        try:
            return name, type(self).model_validate({**inherited, **given})
        except ValidationError as error:
            raise LatelierError(f"In phase {name!r} of tokenizer.phases: {first_problem(error, type(self))}") from None
