"""Spatial frequencies of latents: how much of their energy is fine detail, which diffusion learns late or not at all.

Spectral energy concentration ("Diffusing in the Right Space", 2026, equations 7 to 9): the share of the energy of the
orthonormal DCT-II of normalised latents at u + v > rho (h - 1 + w - 1). Latents have flatter spectra than images, the
more so with many channels (Skorokhodov et al. 2025, "Improving the Diffusability of Autoencoders", arXiv 2502.14831).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from latelier.analysis.sample import PIXELS, LatentSample
from latelier.evaluation.results import Result, mean_with_interval

RHO = 0.25
FLOOR = 1e-12  # of the mean energy: a coefficient without any, as of grey images, has no logarithm


@torch.no_grad()
def high_frequencies(sample: LatentSample) -> dict[str, Result]:
    """`high-frequency`: share of the energy above a quarter of the frequencies; lower is better.

    Details have `white_noise`, the value of latents without any structure on this grid (compare tokenizers of different
    grids relative to it), `spectrum`: the mean energy of a coefficient for each u + v, white noise being 1, and
    `log_spectrum`, see `log_energy`, beside that of the images at the grid's size, `image_log_spectrum`. Nothing for
    1-D latents.
    """
    if sample.mean.ndim != 4 or min(sample.mean.shape[2:]) < 2:
        return {}
    grid = (sample.mean.shape[2], sample.mean.shape[3])
    rows, by_channel = [], torch.zeros(sample.z.shape[1], *grid, dtype=torch.float64)  # (c, h, w), mean over images
    for z in sample.z.split(256):
        part = dct_energy(z.unflatten(2, grid))  # (b, c, h, w)
        rows.append(part.mean(1))
        by_channel += part.sum(0) / len(sample)
    energy = torch.cat(rows)  # (n, h, w)
    high = above(grid, RHO)  # (h, w)
    total = energy.sum((1, 2))
    value = float(energy[:, high].sum() / total.sum())
    shares = energy[:, high].sum(1) / total.mean()  # (n,)
    _, interval = mean_with_interval(shares)
    curve = [[b, float(energy[:, bands(grid) == b].mean())] for b in range(sum(grid) - 1)]
    details = {"n": len(sample), "rho": RHO, "grid": list(grid), "white_noise": float(high.double().mean())}
    details |= {"spectrum": curve, "log_spectrum": log_energy(by_channel)}
    if sample.images is not None and len(sample):
        details["image_log_spectrum"] = log_energy(image_energy(sample, grid))
    return {"high-frequency": Result(value, interval, {**details, **sample.about()})}


def dct_energy(planes: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Squared coefficients of the orthonormal DCT-II, float64."""
    from scipy.fft import dctn

    return torch.from_numpy(dctn(planes.double().cpu().numpy(), axes=(-2, -1), norm="ortho")).square()


def image_energy(sample: LatentSample, grid: tuple[int, int]) -> Float[Tensor, "c h w"]:
    """Mean energy of the images, made as small as the grid by means over areas, each colour centred as latents are."""
    parts = [F.adaptive_avg_pool2d(sample.pixels(rows), grid).cpu() for rows in sample.parts(PIXELS)]
    small = torch.cat(parts)  # (n, c, h, w)
    return dct_energy(small - small.mean((0, 2, 3), keepdim=True)).mean(0)


def log_energy(energy: Float[Tensor, "c h w"]) -> list[tuple[int, float]]:
    """For each u + v from 1 on, the mean over channels and coefficients of 10 log10 of the energy, in dB relative to
    u + v = 1. Without the constant, which is one number and tells how bright images are.
    """
    band = bands((energy.shape[1], energy.shape[2]))  # (h, w)
    decibels = 10 * energy.clamp(min=FLOOR * float(energy.mean()) or FLOOR).log10()  # (c, h, w)
    means = [float(decibels[:, band == b].mean()) for b in range(1, int(band.max()) + 1)]
    return [(b, y - means[0]) for b, y in enumerate(means, 1)]


def bands(grid: tuple[int, int]) -> Tensor:
    """u + v of each coefficient, `(h, w)`."""
    u, v = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    return u + v


def above(grid: tuple[int, int], rho: float) -> Tensor:
    """Coefficients `(h, w)` with u + v > rho (h - 1 + w - 1)."""
    return bands(grid) > rho * (grid[0] + grid[1] - 2)
