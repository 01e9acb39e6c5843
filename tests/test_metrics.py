"""Metrics against closed forms, statistics, and the metrics file."""

import json
import math

import pytest
import torch

from latelier.errors import LatelierError
from latelier.evaluation.metrics import (
    FeatureStatistics,
    Measurement,
    frechet_distance,
    l1,
    mean_with_interval,
    precision_recall,
    psnr,
    size_warning,
    ssim,
    write_measurements,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def covariance(d, seed):
    a = torch.randn(d, d, generator=generator(seed), dtype=torch.float64)
    return a @ a.T / d


class TestPerPicture:
    def test_closed_forms(self):
        x = torch.zeros(2, 3, 16, 16)
        y = x.clone()
        y[1] += 20 / 127.5  # 20 levels of 255
        x, y = x + 0.5 / 127.5, y + 0.5 / 127.5  # in the middle of levels, away from rounding ties
        assert l1(x, y).tolist() == pytest.approx([0, 20 / 127.5])
        assert psnr(x, y).tolist() == pytest.approx([100, 20 * math.log10(255 / 20)], abs=1e-4)

    def test_equal_pictures_are_similar(self):
        x = torch.rand(2, 3, 24, 16, generator=generator()) * 2 - 1
        assert ssim(x, x).tolist() == pytest.approx([1, 1])
        assert ssim(x, -x).max() < 0
        assert ssim(x[:1], x[:1]).shape == (1,)

    def test_pictures_are_compared_as_saved(self):
        x = torch.rand(1, 3, 16, 16, generator=generator()) * 2 - 1
        below = 0.2 / 127.5
        levels = (x * 127.5 + 127.5).round() / 127.5 - 1
        assert l1(levels, levels + below).item() == 0
        assert l1(torch.full_like(x, 5.0), torch.ones_like(x)).item() == 0

    def test_ssim_needs_its_window(self):
        with pytest.raises(LatelierError, match="at least 11 pixels a side, not 8 x 16"):
            ssim(torch.zeros(1, 3, 8, 16), torch.zeros(1, 3, 8, 16))

    def test_interval_covers_the_mean(self):
        values = torch.randn(10_000, generator=generator()) * 2 + 5
        mean, interval = mean_with_interval(values)
        assert interval[1] - interval[0] == pytest.approx(2 * 1.96 * 2 / 100, rel=0.03)
        assert interval[0] < 5 < interval[1]
        assert mean == pytest.approx(values.mean().item())
        assert mean_with_interval(torch.ones(1)) == (1.0, None)


class TestFrechet:
    def test_equal_gaussians_are_at_distance_zero(self):
        mean, cov = torch.randn(8, generator=generator()), covariance(8, 1)
        assert frechet_distance(mean, cov, mean, cov) == pytest.approx(0, abs=1e-9)

    def test_commuting_covariances(self):
        """|m|^2 + sum (s1 - s2)^2 for covariances with the same axes."""
        s1, s2 = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 0.5, 3.0])
        axes = torch.linalg.qr(torch.randn(3, 3, generator=generator(), dtype=torch.float64))[0]
        cov1, cov2 = (axes @ torch.diag(s.double().square()) @ axes.T for s in (s1, s2))
        m1, m2 = torch.zeros(3), torch.tensor([1.0, -2.0, 0.5])
        expected = (m1 - m2).square().sum() + (s1 - s2).square().sum()
        assert frechet_distance(m1, cov1, m2, cov2) == pytest.approx(expected.item(), rel=1e-9)

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
    def test_batches_and_merging_do_not_matter(self):
        x = torch.randn(50, 5, generator=generator()) + 3
        parts = [FeatureStatistics(5), FeatureStatistics(5)]
        for i, batch in enumerate(x.split(7)):
            parts[i % 2].update(batch)
        parts[0].merge(parts[1])
        assert parts[0].n == 50
        assert torch.allclose(parts[0].mean, x.double().mean(0))
        assert torch.allclose(parts[0].covariance, torch.cov(x.double().T))

    def test_one_picture_has_no_covariance(self):
        statistics = FeatureStatistics(2)
        statistics.update(torch.zeros(1, 2))
        with pytest.raises(LatelierError, match="at least 2 pictures on each side, not 1"):
            statistics.distance(statistics)

    def test_too_few_pictures_are_told(self):
        assert size_warning(513, 512) == {}
        assert "n = 512 is below" in size_warning(512, 512)["warning"]


class TestPrecisionRecall:
    def test_same_set_has_both(self):
        x = torch.randn(40, 4, generator=generator())
        precision, recall = precision_recall(x, x, chunk=7)
        assert precision.mean() == recall.mean() == 1

    def test_far_sets_have_neither(self):
        x = torch.randn(40, 4, generator=generator())
        precision, recall = precision_recall(x, x + 100)
        assert precision.mean() == recall.mean() == 0

    def test_one_mode_of_two(self):
        """Samples of half of the distribution: all are plausible, half of the real ones are missed."""
        one, two = torch.randn(60, 3, generator=generator()), torch.randn(60, 3, generator=generator(1)) + 50
        precision, recall = precision_recall(one, torch.cat([one, two]))
        assert precision.mean() == 1
        assert recall.mean() == 0.5

    def test_radius_is_that_of_the_kth_neighbour(self):
        line = torch.tensor([[0.0], [1.0], [3.0], [7.0]])  # first neighbours: 1, 1, 2, 4
        points = torch.tensor([[-1.0], [-1.1], [11.0], [11.1]])
        assert precision_recall(points, line, k=1)[0].tolist() == [1, 0, 1, 0]

    def test_too_few(self):
        with pytest.raises(LatelierError, match="more than 3 pictures on each side, not 3 and 9"):
            precision_recall(torch.zeros(3, 2), torch.zeros(9, 2))


def test_measurements_merge(tmp_path):
    path = tmp_path / "run" / "metrics.json"
    write_measurements(
        path, [Measurement("psnr", 20.0, {"n": 5}, (19.0, 21.0)), Measurement("l1", 0.5)], "reconstruction"
    )
    write_measurements(path, [Measurement("gfd-vgg16", 3.0)], "generation")
    write_measurements(path, [Measurement("psnr", 30.0, {"n": 6})], "reconstruction")
    content = json.loads(path.read_text())
    assert content["reconstruction"]["psnr"] == {"value": 30.0, "receipt": {"n": 6}, "interval": None}
    assert content["reconstruction"]["l1"]["value"] == 0.5
    assert content["generation"]["gfd-vgg16"]["value"] == 3.0
    assert [p.name for p in path.parent.iterdir()] == ["metrics.json"]
