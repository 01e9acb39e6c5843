"""From what a user asks for to the conditions that a denoiser is told, and those that say nothing, for guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from latelier.conditioning import parts
from latelier.conditioning.composite import CompositeConditioner
from latelier.conditioning.condition import Condition
from latelier.errors import LatelierError


@dataclass
class Asked:
    """What images are to show; image i gets entry `i % len` of each list.

    Attributes:
        wanted: lists by the names that conditioners ask for: `classes`, `prompts`, `layouts`, ...
        records: entries of records, as batches of training have them, instead of some of `wanted`.
        negative_prompts: what guidance leads away from, instead of nothing.
    """

    wanted: dict[str, list[Any]]
    records: Mapping[str, Any] = field(default_factory=dict)
    negative_prompts: list[str] | None = None

    def __len__(self) -> int:
        """How many images are asked for: the longest list, at least one."""
        records = [len(value) for value in self.records.values()]
        return max([1, *map(len, self.wanted.values()), *records])

    def check(self, conditioner: ModelMixin | None, guidance: float, dropped: Sequence[str]) -> Asked:
        """What is asked of this model, all classes in turn where none is named.

        Raises:
            LatelierError: if the model is not told such things, or needs to be told more.
        """
        known = parts(conditioner)
        told = f"is told {' and '.join(known)}" if known else "is unconditional"
        for name, values in self.wanted.items():
            if name not in known:
                raise LatelierError(f"{name} = {_short(values)} cannot be asked of this model, which {told}.")
        if self.negative_prompts and "prompts" not in known:
            raise LatelierError(f"negative_prompts cannot be asked of this model, which {told}.")
        if guidance != 1 and not known:
            raise LatelierError(f"guidance = {guidance}, but this model is unconditional; set guidance to 1.")
        if guidance != 1 and not dropped:
            raise LatelierError(
                f"guidance = {guidance}, but in training this model was never told nothing, so it cannot be guided; "
                "set guidance to 1."
            )
        if self.negative_prompts and guidance == 1:
            raise LatelierError("negative_prompts act through guidance; set it above 1.")
        wanted = dict(self.wanted)
        for name, part in known.items():
            if name == "classes" and name not in wanted and "label" not in self.records:
                wanted[name] = list(range(part.config["num_classes"]))  # type: ignore[index]
            elif name not in wanted and not self.records:
                raise LatelierError(f"This model {told}; say which {name} to draw, one or more.")
        return Asked(wanted, self.records, self.negative_prompts)

    def conditions(
        self,
        conditioner: ModelMixin | None,
        seeds: list[int],
        first: int,
        size: tuple[int, int],
        codec: Any,
        guidance: float,
        dropped: Sequence[str],
    ) -> tuple[Condition | None, Condition | None, Mapping[str, Any]]:
        """The condition of some images, the one that says nothing when guidance needs it, and the record entries.

        Args:
            conditioner: of the model; None for an unconditional one.
            seeds: of the images; random masks and degradations of records are drawn from them.
            first: the seed of the first of all images.
            size: height and width in pixels.
            codec: the tokenizer.
            guidance: scale; 1 needs no second condition.
            dropped: which parts may be told nothing.
        """
        if conditioner is None:
            return None, None, {}
        numbers = [seed - first for seed in seeds]
        batch = {key: cycle_rows(value, numbers) for key, value in self.records.items()}
        wanted = {name: cycle_rows(values, numbers) for name, values in self.wanted.items()}
        one = conditioner if isinstance(conditioner, CompositeConditioner) else None
        for name, values in wanted.items():
            batch |= (one.parts[name] if one else conditioner).inputs(values, size)  # type: ignore[operator]
        batch["sample_id"] = torch.tensor(seeds)
        batch = {k: v.to(conditioner.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        batch |= conditioner.prepare(batch, codec)  # type: ignore[operator]
        told = conditioner(batch)
        if guidance == 1:
            return told, None, batch
        other = batch
        if self.negative_prompts:
            other = {**batch, "caption": cycle_rows(self.negative_prompts, numbers)}
            other |= conditioner.prepare(other, codec)  # type: ignore[operator]
        drop = torch.tensor([name in dropped and not self._kept(name) for name in parts(conditioner)])  # (k,)
        drop = drop.expand(len(seeds), -1) if one else drop.expand(len(seeds))  # (b, k) or (b,)
        return told, conditioner(other, drop.to(conditioner.device)), batch

    def _kept(self, name: str) -> bool:
        """Whether the negative prompts take the place of being told nothing."""
        return name == "prompts" and bool(self.negative_prompts)


def cycle_rows(values: Any, numbers: Sequence[int]) -> Any:
    """The entries of some images, begun anew where there are fewer entries than images."""
    places = [n % len(values) for n in numbers]
    return values[places] if isinstance(values, Tensor) else [values[p] for p in places]


def _short(values: list[Any]) -> str:
    """The first value, for messages."""
    text = repr(values[0]) if values else "[]"
    return text if len(text) < 60 else text[:57] + "..."
