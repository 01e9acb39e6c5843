"""What is published is whole, synced and checked; what was damaged or cut off is never taken for finished."""

import json
import shutil

import pytest
import torch

from latelier.errors import LatelierError
from latelier.publish import MANIFEST, damage, manifest, publish, write_whole
from latelier.training import checkpoint
from latelier.training.denoiser_loop import train_denoiser
from latelier.training.tokenizer_loop import train_tokenizer
from test_training import assert_same, newest
from tiny import tiny_recipe


def publish_words(folder, words, **facts):
    with publish(folder, **facts) as temporary:
        (temporary / "part").mkdir()
        (temporary / "part" / "words.txt").write_text(words)


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "thing"
    publish_words(folder, "one", images=8)
    assert manifest(folder)["images"] == 8
    assert damage(folder) is None
    with pytest.raises(TypeError), publish(folder) as temporary:
        (temporary / "half.txt").write_text(0)
    assert (folder / "part" / "words.txt").read_text() == "one"
    publish_words(folder, "two")
    assert (folder / "part" / "words.txt").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]  # nothing is left beside it


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda path: path.unlink(), r"lacks part/words.txt"),
        (lambda path: path.write_text("o"), r"has 1 of 3 bytes in part/words.txt"),
        (lambda path: path.write_text("onE"), r"has changed bytes in part/words.txt"),
        (lambda path: (path.parents[1] / MANIFEST).write_text("{"), r"has no manifest.json"),
    ],
)
def test_damage_is_named(tmp_path, harm, words):
    publish_words(tmp_path / "thing", "one")
    harm(tmp_path / "thing" / "part" / "words.txt")
    assert words in damage(tmp_path / "thing")


def test_a_file_is_the_old_one_or_the_new_one(tmp_path):
    write_whole(tmp_path / "a.json", "old")
    with pytest.raises(TypeError):
        write_whole(tmp_path / "a.json", 3)
    assert (tmp_path / "a.json").read_text() == "old"
    write_whole(tmp_path / "a.json", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    recipe = tiny_recipe(tmp_path_factory.mktemp("whole"))
    train_tokenizer(recipe)
    train_denoiser(recipe)
    return recipe


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "ema.safetensors"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(trained, tmp_path, name, capsys):
    recipe = tiny_recipe(tmp_path)
    shutil.copytree(trained.folder, recipe.folder)
    shutil.rmtree(recipe.folder / "tokenizer")  # not exported yet
    flip_a_bit(checkpoint.checkpoints(recipe.folder, "tokenizer")[-1] / name)
    train_tokenizer(recipe)
    told = " ".join(capsys.readouterr().err.split())
    assert "000000000064 is damaged" in told.replace("- ", "-")
    assert f"has changed bytes in {name}" in told
    assert_same(newest(trained.folder, "tokenizer"), newest(recipe.folder, "tokenizer"))
    for path in checkpoint.checkpoints(recipe.folder, "tokenizer"):
        flip_a_bit(path / name)
    shutil.rmtree(recipe.folder / "tokenizer")
    with pytest.raises(LatelierError, match="All checkpoints of the tokenizer"):
        train_tokenizer(recipe)


def test_a_kill_during_an_export_is_made_good(trained, tmp_path):
    """Weights are there, the rest is not: the next run exports again instead of taking the folder for finished."""
    recipe = tiny_recipe(tmp_path)
    shutil.copytree(trained.folder, recipe.folder)
    for part in ("tokenizer", "pipeline"):
        (recipe.folder / part / MANIFEST).unlink()  # written last
    (recipe.folder / "tokenizer" / "latent_statistics.json").unlink()
    train_tokenizer(recipe)
    train_denoiser(recipe)
    for name in ("tokenizer/latent_statistics.json", "tokenizer/diffusion_pytorch_model.safetensors"):
        assert (recipe.folder / name).read_bytes() == (trained.folder / name).read_bytes()
    assert damage(recipe.folder / "pipeline") is None


def test_a_longer_run_never_keeps_an_older_export(trained, tmp_path):
    """Killed after its last checkpoint and before the export, it goes on to export what it has trained."""
    recipe, longer = (
        tiny_recipe(tmp_path, denoiser=None),
        tiny_recipe(tmp_path, denoiser=None, tokenizer={"images": 96}),
    )
    shutil.copytree(trained.folder, recipe.folder)
    kept = (recipe.folder / "tokenizer", tmp_path / "kept")
    shutil.copytree(*kept)
    train_tokenizer(longer)
    new = json.loads((recipe.folder / "tokenizer" / "latent_statistics.json").read_text())
    shutil.rmtree(recipe.folder / "tokenizer")
    shutil.copytree(*kept[::-1])
    train_tokenizer(longer)
    assert json.loads((recipe.folder / "tokenizer" / "latent_statistics.json").read_text()) == new


def test_a_denoiser_belongs_to_its_tokenizer(trained, tmp_path):
    recipe = tiny_recipe(tmp_path, tokenizer={"images": 96})
    shutil.copytree(trained.folder, recipe.folder)
    train_tokenizer(recipe)
    with pytest.raises(LatelierError, match="was trained on another tokenizer"):
        train_denoiser(recipe)


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    recipe = tiny_recipe(tmp_path, denoiser=None, tokenizer={"images": 8, "lr": 1e38, "warmup": 0})
    with pytest.raises(LatelierError, match=r"The tokenizer at 8 images has weights that are not finite"):
        train_tokenizer(recipe)
    assert not checkpoint.checkpoints(recipe.folder, "tokenizer")
    assert not (recipe.folder / "tokenizer").exists()
    module = torch.nn.Linear(2, 2)
    module.weight.data[0, 0] = torch.nan
    with pytest.raises(LatelierError, match=r"not finite \(weight\), so it is not saved"):
        checkpoint.refuse_non_finite(module, "It", tmp_path, "tokenizer")


def test_a_damaged_export_is_made_again(trained, tmp_path, capsys):
    recipe = tiny_recipe(tmp_path)
    shutil.copytree(trained.folder, recipe.folder)
    weights = recipe.folder / "tokenizer" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    flip_a_bit(weights)
    train_tokenizer(recipe)
    assert weights.read_bytes() == whole
    assert "is damaged (it has changed bytes in" in " ".join(capsys.readouterr().err.split())
    flip_a_bit(weights)
    shutil.rmtree(recipe.folder / "checkpoints")
    with pytest.raises(LatelierError, match=r"is damaged .* put back a copy, or delete it to train it again"):
        train_tokenizer(recipe)
