"""Evaluate a trained run: reconstruction and generation on all processes, then what only one has to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latelier.analysis.latent_map import draw_latent_map
from latelier.analysis.sample import LatentSample, collect
from latelier.analysis.statistics import draw_channel_maps
from latelier.conditioning.condition import components
from latelier.conditioning.inputs import cycle_rows
from latelier.data.builtin import SceneSource
from latelier.data.loader import ImageDataset
from latelier.data.sources import open_source
from latelier.data.tensors import IN_MEMORY
from latelier.errors import LatelierError, NotMeasurable
from latelier.evaluation import generation, results
from latelier.evaluation.archives import write_images
from latelier.evaluation.conditions import condition_grid, evaluate_conditions
from latelier.evaluation.cost import measure_cost, measure_sampling
from latelier.evaluation.features import check_features, load_extractor
from latelier.evaluation.generation import evaluate_generation, generate_images, measure_convergence, nearest
from latelier.evaluation.metrics import METRICS
from latelier.evaluation.objects import (
    MOST_SAMPLES,
    Asked,
    check_scenes,
    known_objects,
    measure_objects,
    open_recogniser,
)
from latelier.evaluation.reconstruction import SHOWN, draw_errors, evaluate_reconstruction
from latelier.evaluation.references import describe_images, reference_key
from latelier.evaluation.regions import MOST_TRAINING
from latelier.evaluation.results import LEFT_OUT, Measurement, Result, gather_in_order, is_main, left_out, rank
from latelier.evaluation.sprites import Found
from latelier.images import make_pairs, save_png, to_uint8
from latelier.keyed_random import KeyedRandom
from latelier.opening import best_device, held_out_records, open_codec, open_images, open_run
from latelier.pipeline import LatentDiffusionPipeline
from latelier.publish import manifest
from latelier.receipt import make_receipt
from latelier.recipe import Recipe
from latelier.report.figures import CHANNELS, MAP, draw_spectrum
from latelier.report.run import write_report
from latelier.terminal import counted, say
from latelier.tokenizers.codec import Codec
from latelier.training.run_folder import digest

Row = Mapping[str, Any]
CHANNEL_IMAGES = 8  # in the image of channels
NEAREST_SHOWN = 16
NEAREST_SEARCHED = 2_000
RECONSTRUCTIONS_SHOWN = 16


def evaluate(
    recipe: Recipe, codec: Codec | None = None, held_out: ImageDataset | None = None, npz: Path | None = None
) -> list[Measurement]:
    """Measure a trained run; numbers and receipts go to metrics.json, images and plots to report.html.

    Its tokenizer and held-out images may be given; otherwise they are those of the recipe.

    All processes take part in what is measured of many images; the numbers are those of one process, which alone
    returns them. The samples of one process can be kept in `npz`, in the form of the ADM evaluator.
    """
    check_features(recipe.evaluate)
    if npz is not None and rank()[1] > 1:
        raise LatelierError(
            f"--npz {npz} writes the samples of one process, not of {rank()[1]}; start it without others."
        )
    codec, held_out = codec or open_codec(recipe).to(best_device()), held_out or open_images(recipe, "val")
    trained = (recipe.folder / "pipeline" / "model_index.json").is_file()  # a denoiser, too
    pipeline = open_run(recipe.folder)[0] if trained else None
    about = describe_images(recipe, held_out, "val")
    ended = manifest(recipe.folder / "tokenizer") or {}
    about |= {f"tokenizer_{key}": ended[key] for key in ("images", "psnr") if "psnr" in ended}  # of `until_psnr`
    if is_main(True):
        results.forget_left_out(recipe.folder / "metrics.json")
        if "trained_on" in about:
            say(f"Trained on {about['trained_on']} ({about['reference']}): their numbers say little about others.")
    recipe = measurable(recipe, held_out, trained)
    measured = _write(recipe, "reconstruction", _reconstruction(recipe, codec, held_out, about))
    shown: list[Tensor] = []
    sampled: list[Tensor] = []
    if pipeline is not None:
        with nullcontext() if npz is None else write_images(npz, _labels(recipe, pipeline)) as keep:
            measured += _write(recipe, "generation", _generation(recipe, pipeline, held_out, shown, sampled, keep))
    elif npz is not None:
        raise LatelierError(f"{recipe.folder} has no denoiser, so there are no samples to write to {npz}.")
    if not is_main(True):
        return []
    if "objects" in recipe.evaluate.metrics:
        measured += _objects(recipe, codec, held_out, about, pipeline, sampled)
    measured += evaluate_latents(recipe, codec, held_out, about)
    draw_figures(recipe, codec, held_out, {one.name: one for one in measured})
    if "cost" in recipe.evaluate.metrics:
        measured += _write(recipe, "cost", measure_cost(codec, *recipe.data.image_size))
    if pipeline is not None:
        if recipe.data.channels in (1, 3):
            _save_nearest(recipe, shown[0])
        measured += _attempt(recipe, "generation", _speed, pipeline)
        measured += _attempt(recipe, "tasks", _tasks, pipeline, held_out, about)
        measured += _attempt(recipe, "convergence", measure_convergence, codec, held_out)
    write_report(recipe.folder)
    return [measurement for measurement in measured if LEFT_OUT not in measurement.receipt]


def _attempt(recipe: Recipe, section: str, measure: Callable[..., list[Measurement]], *on: Any) -> list[Measurement]:
    try:
        return _write(recipe, section, measure(recipe, *on))
    except NotMeasurable as error:
        return _write(recipe, section, [left_out(section, error)])


def measurable(recipe: Recipe, held_out: ImageDataset, trained: bool) -> Recipe:
    """The recipe without the metrics of images that its images do not allow; metrics.json says why."""
    counts = {"reconstruction": _count(recipe, held_out)}
    counts |= {"generation": _count(recipe, open_images(recipe))} if trained else {}
    kept = []
    for name in recipe.evaluate.metrics:
        group, n = METRICS[name].group, counts.get(METRICS[name].group)
        try:
            if n and (why := METRICS[name].lacks(n, recipe.data.channels, recipe.data.image_size)):
                raise NotMeasurable(why)
            if name == "objects":
                check_scenes(held_out.source, recipe.data.channels)
            kept.append(name)
        except NotMeasurable as error:
            _write(recipe, group, [left_out(name, error)])
    return recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"metrics": kept})})


def _count(recipe: Recipe, images: ImageDataset) -> int:
    """How many images are measured; of streams, which may not know their length, at most."""
    most = recipe.evaluate.samples
    return most if recipe.data.streaming else min(most, len(images))


def evaluate_latents(recipe: Recipe, codec: Codec, held_out: ImageDataset, images: Row) -> list[Measurement]:
    """The measures of the latent space that the recipe asks for, each written as soon as it is there, or left out.

    `images` is what receipts say of them, see `describe_images`.
    """
    settings, found = recipe.evaluate, list[Measurement]()
    names = [name for name, metric in METRICS.items() if metric.group == "latents" and name in settings.metrics]
    if not names:
        return []
    batches = counted("encoding", held_out.once(settings.batch, limit=settings.samples), _count(recipe, held_out))
    sample = collect(codec, batches, settings.samples)
    common = {**images, "image_size": sample.image_size, **make_receipt(tokenizer=codec.hash())}
    sides: tuple[LatentSample, LatentSample, dict[str, Any]] | None = None
    for number, name in enumerate(names, 1):
        say(f"Measuring {name} ({number} of {len(names)})")
        metric, given, about = METRICS[name], {"sample": sample, "codec": codec}, common
        if "train" in metric.takes:  # mixtures, probes and the small denoiser first learn from other images
            sides = sides or two_sides(recipe, codec, held_out, sample)
            given |= {"train": sides[0], "sample": sides[1]}
            about = {**common, **sides[2]}
        options = {key: getattr(settings, key) for key in metric.settings}
        try:
            if name == "map":
                save_png(draw_latent_map(sample, held_out.class_names, settings.seed), recipe.folder / MAP)
            else:
                measured = metric.load()(*(given[key] for key in metric.takes), **options)
                found += wrap(measured, {"n": len(given["sample"]), **about})
        except NotMeasurable as error:
            found.append(left_out(name, error))
        _write(recipe, "latent space", found)
    return found


def wrap(found: Mapping[str, Result], common: Mapping[str, Any]) -> list[Measurement]:
    """Results with their receipts: what they have in common, and details."""
    return [Measurement(name, r.value, {**common, **r.details}, r.interval) for name, r in found.items()]


def two_sides(
    recipe: Recipe, codec: Codec, held_out: ImageDataset, sample: LatentSample
) -> tuple[LatentSample, LatentSample, dict[str, Any]]:
    """Latents to learn from, latents to measure on, and what receipts say of them.

    Those to learn from are of training images, without augmentation. Where these are the held-out images, as in
    `latelier inspect`, chance divides them by their numbers in their source; `sample` has some that are encoded.
    """
    settings = recipe.evaluate
    if not same_images(recipe, held_out):
        training, count = open_images(recipe), settings.probe_samples
        train = collect(codec, training.once(settings.batch, limit=count), count, images=False)
        learnt_from = f"{recipe.data.source}, training images"
        return train, sample, {"learnt_from": learnt_from, "training_data": training.fingerprint}
    most = 2 * max(settings.probe_samples, settings.samples)
    everything = collect(codec, held_out.once(settings.batch, limit=most), most, images=False, known=sample)
    heads = KeyedRandom(settings.seed, everything.index).uniform("learnt from") < 0.5  # (n,)
    train, rest = everything[heads][: settings.probe_samples], everything[~heads][: settings.samples]
    return train.on_own_scale(), rest, {"learnt_from": "half of the same images, by chance; measured on the other half"}


def same_images(recipe: Recipe, held_out: ImageDataset) -> bool:
    """Whether the held-out images are the training images, which they are where `val_source` says so."""
    if recipe.data.source == IN_MEMORY:
        return True
    if recipe.data.val_source is None:
        return False
    return open_source(recipe.data.model_copy(update={"length": None})).fingerprint == held_out.source.fingerprint


def draw_figures(recipe: Recipe, codec: Codec, held_out: ImageDataset, measured: Mapping[str, Measurement]) -> None:
    """Reconstructions, maps of latent channels, and errors of single pixels, of a few images; spectra of all."""
    folder, metrics, count = recipe.folder, recipe.evaluate.metrics, recipe.evaluate.batch
    save_reconstructions(codec, held_out, folder / "reconstructions.png")
    if "channels" in metrics and len(codec.latent_shape(*recipe.data.image_size)) == 3:
        images = next(held_out.once(count, limit=count))["image"][:CHANNEL_IMAGES]
        with torch.no_grad():
            z = codec.encode(images.to(codec.device)).cpu()
        save_png(draw_channel_maps(images, z), folder / CHANNELS)
    if (spectra := measured.get("high-frequency")) is not None:
        draw_spectrum(folder, spectra.receipt)
    if {"l1", "psnr"} & {*metrics}:
        draw_errors(codec, held_out.once(SHOWN, limit=SHOWN), folder / results.ERRORS)


def save_reconstructions(codec: Codec, dataset: ImageDataset, out: Path) -> None:
    """The first images above their reconstructions, for looking at."""
    images = next(dataset.once(RECONSTRUCTIONS_SHOWN, limit=RECONSTRUCTIONS_SHOWN))["image"]
    with torch.no_grad():
        result = codec.decode(codec.encode(images.to(codec.device))).clamp(-1, 1).cpu()
    save_png(make_pairs(images, result, columns=min(8, len(images))), out)


def _reconstruction(recipe: Recipe, codec: Codec, held_out: ImageDataset, about: Row) -> list[Measurement]:
    """The held-out images through the tokenizer."""
    settings = recipe.evaluate
    batches = held_out.once(settings.batch, *rank(), limit=settings.samples, whole=True)
    return evaluate_reconstruction(
        codec,
        counted("reconstructing", batches, _count(recipe, held_out) // rank()[1], is_main(True)),
        settings,
        about["reference"],
        {key: value for key, value in about.items() if key != "reference"},
        key=reference_key(held_out, settings.samples),
        shared=True,
    )


def _generation(
    recipe: Recipe, pipeline: LatentDiffusionPipeline, held_out: ImageDataset, shown: list[Tensor],
    sampled: list[Tensor], keep: Callable[[Tensor], None] | None,
) -> list[Measurement]:  # fmt: skip
    """Compare fresh samples with training images, and with held-out ones; the first samples of this process are
    appended to `shown`, those of all in 8-bit levels to `sampled`, if `objects` needs them, and `keep` is called with
    the levels `(b, h, w, c)`.
    """
    settings, training = recipe.evaluate, open_images(recipe)
    own: list[Tensor] = []
    (process, processes), count = rank(), min(settings.samples, len(training))

    def drawn() -> Iterator[Tensor]:
        batches = generate_images(pipeline, recipe, count, process, processes)
        for images in counted("sampling", batches, _count(recipe, training) // processes, process == 0):
            if not shown:
                shown.append(images[:NEAREST_SHOWN].cpu())
            if keep is not None:
                keep(to_uint8(images).permute(0, 2, 3, 1))
            if "objects" in settings.metrics and sum(map(len, own)) < MOST_SAMPLES:
                own.append(to_uint8(images).cpu())
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
        held_out=held_out.once(settings.batch, process, processes, limit=count, whole=True),
        held_out_key=reference_key(held_out, count),
    )
    if not shown and process == 0:  # nothing was measured of them
        next(samples, None)
    if keep is not None or "objects" in settings.metrics:  # nor of the rest
        list(samples)
    sampled += [batch["levels"] for batch in gather_in_order(({"levels": levels} for levels in own), shared=True)]
    return measured


def _objects(
    recipe: Recipe, codec: Codec, held_out: ImageDataset, about: Row, pipeline: LatentDiffusionPipeline | None,
    sampled: list[Tensor],
) -> list[Measurement]:  # fmt: skip
    """Which objects reconstructions and samples show."""
    scenes, training = check_scenes(held_out.source), open_images(recipe)
    say("Measuring objects")
    recogniser = open_recogniser(scenes, recipe.data.flip)
    found = {
        "objects-reconstructed": recogniser.reconstructed(
            lambda images: codec.decode(codec.encode(images.to(codec.device)))
        )
    }
    measured = _write(recipe, "reconstruction", wrap(found, make_receipt(**about, tokenizer=codec.hash())))
    if pipeline is None:
        return measured
    images = torch.cat(sampled)[:MOST_SAMPLES].float() / 127.5 - 1  # (n, 3, h, w)
    asked = _asked(recipe, pipeline, scenes, len(images))
    found = measure_objects(images, recogniser, check_scenes(training.source), asked)
    receipt = make_receipt(**_sampled(recipe, pipeline, training))
    return measured + _write(recipe, "generation", wrap(found, receipt))


def _asked(recipe: Recipe, pipeline: LatentDiffusionPipeline, scenes: SceneSource, count: int) -> Asked | None:
    """What samples were asked for, see `generate_images`: classes in turn, or held-out records in turn."""
    known = set(components(pipeline.conditioner))
    if labels := _labels(recipe, pipeline):
        return Asked("class", [[Found(label, (0, 0, 0, 0))] for label in labels[:count]])
    objects = [known_objects(scenes, i % len(scenes)) for i in range(count)]
    if known & {"layouts", "segmentations"}:
        return Asked("layout", objects)
    if "prompts" in known:
        return Asked("text", objects)
    return Asked("class", objects) if "classes" in known else None


def _labels(recipe: Recipe, pipeline: LatentDiffusionPipeline) -> list[int] | None:
    """The classes of `evaluate.samples` samples, as `generate_images` asks for them; None without classes."""
    known = components(pipeline.conditioner)
    if "classes" not in known or "label" in held_out_records(recipe, pipeline)(0, 1):
        return None
    rows: list[int] = []
    for settings in generation.batches(recipe.sample, _count(recipe, open_images(recipe))):
        names = settings.classes or range(known["classes"].config["num_classes"])
        rows += known["classes"].inputs(cycle_rows(list(names), range(settings.count)))["label"].tolist()
    return rows


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


def _tasks(recipe: Recipe, pipeline: LatentDiffusionPipeline, held_out: ImageDataset, about: Row) -> list[Measurement]:
    """Whether the denoiser follows its conditions, where they are more than a class; images to look at."""
    if set(components(pipeline.conditioner)) <= {"classes"}:
        return []
    settings, training = recipe.evaluate, open_images(recipe)
    image, captions = condition_grid(pipeline, held_out.once(8, limit=8), recipe.sample, settings.seed)
    save_png(image, recipe.folder / "samples" / "conditions.png")
    (recipe.folder / "samples" / "conditions.txt").write_text("\n".join(captions))
    return evaluate_conditions(
        pipeline,
        counted("drawing", held_out.once(settings.batch, limit=settings.samples), _count(recipe, held_out)),
        lambda: training.once(settings.batch, limit=MOST_TRAINING),
        recipe.sample,
        settings,
        _about(recipe, pipeline, about),
    )


def _sampled(recipe: Recipe, pipeline: LatentDiffusionPipeline, training: ImageDataset) -> dict[str, Any]:
    """What receipts say of samples that are compared with training images."""
    about = _about(recipe, pipeline, describe_images(recipe, training, "train"))
    return {**about, **generation.describe_sampling(recipe.sample, pipeline)}


def _about(recipe: Recipe, pipeline: LatentDiffusionPipeline, images: Row) -> dict[str, Any]:
    """What receipts of a pipeline's images say of it and of the images that they are compared with."""
    section = recipe.denoiser
    about = {"ema": section.ema if section else None, "images_trained": section.images if section else None}
    return {**images, "tokenizer": pipeline.codec.hash(), **about}


def _write(recipe: Recipe, section: str, measured: list[Measurement]) -> list[Measurement]:
    """Measurements into a section of metrics.json, whose receipts name the recipe; `recipe.yaml` has the same name."""
    if measured and is_main(True):
        for one in measured:
            one.receipt["recipe"] = digest(recipe)
        results.write_measurements(recipe.folder / "metrics.json", measured, section)
    return measured
