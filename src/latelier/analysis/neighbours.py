"""Do the nearest neighbours of an image, by its latents, have its label?

Label neighbourhood consistency ("Diffusing in the Right Space", 2026, arXiv 2606.03578): an image's feature is the mean
of its normalised latents over the foreground of its label map, or over all positions, and neighbours are by cosine.
With one neighbour and features whose mean over the set is taken away it is the global semantic quality of PAE (2026,
arXiv 2605.07915).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from latelier.analysis.sample import FOREGROUND, LatentSample
from latelier.errors import NotMeasurable
from latelier.evaluation.results import Result, mean_with_interval
from latelier.keyed_random import KeyedRandom

NEIGHBOURS = 10
CHUNK = 1024  # images whose similarities to all are held at once


@torch.no_grad()
def label_neighbours(sample: LatentSample, seed: int = 0) -> dict[str, Result]:
    """`neighbours-10` and `neighbours-1`: shares of an image's nearest other images that have its label.

    Higher is better; details have `chance`, what random labels give. `neighbours-1` is of centred features. Images
    labelled -1 are left out; nothing without two classes.
    """
    sample = sample[sample.labels >= 0]
    if len(sample) < 3 or len(sample.labels.unique()) < 2:
        return {}
    features = _features(sample)  # (n, c)
    counts = torch.bincount(sample.labels).double()  # (k,)
    n, found = len(sample), {}
    chance = float((counts * (counts - 1)).sum() / (n * (n - 1)))
    for k, centred in ((NEIGHBOURS, False), (1, True)):
        if k >= n:
            raise NotMeasurable(f"neighbours looks at {k} other images, and there are {n - 1}.")
        shares = consistency(features - features.mean(0) if centred else features, sample.labels, k, seed)
        details = {"n": n, "chance": chance, "distance": "cosine", "centred": centred, "seed": seed, **sample.about()}
        details |= {"positions": "all" if sample.foreground is None else f"{FOREGROUND}; all where none does"}
        found[f"neighbours-{k}"] = Result(*mean_with_interval(shares), details)
    return found


def _features(sample: LatentSample) -> Float[Tensor, "n c"]:
    """Means over the foreground, over all positions of images without one."""
    if sample.foreground is None:
        return sample.z.mean(2)
    kept = sample.foreground.flatten(1)  # (n, l)
    kept = (kept | ~kept.any(1, keepdim=True)).to(sample.z)
    return (sample.z * kept[:, None]).sum(2) / kept.sum(1, keepdim=True)


def consistency(
    features: Float[Tensor, "n d"], labels: Int[Tensor, " n"], k: int, seed: int = 0
) -> Float[Tensor, " n"]:
    """For each image, the share of its `k` nearest others (cosine) with its label; ties are broken at random."""
    order = KeyedRandom(seed, torch.arange(len(features))).uniform("neighbours").argsort()  # (n,)
    unit, labels = F.normalize(features[order].double(), dim=1), labels[order]
    shares = torch.empty(len(unit), dtype=torch.float64)
    for rows in torch.arange(len(unit)).split(CHUNK):
        nearness = unit[rows] @ unit.T  # (b, n)
        nearness[torch.arange(len(rows)), rows] = -torch.inf
        nearest = nearness.argsort(dim=1, descending=True, stable=True)[:, :k]  # (b, k)
        shares[order[rows]] = (labels[nearest] == labels[rows][:, None]).double().mean(1)
    return shares
