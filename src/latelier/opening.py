"""Open what a recipe names or a run folder holds: images, tokenizer, pipeline. No training loop is imported here."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs
from diffusers.utils.logging import disable_progress_bar

from latelier.conditioning.condition import components
from latelier.conditioning.inputs import cycle_rows
from latelier.data.loader import ImageDataset
from latelier.data.sources import open_source
from latelier.errors import LatelierError
from latelier.pipeline import LatentDiffusionPipeline
from latelier.recipe import Recipe, load_recipe
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.pretrained import PretrainedSection

TIMEOUT, MINUTES = "LATELIER_TIMEOUT", 30.0


def join_processes() -> PartialState:
    """The other processes of this launch, if there are any, and the device.

    A process that waits for another one longer than `$LATELIER_TIMEOUT` minutes (30) gives up. accelerate reads
    ACCELERATE_USE_CPU for an `Accelerator` only, not for a bare `PartialState`, so an `Accelerator` has to come first.
    """
    if not PartialState._shared_state:
        given = os.environ.get(TIMEOUT, MINUTES)
        try:
            wait = timedelta(minutes=float(given))
        except (ValueError, OverflowError):
            raise LatelierError(f"{TIMEOUT} = {given!r} is no number of minutes, such as 30.") from None
        Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=wait)])
    return PartialState()


def best_device() -> torch.device:
    """The device that accelerate would train on."""
    return join_processes().device


def open_images(recipe: Recipe, split: str = "train", size: tuple[int, int] | None = None) -> ImageDataset:
    """The recipe's images as a stream, at another size on demand; unreadable files are noted in the run folder."""
    data = recipe.data.model_copy(update={"image_size": size}) if size else recipe.data
    return ImageDataset(open_source(data, split), data, recipe.seed, skip_log=recipe.folder / "skipped.jsonl")


def open_codec(recipe: Recipe) -> Codec:
    """The run's trained tokenizer."""
    folder = recipe.folder / "tokenizer"
    if not (folder / "config.json").is_file():
        raise LatelierError(f"There is no trained tokenizer in {folder}; run `latelier train tokenizer` first.")
    codec = Codec.from_pretrained(folder, precision="auto")
    codec.tokenizer.requires_grad_(False)
    return codec


def open_pretrained(section: PretrainedSection) -> Codec:
    """A tokenizer that is trained already, from its folder or the Hub.

    Raises:
        LatelierError: if it cannot be opened.
    """
    options = {"subfolder": section.subfolder} if section.subfolder else {}
    return Codec.from_pretrained(section.path, precision="auto", **options)


def open_run(path: Path) -> tuple[LatentDiffusionPipeline, Recipe | None]:
    """The pipeline of a run folder or a saved pipeline, on the fastest device, and the run's recipe."""
    disable_progress_bar()  # of loading; sampling has its own
    folder = path / "pipeline" if (path / "pipeline").is_dir() else path
    if not (folder / "model_index.json").is_file():
        raise LatelierError(f"There is no trained pipeline in {path}; run `latelier run` or `latelier train denoiser`.")
    recipe = load_recipe(path) if (path / "recipe.yaml").is_file() else None
    pipeline = LatentDiffusionPipeline.from_pretrained(folder)
    return pipeline.to(best_device()), recipe


def held_out_records(recipe: Recipe, pipeline: LatentDiffusionPipeline) -> Callable[[int, int], dict[str, Any]]:
    """What tells a pipeline what to draw, when it needs more than a class: held-out records.

    Args:
        recipe: the experiment.
        pipeline: what asks.

    Returns:
        `(first, count) -> records`, nothing for a pipeline that needs none. Records may be fewer than asked for,
        without images that cannot be read; pipelines go through them again, as through too few held-out images.
    """
    if set(components(pipeline.conditioner)) <= {"classes"}:
        return lambda first, count: {}
    held_out = open_images(recipe, "val")

    def records(first: int, count: int) -> dict[str, Any]:
        if recipe.data.streaming:
            batch = next(held_out.once(first + count))
            return {name: cycle_rows(values, range(first, first + count)) for name, values in batch.items()}
        blocks = (torch.arange(n, n + count) % len(held_out) for n in range(first, first + len(held_out), count))
        plans = ([(block, [False] * count)] for block in blocks)
        return next(batch for plan in plans for batch in held_out.follow(plan, whole=False))

    return records


def snapshot_folder(folder: Path, images: int) -> Path:
    """Where a run keeps the weights that its denoiser had after `images` images."""
    return folder / "denoiser" / "snapshots" / str(images)
