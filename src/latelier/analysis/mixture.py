"""How many Gaussians a latent space takes: mixtures fitted to the latents of whole images.

"Masked Autoencoders Are Effective Tokenizers for Diffusion Models" (ICML 2025, section 3) argues that a space whose
mixture has fewer modes is easier to learn for a diffusion model. There likelihoods are of the very images that the
mixture was fitted to, where more modes always win; here they are of others, and the fitted one is in the receipt.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from latelier.analysis.clustering import RESAMPLES
from latelier.analysis.sample import MOST_DIMS, LatentSample, random_share
from latelier.errors import NotMeasurable
from latelier.evaluation.results import Result, mean_with_interval
from latelier.keyed_random import KeyedRandom

EXPLAINED = 0.9  # the paper's: components are kept until they explain more of the variance than this
IMAGES_PER_DIM = 10  # fewer, and the components are those of the fitted images only
IMAGES_PER_MODE = 10  # fewer, and a mode's variances mean nothing
ITERATIONS = 500  # the paper's, of EM
REGULARISER = 1e-3  # added to each variance, where the whole has 1: no mode shrinks onto a single image
HELD_OUT = 0.25  # of the images, where no others are given to fit to
SLACK = 0.05  # of the likelihood gained by the best number of modes


@dataclass
class PrincipalSpace:
    """The leading principal components of some images, each with mean 0 and variance 1 over others."""

    mean: np.ndarray  # (d,)
    axes: np.ndarray  # (p, d), each divided by the standard deviation along it
    explained: float  # share of the others' variance that lies in these p components

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Project `(n, d)` to `(n, p)`, float64."""
        return ((x - self.mean) @ self.axes.T).astype(np.float64)


@dataclass
class Fit:
    """One mixture: its number of modes, and the negative log-likelihood of each image in nats per dimension."""

    modes: int
    held_out: Float[Tensor, " n"]
    fitted: float
    iterations: int
    converged: bool


@torch.no_grad()
def gaussian_mixtures(
    train: LatentSample | None, sample: LatentSample, modes: Sequence[int], seed: int = 0
) -> dict[str, Result]:
    """Fit mixtures of more and more Gaussians, and see how likely they find images they have not seen.

    Latents are flattened, reduced to the principal components that explain more than 90 % of the variance (at most
    512, and a tenth of the images that give them), and standardised. Half of the images to learn from give the
    components, half the variances and the mixture: along components a space has too much variance in the images that
    chose them. Covariances are diagonal: thousands of images cannot tell the p^2 / 2 numbers of a full one.

    Args:
        train: what mixtures are fitted to; None holds a quarter of `sample` out and takes the rest.
        modes: numbers of Gaussians; those are left out that would have fewer than ten images each.

    Returns:
        `gmm-nll@<k>` for each number of modes, nats per principal component, with an interval over held-out images.
        Standardised, every space has about 1.419 = ln(2 pi e) / 2 at one mode; how far more modes go below shows how
        far it is from a Gaussian. And `gmm-modes`, how many of them are needed, see `modes_needed`.
    """
    train, sample, how = _two_sides(train, sample, seed)
    for_axes = random_share(len(train), 0.5, seed, "gmm-axes")  # (n,)
    whole = train.flat()  # (n, d)
    fitted = whole[~for_axes.numpy()]  # (n / 2, d)
    chosen, skipped = affordable_modes(modes, len(fitted))
    space = principal_space(whole[for_axes.numpy()], fitted, seed)
    ours, theirs = space(fitted), space(sample.flat())  # (n / 2, p), (m, p)
    fits = [fit_mixture(ours, theirs, k, seed) for k in chosen]
    about = {"n": len(sample), "n_fitted": len(fitted), "n_axes": int(for_axes.sum()), "fitted_to": how}
    about |= {**train.about(), **_protocol(space), "seed": seed}
    if skipped:
        about["skipped"] = f"{skipped} modes: fewer than {IMAGES_PER_MODE} of {len(fitted)} images each"
    found = {f"gmm-nll@{fit.modes}": _likelihood(fit, space, about) for fit in fits if fit.modes in modes}
    return {**found, "gmm-modes": _needed(fits, about)}


def affordable_modes(modes: Sequence[int], n: int) -> tuple[list[int], list[int]]:
    """Numbers of modes that n images carry, ascending, always with 1, and those that they do not; an error if all."""
    carried = [k for k in modes if k * IMAGES_PER_MODE <= n]
    if not carried:
        raise NotMeasurable(
            f"A mixture needs {IMAGES_PER_MODE} images for each mode, but evaluate.modes {modes} met only {n} "
            "images to fit to; give it more images, or fewer modes."
        )
    return sorted({1, *carried}), sorted({*modes} - {*carried})


def principal_space(x: np.ndarray, others: np.ndarray, seed: int, explained: float = EXPLAINED) -> PrincipalSpace:
    """The fewest components of `x` `(n, d)` that explain more than a share of the variance of `others` `(m, d)`, over
    which they are standardised, or as many as the limits allow.
    """
    from sklearn.decomposition import PCA

    total = others.var(0, dtype=np.float64).sum()
    if not (total > 0 and x.var(0, dtype=np.float64).sum() > 0):
        raise NotMeasurable(f"The latents of {len(x)} images are equal, or not finite; there are no modes to find.")
    most = max(1, min(MOST_DIMS, len(x) // IMAGES_PER_DIM, x.shape[1]))
    axes = PCA(most, random_state=seed % 2**32).fit(x).components_  # (most, d)
    variance = ((others - others.mean(0)) @ axes.T).var(0, dtype=np.float64)  # (most,)
    axes, variance = axes[variance > 0], variance[variance > 0]
    shares = variance.cumsum() / total  # (most,)
    dims = min(len(shares), int((shares <= explained).sum()) + 1)
    return PrincipalSpace(others.mean(0), axes[:dims] / np.sqrt(variance[:dims, None]), float(shares[dims - 1]))


def fit_mixture(x: np.ndarray, held_out: np.ndarray, modes: int, seed: int) -> Fit:
    """Expectation maximisation from a k-means start on standardised `x` `(n, p)`, evaluated on `held_out` `(m, p)`."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    how: dict[str, Any] = {"max_iter": ITERATIONS, "reg_covar": REGULARISER, "random_state": seed % 2**32}
    mixture = GaussianMixture(modes, covariance_type="diag", **how)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # it is in the receipt
        mixture.fit(x)
    scores = torch.from_numpy(-mixture.score_samples(held_out) / x.shape[1])  # (m,)
    return Fit(modes, scores, -mixture.score(x) / x.shape[1], int(mixture.n_iter_), bool(mixture.converged_))


def modes_needed(nll: Float[Tensor, "n k"]) -> int:
    """Column of the smallest mixture that is as good as the best one; the first is the single Gaussian.

    As good: of what the best gains over the first it has at least 95 %; or what it lacks is no more than a standard
    error of their difference over the images (one-standard-error rule, Breiman et al. 1984).
    """
    nll = nll.double()
    mean = nll.mean(0)  # (k,)
    best = int(mean.argmin())
    error = (nll - nll[:, best : best + 1]).std(0) / math.sqrt(len(nll))  # (k,)
    lack, gain = mean - mean[best], mean[0] - mean[best]
    return int((lack <= torch.maximum(error, SLACK * gain)).nonzero()[0])


def _two_sides(train: LatentSample | None, sample: LatentSample, seed: int) -> tuple[LatentSample, LatentSample, str]:
    """Latents to fit to, latents to evaluate on, on the same scale, and where the first are from."""
    if train is not None:
        train, how = train.first(), "training images"
        sample = sample.on_scale_of(train).first()
    else:
        sample = sample.first()
        away = random_share(len(sample), HELD_OUT, seed, "gmm-held-out")  # (n,)
        train, sample, how = sample[~away], sample[away], f"{1 - HELD_OUT:.0%} of the same images, by chance"
    if min(len(train), len(sample)) < 2:
        raise NotMeasurable(
            f"Mixtures are fitted to images and evaluated on others, but there are {len(train)} and {len(sample)}; "
            "give at least 2 on each side."
        )
    return train, sample, how


def _protocol(space: PrincipalSpace) -> dict[str, Any]:
    """What was done, for the receipt."""
    import sklearn

    dims = len(space.axes)
    about = {"protocol": f"flattened, PCA to {dims} components, standardised, EM of diagonal Gaussians", "dims": dims}
    about |= {"explained_variance": space.explained, "iterations_limit": ITERATIONS}
    about |= {"variance_floor": REGULARISER, "scikit-learn": sklearn.__version__}
    if space.explained <= EXPLAINED:
        about["warning"] = f"{dims} components explain only {space.explained:.0%} of the variance, not {EXPLAINED:.0%}"
    return about


def _likelihood(fit: Fit, space: PrincipalSpace, about: dict[str, Any]) -> Result:
    mean, interval = mean_with_interval(fit.held_out)
    details = {**about, "modes": fit.modes, "fitted": fit.fitted, "per_image": mean * len(space.axes)}
    details["fitted_per_image"] = fit.fitted * len(space.axes)
    return Result(mean, interval, {**details, "iterations": fit.iterations, "converged": fit.converged})


def _needed(fits: list[Fit], about: dict[str, Any]) -> Result:
    """How many modes are enough, with an interval from resampled held-out images."""
    nll = torch.stack([fit.held_out for fit in fits], 1)  # (n, k)
    picks = KeyedRandom(about["seed"], torch.arange(RESAMPLES)).uniform("gmm-bootstrap", len(nll))  # (r, n)
    picks = (picks * len(nll)).long().clamp(max=len(nll) - 1)  # rounding may reach the end
    found = sorted(fits[modes_needed(nll[rows])].modes for rows in picks)
    interval = float(found[int(0.025 * RESAMPLES)]), float(found[math.ceil(0.975 * RESAMPLES) - 1])
    details = {
        **about,
        "curve": [[fit.modes, fit.held_out.mean().item(), fit.fitted] for fit in fits],
        "curve_of": "modes, held-out and fitted negative log-likelihood in nats per dimension",
        "rule": f"fewest modes with {1 - SLACK:.0%} of the best's gain over one, or within a standard error of it",
        "resamples": RESAMPLES,
    }
    return Result(float(fits[modes_needed(nll)].modes), interval, details)
