"""Measure a trained run: reconstruction and generation on all processes, then what only one has to do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latelier.evaluation.convergence import measure_convergence
from latelier.evaluation.cost import measure_sampling
from latelier.evaluation.features import load_extractor
from latelier.evaluation.generation import batches, evaluate_generation, nearest
from latelier.evaluation.judging import judge_latents
from latelier.evaluation.reconstruction import evaluate_reconstruction
from latelier.evaluation.references import reference_key
from latelier.evaluation.results import Measurement, write_measurements
from latelier.evaluation.sharing import is_main, rank
from latelier.images import make_pairs, save_png
from latelier.opening import best_device, held_out_records, open_codec, open_images
from latelier.recipe import Recipe
from latelier.report.run import write_report

if TYPE_CHECKING:
    from pathlib import Path

    from latelier.data.loader import ImageDataset
    from latelier.pipeline import LatentDiffusionPipeline
    from latelier.tokenizers.codec import Codec

NEAREST_SHOWN = 16
NEAREST_SEARCHED = 2_000
RECONSTRUCTIONS_SHOWN = 16


def evaluate(recipe: Recipe) -> list[Measurement]:
    """Measure a trained run; numbers and receipts go to metrics.json, images and plots to report.html.

    All processes take part in what is measured of many images; the numbers are those of one process.

    Returns:
        All measurements; nothing on processes that only take part.
    """
    codec, held_out = open_codec(recipe).to(best_device()), open_images(recipe, "val")
    measured = _reconstruction(recipe, codec, held_out)
    _write(recipe, "reconstruction", measured)
    pipeline = _pipeline(recipe)
    shown: list[Tensor] = []
    if pipeline is not None:
        generated = _generation(recipe, pipeline, shown)
        _write(recipe, "generation", generated)
        measured += generated
    if not is_main(True):
        return []
    save_reconstructions(codec, held_out, recipe.folder / "reconstructions.png")
    measured += judge_latents(recipe, codec, held_out)
    if pipeline is not None:
        _save_nearest(recipe, shown[0])
        for section, found in (("generation", _speed(recipe, pipeline)), ("tasks", _tasks(recipe, pipeline, held_out))):
            _write(recipe, section, found)
            measured += found
        measured += measure_convergence(recipe, codec, held_out)
    write_report(recipe.folder)
    return measured


def save_reconstructions(codec: Codec, image_batches: ImageDataset, out: Path) -> None:
    """The first images above their reconstructions, for looking at."""
    images = next(image_batches.once(RECONSTRUCTIONS_SHOWN, limit=RECONSTRUCTIONS_SHOWN))["image"]
    with torch.no_grad():
        result = codec.decode(codec.encode(images.to(codec.device))).clamp(-1, 1).cpu()
    save_png(make_pairs(images, result, columns=min(8, len(images))), out)


# -- on all processes -------------------------------------------------------------------------------------------------


def _reconstruction(recipe: Recipe, codec: Codec, held_out: ImageDataset) -> list[Measurement]:
    """The held-out images through the tokenizer."""
    settings = recipe.evaluate
    return evaluate_reconstruction(
        codec,
        held_out.once(settings.batch, *rank(), limit=settings.samples, whole=True),
        settings,
        f"{recipe.data.source}, held out",
        {"data": held_out.fingerprint},
        key=reference_key(held_out, settings.samples),
        shared=True,
    )


def _generation(recipe: Recipe, pipeline: LatentDiffusionPipeline, shown: list[Tensor]) -> list[Measurement]:
    """Compare fresh samples with the training images, which are spread over the classes, should they be sorted.

    Args:
        recipe: of the run.
        pipeline: what draws.
        shown: the first samples of this process are appended.
    """
    settings, training = recipe.evaluate, open_images(recipe)
    process, processes = rank()

    def drawn() -> Iterator[Tensor]:
        for images in _samples(pipeline, recipe, min(settings.samples, len(training)), process, processes):
            if not shown:
                shown.append(images[:NEAREST_SHOWN].cpu())
            yield images

    samples = drawn()
    measured = evaluate_generation(
        samples,
        training.once(settings.batch, process, processes, limit=settings.samples, whole=True),
        settings,
        _sampled(recipe, pipeline, training),
        pipeline.device,
        key=reference_key(training, settings.samples),
        shared=True,
    )
    if not shown and process == 0:  # nothing was measured of them
        next(samples, None)
    return measured


def _samples(
    pipeline: LatentDiffusionPipeline, recipe: Recipe, count: int, process: int, processes: int
) -> Iterator[Tensor]:
    """This process's batches of samples of the recipe's settings; image i has the seed `sample.seed + i`.

    A model that is told more than classes draws what the held-out images say, in turn.
    """
    records = held_out_records(recipe, pipeline)
    for settings in list(batches(recipe.sample, count))[process::processes]:
        told = records(settings.seed - recipe.sample.seed, settings.count)
        yield pipeline(sample=settings, records=told, output_type="pt", progress=False).images


# -- on the main process ----------------------------------------------------------------------------------------------


def _save_nearest(recipe: Recipe, shown: Tensor) -> None:
    """The nearest training images below some samples."""
    searched = max(NEAREST_SEARCHED, 5 * recipe.evaluate.samples)  # all of a small set, a part of a large one
    training = open_images(recipe).once(recipe.evaluate.batch, limit=searched)
    neighbours = nearest(shown, training, load_extractor("vgg16"))
    pairs = make_pairs(shown, neighbours.images[:, 0], columns=min(8, len(shown)))
    save_png(pairs, recipe.folder / "samples" / "nearest.png")


def _speed(recipe: Recipe, pipeline: LatentDiffusionPipeline) -> list[Measurement]:
    """Quality and speed at several numbers of steps."""
    training, settings = open_images(recipe), recipe.evaluate
    references = training.once(settings.batch, limit=settings.samples)
    return measure_sampling(pipeline, references, recipe, _sampled(recipe, pipeline, training))


def _tasks(recipe: Recipe, pipeline: LatentDiffusionPipeline, held_out: ImageDataset) -> list[Measurement]:
    """Whether the denoiser does what it is told, when it is told more than a class; images to look at."""
    from latelier.conditioning.condition import components
    from latelier.evaluation.conditions import condition_grid, evaluate_conditions
    from latelier.evaluation.regions import MOST_TRAINING

    if set(components(pipeline.conditioner)) <= {"classes"}:
        return []
    settings, training = recipe.evaluate, open_images(recipe)
    grid = condition_grid(pipeline, held_out.once(8, limit=8), recipe.sample, settings.seed)
    save_png(grid.image, recipe.folder / "samples" / "asked.png")
    (recipe.folder / "samples" / "asked.txt").write_text("\n".join(grid.captions))
    return evaluate_conditions(
        pipeline,
        held_out.once(settings.batch, limit=settings.samples),
        lambda: training.once(settings.batch, limit=MOST_TRAINING),
        recipe.sample,
        settings,
        _about(recipe, pipeline, f"{recipe.data.source}, held out", held_out),
    )


# -- inside -----------------------------------------------------------------------------------------------------------


def _pipeline(recipe: Recipe) -> LatentDiffusionPipeline | None:
    """The run's pipeline, if a denoiser was trained."""
    from latelier.opening import open_run

    trained = (recipe.folder / "pipeline" / "model_index.json").is_file()
    return open_run(recipe.folder)[0] if trained else None


def _sampled(recipe: Recipe, pipeline: LatentDiffusionPipeline, training: ImageDataset) -> dict[str, Any]:
    """What receipts say of samples that are compared with training images."""
    settings = {k: v for k, v in recipe.sample.model_dump().items() if k not in ("count", "batch")}
    return {**_about(recipe, pipeline, f"{recipe.data.source}, training images", training), **settings}


def _about(recipe: Recipe, pipeline: LatentDiffusionPipeline, reference: str, data: ImageDataset) -> dict[str, Any]:
    """What receipts of a pipeline's images say of it and of what they are compared with."""
    return {
        "reference": reference,
        "data": data.fingerprint,
        "tokenizer": pipeline.codec.hash(),
        "ema": recipe.denoiser.ema if recipe.denoiser else None,
        "images_trained": recipe.denoiser.images if recipe.denoiser else None,
    }


def _write(recipe: Recipe, section: str, measured: list[Measurement]) -> None:
    if is_main(True):
        write_measurements(recipe.folder / "metrics.json", measured, section)
