"""Run by test_distributed.py on each of two processes: train both stages, tell the weights' hash."""

import hashlib
import sys
from pathlib import Path

import torch

from latelier.training import denoiser_loop, tokenizer_loop
from latelier.training.runtime import make_accelerator
from tiny import tiny_recipe


def digest(accelerator) -> str:
    """Hash of this process's trained weights."""
    content = b"".join(p.detach().numpy().tobytes() for p in accelerator._models[-1].parameters())
    return hashlib.sha256(content).hexdigest()


def main(folder: Path) -> None:
    """Both stages, on this process."""
    torch.set_num_threads(1)
    recipe = tiny_recipe(folder, tokenizer={"ema": 0}, denoiser={"ema": 0})
    for name, section, train in (
        ("tokenizer", recipe.tokenizer, tokenizer_loop.train_tokenizer),
        ("denoiser", recipe.denoiser, denoiser_loop.train_denoiser),
    ):
        accelerator = make_accelerator(section)
        assert accelerator.num_processes == 2
        train(recipe, accelerator)
        (folder / f"{name}-{accelerator.process_index}.txt").write_text(digest(accelerator))
        accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
