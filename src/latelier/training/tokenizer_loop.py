"""Stage 1: train a tokenizer in one or more phases, measure its latent statistics, and save both as `tokenizer/`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from torch import nn

from latelier.data.latents import latent_statistics
from latelier.data.loader import ImageDataset
from latelier.errors import LatelierError
from latelier.images import make_pairs, save_png
from latelier.losses.discriminator import Discriminator, add_adversarial_loss, build_discriminator
from latelier.opening import open_images, open_pretrained
from latelier.publish import damage, publish
from latelier.recipe import Adversarial, Recipe, TrainedTokenizer
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
from latelier.training.psnr_goal import PsnrGoal
from latelier.training.runtime import Stage, compile_model, make_accelerator
from latelier.training.step import adamw, average_batch_norms, step

STATISTICS_IMAGES = 10_000
PREVIEW_IMAGES = 16


def train_tokenizer(recipe: Recipe, accelerator: Accelerator | None = None) -> Path:
    """Train the recipe's tokenizer through all its phases, or resume; `Codec.from_pretrained` opens the result."""
    if not isinstance(recipe.tokenizer, TrainedTokenizer):
        return import_tokenizer(recipe, open_images(recipe), recipe.folder / "tokenizer")
    before = 0
    for number in range(1 + len(recipe.tokenizer.phases)):
        section = recipe.tokenizer.phase(number)[1]
        train_phase(recipe, number, before, accelerator or make_accelerator(section))
        before += section.images
    return recipe.folder / "tokenizer"


def train_phase(recipe: Recipe, number: int, before: int, accelerator: Accelerator) -> None:
    """Phase `number`, 0 for the section itself: its own optimiser, averages, schedule and checkpoints.

    It begins with the weights of the phase before; `before` counts the images seen by all earlier phases.
    """
    name, training = recipe.tokenizer.phase(number)  # type: ignore[union-attr]
    folder = phase_folder(recipe, number)
    images, until = recipe.tokenizer.ends_at(number)  # type: ignore[union-attr]
    if checkpoint.whole_export(recipe.folder, name, folder, images, until):
        return
    _refuse_later_phases(recipe, number)
    dataset = open_images(recipe, size=training.image_size)
    torch.manual_seed(recipe.seed)
    tokenizer = open_phase(recipe, number)
    check_sizes(recipe, Codec(tokenizer).factor)
    perceptual = build_perceptual(training)
    discriminator: Any = prepare_discriminator(training, recipe, accelerator)
    game = training.adversarial or Adversarial()
    objective = build_objective(training, recipe.seed, tokenizer, perceptual, dataset)
    _check_last_layer(training, tokenizer)
    if tokenizer_info(tokenizer).channels_last and accelerator.device.type != "cpu":  # slow in GroupNorm's backward
        objective.to(memory_format=torch.channels_last)
    objective.to(accelerator.device)
    if training.compile:
        compile_model(tokenizer)
    stage = Stage(name, recipe, training, accelerator)
    optimizer = adamw(objective, training.lr, training.betas, training.weight_decay)
    ema = checkpoint.make_ema(objective, training.ema)
    objective, optimizer = accelerator.prepare(objective, optimizer)
    if discriminator is not None:
        d_optimizer = adamw(discriminator, game.lr or training.lr, game.betas)
        discriminator, d_optimizer = accelerator.prepare(discriminator, d_optimizer)
    held_out = open_images(recipe, "val", training.image_size) if until else None
    every, precision = training.psnr_every, training.precision
    goal = PsnrGoal(accelerator, until, held_out, images, training.batch, every, precision, training.norm)
    stage.images = checkpoint.resume(recipe.folder, stage.name, accelerator, ema, objective)
    goal.check(stage.images, objective, ema)  # stopped between the look and the end
    stage.reached = goal.reached

    stream = dataset.stream(
        training.batch, before + stage.images, accelerator.process_index, accelerator.num_processes, stage.accumulation
    )
    with stage.running():
        while not stage.ended:
            adversarial = discriminator is not None and stage.images >= game.start
            discriminate = discriminator is not None and stage.images >= game.start - game.ahead
            stage.set_learning_rate(optimizer)
            for batch, last in stage.micro_batches(stream):
                # Generator: reconstruct the images and, once the game has started, pass for images.
                with stage.accumulate(objective, last):
                    terms = objective(batch)
                    if adversarial:
                        with accelerator.autocast():
                            add_adversarial_loss(
                                terms, accelerator.unwrap_model(discriminator), last_layer(tokenizer),
                                batch["sample_id"], game.weight, game.adaptive,
                            )  # fmt: skip
                    stage.backward(terms)
                # Discriminator: tell the images from what the tokenizer has just made of them.
                if discriminate:
                    with stage.accumulate(discriminator, last):
                        real = batch["image"] if terms.target is None else terms.target
                        fake = terms.reconstruction.detach()
                        stage.backward(discriminator(real, fake, batch["sample_id"]), total="d_total")
            stage.clip(objective)
            if discriminate:
                stage.clip(discriminator, "d_grad_norm")
                stage.set_learning_rate(d_optimizer, game.lr or training.lr)
            skip = stage.check(batch)
            step(optimizer, skip)
            average_batch_norms(objective, accelerator)
            if discriminate:
                step(d_optimizer, skip)
                average_batch_norms(discriminator, accelerator)
            if ema is not None:
                ema.step(checkpoint.trained(objective))
            with stage.paused():
                stage.measured = goal.check(stage.images + training.batch, objective, ema)
                stage.reached = goal.reached
            stage.advance()

            stop = stage.should_stop()
            with stage.paused():
                if stage.due(training.preview_every) and accelerator.is_main_process:
                    save_preview(recipe.folder, stage, accelerator.unwrap_model(objective).tokenizer, batch["image"])
                if stage.due(training.checkpoint_every) or stop:
                    stage.settle()
                    checkpoint.save(
                        recipe.folder, stage.name, stage.images, accelerator, ema, objective, training.keep_checkpoints
                    )
            if stop:
                stage.exit_resumable()

    goal.tell(name, stage.images)
    checkpoint.export_ema(objective, ema)
    checkpoint.refuse_non_finite(objective, f"The trained {name}", recipe.folder, name)
    tokenizer = accelerator.unwrap_model(objective).tokenizer.eval()
    accelerator.free_memory()
    if number == len(recipe.tokenizer.phases):  # type: ignore[union-attr]
        tokenizer = fit(tokenizer, recipe.data.image_size)
        codec = Codec(tokenizer, precision=training.precision, norm=training.norm)
        save_codec(codec, open_images(recipe), recipe, folder, accelerator, stage.images, goal.psnr)
    elif accelerator.is_main_process:
        with publish(folder, images=stage.images) as temporary:
            tokenizer.save_pretrained(temporary)
    accelerator.wait_for_everyone()


def prepare_discriminator(training: TrainedTokenizer, recipe: Recipe, accelerator: Accelerator) -> Discriminator | None:
    """The discriminator of a phase, on its device, if there is one."""
    game = training.adversarial
    if game is None:
        return None
    discriminator = build_discriminator(
        recipe.data.channels, recipe.seed, game.kind, game.layers, game.channels, game.norm, game.teacher,
        game.taps, game.class_token, loss=game.loss, lecam=game.lecam, lecam_decay=game.lecam_decay,
        consistency=game.consistency, augment=game.augment, augment_share=game.augment_share, crops=game.crops,
        round_fakes=game.round_fakes,
    )  # fmt: skip
    if game.norm == "batch" and accelerator.num_processes > 1 and accelerator.device.type != "cpu":  # has none
        discriminator = torch.nn.SyncBatchNorm.convert_sync_batchnorm(discriminator)
    return discriminator.to(accelerator.device)


def _check_last_layer(training: TrainedTokenizer, tokenizer: nn.Module) -> None:
    """Refuse an adaptive weight where there is no gradient to adapt to."""
    game = training.adversarial
    if game is not None and game.adaptive and not last_layer(tokenizer).requires_grad:
        raise LatelierError(
            "tokenizer.adversarial.adaptive compares gradients at the tokenizer's last layer, which "
            f"tokenizer.train = {training.train} freezes; set adaptive: false, or train that layer too."
        )


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
    accelerator, there = Accelerator(), damage(folder) is None
    if there and Codec(Codec.from_pretrained(folder).tokenizer).hash() != Codec(codec.tokenizer).hash():
        raise LatelierError(
            f"{folder} holds another tokenizer; give the recipe another name, or delete the run folder."
        )
    if accelerator.is_main_process and not there:
        save_codec(codec, dataset, recipe, folder, None)
    accelerator.wait_for_everyone()
    return folder


def save_codec(
    codec: Codec, dataset: ImageDataset, recipe: Recipe, folder: Path, accelerator: Accelerator | None, images: int = 0,
    psnr: float | None = None,
) -> None:  # fmt: skip
    """Publish the tokenizer with its latent statistics; the manifest says the images seen and, if it was looked at for
    `until_psnr`, the PSNR.
    """
    codec = with_statistics(codec, dataset, recipe.seed, accelerator)
    if accelerator is None or accelerator.is_main_process:
        with publish(folder, images=images, **({} if psnr is None else {"psnr": psnr})) as temporary:
            codec.save_pretrained(temporary)
        console.print(f"Tokenizer saved in {folder}.")
    if accelerator is not None:
        accelerator.wait_for_everyone()


def with_statistics(codec: Codec, dataset: ImageDataset, seed: int, accelerator: Accelerator | None) -> Codec:
    """The codec; its latent statistics are measured over the training set if it has none."""
    if codec.mean is not None:
        return codec
    mean, std = latent_statistics(codec, dataset, STATISTICS_IMAGES, seed, accelerator)
    about = {"images": min(STATISTICS_IMAGES, len(dataset)), "data": dataset.fingerprint, "sampled": True}
    return Codec(codec.tokenizer, mean, std, about, codec.precision, codec.norm)


@torch.no_grad()
def save_preview(folder: Path, stage: Stage, tokenizer: nn.Module, images: torch.Tensor) -> None:
    """Images above their reconstructions, nothing masked, through the posterior's mean."""
    images = images[:PREVIEW_IMAGES]
    tokenizer.eval()
    training: Any = stage.training
    codec = Codec(tokenizer, precision=training.precision, norm=training.norm)
    pairs = make_pairs(images, codec.decode(codec.encode(images)).clamp(-1, 1), columns=min(8, len(images)))
    save_png(pairs, folder / "previews" / f"{stage.name}-{stage.images:012d}.png")
    tokenizer.train()
