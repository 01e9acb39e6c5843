"""The discriminator's side of stage 1: its optimiser and its steps, apart from the tokenizer's."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

from latelier.losses.terms import LossTerms
from latelier.objectives.adversarial import Adversary
from latelier.recipe import TrainedTokenizer
from latelier.training.runtime import Stage, adamw


class Rival:
    """A discriminator in training.

    Args:
        adversary: the tokenizer's side, which holds the model.
        section: the tokenizer's section of the recipe; rate, clipping and schedule are its own unless
            `adversarial` says otherwise.
        accelerator: what prepares model and optimiser, and so saves them with every checkpoint.
    """

    def __init__(self, adversary: Adversary, section: TrainedTokenizer, accelerator: Accelerator):
        recipe = adversary.recipe
        changes = {"lr": recipe.lr or section.lr, "betas": recipe.betas, "weight_decay": 0.0}
        self.training, self.first = section.model_copy(update=changes), adversary.first
        model = adversary.objective
        if recipe.norm == "batch" and accelerator.num_processes > 1 and accelerator.device.type != "cpu":  # has none
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model = model.to(accelerator.device)
        self.objective, self.optimizer = accelerator.prepare(model, adamw(model, self.training))

    def learns(self, images: int) -> bool:
        """Whether the step that begins at `images` seen trains the discriminator."""
        return images >= self.first

    def backward(self, stage: Stage, batch: dict[str, Any], terms: LossTerms, last: bool) -> None:
        """Forward and backward on images and what the tokenizer has just made of them."""
        if self.learns(stage.images):
            pair = {"real": batch["image"], "fake": terms.reconstruction.detach(), "sample_id": batch["sample_id"]}
            stage.backward(self.objective, pair, last, total="d_total")

    def update(self, stage: Stage, batch: dict[str, Any]) -> None:
        """The optimiser's step."""
        if self.learns(stage.images):
            stage.set_learning_rate(self.optimizer, self.training)
            stage.step(self.objective, self.optimizer, batch, norm="d_grad_norm")
