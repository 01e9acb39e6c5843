"""Spatial frequencies of latents: how much of their energy is fine detail, which diffusion learns late or not at all.

Spectral energy concentration ("Diffusing in the Right Space", 2026, equations 7 to 9): the share of the energy of the
orthonormal DCT-II of normalised latents at u + v > rho (h - 1 + w - 1). Latents have flatter spectra than images, the
more so with many channels (Skorokhodov et al. 2025, "Improving the Diffusability of Autoencoders").
"""

from __future__ import annotations

import torch
from torch import Tensor

from latelier.analysis.sample import LatentSample
from latelier.evaluation.results import Result, mean_with_interval

RHO = 0.25


@torch.no_grad()
def high_frequencies(sample: LatentSample) -> dict[str, Result]:
    """`high-frequency`: share of the energy above a quarter of the frequencies; lower is better.

    Details have `white_noise`, the value of latents without any structure on this grid (compare tokenizers of different
    grids relative to it), and `spectrum`: the mean energy of a coefficient for each u + v, white noise being 1. Nothing
    for 1-D latents.
    """
    from scipy.fft import dctn

    if sample.mean.ndim != 4 or min(sample.mean.shape[2:]) < 2:
        return {}
    grid = (sample.mean.shape[2], sample.mean.shape[3])
    planes = (z.unflatten(2, grid).double().numpy() for z in sample.z.split(256))  # (b, c, h, w)
    spectra = (torch.from_numpy(dctn(plane, axes=(-2, -1), norm="ortho")) for plane in planes)
    energy = torch.cat([spectrum.square().mean(1) for spectrum in spectra])  # (n, h, w)
    high = above(grid, RHO)  # (h, w)
    total = energy.sum((1, 2))
    value = float(energy[:, high].sum() / total.sum())
    shares = energy[:, high].sum(1) / total.mean()  # (n,)
    _, interval = mean_with_interval(shares)
    band = sum(torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij"))  # (h, w)
    curve = [[b, float(energy[:, band == b].mean())] for b in range(sum(grid) - 1)]
    details = {"n": len(sample), "rho": RHO, "grid": list(grid), "white_noise": float(high.double().mean())}
    return {"high-frequency": Result(value, interval, {**details, "spectrum": curve, **sample.about()})}


def above(grid: tuple[int, int], rho: float) -> Tensor:
    """Coefficients `(h, w)` with u + v > rho (h - 1 + w - 1)."""
    u, v = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    return u + v > rho * (grid[0] + grid[1] - 2)
