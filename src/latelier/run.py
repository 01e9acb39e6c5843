"""What `latelier run` does, from data to report, and what can be done with its run folder afterwards."""

from __future__ import annotations

from pathlib import Path

from accelerate import PartialState
from rich.table import Table

from latelier.conditioning.condition import components
from latelier.errors import LatelierError
from latelier.evaluate import evaluate
from latelier.evaluation.features import check_features
from latelier.evaluation.results import Measurement, is_main
from latelier.images import make_grid, save_png
from latelier.opening import held_out_records, open_run
from latelier.pipeline import choose_settings
from latelier.previews import make_previews
from latelier.receipt import device_name, git_state, versions
from latelier.recipe import Recipe, Sample, dump
from latelier.tasks import inpaint, upscale
from latelier.terminal import console
from latelier.training.denoiser_loop import train_denoiser
from latelier.training.tokenizer_loop import train_tokenizer


def prepare(recipe: Recipe) -> Recipe:
    """Make the run folder and write the resolved recipe into it, with versions and git state."""
    if PartialState().is_main_process:
        recipe.folder.mkdir(parents=True, exist_ok=True)
        facts = {**versions(), "device": device_name(), **{f"git {k}": v for k, v in (git_state() or {}).items()}}
        header = "".join(f"# {key}: {value}\n" for key, value in facts.items())
        (recipe.folder / "recipe.yaml").write_text(header + dump(recipe))
    return recipe


def run(recipe: Recipe) -> Path:
    """`complete`, then print the report's path and the commands to try next."""
    report = complete(recipe)
    if PartialState().is_main_process:
        console.print(f"Report: {report}\n\nTry next:")
        for command in next_commands(recipe):
            console.print(f"  {command}", soft_wrap=True)
    return report


def next_commands(recipe: Recipe) -> list[str]:
    """Commands to copy: what this model can do."""
    commands = ["latelier run quickstart data.source=/folder/of/your/images data.classes=null name=mine"]
    if recipe.denoiser is None:
        return commands
    kinds = {condition.kind for condition in recipe.denoiser.condition}
    guided = any(condition.dropout for condition in recipe.denoiser.condition)
    if "low-resolution" in kinds:
        commands.insert(0, f"latelier upscale small.png large.png --run {recipe.folder}")
    if "inpainting" in kinds:
        commands.insert(0, f"latelier inpaint photo.png mask.png --run {recipe.folder} --out filled.png")
    return [f"latelier sample {recipe.folder} --count 64{' --guidance 3' * guided} --seed 1000", *commands]


def complete(recipe: Recipe) -> Path:
    """Train the tokenizer, encode, train the denoiser, sample, evaluate and report; resumes a stopped run.

    Returns:
        The report's path.
    """
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
    inputs: dict[str, list] | None = None,
    settings: dict | None = None,
    size: int | None = None,
    out: Path | None = None,
    preview: int | None = None,
    preview_channels: int | None = None,
) -> Path:
    """Draw images into a folder; what is not given is the recipe's.

    Without inputs, a model that is conditioned on more than classes takes the conditions of held-out images.

    Args:
        run: a run folder or a saved pipeline.
        inputs: lists `classes`, `prompts`, `layouts`, ..., see `LatentDiffusionPipeline.__call__`.
        settings: of `sample`: `steps`, `count`, `guidance`, ...; None is the recipe's.
        size: side in pixels.
        out: the folder; by default `samples` of the run.
        preview: evaluations of the denoiser from one preview to the next, written to `previews` of `out`.
        preview_channels: what a preview decodes, see `make_previews`.

    Returns:
        The grid of all images, `grid.png` beside the single ones.
    """
    pipeline, recipe = open_run(run)
    inputs = {name: values for name, values in (inputs or {}).items() if values}
    chosen = choose_settings(
        recipe.sample if recipe else None, {**(settings or {}), "classes": inputs.pop("classes", None)}
    )
    records = held_out_records(recipe, pipeline)(0, chosen.count) if recipe and not inputs else {}
    out = out or run / "samples"
    previews = None
    if preview is not None:
        previews = make_previews(pipeline, recipe, chosen, out / "previews", preview, preview_channels)
    out.mkdir(parents=True, exist_ok=True)
    images = pipeline(
        sample=chosen, records=records, height=size, width=size, output_type="pt", callback=previews, **inputs
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
    run: Path, image: Path, out: Path, factor: int | None, settings: dict, inputs: dict[str, list]
) -> tuple[int, int]:
    """Upscale an image file; `inputs` are the prompts or classes of a model that is conditioned on them too.

    Returns:
        Width and height of the result.

    Raises:
        LatelierError: if the image cannot be read, or the model has another factor.
    """
    pipeline, recipe = open_run(run)
    component = components(pipeline.conditioner).get("low_resolution")
    if factor is not None and component is not None and factor != component.config["factor"]:
        raise LatelierError(f"--factor {factor}, but this model enlarges {component.config['factor']} times.")
    large = upscale(pipeline, image, sample=_settings(recipe, {**settings, "count": 1}), **inputs)
    save_png(make_grid(large[None], columns=1), out)
    return large.shape[2], large.shape[1]


def inpaint_file(run: Path, image: Path, mask: Path, out: Path, settings: dict, inputs: dict[str, list]) -> None:
    """Fill the holes of an image file; `inputs` are the prompts or classes of a model that is conditioned on them too.

    Raises:
        LatelierError: if a file cannot be read, or the mask has another size than the image.
    """
    pipeline, recipe = open_run(run)
    filled = inpaint(
        pipeline,
        image,
        mask,
        sample=_settings(recipe, {**settings, "count": 1}),
        **inputs,
    )
    save_png(make_grid(filled[None], columns=1), out)


def _settings(recipe: Recipe | None, given: dict) -> Sample:
    """The recipe's settings of sampling, under those that are given."""
    return choose_settings(recipe.sample if recipe else None, given)


def show_measurements(measured: list[Measurement]) -> None:
    """A table of numbers for the terminal, of the main process; the receipts are in metrics.json."""
    if not is_main(shared=True):
        return
    table = Table("metric", "value", "95 %", "n")
    for m in measured:
        interval = f"{m.interval[0]:.3f} to {m.interval[1]:.3f}" if m.interval else ""
        table.add_row(m.name, f"{m.value:.4g}", interval, f"{m.receipt.get('n', '')}")
    console.print(table)
