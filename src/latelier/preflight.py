"""Before GPU-weeks are spent: open the data, run one step of each stage with every loss term on, and tell the cost."""

from __future__ import annotations

import time
from typing import Any

import torch
from rich.table import Table
from torch import nn

from latelier.data.loader import ImageDataset
from latelier.errors import LatelierError
from latelier.objectives import build_objective
from latelier.recipe import PretrainedRecipe, Recipe, TrainedTokenizer, Training
from latelier.tokenizers import build_tokenizer
from latelier.tokenizers.codec import Codec
from latelier.training import checkpoint, denoiser_loop, tokenizer_loop
from latelier.training.runtime import adamw, console, make_accelerator, peak_memory

TIMED_STEPS = 3


def check(recipe: Recipe) -> list[dict[str, Any]]:
    """Try a recipe without training it; prints a table and returns its rows.

    Raises:
        LatelierError: for whatever would stop the run later.
    """
    dataset = tokenizer_loop.open_images(recipe)
    classes = f", {len(dataset.class_names)} classes" if dataset.class_names else ""
    console.print(f"Data: {len(dataset):,} pictures of {' x '.join(map(str, dataset.shape))}{classes}.")
    codec, rows = _codec(recipe), []
    if isinstance(recipe.tokenizer, TrainedTokenizer):
        objective = build_objective(recipe.tokenizer, recipe.seed, codec.tokenizer)
        rows.append(_try("tokenizer", recipe.tokenizer, objective, lambda n: next(dataset.stream(n))))
    if recipe.denoiser is not None:
        objective = denoiser_loop.build_objective(recipe, codec, dataset.class_names)
        rows.append(_try("denoiser", recipe.denoiser, objective, lambda n: _latents(codec, dataset, n)))
    console.print(_table(rows))
    return rows


def _codec(recipe: Recipe) -> Codec:
    if isinstance(recipe.tokenizer, PretrainedRecipe):
        return Codec.from_pretrained(recipe.tokenizer.path, precision="auto")
    codec = Codec(build_tokenizer(recipe), precision="auto")
    codec.latent_shape(*recipe.data.image_size)
    return codec


def _latents(codec: Codec, dataset: ImageDataset, n: int) -> dict[str, Any]:
    batch = next(dataset.stream(n))
    with torch.no_grad():
        posterior = codec.posterior(batch.pop("image").to(codec.device))
    return {**batch, "mean": posterior.mean, "std": posterior.std}


def _try(name: str, training: Training, objective: nn.Module, batch_of) -> dict[str, Any]:
    """One warming step and a few timed ones, on a micro-batch of the recipe."""
    accelerator = make_accelerator(training)
    micro = training.micro_batch or -(-training.batch // accelerator.num_processes)
    parameters = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    optimizer = adamw(objective.to(accelerator.device), training)
    ema = checkpoint.make_ema(objective, training.ema)
    objective, optimizer = accelerator.prepare(objective, optimizer)
    batch = tokenizer_loop.to_device(batch_of(micro), accelerator.device)
    seconds = []
    for _ in range(1 + TIMED_STEPS):
        start = time.perf_counter()
        terms = objective(batch)
        if bad := terms.non_finite():
            raise LatelierError(f"{name}: the loss term {', '.join(bad)} is not finite on the very first step.")
        accelerator.backward(terms.total)
        optimizer.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.step(checkpoint.trained(objective))
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    speed = micro * accelerator.num_processes / sorted(seconds[1:])[TIMED_STEPS // 2]
    return {
        "stage": name,
        "parameters": parameters,
        "terms": {k: round(v.item(), 4) for k, v in terms.losses.items()},
        "images_per_second": speed,
        "memory_gb": peak_memory(accelerator.device),
        "hours": training.images / speed / 3600,
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("stage", "parameters", "loss terms", "img/s", "peak memory", "expected time")
    for row in rows:
        terms = "  ".join(f"{k} {v}" for k, v in row["terms"].items())
        hours = row["hours"]
        expected = f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"
        table.add_row(
            row["stage"], f"{row['parameters']:,}", terms, f"{row['images_per_second']:,.0f}",
            f"{row['memory_gb']:.1f} GB", expected,
        )  # fmt: skip
    return table
