"""What an objective returns: named loss terms and their weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass
class LossTerms:
    """Loss terms of one batch.

    Attributes:
        losses: unweighted scalar terms, by name.
        weights: the weight of each; a term without a weight is logged and not trained on.
        reconstruction: of a tokenizer's objective: `(b, c, h, w)` with its graph, for the adversarial loss.
        target: what it is to equal, where that is not the batch's image.
    """

    losses: dict[str, Tensor]
    weights: dict[str, float]
    reconstruction: Float[Tensor, "b c h w"] | None = None
    target: Float[Tensor, "b c h w"] | None = None

    @property
    def total(self) -> Tensor:
        """The weighted sum that is differentiated; terms of weight zero do not enter the graph."""
        first = next(iter(self.losses.values())).detach()
        return sum((w * self.losses[k] for k, w in self.weights.items() if w), torch.zeros(()).to(first))
