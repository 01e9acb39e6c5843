"""A check before a long training: open the data, run steps of each stage with every loss term, estimate the cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from latelier.data.latents import encode_batches, latent_statistics
from latelier.data.records import UNREADABLE, Source
from latelier.data.sources import open_source
from latelier.data.tables import StreamSource
from latelier.errors import LatelierError
from latelier.evaluation.features import check_features
from latelier.losses.discriminator import Discriminator, add_adversarial_loss
from latelier.losses.teachers import open_teacher
from latelier.opening import best_device, open_images, open_pretrained
from latelier.recipe import Adversarial, Recipe, TrainedTokenizer, Training
from latelier.terminal import console
from latelier.tokenizers import build_objective, build_perceptual, build_tokenizer, last_layer
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.pretrained import PretrainedSection
from latelier.training import checkpoint, denoiser_loop, tokenizer_loop
from latelier.training.runtime import make_accelerator, peak_memory, to_device
from latelier.training.step import adamw

TIMED_STEPS = 3
SPLITS = {"train": "training", "val": "held-out"}
NEEDED = {"class": "label", "text": "caption", "layout": "boxes", "segmentation": "segmentation", "map": "map"}
TRIES = 8  # records that are looked at, when the first ones cannot be read
NAMES_SHOWN = 10
FEW = 64  # images that tell the scale of latents


@dataclass
class Trial:
    """Cost of one stage or phase, from a few steps."""

    stage: str  # `tokenizer`, the name of one of its phases, or `denoiser`
    images: int  # length of training
    parameters: int  # that are trained
    terms: dict[str, float]  # unweighted, of the last step
    seconds_per_image: float  # over all processes, the discriminator's steps included
    flops_per_image: float  # 2 for a multiply-add; 0 if they were not counted
    memory_gb: float  # peak


def check(recipe: Recipe) -> list[Trial]:
    """Try a recipe without training it, print a table, and return its rows; raises what would stop the run later."""
    check_features(recipe.evaluate)
    for split, source in check_sources(recipe).items():
        dataset = open_images(recipe, split)
        next(dataset.once(TRIES, limit=TRIES), None)
        about = f"{len(dataset):,} images of {' x '.join(map(str, dataset.shape))}{_classes(source)}"
        console.print(f"Data, {SPLITS[split]}: {about}.", highlight=False, markup=False)
    rows = [*try_tokenizer(recipe), *try_denoiser(recipe)]
    console.print(_table(rows))
    return rows


def check_sources(recipe: Recipe) -> dict[str, Source | StreamSource]:
    """Open the training and the held-out images without decoding them; raises what would stop the run later.

    The held-out images must have no other classes than the training images, and all that the denoiser is told.
    """
    sources = {split: open_source(recipe.data, split) for split in SPLITS}
    kinds = {condition.kind for condition in recipe.denoiser.condition} if recipe.denoiser else set()
    for split, source in sources.items():
        if without := getattr(source, "boxes_without_area", 0):
            console.print(f"Data, {SPLITS[split]}: {without:,} boxes have no area in their images and are left out.")
        record = _first_record(source)
        asked = kinds if split == "train" or kinds - {"class"} else set()  # classes alone are drawn without records
        if lacking := [kind for kind in asked if record and NEEDED.get(kind, "image") not in record]:
            raise LatelierError(
                f"denoiser.condition = {lacking[0]!r} needs {NEEDED[lacking[0]]!r} of each image, but the "
                f"{SPLITS[split]} images of {recipe.data.source} have none; add them, or choose another condition."
            )
        if "text" in asked:
            next(open_images(recipe, split).captions(), None)  # refuses images without a caption
    if recipe.denoiser and recipe.denoiser.align:
        open_teacher(recipe.denoiser.align.teacher)  # refused now, not after the tokenizer is trained
    return sources


def _first_record(source: Source | StreamSource) -> dict[str, Any]:
    """The first record that can be opened; nothing of a stream."""
    for index in range(0 if isinstance(source, StreamSource) else min(TRIES, len(source))):
        with suppress(*UNREADABLE):
            return source[index]  # type: ignore[index]
    return {}


def _classes(source: Source | StreamSource) -> str:
    """Class names and, if labels are known, how many images each has."""
    names, labels = source.class_names or [], getattr(source, "labels", None)
    counts = ["" if labels is None else f" {labels.count(i):,}" for i in range(min(NAMES_SHOWN, len(names)))]
    shown = ", ".join(f"{name}{count}" for name, count in zip(names, counts))
    return f", {len(names):,} classes: {shown}{', ...' * (len(names) > NAMES_SHOWN)}" if names else ""


def try_tokenizer(recipe: Recipe, count: bool = False) -> Iterator[Trial]:
    """A trial of each phase of stage 1; none if the tokenizer is not trained."""
    section = recipe.tokenizer
    if not isinstance(section, TrainedTokenizer):
        return
    for number in range(1 + len(section.phases)):
        name, training = section.phase(number)
        dataset = open_images(recipe, size=training.image_size)
        size = training.image_size or recipe.data.image_size
        tokenizer = tokenizer_loop.fit(build_tokenizer(recipe.tokenizer, recipe.data), size)
        tokenizer_loop.check_sizes(recipe, Codec(tokenizer).factor)
        perceptual = build_perceptual(training)
        discriminator = tokenizer_loop.prepare_discriminator(training, recipe, make_accelerator(training))
        objective = build_objective(training, recipe.seed, tokenizer, perceptual, dataset)
        batch = next(dataset.stream(_micro_batch(training)))
        yield _try(name, training, objective, batch, count, discriminator)


def try_denoiser(recipe: Recipe, count: bool = False) -> Iterator[Trial]:
    """A trial of stage 2, on normalised latents of an untrained or pretrained tokenizer; none without a denoiser."""
    if recipe.denoiser is None:
        return
    dataset, codec = open_images(recipe), _codec(recipe)
    objective = denoiser_loop.build_objective(recipe, codec, dataset)
    batch = to_device(next(dataset.stream(_micro_batch(recipe.denoiser))), codec.device)
    if codec.mean is None:  # as in the run, though there of thousands of images
        mean, std = latent_statistics(codec, dataset, FEW, recipe.seed)
        codec = Codec(codec.tokenizer, mean, std, precision=codec.precision, norm=codec.norm)
    with torch.no_grad():
        batch = next(encode_batches(codec, iter([batch]), codec.device))
        batch |= objective.to(codec.device).prepare(batch, codec, seen=0)
    yield _try("denoiser", recipe.denoiser, objective, batch, count)


def _micro_batch(training: Training) -> int:
    return training.micro_batch or -(-training.batch // make_accelerator(training).num_processes)


def _codec(recipe: Recipe) -> Codec:
    if isinstance(recipe.tokenizer, PretrainedSection):
        return open_pretrained(recipe.tokenizer).to(best_device())
    tokenizer = tokenizer_loop.fit(build_tokenizer(recipe.tokenizer, recipe.data), recipe.data.image_size)
    codec = Codec(tokenizer, precision="auto", norm=getattr(recipe.tokenizer, "norm", None))
    codec.latent_shape(*recipe.data.image_size)
    return codec.to(best_device())


def _try(
    name: str,
    training: Training,
    objective: nn.Module,
    batch: dict[str, Any],
    count: bool,
    discriminator: Discriminator | None = None,
) -> Trial:
    """Steps on one micro-batch, before and after a discriminator's start, weighted by their shares of the training."""
    accelerator = make_accelerator(training)
    parameters = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    optimizer = adamw(objective.to(accelerator.device), training.lr, training.betas, training.weight_decay)
    ema = checkpoint.make_ema(objective, training.ema)
    objective, optimizer = accelerator.prepare(objective, optimizer)
    adversarial = getattr(training, "adversarial", None) or Adversarial()
    first = max(0, adversarial.start - adversarial.ahead) if discriminator else 0  # images before it is trained
    batch = to_device(batch, accelerator.device)

    def step(seen: int) -> dict[str, float]:
        terms = objective({**batch, "seen": seen})
        others = None
        if discriminator is not None:
            with accelerator.autocast():
                if seen >= adversarial.start:
                    last = last_layer(accelerator.unwrap_model(objective).tokenizer)
                    weights = (adversarial.weight, adversarial.adaptive)
                    add_adversarial_loss(terms, discriminator, last, batch["sample_id"], *weights)
                if seen >= first:
                    real = batch["image"] if terms.target is None else terms.target
                    others = discriminator(real, terms.reconstruction.detach(), batch["sample_id"])
        losses = {**terms.losses, **(others.losses if others else {})}
        if bad := [k for k, v in losses.items() if not torch.isfinite(v.detach()).all()]:
            raise LatelierError(f"{name}: the loss term {', '.join(bad)} is not finite on the very first step.")
        accelerator.backward(terms.total + (others.total if others else 0))
        optimizer.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.step(checkpoint.trained(objective))
        return {key: value.item() for key, value in losses.items()}

    # The share of training without the discriminator, or, without one, with an alignment that ends.
    ends = next((t.until for t in getattr(training, "regularise", ()) if t.kind == "align"), None) or 0
    late = (first if discriminator else ends) / training.images
    end = 10**15  # images: whatever starts late has started; an integer, as codebooks count in integers
    shares = {0: min(1.0, late), end: max(0.0, 1 - late)}
    images = len(batch["sample_id"]) * accelerator.num_processes
    terms, seconds, flops = {}, 0.0, 0.0
    for seen, share in shares.items():
        if share or seen:  # every loss term is tried
            terms = step(seen)
            seconds += share * _median_seconds(step, seen, accelerator.device) / images
            counted = _flops(step, seen, accelerator.device) if count else 0
            flops += share * counted * accelerator.num_processes / images
    memory = peak_memory(accelerator.device)
    return Trial(name, training.images, parameters, terms, seconds, flops, memory)


def _median_seconds(step: Any, seen: int, device: torch.device) -> float:
    seconds = []
    for _ in range(TIMED_STEPS):
        start = time.perf_counter()
        step(seen)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _flops(step: Any, seen: int, device: torch.device) -> int:
    # The fused attention of the CPU is not counted; its definition in matrix products is, but takes more memory.
    attention = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
    with FlopCounterMode(display=False) as counter, attention:
        step(seen)
    return counter.get_total_flops()


def _table(rows: list[Trial]) -> Table:
    table = Table("stage", "parameters", "loss terms", "img/s", "peak memory", "expected time")
    for row in rows:
        terms = "  ".join(f"{k} {v:.4g}" for k, v in row.terms.items())
        hours = row.images * row.seconds_per_image / 3600
        expected = f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"
        table.add_row(
            row.stage, f"{row.parameters:,}", terms, f"{1 / row.seconds_per_image:,.0f}",
            f"{row.memory_gb:.1f} GB", expected,
        )  # fmt: skip
    return table
