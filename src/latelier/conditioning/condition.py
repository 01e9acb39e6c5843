"""What a denoiser may be told beside `x_t` and `t`, and the conditioners that say it.

Every task reduces to three injections: a vector (added to the time embedding), tokens (cross-attention or prefix),
and spatial channels (concatenated to `x_t`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from jaxtyping import Bool, Float
from torch import Tensor, nn

from latelier.errors import LatelierError

if TYPE_CHECKING:
    from latelier.conditioning import DataSpec
    from latelier.recipe.condition import ClassCondition


@dataclass
class Condition:
    """Three optional injections into a denoiser.

    Attributes:
        vector: `(b, d)`, added to the time embedding (adaLN).
        tokens: `(b, n, d)`, for cross-attention or as prefix tokens.
        mask: `(b, n)`, true where a token counts.
        spatial: `(b, c, *grid)`, concatenated to `x_t`.
    """

    vector: Float[Tensor, "b d"] | None = None
    tokens: Float[Tensor, "b n k"] | None = None
    mask: Bool[Tensor, "b n"] | None = None
    spatial: Float[Tensor, "b c *grid"] | None = None

    @staticmethod
    def cat(conditions: list[Condition]) -> Condition:
        """Stack along the batch, so that guidance needs one forward pass."""
        columns = {f.name: [getattr(c, f.name) for c in conditions] for f in fields(Condition)}
        return Condition(**{k: None if v[0] is None else torch.cat(v) for k, v in columns.items()})


class ClassConditioner(ModelMixin, ConfigMixin):
    """A learned vector for each class, and one more, the null class, for label dropout and guidance.

    Args:
        num_classes: number of classes, `y` in [0, num_classes).
        dim: width of the vector: the denoiser's, or that of its cross-attention.
        null: whether the table has a row for "no class" (DiT: only if labels are dropped in training).
        names: the classes' names, index = label, so that sampling can ask by name.
        inject: `vector` is added to the time embedding (DiT), `tokens` is the one token of cross-attention (LDM).
    """

    input_name = "classes"
    spatial_channels = 0

    @register_to_config
    def __init__(
        self, num_classes: int, dim: int, null: bool = True, names: list[str] | None = None, inject: str = "vector"
    ):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + int(null), dim)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    @property
    def token_width(self) -> int:
        """Width of the token; 0 if it is a vector."""
        return self.config["dim"] if self.config["inject"] == "tokens" else 0

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
        """The condition that says nothing, for guidance."""
        return self({"label": torch.full((batch_size,), self._null_index(), device=self.device)})

    def inputs(self, wanted: list[Any], size: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """Class names or indices, as a user gives them, to the batch that `forward` takes."""
        return {"label": torch.tensor([self.index(w) for w in wanted])}

    def index(self, wanted: int | str) -> int:
        """A class's index from its index, its name, or its index in a string."""
        names = self.config["names"] or []
        if wanted in names:
            return names.index(wanted)
        if str(wanted).isdigit() and int(wanted) < self.config["num_classes"]:
            return int(wanted)
        known = ", ".join(map(str, names)) if names else f"0..{self.config['num_classes'] - 1}"
        raise LatelierError(f"Unknown class {wanted!r}; this model knows: {known}.")

    def _null_index(self) -> int:
        if not self.config["null"]:
            raise LatelierError("This model has no null class (no label dropout in training): guidance must be 1.")
        return self.config["num_classes"]


def build(section: ClassCondition, spec: DataSpec) -> ClassConditioner:
    """A class conditioner for the data's classes.

    Raises:
        LatelierError: if the images have no classes.
    """
    if not spec.class_names:
        raise LatelierError(
            "denoiser.condition = 'class', but the data has no classes; put images into one folder per class, "
            "name the column with data.label_key, or set denoiser.condition=none sample.guidance=1."
        )
    tokens = section.inject == "tokens" or (section.inject == "auto" and spec.prefers_tokens)
    return ClassConditioner(
        len(spec.class_names),
        section.dim if tokens else spec.vector_width,
        null=section.dropout > 0,
        names=list(spec.class_names),
        inject="tokens" if tokens else "vector",
    )
