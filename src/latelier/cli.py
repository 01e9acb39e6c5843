"""The command line. Heavy modules are imported inside commands, so that `--help` answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from latelier.errors import LatelierError

console = Console()
app = typer.Typer(
    name="latelier",
    help="The workshop for the latent space of image generators: train, judge and use image tokenizers and the "
    "latent diffusion models that run on them.",
    epilog="Start with:  latelier run recipes/quickstart.yaml",
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
)
train_app = typer.Typer(no_args_is_help=True, help="Train one stage of a recipe.")
recipe_app = typer.Typer(no_args_is_help=True, help="Show, list and describe recipes.")
app.add_typer(train_app, name="train")
app.add_typer(recipe_app, name="recipe")

RecipePath = Annotated[str, typer.Argument(help="A recipe file, a name from `latelier recipe list`, or a run folder.")]
Steps = Annotated[int | None, typer.Option(help="Sampling steps; default: the recipe's.")]
Window = Annotated[int | None, typer.Option(help="Draw in overlapping windows of so many latent positions.")]
Prompt = Annotated[str | None, typer.Option(help="Of a model that is told captions too.")]
Guidance = Annotated[float, typer.Option(help="Guidance scale; 1 is none.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes such as tokenizer.lr=1e-4 denoiser.images=2M.")]


def _load(recipe: str, overrides: list[str] | None):
    from latelier.recipe import load_recipe

    return load_recipe(recipe, overrides or ())


@app.command(epilog="Example:  latelier run recipes/quickstart.yaml data.source=./photos name=photos")
def run(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Do all of a recipe: tokenizer, latents, denoiser, samples, metrics, report. Goes on where it was stopped."""
    from latelier.experiment import run as run_recipe

    run_recipe(_load(recipe, overrides))


@train_app.command("tokenizer", epilog="Example:  latelier train tokenizer my.yaml tokenizer.images=4M")
def train_tokenizer_command(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Stage 1: train the tokenizer and measure its latent statistics."""
    from latelier.experiment import prepare
    from latelier.training.tokenizer_loop import train_tokenizer

    console.print(f"Tokenizer: {train_tokenizer(prepare(_load(recipe, overrides)))}")


@train_app.command("denoiser", epilog="Example:  latelier train denoiser my.yaml denoiser.size=B")
def train_denoiser_command(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Stage 2: train the denoiser on the run's tokenizer."""
    from latelier.experiment import prepare
    from latelier.training.denoiser_loop import train_denoiser

    console.print(f"Pipeline: {train_denoiser(prepare(_load(recipe, overrides)))}")


@app.command(epilog="Example:  latelier encode my.yaml --overwrite")
def encode(
    recipe: RecipePath,
    overrides: Overrides = None,
    overwrite: Annotated[bool, typer.Option(help="Delete a stale cache and encode anew.")] = False,
) -> None:
    """Encode the training images into the latent cache."""
    from latelier.experiment import prepare
    from latelier.training.denoiser_loop import encode_latents

    cache = encode_latents(prepare(_load(recipe, overrides)), overwrite=overwrite)
    console.print(f"Latents: {cache.folder} ({len(cache):,} images)")


@app.command(epilog="Example:  latelier reconstruct runs/quickstart photo.jpg another.png --out pairs.png")
def reconstruct(
    tokenizer: Annotated[str, typer.Argument(help="A run folder, a tokenizer folder, or a diffusers Hub name.")],
    images: Annotated[list[Path], typer.Argument(help="Image files or folders.")],
    out: Annotated[Path, typer.Option(help="Where the image pairs go.")] = Path("reconstructions.png"),
    size: Annotated[int, typer.Option(help="Side in pixels to which images are cropped.")] = 256,
    channels: Annotated[
        str | None, typer.Option(help="Decode prefixes of the latent channels, such as 4,8,16,32: a row for each.")
    ] = None,
) -> None:
    """Pass images through a tokenizer and put originals above reconstructions."""
    from latelier.tasks import reconstruct as reconstruct_images

    lengths = _read_numbers(channels, "--channels") if channels else []
    found = reconstruct_images(tokenizer, images, out, size, lengths)
    told = [f" with {length} channels" for length in lengths] or [""]
    console.print(f"{out}: mean PSNR " + ", ".join(f"{value:.2f} dB{more}" for value, more in zip(found, told)))


def _read_numbers(text: str, option: str) -> list[int]:
    """`4,8,16` as numbers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise LatelierError(f"{option} = {text!r} is no list of numbers; write 4,8,16.") from None


@app.command(epilog="Example:  latelier sample runs/quickstart --classes 'Animals & Nature' --count 16 --seed 7")
def sample(
    run: Annotated[Path, typer.Argument(help="A run folder or a saved pipeline.")],
    classes: Annotated[list[str] | None, typer.Option(help="Class names or indices; repeat for several.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="What to draw, in words; repeat for several.")] = None,
    negative: Annotated[str | None, typer.Option(help="What guidance shall lead away from, in words.")] = None,
    layout: Annotated[
        list[str] | None,
        typer.Option(help="Boxes 'owl 0.1 0.2 0.5 0.9; apple 0.6 0.5 0.9 0.8' (x0 y0 x1 y1), or a JSON file of them."),
    ] = None,
    segmentation: Annotated[list[str] | None, typer.Option(help="PNG map of ids; repeat for several.")] = None,
    map: Annotated[list[str] | None, typer.Option(help="Any other map, such as depth; repeat for several.")] = None,
    count: Annotated[int, typer.Option(help="How many images.")] = 16,
    steps: Steps = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is none.")] = None,
    sampler: Annotated[str | None, typer.Option(help="ddim, plms, dpm++, unipc, euler, heun, sde, dopri5, ...")] = None,
    size: Annotated[int | None, typer.Option(help="Side in pixels; default: the trained size.")] = None,
    channels: Annotated[int | None, typer.Option(help="Draw only the first so many latent channels.")] = None,
    window: Window = None,
    stride: Annotated[int | None, typer.Option(help="From one window to the next; default half a window.")] = None,
    seed: Annotated[int, typer.Option(help="Image i is drawn from seed + i.")] = 0,
    preview: Annotated[
        int | None, typer.Option(help="Every so many steps, show in previews/ what the first images are becoming.")
    ] = None,
    preview_channels: Annotated[
        int | None, typer.Option(help="Previews decode the first so many channels; default a quarter if structured.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the images; default: samples/ of the run.")] = None,
) -> None:
    """Draw images from a trained pipeline."""
    from latelier.experiment import sample_to_folder
    from latelier.tasks import read_layout

    asked: dict[str, list] = {
        "classes": classes or [], "prompts": prompt or [], "negative_prompts": [negative] if negative else [],
        "layouts": [read_layout(text) for text in layout or []], "segmentations": segmentation or [], "maps": map or [],
    }  # fmt: skip
    settings = {
        "count": count, "steps": steps, "guidance": guidance, "sampler": sampler, "channels": channels,
        "window": window, "stride": stride, "seed": seed,
    }  # fmt: skip
    console.print(f"Grid: {sample_to_folder(run, asked, settings, size, out, preview, preview_channels)}")


@app.command(epilog="Example:  latelier upscale small.png large.png --run runs/super-resolution")
def upscale(
    image: Annotated[Path, typer.Argument(help="The image, of any size.")],
    out: Annotated[Path, typer.Argument(help="Where the large one goes.")],
    run: Annotated[Path, typer.Option(help="A run folder or pipeline, trained with condition: low-resolution.")],
    factor: Annotated[int | None, typer.Option(help="How many times larger; checked against the model's.")] = None,
    steps: Steps = None,
    seed: Annotated[int, typer.Option(help="Another seed is another image.")] = 0,
    prompt: Prompt = None,
    guidance: Guidance = 1.0,
    window: Window = None,
) -> None:
    """Enlarge an image with a super-resolution model."""
    from latelier.experiment import upscale_file

    settings = {"steps": steps, "seed": seed, "window": window, "guidance": guidance}
    size = upscale_file(run, image, out, factor, settings, {"prompts": [prompt]} if prompt else {})
    console.print(f"{out}: {size[0]} x {size[1]}")


@app.command(epilog="Example:  latelier inpaint photo.png mask.png --run runs/inpainting --out filled.png")
def inpaint(
    image: Annotated[Path, typer.Argument(help="The image, of any size.")],
    mask: Annotated[Path, typer.Argument(help="An image of the same size, white where it is to be filled.")],
    run: Annotated[Path, typer.Option(help="A run folder or pipeline, trained with condition: inpainting.")],
    out: Annotated[Path, typer.Option(help="Where the result goes.")] = Path("inpainted.png"),
    steps: Steps = None,
    seed: Annotated[int, typer.Option(help="Another seed is another image.")] = 0,
    prompt: Prompt = None,
    guidance: Guidance = 1.0,
    window: Window = None,
) -> None:
    """Fill the holes of an image; the rest comes back untouched."""
    from latelier.experiment import inpaint_file

    settings = {"steps": steps, "seed": seed, "window": window, "guidance": guidance}
    inpaint_file(run, image, mask, out, settings, {"prompts": [prompt]} if prompt else {})
    console.print(f"{out}")


@app.command(epilog="Example:  latelier evaluate runs/quickstart evaluate.samples=1000")
def evaluate(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Measure reconstruction and generation of a trained run, with receipts, and rewrite its report."""
    from latelier.evaluate import evaluate as evaluate_run
    from latelier.experiment import show_measurements

    show_measurements(evaluate_run(_load(recipe, overrides)))


@app.command(epilog="Example:  latelier report runs/quickstart")
def report(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write the run's report.html anew."""
    from latelier.evaluation.report import write_report

    if not run.is_dir():
        raise LatelierError(f"There is no run folder {run}.")
    console.print(f"Report: {write_report(run)}")


@app.command(epilog="Example:  latelier check my.yaml data.source=./photos")
def check(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Preflight: open the data, run a step with every loss term, tell memory, speed and expected hours."""
    from latelier.preflight import check as preflight

    preflight(_load(recipe, overrides))


@app.command(epilog="Example:  latelier convert vmae vmaef8d16.pth converted/ --set heads=12")
def convert(
    kind: Annotated[str, typer.Argument(help="ldm, ldm-kl, ldm-vq, ldm-unet, vmae, maetok, sit, lightning-dit, ...")],
    checkpoint: Annotated[Path, typer.Argument(help="The official checkpoint: .safetensors, .ckpt, .pth, ...")],
    out: Annotated[Path, typer.Argument(help="Folder of the converted model.")],
    options: Annotated[
        list[str] | None, typer.Option("--set", help="What the shapes do not tell, such as heads=12 or image=256.")
    ] = None,
) -> None:
    """Convert an official checkpoint to a folder that diffusers-style `from_pretrained` opens."""
    import yaml

    from latelier.convert import from_official, read_checkpoint

    config = {key: yaml.safe_load(value) for key, _, value in (option.partition("=") for option in options or [])}
    converted = from_official(kind, read_checkpoint(checkpoint), **config)
    (converted.pipeline or converted.codec or converted.model).save_pretrained(out)
    if converted.pipeline is None and converted.conditioner is not None:
        converted.conditioner.save_pretrained(out / "conditioner")
    parameters = sum(p.numel() for p in converted.model.parameters())
    console.print(f"{out}: {type(converted.model).__name__}, {parameters:,} parameters")


@app.command(epilog="Example:  latelier inspect stabilityai/sd-vae-ft-mse --data ./photos --size 256")
def inspect(
    tokenizer: Annotated[str, typer.Argument(help="A run folder, a tokenizer folder, or a diffusers Hub name.")],
    data: Annotated[str, typer.Option(help="Images to measure on: a folder, a dataset, `emoji`, ...")],
    overrides: Overrides = None,
    size: Annotated[int, typer.Option(help="Side in pixels to which images are cropped.")] = 256,
    samples: Annotated[int, typer.Option(help="How many images are measured, and learnt from.")] = 2000,
    out: Annotated[Path, typer.Option(help="Folder of report.html, metrics.json and verdict.json.")] = Path(
        "inspection"
    ),
) -> None:
    """Judge a latent space: reconstruction, smoothness, distribution, channels, classes, cost, and a verdict."""
    from latelier.inspection import inspect as inspect_tokenizer
    from latelier.inspection import read_experience, read_verdict

    report = inspect_tokenizer(tokenizer, data, size, samples, out, overrides or [])
    for finding in read_verdict(out):
        console.print(f"{finding.kind}: {finding.sentence}", highlight=False, markup=False, soft_wrap=True)
    if known := read_experience(out):
        console.print(known, highlight=False, markup=False, soft_wrap=True)
    console.print(f"Report: {report}")


@app.command(epilog="Example:  latelier compare runs/one runs/two stabilityai/sd-vae-ft-mse --data photos --size 256")
def compare(
    tokenizers: Annotated[
        list[str], typer.Argument(help="Run folders, tokenizer folders, diffusers Hub names; then changes a.b=c.")
    ],
    data: Annotated[str, typer.Option(help="Images to measure on: a folder, a dataset, `emoji`, ...")],
    size: Annotated[int, typer.Option(help="Side in pixels to which images are cropped.")] = 256,
    samples: Annotated[int, typer.Option(help="How many images are measured, and learnt from.")] = 2000,
    out: Annotated[Path, typer.Option(help="Folder of the page and of every tokenizer's own.")] = Path("comparison"),
    name: Annotated[
        list[str] | None, typer.Option(help="Short names, once for each tokenizer; default: from their paths.")
    ] = None,
) -> None:
    """Judge tokenizers on the same images, side by side. Goes on where it was stopped."""
    from latelier.compare import compare as compare_tokenizers
    from latelier.compare import divide_words

    chosen, changes = divide_words(tokenizers)
    console.print(f"Comparison: {compare_tokenizers(chosen, data, size, samples, out, changes, name or [])}")


@app.command(epilog="Example:  latelier study ldmae_tokenizers --variant emoji")
def study(
    file: Annotated[str, typer.Argument(help="A study file, or the name of one that comes along.")],
    overrides: Overrides = None,
    variant: Annotated[str | None, typer.Option(help="The same comparison on other data or at another scale.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Do only this run now; repeat for several.")] = None,
) -> None:
    """Train and measure several recipes at equal budget and compare them. Goes on where it was stopped."""
    from latelier.study import load_study, run_study

    console.print(f"Comparison: {run_study(load_study(file, variant, overrides or ()), only)}")


@recipe_app.command("list")
def recipe_list() -> None:
    """The recipes that come along."""
    from latelier.recipe import recipe_files

    for path in recipe_files():
        console.print(f"{path}", highlight=False)


@recipe_app.command("show", epilog="Example:  latelier recipe show quickstart tokenizer.lr=1e-4")
def recipe_show(recipe: RecipePath, overrides: Overrides = None) -> None:
    """A recipe with every default filled in."""
    from latelier.recipe import dump

    print(dump(_load(recipe, overrides)), end="")


@recipe_app.command("schema", epilog="Example:  latelier recipe schema > recipe.schema.json")
def recipe_schema() -> None:
    """The JSON schema of recipes, for editors."""
    import json

    from latelier.recipe import schema

    print(json.dumps(schema(), indent=2))


def main() -> None:
    """Entry point: user errors become one sentence and exit code 2."""
    try:
        app()
    except LatelierError as error:
        Console(stderr=True).print(f"[bold red]Error:[/] {_escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
