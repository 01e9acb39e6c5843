"""Kullback-Leibler terms of diagonal Gaussian posteriors."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def gaussian_kl(
    mean: Float[Tensor, "*b"], logvar: Float[Tensor, "*b"], form: str = "standard", fixed_std: float = 1.0
) -> Float[Tensor, "*b"]:
    """KL to a Gaussian, for each element.

    Args:
        mean: of the posterior.
        logvar: log-variance of the posterior.
        form: `standard`: KL to N(0, 1), 0.5 (mean^2 + var - 1 - logvar).
            `free-mean`: KL to N(mean, 1), 0.5 (var - 1 - logvar); the mean is not pulled to zero (LDMAE).
            `fixed-std`: KL to N(mean, s^2), 0.5 (var / s^2 - 1 - logvar + log s^2) (LDMAE's released script).
        fixed_std: s.
    """
    variance = logvar.exp()
    if form == "standard":
        return 0.5 * (mean.square() + variance - 1 - logvar)
    if form == "free-mean":
        return 0.5 * (variance - 1 - logvar)
    if form == "fixed-std":
        return 0.5 * (variance / fixed_std**2 - 1 - logvar + 2 * math.log(fixed_std))
    raise ValueError(f"unknown form of the KL: {form}")


def mean_kl(mean: Float[Tensor, "b *rest"], logvar: Float[Tensor, "b *rest"], form: str = "standard") -> Tensor:
    """KL summed over each image's latent, averaged over the batch (LDM)."""
    return torch.mean(gaussian_kl(mean, logvar, form).flatten(1).sum(1))
