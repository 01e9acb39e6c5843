"""Velocity irreducible variance: the part of a denoiser's loss that no network can remove.

With x_t = (1 - t) z + t eps and the velocity v = eps - z, a denoiser's loss is at least the variance of v given x_t and
the class. For a Gaussian class whose covariance has eigenvalues l_i, and t uniform in [0, 1], it has a closed form
("Diffusing in the Right Space", 2026, arXiv 2606.03578, equations 4 to 6):

    I = integral over t of sum_i l_i / (t² + (1 - t)² l_i) = (pi / 2) sum_i sqrt(l_i)

A class has fewer images than a latent has numbers, so its covariance is taken to be a Kronecker product of one over
channels and one over positions, whose eigenvalues are all products c_i s_j. Values here are per number of a latent.

Without the class, latents are a mixture of these Gaussians, and I is estimated by Monte Carlo. It lies between the
value within classes and, were covariances exact, that of one Gaussian for all.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

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
DRAWS, FEWEST_DRAWS, HELD = 2048, 32, 2**22  # of the mixture; numbers of latents that are held at once
MIXTURE_WORK, OF_PASSES = 2**35, 256  # multiplications, some seconds; what passes over a number cost, in the same


class Gaussian(NamedTuple):
    """A Gaussian of latents whose covariance is a Kronecker product: eigenvalues and bases of both factors."""

    mean: Float[Tensor, "c s"]
    channels: Float[Tensor, " c"]
    basis: Float[Tensor, "c c"]
    positions: Float[Tensor, " s"]
    frame: Float[Tensor, "s s"]

    @property
    def per_number(self) -> float:
        """(pi / 2) sum sqrt(c_i s_j) / (c s): a product of two sums."""
        return float(math.pi / 2 * self.channels.sqrt().mean() * self.positions.sqrt().mean())

    @property
    def eigenvalues(self) -> Float[Tensor, "c s"]:
        return self.channels[:, None] * self.positions


@torch.no_grad()
def velocity_variance(sample: LatentSample, seed: int = 0) -> dict[str, Result]:
    """`viv`, the mean over classes of at least 4 images; `viv-mixture`, of the mixture of these classes; `viv-free`, of
    one Gaussian for all images, which needs no labels. All per number of a latent, lower is better.

    The interval of `viv` is of images drawn again within classes. Details have `within_class_variance` (rho, the share
    of the variance that lies within classes) and `shape` (phi <= 1): viv = (pi / 2) sqrt(rho) phi up to the spread of
    rho between classes. Fewer images per class make values smaller, so compare at equal images only.
    """
    if len(sample) < FEWEST:
        raise NotMeasurable(f"viv needs at least {FEWEST} images, not {len(sample)}.")
    z = sample.z  # (n, c, s)
    about = {"n": len(z), **sample.about(), "covariance": "Kronecker product of channels and positions"}
    found = {"viv-free": Result(fit(z).per_number, None, {**about, "law": "one Gaussian for all images"})}
    classes = [z[sample.labels == k] for k in sample.labels.unique().tolist() if k >= 0]
    classes = [rows for rows in classes if len(rows) >= FEWEST]
    if len(classes) < 2:
        return found
    laws = [fit(rows) for rows in classes]
    value = sum(law.per_number for law in laws) / len(laws)
    rho = sum(variance(rows) for rows in classes) / len(classes)
    counts = [len(rows) for rows in classes]
    about |= {"n": sum(counts), "classes": len(classes), "images_per_class": [min(counts), max(counts)]}
    if draws := affordable(len(laws), z.shape[1], z.shape[2]):
        mixed, error = mixture_variance(laws, torch.tensor(counts), draws, seed)
        drawn = {"law": "mixture of a Gaussian per class", "draws": draws, "standard_error": error, "seed": seed}
        found = {"viv-mixture": Result(mixed, None, {**about, **drawn}), **found}
    else:
        about["mixture"] = f"left out: {len(laws)} classes of such large latents would take minutes"
    about |= {"law": "a Gaussian per class", "within_class_variance": rho}
    about |= {"shape": value / (math.pi / 2 * math.sqrt(rho)) if rho else math.nan}
    return {"viv": Result(value, _interval(classes, value, seed, about), about), **found}


def variance(z: Float[Tensor, "m c s"]) -> float:
    """Population variance of a latent's numbers over images, mean over numbers."""
    return float(z.double().var(0, correction=0).mean())


def fit(z: Float[Tensor, "m c s"], iterations: int = ITERATIONS) -> Gaussian:
    """The Gaussian of some latents, by maximum likelihood of both factors in turns (flip-flop, Dutilleul 1999).

    Their scale is not identified; the sum of all products is set to the total variance. What lies below the floor is
    raised to it before an inverse is taken: few images span few directions.
    """
    x = z.double()
    mean = x.mean(0)  # (c, s)
    x = x - mean  # (m, c, s)
    count, channels, positions = x.shape
    total = float(x.square().sum() / count)
    if not total > 0:
        none = x.new_zeros(channels), x.new_zeros(positions)
        return Gaussian(mean, none[0], torch.eye(channels).to(x), none[1], torch.eye(positions).to(x))
    inverse = torch.eye(positions, dtype=x.dtype)  # of the positions' factor
    for _ in range(iterations):
        c, basis = _eigen(torch.einsum("mis,st,mjt->ij", x, inverse, x) / (count * positions))
        s, frame = _eigen(torch.einsum("mcs,cd,mdt->st", x, _inverse(c, basis), x) / (count * channels))
        inverse = _inverse(s, frame)
    return Gaussian(mean, c, basis, s * (total / float(c.sum() * s.sum())), frame)


def _eigen(matrix: Float[Tensor, "k k"]) -> tuple[Float[Tensor, " k"], Float[Tensor, "k k"]]:
    values, basis = torch.linalg.eigh((matrix + matrix.T) / 2)
    return values.clamp(min=0), basis


def _inverse(values: Float[Tensor, " k"], basis: Float[Tensor, "k k"]) -> Float[Tensor, "k k"]:
    return basis / values.clamp(min=FLOOR * float(values.mean())) @ basis.T


def affordable(classes: int, channels: int, positions: int) -> int:
    """How many draws of the mixture a few seconds allow: each is rotated into and out of every class's basis."""
    work = classes * channels * positions * (2 * (channels + positions) + OF_PASSES)
    draws = min(DRAWS, MIXTURE_WORK // work)
    return draws if draws >= FEWEST_DRAWS else 0


def mixture_variance(laws: list[Gaussian], counts: Int[Tensor, " k"], draws: int, seed: int) -> tuple[float, float]:
    """I per number of a mixture of Gaussians, weighed by `counts`, by Monte Carlo, and its standard error.

    E[eps - z | x_t] of class k is (t I - (1 - t) S_k) ((1 - t)² S_k + t² I)^-1 (x_t - (1 - t) mu_k) - mu_k, and classes
    are weighed by their posterior. Draws are stratified over t, and spread over classes independently of it. What is
    drawn is the difference to the error where the class is known, whose mean is known (control variate).
    """
    share, shape = (counts / counts.sum()).double(), laws[0].mean.shape
    inner = sum(float(part) * law.per_number for part, law in zip(share, laws))  # with the class
    found = []
    for number in torch.arange(draws).split(max(1, HELD // (len(laws) * shape.numel()))):
        rng = KeyedRandom(seed, number)
        t = ((number + rng.uniform("viv time").double()) / draws)[:, None, None]  # (n, 1, 1)
        place = (number.double() * (5**0.5 - 1) / 2 + 0.5) % 1  # of the golden ratio's sequence
        k = torch.searchsorted(share.cumsum(0), place).clamp(max=len(laws) - 1)  # (n,)
        drawn, eps = (rng.normal(f"viv {what}", *shape).double() for what in ("latent", "noise"))  # (n, c, s)
        z = torch.empty_like(drawn)
        for i in k.unique().tolist():
            law, rows = laws[i], k == i
            z[rows] = law.mean + law.basis @ (drawn[rows] * law.eigenvalues.sqrt()) @ law.frame.T
        best, scores = zip(*(_velocity(law, torch.lerp(z, eps, t), t) for law in laws))
        posterior = (torch.stack(scores) + share.log()[:, None]).softmax(0)  # (k, n)
        velocity = torch.stack(best)  # (k, n, c, s)
        blind = eps - z - torch.einsum("kn,kncs->ncs", posterior, velocity)
        knowing = eps - z - velocity[k, torch.arange(len(k))]  # (n, c, s)
        found.append((blind.square() - knowing.square()).mean((1, 2)))
    errors = torch.cat(found)  # (draws,)
    error = math.sqrt(float(errors.diff().square().mean()) / (2 * draws))  # of neighbours in t, as strata are
    return float(errors.mean()) + inner, error


def _velocity(law: Gaussian, x_t: Float[Tensor, "n c s"], t: Float[Tensor, "n 1 1"]) -> tuple[Tensor, Tensor]:
    """E[eps - z | x_t] of a class, `(n, c, s)`, and log N(x_t) up to a constant, `(n,)`."""
    variance = law.eigenvalues
    spread = (1 - t).square() * variance + t.square()  # (n, c, s)
    y = law.basis.T @ (x_t - (1 - t) * law.mean) @ law.frame  # (n, c, s)
    velocity = law.basis @ ((t - (1 - t) * variance) / spread * y) @ law.frame.T - law.mean
    return velocity, -0.5 * (y.square() / spread + spread.log()).sum((1, 2))


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
            resampled.append(fit(rows[chosen]).per_number)
        found.append(sum(resampled) / len(resampled))
    half = 1.96 * float(torch.tensor(found, dtype=torch.float64).std())
    return value - half, value + half
