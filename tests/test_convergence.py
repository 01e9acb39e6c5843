"""Snapshots of a denoiser's training, what is measured at them, and who is sooner where another one ends."""

import json
import shutil
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from latelier.denoisers.objective import DenoiserSection, DenoisingObjective
from latelier.errors import LatelierError
from latelier.evaluation import features
from latelier.evaluation.generation import PASSES, held_out_loss, load_snapshot, measure_convergence
from latelier.opening import open_codec, open_images, open_run, snapshot_folder
from latelier.report.comparison import write_comparison
from latelier.report.tables import LOSS, RunSummary, comparable, convergence, reach, read_curves, speed_table
from latelier.study.study import load_study
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.conv import IdentityTokenizer
from latelier.training import denoiser_loop
from latelier.training.denoiser_loop import train_denoiser
from latelier.training.tokenizer_loop import train_tokenizer
from test_study import write_study
from tiny import colour_extractor, refused, tiny_recipe

SNAPSHOTS = {"images": 64, "snapshots": 4}
MEASURED = {"metrics": ["gfd", "convergence"], "samples": 16, "batch": 16}
KIND = {"latent_shape": [4, 4, 4], "architecture": "VMAE", "loss": "l2"}


def weights(folder):
    """All weights of a denoiser's folder."""
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run with four snapshots, and its recipe."""
    recipe = tiny_recipe(tmp_path_factory.mktemp("run"), denoiser=SNAPSHOTS, evaluate=MEASURED)
    torch.manual_seed(0)
    train_tokenizer(recipe)
    train_denoiser(recipe)
    return recipe


@pytest.mark.parametrize(
    ("images", "batch", "snapshots", "places"),
    [(64, 8, 4, [16, 32, 48, 64]), (64, 8, 3, [24, 48, 64]), (60, 8, 1, [64]), (64, 8, 0, []),
     (40, 8, 5, [8, 16, 24, 32, 40])],
)  # fmt: skip
def test_snapshots_lie_at_equal_distances(images, batch, snapshots, places):
    assert DenoiserSection(images=images, batch=batch, snapshots=snapshots).snapshots_at() == places


@pytest.mark.parametrize(
    ("denoiser", "message"),
    [
        ({"images": 64, "snapshots": 9}, r"denoiser.snapshots = 9, but 64 images are only 8 steps of 8"),
        ({"snapshots": 0}, r"convergence.*set denoiser.snapshots to 2 or more"),
        (None, r"convergence.*set denoiser.snapshots to 2 or more"),
    ],
)
def test_snapshots_that_cannot_be(tmp_path, denoiser, message):
    refused(message, tiny_recipe, tmp_path, denoiser=denoiser, evaluate=MEASURED)


def test_snapshots_are_the_averaged_weights_on_the_way(run):
    folders = [snapshot_folder(run.folder, images) for images in (16, 32, 48, 64)]
    assert sorted(folders) == sorted((run.folder / "denoiser" / "snapshots").iterdir())
    assert same(weights(folders[-1]), weights(run.folder / "denoiser" / "ema"))
    for earlier, later in pairwise(folders):
        assert not same(weights(earlier), weights(later))
    checkpoints = run.folder / "checkpoints"  # the last two are kept: 48 and 64
    kept = load_file(checkpoints / "denoiser-000000000048" / "ema.safetensors")
    assert same(weights(folders[2]), {name.removeprefix("denoiser."): shadow for name, shadow in kept.items()})
    trained = load_file(folders[2] / "conditioner" / "diffusion_pytorch_model.safetensors")
    assert same(trained, {name.removeprefix("conditioner."): shadow for name, shadow in kept.items()})


def test_snapshots_leave_training_as_it_is_and_survive_a_stop(run, tmp_path, monkeypatch):
    """A run that breaks off after 56 images goes on from 48: the same snapshots, the early ones written once."""
    plain = tiny_recipe(tmp_path, name="plain", denoiser={"images": 64})
    broken = tiny_recipe(tmp_path, name="broken", denoiser=SNAPSHOTS)
    for recipe in (plain, broken):
        shutil.copytree(run.folder / "tokenizer", recipe.folder / "tokenizer")
    train_denoiser(plain)
    assert not (plain.folder / "denoiser" / "snapshots").exists()
    for which in ("last", "ema"):
        assert same(weights(plain.folder / "denoiser" / which), weights(run.folder / "denoiser" / which))

    stale = snapshot_folder(broken.folder, 40)  # of a training that was begun anew
    stale.mkdir(parents=True)
    written = []
    save, draw = denoiser_loop.save_snapshot, DenoisingObjective.forward
    monkeypatch.setattr(denoiser_loop, "save_snapshot", lambda *args: (written.append(args[1]), save(*args)))

    def breaking(objective, batch):
        if batch["seen"] == 56:
            raise KeyboardInterrupt
        return draw(objective, batch)

    with monkeypatch.context() as broke:
        broke.setattr(DenoisingObjective, "forward", breaking)
        with pytest.raises(KeyboardInterrupt):
            train_denoiser(broken)
    assert not stale.exists()
    assert written == [16, 32, 48]
    train_denoiser(broken)
    assert written == [16, 32, 48, 64]
    for images in written:
        assert same(weights(snapshot_folder(broken.folder, images)), weights(snapshot_folder(run.folder, images)))


def test_every_snapshot_is_measured(run, monkeypatch):
    monkeypatch.setattr(features, "load_extractor", lambda *_: colour_extractor())
    codec, held_out = open_codec(run), open_images(run, "val")
    found = {m.name: m for m in measure_convergence(run, codec, held_out)}
    places = (16, 32, 48, 64)
    assert set(found) == {f"{name}@{n}" for name in (LOSS, "convergence-gfd-colour") for n in places}
    losses = [found[f"{LOSS}@{n}"].value for n in places]
    assert losses == sorted(losses, reverse=True)  # it learns
    receipt = found[f"{LOSS}@32"].receipt
    assert (receipt["images_trained"], receipt["of"], receipt["passes"]) == (32, 64, PASSES)
    assert receipt["n"] == min(16, len(held_out))
    assert (receipt["latent_shape"], receipt["data"]) == ([4, 4, 4], held_out.fingerprint)
    assert receipt["tokenizer"] == codec.hash()
    receipt = found["convergence-gfd-colour@32"].receipt
    assert (receipt["images_trained"], receipt["n"], receipt["steps"], receipt["guidance"]) == (32, 16, 2, 2.0)
    assert set(json.loads((run.folder / "metrics.json").read_text())["convergence"]) == set(found)
    again = {m.name: m.value for m in measure_convergence(run, codec, held_out)}
    assert again == {name: m.value for name, m in found.items()}


def test_the_last_snapshot_is_the_pipeline(run):
    pipeline, _ = open_run(run.folder)
    wanted = {name: tensor.clone() for name, tensor in pipeline.conditioner.state_dict().items()}
    load_snapshot(pipeline, snapshot_folder(run.folder, 16))
    assert not same(wanted, pipeline.conditioner.state_dict())
    assert not same(weights(run.folder / "denoiser" / "ema"), pipeline.denoiser.state_dict())
    load_snapshot(pipeline, snapshot_folder(run.folder, 64))
    assert same(wanted, pipeline.conditioner.state_dict())
    assert same(weights(run.folder / "denoiser" / "ema"), pipeline.denoiser.state_dict())


def test_a_missing_snapshot_is_named(run, tmp_path):
    recipe = tiny_recipe(tmp_path, denoiser=SNAPSHOTS, evaluate=MEASURED)
    shutil.copytree(run.folder / "denoiser", recipe.folder / "denoiser")
    shutil.rmtree(snapshot_folder(recipe.folder, 32))
    with pytest.raises(LatelierError, match=r"no snapshots at 32 images.*Train it anew"):
        measure_convergence(recipe, open_codec(run), open_images(run, "val"))


class Knowing(torch.nn.Module):
    """Predicts a share of the noisy latents."""

    def __init__(self, share):
        super().__init__()
        self.share = share

    def forward(self, x, t, condition):
        return self.share * x


def make_images(count, batch):
    normal = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return ({"image": part} for part in normal.split(batch))


def test_the_loss_has_its_closed_form_and_no_batches():
    """Of a prediction of nothing it is E |eps - z|^2 = 2 where both have variance 1; batches do not matter."""
    from latelier.diffusion.process import Flow

    codec = Codec(IdentityTokenizer(), torch.zeros(3), torch.ones(3))
    objective = DenoisingObjective(Knowing(0.0), None, Flow("uniform"), seed=3, dropout=())
    value, n = held_out_loss(objective, codec, make_images(200, 64))
    assert (n, value) == (200, pytest.approx(2, rel=0.02))
    assert held_out_loss(objective, codec, make_images(200, 50))[0] == pytest.approx(value, rel=1e-6)
    objective = DenoisingObjective(Knowing(0.5), None, Flow("uniform"), seed=3, dropout=())
    # E (eps - z - x/2)^2 = E (1 - t/2)^2 + (1 + (1 - t)/2)^2 = 7/12 + 19/12
    assert held_out_loss(objective, codec, make_images(200, 50))[0] == pytest.approx(26 / 12, rel=0.02)
    refused("there are none", held_out_loss, objective, codec, iter([]))


@pytest.mark.parametrize(
    ("values", "level", "images", "at_most"),
    [([4, 2, 1], 3, 150, False), ([4, 2, 1], 2, 200, False), ([4, 5, 1], 2.5, 250, False), ([4, 2, 3], 1.9, None, None),
     ([4, 2, 3], 2.0, 200, False), ([1, 2, 3], 2, 100, True)],
)  # fmt: skip
def test_reaching_a_level(values, level, images, at_most):
    found = reach(list(zip((100, 200, 300), map(float, values))), float(level))
    assert (found and found.images, found and found.at_most) == (images, at_most)


def shown(name, gfd, losses=(), **kind):
    """A run measured after 100, 200 and 300 images."""
    metrics = {f"convergence-gfd-x@{100 * i}": {"value": y, "receipt": {}} for i, y in enumerate(gfd, 1)}
    receipt = {**KIND, **kind}
    metrics |= {f"{LOSS}@{100 * i}": {"value": y, "receipt": receipt} for i, y in enumerate(losses, 1)}
    return RunSummary(name, metrics)


RUNS = [
    shown("many", [90, 60, 30], [1.0, 0.8, 0.6]),
    shown("quick", [60, 30, 10], [0.9, 0.7, 0.5]),
    shown("slow", [90, 80, 70], [1.0, 0.9, 0.8]),
    shown("at once", [20, 15, 10]),
    shown("few", [60, 20, 10], [0.3, 0.2, 0.1], latent_shape=[2, 4, 4]),
    RunSummary("unmeasured", {}),
]


def test_the_table_says_who_is_sooner():
    table = speed_table(RUNS, comparable(RUNS, read_curves(RUNS), "many"), 0)
    beginnings = " ".join(column.split(" ")[0] for column in table.head)
    assert beginnings == "Run gfd-x images sooner loss images sooner"
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["many"] == ["30.00", "300", "1.00x", "0.6000", "300", "1.00x"]
    assert rows["quick"] == ["10.00", "200", "1.50x", "0.5000", "250", "1.20x"]
    assert rows["slow"] == ["70.00", "not reached", "–", "0.8000", "not reached", "–"]
    assert rows["at once"][:3] == ["10.00", "at most 100", "at least 3.00x"]
    assert rows["few"] == ["10.00", "175", "1.71x", "–", "–", "–"]  # another latent shape
    assert rows["unmeasured"] == ["–"] * 6


def test_no_factor_where_both_are_bounds():
    flat = [shown("flat", [20, 40, 30]), shown("other", [10, 20, 30]), shown("later", [50, 40, 20])]
    rows = speed_table(flat, read_curves(flat), 0).rows
    assert [row[2:] for row in rows] == [["at most 100", "–"], ["at most 100", "–"], ["250", "at most 0.40x"]]


def test_the_page_has_a_section(tmp_path):
    write_comparison(tmp_path, "Test", "About.", RUNS, {}, None, baseline="many")
    text = (tmp_path / "table.md").read_text()
    assert "### Convergence" in text
    assert "left out of few" in text
    assert "![Quality of the averaged weights" in text
    assert (tmp_path / "convergence.svg").is_file()
    for baseline in ("unmeasured", "away"):
        assert "has not been measured yet" in str(convergence(RUNS, read_curves(RUNS), baseline))
    assert len(convergence(RUNS, read_curves(RUNS), None)) == 1  # how to read it
    write_comparison(tmp_path / "bare", "Test", "", [RunSummary("bare", {})], {}, None, baseline="bare")
    assert "Convergence" not in (tmp_path / "bare" / "table.md").read_text()


def test_losses_compare_only_between_equal_kinds():
    other = replace(RUNS[1], metrics=shown("", [], [0.9, 0.7, 0.5], loss="l1").metrics)
    curves = read_curves([RUNS[0], other])
    assert set(comparable([RUNS[0], other], curves, "many")[LOSS]) == {0}
    assert set(comparable([RUNS[0], other], curves, None)[LOSS]) == {0, 1}


def test_a_baseline_must_be_a_run(tmp_path):
    assert load_study(write_study(tmp_path, baseline="Plain")).baseline == "Plain"
    with pytest.raises(LatelierError, match="baseline = 'Plane' is no run of study pair; it has Plain, \\+ masking"):
        load_study(write_study(tmp_path, baseline="Plane"))
    study = load_study(write_study(tmp_path), overrides=["baseline=+ masking"])
    assert study.baseline == "+ masking"


def test_the_channel_study_measures_convergence():
    for variant in (None, "emoji", "imagenet"):
        study = load_study("dcae15_channels", variant)
        assert (study.baseline, study.base["denoiser"]["snapshots"]) == ("many", 4)
        assert "convergence" in study.base["evaluate"]["metrics"]
