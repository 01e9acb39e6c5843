"""Stage 2: encode the images once, train a denoiser on their latents, and save a pipeline that samples."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from latelier.conditioning import CACHED
from latelier.conditioning.condition import DataSpec, build_conditioner, components
from latelier.data.latents import LatentCache, encode_batches
from latelier.data.loader import ImageDataset
from latelier.denoisers import build_denoiser, vector_width
from latelier.denoisers.align import Alignment, build_alignment
from latelier.denoisers.objective import DenoiserSection, DenoisingObjective
from latelier.diffusion.autoguidance import SNAPSHOTS, open_guide
from latelier.diffusion.process import Flow, build_process
from latelier.errors import LatelierError
from latelier.evaluation.generation import measure_snapshot
from latelier.evaluation.results import write_measurements
from latelier.images import make_grid, save_png
from latelier.opening import held_out_records, open_codec, open_images, snapshot_folder
from latelier.pipeline import LatentDiffusionPipeline, shown_lengths
from latelier.prefixes import random_prefixes
from latelier.publish import manifest, publish
from latelier.recipe import Recipe
from latelier.tokenizers.codec import Codec
from latelier.training import checkpoint
from latelier.training.run_folder import digest
from latelier.training.runtime import Stage, compile_model, keep_random, make_accelerator, to_device
from latelier.training.step import adamw, average_batch_norms, step

PREVIEW_SAMPLES, PREVIEW_COLUMNS = 16, 8
PREVIEW_STEPS = 25


def train_denoiser(recipe: Recipe, accelerator: Accelerator | None = None) -> Path:
    """Train the recipe's denoiser on the run's tokenizer, or resume; returns the saved pipeline's folder."""
    training = denoiser_section(recipe)
    accelerator = accelerator or make_accelerator(training)
    stage = Stage("denoiser", recipe, training, accelerator)
    codec = open_codec(recipe).to(accelerator.device)
    folder = recipe.folder / "pipeline"
    if checkpoint.whole_export(recipe.folder, stage.name, folder, training.images):
        _check_tokenizer(folder, codec)
        return folder
    dataset = open_images(recipe)

    torch.manual_seed(recipe.seed)
    objective = build_objective(recipe, codec, dataset).to(accelerator.device)
    if training.compile:
        compile_model(objective.denoiser)
    optimizer = adamw(objective, training.lr, training.betas, training.weight_decay)
    ema = checkpoint.make_ema(objective, training.ema)
    objective, optimizer = accelerator.prepare(objective, optimizer)
    stage.images = checkpoint.resume(recipe.folder, stage.name, accelerator, ema, objective)

    if accelerator.is_main_process:
        drop_snapshots(recipe.folder, stage.images)
    stream = latent_stream(recipe, codec, dataset, stage, accelerator.unwrap_model(objective))
    snapshots = training.snapshots_at(recipe.evaluate.every)
    if accelerator.is_main_process:  # stopped between a snapshot and its measurement
        measure_snapshots(recipe, codec, stage, accelerator.unwrap_model(objective))
    with stage.running():
        while not stage.ended:
            stage.set_learning_rate(optimizer)
            for batch, last in stage.micro_batches(stream):
                with stage.accumulate(objective, last):
                    stage.backward(objective(batch))
            stage.clip(objective)
            step(optimizer, stage.check(batch))
            average_batch_norms(objective, accelerator)
            if ema is not None:
                ema.step(checkpoint.trained(objective))
            stage.advance()

            stop = stage.should_stop()
            with stage.paused():
                if stage.due(training.preview_every) and accelerator.is_main_process:
                    save_preview(recipe, codec, stage, accelerator.unwrap_model(objective), ema)
                if stage.images in snapshots and accelerator.is_main_process:
                    save_snapshot(recipe.folder, stage.images, accelerator.unwrap_model(objective), ema)
                    measure_snapshots(recipe, codec, stage, accelerator.unwrap_model(objective), stage.images)
                if stage.due(training.checkpoint_every) or stop:
                    stage.settle()
                    checkpoint.save(
                        recipe.folder, stage.name, stage.images, accelerator, ema, objective, training.keep_checkpoints
                    )
            if stop:
                stage.exit_resumable()

    if accelerator.is_main_process:
        model = accelerator.unwrap_model(objective)
        with publish(recipe.folder / "denoiser" / "last", images=stage.images) as temporary:
            model.denoiser.save_pretrained(temporary)
        checkpoint.export_ema(objective, ema)
        checkpoint.refuse_non_finite(objective, "The trained denoiser", recipe.folder, stage.name)
        with publish(recipe.folder / "denoiser" / "ema", images=stage.images) as temporary:
            model.denoiser.save_pretrained(temporary)
        with publish(folder, images=stage.images, tokenizer=codec.hash()) as temporary:
            make_pipeline(recipe, codec, model).save_pretrained(temporary)
    accelerator.wait_for_everyone()
    return folder


def _check_tokenizer(folder: Path, codec: Codec) -> None:
    """A finished denoiser belongs to the tokenizer that it was trained on."""
    trained_on = (manifest(folder) or {}).get("tokenizer")
    if trained_on != codec.hash():
        raise LatelierError(
            f"The denoiser in {folder} was trained on another tokenizer ({trained_on}, now {codec.hash()}); give the "
            f"recipe another name, or delete {folder} and checkpoints/denoiser-* to train it again."
        )


def denoiser_section(recipe: Recipe) -> DenoiserSection:
    """The recipe's `denoiser`, or an error."""
    if recipe.denoiser is None:
        raise LatelierError(f"Recipe {recipe.name} has no `denoiser` section, so there is nothing to train.")
    return recipe.denoiser


def build_objective(recipe: Recipe, codec: Codec, dataset: ImageDataset) -> DenoisingObjective:
    """Denoiser, conditioner and process of the recipe, in their objective."""
    section = denoiser_section(recipe)
    shape = codec.latent_shape(*recipe.data.image_size)
    captions = cache(lambda: tuple(dataset.captions()))  # read at most once
    reads_text = any(condition.kind == "text" for condition in section.condition)
    captioned = reads_text and next(dataset.captions(), None) is not None
    spec = DataSpec(
        class_names=dataset.class_names, box_names=dataset.box_names,
        segmentation_classes=dataset.segmentation_classes,
        captions=(lambda: iter(captions())) if captioned else None,
        latent_shape=shape, factor=codec.factor, image_channels=codec.image_channels,
        vector_width=vector_width(section), prefers_tokens=section.kind == "unet", seed=recipe.seed,
    )  # fmt: skip
    if (
        recipe.sample.guidance != 1
        and not recipe.sample.guide
        and not any(condition.dropout for condition in section.condition)
    ):
        raise LatelierError(
            f"sample.guidance = {recipe.sample.guidance}, but this denoiser is trained without dropping its "
            "conditions, so it cannot be guided; set sample.guidance to 1, or the `dropout` of a condition above 0."
        )
    conditioner = build_conditioner(section.condition, spec)
    conditioners = components(conditioner).values()
    denoiser = build_denoiser(
        section, shape, token_width=max((part.token_width for part in conditioners), default=0),
        spatial_channels=sum(part.spatial_channels for part in conditioners),
        vector=any(not part.token_width and not part.spatial_channels for part in conditioners),
    )  # fmt: skip
    _check_channels(recipe, shape[0], denoiser.config.get("prefix_channels", False))
    objective = DenoisingObjective(
        denoiser, conditioner, build_process(**section.process.model_dump(), latent_shape=shape), seed=recipe.seed + 1,
        dropout=[condition.dropout for condition in section.condition], loss=section.loss,
        cosine_weight=section.cosine_weight, sample_posterior=section.sample_posterior,
        prefixes=random_prefixes(section.prefixes, shape[0]),
        align=None if section.align is None else build_alignment(section.align, denoiser, shape),
    )  # fmt: skip
    _check_guide(recipe, codec, objective)
    return objective


def _check_guide(recipe: Recipe, codec: Codec, objective: DenoisingObjective) -> None:
    """Refuse a guide that cannot guide this denoiser, before it is trained; a tokenizer may not be trained yet."""
    guide, section = recipe.sample.guide, denoiser_section(recipe)
    if guide is None:
        return
    if not guide.startswith(f"{SNAPSHOTS}/"):
        open_guide(guide, make_pipeline(recipe, codec, objective), check_latents=codec.mean is not None)
    elif guide.removeprefix(f"{SNAPSHOTS}/") not in (
        known := list(map(str, section.snapshots_at(recipe.evaluate.every)))
    ):
        raise LatelierError(
            f"sample.guide = {guide}, but denoiser.snapshots = {section.snapshots} keeps weights at "
            f"{', '.join(known) or 'no number of'} images; choose one of these, or keep more."
        )


def _check_channels(recipe: Recipe, channels: int, allowed: bool) -> None:
    """Refuse prefixes that this denoiser could not draw, before it is trained."""
    wanted = recipe.sample.channels
    if wanted is not None and wanted > channels:
        raise LatelierError(f"sample.channels = {wanted} is not a prefix of {channels} latent channels.")
    if wanted not in (None, channels) and not allowed:
        raise LatelierError(
            f"sample.channels = {wanted}, but this denoiser is not trained on prefixes of the channels; set "
            "denoiser.prefixes, or leave sample.channels out."
        )


def encode_latents(recipe: Recipe, accelerator: Accelerator | None = None, overwrite: bool = False) -> LatentCache:
    """Encode the training images once, or resume; a stale cache is refused."""
    accelerator = accelerator or Accelerator()
    codec, dataset = open_codec(recipe).to(accelerator.device), open_images(recipe)
    aligned = recipe.denoiser is not None and recipe.denoiser.align is not None
    align = build_objective(recipe, codec, dataset).align if aligned else None
    return open_cache(recipe, codec, dataset, accelerator, overwrite, align)


def open_cache(
    recipe: Recipe, codec: Codec, dataset: ImageDataset, accelerator: Accelerator, overwrite: bool = False,
    align: Alignment | None = None,
) -> LatentCache:  # fmt: skip
    """The run's latent cache, written if it is not there, with the features that `align` keeps."""
    folder = recipe.folder / "latents"
    data = recipe.data
    key = {
        "tokenizer": codec.hash(),
        "data": dataset.fingerprint,
        "transform": f"center crop {data.image_size[0]}x{data.image_size[1]}, background {data.background}",
    }
    kept = align if align is not None and align.cache else None
    key |= kept.key() if kept else {}
    batch = min(64, max(1, 64 * 256**2 // (data.image_size[0] * data.image_size[1])))
    return LatentCache.write(
        folder, codec, dataset, key, dataset.flips_latents, batch, accelerator, overwrite=overwrite,
        features=kept and kept.features,
    )  # fmt: skip


def latent_stream(
    recipe: Recipe, codec: Codec, dataset: ImageDataset, stage: Stage, objective: DenoisingObjective
) -> Iterator[dict[str, Any]]:
    """Micro-batches of normalised latents and of all that the conditioner and the alignment need.

    Latents come from the cache, or are encoded on the fly with all augmentations. Images, boxes and maps are read
    beside cached latents, if the conditioner asks for more than labels and captions, or features are not cached.
    """
    accelerator, training = stage.accelerator, stage.training
    place = (stage.images, accelerator.process_index, accelerator.num_processes, stage.accumulation)
    if not denoiser_section(recipe).cache:
        batches = encode_batches(codec, dataset.stream(training.batch, *place), accelerator.device)
        return _prepared(batches, objective, codec, stage)
    align = objective.align
    latents = open_cache(recipe, codec, dataset, accelerator, align=align)
    if align is not None and align.cache:
        latents.features = lambda: align.acts(stage.images)
    batches = latents.stream(training.batch, *place, seed=recipe.seed)
    asked = any(name not in CACHED for name in components(objective.conditioner))
    if asked or (align is not None and not align.cache):
        plan = latents.plan(training.batch, *place, seed=recipe.seed)
        records = dataset.follow((latents.index[positions], flips.tolist()) for _, positions, flips in plan)
        batches = ({**batch, **record} for record, batch in zip(records, batches))  # captions may be mirrored
    return _prepared(batches, objective, codec, stage)


def _prepared(
    batches: Iterator[dict[str, Any]], objective: DenoisingObjective, codec: Codec, stage: Stage
) -> Iterator[dict[str, Any]]:
    """Batches with what the objective makes of them before the step; images are not needed any more."""
    for batch in batches:
        batch = to_device(batch, stage.accelerator.device)
        with torch.no_grad(), stage.accelerator.autocast():
            batch |= objective.prepare(batch, codec, stage.images)
        batch.pop("image", None)
        yield batch


def make_pipeline(recipe: Recipe, codec: Codec, objective: DenoisingObjective) -> LatentDiffusionPipeline:
    """Everything that sampling needs, in one object that saves and loads whole."""
    dropped = [name for name, share in zip(components(objective.conditioner), objective.dropout) if share]
    process, by_dimension = objective.process, denoiser_section(recipe).process.shift == "dimension"
    return LatentDiffusionPipeline.build(
        codec, objective.denoiser, objective.conditioner, process, recipe.data.image_size, dropped,
        process.shift if by_dimension and isinstance(process, Flow) else 1.0,
    )  # fmt: skip


def save_preview(
    recipe: Recipe, codec: Codec, stage: Stage, objective: DenoisingObjective, ema: EMAModel | None
) -> None:
    """Samples of the averaged weights on noise that stays the same through training.

    A denoiser that is trained on prefixes of the channels shows a row of images for each of `shown_lengths`, drawn
    with that number of channels from the same noise, the fewest on top. A weaker model, which may not be there yet,
    guides no previews.
    """
    prefixes = denoiser_section(recipe).prefixes
    lengths = [recipe.sample.channels] if prefixes is None else shown_lengths(prefixes, codec.channels)
    count = PREVIEW_SAMPLES if prefixes is None else PREVIEW_COLUMNS
    changes: dict[str, Any] = {"steps": min(PREVIEW_STEPS, recipe.sample.steps), "count": count, "batch": count}
    changes |= {"guidance": 1.0} if recipe.sample.guide else {}
    images = []
    with checkpoint.averaged(objective, ema):
        pipeline = make_pipeline(recipe, codec, objective)
        records = held_out_records(recipe, pipeline)(0, count)
        for length in lengths:
            settings = recipe.sample.model_copy(update={**changes, "channels": length})
            drawn = pipeline(
                sample=settings, records=records, precision=stage.training.precision, output_type="pt", progress=False
            ).images
            images.append(drawn)  # (b, c, h, w)
    grid = make_grid(torch.cat(images), PREVIEW_COLUMNS)
    save_png(grid, stage.folder / "previews" / f"{stage.name}-{stage.images:012d}.png")


def save_snapshot(folder: Path, images: int, objective: DenoisingObjective, ema: EMAModel | None) -> None:
    """Publish the averaged weights as `denoiser/snapshots/<images>`, a trained conditioner in it as `conditioner`."""
    with publish(snapshot_folder(folder, images), images=images) as temporary, checkpoint.averaged(objective, ema):
        objective.denoiser.save_pretrained(temporary)
        if objective.conditioner is not None and checkpoint.trained(objective.conditioner):
            objective.conditioner.save_pretrained(temporary / "conditioner")


def measure_snapshots(
    recipe: Recipe, codec: Codec, stage: Stage, objective: DenoisingObjective, since: int = 0
) -> None:
    """Measure the snapshots from `since` images on for `evaluate.every`, as far as metrics.json lacks them; training is
    not touched.
    """
    if not recipe.evaluate.every:
        return
    with keep_random(stage.accelerator.device), checkpoint.averaged(objective, None):
        pipeline = make_pipeline(recipe, codec, objective)
        for images in denoiser_section(recipe).snapshots_at(recipe.evaluate.every):
            if since <= images <= stage.images and snapshot_folder(recipe.folder, images).is_dir():
                found = measure_snapshot(recipe, pipeline, images)
                for one in found:
                    one.receipt["recipe"] = digest(recipe)
                write_measurements(recipe.folder / "metrics.json", found, "convergence")


def drop_snapshots(folder: Path, images: int) -> None:
    """Remove the snapshots after `images`: training that goes on from there writes them again."""
    for path in snapshot_folder(folder, 0).parent.glob("[0-9]*"):
        if int(path.name) > images:
            shutil.rmtree(path)
