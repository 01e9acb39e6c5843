"""Several conditions at once: vectors are added, tokens follow one another, spatial channels are stacked."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from jaxtyping import Bool
from torch import Tensor, nn

from latelier.conditioning import CONDITIONERS
from latelier.conditioning.condition import Condition
from latelier.errors import LatelierError


class CompositeConditioner(ModelMixin, ConfigMixin):
    """Conditioners whose conditions are merged.

    Args:
        about: the parts, by what each asks for: `{"module": ..., "class": ..., "config": {...}}`; see `Together.of`.
    """

    input_name = None

    @register_to_config
    def __init__(self, about: dict[str, dict[str, Any]]):
        super().__init__()
        self.parts = nn.ModuleDict({name: _build(part) for name, part in about.items()})

    @classmethod
    def of(cls, conditioners: list[Any]) -> CompositeConditioner:
        """The merger of conditioners that are built already."""
        about = {
            c.input_name: {
                "module": type(c).__module__,
                "class": type(c).__name__,
                "config": {k: v for k, v in c.config.items() if not k.startswith("_")},
            }
            for c in conditioners
        }
        with torch.device("meta"):  # the parts are here already
            together = cls(about)
        for conditioner in conditioners:  # with their weights and whatever they have frozen
            together.parts[conditioner.input_name] = conditioner
        return together

    @property
    def token_width(self) -> int:
        """Width of all tokens; 0 if there are none."""
        return max(part.token_width for part in self.parts.values())

    @property
    def spatial_channels(self) -> int:
        """Channels that are concatenated to `x_t`."""
        return sum(part.spatial_channels for part in self.parts.values())

    def inputs(self, wanted: Mapping[str, list[Any]], size: tuple[int, int]) -> dict[str, Any]:
        """Record entries of what is asked for, by what each part asks for."""
        merged: dict[str, Any] = {}
        for name, values in wanted.items():
            merged |= self.parts[name].inputs(values, size)
        return merged

    def prepare(self, batch: Mapping[str, Any], codec: Any) -> dict[str, Tensor]:
        """What all parts prepare."""
        merged: dict[str, Tensor] = {}
        for part in self.parts.values():
            merged |= part.prepare(batch, codec)
        return merged

    def forward(self, batch: Mapping[str, Any], drop: Bool[Tensor, b * k] | None = None) -> Condition:
        """The merged condition; `drop` is `(b,)` for all parts alike or `(b, k)`, a column for each part."""
        conditions = []
        for i, part in enumerate(self.parts.values()):
            mine = drop if drop is None or drop.ndim == 1 else drop[:, i]
            conditions.append(part(batch, mine))
        return merge(conditions)


def merge(conditions: list[Condition]) -> Condition:
    """Vectors added, tokens one after another, spatial channels stacked."""
    vectors = [c.vector for c in conditions if c.vector is not None]
    spatial = [c.spatial for c in conditions if c.spatial is not None]
    told = [c for c in conditions if c.tokens is not None]
    mask = None
    if any(c.mask is not None for c in told):
        mask = torch.cat([_mask(c) for c in told], dim=1)  # (b, n)
    return Condition(
        vector=sum(vectors[1:], vectors[0]) if vectors else None,  # (b, d)
        tokens=torch.cat([c.tokens for c in told if c.tokens is not None], dim=1) if told else None,  # (b, n, k)
        mask=mask,
        spatial=torch.cat(spatial, dim=1) if spatial else None,  # (b, c, *grid)
    )


def _mask(condition: Condition) -> Bool[Tensor, "b n"]:
    assert condition.tokens is not None
    if condition.mask is not None:
        return condition.mask
    return torch.ones(condition.tokens.shape[:2], dtype=torch.bool, device=condition.tokens.device)


def _build(about: dict[str, Any]) -> nn.Module:
    """A part from what `Together.of` noted; only models of modules that are imported already are built."""
    for place in CONDITIONERS.values():
        importlib.import_module(place.split(":")[0])
    cls = getattr(sys.modules.get(about["module"]), about["class"], None)
    if not (isinstance(cls, type) and issubclass(cls, ModelMixin)):
        name = f"{about['module']}.{about['class']}"
        raise LatelierError(f"The conditioner {name} is not known; import its module first.")
    return cls(**about["config"])
