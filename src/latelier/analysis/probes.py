"""What latents say about classes: a linear probe and nearest neighbours.

MAETok (ICML 2025, figure 5a): tokenizers with more accurate linear probes carry better diffusion models.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from latelier.analysis.sample import MOST_DIMS, LatentSample, random_share
from latelier.evaluation.results import Result

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # scikit-learn's C: 1 / C weighs |w|^2 / 2 against a sum over images
VALIDATION = 0.2  # of the training images choose among them
ITERATIONS = 200  # of L-BFGS
NEIGHBOURS = 20  # with the temperature, as DINO measures (Caron et al. 2021, section 4.1 and appendix)
TEMPERATURE = 0.07


@torch.no_grad()
def class_probes(train: LatentSample, sample: LatentSample, seed: int = 0) -> dict[str, Result]:
    """How often the class of an image is predicted from its latents; images labelled -1 are left out.

    `probe-accuracy` (logistic regression on all numbers), `probe-pooled-accuracy` (the same on the mean over positions)
    and `knn-accuracy` (20 neighbours by cosine), shares with 95 % Wilson intervals. A class never seen in training
    counts as missed. Nothing without two classes, or without labels to evaluate by.
    """
    train = train[train.labels >= 0].on_own_scale().first()
    if len(train.labels.unique()) < 2:
        return {}
    sample = sample[sample.labels >= 0].on_scale_of(train).first()
    if not len(sample):
        return {}
    about = {"n": len(sample), "n_learnt": len(train), **train.about(), **_baselines(train.labels, sample.labels)}
    about["seed"] = seed
    flat, pooled = (train.flat(), sample.flat()), (train.z.mean(2).numpy(), sample.z.mean(2).numpy())
    found = {
        "probe-accuracy": linear_probe(*flat, train.labels, seed),
        "probe-pooled-accuracy": linear_probe(*pooled, train.labels, seed),
        "knn-accuracy": nearest_neighbours(*flat, train.labels),
    }
    return {name: _accuracy(guesses == sample.labels, {**about, **how}) for name, (guesses, how) in found.items()}


def linear_probe(
    x: np.ndarray, held_out: np.ndarray, labels: Int[Tensor, " n"], seed: int
) -> tuple[Int[Tensor, " m"], dict[str, Any]]:
    """Labels of `held_out` `(m, d)`, and fields for the receipt, by multinomial logistic regression on standardised
    features, or 512 principal components of more, the penalty chosen on a fifth of the images.
    """
    import sklearn

    x, held_out, about = _standardise(x, held_out, seed)
    targets = labels.numpy()  # (n,)
    away = random_share(len(x), VALIDATION, seed, "probe-validation").numpy()  # (n,)
    scores = {}
    if len(np.unique(targets[~away])) > 1:
        for c in STRENGTHS:
            scores[c] = float((_fit(x[~away], targets[~away], c)[0].predict(x[away]) == targets[away]).mean())
    strength = max(scores, key=lambda c: scores[c]) if scores else STRENGTHS[len(STRENGTHS) // 2]
    probe, converged = _fit(x, targets, strength)
    about |= {"probe": "logistic regression, L2, L-BFGS", "C": strength, "converged": converged}
    about |= {"validation": [[*pair] for pair in scores.items()], "scikit-learn": sklearn.__version__}
    return torch.from_numpy(probe.predict(held_out)), about


def nearest_neighbours(
    x: np.ndarray, held_out: np.ndarray, labels: Int[Tensor, " n"], k: int = NEIGHBOURS
) -> tuple[Int[Tensor, " m"], dict[str, Any]]:
    """The k nearest by cosine vote (all where there are fewer), each with weight exp(cosine / 0.07)."""
    import sklearn
    from sklearn.neighbors import KNeighborsClassifier

    k = min(k, len(x))
    how = {"weights": lambda distances: np.exp(-distances / TEMPERATURE)}  # a distance is 1 - cosine
    voters = KNeighborsClassifier(k, **how, algorithm="brute", metric="cosine")
    with _few_per_class():
        voters.fit(x, labels.numpy())
    about = {"probe": f"{k} nearest neighbours by cosine, weight exp(cosine / {TEMPERATURE:g})"}
    about |= {"features": x.shape[1], "scikit-learn": sklearn.__version__}
    return torch.from_numpy(voters.predict(held_out)), about


def _standardise(x: np.ndarray, held_out: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Features of mean 0 and variance 1 over the training images, at most 512 components of them."""
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(x)
    x, held_out = scaler.transform(x), scaler.transform(held_out)
    features = x.shape[1]
    about: dict[str, Any] = {"features": features, "preprocessing": "standardised"}
    if features <= MOST_DIMS:
        return x, held_out, about
    pca = PCA(min(MOST_DIMS, len(x) - 1), random_state=seed % 2**32).fit(x)
    about["preprocessing"] = f"standardised, PCA to {pca.n_components_} components"
    about["explained_variance"] = float(pca.explained_variance_ratio_.sum())
    return pca.transform(x), pca.transform(held_out), about


def _fit(x: np.ndarray, targets: np.ndarray, strength: float) -> tuple[Any, bool]:
    """A probe, and whether it converged."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    probe = LogisticRegression(C=strength, max_iter=ITERATIONS)
    with _few_per_class():
        warnings.simplefilter("ignore", ConvergenceWarning)  # it is in the receipt
        probe.fit(x, targets)
    return probe, bool(probe.n_iter_.max() < ITERATIONS)


@contextmanager
def _few_per_class() -> Iterator[None]:
    """Scikit-learn takes labels of which most are different for numbers to regress, and warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
        yield


def _baselines(learnt: Int[Tensor, " n"], held_out: Int[Tensor, " m"]) -> dict[str, Any]:
    """How accurate one is without looking."""
    classes, counts = learnt.unique(return_counts=True)  # (k,)
    unseen = int((~torch.isin(held_out, classes)).sum())
    share = (held_out == classes[counts.argmax()]).float().mean().item()
    about: dict[str, Any] = {"classes": len(classes), "chance": 1 / len(classes), "majority": share}
    if unseen:
        about["unseen"] = f"{unseen} images are of classes without training images, and count as missed"
    return about


def _accuracy(right: Bool[Tensor, " n"], details: dict[str, Any]) -> Result:
    """A share with its Wilson interval."""
    from scipy.stats import binomtest

    hits = int(right.sum())
    interval = binomtest(hits, len(right)).proportion_ci(0.95, method="wilson")
    return Result(hits / len(right), (float(interval.low), float(interval.high)), details)
