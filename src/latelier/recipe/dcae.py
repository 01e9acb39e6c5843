"""The recipe's `tokenizer` section of kind `dcae`: a deep-compression autoencoder."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from latelier.recipe.base import Weight
from latelier.recipe.prefixes import Prefixes
from latelier.recipe.trained import TrainedTokenizer


class DCAERecipe(TrainedTokenizer):
    """Deep-compression autoencoder on diffusers' AutoencoderDC (DC-AE, ICLR 2025; DC-AE 1.5, ICCV 2025).

    Method `structured` is DC-AE 1.5's: the decoder sees a random prefix of the channels in each step.
    """

    METHODS: ClassVar[dict[str, dict[str, Any]]] = {"plain": {"prefixes": None}, "structured": {"prefixes": {}}}

    kind: Literal["dcae"]
    preset: str = "dcae-f32c32"
    reconstruction: Literal["l1", "l2"] = "l1"
    perceptual_weight: Weight = 0.5
    prefixes: Prefixes | None = Field(None, description="structured latents: any prefix of the channels decodes")
