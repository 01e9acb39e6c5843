"""Stage 1: train a tokenizer, measure its latent statistics, and save both as `tokenizer/`."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from latelier.data.latents import latent_statistics
from latelier.data.loader import ImageDataset
from latelier.data.sources import open_source
from latelier.errors import LatelierError
from latelier.images import make_pairs, save_png
from latelier.objectives import build_objective
from latelier.recipe import PretrainedRecipe, Recipe, TrainedTokenizer
from latelier.tokenizers import build_tokenizer
from latelier.tokenizers.codec import Codec, check_size, is_convolutional
from latelier.training import checkpoint
from latelier.training.runtime import Stage, adamw, compile_model, console, make_accelerator

STATISTICS_IMAGES = 10_000
PREVIEW_IMAGES = 16


def train_tokenizer(recipe: Recipe, accelerator: Accelerator | None = None) -> Path:
    """Train the recipe's tokenizer, or go on where a stopped run left it.

    Returns:
        The folder with weights, configuration and latent statistics; `Codec.from_pretrained` opens it.
    """
    folder = recipe.folder / "tokenizer"
    dataset = open_images(recipe)
    if not isinstance(recipe.tokenizer, TrainedTokenizer):
        return import_tokenizer(recipe, dataset, folder)
    training = recipe.tokenizer
    accelerator = accelerator or make_accelerator(training)
    stage = Stage("tokenizer", recipe, training, accelerator)

    torch.manual_seed(recipe.seed)
    tokenizer = build_tokenizer(recipe)
    check_size(recipe.data.image_size, Codec(tokenizer).factor)
    objective = build_objective(training, recipe.seed, tokenizer)
    if is_convolutional(tokenizer):
        objective.to(memory_format=torch.channels_last)
    objective.to(accelerator.device)
    if training.compile:
        compile_model(tokenizer)
    optimizer = adamw(objective, training)
    ema = checkpoint.make_ema(objective, training.ema)
    objective, optimizer = accelerator.prepare(objective, optimizer)
    stage.images = checkpoint.resume(recipe.folder, stage.name, accelerator, ema, objective)
    if stage.images >= training.images and (folder / "config.json").is_file():
        return folder

    stream = dataset.stream(
        training.batch, stage.images, accelerator.process_index, accelerator.num_processes, stage.accumulation
    )
    with stage.running():
        while stage.images < training.images:
            stage.set_learning_rate(optimizer)
            for micro in range(stage.accumulation):
                batch = to_device(next(stream), accelerator.device)
                stage.backward(objective, batch, last=micro == stage.accumulation - 1)
            stage.update(objective, optimizer, ema, batch)

            with stage.paused():
                if stage.due(training.preview_every) and accelerator.is_main_process:
                    save_preview(recipe.folder, stage, accelerator.unwrap_model(objective).tokenizer, batch["image"])
                if stage.due(training.checkpoint_every) or stage.should_stop():
                    checkpoint.save(
                        recipe.folder, stage.name, stage.images, accelerator, ema, objective, training.keep_checkpoints
                    )
            if stage.should_stop() and stage.images < training.images:
                stage.say_goodbye()

    checkpoint.export_ema(objective, ema)
    tokenizer = accelerator.unwrap_model(objective).tokenizer.eval()
    save_codec(Codec(tokenizer, precision=training.precision), dataset, recipe, folder, accelerator)
    return folder


def open_images(recipe: Recipe, split: str = "train") -> ImageDataset:
    """The recipe's pictures as a stream; unreadable files are noted in the run folder."""
    return ImageDataset(
        open_source(recipe.data, split), recipe.data, recipe.seed, skip_log=recipe.folder / "skipped.jsonl"
    )


def import_tokenizer(recipe: Recipe, dataset: ImageDataset, folder: Path) -> Path:
    """A tokenizer that needs no training: pixels, or one that is trained already; its statistics are measured here."""
    if isinstance(recipe.tokenizer, PretrainedRecipe):
        options = {"subfolder": recipe.tokenizer.subfolder} if recipe.tokenizer.subfolder else {}
        try:
            codec = Codec.from_pretrained(recipe.tokenizer.path, precision="auto", **options)
        except OSError as error:
            raise LatelierError(
                f"tokenizer.path = {recipe.tokenizer.path!r} cannot be opened ({str(error).splitlines()[0]})."
            ) from None
        if codec.image_channels != recipe.data.channels:
            raise LatelierError(
                f"data.channels = {recipe.data.channels}, but the tokenizer {recipe.tokenizer.path} takes "
                f"{codec.image_channels}."
            )
    else:
        codec = Codec(build_tokenizer(recipe))
    check_size(recipe.data.image_size, codec.factor)
    accelerator = Accelerator()
    if accelerator.is_main_process and not (folder / "config.json").is_file():
        save_codec(codec, dataset, recipe, folder, None)
    accelerator.wait_for_everyone()
    return folder


def save_codec(
    codec: Codec, dataset: ImageDataset, recipe: Recipe, folder: Path, accelerator: Accelerator | None
) -> None:
    """Measure the latent statistics over the training set and save the tokenizer with them."""
    if codec.mean is None:
        mean, std = latent_statistics(codec, dataset, STATISTICS_IMAGES, recipe.seed, accelerator)
        about = {"images": min(STATISTICS_IMAGES, len(dataset)), "data": dataset.fingerprint, "sampled": True}
        codec = Codec(codec.tokenizer, mean, std, about, codec.precision)
        deviation = f"; standard deviations of its latents: {std.min():.2f} to {std.max():.2f}"
    else:
        deviation = ""
    if accelerator is None or accelerator.is_main_process:
        codec.save_pretrained(folder)
        console.print(f"Tokenizer saved in {folder}{deviation}.")
    if accelerator is not None:
        accelerator.wait_for_everyone()


@torch.no_grad()
def save_preview(folder: Path, stage: Stage, tokenizer: nn.Module, images: torch.Tensor) -> None:
    """Pictures above their reconstructions, nothing masked, through the posterior's mean."""
    images = images[:PREVIEW_IMAGES]
    tokenizer.eval()
    codec = Codec(tokenizer, precision=stage.training.precision)
    pairs = make_pairs(images, codec.decode(codec.encode(images)).clamp(-1, 1), columns=min(8, len(images)))
    save_png(pairs, folder / "previews" / f"{stage.name}-{stage.images:012d}.png")
    tokenizer.train()


def to_device(batch: dict, device: torch.device) -> dict:
    """Tensors of a batch onto the device."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
