"""What is said of the images that a run is measured on: held out, or trained on."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from latelier.evaluate import evaluate
from latelier.evaluation.references import describe_images
from latelier.opening import open_images
from latelier.publish import write_whole
from latelier.recipe import dump, load_recipe
from latelier.report.verdict import verdict
from latelier.study.inspect import inspection_recipe
from latelier.training.tokenizer_loop import train_tokenizer
from tiny import tiny_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder that knows `photos`, of which it has seen `photos/train`."""
    folder = tmp_path_factory.mktemp("run")
    noise = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 8)):
        for i in range(count):
            path = folder / "photos" / split / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.integers(0, 255, (32, 32, 3), np.uint8)).save(path)
    recipe = tiny_recipe(folder, denoiser=None, data={"source": str(folder / "photos"), "length": None})
    write_whole(recipe.folder / "recipe.yaml", dump(recipe))
    return recipe


def said(run, *overrides, split="val"):
    recipe = load_recipe(run.folder, overrides)
    about = describe_images(recipe, open_images(recipe, split), split)
    return about["reference"].rpartition(", ")[2], about.get("trained_on")


def test_a_runs_own_splits(run):
    assert said(run) == ("held out", None)
    assert said(run, split="train") == ("training images", None)
    assert said(run, "data.image_size=16") == ("held out", None)


def test_another_source(run):
    photos = run.data.source
    assert said(run, f"data.source={photos}/train") == ("training images", "all of these images")
    assert said(run, f"data.val_source={photos}/train") == ("training images", "all of these images")
    assert said(run, f"data.source={photos}/val", "data.val_fraction=0.5") == ("held out", None)
    assert said(run, f"data.source={photos}/val", split="train") == ("held out", None)
    assert said(run, f"data.val_source={photos}") == ("partly training images", "75% of these images")
    assert said(run, "data.source=emoji") == ("held out", None)


def test_training_images_that_are_gone(run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "tiny")
    shutil.copytree(run.data.source, tmp_path / "photos")
    moved = load_recipe(tmp_path / "tiny", [f"data.source={tmp_path}/lost"])
    write_whole(tmp_path / "tiny" / "recipe.yaml", dump(moved))
    assert said(moved, f"data.source={tmp_path}/photos") == ("perhaps training images", "perhaps some of these images")


def test_an_inspected_tokenizer(run, tmp_path):
    """Nobody knows what one from elsewhere was trained on; one of a run folder has its recipe beside it."""
    photos = f"{run.data.source}/train"
    for tokenizer, reference in ((tmp_path / "vae", photos), (run.folder / "tokenizer", f"{photos}, training images")):
        recipe = inspection_recipe(str(tokenizer), photos, 32, 8, tmp_path / "inspection", [])
        assert describe_images(recipe, open_images(recipe, "val"), "val")["reference"] == reference


def test_an_evaluation_says_so_everywhere(run, capsys):
    train_tokenizer(run)
    metrics = ["evaluate.metrics=[psnr, ms-ssim, spectrum, gmm]"]
    evaluate(load_recipe(run.folder, [f"data.source={run.data.source}/train", "data.val_fraction=0.9", *metrics]))
    told, content = capsys.readouterr().err, json.loads((run.folder / "metrics.json").read_text())
    assert "Trained on all of these images" in told
    for section, name in (("reconstruction", "psnr"), ("latent space", "effective-rank")):
        assert content[section][name]["receipt"]["reference"].endswith("photos/train, training images")
    assert any("The run was trained on all of these images" in finding.sentence for finding in verdict(content))
    page = (run.folder / "report.html").read_text()
    assert "photos/train, training images)" in page
    for name, why in (("ms-ssim", "at least 176 pixels a side"), ("gmm", "A mixture needs 10 images for each mode")):
        assert f"{name} is left out: " in told
        assert why in told
        assert why in page
    evaluate(load_recipe(run.folder, ["evaluate.metrics=[psnr]"]))
    content = json.loads((run.folder / "metrics.json").read_text())
    assert content["reconstruction"]["psnr"]["receipt"]["reference"].endswith("photos, held out")
    assert "ms-ssim" not in content["reconstruction"]  # what an earlier evaluation left out is forgotten
