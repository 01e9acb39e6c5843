"""How evenly latents fill the plane that t-SNE lays them out on (the protocol of VA-VAE, Yao et al. 2025, table 5).

At every point a Gaussian kernel density p_i is estimated. Of these densities: the coefficient of variation, Gini's
coefficient, and the entropy of p / sum p over that of equal ones. t-SNE is unstable, so this is a weak measure.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from latelier.analysis.sample import LatentSample
from latelier.errors import NotMeasurable
from latelier.evaluation.results import Result

PERPLEXITY, MOST_IMAGES, FEWEST, COMPONENTS = 30, 2000, 10, 50


@torch.no_grad()
def uniformity(sample: LatentSample, seed: int = 0) -> dict[str, Result]:
    """`uniformity-cv`, `uniformity-gini` (lower is more even) and `uniformity-entropy` (higher), of at most 2,000
    images; t-SNE starts from 50 principal components of whole latents.
    """
    import sklearn
    from scipy.stats import gaussian_kde
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    sample = sample.first(MOST_IMAGES)
    if len(sample) < FEWEST:
        raise NotMeasurable(f"uniformity needs at least {FEWEST} images, not {len(sample)}.")
    x = sample.flat()  # (n, d)
    x = PCA(min(COMPONENTS, *x.shape), random_state=seed % 2**32).fit_transform(x)
    perplexity = min(PERPLEXITY, (len(x) - 1) / 3)
    points = TSNE(2, perplexity=perplexity, init="pca", random_state=seed % 2**32).fit_transform(x).T  # (2, n)
    found = evenness(torch.from_numpy(gaussian_kde(points)(points)))
    about = {"n": len(sample), "seed": seed, "perplexity": perplexity, "scikit-learn": sklearn.__version__}
    about |= {"density": "Gaussian kernels, Scott's bandwidth", **sample.about()}
    return {f"uniformity-{name}": Result(value, None, about) for name, value in found.items()}


def evenness(density: Float[Tensor, " n"]) -> dict[str, float]:
    """`cv`, `gini` and `entropy` of densities; 0, 0 and 1 where all are equal."""
    p, n = density.double().sort().values, len(density)
    ranks = torch.arange(1, n + 1, dtype=p.dtype)
    q = p / p.sum()
    gini = float(((2 * ranks - n - 1) * p).sum() / (n * p.sum()))  # sum_ij |p_i - p_j| / (2 n² mean)
    entropy = float(-torch.special.xlogy(q, q).sum() / math.log(n))
    return {"cv": float(p.std(correction=0) / p.mean()), "gini": gini, "entropy": entropy}
