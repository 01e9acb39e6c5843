"""Sets of images compared as distributions of feature vectors: Fréchet distance, KID, CMMD, Inception Score, recall.

Fréchet distances and Inception Scores keep sums, in ten groups of images drawn by chance: how much a number changes
when each group in turn is left out tells how sure it is (delete-a-group jackknife, Efron & Stein 1981).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import scipy.linalg
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from latelier.errors import LatelierError
from latelier.keyed_random import KeyedRandom, fold_in

GROUPS = 10  # also the Inception Score's splits
BLOCK = 1024  # vectors that are summed up at once: ten small products cost more than a large one
SUBSET = 1000  # KID's, at most
SIGMA = 10.0  # CMMD's, of the Gaussian kernel between vectors of unit length
Interval = tuple[float, float] | None
Kernel = Callable[[Tensor, Tensor], Tensor]


class FeatureStatistics:
    """Mean and covariance of feature vectors that come in batches, in float64 (on the CPU if the device has none)."""

    def __init__(self, dims: int, device: torch.device | str = "cpu"):
        self.n = 0
        self.total = exact(torch.zeros(dims, device=device))  # (d,)
        self.outer = exact(torch.zeros(dims, dims, device=device))  # (d, d)

    def update(self, features: Float[Tensor, "b d"]) -> None:
        x = exact(features.detach().to(self.total.device))  # (b, d)
        self.n += len(x)
        self.total += x.sum(0)
        self.outer.addmm_(x.T, x)

    def without(self, part: FeatureStatistics) -> FeatureStatistics:
        rest = FeatureStatistics(0, self.total.device)
        rest.n, rest.total, rest.outer = self.n - part.n, self.total - part.total, self.outer - part.outer
        return rest

    @property
    def mean(self) -> Float[Tensor, " d"]:
        return self.total / self.n

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """The covariance, normalised by n - 1; an error for fewer than two vectors."""
        if self.n < 2:
            raise LatelierError(f"A Fréchet distance needs at least 2 images on each side, not {self.n}.")
        return (self.outer - torch.outer(self.total, self.total) / self.n) / (self.n - 1)

    def distance(self, other: FeatureStatistics) -> float:
        """Fréchet distance to another set."""
        mean, covariance = other.mean.to(self.total.device), other.covariance.to(self.total.device)
        return frechet_distance(self.mean, self.covariance, mean, covariance)


class GroupedStatistics:
    """The same in groups: the number of an image in its set says by chance which one it belongs to."""

    def __init__(self, dims: int, device: torch.device | str = "cpu"):
        self.groups = [FeatureStatistics(dims, device) for _ in range(GROUPS)]
        self._waiting: list[Tensor] = []
        self._counted = 0

    def update(self, features: Float[Tensor, "b d"]) -> None:
        self._waiting.append(features.detach())
        if sum(map(len, self._waiting)) >= BLOCK:
            self.flush()

    def flush(self) -> None:
        if not self._waiting:
            return
        x, self._waiting = torch.cat(self._waiting), []  # (b, d)
        group = group_of(torch.arange(self._counted, self._counted + len(x))).to(x.device)  # (b,)
        for i, statistics in enumerate(self.groups):
            statistics.update(x[group == i])
        self._counted += len(x)

    def whole(self, first: int = 0, last: int = GROUPS) -> FeatureStatistics:
        """The statistics of all groups, or of some."""
        self.flush()
        whole = FeatureStatistics(len(self.groups[0].total), self.groups[0].total.device)
        for group in self.groups[first:last]:
            whole.n, whole.total, whole.outer = whole.n + group.n, whole.total + group.total, whole.outer + group.outer
        return whole

    def scale(self) -> dict[str, float]:
        """What a Fréchet distance to this set compares with: `alike`, about that of as many other images of its kind,
        by its two halves (chance adds something like 1 / n); and `spread`, the least of copies of a single image.
        """
        one, other = self.whole(0, GROUPS // 2), self.whole(GROUPS // 2)
        return {"alike": one.distance(other) / 2, "spread": self.whole().covariance.trace().item()}

    def distance(self, other: GroupedStatistics) -> tuple[float, Interval]:
        """Fréchet distance to another set and its 95 % interval, None where groups have fewer than 2 images; groups of
        one number are left out on both sides together, as a reconstruction and its original belong together.
        """
        ours, theirs = self.whole(), other.whole()
        value = ours.distance(theirs)
        if min(ours.n, theirs.n) < 2 * GROUPS:
            return value, None
        pairs = zip(self.groups, other.groups)
        return value, jackknife(value, [ours.without(a).distance(theirs.without(b)) for a, b in pairs])


def frechet_distance(
    mean1: Float[Tensor, " d"], cov1: Float[Tensor, "d d"], mean2: Float[Tensor, " d"], cov2: Float[Tensor, "d d"]
) -> float:
    """Fréchet distance of two Gaussians (Dowson & Landau 1982), float64:

        |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1^1/2 C2 C1^1/2)^1/2)

    Symmetric eigenvalue problems instead of a general matrix root, so singular covariances need no special care.
    """
    cov1, cov2 = cov1.double(), cov2.double()
    values, vectors = _eigh(cov1)
    root = vectors * values.clamp(min=0).sqrt()  # (d, d); root @ root.T = C1
    cross = torch.linalg.eigvalsh(root.T @ cov2 @ root).clamp(min=0).sqrt().sum()
    shift = (mean1.double() - mean2.double()).square().sum()
    return max(0.0, (shift + cov1.trace() + cov2.trace() - 2 * cross).item())


def _eigh(matrix: Float[Tensor, "d d"]) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
    """Eigenvalues and eigenvectors; by QR iteration where divide and conquer gives up (nearly equal images)."""
    try:
        return torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        values, vectors = scipy.linalg.eigh(matrix.cpu().numpy(), driver="ev")
        return torch.from_numpy(values).to(matrix), torch.from_numpy(vectors).to(matrix)


def group_of(numbers: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
    """The groups of images, by their ascending positions in their set: of every ten in a row, each goes to another one,
    in an order drawn by chance, because classes often come in turn.
    """
    if not len(numbers):
        return numbers
    drawn = torch.arange(int(numbers[0]) // GROUPS, int(numbers[-1]) // GROUPS + 1)
    order = KeyedRandom(0, drawn).uniform("group", GROUPS).argsort(1).flatten()  # (blocks * groups,)
    return order[numbers - drawn[0] * GROUPS]


def polynomial_kernel(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """KID's: (x.y / d + 1)^3 (Bińkowski et al. 2018, equation 4)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian_kernel(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """CMMD's: exp(-|x - y|^2 / 2 sigma^2) of vectors scaled to unit length, sigma = 10 (Jayasumana et al. 2024)."""
    cosine = F.normalize(x, dim=1) @ F.normalize(y, dim=1).T  # (n, m); |x - y|^2 = 2 - 2 cos
    return ((cosine - 1) / SIGMA**2).exp()


DISCREPANCIES: dict[str, tuple[Kernel, float, str]] = {  # kernel, scale, and both in words
    "kid": (polynomial_kernel, 1.0, "(x.y / d + 1)^3"),
    "cmmd": (gaussian_kernel, 1000.0, f"Gaussian, sigma {SIGMA:g}, unit length, x 1000"),
}


def mmd(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], kernel: Kernel) -> float:
    """Squared maximum mean discrepancy, unbiased (Gretton et al. 2012, equation 3), so that it may be negative."""
    x, y = exact(x), exact(y)

    def within(a: Tensor) -> Tensor:
        similar = kernel(a, a)  # (n, n)
        return (similar.sum() - similar.diagonal().sum()) / (len(a) * (len(a) - 1))

    return (within(x) + within(y) - 2 * kernel(x, y).mean()).item()


def subset_mmd(
    ours: Float[Tensor, "n d"], theirs: Float[Tensor, "m d"], kernel: Kernel, seed: int
) -> tuple[float, Interval, dict[str, Any]]:
    """Mean of `mmd` over subsets, its 95 % interval (None for one subset), and what a receipt says of the subsets.

    They are disjoint, of at most 1,000 vectors on each side of a set shuffled by `seed`: the mean is unbiased, and
    subsets are independent, which gives an honest error.
    """

    def shuffled(x: Tensor, purpose: str) -> Tensor:
        generator = torch.Generator().manual_seed(fold_in(seed, purpose, 0))
        return x[torch.randperm(len(x), generator=generator).to(x.device)]

    least, most = sorted((len(ours), len(theirs)))
    if least < 2:
        raise LatelierError(f"KID and CMMD need at least 2 images on each side, not {len(ours)} and {len(theirs)}.")
    count = min(max(GROUPS, math.ceil(most / SUBSET)), least // 2)
    whole = shuffled(ours, "subsets of samples"), shuffled(theirs, "subsets of references")
    sides = [[part[:SUBSET] for part in x.tensor_split(count)] for x in whole]
    values = torch.tensor([mmd(x, y, kernel) for x, y in zip(*sides)], dtype=torch.float64)  # (count,)
    about = {"subsets": count, "subset_sizes": [len(side[0]) for side in sides], "estimator": "unbiased", "seed": seed}
    mean = values.mean().item()
    if count == 1:
        return mean, None, about
    error = values.std().item() / math.sqrt(count)
    return mean, student_interval(mean, error, count - 1), {**about, "standard_error": error}


class InceptionScore:
    """exp E KL(p(y|x) || p(y)) in ten splits (Salimans et al. 2016, section 4), from sums of class probabilities."""

    def __init__(self) -> None:
        self.n = 0
        self._total: Tensor | None = None  # (splits, classes)
        self._certainty, self._counts = torch.zeros(2, GROUPS, dtype=torch.float64)  # sums of sum p log p, and images

    def update(self, logits: Float[Tensor, "b classes"]) -> None:
        p = logits.detach().cpu().double().softmax(1)  # (b, classes)
        split = group_of(torch.arange(self.n, self.n + len(p)))  # (b,)
        if self._total is None:
            self._total = p.new_zeros(GROUPS, p.shape[1])
        self._total.index_add_(0, split, p)
        self._certainty.index_add_(0, split, -torch.special.entr(p).sum(1))
        self._counts += split.bincount(minlength=GROUPS)
        self.n += len(p)

    def measure(self) -> tuple[float, Interval]:
        """The mean over splits, and its 95 % interval; an error if a split has fewer than two images."""
        if self._total is None or self.n < 2 * GROUPS:
            raise LatelierError(f"The Inception Score needs at least {2 * GROUPS} images, not {self.n}.")
        marginal = self._total / self._counts[:, None]  # (splits, classes)
        scores = (self._certainty / self._counts + torch.special.entr(marginal).sum(1)).exp()  # (splits,)
        mean, error = scores.mean().item(), scores.std().item() / math.sqrt(GROUPS)
        return mean, student_interval(mean, error, GROUPS - 1)


def precision_recall(
    samples: Float[Tensor, "n d"], references: Float[Tensor, "m d"], k: int = 3, chunk: int = 1024
) -> tuple[Float[Tensor, " n"], Float[Tensor, " m"]]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, equations 1-2), one indicator for each vector.

    A manifold is the union of balls that reach each vector's k-th nearest neighbour: 1 for each sample that lies in
    the references' manifold, and the reverse. `chunk` rows of the matrix of distances are held at once.
    """
    if min(len(samples), len(references)) <= k:
        raise LatelierError(
            f"Precision and recall need more than {k} images on each side, not {len(samples)} and {len(references)}."
        )
    return _inside(samples, references, k, chunk), _inside(references, samples, k, chunk)


def _inside(points: Tensor, manifold: Tensor, k: int, chunk: int) -> Tensor:
    """1 for each point that lies in a ball of the manifold."""

    def distances(
        rows: Tensor,
    ) -> Tensor:  # the matrix-product form, which is faster, is not zero between equal vectors
        return torch.cdist(exact(rows), exact(manifold), compute_mode="donot_use_mm_for_euclid_dist")  # (n, m)

    radius = torch.cat([distances(rows).kthvalue(k + 1).values for rows in manifold.split(chunk)])  # (m,)
    return torch.cat([(distances(rows) <= radius).any(1) for rows in points.split(chunk)]).float()


def jackknife(value: float, left_out: list[float]) -> tuple[float, float]:
    """95 % interval around a number that cannot be negative, from its values without one group each."""
    x = torch.tensor(left_out, dtype=torch.float64)  # (groups,)
    error = math.sqrt((len(x) - 1) / len(x) * (x - x.mean()).square().sum().item())
    low, high = student_interval(value, error, len(x) - 1)
    return max(0.0, low), high


def student_interval(value: float, error: float, freedom: int) -> tuple[float, float]:
    """The value and Student's 97.5 % quantile of errors on both sides."""
    from scipy.stats import t

    half = float(t.ppf(0.975, freedom)) * error
    return value - half, value + half


def exact(x: Tensor) -> Tensor:
    """A tensor in float64, on the CPU if its device has none."""
    return x.to("cpu" if x.device.type == "mps" else x.device, torch.float64)
