"""The `Condition` of a denoiser, the conditioner of classes, and several conditioners at once."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from latelier.conditioning import CONDITIONERS
from latelier.errors import LatelierError
from latelier.sections import Section, Unit


@dataclass
class Condition:
    """The three ways into a denoiser, to which every task reduces; each is optional."""

    vector: Float[Tensor, "b d"] | None = None  # added to the time embedding (adaLN)
    tokens: Float[Tensor, "b n k"] | None = None  # for cross-attention or as prefix tokens
    mask: Bool[Tensor, "b n"] | None = None  # true where a token counts
    spatial: Float[Tensor, "b c *grid"] | None = None  # concatenated to `x_t`

    @staticmethod
    def cat(conditions: list[Condition]) -> Condition:
        """Stack along the batch, so that guidance needs one forward pass."""
        columns = {f.name: [getattr(c, f.name) for c in conditions] for f in fields(Condition)}
        return Condition(**{k: None if v[0] is None else torch.cat(v) for k, v in columns.items()})


@dataclass(frozen=True)
class DataSpec:
    """The data and the denoiser that conditioners are built for; None for what the data have not."""

    class_names: list[str] | None  # index = label
    box_names: list[str] | None  # of the classes of boxes
    segmentation_classes: int | None  # how many ids the label maps have
    captions: Callable[[], Iterator[str]] | None  # one pass over the training captions
    latent_shape: tuple[int, ...]  # (c, *grid)
    factor: int  # pixels along a side of a latent position
    image_channels: int
    vector_width: int  # of the denoiser's time embedding
    prefers_tokens: bool  # whether the denoiser has cross-attention by nature (U-Nets) rather than adaLN
    seed: int  # the run's


class ClassCondition(Section):
    """The image's class."""

    kind: Literal["class"]
    inject: Literal["auto", "vector", "tokens"] = Field(
        "auto", description="added to the time embedding, or through cross-attention; auto: what the denoiser has"
    )
    dim: int = Field(512, ge=1, description="width of the token, when it is one")
    dropout: Unit = Field(0.1, description="share of images without their class, for classifier-free guidance")


class ClassConditioner(ModelMixin, ConfigMixin):
    """A learned vector for each class, and one more, the null class, for label dropout and guidance.

    Args:
        num_classes, names: names are for users, index = label.
        dim: width of the vector.
        null: whether the table has a row for "no class" (DiT: only if labels are dropped in training).
        inject: `vector` is added to the time embedding (DiT), `tokens` is the one token of cross-attention (LDM).
    """

    input_name, spatial_channels = "classes", 0

    @register_to_config
    def __init__(
        self, num_classes: int, dim: int, null: bool = True, names: list[str] | None = None, inject: str = "vector"
    ):
        super().__init__()
        self.token_width = dim if inject == "tokens" else 0
        self.embedding_table = nn.Embedding(num_classes + int(null), dim)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def prepare(self, batch: Mapping[str, Any], codec: Any) -> dict[str, Tensor]:
        """Nothing is made from the images."""
        return {}

    def forward(self, batch: Mapping[str, Any], drop: Bool[Tensor, " b"] | None = None) -> Condition:
        """Condition of `batch["label"]` `(b,)`; rows where `drop` is true get the null class."""
        labels = batch["label"].to(self.device)
        if drop is not None and drop.any():
            labels = torch.where(drop.to(labels.device), self._null_index(), labels)
        embedded = self.embedding_table(labels)  # (b, d)
        return Condition(tokens=embedded[:, None]) if self.token_width else Condition(vector=embedded)

    def null(self, batch_size: int) -> Condition:
        """The condition of the null class, for guidance."""
        return self({"label": torch.full((batch_size,), self._null_index(), device=self.device)})

    def inputs(self, wanted: list[Any], size: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """Class names or indices to `label`."""
        names, count = self.config["names"] or [], self.config["num_classes"]
        return {"label": torch.tensor([class_index(w, names, count, "class") for w in wanted])}

    def _null_index(self) -> int:
        if not self.config["null"]:
            raise LatelierError("This model has no null class (no label dropout in training): guidance must be 1.")
        return self.config["num_classes"]


def class_index(wanted: Any, names: Sequence[str], count: int, what: str) -> int:
    """A class's index from its index, its name, or its index in a string; an error that says `what` is unknown."""
    if wanted in names:
        return list(names).index(wanted)
    if str(wanted).isdigit() and int(wanted) < count:
        return int(wanted)
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    known = ", ".join(map(str, names[:20])) + more if names else f"0..{count - 1}"
    raise LatelierError(f"Unknown {what} {wanted!r}; this model knows: {known}.")


def build(section: ClassCondition, spec: DataSpec) -> ClassConditioner:
    """The conditioner of a recipe's section; an error if the images have no classes."""
    if not spec.class_names:
        raise LatelierError(
            "denoiser.condition = 'class', but the data has no classes; put images into one folder per class, "
            "name the column with data.label_key, or set denoiser.condition=none sample.guidance=1."
        )
    tokens = section.inject == "tokens" or (section.inject == "auto" and spec.prefers_tokens)
    width, inject = (section.dim, "tokens") if tokens else (spec.vector_width, "vector")
    return ClassConditioner(len(spec.class_names), width, section.dropout > 0, list(spec.class_names), inject)


class CompositeConditioner(ModelMixin, ConfigMixin):
    """Several conditioners: vectors are added, tokens follow one another, spatial channels are stacked.

    `about` has the components by `input_name`: `{"module": ..., "class": ..., "config": {...}}`, as `of` writes them.
    """

    input_name = None

    @register_to_config
    def __init__(self, about: dict[str, dict[str, Any]]):
        super().__init__()
        self.components = nn.ModuleDict({name: _build_component(entry) for name, entry in about.items()})
        self.token_width = max(component.token_width for component in self.components.values())
        self.spatial_channels = sum(component.spatial_channels for component in self.components.values())

    @classmethod
    def of(cls, conditioners: list[Any]) -> CompositeConditioner:
        """The composite of conditioners that are built already."""
        about = {}
        for c in conditioners:
            config = {k: v for k, v in c.config.items() if not k.startswith("_")}
            about[c.input_name] = {"module": type(c).__module__, "class": type(c).__name__, "config": config}
        with torch.device("meta"):  # the components are here already, with their weights and whatever they froze
            composite = cls(about)
        composite.components.update({c.input_name: c for c in conditioners})
        return composite

    def prepare(self, batch: Mapping[str, Any], codec: Any) -> dict[str, Tensor]:
        """What all components prepare."""
        return {k: v for one in self.components.values() for k, v in one.prepare(batch, codec).items()}

    def forward(self, batch: Mapping[str, Any], drop: Bool[Tensor, " b *k"] | None = None) -> Condition:
        """The merged condition; `drop` is `(b,)` for all components alike, or `(b, k)` with a column for each."""
        columns = [drop if drop is None or drop.ndim == 1 else drop[:, i] for i in range(len(self.components))]
        return merge([component(batch, column) for component, column in zip(self.components.values(), columns)])


def merge(conditions: list[Condition]) -> Condition:
    """Vectors added, tokens one after another, spatial channels stacked."""
    vectors = [c.vector for c in conditions if c.vector is not None]
    spatial = [c.spatial for c in conditions if c.spatial is not None]
    tokens = [c.tokens for c in conditions if c.tokens is not None]
    masks = [c.mask for c in conditions if c.tokens is not None]
    mask = None
    if any(m is not None for m in masks):
        masks = [t.new_ones(t.shape[:2], dtype=torch.bool) if m is None else m for m, t in zip(masks, tokens)]
        mask = torch.cat(masks, dim=1)  # (b, n)
    return Condition(
        vector=sum(vectors[1:], vectors[0]) if vectors else None,  # (b, d)
        tokens=torch.cat(tokens, dim=1) if tokens else None,  # (b, n, k)
        mask=mask,
        spatial=torch.cat(spatial, dim=1) if spatial else None,  # (b, c, *grid)
    )


def components(conditioner: nn.Module | None) -> dict[str, Any]:
    """The components of a composite by `input_name`; any other conditioner is its only component."""
    if isinstance(conditioner, CompositeConditioner):
        return dict(conditioner.components.items())
    return {} if conditioner is None else {conditioner.input_name: conditioner}  # type: ignore[dict-item]


def build_conditioner(sections: Sequence[Any], spec: DataSpec) -> ModelMixin | None:
    """One conditioner for all sections of a recipe, or None; an error if two sections do not go together."""
    kinds = [section.kind for section in sections]
    built = [importlib.import_module(CONDITIONERS[section.kind]).build(section, spec) for section in sections]
    widths = {kind: conditioner.token_width for kind, conditioner in zip(kinds, built) if conditioner.token_width}
    if len(set(widths.values())) > 1:
        found = ", ".join(f"{kind} {width}" for kind, width in widths.items())
        raise LatelierError(f"The tokens of denoiser.condition must be equally wide, not {found}; set their `dim`.")
    if len(built) < 2:
        return built[0] if built else None
    return CompositeConditioner.of(built)


def _build_component(about: dict[str, Any]) -> nn.Module:
    """A component from what `of` wrote; only models of modules that are imported already are built."""
    for module in CONDITIONERS.values():
        importlib.import_module(module)
    cls = getattr(sys.modules.get(about["module"]), about["class"], None)
    if not (isinstance(cls, type) and issubclass(cls, ModelMixin)):
        raise LatelierError(
            f"The conditioner {about['module']}.{about['class']} is not known; import its module first."
        )
    return cls(**about["config"])


SECTIONS = (ClassCondition,)
