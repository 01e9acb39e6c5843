"""Two gloo processes: bit-equal to each other, equal to one process at the same global batch, and judged alike."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from latelier import evaluate
from latelier.evaluation import generation, reconstruction
from latelier.training.denoiser_loop import train_denoiser
from latelier.training.tokenizer_loop import train_tokenizer
from tiny import colour_extractor, tiny_recipe
from two_processes import EVALUATE, TOKENIZER

HERE = Path(__file__).parent


def test_two_processes_equal_one(tmp_path, monkeypatch):
    two, one = tmp_path / "two", tmp_path / "one"
    two.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    done = subprocess.run(
        [*command, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(HERE / "two_processes.py"), str(two)],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for stage in ("tokenizer", "denoiser"):
        assert (two / f"{stage}-0.txt").read_text() == (two / f"{stage}-1.txt").read_text()

    assert (two / "tokenizer-0.txt").read_text().startswith("3 ")  # two phases and a discriminator
    assert_judged_as_by_one(two, monkeypatch)
    recipe = tiny_recipe(one, tokenizer=TOKENIZER, denoiser={"ema": 0})
    train_tokenizer(recipe)
    train_denoiser(recipe)
    for part in ("tokenizer", "pipeline/denoiser", "pipeline/conditioner"):
        name = f"tiny/{part}/diffusion_pytorch_model.safetensors"
        a, b = load_file(two / name), load_file(one / name)
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")


def assert_judged_as_by_one(folder, monkeypatch):
    """The very numbers that one process finds for the same run, and only one of two that tells them."""
    told = [(folder / f"measured-{i}.txt").read_text().split() for i in range(2)]
    assert told[1] == []
    assert told[0] == ["l1", "psnr", "rfd-colour", "gfd-colour", "kid-colour", "precision", "recall"]
    file = folder / "tiny" / "metrics.json"
    by_two = json.loads(file.read_text())
    file.unlink()
    for module in (generation, reconstruction):
        monkeypatch.setattr(module, "load_extractors", lambda names, device: [colour_extractor()])
    monkeypatch.setattr(evaluate, "load_extractor", lambda name: colour_extractor())
    monkeypatch.setenv("LATELIER_CACHE", str(folder / "another"))
    evaluate.evaluate(tiny_recipe(folder, tokenizer=TOKENIZER, denoiser={"ema": 0}, evaluate=EVALUATE))
    by_one = json.loads(file.read_text())
    for section in ("reconstruction", "generation"):
        assert list(by_one[section]) == list(by_two[section])
        for name, entry in by_one[section].items():
            assert (entry["value"], entry["interval"]) == (
                by_two[section][name]["value"],
                by_two[section][name]["interval"],
            ), name
            assert entry["receipt"]["n"] == by_two[section][name]["receipt"]["n"] > 2 * EVALUATE["batch"]
