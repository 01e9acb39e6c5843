"""One experiment from recipe to report, and what can be done with its run folder afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from latelier.errors import LatelierError
from latelier.recipe import Recipe, dump

if TYPE_CHECKING:
    from latelier.evaluation.results import Measurement
    from latelier.recipe import Sample


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

    from latelier.terminal import console

    report = complete(recipe)
    if PartialState().is_main_process:
        console.print(f"Report: {report}\n\nTry next:")
        for command in next_commands(recipe):
            console.print(f"  {command}", soft_wrap=True)
    return report


def next_commands(recipe: Recipe) -> list[str]:
    """What can be done with a finished run: commands to copy, of things that this model can do."""
    commands = ["latelier run quickstart data.source=/folder/of/your/images data.classes=null name=mine"]
    if recipe.denoiser is None:
        return commands
    told = {condition.kind for condition in recipe.denoiser.condition}
    guided = any(condition.dropout for condition in recipe.denoiser.condition)
    if "low-resolution" in told:
        commands.insert(0, f"latelier upscale small.png large.png --run {recipe.folder}")
    if "inpainting" in told:
        commands.insert(0, f"latelier inpaint photo.png mask.png --run {recipe.folder} --out filled.png")
    return [f"latelier sample {recipe.folder} --count 64{' --guidance 3' * guided} --seed 1000", *commands]


def complete(recipe: Recipe) -> Path:
    """Train the tokenizer, encode, train the denoiser, sample, evaluate and report; goes on where it was stopped.

    Returns:
        The report's path.
    """
    from accelerate import PartialState

    from latelier.evaluate import evaluate
    from latelier.evaluation.features import check_features
    from latelier.terminal import console
    from latelier.training.denoiser_loop import train_denoiser
    from latelier.training.tokenizer_loop import train_tokenizer

    check_features(recipe.evaluate)  # now, not after days of training
    prepare(recipe)
    train_tokenizer(recipe)
    if recipe.denoiser is not None:
        train_denoiser(recipe)
    if recipe.denoiser is not None and PartialState().is_main_process:
        console.print(f"Samples: {sample_to_folder(recipe.folder)}")
    show_measurements(evaluate(recipe))
    PartialState().wait_for_everyone()
    return recipe.folder / "report.html"


def sample_to_folder(
    run: Path,
    asked: dict[str, list] | None = None,
    settings: dict | None = None,
    size: int | None = None,
    out: Path | None = None,
    preview: int | None = None,
    preview_channels: int | None = None,
) -> Path:
    """Draw images into a folder; what is not given is the recipe's.

    A model that is told more than classes, and is told nothing here, draws what the held-out images say.

    Args:
        run: a run folder or a saved pipeline.
        asked: what to draw: lists `classes`, `prompts`, `layouts`, ..., see `LatentDiffusionPipeline.__call__`.
        settings: of `sample`: `steps`, `count`, `guidance`, ...; None is the recipe's.
        size: side in pixels.
        out: the folder; by default `samples` of the run.
        preview: every so many evaluations of the denoiser, show in `previews` of it what the images are becoming.
        preview_channels: what a preview decodes, see `make_previews`.

    Returns:
        The grid of all images, `grid.png` beside the single ones.
    """
    from latelier.images import make_grid, save_png
    from latelier.opening import held_out_records
    from latelier.previews import make_previews

    pipeline, recipe = open_run(run)
    asked = {name: values for name, values in (asked or {}).items() if values}
    chosen = _chosen(recipe, {**(settings or {}), "classes": asked.pop("classes", None)})
    records = held_out_records(recipe, pipeline)(0, chosen.count) if recipe and not asked else {}
    out = out or run / "samples"
    previews = None
    if preview is not None:
        previews = make_previews(pipeline, recipe, chosen, out / "previews", preview, preview_channels)
    out.mkdir(parents=True, exist_ok=True)
    images = pipeline(
        sample=chosen, records=records, height=size, width=size, output_type="pt", callback=previews, **asked
    ).images
    for i, image in enumerate(images):
        save_png(make_grid(image[None], columns=1), out / f"{chosen.seed + i:06d}.png")
    columns = max(1, round(len(images) ** 0.5))
    save_png(make_grid(images, columns=columns), out / "grid.png")
    (out / "settings.json").write_text(chosen.model_dump_json(indent=2))
    if previews is not None:
        previews.save_strips()
    return out / "grid.png"


def upscale_file(
    run: Path, image: Path, out: Path, factor: int | None, settings: dict, asked: dict[str, list]
) -> tuple[int, int]:
    """Enlarge an image file; `asked` are the prompts or classes of a model that is told them too.

    Returns:
        Width and height of the result.

    Raises:
        LatelierError: if the image cannot be read, or the model has another factor.
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
    """Fill the holes of an image file; `asked` are the prompts or classes of a model that is told them too.

    Raises:
        LatelierError: if a file cannot be read, or the mask has another size than the image.
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


def show_measurements(measured: list[Measurement]) -> None:
    """A table of numbers for the terminal, of the main process; the receipts are in metrics.json."""
    from rich.table import Table

    from latelier.evaluation.processes import is_main
    from latelier.terminal import console

    if not is_main(shared=True):
        return
    table = Table("metric", "value", "95 %", "n")
    for m in measured:
        interval = f"{m.interval[0]:.3f} to {m.interval[1]:.3f}" if m.interval else ""
        table.add_row(m.name, f"{m.value:.4g}", interval, f"{m.receipt.get('n', '')}")
    console.print(table)
