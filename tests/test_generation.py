"""Evaluation of generated sets and nearest training pictures, in a feature space that is easy to see through."""

import pytest
import torch

from latelier.errors import LatelierError
from latelier.evaluation import generation
from latelier.evaluation.generation import evaluate_generation, nearest
from latelier.images import round_to_8_bit
from latelier.recipe import Evaluate
from tiny import colour_extractor


@pytest.fixture
def colours(monkeypatch):
    extractor = colour_extractor()
    monkeypatch.setattr(generation, "load_extractor", lambda name, device: extractor)
    return extractor


def images(n, seed, shift=0.0):
    noise = torch.randn(n, 3, 1, 1, generator=torch.Generator().manual_seed(seed)) * 0.1
    return (noise + shift).expand(-1, -1, 8, 8)


def test_distance_and_coverage(colours):
    real = [{"image": part} for part in images(200, 0).split(30)]
    receipt = {"reference": "toy/val", "sampler": "euler", "steps": 3, "seed": 1}
    evaluate = Evaluate(metrics=["gfd", "precision", "recall", "psnr"], samples=150)
    near = evaluate_generation(images(200, 1).split(64), real, evaluate, receipt)
    far = evaluate_generation(images(200, 1, 0.6).split(64), real, evaluate, receipt)
    assert [m.name for m in near] == ["gfd-colour", "precision", "recall"]
    assert near[0].value < 20 < far[0].value
    assert near[1].value > 0.8 > 0.2 > far[1].value
    for m in near:
        assert (m.receipt["n"], m.receipt["n_reference"]) == (150, 150)
        assert (m.receipt["sampler"], m.receipt["extractor"]) == ("euler", "colour")
    assert near[1].interval[1] <= 1


def test_known_distance(colours):
    """Equal shapes, one shifted by d levels in each of three channels: 3 d^2."""
    x = images(100, 0)
    levels = 20 / 127.5
    samples = [round_to_8_bit(x) + levels]
    (measured,) = evaluate_generation(samples, [{"image": x}], Evaluate(metrics=["gfd"]), {})
    assert measured.value == pytest.approx(3 * 20**2, rel=1e-3)


def test_reconstruction_metrics_alone_cost_nothing():
    assert evaluate_generation([], [], Evaluate(metrics=["psnr"]), {}) == []


def test_no_samples(colours):
    with pytest.raises(LatelierError, match="from 0 samples and 5 reference"):
        evaluate_generation([], [{"image": images(5, 0)}], Evaluate(metrics=["gfd"]), {})


def test_a_remembered_picture_is_found(colours):
    training = images(50, 0)
    samples = training[[33, 7, 49]]
    found = nearest(samples, [{"image": part} for part in training.split(8)], colours, k=2)
    assert found.indices[:, 0].tolist() == [33, 7, 49]
    assert found.distances[:, 0].tolist() == [0, 0, 0]
    assert (found.distances[:, 1] > 0).all()
    assert torch.equal(found.images[:, 0], samples)
    assert found.images.shape == (3, 2, 3, 8, 8)


def test_batches_do_not_matter_to_neighbours(colours):
    training, samples = images(20, 0), images(4, 1)
    ways = [nearest(samples, [{"image": p} for p in training.split(n)], colours, k=3) for n in (1, 6, 20)]
    assert torch.equal(ways[0].indices, ways[1].indices)
    assert torch.equal(ways[0].indices, ways[2].indices)


def test_too_few_training_pictures(colours):
    with pytest.raises(LatelierError, match="there are only 2"):
        nearest(images(1, 0), [{"image": images(2, 1)}], colours, k=3)
