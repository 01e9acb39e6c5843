"""Evaluate a trained tokenizer on any images: every measure of its latent space, a page, and a verdict in words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from latelier import run
from latelier.data.loader import ImageDataset
from latelier.data.tensors import IN_MEMORY, TensorImages
from latelier.errors import LatelierError
from latelier.evaluate import evaluate
from latelier.evaluation.metrics import METRICS
from latelier.opening import best_device, join_processes, open_images, open_pretrained
from latelier.recipe import Recipe, apply_overrides, build_recipe, load_recipe
from latelier.report.diffusability import experience
from latelier.report.figures import CHANNELS, ERRORS, MAP, SPECTRUM
from latelier.report.measures import Finding
from latelier.report.verdict import verdict
from latelier.tokenizers.codec import Codec, tokenizer_folder
from latelier.tokenizers.pretrained import PretrainedSection
from latelier.training.run_folder import claimed
from latelier.training.tokenizer_loop import with_statistics

WRITTEN = ("metrics.json", "verdict.json", "report.html", MAP, CHANNELS, ERRORS, SPECTRUM)


def inspect(
    tokenizer: Codec | str | Path, images: str | Path | Tensor | ImageDataset, size: int = 256, samples: int = 2000,
    out: str | Path | None = None, options: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Measure the latent space of any trained tokenizer on any images: a run without training.

    Args:
        tokenizer: a codec, a run folder, a tokenizer folder, or a diffusers Hub name.
        images: a folder or another `data.source`, a tensor `(n, c, h, w)` in [-1, 1], or an `ImageDataset`; all are
            held out. What learns from latents (gmm, probe, difficulty) learns from half of them, if the source has no
            validation split.
        size: side in pixels; images in memory have their own.
        samples: how many images are measured, and how many more are learnt from.
        out: folder of metrics.json, verdict.json (the findings: `{kind, sentence, evidence}`), report.html and images;
            None keeps nothing.
        options: `a.b=c` changes, such as `data.label_key=class`.

    Returns:
        The content of metrics.json.

    Raises:
        LatelierError: if `out` holds anything but an earlier inspection, or what is to be opened cannot be.
    """
    images = as_images(images)
    with kept_or_temporary(out) as folder:
        recipe = inspection_recipe(tokenizer, images, size, samples, folder, list(options))
        _check_out(tokenizer, recipe, folder)
        shutil.rmtree(folder / "tokenizer", ignore_errors=True)  # an inspection's copy, perhaps of another tokenizer
        for name in WRITTEN:
            (folder / name).unlink(missing_ok=True)
        if isinstance(tokenizer, Codec) or isinstance(images, ImageDataset):
            _measure(recipe, tokenizer, images)
        else:
            run.complete(recipe)
        found = [asdict(finding) for finding in read_verdict(folder)]
        text = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
        (folder / "verdict.json").write_text(text, encoding="utf-8")
        return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def as_images(images: str | Path | Tensor | ImageDataset) -> str | ImageDataset:
    """A source's name, or a dataset."""
    if isinstance(images, Tensor):
        return TensorImages(images)
    return images if isinstance(images, ImageDataset) else str(images)


@contextmanager
def kept_or_temporary(out: str | Path | None) -> Iterator[Path]:
    """The folder for results, or one that is deleted afterwards."""
    if out is not None:
        yield Path(out)
        return
    if join_processes().num_processes > 1:
        raise LatelierError("Several processes need a folder that all of them see; give out=.")
    with TemporaryDirectory() as folder:
        yield Path(folder, "inspection")


def _measure(recipe: Recipe, tokenizer: Codec | str | Path, images: str | ImageDataset) -> None:
    """Evaluate a tokenizer or images that are in memory, as `run.complete` does those of a recipe."""
    if isinstance(images, ImageDataset):
        training = held_out = images
    else:
        training, held_out = open_images(recipe), open_images(recipe, "val")
    assert isinstance(recipe.tokenizer, PretrainedSection)
    codec = tokenizer if isinstance(tokenizer, Codec) else open_pretrained(recipe.tokenizer).to(best_device())
    if codec.image_channels != held_out.shape[0]:
        raise LatelierError(
            f"The images have {held_out.shape[0]} channels, but the tokenizer takes {codec.image_channels}."
        )
    codec.latent_shape(*held_out.shape[1:])
    modes = [(module, module.training) for module in codec.tokenizer.modules()]
    codec.tokenizer.eval()
    try:
        with claimed(recipe):
            measured = with_statistics(codec, training, recipe.seed, Accelerator())
            run.show_measurements(evaluate(recipe, measured, held_out))
    finally:
        for module, training_mode in modes:
            module.training = training_mode


def _check_out(tokenizer: Codec | str | Path, recipe: Recipe, out: Path) -> None:
    """Refuse a folder in which an inspection would overwrite what no inspection wrote."""
    assert isinstance(recipe.tokenizer, PretrainedSection)
    earlier = load_recipe(out) if (out / "recipe.yaml").is_file() else None
    if earlier and (earlier.tokenizer.kind != "pretrained" or earlier.denoiser is not None):
        raise LatelierError(f"{out} is the folder of a trained run; choose another one with --out.")
    folder, weights = out.resolve(), Path(recipe.tokenizer.path).resolve()
    above, below = {Path(str(tokenizer)).resolve(), weights, *weights.parents}, folder.parents
    if not isinstance(tokenizer, Codec) and Path(tokenizer).exists() and (folder in above or weights in below):
        raise LatelierError(f"--out {out} would overwrite {tokenizer}, which is to be inspected; choose another one.")
    if not earlier and (found := [name for name in ("tokenizer", *WRITTEN) if (out / name).exists()]):
        raise LatelierError(f"{out} has files that no inspection wrote ({', '.join(found)}); choose another --out.")


def inspection_recipe(
    tokenizer: Codec | str | Path, images: str | ImageDataset, size: int, samples: int, out: Path, options: list[str]
) -> Recipe:
    """The recipe of an inspection; arguments and errors are those of `inspect`."""
    out = out if out.name.strip(".") else out.resolve()
    data: dict[str, Any] = {"source": images, "val_source": images, "image_size": size, "flip": False}
    if isinstance(images, ImageDataset):
        channels, *sides = images.shape
        data |= {"source": IN_MEMORY, "val_source": IN_MEMORY, "image_size": sides, "channels": channels}
    path = f"{tokenizer.name} in memory" if isinstance(tokenizer, Codec) else str(tokenizer_folder(tokenizer))
    tree: dict[str, Any] = {
        "name": out.name,
        "runs": str(out.parent),
        "data": data,
        "tokenizer": {"kind": "pretrained", "path": path},
        "evaluate": {"samples": samples, "probe_samples": samples},
    }
    tree = apply_overrides(tree, options)
    tree["evaluate"].setdefault("metrics", [name for name, metric in METRICS.items() if metric.inspect])
    return build_recipe(tree)


def read_verdict(out: Path) -> list[Finding]:
    """What the numbers of an inspected tokenizer, or of any run folder, mean."""
    return verdict(json.loads((out / "metrics.json").read_text(encoding="utf-8")))


def read_experience(out: Path) -> str:
    """Which of the measures of an inspected tokenizer predicted generation in our own experiments, in words."""
    return experience(json.loads((out / "metrics.json").read_text(encoding="utf-8")))
