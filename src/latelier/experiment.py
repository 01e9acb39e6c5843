"""One experiment from recipe to report, and what can be done with its run folder afterwards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latelier.errors import LatelierError
from latelier.recipe import Recipe, dump, load_recipe

if TYPE_CHECKING:
    from torch import Tensor

    from latelier.evaluation.metrics import Measurement
    from latelier.pipeline import LatentDiffusionPipeline
    from latelier.tokenizers.codec import Codec


def prepare(recipe: Recipe) -> Recipe:
    """Make the run folder and write the resolved recipe into it, with versions and git state."""
    from latelier.receipt import versions

    recipe.folder.mkdir(parents=True, exist_ok=True)
    header = "".join(f"# {key}: {value}\n" for key, value in versions().items())
    (recipe.folder / "recipe.yaml").write_text(header + dump(recipe))
    return recipe


def run(recipe: Recipe) -> Path:
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
    report = recipe.folder / "report.html"
    if PartialState().is_main_process:
        if recipe.denoiser is not None:
            grid = sample_to_folder(recipe.folder)
            console.print(f"Samples: {grid}")
        show_measurements(evaluate(recipe))
        console.print(f"Report: {report}\n\nTry next:")
        if recipe.denoiser is not None:
            console.print(f"  latelier sample {recipe.folder} --count 64 --guidance 3 --seed 1000")
        console.print("  latelier run quickstart data.source=/folder/of/your/pictures name=mine")
    PartialState().wait_for_everyone()
    return report


def open_run(path: Path) -> tuple[LatentDiffusionPipeline, Recipe | None]:
    """The pipeline of a run folder or a saved pipeline, on the fastest device, and the run's recipe."""
    from accelerate import PartialState

    from latelier.pipeline import LatentDiffusionPipeline

    folder = path / "pipeline" if (path / "pipeline").is_dir() else path
    if not (folder / "model_index.json").is_file():
        raise LatelierError(f"There is no trained pipeline in {path}; run `latelier run` or `latelier train denoiser`.")
    recipe = load_recipe(path) if (path / "recipe.yaml").is_file() else None
    pipeline = LatentDiffusionPipeline.from_pretrained(folder)
    return pipeline.to(PartialState().device), recipe


def sample_to_folder(
    run: Path,
    classes: list[str] | None = None,
    count: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    size: int | None = None,
    seed: int | None = None,
    out: Path | None = None,
) -> Path:
    """Draw pictures into a folder; what is not given is the recipe's.

    Returns:
        The grid of all pictures, `grid.png` beside the single ones.
    """
    from latelier.images import make_grid, save_png
    from latelier.recipe import Sample

    pipeline, recipe = open_run(run)
    given = {"classes": classes, "count": count, "steps": steps, "guidance": guidance, "seed": seed}
    settings = (recipe.sample if recipe else Sample()).model_copy(
        update={k: v for k, v in given.items() if v is not None and v != []}
    )
    out = out or run / "samples"
    out.mkdir(parents=True, exist_ok=True)
    images = pipeline(sample=settings, height=size, width=size, output_type="pt").images
    for i, image in enumerate(images):
        save_png(make_grid(image[None], columns=1, padding=0), out / f"{settings.seed + i:06d}.png")
    columns = max(1, round(len(images) ** 0.5))
    save_png(make_grid(images, columns=columns), out / "grid.png")
    (out / "settings.json").write_text(settings.model_dump_json(indent=2))
    return out / "grid.png"


def evaluate(recipe: Recipe) -> list[Measurement]:
    """Measure a trained run; numbers and receipts go to metrics.json, pictures and plots to report.html."""
    from latelier.evaluation.metrics import write_measurements
    from latelier.evaluation.report import write_report
    from latelier.training.denoiser_loop import open_codec

    codec = open_codec(recipe)
    measured = _evaluate_reconstruction(recipe, codec)
    write_measurements(recipe.folder / "metrics.json", measured, "reconstruction")
    if (recipe.folder / "pipeline" / "model_index.json").is_file():
        generated = _evaluate_generation(recipe)
        write_measurements(recipe.folder / "metrics.json", generated, "generation")
        measured = [*measured, *generated]
    write_report(recipe.folder)
    return measured
