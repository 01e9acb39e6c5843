"""How good images are, and how fast they are drawn, at several numbers of sampling steps.

Latent diffusion trades quality for speed twice: by the factor of its tokenizer, and by its steps (Rombach et al. 2022,
section 4.1 and figure 7). Drawing is timed alone: denoiser and decoder, neither features nor the reading of records.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from latelier.errors import LatelierError
from latelier.evaluation.distributions import FeatureStatistics
from latelier.evaluation.features import FeatureExtractor, load_extractor
from latelier.evaluation.reconstruction import read_images
from latelier.evaluation.results import Measurement, size_warning
from latelier.opening import held_out_records
from latelier.pipeline import LatentDiffusionPipeline
from latelier.receipt import make_receipt
from latelier.recipe import Recipe, Sample


@torch.no_grad()
def measure_sampling(
    pipeline: LatentDiffusionPipeline,
    references: Iterable[Mapping[str, Any]],
    recipe: Recipe,
    receipt: Mapping[str, Any],
) -> list[Measurement]:
    """Draw the same images with each of `evaluate.sampling_steps`, time it, and compare them with real ones.

    Args:
        pipeline: what draws, on the device that is to be measured.
        references: dicts with `image`; at most `evaluate.samples` images are read, once for all numbers of steps.
        recipe: the experiment; `sample` says how to draw, all but the steps, and `evaluate` what is measured.
        receipt: how the images come about: reference, tokenizer, ema, the settings of `sample`.

    Returns:
        For each number of steps, the fewest first, `gfd-<features>@<steps>` and `samples-per-second@<steps>`. As many
        images are drawn as there are references; image i has the seed `sample.seed + i` at each number of steps.

    Raises:
        LatelierError: if there are no references, or the sampler cannot make so many steps.
    """
    numbers = sorted(set(recipe.evaluate.sampling_steps))
    if not numbers:
        return []
    extractor = load_extractor(recipe.evaluate.features[0], pipeline.device)
    theirs = FeatureStatistics(extractor.dims)
    for images in read_images(references, recipe.evaluate.samples):
        theirs.update(extractor(images))
    if not theirs.n:
        raise LatelierError("There are no reference images to compare samples with at evaluate.sampling_steps.")
    about = {
        "n": theirs.n, "n_reference": theirs.n, **receipt, **extractor.describe(), "batch": recipe.sample.batch,
        "threads": torch.get_num_threads(), "drawn_on": str(pipeline.device),
    }  # fmt: skip
    records = held_out_records(recipe, pipeline)

    def draw(batch: Sample) -> tuple[Tensor, float]:
        """Images of one batch `(b, c, h, w)` in [-1, 1], and the seconds it took."""
        told = records(batch.seed - recipe.sample.seed, batch.count)
        begin = time.perf_counter()
        images = pipeline(sample=batch, records=told, output_type="pt", progress=False).images
        return images, time.perf_counter() - begin  # they come back on the CPU, so an accelerator is done with them

    warm_up = next(batches(recipe.sample.model_copy(update={"steps": numbers[0]}), theirs.n))
    draw(warm_up)
    result: list[Measurement] = []
    for steps in numbers:
        settings = recipe.sample.model_copy(update={"steps": steps})
        result += _measure(draw, settings, theirs, extractor, about)
    return result


def batches(sample: Sample, count: int) -> Iterator[Sample]:
    """Settings of one batch after the other; image i has the seed `sample.seed + i`, and the i-th class in turn.

    Args:
        sample: settings of all images.
        count: how many images there are in all.
    """
    for done in range(0, count, sample.batch):
        turn = done % len(sample.classes) if sample.classes else 0
        classes = sample.classes and sample.classes[turn:] + sample.classes[:turn]
        size = min(sample.batch, count - done)
        yield sample.model_copy(update={"seed": sample.seed + done, "count": size, "classes": classes})


def _measure(
    draw: Callable[[Sample], tuple[Tensor, float]],
    settings: Sample,
    theirs: FeatureStatistics,
    extractor: FeatureExtractor,
    about: Mapping[str, Any],
) -> list[Measurement]:
    """Quality and speed at one number of steps."""
    ours, seconds = FeatureStatistics(extractor.dims), 0.0
    for batch in batches(settings, theirs.n):
        images, took = draw(batch)
        ours.update(extractor(images))
        seconds += took
    receipt = make_receipt(**{**about, "steps": settings.steps})
    warning = size_warning(ours.n, extractor.dims)
    timed = {"seconds": seconds, "timed": "denoiser and decoder, wall clock, after one batch that does not count"}
    return [
        Measurement(f"gfd-{extractor.name}@{settings.steps}", ours.distance(theirs), {**receipt, **warning}),
        Measurement(f"samples-per-second@{settings.steps}", ours.n / seconds, {**receipt, **timed}),
    ]
