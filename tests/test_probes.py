"""Probes of latents whose classes are known to be found, or not."""

import pytest
import torch

from latelier.analysis import probes
from latelier.analysis.probes import class_probes, linear_probe, nearest_neighbours
from latelier.analysis.sample import collect
from test_mixture import codec, noise


def make_images(n, kind, seed=0):
    """Labelled noise whose class is in the mean, in the pattern, or nowhere."""
    labels = torch.arange(n) % 3
    means = torch.zeros(3, 2, 2, 2)
    if kind == "mean":
        means[1, 0], means[2, 1] = 8, 8
    if kind == "pattern":  # the mean over positions is 0
        means[1, 0, 0], means[1, 0, 1], means[2, 1, :, 0], means[2, 1, :, 1] = 8, -8, 8, -8
    return [{"image": means[labels] + noise(n, seed), "label": labels}]


def measure(kind, learnt=200, held_out=150, flat=False):
    found = class_probes(*samples(make_images(learnt, kind), make_images(held_out, kind, 1), flat=flat))
    assert list(found) == ["probe-accuracy", "probe-pooled-accuracy", "knn-accuracy"]
    return list(found.values())


def samples(*sides, flat=False):
    return [collect(codec(flat), side, 10_000) for side in sides]


def test_classes_in_the_mean_are_found_by_all():
    found = measure("mean")
    assert all(m.value > 0.95 for m in found)
    assert all(m.interval[0] <= m.value <= m.interval[1] for m in found)
    about = found[0].details
    assert (about["n"], about["n_learnt"], about["classes"]) == (150, 200, 3)
    assert (about["chance"], about["majority"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert about["converged"]
    assert [probe.details["features"] for probe in found] == [8, 2, 8]
    assert [strength for strength, _ in about["validation"]] == list(probes.STRENGTHS)


@pytest.mark.parametrize("flat", [False, True])
def test_classes_in_the_pattern_are_lost_by_pooling(flat):
    whole, pooled, neighbours = measure("pattern", flat=flat)
    assert whole.value > 0.98
    assert neighbours.value > 0.95
    assert pooled.interval[0] < 1 / 3 < pooled.interval[1]


def test_without_classes_chance_is_in_the_interval():
    for probe in measure("nowhere", held_out=300):
        assert probe.interval[0] < 1 / 3 < probe.interval[1]


def test_what_is_not_linear_is_for_neighbours():
    corners = torch.tensor([[1.0, 1], [-1, -1], [1, -1], [-1, 1]]).repeat(60, 1)
    labels = torch.tensor([0, 0, 1, 1]).repeat(60)
    x = (corners + 0.1 * torch.randn(240, 2, generator=torch.Generator().manual_seed(0))).numpy()
    right = [(guess(x[:120], x[120:], labels[:120])[0] == labels[120:]).float().mean() for guess in (
        lambda *arguments: linear_probe(*arguments, 0), nearest_neighbours)]  # fmt: skip
    assert right[0] < 0.8
    assert right[1] == 1


def test_near_neighbours_outvote_many_far_ones():
    x = torch.tensor([[1.0, 0.02], [1.0, -0.02], *[[1.0, 1.0]] * 3]).numpy()
    labels = torch.tensor([4, 4, 9, 9, 9])
    guesses, about = nearest_neighbours(x, torch.tensor([[5.0, 0.0], [3.0, 3.0]]).numpy(), labels)
    assert guesses.tolist() == [4, 9]
    assert about["probe"].startswith("5 nearest")  # all, where there are fewer than 20


def test_long_features_are_reduced_and_it_is_said(monkeypatch):
    monkeypatch.setattr(probes, "MOST_DIMS", 4)
    whole, pooled, neighbours = measure("mean")
    assert whole.details["preprocessing"] == "standardised, PCA to 4 components"
    assert 0 < whole.details["explained_variance"] < 1
    assert whole.value > 0.95
    assert pooled.details["preprocessing"] == "standardised"
    assert neighbours.details["features"] == 8
    monkeypatch.setattr(probes, "ITERATIONS", 1)
    assert measure("mean")[0].details["converged"] is False  # it stopped early, and says so


def test_the_penalty_is_chosen_where_it_helps():
    """Of many useless features and few images, a weak penalty learns the noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 2
    x = torch.randn(300, 100, generator=generator)
    x[:, 0] += 1.5 * labels
    guesses, about = linear_probe(x[:100].numpy(), x[100:].numpy(), labels[:100], 0)
    scores = dict(map(tuple, about["validation"]))
    assert scores[about["C"]] == max(scores.values()) > min(scores.values())
    assert (guesses == labels[100:]).float().mean() > 0.5


def test_unlabelled_images_are_left_out():
    train, held_out = make_images(120, "mean"), make_images(90, "mean", 1)
    train[0]["label"][:30] = -1
    held_out[0]["label"] = torch.where(held_out[0]["label"] == 2, 7, held_out[0]["label"])  # never seen
    whole, *_ = class_probes(*samples(train, held_out)).values()
    assert (whole.details["n"], whole.details["n_learnt"]) == (90, 90)
    assert whole.details["unseen"].startswith("30 images")
    assert whole.value == pytest.approx(2 / 3, abs=0.03)


def test_classes_of_single_images():
    x = torch.eye(12)[:, :10].numpy()
    labels = torch.arange(12)
    assert nearest_neighbours(x, x[:10], labels, k=1)[0].tolist() == list(range(10))
    assert linear_probe(x, x[:10], labels, 0)[0].tolist() == list(range(10))


def test_nothing_without_two_classes_or_labels():
    def one(kind, n=40):
        return [{"image": batch["image"], "label": batch["label"] * 0} for batch in make_images(n, kind)]

    bare = [{"image": noise(40)}]
    both = make_images(40, "mean")
    for train, held_out in ((one("mean"), both), (bare, both), (both, bare)):
        assert class_probes(*samples(train, held_out)) == {}
