"""Training that ends at a PSNR: at the first look that finds it, the same after any stop, undisturbed by looking."""

import json

import pytest
import yaml
from safetensors.torch import load_file

from latelier.evaluation.reconstruction import evaluate_reconstruction
from latelier.opening import open_codec, open_images
from latelier.publish import damage, manifest
from latelier.recipe import build_recipe, dump
from latelier.training import tokenizer_loop
from latelier.training.psnr_goal import PsnrGoal
from latelier.training.runtime import Stage
from latelier.training.tokenizer_loop import train_tokenizer
from test_training import Killed, assert_same
from tiny import refused, tiny_recipe

REACHED = 8.45  # dB: after 32 of 64 images
LOOKS = {"until_psnr": REACHED, "psnr_every": 8, "schedule": "constant", "warmup": 0, "preview_every": 64}


def ending(folder, **changes):
    return tiny_recipe(folder, denoiser=None, tokenizer={**LOOKS, **changes})


def weights(recipe):
    return [load_file(recipe.folder / "tokenizer" / "diffusion_pytorch_model.safetensors")]


def facts(recipe):
    return {key: value for key, value in manifest(recipe.folder / "tokenizer").items() if key != "files"}


def looks(recipe):
    """PSNR by images seen, as the log has it."""
    rows = [json.loads(line) for line in (recipe.folder / "log.jsonl").read_text().splitlines()]
    return {row["images"]: row["psnr"] for row in rows if "psnr" in row}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    recipe = ending(tmp_path_factory.mktemp("ended"))
    train_tokenizer(recipe)
    return recipe


def test_training_ends_at_the_first_look_that_finds_it(ended, tmp_path):
    seen = looks(ended)
    end = max(seen)
    assert 8 < end < 64
    assert [images for images, psnr in seen.items() if psnr >= REACHED] == [end]
    assert list(seen) == list(range(8, end + 1, 8))
    assert facts(ended) == {"images": end, "psnr": pytest.approx(seen[end], abs=1e-5)}
    assert (ended.folder / "checkpoints" / f"tokenizer-{end:012d}").is_dir()

    shorter = ending(tmp_path, until_psnr=None, images=end)  # looking leaves training as it is
    train_tokenizer(shorter)
    assert_same(weights(ended), weights(shorter))
    assert facts(shorter) == {"images": end}


def test_what_is_looked_at_is_what_evaluation_measures(ended):
    """The exported, averaged weights on 256 held-out images."""
    settings = ended.evaluate.model_copy(update={"metrics": ["psnr"], "samples": 256, "batch": 8})
    codec, held_out = open_codec(ended), open_images(ended, "val")
    codec.precision = "fp32"
    (measured,) = evaluate_reconstruction(codec, held_out.once(8, limit=256), settings, "held out")
    assert facts(ended)["psnr"] == pytest.approx(measured.value, abs=1e-6)


@pytest.mark.parametrize("where", ["on the way", "before the export"])
def test_a_stopped_training_ends_where_an_uninterrupted_one_does(ended, tmp_path, monkeypatch, where):
    recipe = ending(tmp_path)

    def broken(*args, **kwargs):
        raise Killed

    def advance(self, original=Stage.advance):
        original(self)
        if self.images == 24:
            raise Killed

    with monkeypatch.context() as patch:
        if where == "on the way":
            patch.setattr(Stage, "advance", advance)
        else:
            patch.setattr(tokenizer_loop, "save_codec", broken)
        with pytest.raises(Killed):
            train_tokenizer(recipe)
    train_tokenizer(recipe)
    assert facts(recipe) == facts(ended)
    assert_same(weights(recipe), weights(ended))


def test_a_higher_target_goes_on_and_a_lower_one_is_done(tmp_path, monkeypatch, capfd):
    recipe, higher = ending(tmp_path), REACHED + 0.15
    train_tokenizer(recipe)
    first = facts(recipe)
    with monkeypatch.context() as patch:
        patch.setattr(PsnrGoal, "check", None)  # nothing is trained, nothing looked at
        train_tokenizer(recipe)
        train_tokenizer(ending(tmp_path, until_psnr=REACHED - 0.1))
    assert facts(recipe) == first

    model = recipe.folder / "tokenizer" / "diffusion_pytorch_model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])  # damaged: exported again from the checkpoint
    train_tokenizer(recipe)
    assert damage(recipe.folder / "tokenizer") is None
    assert facts(recipe) == first

    for folder in (tmp_path, tmp_path / "anew"):
        train_tokenizer(ending(folder, until_psnr=higher))
    again, anew = ending(tmp_path), ending(tmp_path / "anew")
    assert first["images"] < facts(again)["images"] < 64
    assert facts(again) == facts(anew)
    assert_same(weights(again), weights(anew))

    capfd.readouterr()
    train_tokenizer(ending(tmp_path, until_psnr=99))
    said = " ".join(capfd.readouterr().err.split())
    assert "tokenizer did not reach until_psnr = 99 after 64 images" in said
    assert facts(recipe)["images"] == 64


def test_only_the_last_phase_ends_early(tmp_path):
    tuning = {"name": "tuning", "images": 32, "train": "decoder"}
    recipe = ending(tmp_path, images=16, until_psnr=1, phases=[tuning])
    assert [recipe.tokenizer.ends_at(number) for number in (0, 1)] == [(16, None), (32, 1.0)]
    assert build_recipe(yaml.safe_load(dump(recipe))) == recipe
    train_tokenizer(recipe)
    rows = [json.loads(line) for line in (recipe.folder / "log.jsonl").read_text().splitlines()]
    assert {row["stage"]: row["images"] for row in rows} == {"tokenizer": 16, "tuning": 8}
    early = {**tuning, "until_psnr": 20}
    message = "'tuning' has until_psnr, but only the last may end early"
    refused(message, ending, tmp_path, phases=[early, {**tuning, "name": "more"}])
    refused(r"until_psnr = 0 is not allowed", ending, tmp_path, until_psnr=0)
