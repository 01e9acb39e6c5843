"""Several trained tokenizers side by side: each is inspected on the same images, then all stand on one page.

They may have any factors and latents: grids, sequences, codes. What was measured with the same settings, images and
weights is not measured again.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import Tensor

from latelier import __version__
from latelier.data.loader import ImageDataset
from latelier.errors import LatelierError
from latelier.evaluation.results import LEFT_OUT
from latelier.opening import open_images, open_pretrained
from latelier.recipe import Recipe
from latelier.report.comparison import write_comparison
from latelier.report.figures import ERRORS, MAP
from latelier.report.overview import BITS, NUMBERS
from latelier.report.tables import RunSummary, read_metrics
from latelier.study.inspect import as_images, inspect, inspection_recipe, kept_or_temporary
from latelier.study.study import file_name
from latelier.terminal import console
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.pretrained import PretrainedSection

SETTINGS = "settings.json"  # what the numbers depend on; written when they are there
COLUMNS = {
    "Reconstruction": ["l1", "psnr", "ssim", "ms-ssim", "lpips", "rfd", "kid", "cmmd"],
    "Smoothness": ["smoothness"],
    "Perceptual compression": ["within", "separation"],
    "Distribution": ["gmm", "diffusion-loss", "probe", "knn", "effective-rank", "channel-rank"],
    "Channels": ["variance-first-quarter", "channel-sparsity"],
    "Posterior": ["kl-bits-per-pixel", "active", "latent-std", "posterior-std", "largest-variance-ratio",
                  "outlier-channels"],
    "Codebook": ["codebook", "dead-codes"],
    "Equivariance": ["equivariance", "psnr-after"],
    "Cost": ["parameters", "size-mib", "gflop", "encode-images-per-second", "decode-images-per-second", "memory-gb"],
}  # fmt: skip
REST = "Also measured"
WEIGHTS = ("tokenizer", "vae", "vqvae", "pipeline")  # names of folders that say nothing; their parents' do


@dataclass
class Candidate:
    """One tokenizer of a comparison."""

    folder: Path  # of its inspection
    tokenizer: Codec | str | Path  # a run folder, a tokenizer folder or a Hub name
    settings: dict[str, Any]  # what its measures depend on
    facts: dict[str, Any]  # what it is, in words and numbers
    factor: int  # what the sides of images must be multiples of
    only_size: tuple[int, int] | None  # of images, if it decodes no other one


def compare(
    tokenizers: Sequence[str] | Mapping[str, Codec | str | Path], images: str | Path | Tensor | ImageDataset,
    size: int = 256, samples: int = 2000, out: str | Path | None = None, options: Sequence[str] = (),
    names: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Inspect tokenizers on the same images and write the comparison of all that could be measured.

    One that fails does not stop the others; it is named at the end.

    Args:
        tokenizers: run folders, tokenizer folders, or diffusers Hub names; or short names with these or with codecs.
            At least two.
        images, size, samples, options: as in `inspect`, for every tokenizer.
        out: gets a folder for each tokenizer, and `comparison.html`, `table.md`, `comparison.json` and figures; None
            keeps nothing.
        names: short names, in the order of the tokenizers; by default from their paths.

    Returns:
        The content of `comparison.json`.

    Raises:
        LatelierError: before anything is measured, for fewer than two tokenizers, wrong options, images that cannot
            be opened, and a size that does not fit all; afterwards, for tokenizers that failed.
    """
    if isinstance(tokenizers, Mapping):
        given = dict(tokenizers)
        chosen = dict(zip(short_names([f"{name}" for name in given], list(given)), given.values()))
    else:
        chosen = dict(zip(short_names(tokenizers, names), tokenizers))
    with kept_or_temporary(out) as folder:
        page = _compare(chosen, as_images(images), size, samples, folder, list(options))
        return json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))


def _compare(
    chosen: Mapping[str, Codec | str | Path], images: str | ImageDataset, size: int, samples: int, out: Path,
    options: list[str],
) -> Path:  # fmt: skip
    """The path of `comparison.html`; see `compare`."""
    rest = (images, size, samples)
    recipes = {name: inspection_recipe(one, *rest, out / name, options) for name, one in chosen.items()}
    first = next(iter(recipes.values()))
    held_out = images if isinstance(images, ImageDataset) else open_images(first, "val")
    data = held_out.fingerprint  # changes when other images would be seen
    failed: dict[str, str] = {}
    opened: dict[str, Candidate] = {}
    for name, recipe in recipes.items():
        with _noting(failed, name):
            opened[name] = _open(recipe, chosen[name], data)
    check_sizes(opened, first.data.image_size)
    for number, (name, candidate) in enumerate(opened.items(), 1):
        console.rule(f"{name} ({number} of {len(opened)})")
        with _noting(failed, name):
            _measure(candidate, *rest, options)
    reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
    measured = {name: candidate for name, candidate in opened.items() if name not in failed}
    if not measured:
        raise LatelierError(f"No tokenizer could be measured ({reasons}).")
    page = show(measured, f"{first.data.source} at {_pixels(first.data.image_size)}", out, failed)
    if failed:
        raise LatelierError(f"{len(failed)} of {len(chosen)} tokenizers failed ({reasons}). The others are in {page}.")
    return page


def short_names(tokenizers: Sequence[str], names: Sequence[str] = ()) -> list[str]:
    """A name for each tokenizer: what is given, or the last telling part of its path; clashes get numbers."""
    if (count := len(tokenizers)) < 2:
        raise LatelierError(f"A comparison needs two tokenizers or more, not {count}; see `latelier inspect`.")
    if twice := {tokenizer for tokenizer in tokenizers if list(tokenizers).count(tokenizer) > 1}:
        raise LatelierError(f"{', '.join(sorted(twice))} is to be compared with itself; name each tokenizer once.")
    if names and (len(names) != len(tokenizers) or len(set(map(file_name, names))) < len(names)):
        raise LatelierError(f"--name must be given once for each of {len(tokenizers)} tokenizers, all different.")
    if names:
        return [file_name(name) for name in names]
    taken: list[str] = []
    for short in map(_short, tokenizers):
        numbered = (f"{short}-{number}" for number in range(2, len(tokenizers) + len(taken) + 2))
        taken.append(next(name for name in (short, *numbered) if name not in taken))
    return taken


def _short(tokenizer: str) -> str:
    """`runs/quickstart/tokenizer` is `quickstart`; `stabilityai/sd-vae-ft-mse` is `sd-vae-ft-mse`."""
    path = Path(tokenizer).resolve() if Path(tokenizer).is_dir() else Path(tokenizer)
    while path.name in WEIGHTS and path.parent.name:
        path = path.parent
    return file_name(path.name)


def check_sizes(candidates: Mapping[str, Candidate], size: tuple[int, int]) -> None:
    """Refuse a size that a factor does not divide or a tokenizer cannot decode, and name the nearest that fits."""
    wrong = [
        f"{name} needs {_pixels(one.only_size)}" if one.only_size else f"{name} multiples of {one.factor}"
        for name, one in candidates.items()
        if one.only_size not in (None, size) or any(side % one.factor for side in size)
    ]
    if not wrong:
        return
    step = math.lcm(*(one.factor for one in candidates.values()))
    only = {one.only_size for one in candidates.values() if one.only_size}
    nearest = tuple(max(step, math.floor(side / step + 0.5) * step) for side in size)
    near = only.pop() if len(only) == 1 else nearest
    known = not only and not any(side % step for side in near)
    advice = f"the nearest size that fits all is {_pixels(near)}" if known else "no size fits all; leave some out"
    raise LatelierError(f"{_pixels(size)} does not fit every tokenizer ({', '.join(wrong)}); {advice}.")


def _pixels(size: Sequence[int]) -> str:
    return " x ".join(map(str, size)) + " px"


@contextmanager
def _noting(failed: dict[str, str], name: str) -> Iterator[None]:
    """Note why a tokenizer failed and go on: one must not cost the others' hours of measuring."""
    try:
        yield
    except LatelierError as error:
        failed[name] = str(error)
    except Exception as error:
        console.print_exception()
        failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if name in failed:
        console.print(f"{name} failed: {failed[name]}", style="bold red", highlight=False, markup=False)


def _open(recipe: Recipe, tokenizer: Codec | str | Path, data: str) -> Candidate:
    """Read a tokenizer's weights and config, without measuring anything."""
    assert isinstance(recipe.tokenizer, PretrainedSection)
    codec = tokenizer if isinstance(tokenizer, Codec) else open_pretrained(recipe.tokenizer)
    size, only_size = recipe.data.image_size, codec.info.decoder_size
    chosen = json.loads(recipe.model_dump_json(include={"seed", "data", "evaluate"}))
    settings = {"tokenizer": codec.hash(), "data": data, "settings": chosen, "latelier": __version__}
    fits = only_size in (None, size) and not any(side % codec.factor for side in size)
    facts = describe(codec, size) if fits else {}
    return Candidate(recipe.folder, tokenizer, settings, facts, codec.factor, only_size)


def describe(codec: Codec, size: tuple[int, int]) -> dict[str, Any]:
    """What a tokenizer is: class, factor, shape of its latents, and how much it compresses `(h, w)` pixels."""
    shape, pixels = codec.latent_shape(*size), math.prod(size)
    numbers = math.prod(shape)
    facts: dict[str, Any] = {
        "class": codec.name, "factor": codec.factor, "latent": " x ".join(map(str, shape)),
        "numbers in a latent": numbers, NUMBERS: round(numbers / pixels, 5),
        "image numbers per latent number": round(codec.image_channels * pixels / numbers, 3),
    }  # fmt: skip
    if codes := codec.tokenizer.config.get("num_vq_embeddings"):
        facts |= {"codes": codes, BITS: round(math.prod(shape[1:]) * math.log2(codes) / pixels, 5)}
    return facts


def _measure(candidate: Candidate, images: str | ImageDataset, size: int, samples: int, options: list[str]) -> None:
    """Inspect a tokenizer, unless its numbers are there and were made by the same settings."""
    folder, file = candidate.folder, candidate.folder / SETTINGS
    there = all((folder / name).is_file() for name in (SETTINGS, "metrics.json", "report.html"))
    if there and json.loads(file.read_text()) == candidate.settings:
        console.print(f"{folder} is measured.")
        return
    if PartialState().is_main_process:
        file.unlink(missing_ok=True)
    inspect(candidate.tokenizer, images, size, samples, folder, options)
    if PartialState().is_main_process:
        file.write_text(json.dumps(candidate.settings, indent=2))
    PartialState().wait_for_everyone()


def show(candidates: Mapping[str, Candidate], where: str, out: Path, failed: Mapping[str, str]) -> Path:
    """Write tables, figures and the page of what was measured on the images `where`, and say what failed and why."""
    page = out / "comparison.html"
    if PartialState().is_main_process:
        shown = [_shown(name, candidate) for name, candidate in candidates.items()]
        about = "Every tokenizer met the same images with the same seeds, noise and budget of learning. Names lead to "
        about += "its own report. "
        about += "".join(f"{name} is missing, it failed: {reason} " for name, reason in failed.items())
        reasons: dict[str, list[str]] = {}
        for name, candidate in candidates.items():
            for metric, entry in read_metrics(candidate.folder, left_out=True).items():
                reasons.setdefault(f"{metric} is left out ({entry['receipt'][LEFT_OUT].rstrip('.')})", []).append(name)
        about += " ".join(f"{reason} of {', '.join(names)}." for reason, names in reasons.items())
        title = f"{len(shown)} tokenizers on {where}"
        page = write_comparison(out, title, about, shown, _columns(shown), None, facts="What they are")
    PartialState().wait_for_everyone()
    return page


def _shown(name: str, candidate: Candidate) -> RunSummary:
    """A tokenizer's numbers and images, from the folder of its inspection."""
    metrics = read_metrics(candidate.folder)
    if "process" in metrics.get("memory-gb", {}).get("receipt", {}).get("peak", ""):
        del metrics["memory-gb"]  # on a CPU it is the process's peak, so also that of the tokenizers before
    images = {Path(file).stem: candidate.folder / file for file in ("reconstructions.png", ERRORS, MAP)}
    return RunSummary(name, metrics, candidate.facts, images, f"{candidate.folder.name}/report.html")


def _columns(shown: Sequence[RunSummary]) -> dict[str, list[str]]:
    """Metrics of each table, as they were measured; the points of curves, `gmm-nll@5`, are in figures."""
    known = dict.fromkeys(name for run in shown for name in run.metrics if "@" not in name)
    columns: dict[str, list[str]] = {title: [] for title in (*COLUMNS, REST)}
    for name in sorted(known, key=lambda name: _place(name)[1]):
        columns[_place(name)[0]].append(name)
    return columns


def _place(name: str) -> tuple[str, int]:
    """The table of a metric and its rank in there: where its longest beginning is listed."""
    listed = [(begin, title, rank) for title, names in COLUMNS.items() for rank, begin in enumerate(names)]
    fitting = [(len(begin), title, rank) for begin, title, rank in listed if f"{name}-".startswith(f"{begin}-")]
    return max(fitting)[1:] if fitting else (REST, 0)


def divide_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words of a command line as tokenizers and as changes such as `evaluate.batch=8`."""
    changes = [word for word in words if re.match(r"[\w.]+=", word) and not Path(word).exists()]
    return [word for word in words if word not in changes], changes
