"""Stage 1: train a tokenizer in one or more phases, measure its latent statistics, and save both as `tokenizer/`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from torch import nn

from latelier.data.latents import latent_statistics
from latelier.data.loader import ImageDataset
from latelier.errors import LatelierError
from latelier.images import make_pairs, save_png
from latelier.objectives.adversarial import Adversary
from latelier.opening import open_images, open_pretrained
from latelier.recipe import Recipe, TrainedTokenizer
from latelier.terminal import console
from latelier.tokenizers import (
    build_objective,
    build_perceptual,
    build_tokenizer,
    last_layer,
    model_class,
    tokenizer_info,
)
from latelier.tokenizers.codec import Codec, check_size
from latelier.tokenizers.pretrained import PretrainedSection
from latelier.training import checkpoint
from latelier.training.rival import Rival
from latelier.training.runtime import Stage, adamw, compile_model, make_accelerator, to_device

STATISTICS_IMAGES = 10_000
PREVIEW_IMAGES = 16


def train_tokenizer(recipe: Recipe, accelerator: Accelerator | None = None) -> Path:
    """Train the recipe's tokenizer through all its phases, or go on where a stopped run left it.

    Returns:
        The folder with weights, configuration and latent statistics; `Codec.from_pretrained` opens it.
    """
    if not isinstance(recipe.tokenizer, TrainedTokenizer):
        return import_tokenizer(recipe, open_images(recipe), recipe.folder / "tokenizer")
    before = 0
    for number in range(1 + len(recipe.tokenizer.phases)):
        section = recipe.tokenizer.phase(number)[1]
        train_phase(recipe, number, before, accelerator or make_accelerator(section))
        before += section.images
    return recipe.folder / "tokenizer"


def train_phase(recipe: Recipe, number: int, before: int, accelerator: Accelerator) -> None:
    """One phase: its own optimiser, averages, schedule and checkpoints, on the weights of the phase before.

    Args:
        recipe: the experiment; its tokenizer is one that is trained.
        number: of the phase, 0 for the section itself.
        before: images seen by the earlier phases.
        accelerator: process group and device.
    """
    name, training = recipe.tokenizer.phase(number)  # type: ignore[union-attr]
    folder = phase_folder(recipe, number)
    if (folder / "config.json").is_file() and checkpoint.images_trained(recipe.folder, name) >= training.images:
        return
    _refuse_later_phases(recipe, number)
    dataset = open_images(recipe, size=training.image_size)
    torch.manual_seed(recipe.seed)
    tokenizer = open_phase(recipe, number)
    check_sizes(recipe, Codec(tokenizer).factor)
    objective = build_adversarial_objective(training, recipe.seed, tokenizer, dataset)
    if (
        tokenizer_info(tokenizer).channels_last and accelerator.device.type != "cpu"
    ):  # there GroupNorm's backward is slow in it
        objective.to(memory_format=torch.channels_last)
    objective.to(accelerator.device)
    if training.compile:
        compile_model(tokenizer)
    adversary: Adversary | None = objective.adversary  # type: ignore[assignment]
    stage = Stage(name, recipe, training, accelerator)
    optimizer = adamw(objective, training)
    ema = checkpoint.make_ema(objective, training.ema)
    objective, optimizer = accelerator.prepare(objective, optimizer)
    rival = Rival(adversary, training, accelerator) if adversary is not None else None
    stage.images = checkpoint.resume(recipe.folder, stage.name, accelerator, ema, objective)

    stream = dataset.stream(
        training.batch, before + stage.images, accelerator.process_index, accelerator.num_processes, stage.accumulation
    )
    with stage.running():
        while stage.images < training.images:
            stage.set_learning_rate(optimizer)
            for micro in range(stage.accumulation):
                batch = to_device({**next(stream), "seen": stage.images}, accelerator.device)
                last = micro == stage.accumulation - 1
                terms = stage.backward(objective, batch, last)
                if rival is not None:
                    rival.backward(stage, batch, terms, last)
            if rival is not None:
                rival.update(stage, batch)
            stage.update(objective, optimizer, ema, batch)

            with stage.paused():
                if stage.due(training.preview_every) and accelerator.is_main_process:
                    save_preview(recipe.folder, stage, accelerator.unwrap_model(objective).tokenizer, batch["image"])
                if stage.due(training.checkpoint_every) or stage.should_stop():
                    checkpoint.save(
                        recipe.folder, stage.name, stage.images, accelerator, ema, objective, training.keep_checkpoints
                    )
            if stage.should_stop() and stage.images < training.images:
                stage.exit_resumable()

    checkpoint.export_ema(objective, ema)
    tokenizer = accelerator.unwrap_model(objective).tokenizer.eval()
    accelerator.free_memory()
    if number == len(recipe.tokenizer.phases):  # type: ignore[union-attr]
        tokenizer = fit(tokenizer, recipe.data.image_size)
        save_codec(Codec(tokenizer, precision=training.precision), open_images(recipe), recipe, folder, accelerator)
    elif accelerator.is_main_process:
        tokenizer.save_pretrained(folder)
    accelerator.wait_for_everyone()


def build_adversarial_objective(training: TrainedTokenizer, seed: int, tokenizer: ModelMixin, dataset: ImageDataset):
    """The objective, and `adversary`, whose term is added to its own."""
    perceptual = build_perceptual(training)
    adversary = None
    if training.adversarial is not None:
        adversary = Adversary(training.adversarial, seed, tokenizer.config["in_channels"])  # type: ignore[index]
    objective = build_objective(training, seed, tokenizer, perceptual, dataset)
    objective.adversary = adversary
    if adversary is not None:
        objective.register_forward_hook(
            lambda _, given, terms: adversary.add(terms, terms.reconstruction, last_layer(tokenizer), given[0])
        )
    return objective


def check_sizes(recipe: Recipe, factor: int) -> None:
    """Refuse sizes that the tokenizer's factor does not divide, those of later phases too, before the first begins."""
    section = recipe.tokenizer
    assert isinstance(section, TrainedTokenizer)
    for number in range(1 + len(section.phases)):
        check_size(section.phase(number)[1].image_size or recipe.data.image_size, factor)
    check_size(recipe.data.image_size, factor)


def phase_folder(recipe: Recipe, number: int) -> Path:
    """Where a phase's weights end: the last one's in `tokenizer/`."""
    section = recipe.tokenizer
    assert isinstance(section, TrainedTokenizer)
    if number == len(section.phases):
        return recipe.folder / "tokenizer"
    return recipe.folder / "phases" / section.phase(number)[0]


def open_phase(recipe: Recipe, number: int) -> ModelMixin:
    """The tokenizer with which a phase begins: fresh (or `init`), or what the phase before has left, for its size."""
    section = recipe.tokenizer.phase(number)[1]  # type: ignore[union-attr]
    size = section.image_size or recipe.data.image_size
    if number == 0:
        return fit(build_tokenizer(recipe.tokenizer, recipe.data), size)
    folder = phase_folder(recipe, number - 1)
    cls = model_class(json.loads((folder / "config.json").read_text()))
    return fit(cls.from_pretrained(folder, low_cpu_mem_usage=False), size).train()


def fit(tokenizer: ModelMixin, size: tuple[int, int]) -> ModelMixin:
    """A tokenizer whose position tables, if it has any, are made for this size."""
    if not hasattr(tokenizer, "resized") or tuple(tokenizer.config["image_size"]) == tuple(size):  # type: ignore[index]
        return tokenizer
    check_size(size, Codec(tokenizer).factor)
    return tokenizer.resized(size)


def _refuse_later_phases(recipe: Recipe, number: int) -> None:
    """A later phase cannot go on from weights that are trained further now."""
    section = recipe.tokenizer
    assert isinstance(section, TrainedTokenizer)
    for later in range(number + 1, 1 + len(section.phases)):
        name = section.phase(later)[0]
        if checkpoint.images_trained(recipe.folder, name):
            raise LatelierError(
                f"Phase {section.phase(number)[0]!r} is to be trained further, but phase {name!r} has begun from where "
                f"it was; give the recipe another name, or delete {recipe.folder / 'checkpoints'}/{name}-* first."
            )


def import_tokenizer(recipe: Recipe, dataset: ImageDataset, folder: Path) -> Path:
    """A tokenizer that needs no training: pixels, or one that is trained already; its statistics are measured here."""
    if isinstance(recipe.tokenizer, PretrainedSection):
        codec = open_pretrained(recipe.tokenizer)
        if codec.image_channels != recipe.data.channels:
            raise LatelierError(
                f"data.channels = {recipe.data.channels}, but the tokenizer {recipe.tokenizer.path} takes "
                f"{codec.image_channels}."
            )
    else:
        codec = Codec(build_tokenizer(recipe.tokenizer, recipe.data))
    check_size(recipe.data.image_size, codec.factor)
    accelerator, there = Accelerator(), (folder / "config.json").is_file()
    if there and Codec(Codec.from_pretrained(folder).tokenizer).hash() != Codec(codec.tokenizer).hash():
        raise LatelierError(
            f"{folder} holds another tokenizer; give the recipe another name, or delete the run folder."
        )
    if accelerator.is_main_process and not there:
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
    """Images above their reconstructions, nothing masked, through the posterior's mean."""
    images = images[:PREVIEW_IMAGES]
    tokenizer.eval()
    codec = Codec(tokenizer, precision=stage.training.precision)
    pairs = make_pairs(images, codec.decode(codec.encode(images)).clamp(-1, 1), columns=min(8, len(images)))
    save_png(pairs, folder / "previews" / f"{stage.name}-{stage.images:012d}.png")
    tokenizer.train()
