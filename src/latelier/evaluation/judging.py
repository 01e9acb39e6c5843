"""Judge the latent space of a run: which measures its recipe asks for, and which images they learn from.

What is measured on held-out images alone needs nothing more. Mixtures, probes and the small denoiser first learn from
other images: the training split, without augmentation. Where training and held-out images are the same ones, as in
`latelier inspect`, chance divides them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from latelier.data.loader import ImageDataset
from latelier.data.sources import open_source
from latelier.evaluation.channels import draw_channel_maps, measure_channels
from latelier.evaluation.codebook import measure_codebook
from latelier.evaluation.cost import measure_cost
from latelier.evaluation.difficulty import measure_difficulty
from latelier.evaluation.equivariance import measure_equivariance
from latelier.evaluation.latent_map import draw_latent_map
from latelier.evaluation.latent_space import measure_compression, measure_smoothness
from latelier.evaluation.mixture import measure_mixture
from latelier.evaluation.posterior import measure_posterior
from latelier.evaluation.prefixes import measure_prefixes
from latelier.evaluation.probes import measure_probes
from latelier.evaluation.reconstruction import SHOWN, draw_errors
from latelier.evaluation.results import ERRORS, Measurement, write_measurements
from latelier.evaluation.spectrum import measure_spectrum
from latelier.keyed_random import KeyedRandom
from latelier.opening import open_images
from latelier.recipe import Recipe
from latelier.report.figures import CHANNELS, MAP
from latelier.tokenizers.codec import Codec

Batches = Iterator[dict[str, Any]]

HELD_OUT = (
    ("smoothness", measure_smoothness), ("compression", measure_compression), ("spectrum", measure_spectrum),
    ("prefixes", measure_prefixes), ("channels", measure_channels), ("posterior", measure_posterior),
    ("equivariance", measure_equivariance), ("codebook", measure_codebook),
)  # fmt: skip
LEARNT = (("gmm", measure_mixture), ("probe", measure_probes), ("difficulty", measure_difficulty))


def judge_latents(recipe: Recipe, codec: Codec, held_out: ImageDataset) -> list[Measurement]:
    """The measures of the latent space and what the tokenizer costs, as far as the recipe asks for them.

    Numbers go into the sections `latent space` and `cost` of metrics.json, each as soon as it is there, and the map
    into latent-map.png, images of channels into channels.png, errors of single pixels into error-map.png.

    Args:
        recipe: of the run; its `evaluate` says what is measured.
        codec: the run's tokenizer.
        held_out: the images to measure on.
    """
    settings, found, file = recipe.evaluate, [], recipe.folder / "metrics.json"
    reference = f"{recipe.data.source}, held out"
    write_measurements(file, [], "latent space")
    for name, measure in HELD_OUT:
        if name in settings.metrics:
            images = held_out.once(settings.batch, limit=settings.samples)
            found += measure(codec, images, settings, reference, {"data": held_out.fingerprint})
            write_measurements(file, found, "latent space")
    sides: tuple[Callable[[], Batches], Callable[[], Batches], dict[str, Any]] | None = None
    for name, learn in LEARNT:
        if name in settings.metrics:
            training, rest, about = sides = sides or two_sides(recipe, held_out)
            found += learn(codec, training(), rest(), settings, reference, about)
            write_measurements(file, found, "latent space")
    if "map" in settings.metrics:
        images = held_out.once(settings.batch, limit=settings.samples)
        draw_latent_map(codec, images, settings, held_out.class_names, recipe.folder / MAP)
    if "channels" in settings.metrics and len(codec.latent_shape(*recipe.data.image_size)) == 3:
        draw_channel_maps(codec, held_out.once(settings.batch, limit=settings.batch), recipe.folder / CHANNELS)
    if {"l1", "psnr"} & set(settings.metrics):
        draw_errors(codec, held_out.once(SHOWN, limit=SHOWN), recipe.folder / ERRORS)
    if "cost" in settings.metrics:
        cost = measure_cost(codec, *recipe.data.image_size)
        write_measurements(file, cost, "cost")
        found += cost
    return found


def two_sides(
    recipe: Recipe, held_out: ImageDataset
) -> tuple[Callable[[], Batches], Callable[[], Batches], dict[str, Any]]:
    """Images to learn from, images to measure on, and what receipts say of them.

    Returns:
        Two functions, each of which begins a pass over its side anew, and fields for the receipt.
    """
    settings, about = recipe.evaluate, {"data": held_out.fingerprint}
    if same_images(recipe, held_out):
        most = 2 * max(settings.probe_samples, settings.samples)

        def half(first: bool) -> Batches:
            return divide(held_out.once(settings.batch, limit=most), settings.seed, first)

        about["learnt_from"] = "half of the same images, by chance; measured on the other half"
        return lambda: half(True), lambda: half(False), about
    training = open_images(recipe)
    about |= {"learnt_from": f"{recipe.data.source}, training images", "training_data": training.fingerprint}
    return (
        lambda: training.once(settings.batch, limit=settings.probe_samples),
        lambda: held_out.once(settings.batch, limit=settings.samples),
        about,
    )


def same_images(recipe: Recipe, held_out: ImageDataset) -> bool:
    """Whether the held-out images are the training images, which they are where `val_source` says so."""
    data = recipe.data
    if data.val_source is None:
        return False
    everything = open_source(data.model_copy(update={"length": None}))
    return everything.fingerprint == held_out.source.fingerprint


def divide(batches: Batches, seed: int, first: bool) -> Batches:
    """The images on one side of a coin that is thrown for each image's number in its source.

    Args:
        batches: with `index` `(b,)` and `image`; of the other keys `label` is kept.
        seed: of the coin.
        first: which side.
    """
    for batch in batches:
        mine = (KeyedRandom(seed, batch["index"]).uniform("learnt from") < 0.5) == first  # (b,)
        if mine.any():
            tensors = {key: batch[key] for key in ("image", "index", "label") if key in batch}
            yield {key: torch.as_tensor(values)[mine] for key, values in tensors.items()}
