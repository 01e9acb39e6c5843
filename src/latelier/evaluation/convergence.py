"""How fast a denoiser learns: its loss and its images at snapshots of training (DC-AE 1.5, figure 1).

Every snapshot meets the same held-out latents at the same times, with the same noise, and samples from the same seeds.
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

from latelier.data.latents import encode_batches
from latelier.data.loader import ImageDataset
from latelier.denoisers.objective import DenoisingObjective
from latelier.errors import LatelierError
from latelier.evaluation.generation import describe_sampling, evaluate_generation, generate_images
from latelier.evaluation.references import reference_key
from latelier.evaluation.results import Measurement, write_measurements
from latelier.opening import open_images, snapshot_folder
from latelier.pipeline import LatentDiffusionPipeline
from latelier.receipt import make_receipt
from latelier.recipe import Recipe
from latelier.tokenizers.codec import Codec

PASSES = 4  # times, each with noise of its own, at which each held-out latent is met


def measure_convergence(recipe: Recipe, codec: Codec, held_out: ImageDataset) -> list[Measurement]:
    """Measure every snapshot of the run's denoiser, if the recipe asks for `convergence`.

    Numbers go into the section `convergence` of metrics.json, those of each snapshot as soon as they are there.

    Returns:
        For each snapshot, by images seen, `convergence-loss@<images>`: the objective's loss on at most
        `evaluate.samples` held-out images, mean over images and times; and, if gfd is asked for too,
        `convergence-gfd-<features>@<images>` in the first of `evaluate.features`, of as many samples as gfd has, with
        the recipe's sampler.
    """
    section, settings = recipe.denoiser, recipe.evaluate
    if section is None or "convergence" not in settings.metrics:
        return []
    folders = {images: snapshot_folder(recipe.folder, images) for images in section.snapshots_at()}
    if missing := [f"{images:,}" for images, folder in folders.items() if not folder.is_dir()]:
        raise LatelierError(
            f"{recipe.folder} has no snapshots at {' and '.join(missing)} images, which convergence needs; they are "
            "kept while the denoiser is trained. Train it anew, or take convergence out of evaluate.metrics."
        )
    pipeline = LatentDiffusionPipeline.from_pretrained(recipe.folder / "pipeline").to(codec.device)
    shared = {
        "reference": f"{recipe.data.source}, held out", "data": held_out.fingerprint, "passes": PASSES,
        "seed": settings.seed, "precision": section.precision,
        "latent_shape": list(codec.latent_shape(*recipe.data.image_size)),
        "architecture": type(codec.tokenizer).__name__, "loss": section.loss, "cosine_weight": section.cosine_weight,
        "process": section.process.model_dump(), "channels": "all", "dropped": "nothing",
        "latents": "drawn from the posterior" if section.sample_posterior else "posterior mean",
    }  # fmt: skip
    found: list[Measurement] = []
    tokenizer = codec.hash()
    for images, folder in folders.items():
        load_snapshot(pipeline, folder)
        about = {"images_trained": images, "of": section.images, "ema": section.ema, "tokenizer": tokenizer}
        objective = DenoisingObjective(
            pipeline.denoiser, pipeline.conditioner, pipeline.process, settings.seed, dropout=(), loss=section.loss,
            cosine_weight=section.cosine_weight, sample_posterior=section.sample_posterior,
        )  # fmt: skip
        latents = held_out.once(settings.batch, limit=settings.samples)
        loss, n = held_out_loss(objective.eval(), codec, latents, lambda: pipeline._autocast(section.precision))
        found.append(Measurement(f"convergence-loss@{images}", loss, make_receipt(n=n, **shared, **about)))
        if "gfd" in settings.metrics:
            found.append(_distance(recipe, pipeline, about))
        write_measurements(recipe.folder / "metrics.json", found, "convergence")
    return found


def load_snapshot(pipeline: LatentDiffusionPipeline, folder: Path) -> None:
    """Put a snapshot's denoiser, and its conditioner if that was trained, in place of the pipeline's."""
    for name, place in {"denoiser": folder, "conditioner": folder / "conditioner"}.items():
        if place.is_dir():
            model = type(getattr(pipeline, name)).from_pretrained(place)
            pipeline.register_modules(**{name: model.to(pipeline.device).eval()})


@torch.no_grad()
def held_out_loss(
    objective: DenoisingObjective,
    codec: Codec,
    images: Iterator[dict[str, Any]],
    precision: Callable[[], AbstractContextManager] = nullcontext,
) -> tuple[float, int]:
    """The objective's loss, mean over `PASSES` times and noises of each image's latent, and how many images.

    Image i meets the times and noises of the sample ids `PASSES i + k`. The objective is in evaluation mode; `images`
    are batches with `image` and what its conditioner needs; `precision` makes a context, such as autocast.
    """
    total, n = torch.zeros((), dtype=torch.float64), 0
    for batch in encode_batches(codec, images, codec.device):
        count = len(batch["mean"])
        there = {k: v.to(codec.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        for k in range(PASSES):
            drawn = {**there, "sample_id": torch.arange(n, n + count) * PASSES + k}
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
        **describe_sampling(recipe.sample),
    }  # fmt: skip
    references = training.once(settings.batch, limit=settings.samples)
    samples = generate_images(pipeline, recipe, min(settings.samples, len(training)))
    key = reference_key(training, settings.samples)
    (measured,) = evaluate_generation(samples, references, first, receipt, pipeline.device, key)
    return replace(measured, name=f"convergence-{measured.name}@{about['images_trained']}")
