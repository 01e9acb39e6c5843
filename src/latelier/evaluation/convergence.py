"""How fast a denoiser learns: its loss and its images at snapshots of training (DC-AE 1.5, figure 1).

Every snapshot meets the same held-out latents at the same times, with the same noise, and draws from the same seeds.
So a curve shows what the weights have learnt. The loss is that of all channels, without dropped conditions, also where
training drew prefixes: plain and augmented training are measured alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latelier.data.loader import ImageDataset
from latelier.denoisers.objective import DenoisingObjective
from latelier.errors import LatelierError
from latelier.evaluation.convergence_table import BEGIN, LOSS
from latelier.evaluation.generation import evaluate_generation
from latelier.evaluation.references import reference_key
from latelier.evaluation.results import Measurement, write_measurements
from latelier.evaluation.speed import batches
from latelier.opening import held_out_records, open_images
from latelier.pipeline import LatentDiffusionPipeline
from latelier.receipt import make_receipt
from latelier.recipe import Recipe
from latelier.tokenizers.codec import Codec
from latelier.training.denoiser_loop import denoiser_section, encoded, snapshot_folder
from latelier.training.runtime import to_device

PASSES = 4  # times, each with noise of its own, at which each held-out latent is met


def measure_convergence(recipe: Recipe, codec: Codec, held_out: ImageDataset) -> list[Measurement]:
    """Measure every snapshot of the run's denoiser, if the recipe asks for `convergence`.

    Numbers go into the section `convergence` of metrics.json, those of each snapshot as soon as they are there.

    Args:
        recipe: of a trained run; `denoiser.snapshots` says which snapshots there are.
        codec: the run's tokenizer, on the device that is to be used.
        held_out: the images whose latents the loss is measured on; at most `evaluate.samples`.

    Returns:
        For each snapshot, by images seen, `convergence-loss@<images>`: the objective's loss, mean over images and
        times; and, if gfd is asked for too, `convergence-gfd-<features>@<images>` in the first of
        `evaluate.features`, of as many samples as gfd has, with the recipe's sampler.

    Raises:
        LatelierError: if a snapshot is missing, or there are no held-out images.
    """
    if "convergence" not in recipe.evaluate.metrics:
        return []
    section, settings = denoiser_section(recipe), recipe.evaluate
    folders = {images: snapshot_folder(recipe.folder, images) for images in section.snapshots_at()}
    if missing := [f"{images:,}" for images, folder in folders.items() if not folder.is_dir()]:
        raise LatelierError(
            f"{recipe.folder} has no snapshots at {' and '.join(missing)} images, which convergence needs; they are "
            "kept while the denoiser is trained. Train it anew, or take convergence out of evaluate.metrics."
        )
    pipeline = LatentDiffusionPipeline.from_pretrained(recipe.folder / "pipeline").to(codec.device)
    tokenizer, found = codec.hash(), []
    for images, folder in folders.items():
        load_snapshot(pipeline, folder)
        about = {"images_trained": images, "of": section.images, "ema": section.ema, "tokenizer": tokenizer}
        image_batches = held_out.once(settings.batch, limit=settings.samples)
        found.append(_loss(recipe, codec, pipeline, image_batches, {**about, "data": held_out.fingerprint}))
        if "gfd" in settings.metrics:
            found.append(_distance(recipe, pipeline, about))
        write_measurements(recipe.folder / "metrics.json", found, "convergence")
    return found


def load_snapshot(pipeline: LatentDiffusionPipeline, folder: Path) -> None:
    """Put a snapshot's denoiser, and its conditioner if that was trained, in place of the pipeline's."""
    places = {"denoiser": folder, "conditioner": folder / "conditioner"}
    for name, place in places.items():
        if place.is_dir():
            model = type(getattr(pipeline, name)).from_pretrained(place)
            pipeline.register_modules(**{name: model.to(pipeline.device).eval()})


def _loss(
    recipe: Recipe,
    codec: Codec,
    pipeline: LatentDiffusionPipeline,
    images: Iterator[dict[str, Any]],
    about: Mapping[str, Any],
) -> Measurement:
    """The loss of the pipeline's weights on held-out latents."""
    section, seed = denoiser_section(recipe), recipe.evaluate.seed
    objective = DenoisingObjective(
        pipeline.denoiser, pipeline.conditioner, pipeline.process, seed, dropout=(), loss=section.loss,
        cosine_weight=section.cosine_weight, sample_posterior=section.sample_posterior,
    )  # fmt: skip
    value, n = held_out_loss(objective.eval(), codec, images, lambda: pipeline._autocast(section.precision))
    receipt = make_receipt(
        n=n, reference=f"{recipe.data.source}, held out", passes=PASSES, seed=seed, precision=section.precision,
        latent_shape=list(codec.latent_shape(*recipe.data.image_size)), architecture=type(codec.tokenizer).__name__,
        loss=section.loss, cosine_weight=section.cosine_weight, process=section.process.model_dump(),
        latents="drawn from the posterior" if section.sample_posterior else "posterior mean", channels="all",
        dropped="nothing", **about,
    )  # fmt: skip
    return Measurement(f"{LOSS}@{about['images_trained']}", value, receipt)


@torch.no_grad()
def held_out_loss(
    objective: DenoisingObjective,
    codec: Codec,
    images: Iterator[dict[str, Any]],
    precision: Callable[[], AbstractContextManager] = nullcontext,
) -> tuple[float, int]:
    """The objective's loss, mean over `PASSES` times and noises of each image's latent, and how many images.

    Args:
        objective: in evaluation mode; image i meets the times and noises of the draws `PASSES i + k` of its seed.
        codec: what encodes; the loss is computed on its device.
        images: batches with `image`, and what the objective's conditioner needs.
        precision: makes the context of the denoiser, such as autocast.

    Raises:
        LatelierError: if there are no images.
    """
    total, n = torch.zeros((), dtype=torch.float64), 0
    for batch in encoded(codec, images, codec.device):
        count = len(batch["mean"])
        for k in range(PASSES):
            drawn = {**to_device(batch, codec.device), "sample_id": torch.arange(n, n + count) * PASSES + k}
            with precision():
                if objective.conditioner is not None:
                    drawn |= objective.conditioner.prepare(drawn, codec)
                total += count * objective(drawn).total.double().cpu()
        n += count
    if not n:
        raise LatelierError("convergence is measured on held-out images, but there are none.")
    return total.item() / (PASSES * n), n


def _distance(recipe: Recipe, pipeline: LatentDiffusionPipeline, about: Mapping[str, Any]) -> Measurement:
    """The Fréchet distance of the pipeline's samples, measured as gfd is, in the first features."""
    settings, training = recipe.evaluate, open_images(recipe)
    first = settings.model_copy(update={"metrics": ["gfd"], "features": settings.features[:1]})
    receipt = {
        **about, "reference": f"{recipe.data.source}, training images", "data": training.fingerprint,
        **{k: v for k, v in recipe.sample.model_dump().items() if k not in ("count", "batch")},
    }  # fmt: skip
    references = training.once(settings.batch, limit=settings.samples)
    samples = _samples(pipeline, recipe, min(settings.samples, len(training)))
    key = reference_key(training, settings.samples)
    (measured,) = evaluate_generation(samples, references, first, receipt, pipeline.device, key)
    return replace(measured, name=f"{BEGIN}{measured.name}@{about['images_trained']}")


def _samples(pipeline: LatentDiffusionPipeline, recipe: Recipe, count: int) -> Iterator[Tensor]:
    """Batches of samples of the recipe's settings; image i has the seed `sample.seed + i`."""
    records = held_out_records(recipe, pipeline)
    for batch in batches(recipe.sample, count):
        told = records(batch.seed - recipe.sample.seed, batch.count)
        yield pipeline(sample=batch, records=told, output_type="pt", progress=False).images
