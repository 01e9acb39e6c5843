"""Two gloo processes: bit-equal to each other, and equal to one process at the same global batch."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from latelier.training.denoiser_loop import train_denoiser
from latelier.training.tokenizer_loop import train_tokenizer
from tiny import tiny_recipe
from two_processes import TOKENIZER

HERE = Path(__file__).parent


def test_two_processes_equal_one(tmp_path):
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
    recipe = tiny_recipe(one, tokenizer=TOKENIZER, denoiser={"ema": 0})
    train_tokenizer(recipe)
    train_denoiser(recipe)
    for part in ("tokenizer", "pipeline/denoiser", "pipeline/conditioner"):
        name = f"tiny/{part}/diffusion_pytorch_model.safetensors"
        a, b = load_file(two / name), load_file(one / name)
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")
