"""What `latelier run` does, from data to report, and what one does with a trained run: sample, upscale, inpaint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from rich.table import Table
from torch import Tensor

from latelier.conditioning.condition import components
from latelier.conditioning.inputs import by, read_image, read_mask
from latelier.data.records import UNREADABLE
from latelier.data.transforms import Transform, to_float
from latelier.errors import LatelierError
from latelier.evaluate import evaluate
from latelier.evaluation.features import check_features
from latelier.evaluation.reconstruction import psnr
from latelier.evaluation.results import NOT_REACHED, Measurement, is_main
from latelier.images import make_columns, make_grid, save_png
from latelier.opening import best_device, held_out_records, join_processes, open_run
from latelier.pipeline import LatentDiffusionPipeline, choose_settings, make_previews
from latelier.preflight import check_sources
from latelier.recipe import Recipe
from latelier.terminal import console
from latelier.tokenizers.codec import Codec
from latelier.training.denoiser_loop import train_denoiser
from latelier.training.run_folder import claimed
from latelier.training.tokenizer_loop import train_tokenizer


def run(recipe: Recipe, accept_changes: bool = False) -> Path:
    """`complete`, then print the report's path and the commands to try next."""
    report = complete(recipe, accept_changes)
    if is_main(shared=True):
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


def complete(recipe: Recipe, accept_changes: bool = False) -> Path:
    """Train the tokenizer, encode, train the denoiser, sample, evaluate and report; resumes a stopped run.

    Returns the path of the report. For `accept_changes` see `run_folder.claimed`.
    """
    check_features(recipe.evaluate)  # now, not after days of training
    check_sources(recipe)
    with claimed(recipe, accept_changes):
        train_tokenizer(recipe)
        if recipe.denoiser is not None:
            train_denoiser(recipe)
            if is_main(shared=True):
                console.print(f"Samples: {sample_to_folder(recipe.folder)}")
        show_measurements(evaluate(recipe))
        join_processes().wait_for_everyone()
    return recipe.folder / "report.html"


def sample_to_folder(
    run: Path, inputs: dict[str, list] | None = None, settings: dict | None = None, size: int | None = None,
    out: Path | None = None, preview: int | None = None, preview_channels: int | None = None,
) -> Path:  # fmt: skip
    """Draw images into a folder, each as a PNG and all of them in `grid.png`, whose path is returned.

    Without inputs, a model that is conditioned on more than classes takes the conditions of held-out images.

    Args:
        run: a run folder or a saved pipeline.
        inputs: lists `classes`, `prompts`, `layouts`, ..., see `LatentDiffusionPipeline.__call__`.
        settings: of `sample`: `steps`, `count`, `guidance`, ...; None is the recipe's.
        size: side in pixels; default that of training.
        out: the folder; by default `samples` of the run.
        preview: evaluations of the denoiser from one preview to the next, written to `previews` of `out`.
        preview_channels: what a preview decodes, see `make_previews`.
    """
    pipeline, recipe = open_run(run)
    inputs = {name: values for name, values in (inputs or {}).items() if values}
    given = {**(settings or {}), "classes": inputs.pop("classes", None)}
    chosen = choose_settings(recipe.sample if recipe else None, given)
    records = held_out_records(recipe, pipeline)(0, chosen.count) if recipe and not inputs else {}
    out, previews = out or run / "samples", None
    if preview is not None:
        previews = make_previews(pipeline, recipe, chosen, out / "previews", preview, preview_channels)
    options = {"sample": chosen, "records": records, "height": size, "width": size, "callback": previews, **inputs}
    images = pipeline(output_type="pt", **options).images
    for i, image in enumerate(images):
        save_png(make_grid(image[None], columns=1), out / f"{chosen.seed + i:06d}.png")
    save_png(make_grid(images, columns=max(1, round(len(images) ** 0.5))), out / "grid.png")
    (out / "settings.json").write_text(chosen.model_dump_json(indent=2))
    if previews is not None:
        previews.save_strips()
    return out / "grid.png"


def upscale_file(
    run: Path, image: Path, out: Path, factor: int | None, settings: dict, inputs: dict[str, list]
) -> tuple[int, int]:
    """Upscale an image file; returns width and height of the result. An error if the model has another factor.

    `inputs` are the prompts or classes of a model that is conditioned on them too.
    """
    pipeline, recipe = open_run(run)
    component = components(pipeline.conditioner).get("low_resolution")
    if factor is not None and component is not None and factor != component.config["factor"]:
        raise LatelierError(f"--factor {factor}, but this model enlarges {component.config['factor']} times.")
    chosen = choose_settings(recipe.sample if recipe else None, {**settings, "count": 1})
    large = upscale(pipeline, image, sample=chosen, **inputs)
    save_png(make_grid(large[None], columns=1), out)
    return large.shape[2], large.shape[1]


def inpaint_file(run: Path, image: Path, mask: Path, out: Path, settings: dict, inputs: dict[str, list]) -> None:
    """Fill the holes of an image file; `inputs` as for `upscale_file`."""
    pipeline, recipe = open_run(run)
    chosen = choose_settings(recipe.sample if recipe else None, {**settings, "count": 1})
    filled = inpaint(pipeline, image, mask, sample=chosen, **inputs)
    save_png(make_grid(filled[None], columns=1), out)


def show_measurements(measured: list[Measurement]) -> None:
    """A table of numbers for the terminal, of the main process; the receipts are in metrics.json."""
    if not is_main(shared=True):
        return
    table = Table("metric", "value", "95 %", "n")
    for m in measured:
        interval = f"{m.interval[0]:.3f} to {m.interval[1]:.3f}" if m.interval else ""
        value = NOT_REACHED if NOT_REACHED in m.receipt else f"{m.value:.4g}"
        table.add_row(m.name, value, interval, f"{m.receipt.get('n', '')}")
    console.print(table)


def upscale(pipeline: LatentDiffusionPipeline, image: Any, **settings: Any) -> Float[Tensor, "c h w"]:
    """Enlarge an image of any size by the factor of the model, which was trained with `condition: low-resolution`.

    `image` is a PIL image, a file, or a tensor `(c, h, w)` in [-1, 1]; the result is `(c, factor h, factor w)`. Sides
    that do not fit the networks are continued and cut back. `settings` are those of the pipeline's call.
    """
    factor = _component(pipeline, "low_resolution", "enlarge images").config["factor"]
    source = read_image(image, pipeline.codec.image_channels, "image")
    height, width = source.shape[1:]
    small = _continued(source, multiple(pipeline) // math.gcd(multiple(pipeline), factor))  # (c, h', w')
    size = {"height": small.shape[1] * factor, "width": small.shape[2] * factor}
    large = pipeline(low_resolution=[small], output_type="pt", **size, **settings).images[0]
    return large[:, : height * factor, : width * factor]


def inpaint(pipeline: LatentDiffusionPipeline, image: Any, mask: Any, **settings: Any) -> Float[Tensor, "c h w"]:
    """Fill the holes of an image of any size; everything outside of them comes back untouched.

    The model was trained with `condition: inpainting`. `image` and `settings` are as for `upscale`; `mask` is a PIL
    image, a file, or a tensor `(h, w)`, bright where the holes are.
    """
    _component(pipeline, "inpainting", "fill holes")
    source, hole = read_image(image, pipeline.codec.image_channels, "image"), read_mask(mask, "mask")
    height, width = source.shape[1:]
    if hole.shape != (height, width):
        raise LatelierError(
            f"The mask is {by(hole.shape)} (height x width), but the image {height} x {width}; make them equal."
        )
    if not hole.any():
        raise LatelierError("The mask has no hole; paint in white what is to be filled.")
    whole = _continued(source, multiple(pipeline))  # (c, h', w')
    holes = F.pad(hole, (0, whole.shape[2] - width, 0, whole.shape[1] - height))  # (h', w')
    size = {"height": whole.shape[1], "width": whole.shape[2]}
    drawn = pipeline(inpainting=[(whole, holes)], output_type="pt", **size, **settings).images[0]
    return drawn[:, :height, :width]


def multiple(pipeline: LatentDiffusionPipeline) -> int:
    """What the sides of images must be divisible by, for the tokenizer and the denoiser."""
    config = pipeline.denoiser.config
    levels = config.get("block_out_channels")
    inner = 2 ** (len(levels) - 1) if levels else config.get("patch_size", 1)
    return pipeline.codec.factor * inner


def _component(pipeline: LatentDiffusionPipeline, name: str, does: str) -> Any:
    known = components(pipeline.conditioner)
    if name not in known:
        found = " and ".join(known) or "nothing"
        raise LatelierError(f"This model was not trained to {does}: it is conditioned on {found}, not {name}.")
    return known[name]


def _continued(image: Float[Tensor, "c h w"], step: int) -> Float[Tensor, "c k l"]:
    """The image with its last row and column repeated until `step` divides both sides."""
    down, right = (-side % step for side in image.shape[1:])
    return F.pad(image[None], (0, right, 0, down), mode="replicate")[0]


def reconstruct(tokenizer: str, images: list[Path], out: Path, size: int, channels: Sequence[int] = ()) -> list[float]:
    """Pass image files through a tokenizer; the PNG file `out` has the originals above the reconstructions.

    Returns the mean PSNR in dB of each row of images.

    Args:
        tokenizer: a run folder, a tokenizer folder, or a diffusers Hub name.
        images: files and folders, of which images are cropped to squares of side `size`.
        channels: decode only the first k latent channels, a row of images for each k; nothing decodes all.
    """
    codec = Codec.from_pretrained(tokenizer, precision="auto").to(best_device())
    codec.latent_shape(size, size)
    originals = _read_images(images, codec.image_channels, size)
    with torch.no_grad():
        latents = [codec.encode(x[None].to(codec.device)) for x in originals]
        lengths: list[int | None] = [*channels] or [None]
        rows = [torch.cat([codec.decode(z, length).clamp(-1, 1).cpu() for z in latents]) for length in lengths]
    save_png(make_columns([originals, *rows], columns=min(8, len(originals))), out)
    return [psnr(row, originals).mean().item() for row in rows]


def _read_images(paths: list[Path], channels: int, size: int) -> Tensor:
    """Image files, and those in folders, centre-cropped to a square, `(n, c, size, size)` in [-1, 1]."""
    transform = Transform((size, size), channels, flip=False)
    if missing := [str(path) for path in paths if not path.exists()]:
        raise LatelierError(f"There is no image or folder {', '.join(missing)}.")
    files = [f for path in paths for f in (sorted(path.rglob("*")) if path.is_dir() else [path]) if f.is_file()]
    tensors = []
    for file in files:
        try:
            with Image.open(file) as image:
                tensors.append(to_float(transform.pixels(image)[0]))
        except UNREADABLE:
            continue
    if not tensors:
        raise LatelierError(f"No image can be read from {', '.join(map(str, paths)) or 'nothing'}.")
    return torch.stack(tensors)
