"""The denoising objective: regress the process's target from noisy latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from latelier.conditioning.condition import Condition
from latelier.data.latents import sample_posterior
from latelier.diffusion.process import DDPM, Flow
from latelier.keyed_random import KeyedRandom
from latelier.losses.terms import LossTerms
from latelier.objectives.prefixes import draw_lengths
from latelier.recipe import Prefixes


class DenoisingObjective(nn.Module):
    """Squared or absolute error of the prediction, and LightningDiT's cosine term on demand.

    Args:
        denoiser: the model to train.
        conditioner: makes the condition from the batch; None is unconditional.
        process: noises latents and names the target.
        seed: of posterior, time, noise and label dropout, addressed by the latents' numbers in the stream.
        dropout: probability of the null condition, for each of the conditioner's parts.
        loss: `l2`, the mean squared error, or `l1`, the mean absolute error (some models of LDM).
        cosine_weight: weight of mean(1 - cos(prediction, target)) along channels.
        sample_posterior: whether z is drawn from the posterior anew each time.
        prefixes: augmented training (DC-AE 1.5): each step learns a random prefix of the channels, which the denoiser
            is not told, with noise and time of its own; the loss is the mean over the channels that are there.
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
        prefixes: Prefixes | None = None,
    ):
        super().__init__()
        self.denoiser, self.conditioner, self.process = denoiser, conditioner, process
        self.seed, self.dropout, self.loss, self.cosine_weight = seed, tuple(dropout), loss, cosine_weight
        self.sample_posterior, self.prefixes = sample_posterior, prefixes

    def forward(self, batch: dict[str, Any]) -> LossTerms:
        """Terms of a batch of normalised latents `mean` and `std` `(b, c, *grid)`; `draw` addresses randomness."""
        draws = KeyedRandom(self.seed, batch["sample_id"], batch["mean"].device)
        z = sample_posterior(batch, draws) if self.sample_posterior else batch["mean"]  # (b, c, *grid)
        condition = None
        if self.conditioner is not None:
            condition = self.conditioner(batch, self._drop(draws))
        if self.prefixes is None:
            losses = self._errors(z, draws, condition)
        else:
            lengths = draw_lengths(self.prefixes, z.shape[1], self.seed, batch["seen"])
            parts = [self._errors(z[:, :k], draws, condition, f" {i}" * (i > 0)) for i, k in enumerate(lengths)]
            losses = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
        weights = {"l1": 1.0, "mse": 1.0, "cosine": self.cosine_weight}
        return LossTerms(losses, {name: weights[name] for name in losses})

    def _errors(
        self, z: Float[Tensor, "b c *grid"], draws: KeyedRandom, condition: Condition | None, again: str = ""
    ) -> dict[str, Tensor]:
        """Errors of the prediction for latents, or for a prefix of their channels; `again` tells draws apart."""
        eps = draws.normal("noise" + again, *z.shape[1:])
        t = self.process.sample_t(draws.uniform("time" + again))  # (b,)
        prediction = self.denoiser(self.process.noise(z, t, eps), t, condition).float()
        target = self.process.target(z, t, eps)
        losses = {}
        if self.loss == "l1":
            losses["l1"] = F.l1_loss(prediction, target)
        else:
            losses["mse"] = F.mse_loss(prediction, target)
        if self.cosine_weight:
            losses["cosine"] = (1 - F.cosine_similarity(prediction, target, dim=1)).mean()
        return losses

    def _drop(self, draws: KeyedRandom) -> Bool[Tensor, "b ..."] | None:
        """Which images are told nothing: `(b,)`, or `(b, k)` with a column for each of several conditions."""
        if not any(self.dropout):
            return None
        if len(self.dropout) == 1:
            return draws.uniform("drop") < self.dropout[0]  # (b,)
        uniform = draws.uniform("drop", len(self.dropout))  # (b, k)
        return uniform < torch.tensor(self.dropout, device=uniform.device)
