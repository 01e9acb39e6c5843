"""The denoising objective: regress the process's target from noisy latents."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import nn

from latelier.data.latents import draw_latents
from latelier.diffusion.process import DDPM, Flow
from latelier.draws import Draws
from latelier.objectives.terms import Terms


class DenoisingObjective(nn.Module):
    """Mean squared error of the prediction, and LightningDiT's cosine term on demand.

    Args:
        denoiser: the model to train.
        conditioner: makes the condition from the batch; None is unconditional.
        process: noises latents and names the target.
        seed: of posterior, time, noise and label dropout, addressed by the latents' numbers in the stream.
        dropout: probability of the null condition.
        cosine_weight: weight of mean(1 - cos(prediction, target)) along channels.
        sample_posterior: whether z is drawn from the posterior anew each time.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        conditioner: nn.Module | None,
        process: Flow | DDPM,
        seed: int,
        dropout: float = 0.1,
        cosine_weight: float = 0.0,
        sample_posterior: bool = True,
    ):
        super().__init__()
        self.denoiser, self.conditioner, self.process = denoiser, conditioner, process
        self.seed, self.dropout, self.cosine_weight = seed, dropout, cosine_weight
        self.sample_posterior = sample_posterior

    def forward(self, batch: dict[str, Any]) -> Terms:
        """Terms of a batch of normalised latents `mean` and `std` `(b, c, *grid)`; `draw` addresses randomness."""
        draws = Draws(self.seed, batch["draw"], batch["mean"].device)
        z = draw_latents(batch, draws) if self.sample_posterior else batch["mean"]  # (b, c, *grid)
        eps = draws.normal("noise", *z.shape[1:])
        t = self.process.sample_t(draws.uniform("time"))  # (b,)
        condition = None
        if self.conditioner is not None:
            drop = draws.uniform("drop") < self.dropout if self.dropout else None
            condition = self.conditioner(batch, drop)
        prediction = self.denoiser(self.process.noise(z, t, eps), t, condition).float()
        target = self.process.target(z, t, eps)

        losses, weights = {"mse": F.mse_loss(prediction, target)}, {"mse": 1.0}
        if self.cosine_weight:
            losses["cosine"] = (1 - F.cosine_similarity(prediction, target, dim=1)).mean()
            weights["cosine"] = self.cosine_weight
        return Terms(losses, weights)
