"""Evaluation of generated sets and nearest training images, in a feature space that is easy to see through."""

from dataclasses import replace

import pytest
import torch

from latelier.errors import LatelierError
from latelier.evaluation import generation
from latelier.evaluation.features import FeatureExtractor
from latelier.evaluation.generation import evaluate_generation, nearest
from latelier.evaluation.metrics import METRICS
from latelier.images import round_to_8_bit
from latelier.recipe import Evaluate
from tiny import colour_extractor, refused


@pytest.fixture
def colours(monkeypatch):
    extractor = colour_extractor()
    monkeypatch.setattr(generation, "load_extractors", lambda names, device: [extractor])
    return extractor


def inception(images_to, **others):
    """Stands for FID's Inception: mean colours, and what else there is."""
    module = torch.nn.Linear(1, 1)
    about = {name: (x.shape[1], name) for name, x in images_to(torch.zeros(1, 3, 8, 8)).items() if name != "features"}
    return FeatureExtractor("inception", 3, "mean", "rounded", "1" * 64, module, images_to, about)


def colours_and_more(levels):
    """Features, spatial ones, and logits of four classes that the first colour decides."""
    mean = levels.mean((2, 3))  # (b, 3)
    logits = torch.nn.functional.one_hot((mean[:, 0] / 64).long().clamp(0, 3), 4) * 100.0
    return {"features": mean, "spatial": levels[:, 0, :2, 0], "logits": logits}


@pytest.fixture
def several(monkeypatch):
    """Inception, and a CLIP whose vectors are mean colours too."""
    clip = colour_extractor()
    clip.name = "clip-tiny"
    found = [inception(colours_and_more), clip]
    monkeypatch.setattr(generation, "load_extractors", lambda names, device: found)
    return Evaluate(
        metrics=["gfd", "sfid", "inception-score", "kid", "cmmd", "precision", "recall"],
        features=["inception", "clip:tiny"], samples=90,
    )  # fmt: skip


def make_images(n, seed, shift=0.0):
    noise = torch.randn(n, 3, 1, 1, generator=torch.Generator().manual_seed(seed)) * 0.1
    return (noise + shift).expand(-1, -1, 8, 8)


def test_distance_and_coverage(colours):
    real = [{"image": part} for part in make_images(200, 0).split(30)]
    receipt = {"reference": "toy/val", "sampler": "euler", "steps": 3, "seed": 1}
    evaluate = Evaluate(metrics=["gfd", "precision", "recall", "psnr"], samples=150)
    near = evaluate_generation(make_images(200, 1).split(64), real, evaluate, receipt)
    far = evaluate_generation(make_images(200, 1, 0.6).split(64), real, evaluate, receipt)
    assert [m.name for m in near] == ["gfd-colour", "precision", "recall"]
    assert near[0].value < 20 < far[0].value
    assert near[1].value > 0.8 > 0.2 > far[1].value
    for m in near:
        assert (m.receipt["n"], m.receipt["n_reference"]) == (150, 150)
        assert (m.receipt["sampler"], m.receipt["extractor"]) == ("euler", "colour")
    assert near[1].interval[1] <= 1


def test_known_distance(colours):
    """Equal shapes, one shifted by d levels in each of three channels: 3 d^2."""
    x = make_images(100, 0)
    levels = 20 / 127.5
    samples = [round_to_8_bit(x) + levels]
    (measured,) = evaluate_generation(samples, [{"image": x}], Evaluate(metrics=["gfd"]), {})
    assert measured.value == pytest.approx(3 * 20**2, rel=1e-3)


def test_each_metric_in_its_features(several):
    receipt = {"reference": "toy/val", "data": "f00", "seed": 1}
    batches = [{"image": part} for part in make_images(90, 0).split(30)]
    measured = {m.name: m for m in evaluate_generation(make_images(90, 1, 0.3).split(40), batches, several, receipt)}
    assert list(measured) == [
        "gfd-inception", "sfid", "inception-score", "kid-inception", "precision", "recall", "gfd-clip-tiny",
        "kid-clip-tiny", "cmmd-clip-tiny",
    ]  # fmt: skip
    assert (measured["sfid"].receipt["layer"], measured["sfid"].receipt["dims"]) == ("spatial", 2)
    assert 1 <= measured["inception-score"].value <= 4
    for name, m in measured.items():
        assert (m.receipt["n"], m.receipt["n_reference"], m.receipt["data"]) == (90, 90, "f00"), name
        assert {"extractor", "weights_sha256", "preprocessing", "versions", "git", "device"} <= set(m.receipt), name
        assert m.interval[0] <= m.value <= m.interval[1], name


def test_distances_of_nothing_but_chance_are_small(several):
    """Two halves of one distribution: unbiased discrepancies have zero in their intervals."""
    batches = [{"image": make_images(90, 0)}]
    measured = {m.name: m for m in evaluate_generation([make_images(90, 1)], batches, several, {})}
    for name in ("kid-inception", "kid-clip-tiny", "cmmd-clip-tiny"):
        low, high = measured[name].interval
        assert low < 0 < high


def test_fid_needs_fifty_thousand(monkeypatch):
    found = [inception(colours_and_more)]
    monkeypatch.setattr(generation, "load_extractors", lambda names, device: found)
    enough = Evaluate(metrics=["fid50k"], features="inception", samples=50_000)
    with pytest.raises(LatelierError, match=r"50,000 images, and there are 40; what fewer .* called gfd-inception"):
        evaluate_generation([make_images(40, 0)], [{"image": make_images(50, 1)}], enough, {})
    monkeypatch.setitem(METRICS, "fid50k", replace(METRICS["fid50k"], images=40))
    both = enough.model_copy(update={"metrics": ["fid50k", "gfd"]})
    gfd, fid = evaluate_generation([make_images(40, 0)], [{"image": make_images(50, 1)}], both, {})
    assert (gfd.name, fid.name) == ("gfd-inception", "fid50k")
    assert gfd.value == fid.value


def relative(samples, training, held_out, evaluate, **options):
    asked = evaluate.model_copy(update={"metrics": ["gfd", "fdr"], "samples": 150})
    sides = ([{"image": part} for part in each.split(60)] for each in (training, held_out))
    found = evaluate_generation(samples.split(60), next(sides), asked, {"seed": 1}, held_out=next(sides), **options)
    return {m.name: m for m in found}


def test_relative_distances_in_closed_form(several):
    training, held_out = make_images(150, 0), make_images(150, 1, 0.1)
    as_good = relative(held_out, training, held_out, several)
    names = ("fdr-inception", "fdr-clip-tiny", "fdr")
    assert list(as_good) == ["gfd-inception", "gfd-clip-tiny", *names]
    assert [as_good[name].value for name in names] == [1, 1, 1]
    memorised = relative(training, training, held_out, several)
    assert [memorised[name].value for name in names] == pytest.approx([0, 0, 0], abs=1e-6)
    moved = relative(round_to_8_bit(training) + 20 / 127.5, training, held_out, several)
    receipt = moved["fdr-clip-tiny"].receipt
    assert receipt["distance"] == pytest.approx(3 * 20**2, rel=1e-3)
    assert moved["fdr-clip-tiny"].value == receipt["distance"] / receipt["held_out_distance"]
    assert moved["fdr"].value == pytest.approx((moved["fdr-inception"].value + moved["fdr-clip-tiny"].value) / 2)
    assert [receipt[n] for n in ("n", "n_reference", "n_held_out")] == [150, 150, 150]


def test_relative_distances_without_enough_held_out_images(colours):
    one = Evaluate(features="vgg16")
    training = make_images(150, 0)
    few = relative(make_images(150, 1), training, make_images(120, 2), one)
    assert set(few) == {"gfd-colour", "fdr"}
    assert "150" in few["fdr"].receipt["left out"]
    assert "evaluate.samples=120" in few["fdr"].receipt["left out"]
    less = relative(make_images(80, 1), training, make_images(80, 2), one)
    assert "needs 100 images, and there are 80" in less["fdr"].receipt["left out"]
    same = relative(make_images(150, 1), training, training, one)
    assert "are the training images" in same["fdr"].receipt["left out"]


def test_features_of_held_out_images_are_cached(colours):
    one, training, held_out = Evaluate(features="vgg16"), make_images(150, 0), make_images(150, 1)
    key = {"data": "held out"}
    first = relative(make_images(150, 2), training, held_out, one, held_out_key=key)
    again = relative(make_images(150, 2), training, held_out[:0], one, held_out_key=key)
    assert again["fdr-colour"].value == first["fdr-colour"].value
    assert again["fdr-colour"].receipt["held_out"] == "held out"


@pytest.mark.parametrize(
    ("metric", "told"),
    [("cmmd", "CLIP's embeddings only"), ("sfid", "FID's Inception only"), ("fid50k", "FID's Inception only")],
)
def test_metrics_without_their_features_are_refused(metric, told):
    refused(told, evaluate_generation, [], [], Evaluate(metrics=[metric], features="vgg16"), {})


def test_a_distance_says_what_it_compares_with(colours):
    real, alike = make_images(400, 0), make_images(400, 1)

    def gfd(samples):
        (found,) = evaluate_generation([samples], [{"image": real}], Evaluate(metrics=["gfd"]), {})
        return found.value, found.receipt["alike"], found.receipt["spread"]

    value, expected, spread = gfd(alike)
    assert 0.2 * expected < value < 5 * expected < 0.1 * spread
    assert gfd(real[:1].expand(400, -1, -1, -1))[0] >= spread


def test_a_remembered_image_is_found_whatever_the_batches(colours):
    training = make_images(50, 0)
    samples = training[[33, 7, 49]]
    found, *others = (
        nearest(samples, [{"image": part} for part in training.split(size)], colours, k=2) for size in (8, 1, 50)
    )
    assert (found.indices[:, 0].tolist(), found.distances[:, 0].tolist()) == ([33, 7, 49], [0, 0, 0])
    assert (found.distances[:, 1] > 0).all()
    assert torch.equal(found.images[:, 0], samples)
    assert found.images.shape == (3, 2, 3, 8, 8)
    assert all(torch.equal(found.indices, other.indices) for other in others)
    refused("there are only 2", nearest, samples, [{"image": training[:2]}], colours, k=3)


def test_nothing_to_measure(colours):
    assert evaluate_generation([], [], Evaluate(metrics=["psnr"]), {}) == []  # reconstruction alone costs nothing
    few = [{"image": make_images(5, 0)}]
    refused("from 0 samples and 5 reference", evaluate_generation, [], few, Evaluate(metrics=["gfd"]), {})
