"""One experiment from recipe to report, and what can be done with its run folder afterwards."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from latelier.errors import LatelierError
from latelier.recipe import Recipe, dump, load_recipe

INSPECTED = ["l1", "psnr", "ssim", "lpips", "rfd", "smoothness", "compression", "cost", "spectrum", "gmm", "probe",
             "difficulty", "map"]  # fmt: skip
NEAREST_SHOWN = 16
NEAREST_SEARCHED = 2_000
RECONSTRUCTIONS_SHOWN = 16

if TYPE_CHECKING:
    from torch import Tensor

    from latelier.data.loader import ImageDataset
    from latelier.evaluation.metrics import Measurement
    from latelier.pipeline import LatentDiffusionPipeline
    from latelier.recipe import Sample
    from latelier.tokenizers.codec import Codec


def prepare(recipe: Recipe) -> Recipe:
    """Make the run folder and write the resolved recipe into it, with versions and git state."""
    from accelerate import PartialState

    from latelier.receipt import device_name, git_state, versions

    if PartialState().is_main_process:
        recipe.folder.mkdir(parents=True, exist_ok=True)
        facts = {**versions(), "device": device_name(), **{f"git {k}": v for k, v in (git_state() or {}).items()}}
        header = "".join(f"# {key}: {value}\n" for key, value in facts.items())
        (recipe.folder / "recipe.yaml").write_text(header + dump(recipe))
    return recipe


def run(recipe: Recipe) -> Path:
    """Do all of a recipe and tell what can be done next.

    Returns:
        The report's path.
    """
    from accelerate import PartialState

    from latelier.training.runtime import console

    report = complete(recipe)
    if PartialState().is_main_process:
        console.print(f"Report: {report}\n\nTry next:")
        if recipe.denoiser is not None:
            console.print(f"  latelier sample {recipe.folder} --count 64 --guidance 3 --seed 1000", soft_wrap=True)
        console.print(
            "  latelier run quickstart data.source=/folder/of/your/pictures data.classes=null name=mine", soft_wrap=True
        )
    return report


def complete(recipe: Recipe) -> Path:
    """Train the tokenizer, encode, train the denoiser, sample, evaluate and report; goes on where it was stopped.

    Returns:
        The report's path.
    """
    from accelerate import PartialState

    from latelier.training.denoiser_loop import train_denoiser
    from latelier.training.runtime import console
    from latelier.training.tokenizer_loop import train_tokenizer

    prepare(recipe)
    train_tokenizer(recipe)
    if recipe.denoiser is not None:
        train_denoiser(recipe)
    if PartialState().is_main_process:
        if recipe.denoiser is not None:
            grid = sample_to_folder(recipe.folder)
            console.print(f"Samples: {grid}")
        show_measurements(evaluate(recipe))
    PartialState().wait_for_everyone()
    return recipe.folder / "report.html"


def open_run(path: Path) -> tuple[LatentDiffusionPipeline, Recipe | None]:
    """The pipeline of a run folder or a saved pipeline, on the fastest device, and the run's recipe."""
    from accelerate import PartialState
    from diffusers.utils.logging import disable_progress_bar

    from latelier.pipeline import LatentDiffusionPipeline

    disable_progress_bar()  # of loading; sampling has its own
    folder = path / "pipeline" if (path / "pipeline").is_dir() else path
    if not (folder / "model_index.json").is_file():
        raise LatelierError(f"There is no trained pipeline in {path}; run `latelier run` or `latelier train denoiser`.")
    recipe = load_recipe(path) if (path / "recipe.yaml").is_file() else None
    pipeline = LatentDiffusionPipeline.from_pretrained(folder)
    return pipeline.to(PartialState().device), recipe


def sample_to_folder(
    run: Path,
    asked: dict[str, list] | None = None,
    settings: dict | None = None,
    size: int | None = None,
    out: Path | None = None,
) -> Path:
    """Draw pictures into a folder; what is not given is the recipe's.

    A model that is told more than classes, and is told nothing here, draws what the held-out pictures say.

    Args:
        run: a run folder or a saved pipeline.
        asked: what to draw: lists `classes`, `prompts`, `layouts`, ..., see `LatentDiffusionPipeline.__call__`.
        settings: of `sample`: `steps`, `count`, `guidance`, ...; None is the recipe's.
        size: side in pixels.
        out: the folder; by default `samples` of the run.

    Returns:
        The grid of all pictures, `grid.png` beside the single ones.
    """
    from latelier.images import make_grid, save_png
    from latelier.training.denoiser_loop import shown_records

    pipeline, recipe = open_run(run)
    asked = {name: values for name, values in (asked or {}).items() if values}
    chosen = _chosen(recipe, {**(settings or {}), "classes": asked.pop("classes", None)})
    records = shown_records(recipe, pipeline)(0, chosen.count) if recipe and not asked else {}
    out = out or run / "samples"
    out.mkdir(parents=True, exist_ok=True)
    images = pipeline(sample=chosen, records=records, height=size, width=size, output_type="pt", **asked).images
    for i, image in enumerate(images):
        save_png(make_grid(image[None], columns=1), out / f"{chosen.seed + i:06d}.png")
    columns = max(1, round(len(images) ** 0.5))
    save_png(make_grid(images, columns=columns), out / "grid.png")
    (out / "settings.json").write_text(chosen.model_dump_json(indent=2))
    return out / "grid.png"


def upscale_file(
    run: Path, image: Path, out: Path, factor: int | None, settings: dict, asked: dict[str, list]
) -> tuple[int, int]:
    """Enlarge a picture file; `asked` are the prompts or classes of a model that is told them too.

    Returns:
        Width and height of the result.

    Raises:
        LatelierError: if the picture cannot be read, or the model has another factor.
    """
    from latelier.conditioning import parts
    from latelier.images import make_grid, save_png
    from latelier.tasks import upscale

    pipeline, recipe = open_run(run)
    part = parts(pipeline.conditioner).get("low_resolution")
    if factor is not None and part is not None and factor != part.config["factor"]:
        raise LatelierError(f"--factor {factor}, but this model enlarges {part.config['factor']} times.")
    large = upscale(pipeline, image, sample=_chosen(recipe, {**settings, "count": 1}), **asked)
    save_png(make_grid(large[None], columns=1), out)
    return large.shape[2], large.shape[1]


def inpaint_file(run: Path, image: Path, mask: Path, out: Path, settings: dict, asked: dict[str, list]) -> None:
    """Fill the holes of a picture file; `asked` are the prompts or classes of a model that is told them too.

    Raises:
        LatelierError: if a file cannot be read, or the mask has another size than the picture.
    """
    from latelier.images import make_grid, save_png
    from latelier.tasks import inpaint

    pipeline, recipe = open_run(run)
    filled = inpaint(pipeline, image, mask, sample=_chosen(recipe, {**settings, "count": 1}), **asked)
    save_png(make_grid(filled[None], columns=1), out)


def _chosen(recipe: Recipe | None, settings: dict) -> Sample:
    """The recipe's settings of sampling, under those that are given.

    Raises:
        LatelierError: for a value that is not allowed.
    """
    from pydantic import ValidationError

    from latelier.recipe import Sample, first_problem

    given = {k: v for k, v in settings.items() if v is not None}
    try:
        return Sample.model_validate({**(recipe.sample.model_dump() if recipe else {}), **given})
    except ValidationError as error:
        raise LatelierError(first_problem(error, Sample)) from None


def evaluate(recipe: Recipe) -> list[Measurement]:
    """Measure a trained run; numbers and receipts go to metrics.json, pictures and plots to report.html."""
    from latelier.evaluation.judging import judge_latents
    from latelier.evaluation.metrics import write_measurements
    from latelier.evaluation.reconstruction import evaluate_reconstruction
    from latelier.evaluation.report import write_report
    from latelier.training.denoiser_loop import open_codec
    from latelier.training.runtime import best_device
    from latelier.training.tokenizer_loop import open_images

    codec, held_out = open_codec(recipe).to(best_device()), open_images(recipe, "val")
    settings = recipe.evaluate
    measured = evaluate_reconstruction(
        codec,
        held_out.once(settings.batch, limit=settings.samples),
        settings,
        f"{recipe.data.source}, held out",
        {"data": held_out.fingerprint},
    )
    write_measurements(recipe.folder / "metrics.json", measured, "reconstruction")
    save_reconstructions(codec, held_out, recipe.folder / "reconstructions.png")
    measured = [*measured, *judge_latents(recipe, codec, held_out)]
    if (recipe.folder / "pipeline" / "model_index.json").is_file():
        generated, asked = _evaluate_generation(recipe), _evaluate_tasks(recipe, held_out)
        write_measurements(recipe.folder / "metrics.json", generated, "generation")
        write_measurements(recipe.folder / "metrics.json", asked, "tasks")
        measured = [*measured, *generated, *asked]
    write_report(recipe.folder)
    return measured


def save_reconstructions(codec: Codec, pictures: ImageDataset, out: Path) -> None:
    """The first pictures above their reconstructions, for looking at."""
    import torch

    from latelier.images import make_pairs, save_png

    images = next(pictures.once(RECONSTRUCTIONS_SHOWN, limit=RECONSTRUCTIONS_SHOWN))["image"]
    with torch.no_grad():
        result = codec.decode(codec.encode(images.to(codec.device))).clamp(-1, 1).cpu()
    save_png(make_pairs(images, result, columns=min(8, len(images))), out)


def _evaluate_generation(recipe: Recipe) -> list[Measurement]:
    """Compare fresh samples with the training pictures, and show the nearest of those beside some samples."""
    from latelier.evaluation.features import load_extractor
    from latelier.evaluation.generation import evaluate_generation, nearest
    from latelier.evaluation.speed import measure_sampling
    from latelier.images import make_pairs, save_png
    from latelier.training.tokenizer_loop import open_images

    pipeline, _ = open_run(recipe.folder)
    settings, training = recipe.evaluate, open_images(recipe)
    count = min(settings.samples, len(training))
    receipt = {
        **_about(recipe, pipeline, f"{recipe.data.source}, training pictures", training),
        **{k: v for k, v in recipe.sample.model_dump().items() if k not in ("count", "batch")},
    }
    samples = _samples(pipeline, recipe, count)
    first = next(samples)
    references = training.once(settings.batch, limit=settings.samples)  # spread over the classes, should they be sorted
    measured = evaluate_generation(_chain(first, samples), references, settings, receipt)
    shown = first[:NEAREST_SHOWN]
    searched = max(NEAREST_SEARCHED, 5 * settings.samples)  # all of a small set, a part of a large one
    neighbours = nearest(shown, training.once(settings.batch, limit=searched), load_extractor("vgg16"))
    pairs = make_pairs(shown, neighbours.images[:, 0], columns=min(8, len(shown)))
    save_png(pairs, recipe.folder / "samples" / "nearest.png")
    references = training.once(settings.batch, limit=settings.samples)
    return [*measured, *measure_sampling(pipeline, references, recipe, receipt)]


def _evaluate_tasks(recipe: Recipe, held_out: ImageDataset) -> list[Measurement]:
    """Whether the denoiser does what it is told, when it is told more than a class; pictures to look at."""
    from latelier.conditioning import parts
    from latelier.evaluation.regions import MOST_TRAINING
    from latelier.evaluation.task_grid import task_grid
    from latelier.evaluation.tasks import evaluate_tasks
    from latelier.images import save_png
    from latelier.training.tokenizer_loop import open_images

    pipeline, _ = open_run(recipe.folder)
    if set(parts(pipeline.conditioner)) <= {"classes"}:
        return []
    settings, training = recipe.evaluate, open_images(recipe)
    grid = task_grid(pipeline, held_out.once(8, limit=8), recipe.sample, settings.seed)
    save_png(grid.image, recipe.folder / "samples" / "asked.png")
    (recipe.folder / "samples" / "asked.txt").write_text("\n".join(grid.captions))
    return evaluate_tasks(
        pipeline,
        held_out.once(settings.batch, limit=settings.samples),
        lambda: training.once(settings.batch, limit=MOST_TRAINING),
        recipe.sample,
        settings,
        _about(recipe, pipeline, f"{recipe.data.source}, held out", held_out),
    )


def _about(recipe: Recipe, pipeline: LatentDiffusionPipeline, reference: str, data: ImageDataset) -> dict:
    """What receipts of a pipeline's pictures say of it and of what they are compared with."""
    return {
        "reference": reference,
        "data": data.fingerprint,
        "tokenizer": pipeline.codec.hash(),
        "ema": recipe.denoiser.ema if recipe.denoiser else None,
        "images_trained": recipe.denoiser.images if recipe.denoiser else None,
    }


def _samples(pipeline: LatentDiffusionPipeline, recipe: Recipe, count: int) -> Iterator[Tensor]:
    """Batches of samples of the recipe's settings; picture i has the seed `sample.seed + i`.

    A model that is told more than classes draws what the held-out pictures say, in turn.
    """
    from latelier.evaluation.speed import batches
    from latelier.training.denoiser_loop import shown_records

    records = shown_records(recipe, pipeline)
    for settings in batches(recipe.sample, count):
        told = records(settings.seed - recipe.sample.seed, settings.count)
        yield pipeline(sample=settings, records=told, output_type="pt", progress=False).images


def _chain(first: Tensor, rest: Iterator[Tensor]) -> Iterator[Tensor]:
    yield first
    yield from rest


def inspect(tokenizer: str, source: str, size: int, samples: int, out: Path, options: list[str]) -> Path:
    """Measure the latent space of any trained tokenizer on any pictures: a run without training.

    Args:
        tokenizer: a run folder, a tokenizer folder, or a diffusers Hub name.
        source: pictures, as in `data.source`; they are all held out, since no tokenizer is trained. What learns from
            latents (gmm, probe, difficulty) learns from half of them, if the source has no validation split.
        size: side in pixels.
        samples: how many pictures are measured, and how many more are learnt from.
        out: folder of metrics.json, report.html and pictures.
        options: `a.b=c` changes, such as `data.label_key=class`.

    Returns:
        The report's path.

    Raises:
        LatelierError: if `out` is a run folder, or what is to be opened cannot be.
    """
    from latelier.recipe import apply_overrides, build_recipe

    if (out / "recipe.yaml").is_file() and load_recipe(out).tokenizer.kind != "pretrained":
        raise LatelierError(f"{out} is the folder of a trained run; choose another one with --out.")
    shutil.rmtree(out / "tokenizer", ignore_errors=True)  # a copy, perhaps of another tokenizer, and its numbers
    for name in ("metrics.json", "latent-map.png", "channels.png"):
        (out / name).unlink(missing_ok=True)
    folder = Path(tokenizer) / "tokenizer"
    tree = {
        "name": out.name,
        "runs": str(out.parent),
        "data": {"source": source, "val_source": source, "image_size": size, "flip": False},
        "tokenizer": {"kind": "pretrained", "path": str(folder) if folder.is_dir() else tokenizer},
        "evaluate": {"metrics": INSPECTED, "samples": samples, "probe_samples": samples},
    }
    return complete(build_recipe(apply_overrides(tree, options)))


def show_measurements(measured: list[Measurement]) -> None:
    """A table of numbers for the terminal; the receipts are in metrics.json."""
    from rich.table import Table

    from latelier.training.runtime import console

    table = Table("metric", "value", "95 %", "n")
    for m in measured:
        interval = f"{m.interval[0]:.3f} to {m.interval[1]:.3f}" if m.interval else ""
        table.add_row(m.name, f"{m.value:.4g}", interval, f"{m.receipt.get('n', '')}")
    console.print(table)
