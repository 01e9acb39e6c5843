"""What an objective returns: named loss terms and their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from latelier.recipe import TrainedTokenizer


@dataclass
class LossTerms:
    """Loss terms of one batch.

    Attributes:
        losses: unweighted scalar terms, by name.
        weights: the weight of each; a term without a weight is logged and not trained on.
        reconstruction: of a tokenizer's objective: `(b, c, h, w)` with its graph, for the adversarial loss.
    """

    losses: dict[str, Tensor]
    weights: dict[str, float]
    reconstruction: Float[Tensor, "b c h w"] | None = None

    @property
    def total(self) -> Tensor:
        """The weighted sum that is differentiated; terms of weight zero do not enter the graph."""
        return sum((w * self.losses[k] for k, w in self.weights.items() if w), torch.zeros(()).to(self._any()))

    def _any(self) -> Tensor:
        return next(iter(self.losses.values())).detach()

    def non_finite(self) -> list[str]:
        """Names of the terms that are NaN or infinite."""
        return [name for name, value in self.losses.items() if not torch.isfinite(value.detach()).all()]


def judged(batch: Mapping[str, Any], recipe: TrainedTokenizer) -> Bool[Tensor, " b"] | None:
    """Which images LPIPS judges: every n-th of the stream, or all (None)."""
    if recipe.perceptual_every == 1:
        return None
    return (batch["sample_id"] % recipe.perceptual_every == 0).to(batch["image"].device)
