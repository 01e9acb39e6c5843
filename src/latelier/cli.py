"""The command line. Heavy modules are imported inside commands, so that `--help` answers at once."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from latelier import __version__
from latelier.errors import LatelierError, explain
from latelier.terminal import handled_by, stop_now

console = Console()
app = typer.Typer(
    name="latelier",
    help="Train, evaluate and use image tokenizers, and the latent diffusion models that run on them.",
    epilog="Start with:  latelier run quickstart",
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
)
train_app = typer.Typer(no_args_is_help=True, help="Train one stage of a recipe.")
recipe_app = typer.Typer(no_args_is_help=True, help="List, show and describe recipes.")
app.add_typer(train_app, name="train")
app.add_typer(recipe_app, name="recipe")

RecipePath = Annotated[str, typer.Argument(help="A recipe file, a name from `latelier recipe list`, or a run folder.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes such as tokenizer.lr=1e-4 denoiser.images=2M.")]
Tokenizer = Annotated[str, typer.Argument(help="A run folder, a tokenizer folder, or a diffusers Hub name.")]
Data = Annotated[str, typer.Option(help="Images to evaluate on: a folder, a dataset, `emoji`, ...")]
_number = partial(typer.Option, min=1)
_pixels = partial(typer.Option, min=1, max=2**16)
_seeds = partial(typer.Option, min=-(2**62), max=2**62)
_folder = partial(typer.Option, file_okay=False)
_file = partial(typer.Option, dir_okay=False)
Size = Annotated[int, _pixels(help="Images are cropped to squares of this side, in pixels.")]
Samples = Annotated[int, _number(help="How many images to evaluate on; probes are fitted on as many.")]
Steps = Annotated[int | None, _number(help="Sampling steps; default: the recipe's.")]
Tile = Annotated[int | None, _number(help="Tiled sampling, for large images: a tile's side in latent positions.")]
Prompt = Annotated[str | None, typer.Option(help="A caption, for models that are conditioned on text too.")]
Guidance = Annotated[float, typer.Option(min=0, help="Scale of classifier-free guidance; 1 is none.")]
Seed = Annotated[int, _seeds(help="Another seed gives another image.")]
Accept = Annotated[bool, typer.Option(help="Go on from the last checkpoint although the recipe has changed.")]
Strings = list[str] | None


def _show_version(wanted: bool) -> bool:
    if wanted:
        console.print(f"latelier {__version__}", highlight=False)
        raise typer.Exit
    return wanted


Version = Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")]


@app.callback()
def options(version: Version = False) -> None:
    """Options of `latelier` itself."""


def _load(recipe: str, overrides: list[str] | None):
    from latelier.recipe import load_recipe

    return load_recipe(recipe, overrides or ())


@app.command(epilog="Example:  latelier run quickstart data.source=./photos name=photos")
def run(recipe: RecipePath, overrides: Overrides = None, accept_changes: Accept = False) -> None:
    """Run a whole recipe: train tokenizer and denoiser, sample, evaluate, report. Resumes a stopped run."""
    from latelier.run import run as run_recipe

    run_recipe(_load(recipe, overrides), accept_changes)


@train_app.command("tokenizer", epilog="Example:  latelier train tokenizer my.yaml tokenizer.images=4M")
def train_tokenizer_command(recipe: RecipePath, overrides: Overrides = None, accept_changes: Accept = False) -> None:
    """Stage 1: train the tokenizer, and compute the statistics of its latents."""
    from latelier.training.run_folder import claimed
    from latelier.training.tokenizer_loop import train_tokenizer

    with claimed(_load(recipe, overrides), accept_changes) as chosen:
        console.print(f"Tokenizer: {train_tokenizer(chosen)}")


@train_app.command("denoiser", epilog="Example:  latelier train denoiser my.yaml denoiser.size=B")
def train_denoiser_command(recipe: RecipePath, overrides: Overrides = None, accept_changes: Accept = False) -> None:
    """Stage 2: train the denoiser on the run's tokenizer."""
    from latelier.training.denoiser_loop import train_denoiser
    from latelier.training.run_folder import claimed

    with claimed(_load(recipe, overrides), accept_changes) as chosen:
        console.print(f"Pipeline: {train_denoiser(chosen)}")


@app.command(epilog="Example:  latelier encode my.yaml --overwrite")
def encode(
    recipe: RecipePath,
    overrides: Overrides = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a cache of other images or another tokenizer.")] = False,
) -> None:
    """Encode the training images into the latent cache."""
    from latelier.training.denoiser_loop import encode_latents
    from latelier.training.run_folder import claimed

    with claimed(_load(recipe, overrides)) as chosen:
        cache = encode_latents(chosen, overwrite=overwrite)
    console.print(f"Latents: {cache.folder} ({len(cache):,} images)")


@app.command(epilog="Example:  latelier reconstruct runs/quickstart photo.jpg another.png --out pairs.png")
def reconstruct(
    tokenizer: Tokenizer,
    images: Annotated[list[Path], typer.Argument(help="Image files or folders.")],
    out: Annotated[Path, _file(help="Image of originals above reconstructions.")] = Path("reconstructions.png"),
    size: Size = 256,
    channels: Annotated[
        str | None, typer.Option(help="Decode only the first channels of the latents, such as 4,8,16,32: a row each.")
    ] = None,
) -> None:
    """Encode and decode images with a tokenizer, to compare originals and reconstructions."""
    from latelier.run import reconstruct as reconstruct_images

    try:
        lengths = [int(part) for part in channels.split(",")] if channels else []
    except ValueError:
        raise LatelierError(f"--channels = {channels!r} is no list of numbers; write 4,8,16.") from None
    found = reconstruct_images(tokenizer, images, out, size, lengths)
    names = [f" with {length} channels" for length in lengths] or [""]
    console.print(f"{out}: mean PSNR " + ", ".join(f"{value:.2f} dB{name}" for value, name in zip(found, names)))


@app.command(epilog="Example:  latelier sample runs/quickstart --classes 'Animals & Nature' --count 16 --seed 7")
def sample(
    run: Annotated[Path, typer.Argument(help="A run folder or a saved pipeline.")],
    classes: Annotated[Strings, typer.Option(help="Class name or index; repeat for several.")] = None,
    prompt: Annotated[Strings, typer.Option(help="Caption; repeat for several.")] = None,
    negative: Annotated[str | None, typer.Option(help="Negative prompt: what guidance leads away from.")] = None,
    layout: Annotated[
        Strings,
        typer.Option(help="Boxes 'owl 0.1 0.2 0.5 0.9; apple 0.6 0.5 0.9 0.8' (x0 y0 x1 y1), or a JSON file of them."),
    ] = None,
    segmentation: Annotated[Strings, typer.Option(help="PNG label map of class ids.")] = None,
    map: Annotated[Strings, typer.Option(help="Any other map, such as depth: an image file.")] = None,
    input: Annotated[Strings, typer.Option(help="NAME=VALUE of any other input: low_resolution=small.png.")] = None,
    count: Annotated[int, _number(help="How many images.")] = 16,
    steps: Steps = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="Scale of classifier-free guidance; 1 is none.")] = None,
    guide: Annotated[
        str | None, typer.Option(help="Weaker model that --guidance leads away from: a run, or snapshots/IMAGES.")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="ddim, plms, dpm++, unipc, euler, heun, sde, dopri5, ...")] = None,
    size: Annotated[int | None, _pixels(help="Side in pixels; default: the size of training.")] = None,
    channels: Annotated[int | None, _number(help="Draw only the first channels of the latents.")] = None,
    tile: Tile = None,
    tile_stride: Annotated[int | None, _number(help="From one tile to the next; default half a tile.")] = None,
    seed: Annotated[int, _seeds(help="Image i is drawn from seed + i.")] = 0,
    preview: Annotated[int | None, _number(help="Steps from one preview of the first images to the next.")] = None,
    preview_channels: Annotated[
        int | None, _number(help="Previews decode only the first channels; default a quarter if structured.")
    ] = None,
    out: Annotated[Path | None, _folder(help="Folder of the images; default: samples/ of the run.")] = None,
) -> None:
    """Draw images from a trained pipeline."""
    from latelier.run import sample_to_folder

    inputs: dict[str, list] = {
        "classes": classes or [], "prompts": prompt or [], "negative_prompts": [negative] if negative else [],
        "layouts": layout or [], "segmentations": segmentation or [], "maps": map or [],
    }  # fmt: skip
    for text in input or []:
        name, equals, value = text.partition("=")
        if not equals:
            raise LatelierError(f"--input {text!r} is not NAME=VALUE, such as low_resolution=small.png.")
        inputs.setdefault(name, []).append(value)
    settings = {"count": count, "steps": steps, "guidance": guidance, "sampler": sampler, "channels": channels}
    settings |= {"tile": tile, "tile_stride": tile_stride, "seed": seed, "guide": guide}
    console.print(f"Grid: {sample_to_folder(run, inputs, settings, size, out, preview, preview_channels)}")


@app.command(epilog="Example:  latelier upscale small.png large.png --run runs/super-resolution")
def upscale(
    image: Annotated[Path, typer.Argument(help="The image, of any size.")],
    out: Annotated[Path, typer.Argument(dir_okay=False, help="The larger image to write.")],
    run: Annotated[Path, typer.Option(help="A run folder or pipeline, trained with condition: low-resolution.")],
    factor: Annotated[int | None, _number(help="How many times larger; checked against the model's.")] = None,
    steps: Steps = None,
    seed: Seed = 0,
    prompt: Prompt = None,
    guidance: Guidance = 1.0,
    tile: Tile = None,
) -> None:
    """Enlarge an image with a super-resolution model."""
    from latelier.run import upscale_file

    settings = {"steps": steps, "seed": seed, "tile": tile, "guidance": guidance}
    width, height = upscale_file(run, image, out, factor, settings, {"prompts": [prompt]} if prompt else {})
    console.print(f"{out}: {width} x {height}")


@app.command(epilog="Example:  latelier inpaint photo.png mask.png --run runs/inpainting --out filled.png")
def inpaint(
    image: Annotated[Path, typer.Argument(help="The image, of any size.")],
    mask: Annotated[Path, typer.Argument(help="An image of the same size, white where the hole is.")],
    run: Annotated[Path, typer.Option(help="A run folder or pipeline, trained with condition: inpainting.")],
    out: Annotated[Path, _file(help="The image to write.")] = Path("inpainted.png"),
    steps: Steps = None,
    seed: Seed = 0,
    prompt: Prompt = None,
    guidance: Guidance = 1.0,
    tile: Tile = None,
) -> None:
    """Fill the holes of an image; all other pixels stay as they are."""
    from latelier.run import inpaint_file

    settings = {"steps": steps, "seed": seed, "tile": tile, "guidance": guidance}
    inpaint_file(run, image, mask, out, settings, {"prompts": [prompt]} if prompt else {})
    console.print(f"{out}")


@app.command(epilog="Example:  latelier evaluate runs/quickstart evaluate.samples=1000")
def evaluate(
    recipe: RecipePath,
    overrides: Overrides = None,
    npz: Annotated[Path | None, _file(help="Keep the samples in this file, as the ADM evaluator reads them.")] = None,
) -> None:
    """Evaluate a trained run: reconstruction, latents, generation. Writes metrics.json and the report."""
    from latelier.evaluate import evaluate as evaluate_run
    from latelier.opening import join_processes
    from latelier.run import show_measurements
    from latelier.training.run_folder import locked

    loaded = _load(recipe, overrides)
    with locked(loaded.folder, join_processes().is_main_process and loaded.folder.is_dir()):
        show_measurements(evaluate_run(loaded, npz=npz))


@app.command(epilog="Example:  latelier measure samples.npz VIRTUAL_imagenet256_labeled.npz --protocol adm-imagenet256")
def measure(
    images: Annotated[Path, typer.Argument(help="A folder of images, or an .npz with arr_0.")],
    reference: Annotated[Path, typer.Argument(help="The same, or an .npz with statistics: mu, sigma.")],
    features: Annotated[Strings, typer.Option(help="Extractor, as in evaluate.features; repeat for several.")] = None,
    metric: Annotated[
        Strings, typer.Option(help="gfd, kid, psnr, ...; repeat for several. Default: what fits.")
    ] = None,
    size: Annotated[int | None, _pixels(help="Crop the images of folders to squares of this side.")] = None,
    protocol: Annotated[str | None, typer.Option(help="adm-imagenet256, rfid-imagenet-val50k, ...")] = None,
    out: Annotated[Path | None, _file(help="A .json file for the numbers, with their receipts.")] = None,
) -> None:
    """Compare two sets of images: FID and the like, and PSNR, SSIM, LPIPS where their names pair up."""
    from latelier.evaluation.measure import measure as measure_images
    from latelier.evaluation.results import write_measurements
    from latelier.opening import best_device
    from latelier.run import show_measurements

    found = measure_images(images, reference, features or ["vgg16"], metric or [], size, protocol, device=best_device())
    show_measurements(found)
    if out is not None:
        write_measurements(out, found, "measured")


@app.command(epilog="Example:  latelier report runs/quickstart")
def report(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write the report.html of a run again."""
    from latelier.report.run import write_report

    if not (run / "recipe.yaml").is_file():
        raise LatelierError(f"There is no run in {run}: it has no recipe.yaml; give the folder of a run.")
    console.print(f"Report: {write_report(run)}")


@app.command(epilog="Example:  latelier check my.yaml data.source=./photos")
def check(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Try a recipe before training: open the data, run a step with every loss term, estimate memory and hours."""
    from latelier.preflight import check as preflight

    preflight(_load(recipe, overrides))


@app.command(epilog="Example:  latelier convert vmae vmaef8d16.pth converted/ --set heads=12")
def convert(
    kind: Annotated[str, typer.Argument(help="ldm, ldm-kl, ldm-vq, ldm-unet, vmae, maetok, sit, lightning-dit, ...")],
    checkpoint: Annotated[Path, typer.Argument(help="The official checkpoint: .safetensors, .ckpt, .pth, ...")],
    out: Annotated[Path, typer.Argument(file_okay=False, help="Folder of the converted model.")],
    options: Annotated[Strings, typer.Option("--set", help="What shapes do not show: heads=12, image=256.")] = None,
) -> None:
    """Convert an official checkpoint to a folder that diffusers-style `from_pretrained` opens."""
    from latelier.convert import from_official
    from latelier.recipe import apply_overrides

    converted = from_official(kind, checkpoint, **apply_overrides({}, options or []))
    (converted.pipeline or converted.codec or converted.model).save_pretrained(out)
    if converted.pipeline is None and converted.conditioner is not None:
        converted.conditioner.save_pretrained(out / "conditioner")
    parameters = sum(p.numel() for p in converted.model.parameters())
    console.print(f"{out}: {type(converted.model).__name__}, {parameters:,} parameters")


@app.command(epilog="Example:  latelier inspect stabilityai/sd-vae-ft-mse --data ./photos --size 256")
def inspect(
    tokenizer: Tokenizer,
    data: Data,
    overrides: Overrides = None,
    size: Size = 256,
    samples: Samples = 2000,
    out: Annotated[Path, _folder(help="Folder of report.html, metrics.json, verdict.json.")] = Path("inspection"),
) -> None:
    """Evaluate a trained tokenizer: reconstruction, latent space, cost, and a verdict in words."""
    from latelier.study.inspect import inspect as inspect_tokenizer
    from latelier.study.inspect import read_experience, read_verdict

    inspect_tokenizer(tokenizer, data, size, samples, out, overrides or [])
    for finding in read_verdict(out):
        console.print(f"{finding.kind}: {finding.sentence}", highlight=False, markup=False, soft_wrap=True)
    if known := read_experience(out):
        console.print(known, highlight=False, markup=False, soft_wrap=True)
    console.print(f"Report: {out / 'report.html'}")


@app.command(epilog="Example:  latelier compare runs/one runs/two stabilityai/sd-vae-ft-mse --data photos --size 256")
def compare(
    tokenizers: Annotated[
        list[str], typer.Argument(help="Run folders, tokenizer folders, diffusers Hub names; then changes a.b=c.")
    ],
    data: Data,
    size: Size = 256,
    samples: Samples = 2000,
    out: Annotated[Path, _folder(help="Folder of the comparison and of all reports.")] = Path("comparison"),
    name: Annotated[Strings, typer.Option(help="Short name; repeat for each tokenizer. Default: their paths.")] = None,
) -> None:
    """Evaluate tokenizers on the same images, side by side. Resumes where it was stopped."""
    from latelier.study.compare import compare as compare_tokenizers
    from latelier.study.compare import divide_words

    chosen, changes = divide_words(tokenizers)
    compare_tokenizers(chosen, data, size, samples, out, changes, name or [])
    console.print(f"Comparison: {out / 'comparison.html'}")


@app.command(epilog="Example:  latelier study ldmae_tokenizers --variant emoji")
def study(
    file: Annotated[str, typer.Argument(help="A study file, or the name of an included one.")],
    overrides: Overrides = None,
    variant: Annotated[str | None, typer.Option(help="The same comparison on other data or at another scale.")] = None,
    only: Annotated[Strings, typer.Option(help="Train only this run now; repeat for several.")] = None,
) -> None:
    """Train and evaluate several recipes at equal budget, and compare them. Resumes where it was stopped.

    With `results: FOLDER` in the file, numbers of finished runs are kept there. On another
    machine these runs count as done.
    """
    from latelier.study.study import load_study, run_study

    console.print(f"Comparison: {run_study(load_study(file, variant, overrides or ()), only)}")


@recipe_app.command("list")
def recipe_list() -> None:
    """List the included recipes: the name, and what its file says first."""
    from latelier.recipe import recipe_files

    for name, path in recipe_files().items():
        about = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        console.print(f"{name:32} {about}", highlight=False, markup=False, soft_wrap=True)


@recipe_app.command("show", epilog="Example:  latelier recipe show quickstart tokenizer.lr=1e-4")
def recipe_show(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Show a recipe with every default filled in."""
    from latelier.recipe import dump

    print(dump(_load(recipe, overrides)), end="")


@recipe_app.command("schema", epilog="Example:  latelier recipe schema > recipe.schema.json")
def recipe_schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    import json

    from latelier.recipe import schema

    print(json.dumps(schema(), indent=2))


def main() -> None:
    """Entry point: user errors become one sentence and exit code 2."""
    try:
        with handled_by(stop_now):
            if os.environ.keys() & {"LOCAL_RANK", "ACCELERATE_USE_CPU"}:
                from latelier.opening import join_processes

                join_processes()
            app()
    except Exception as error:
        sentence = str(error) if isinstance(error, LatelierError) else explain(error)
        if sentence is None or os.environ.get("LATELIER_TRACEBACK"):
            raise
        Console(stderr=True).print(f"[bold red]Error:[/] {escape(sentence)}", highlight=False, soft_wrap=True)
        sys.exit(2)
