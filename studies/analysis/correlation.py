"""Does one order go with another? Spearman's rank correlation of a few runs, how sure it is, and whether it is chance.

Values of other data or longer training do not compare, so runs are ranked within their study only. Correlations of
several studies are averaged on Fisher's scale, artanh, each with the weight n - 3:

    z = sum_k (n_k - 3) artanh(rho_k) / sum_k (n_k - 3)        rho = tanh(z)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np
import torch
from jaxtyping import Float, Int

from latelier.keyed_random import KeyedRandom

FEWEST = 4  # runs of one study; fewer have no weight, since it is n - 3
EXACT = 8  # runs of one study up to which all of their orders are tried, 40,320
ORDERS = 19_999  # random ones where there are more
NORMAL = 1.959964  # of a 95 % interval
SLACK = 1e-9  # correlations that differ less are equal

Column = Float[np.ndarray, " n"]
Pair = tuple[Float[np.ndarray, " _"], Float[np.ndarray, " _"]]  # of one study: equally long


@dataclass
class Correlation:
    """One rank correlation.

    Attributes:
        value: Spearman's rho.
        interval: of 95 %, see `interval`.
        p: share of all orders whose correlation is as far from 0, see `chance`.
        n: runs.
    """

    value: float
    interval: tuple[float, float]
    p: float
    n: int


def correlate(strata: Sequence[Pair]) -> Correlation | None:
    """Correlate two columns over the runs of one study or of several.

    Args:
        strata: for each study the values of both columns, equally long.

    Returns:
        The correlation over all studies of at least four runs in which neither column is constant; None without any.
    """
    strata = [(x, y) for x, y in strata if len(x) >= FEWEST and np.ptp(x) > 0 and np.ptp(y) > 0]
    if not strata:
        return None
    numbers = [len(x) for x, _ in strata]
    value = pool([rho(x, y) for x, y in strata], numbers)
    return Correlation(value, interval(value, numbers), chance(strata), sum(numbers))


def rho(x: Column, y: Column) -> float:
    """Spearman's rank correlation; equal values share the mean of their ranks."""
    return float(_ranks(x) @ _ranks(y))


def partial(x: Column, y: Column, given: Column) -> float | None:
    """What is left of a rank correlation between runs that are alike in a third column.

    (r_xy - r_xz r_yz) / sqrt((1 - r_xz²) (1 - r_yz²)), of ranks (Kendall 1942 for Pearson's); None where the third
    column's order is that of one of the two.
    """
    xy, xz, yz = rho(x, y), rho(x, given), rho(y, given)
    rest = (1 - xz**2) * (1 - yz**2)
    return float(np.clip((xy - xz * yz) / math.sqrt(rest), -1, 1)) if rest > SLACK else None


@dataclass
class Reliability:
    """How far a quantity tells tokenizers apart.

    Attributes:
        noise: standard deviation between seeds.
        spread: standard deviation between tokenizers, noise included.
        pairs: repeated runs.
    """

    noise: float
    spread: float
    pairs: int

    @property
    def share(self) -> float:
        """1 - noise² / spread², at least 0: the share of the variance that is not noise. No measure can be expected to
        correlate more than its square root.
        """
        return max(0.0, 1 - (self.noise / self.spread) ** 2) if self.spread else 0.0


def reliability(values: Column, pairs: Sequence[tuple[float, float]]) -> Reliability:
    """Of the tokenizers' values, and of pairs of runs that differ in their seed: noise² = mean of (a - b)² / 2."""
    noise = math.sqrt(float(np.mean([(a - b) ** 2 / 2 for a, b in pairs])))
    return Reliability(noise, float(np.std(values, ddof=1)), len(pairs))


def pool(values: Sequence[float], numbers: Sequence[int]) -> float:
    """The mean of correlations on Fisher's scale, weighted by n - 3; of a single one itself."""
    if len(values) == 1:
        return float(np.clip(values[0], -1, 1))
    scaled = [_fisher(np.asarray(value), n) for value, n in zip(values, numbers)]
    return math.tanh(float(np.average(scaled, weights=[n - 3 for n in numbers])))


def interval(value: float, numbers: Sequence[int]) -> tuple[float, float]:
    """A 95 % confidence interval of Spearman's rho: tanh(artanh(rho) ± 1.96 sqrt((1 + rho² / 2) / sum_k (n_k - 3))).

    Bonett & Wright 2000, "Sample size requirements for estimating Pearson, Kendall and Spearman correlations". A
    bootstrap of a dozen runs repeats some of them, whose ties it takes for agreement, and falls short of 95 %.

    Args:
        value: rho.
        numbers: of runs, of each study.
    """
    z = float(_fisher(np.asarray(value), sum(numbers)))
    half = NORMAL * math.sqrt((1 + value**2 / 2) / sum(n - 3 for n in numbers))
    return min(value, math.tanh(z - half)), max(value, math.tanh(z + half))


def chance(strata: Sequence[Pair]) -> float:
    """How often chance alone gives a correlation as far from 0, on either side.

    The second column is put into other orders within each study: into all of them where there is one study of at most
    eight runs, else into 19,999 random ones, and then p = (1 + as far) / (1 + 19,999).
    """
    seen = [_fisher(np.asarray(rho(x, y)), len(x)) for x, y in strata]
    exact = len(strata) == 1 and len(strata[0][0]) <= EXACT
    drawn = [
        _fisher(_ranks(y)[orders(len(x), k, exact)] @ _ranks(x), len(x)) for k, (x, y) in enumerate(strata)
    ]  # each (p,)
    weights = [len(x) - 3 for x, _ in strata]
    far = abs(np.average(seen, weights=weights)) - SLACK
    as_far = np.abs(np.average(drawn, axis=0, weights=weights)) >= far  # (p,)
    return float(as_far.mean() if exact else (1 + as_far.sum()) / (1 + len(as_far)))


def needed(n: int, p: float) -> float | None:
    """The smallest correlation of n runs, all different, that chance gives with probability p or less; None if none."""
    exact = n <= EXACT
    ranks = _ranks(np.arange(n, dtype=float))
    drawn = np.sort(np.abs(ranks[orders(n, 0, exact)] @ ranks))[::-1]  # (p,)
    levels, first = np.unique(-drawn.round(9), return_index=True)  # the largest first
    as_far = np.append(first[1:], len(drawn))  # orders at this level or above
    chances = as_far / len(drawn) if exact else (1 + as_far) / (1 + len(drawn))
    enough = -levels[chances <= p]
    return float(enough.min()) if len(enough) else None


def holm(chances: Sequence[float]) -> list[float]:
    """Holm's correction (1979) of p-values: at 0.05, the chance of even one false finding is at most 5 %.

    It holds however the tests hang together, and measures of one latent space do.
    """
    adjusted, worst = [0.0] * len(chances), 0.0
    for place, i in enumerate(np.argsort(chances, kind="stable")):
        worst = max(worst, min(1.0, (len(chances) - place) * chances[i]))
        adjusted[i] = worst
    return adjusted


@lru_cache(maxsize=32)
def orders(n: int, study: int, exact: bool) -> Int[np.ndarray, "p n"]:
    """Orders of n runs: all, or 19,999 random ones that belong to the study's number."""
    if exact:
        return np.array(list(permutations(range(n))))
    drawn = KeyedRandom(0, torch.tensor([study])).uniform("orders of runs", ORDERS, n)[0]  # (p, n)
    return drawn.argsort(1).numpy()


def _ranks(x: Column) -> Column:
    """Ranks with mean 0 and length 1, so that their product is a correlation."""
    from scipy.stats import rankdata

    ranks = rankdata(x)  # (n,)
    ranks = ranks - ranks.mean()
    return ranks / np.linalg.norm(ranks)


def _fisher(values: Float[np.ndarray, "*p"], n: int) -> Float[np.ndarray, "*p"]:
    """artanh. A perfect order, which would be infinitely far, counts as half a step below 1.

    Swapping two neighbours takes 12 / (n³ - n) away from rho.
    """
    most = 1 - 6 / (n**3 - n)
    return np.asarray(np.arctanh(np.clip(values, -most, most)))
