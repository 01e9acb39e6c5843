"""Velocity irreducible variance: the part of a denoiser's loss that no network can remove.

With x_t = (1 - t) z + t eps and the velocity v = eps - z, a denoiser's loss is at least the variance of v given x_t and
the class. For a Gaussian class whose covariance has eigenvalues l_i, and t uniform in [0, 1], it has a closed form
("Diffusing in the Right Space", 2026, arXiv 2606.03578, equations 4 to 6):

    I = integral over t of sum_i l_i / (t² + (1 - t)² l_i) = (pi / 2) sum_i sqrt(l_i)

A class has fewer images than a latent has numbers, so its covariance is taken to be a Kronecker product of one over
channels and one over positions, whose eigenvalues are all products c_i s_j. Values here are per number of a latent.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from latelier.analysis.sample import LatentSample
from latelier.errors import NotMeasurable
from latelier.evaluation.results import Result
from latelier.keyed_random import KeyedRandom

FEWEST = 4  # images of a class; classes with fewer are left out
ITERATIONS = 5  # of the fit of both factors
FLOOR = 1e-9  # of an eigenvalue, relative to the mean: directions that few images never show
RESAMPLES = 20  # of images within classes, for the interval
MOST_WORK = 2**36  # multiplications; larger latents have no interval


@torch.no_grad()
def velocity_variance(sample: LatentSample, seed: int = 0) -> dict[str, Result]:
    """`viv`, the mean over classes of at least 4 images, and `viv-free`, of one Gaussian for all images, which is an
    upper bound without classes; both per number of a latent, lower is better.

    The interval of `viv` is of images drawn again within classes. Details have `within_class_variance` (rho, the share
    of the variance that lies within classes) and `shape` (phi <= 1): viv = (pi / 2) sqrt(rho) phi up to the spread of
    rho between classes. Fewer images per class make values smaller, so compare at equal images only.
    """
    if len(sample) < FEWEST:
        raise NotMeasurable(f"viv needs at least {FEWEST} images, not {len(sample)}.")
    z = sample.z  # (n, c, s)
    about = {"n": len(z), **sample.about(), "covariance": "Kronecker product of channels and positions"}
    free = per_number(z)
    found = {"viv-free": Result(free, None, {**about, "law": "one Gaussian for all images"})}
    classes = [z[sample.labels == k] for k in sample.labels.unique().tolist() if k >= 0]
    classes = [rows for rows in classes if len(rows) >= FEWEST]
    if len(classes) < 2:
        return found
    value = sum(map(per_number, classes)) / len(classes)
    rho = sum(variance(rows) for rows in classes) / len(classes)
    counts = [len(rows) for rows in classes]
    about |= {"classes": len(classes), "images_per_class": [min(counts), max(counts)], "law": "a Gaussian per class"}
    about |= {"within_class_variance": rho, "shape": value / (math.pi / 2 * math.sqrt(rho)) if rho else math.nan}
    return {"viv": Result(value, _interval(classes, value, seed, about), about), **found}


def per_number(z: Float[Tensor, "m c s"]) -> float:
    """(pi / 2) sum sqrt(c_i s_j) / (c s) of one Gaussian: a product of two sums."""
    channels, positions = kronecker_eigenvalues(z)
    return float(math.pi / 2 * channels.sqrt().mean() * positions.sqrt().mean())


def variance(z: Float[Tensor, "m c s"]) -> float:
    """Population variance of a latent's numbers over images, mean over numbers."""
    return float(z.double().var(0, correction=0).mean())


def kronecker_eigenvalues(
    z: Float[Tensor, "m c s"], iterations: int = ITERATIONS
) -> tuple[Float[Tensor, " c"], Float[Tensor, " s"]]:
    """Eigenvalues of the two factors of a covariance, by maximum likelihood in turns (flip-flop, Dutilleul 1999).

    Their scale is not identified; the sum of all products is set to the total variance. What lies below the floor is
    raised to it before an inverse is taken: few images span few directions.
    """
    x = z.double()
    x = x - x.mean(0)  # (m, c, s)
    count, channels, positions = x.shape
    total = float(x.square().sum() / count)
    if not total > 0:
        return x.new_zeros(channels), x.new_zeros(positions)
    inverse = torch.eye(positions, dtype=x.dtype)  # of the positions' factor
    for _ in range(iterations):
        c, basis = _eigen(torch.einsum("mis,st,mjt->ij", x, inverse, x) / (count * positions))
        s, frame = _eigen(torch.einsum("mcs,cd,mdt->st", x, _inverse(c, basis), x) / (count * channels))
        inverse = _inverse(s, frame)
    return c, s * (total / float(c.sum() * s.sum()))


def _eigen(matrix: Float[Tensor, "k k"]) -> tuple[Float[Tensor, " k"], Float[Tensor, "k k"]]:
    values, basis = torch.linalg.eigh((matrix + matrix.T) / 2)
    return values.clamp(min=0), basis


def _inverse(values: Float[Tensor, " k"], basis: Float[Tensor, "k k"]) -> Float[Tensor, "k k"]:
    return basis / values.clamp(min=FLOOR * float(values.mean())) @ basis.T


def _interval(classes: list[Tensor], value: float, seed: int, about: dict[str, Any]) -> tuple[float, float] | None:
    """Normal, around the value: images drawn again make every class look narrower, so their mean is not used."""
    n, (channels, positions) = sum(map(len, classes)), classes[0].shape[1:]
    if 2 * RESAMPLES * ITERATIONS * n * channels * positions * (channels + positions) > MOST_WORK:
        about["note"] = "no interval: the latents are too large to be fitted again and again"
        return None
    found = []
    for number in range(RESAMPLES):
        resampled = []
        for k, rows in enumerate(classes):
            draw = KeyedRandom(seed + number, torch.arange(len(rows))).uniform(f"viv class {k}")  # (m,)
            chosen: Int[Tensor, " m"] = (draw * len(rows)).long().clamp(max=len(rows) - 1)
            resampled.append(per_number(rows[chosen]))
        found.append(sum(resampled) / len(resampled))
    half = 1.96 * float(torch.tensor(found, dtype=torch.float64).std())
    return value - half, value + half
