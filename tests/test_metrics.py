"""Metrics against closed forms, statistics, and the metrics file."""

import json
import math

import pytest
import torch

from latelier.errors import LatelierError
from latelier.evaluation.reconstruction import l1, ms_ssim, psnr, ssim
from latelier.evaluation.results import Measurement, mean_with_interval, size_warning, write_measurements


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class TestPerImage:
    def test_closed_forms(self):
        x = torch.zeros(2, 3, 16, 16)
        y = x.clone()
        y[1] += 20 / 127.5  # 20 levels of 255
        x, y = x + 0.5 / 127.5, y + 0.5 / 127.5  # in the middle of levels, away from rounding ties
        assert l1(x, y).tolist() == pytest.approx([0, 20 / 127.5])
        assert psnr(x, y).tolist() == pytest.approx([100, 20 * math.log10(255 / 20)], abs=1e-4)

    def test_equal_images_are_similar(self):
        x = torch.rand(2, 3, 24, 16, generator=generator()) * 2 - 1
        assert ssim(x, x).tolist() == pytest.approx([1, 1])
        assert ssim(x, -x).max() < 0
        assert ssim(x[:1], x[:1]).shape == (1,)

    def test_images_are_compared_as_saved(self):
        x = torch.rand(1, 3, 16, 16, generator=generator()) * 2 - 1
        below = 0.2 / 127.5
        levels = (x * 127.5 + 127.5).round() / 127.5 - 1
        assert l1(levels, levels + below).item() == 0
        assert l1(torch.full_like(x, 5.0), torch.ones_like(x)).item() == 0

    def test_ssim_needs_its_window(self):
        with pytest.raises(LatelierError, match="at least 11 pixels a side, not 8 x 16"):
            ssim(torch.zeros(1, 3, 8, 16), torch.zeros(1, 3, 8, 16))

    def test_one_scale_after_the_other(self):
        """Equal images are similar at all scales; noise that coarse scales average away hurts less than in SSIM."""
        x = torch.nn.functional.interpolate(torch.rand(2, 3, 24, 24, generator=generator()), 176, mode="bicubic")
        noisy = x + 0.1 * torch.randn(x.shape, generator=generator(1))
        assert ms_ssim(x, x).tolist() == pytest.approx([1, 1])
        assert (ms_ssim(noisy, x) > ssim(noisy, x) + 0.1).all()
        assert torch.allclose(ms_ssim(noisy, x)[1:], ms_ssim(noisy[1:], x[1:]))
        assert ms_ssim(-x, x).isfinite().all()

    def test_ms_ssim_needs_its_scales(self):
        with pytest.raises(LatelierError, match="at least 176 pixels a side, not 175 x 200"):
            ms_ssim(torch.zeros(1, 3, 175, 200), torch.zeros(1, 3, 175, 200))

    def test_interval_covers_the_mean(self):
        values = torch.randn(10_000, generator=generator()) * 2 + 5
        mean, interval = mean_with_interval(values)
        assert interval[1] - interval[0] == pytest.approx(2 * 1.96 * 2 / 100, rel=0.03)
        assert interval[0] < 5 < interval[1]
        assert mean == pytest.approx(values.mean().item())
        assert mean_with_interval(torch.ones(1)) == (1.0, None)


def test_too_few_images_are_told():
    assert size_warning(513, 512) == {}
    assert "n = 512 is below" in size_warning(512, 512)["warning"]


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
