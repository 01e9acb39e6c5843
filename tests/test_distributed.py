"""Two gloo processes: bit-equal to each other, equal to one process at the same global batch, and evaluated alike."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from latelier import evaluate
from latelier.evaluation import generation, reconstruction
from latelier.evaluation.metrics import METRICS
from latelier.recipe import dump
from latelier.training.denoiser_loop import train_denoiser
from latelier.training.tokenizer_loop import train_tokenizer
from tiny import colour_extractor, tiny_recipe
from two_processes import EVALUATE, two_stages

HERE = Path(__file__).parent
FOLLOWED = [f"convergence-gfd-colour@{images}" for images in (40, 64)]


def test_two_processes_equal_one(tmp_path, monkeypatch):
    two, one = tmp_path / "two", tmp_path / "one"
    two.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [*command, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(HERE / "two_processes.py"), str(two)],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for stage in ("tokenizer", "denoiser"):
        assert (two / f"{stage}-0.txt").read_text() == (two / f"{stage}-1.txt").read_text()

    assert (two / "tokenizer-0.txt").read_text().startswith("3 ")  # two phases and a discriminator
    assert_evaluated_as_by_one(two, monkeypatch)
    recipe = two_stages(one)
    train_tokenizer(recipe)
    train_denoiser(recipe)
    ended = [json.loads((run / "tiny" / "tokenizer" / "manifest.json").read_text()) for run in (two, one)]
    assert [about["images"] for about in ended] == [32, 32]
    for part in ("tokenizer", "pipeline/denoiser", "pipeline/conditioner"):
        assert_equal_weights(two, one, part)


def assert_equal_weights(two, one, part):
    a, b = (load_file(f / "tiny" / part / "diffusion_pytorch_model.safetensors") for f in (two, one))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")


def assert_evaluated_as_by_one(folder, monkeypatch):
    """The very numbers that one process finds for the same run, returned by only one of two."""
    returned = [(folder / f"measured-{i}.txt").read_text().split() for i in range(2)]
    assert returned[1] == []
    images = ["l1", "psnr", "rfd-colour", "gfd-colour", "kid-colour", "precision", "recall", "fdr-colour"]
    assert returned[0][:10] == [*images, "objects-reconstructed", "objects"]
    assert [name for name in returned[0] if name.startswith("convergence-gfd")] == FOLLOWED
    file = folder / "tiny" / "metrics.json"
    by_two = json.loads(file.read_text())
    file.unlink()
    for module in (generation, reconstruction):
        monkeypatch.setattr(module, "load_extractors", lambda names, device: [colour_extractor()])
    monkeypatch.setattr(evaluate, "load_extractor", lambda name: colour_extractor())
    monkeypatch.setitem(METRICS, "fdr", replace(METRICS["fdr"], images=2))
    monkeypatch.setenv("LATELIER_CACHE", str(folder / "another"))
    evaluate.evaluate(two_stages(folder))
    by_one = json.loads(file.read_text())
    for section in ("reconstruction", "generation", "convergence"):
        assert list(by_one[section]) == list(by_two[section])
        for name, entry in by_one[section].items():
            assert (entry["value"], entry["interval"]) == (
                by_two[section][name]["value"],
                by_two[section][name]["interval"],
            ), name
            least = EVALUATE["batch"] * (1 if section == "convergence" else 2)
            assert entry["receipt"]["n"] == by_two[section][name]["receipt"]["n"] > least


def test_the_documented_command_is_one_run_of_two_processes(tmp_path):
    page = (HERE.parent / "docs" / "multi-gpu.md").read_text()
    (command,) = re.findall(r"^ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 .* run quickstart$", page, re.M)
    changes = {"tokenizer": {"ema": 0, "images": 32}, "denoiser": None, "evaluate": {"metrics": ["psnr"], "samples": 4}}
    (tmp_path / "tiny.yaml").write_text(dump(tiny_recipe(tmp_path / "two", **changes)))
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": "localhost:0",  # torchrun at a free port
    }  # fmt: skip
    done = subprocess.run(
        command.replace("quickstart", "tiny.yaml"), shell=True, cwd=tmp_path, env=environment, capture_output=True,
        text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "two" / "tiny"
    assert [folder.name for folder in run.parent.iterdir()] == ["tiny"]
    assert (done.stdout + done.stderr).count("Try next:") == 1
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["images"] for row in rows] == [8, 16, 24, 32]  # a second run would log them again
    states = {path.name for path in (run / "checkpoints" / "tokenizer-000000000032").glob("random_states_*")}
    assert states == {"random_states_0.pkl", "random_states_1.pkl"}
    train_tokenizer(tiny_recipe(tmp_path / "one", **changes))
    assert_equal_weights(tmp_path / "two", tmp_path / "one", "tokenizer")
