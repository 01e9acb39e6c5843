"""Distances between sets of features: closed forms, other people's code, and how often intervals hold the truth."""

import math

import pytest
import torch

from latelier.evaluation.distributions import (
    GROUPS,
    FeatureStatistics,
    GroupedStatistics,
    InceptionScore,
    frechet_distance,
    gaussian_kernel,
    group_of,
    jackknife,
    mmd,
    polynomial_kernel,
    precision_recall,
    subset_mmd,
)
from tiny import refused


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=generator(seed))


def covariance(d, seed):
    a = torch.randn(d, d, generator=generator(seed), dtype=torch.float64)
    return a @ a.T / d


def grouped(x, batch=17):
    sums = GroupedStatistics(x.shape[1])
    for part in x.split(batch):
        sums.update(part)
    return sums


class TestFrechet:
    def test_commuting_covariances(self):
        """|m|^2 + sum (s1 - s2)^2 for covariances with the same axes."""
        s1, s2 = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 0.5, 3.0])
        axes = torch.linalg.qr(torch.randn(3, 3, generator=generator(), dtype=torch.float64))[0]
        cov1, cov2 = (axes @ torch.diag(s.double().square()) @ axes.T for s in (s1, s2))
        m1, m2 = torch.zeros(3), torch.tensor([1.0, -2.0, 0.5])
        expected = (m1 - m2).square().sum() + (s1 - s2).square().sum()
        assert frechet_distance(m1, cov1, m2, cov2) == pytest.approx(expected.item(), rel=1e-9)
        assert frechet_distance(m2, cov2, m2, cov2) == pytest.approx(0, abs=1e-9)

    def test_agrees_with_the_matrix_root(self):
        from scipy.linalg import sqrtm

        cov1, cov2 = covariance(6, 1), covariance(6, 2)
        root = torch.from_numpy(sqrtm((cov1 @ cov2).numpy()).real)
        expected = (cov1.trace() + cov2.trace() - 2 * root.trace()).item()
        zero = torch.zeros(6)
        assert frechet_distance(zero, cov1, zero, cov2) == pytest.approx(expected, rel=1e-6)
        assert frechet_distance(zero, cov2, zero, cov1) == pytest.approx(expected, rel=1e-6)

    def test_singular_covariances(self):
        zero, flat = torch.zeros(4), torch.diag(torch.tensor([1.0, 0, 0, 0]))
        assert frechet_distance(zero, flat, zero, torch.zeros(4, 4)) == pytest.approx(1.0)


class TestStatistics:
    def test_batches_do_not_matter_and_one_image_has_no_covariance(self):
        x, plain, statistics = torch.randn(50, 5, generator=generator()) + 3, FeatureStatistics(5), FeatureStatistics(2)
        for batch in x.split(7):
            plain.update(batch)
        assert plain.n == 50
        assert torch.allclose(plain.mean, x.double().mean(0))
        assert torch.allclose(plain.covariance, torch.cov(x.double().T))
        statistics.update(torch.zeros(1, 2))
        refused("at least 2 images on each side, not 1", statistics.distance, statistics)


class TestPrecisionRecall:
    @pytest.mark.parametrize(("shift", "share"), [(0, 1), (100, 0)])
    def test_same_set_has_both_and_far_ones_neither(self, shift, share):
        x = torch.randn(40, 4, generator=generator())
        precision, recall = precision_recall(x, x + shift, chunk=7)
        assert precision.mean() == recall.mean() == share

    def test_one_mode_of_two(self):
        """Samples of half of the distribution: all are plausible, half of the real ones are missed."""
        one, two = torch.randn(60, 3, generator=generator()), torch.randn(60, 3, generator=generator(1)) + 50
        precision, recall = precision_recall(one, torch.cat([one, two]))
        assert (precision.mean(), recall.mean()) == (1, 0.5)

    def test_radius_is_that_of_the_kth_neighbour(self):
        line = torch.tensor([[0.0], [1.0], [3.0], [7.0]])  # first neighbours: 1, 1, 2, 4
        points = torch.tensor([[-1.0], [-1.1], [11.0], [11.1]])
        assert precision_recall(points, line, k=1)[0].tolist() == [1, 0, 1, 0]

    def test_manifold_of_a_ring(self):
        """Points on a circle are covered by points on the circle; its centre is not, though it is their mean."""
        angle = torch.arange(100) * 2 * math.pi / 100
        ring = torch.stack([angle.cos(), angle.sin()], 1)  # (100, 2)
        between = torch.stack([(angle + 0.01).cos(), (angle + 0.01).sin()], 1)
        precision, recall = precision_recall(torch.cat([between, torch.zeros(100, 2)]), ring)
        assert (precision[:100].mean(), precision[100:].mean()) == (1, 0)
        assert recall.mean() == 1


class TestGroups:
    def test_every_ten_images_go_to_ten_groups(self):
        group = group_of(torch.arange(1000))
        assert (group.view(-1, GROUPS).sort(1).values == torch.arange(GROUPS)).all()
        assert len(set(map(tuple, group.view(-1, GROUPS).tolist()))) > 90  # in orders of their own
        assert torch.equal(group_of(torch.arange(333, 555)), group[333:555])

    def test_groups_sum_up_to_the_whole(self):
        x = normal(2500, 5) + 3
        sums, whole = grouped(x), FeatureStatistics(5)
        whole.update(x)
        assert (sums.whole().n, [group.n for group in sums.groups]) == (2500, [250] * GROUPS)
        assert torch.allclose(sums.whole().covariance, whole.covariance)
        rest = sums.whole().without(sums.groups[3])
        assert rest.n == 2250
        assert torch.allclose(rest.mean, x[group_of(torch.arange(2500)) != 3].double().mean(0))

    def test_distance_has_an_interval(self):
        a, b = grouped(normal(400, 4)), grouped(normal(300, 4, 1) + 0.5)
        value, (low, high) = a.distance(b)
        assert value == a.whole().distance(b.whole())
        assert 0 <= low < value < high
        assert grouped(normal(19, 4)).distance(b)[1] is None

    def test_pairs_go_together(self):
        """What both sides share does not make their distance uncertain."""
        x = normal(500, 4)
        near = x + 0.1 * normal(500, 4, 1)
        paired, free = grouped(near).distance(grouped(x)), grouped(normal(500, 4, 2)).distance(grouped(x))
        assert paired[1][1] - paired[1][0] < 0.2 * (free[1][1] - free[1][0])

    def test_jackknife_of_a_mean(self):
        """The error of a mean of group means is its standard error."""
        x = normal(GROUPS, 1).flatten().double() + 20
        left_out = [((x.sum() - v) / (GROUPS - 1)).item() for v in x]
        low, high = jackknife(x.mean().item(), left_out)
        assert high - low == pytest.approx(2 * 2.262157 * x.std().item() / math.sqrt(GROUPS), rel=1e-5)
        assert jackknife(0.1, left_out)[0] == 0

    @pytest.mark.parametrize(("shift", "scale"), [(0.3, 1.0), (0.0, 1.3)])
    def test_intervals_cover_the_truth_at_this_n(self, shift, scale):
        """Gaussians whose variance decays; the truth at this n is the mean over many pairs of sets."""
        spread, n, g = torch.linspace(1, 0.1, 6), 100, generator(3)

        def measure():
            x = torch.randn(n, 6, generator=g) * spread
            y = torch.randn(n, 6, generator=g) * spread * scale + shift * spread
            return grouped(y, n).distance(grouped(x, n))

        found = [measure() for _ in range(40)]
        truth = sum(value for value, _ in found) / len(found)
        assert sum(low <= truth <= high for _, (low, high) in found) / len(found) > 0.88


class TestDiscrepancies:
    def test_agrees_with_torchmetrics(self):
        from torchmetrics.image.kid import poly_mmd

        x, y = normal(30, 8), normal(30, 8, 1) + 0.4
        expected = poly_mmd(x.double(), y.double()).item()
        assert mmd(x, y, polynomial_kernel) == pytest.approx(expected, rel=1e-9)

    def test_unequal_sizes(self):
        """Two pairs of equal vectors, by hand: with k(a, a) = 1, k(a, b) = q it is 1 + 1 - 2 q."""
        x, y = torch.tensor([[3.0, 0.0]]).expand(4, 2), torch.tensor([[0.0, 2.0]]).expand(3, 2)
        assert mmd(x, y, gaussian_kernel) == pytest.approx(2 - 2 * math.exp(-2 / (2 * 10**2)), rel=1e-9)

    def test_equal_distributions_are_zero_on_average(self):
        values = [mmd(normal(20, 5, 2 * i), normal(20, 5, 2 * i + 1), polynomial_kernel) for i in range(200)]
        error = torch.tensor(values).std().item() / math.sqrt(200)
        assert abs(sum(values) / 200) < 3 * error
        assert min(values) < 0

    def test_subsets_are_apart_and_small(self):
        x, y = normal(2500, 3), normal(10_300, 3, 1) + 0.5
        value, (low, high), about = subset_mmd(x, y, polynomial_kernel, seed=0)
        assert (about["subsets"], about["subset_sizes"]) == (11, [228, 937])
        assert low < mmd(x, y[:2500], polynomial_kernel) < high
        assert high - low == pytest.approx(2 * 2.228139 * about["standard_error"], rel=1e-5)
        assert subset_mmd(x, y, polynomial_kernel, seed=0)[0] == value != subset_mmd(x, y, polynomial_kernel, 1)[0]

    def test_closed_form(self):
        """(x.y / d + 1)^3 of d = 1 in moments: E x = 0, E x^2 = 1, E x^3 = 0; E y = m, 1 + m^2, m^3 + 3 m."""
        m = 0.5

        def mean(a, b):
            return a[2] * b[2] + 3 * a[1] * b[1] + 3 * a[0] * b[0] + 1

        p, q = (0.0, 1.0, 0.0), (m, 1 + m**2, m**3 + 3 * m)
        truth = mean(p, p) + mean(q, q) - 2 * mean(p, q)
        value, (low, high), _ = subset_mmd(normal(20_000, 1), normal(20_000, 1, 1) + m, polynomial_kernel, 0)
        assert low < truth < high
        assert value == pytest.approx(truth, rel=0.1)

    def test_intervals_cover_the_truth(self):
        """Sets of one distribution: the truth is zero."""
        found = [subset_mmd(normal(60, 8, 2 * i), normal(60, 8, 2 * i + 1), polynomial_kernel, i)[1]
                 for i in range(50)]  # fmt: skip
        assert 0.85 < sum(low <= 0 <= high for low, high in found) / 50 < 1


class TestInceptionScore:
    def test_sure_and_diverse(self):
        """Certain of each image, classes equally often in each split: as many as there are classes."""
        score = InceptionScore()
        labels = torch.zeros(40 * GROUPS, dtype=torch.long)
        group = group_of(torch.arange(len(labels)))
        for i in range(GROUPS):
            labels[group == i] = torch.arange(40) % 4
        for part in torch.nn.functional.one_hot(labels, 4).float().mul(200).split(33):
            score.update(part)
        value, (low, high) = score.measure()
        assert value == pytest.approx(4, rel=1e-9)
        assert low == pytest.approx(high)

    def test_unsure_or_alike_is_one(self):
        for logits in (torch.zeros(50, 7), torch.tensor([[9.0, 0, 0]]).expand(50, 3)):
            score = InceptionScore()
            score.update(logits)
            assert score.measure()[0] == pytest.approx(1)

    def test_one_split_by_hand(self):
        logits = normal(60, 5)
        score = InceptionScore()
        score.update(logits)
        p, group = logits.double().softmax(1), group_of(torch.arange(60))
        splits = [p[group == i] for i in range(GROUPS)]
        each = [(q * (q.log() - q.mean(0).log())).sum(1).mean().exp() for q in splits]
        value, (low, high) = score.measure()
        assert value == pytest.approx(torch.stack(each).mean().item(), rel=1e-9)
        assert low < value < high


def test_too_few():
    refused("more than 3 images on each side, not 3 and 9", precision_recall, torch.zeros(3, 2), torch.zeros(9, 2))
    assert subset_mmd(normal(3, 2), normal(9, 2), polynomial_kernel, 0)[1] is None
    refused("at least 2 images on each side, not 1 and 9", subset_mmd, normal(1, 2), normal(9, 2), polynomial_kernel, 0)
    score = InceptionScore()
    score.update(torch.zeros(19, 3))
    refused("at least 20 images, not 19", score.measure)


def test_frechet_agrees_with_torchmetrics():
    """On features of a network that passes numbers through."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Through(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.num_features = 6

        def forward(self, images):
            return images.flatten(1)[:, :6].double()

    theirs = FrechetInceptionDistance(feature=Through(), normalize=True).set_dtype(torch.float64)
    x, y = (torch.rand(200, 3, 2, 2, generator=generator(i)) * (1 - 0.3 * i) for i in range(2))
    theirs.update(x, real=True)
    theirs.update(y, real=False)
    a, b = (grouped(images.flatten(1)[:, :6]) for images in (x, y))
    assert a.whole().distance(b.whole()) == pytest.approx(theirs.compute().item(), rel=1e-6)


def test_where_divide_and_conquer_finds_no_end_another_algorithm_does(monkeypatch):
    """LAPACK gave up on the covariance of nearly equal images."""
    cov = torch.cov(torch.randn(5, 8, dtype=torch.float64).T)
    mean, other = torch.zeros(8), torch.ones(8)
    wanted = frechet_distance(mean, cov, other, 2 * cov)

    def gives_up(matrix):
        raise torch.linalg.LinAlgError("The algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", gives_up)
    assert frechet_distance(mean, cov, other, 2 * cov) == pytest.approx(wanted)
