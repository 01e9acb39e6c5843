"""Run by test_distributed.py on each of two processes: train both stages, tell the weights' hash, evaluate."""

import hashlib
import sys
from dataclasses import replace
from pathlib import Path

import torch

from latelier import evaluate
from latelier.evaluation import generation, reconstruction
from latelier.evaluation.metrics import METRICS
from latelier.recipe import Recipe
from latelier.training import denoiser_loop, tokenizer_loop
from latelier.training.runtime import Stage, make_accelerator
from tiny import colour_extractor, tiny_recipe

TOKENIZER = {  # masked pretraining on noisy latents; decoder tuning, moved, against a discriminator, for 32 images
    "ema": 0, "regularise": [{"kind": "noise", "level": 0.3}],
    "phases": [
        {"name": "tuning", "images": 64, "until_psnr": 12.9, "psnr_every": 8, "train": "decoder", "mask_ratio": 0,
         "kl_weight": 0, "lr": 1e-3,
         "sample_posterior": False, "regularise": [{"kind": "equivariance", "least": 0.5}],
         "adversarial": {"layers": 1, "channels": 8, "start": 8, "ahead": 8}},
    ],
}  # fmt: skip

EVALUATE = {"metrics": ["l1", "psnr", "rfd", "gfd", "fdr", "kid", "precision", "recall", "objects"]}
SCENES = {"source": "scenes", "classes": ["banana", "rocket"], "flip": False, "val_fraction": 0.96}
EVALUATE |= {"samples": 46, "batch": 5, "every": 40, "every_samples": 6}  # on the way, by the main process
TRAINED: list[torch.nn.Module] = []  # what stepped, tokenizers and discriminators alike


def remember(self, objective, *rest, original=Stage.clip):
    """Clip, and keep what is trained."""
    original(self, objective, *rest)
    if not any(objective is one for one in TRAINED):
        TRAINED.append(objective)


def two_stages(folder: Path) -> Recipe:
    """The recipe that one process and two train."""
    align = {"teacher": str(folder / "tiny"), "depth": 1, "width": 8, "until": 32}  # its own tokenizer, half the time
    return tiny_recipe(folder, data=SCENES, tokenizer=TOKENIZER, denoiser={"ema": 0, "align": align}, evaluate=EVALUATE)


def digest() -> str:
    """Hash of this process's trained weights."""
    content = b"".join(p.detach().numpy().tobytes() for model in TRAINED for p in model.parameters())
    return f"{len(TRAINED)} {hashlib.sha256(content).hexdigest()}"


def see_colours() -> None:
    """Features that are mean colours, instead of a network's."""
    for module in (generation, reconstruction):
        module.load_extractors = lambda names, device: [colour_extractor()]
    evaluate.load_extractor = lambda name: colour_extractor()
    METRICS["fdr"] = replace(METRICS["fdr"], images=2)


def main(folder: Path) -> None:
    """Both stages, on this process."""
    torch.set_num_threads(1)
    recipe = two_stages(folder)
    see_colours()
    Stage.clip = remember
    for name, section, train in (
        ("tokenizer", recipe.tokenizer, tokenizer_loop.train_tokenizer),
        ("denoiser", recipe.denoiser, denoiser_loop.train_denoiser),
    ):
        accelerator = make_accelerator(section)
        assert accelerator.num_processes == 2
        train(recipe, accelerator)
        (folder / f"{name}-{accelerator.process_index}.txt").write_text(digest())
        TRAINED.clear()
        accelerator.wait_for_everyone()
    measured = evaluate.evaluate(recipe)
    (folder / f"measured-{accelerator.process_index}.txt").write_text(" ".join(m.name for m in measured))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
