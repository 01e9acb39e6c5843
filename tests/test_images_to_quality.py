"""Snapshots that are measured while a denoiser is trained, and how many images it takes to a quality."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from latelier.denoisers.objective import DenoiserSection, DenoisingObjective
from latelier.evaluation import features, generation
from latelier.evaluation.curves import reach
from latelier.evaluation.generation import images_to, measure_convergence
from latelier.evaluation.metrics import METRICS, better
from latelier.evaluation.results import NOT_REACHED, Measurement, write_measurements
from latelier.opening import open_codec, open_images, snapshot_folder
from latelier.report.run import write_report
from latelier.report.tables import RunSummary, measured, read_metrics
from latelier.training import denoiser_loop
from latelier.training.denoiser_loop import train_denoiser
from latelier.training.tokenizer_loop import train_tokenizer
from tiny import colour_extractor, refused, tiny_recipe

EVERY = {"metrics": ["gfd"], "every": 20, "every_samples": 8, "batch": 8, "samples": 16}
PLACES = (24, 40, 64)  # whole steps of 8 at multiples of 20, and the end
NAME = "convergence-gfd-colour"


def weights(folder):
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def written(recipe):
    return json.loads((recipe.folder / "metrics.json").read_text())["convergence"]


@pytest.fixture(autouse=True)
def colours(monkeypatch):
    monkeypatch.setattr(features, "load_extractor", lambda *_: colour_extractor())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run that was measured on the way."""
    recipe = tiny_recipe(tmp_path_factory.mktemp("run"), evaluate=EVERY)
    train_tokenizer(recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "load_extractor", lambda *_: colour_extractor())
        train_denoiser(recipe)
    return recipe


def like(run, folder, **changes):
    """A recipe on the same tokenizer, not trained yet."""
    recipe = tiny_recipe(folder, **{"evaluate": EVERY, **changes})
    shutil.copytree(run.folder / "tokenizer", recipe.folder / "tokenizer")
    return recipe


def test_snapshots_lie_at_multiples_and_at_the_end():
    section = DenoiserSection(images=64, batch=8)
    assert section.snapshots_at(20) == list(PLACES)
    assert section.snapshots_at(16) == [16, 32, 48, 64]
    assert section.snapshots_at(100) == [64]
    assert DenoiserSection(images=64, batch=8, snapshots=2).snapshots_at(20) == [24, 32, 40, 64]


def test_snapshots_are_measured_on_the_way_and_training_stays_as_it_is(run, tmp_path):
    found = written(run)
    assert list(found) == [f"{NAME}@{images}" for images in PLACES]
    receipt = found[f"{NAME}@40"]["receipt"]
    assert (receipt["images_trained"], receipt["n"], receipt["n_reference"], receipt["steps"]) == (40, 8, 8, 2)
    plain = like(run, tmp_path, evaluate={"metrics": ["gfd"]})
    train_denoiser(plain)
    for which in ("last", "ema"):
        assert same(weights(plain.folder / "denoiser" / which), weights(run.folder / "denoiser" / which))


def test_what_is_measured_is_not_measured_again(run, tmp_path, monkeypatch):
    """Killed after a snapshot and before its measurement, a run goes on from 48 and measures it, and no other twice."""
    recipe = like(run, tmp_path)
    forward, measure, drawn = DenoisingObjective.forward, generation.evaluate_generation, []

    def breaking(objective, batch):
        if batch["seen"] == 56:
            raise KeyboardInterrupt
        return forward(objective, batch)

    def counting(samples, references, evaluate, receipt, *rest):
        drawn.append(receipt["images_trained"])
        return measure(samples, references, evaluate, receipt, *rest)

    with monkeypatch.context() as broke:
        broke.setattr(DenoisingObjective, "forward", breaking)
        broke.setattr(denoiser_loop, "measure_snapshots", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            train_denoiser(recipe)
    monkeypatch.setattr(generation, "evaluate_generation", counting)
    train_denoiser(recipe)
    assert drawn == list(PLACES)
    assert {name: one["value"] for name, one in written(recipe).items()} == {
        name: one["value"] for name, one in written(run).items()
    }
    found = measure_convergence(recipe, open_codec(recipe), open_images(recipe, "val"))
    assert drawn == list(PLACES)
    assert {one.name: one.value for one in found} == {name: one["value"] for name, one in written(run).items()}
    more = recipe.evaluate.model_copy(update={"every_samples": 16})
    again = recipe.model_copy(update={"evaluate": more})
    measure_convergence(again, open_codec(recipe), open_images(recipe, "val"))
    assert drawn == [*PLACES, *PLACES]
    shutil.rmtree(snapshot_folder(recipe.folder, 40))
    refused("no snapshots at 40 images", measure_convergence, again, open_codec(recipe), open_images(recipe, "val"))


@pytest.mark.parametrize(
    ("values", "level", "higher", "images"),
    [([400, 200, 100], 300, False, math.sqrt(100 * 1000)), ([400, 200, 100], 200, False, 1000),
     ([0.1, 0.2, 0.6], 0.3, True, 1000 * 10**0.25), ([400, 200, 100], 99, False, None)],
)  # fmt: skip
def test_between_snapshots_images_are_logarithmic(values, level, higher, images):
    curve = list(zip((100, 1000, 10_000), map(float, values)))
    found = reach(curve, float(level), higher, logarithmic=True)
    assert (found and found.images) == (images if images is None else pytest.approx(images))
    assert reach([(100, 5.0)], 5.0).at_most


def test_a_quality_that_is_not_reached_is_no_number(tmp_path):
    curve = {100: 400.0, 1000: 200.0, 10_000: 100.0}
    found = [Measurement(f"convergence-gfd-x@{n}", y, {"images_trained": n, "n": 8}) for n, y in curve.items()]
    results = [one for level in (300.0, 50.0, 500.0) for one in images_to(found, {"gfd": level})]
    values = {one.name: one.value for one in results}
    assert values["images-to-gfd-300"] == pytest.approx(10**2.5)
    assert results[0].receipt["curve"] == list(curve.items())
    assert results[1].receipt[NOT_REACHED] == "gfd 50 was not reached by 10,000 images"
    assert images_to([], {"gfd": 50.0}) == []

    write_measurements(tmp_path / "metrics.json", [*found, *results], "convergence")
    text = (tmp_path / "metrics.json").read_text()
    assert json.loads(text)["convergence"]["images-to-gfd-50"]["value"] is None
    assert "NaN" not in text
    table = measured([RunSummary("a", read_metrics(tmp_path)), RunSummary("b", {})], list(values))
    assert table.rows == [["a", "316.2", "not reached", "at most 100.0"], ["b", "–", "–", "–"]]
    page = write_report(tmp_path).read_text()
    assert "gfd 300 was reached after 316 images. gfd 50 was not reached by 10,000 images. gfd 500 was" in page
    assert "reached after at most 100 images" in page


def test_directions_of_what_is_followed():
    assert better("images-to-gfd-200") == "lower"
    assert better("convergence-gfd-vgg16@64") == "lower"
    assert better("convergence-loss@64") == "lower"
    assert better("convergence-precision@64") == METRICS["precision"].better["precision"] == "higher"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluate": {"metrics": ["psnr"], "every": 8}}, "evaluate.every measures gfd .* evaluate.metrics has no gfd"),
        ({"evaluate": {"every": 8}, "denoiser": None}, "but there is no denoiser"),
        ({"evaluate": {"quality": {"gfd": 3}}}, r"evaluate.quality: 'gfd' is not followed .* set evaluate.every"),
        ({"evaluate": {"every": 8, "quality": {"psnr": 3}}}, r"evaluate.quality: 'psnr' is not followed"),
        ({"evaluate": {"every": 8, "quality": {"gdf": 3}}}, r"did you mean 'gfd'"),
    ],
)
def test_what_cannot_be_followed(tmp_path, changes, message):
    refused(message, tiny_recipe, tmp_path, **changes)


def test_objects_are_followed_in_scenes_and_left_out_elsewhere(run, tmp_path):
    changes = {"evaluate": {**EVERY, "every": 64, "metrics": ["gfd", "objects"], "quality": {"objects": 0.9}}}
    scenes = {"source": "scenes", "image_size": 32, "length": 16, "classes": ["owl", "key"], "flip": False}
    recipe = tiny_recipe(tmp_path / "scenes", data=scenes, **changes)
    train_tokenizer(recipe)
    train_denoiser(recipe)
    found = written(recipe)
    assert list(found) == [f"{NAME}@64", "convergence-objects@64"]
    assert found["convergence-objects@64"]["value"] < 0.9
    assert found["convergence-objects@64"]["receipt"]["threshold"] > 0
    other = like(run, tmp_path / "other", evaluate={**EVERY, "metrics": ["gfd", "objects"]})
    train_denoiser(other)
    assert not any("objects" in name for name in written(other))
