"""Means and their intervals, and the file of measurements."""

import json

import pytest
import torch

from latelier.evaluation.results import Measurement, mean_with_interval, size_warning, write_measurements


def test_interval_covers_the_mean():
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 2 + 5
    mean, interval = mean_with_interval(values)
    assert interval[1] - interval[0] == pytest.approx(2 * 1.96 * 2 / 100, rel=0.03)
    assert interval[0] < 5 < interval[1]
    assert mean == pytest.approx(values.mean().item())
    assert mean_with_interval(torch.ones(1)) == (1.0, None)
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
