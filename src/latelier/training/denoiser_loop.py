"""Stage 2: encode the pictures once, train a denoiser on their latents, and save a pipeline that samples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from latelier.conditioning.condition import ClassConditioner
from latelier.data.latents import LatentCache
from latelier.data.loader import ImageDataset
from latelier.denoisers import build_denoiser
from latelier.diffusion.process import build_process
from latelier.diffusion.sampling import sample_latents
from latelier.errors import LatelierError
from latelier.images import make_grid, save_png
from latelier.objectives.denoising import DenoisingObjective
from latelier.pipeline import LatentDiffusionPipeline
from latelier.recipe import DenoiserRecipe, Recipe
from latelier.tokenizers.codec import Codec
from latelier.training import checkpoint
from latelier.training.runtime import Stage, adamw, compile_model, make_accelerator
from latelier.training.tokenizer_loop import open_images, to_device

PREVIEW_SAMPLES = 16
PREVIEW_STEPS = 25


def train_denoiser(recipe: Recipe, accelerator: Accelerator | None = None) -> Path:
    """Train the recipe's denoiser on the run's tokenizer, or go on where a stopped run left it.

    Returns:
        The folder of the saved `LatentDiffusionPipeline`.

    Raises:
        LatelierError: if there is no tokenizer yet, or the denoiser does not fit its latents.
    """
    training = denoiser_section(recipe)
    accelerator = accelerator or make_accelerator(training)
    stage = Stage("denoiser", recipe, training, accelerator)
    codec = open_codec(recipe).to(accelerator.device)
    dataset = open_images(recipe)

    torch.manual_seed(recipe.seed)
    objective = build_objective(recipe, codec, dataset.class_names).to(accelerator.device)
    if training.compile:
        compile_model(objective.denoiser)
    optimizer = adamw(objective, training)
    ema = checkpoint.make_ema(objective, training.ema)
    objective, optimizer = accelerator.prepare(objective, optimizer)
    stage.images = checkpoint.resume(recipe.folder, stage.name, accelerator, ema, objective)
    folder = recipe.folder / "pipeline"
    if stage.images >= training.images and (folder / "model_index.json").is_file():
        return folder

    stream = latent_stream(recipe, codec, dataset, stage)
    with stage.running():
        while stage.images < training.images:
            stage.set_learning_rate(optimizer)
            for micro in range(stage.accumulation):
                batch = to_device(next(stream), accelerator.device)
                stage.backward(objective, batch, last=micro == stage.accumulation - 1)
            stage.update(objective, optimizer, ema, batch)

            with stage.paused():
                if stage.due(training.preview_every) and accelerator.is_main_process:
                    save_preview(recipe, codec, stage, accelerator.unwrap_model(objective), ema)
                if stage.due(training.checkpoint_every) or stage.should_stop():
                    checkpoint.save(
                        recipe.folder, stage.name, stage.images, accelerator, ema, objective, training.keep_checkpoints
                    )
            if stage.should_stop() and stage.images < training.images:
                stage.say_goodbye()

    if accelerator.is_main_process:
        model = accelerator.unwrap_model(objective)
        model.denoiser.save_pretrained(recipe.folder / "denoiser" / "last")
        checkpoint.export_ema(objective, ema)
        model.denoiser.save_pretrained(recipe.folder / "denoiser" / "ema")
        make_pipeline(recipe, codec, model).save_pretrained(folder)
    accelerator.wait_for_everyone()
    return folder


def denoiser_section(recipe: Recipe) -> DenoiserRecipe:
    """The recipe's `denoiser`, or an error."""
    if recipe.denoiser is None:
        raise LatelierError(f"Recipe {recipe.name} has no `denoiser` section, so there is nothing to train.")
    return recipe.denoiser


def open_codec(recipe: Recipe) -> Codec:
    """The run's trained tokenizer."""
    folder = recipe.folder / "tokenizer"
    if not (folder / "config.json").is_file():
        raise LatelierError(f"There is no trained tokenizer in {folder}; run `latelier train tokenizer` first.")
    codec = Codec.from_pretrained(folder, precision="auto")
    codec.tokenizer.requires_grad_(False)
    return codec


def build_objective(recipe: Recipe, codec: Codec, class_names: list[str] | None) -> DenoisingObjective:
    """Denoiser, conditioner and process of the recipe, in their objective."""
    section = denoiser_section(recipe)
    denoiser = build_denoiser(section, codec.latent_shape(*recipe.data.image_size))
    conditioner = build_conditioner(section, denoiser.config["dim"], class_names)
    return DenoisingObjective(
        denoiser,
        conditioner,
        build_process(section.process),
        seed=recipe.seed + 1,
        dropout=section.condition_dropout,
        cosine_weight=section.cosine_weight,
        sample_posterior=section.sample_posterior,
    )


def build_conditioner(section: DenoiserRecipe, dim: int, class_names: list[str] | None) -> nn.Module | None:
    """What tells the denoiser about its picture."""
    if section.condition == "none":
        return None
    if not class_names:
        raise LatelierError(
            "denoiser.condition = 'class', but the data has no classes; put pictures into one folder per class, "
            "name the column with data.label_key, or set denoiser.condition=none."
        )
    return ClassConditioner(len(class_names), dim, null=section.condition_dropout > 0, names=list(class_names))


def encode_latents(recipe: Recipe, accelerator: Accelerator | None = None, overwrite: bool = False) -> LatentCache:
    """Encode the training pictures once; goes on where a stopped run left it, and refuses a stale cache."""
    accelerator = accelerator or Accelerator()
    codec = open_codec(recipe).to(accelerator.device)
    return open_cache(recipe, codec, open_images(recipe), accelerator, overwrite)


def open_cache(
    recipe: Recipe, codec: Codec, dataset: ImageDataset, accelerator: Accelerator, overwrite: bool = False
) -> LatentCache:
    """The run's latent cache, written if it is not there."""
    folder = recipe.folder / "latents"
    data = recipe.data
    key = {
        "tokenizer": codec.hash(),
        "data": dataset.fingerprint,
        "transform": f"center crop {data.image_size[0]}x{data.image_size[1]}, background {data.background}",
    }
    batch = min(64, max(1, 64 * 256**2 // (data.image_size[0] * data.image_size[1])))
    flip = data.flip and data.source != "scenes"  # the captions of scenes say left and right
    return LatentCache.write(folder, codec, dataset, key, flip, batch, accelerator, overwrite=overwrite)


def latent_stream(recipe: Recipe, codec: Codec, dataset: ImageDataset, stage: Stage) -> Iterator[dict[str, Any]]:
    """Micro-batches of normalised latents, from the cache or encoded on the fly with all augmentations."""
    accelerator, training = stage.accelerator, stage.training
    place = (stage.images, accelerator.process_index, accelerator.num_processes, stage.accumulation)
    if denoiser_section(recipe).cache:
        yield from open_cache(recipe, codec, dataset, accelerator).stream(training.batch, *place, seed=recipe.seed)
    for batch in dataset.stream(training.batch, *place):
        with torch.no_grad():
            posterior = codec.posterior(batch.pop("image").to(accelerator.device))
        batch["mean"] = codec.normalise(posterior.mean)
        batch["std"] = codec.scale(posterior.std)
        yield batch


def make_pipeline(recipe: Recipe, codec: Codec, objective: DenoisingObjective) -> LatentDiffusionPipeline:
    """Everything that sampling needs, in one object that saves and loads whole."""
    return LatentDiffusionPipeline.build(
        codec, objective.denoiser, objective.conditioner, denoiser_section(recipe).process, recipe.data.image_size
    )


@torch.no_grad()
def save_preview(recipe: Recipe, codec: Codec, stage: Stage, objective: DenoisingObjective, ema: Any) -> None:
    """Samples of the averaged weights on noise that stays the same through training."""
    parameters = checkpoint.trained(objective)
    if ema is not None:
        ema.store(parameters)
        ema.copy_to(parameters)
    objective.eval()
    device = stage.accelerator.device
    condition = null = None
    if objective.conditioner is not None:
        classes = [i % objective.conditioner.config["num_classes"] for i in range(PREVIEW_SAMPLES)]
        condition = objective.conditioner(objective.conditioner.inputs(classes))
        if objective.conditioner.config["null"]:
            null = objective.conditioner.null(PREVIEW_SAMPLES)
    settings = recipe.sample.model_copy(update={"steps": min(PREVIEW_STEPS, recipe.sample.steps)})
    with stage.accelerator.autocast():
        latents = sample_latents(
            objective.denoiser, objective.process, settings, codec.latent_shape(*recipe.data.image_size),
            condition, null, list(range(PREVIEW_SAMPLES)), device,
        )  # fmt: skip
    images = codec.decode(latents).clamp(-1, 1)
    save_png(make_grid(images.cpu(), columns=8), stage.folder / "previews" / f"{stage.name}-{stage.images:012d}.png")
    objective.train()
    if ema is not None:
        ema.restore(parameters)
