"""Evaluate a trained tokenizer on any images: every measure of its latent space, a page, and a verdict in words."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from latelier import run
from latelier.errors import LatelierError
from latelier.evaluation.metrics import METRICS
from latelier.recipe import Recipe, apply_overrides, build_recipe, load_recipe
from latelier.report.figures import CHANNELS, ERRORS, MAP
from latelier.report.verdict import Finding, experience, verdict
from latelier.tokenizers.pretrained import PretrainedSection

WRITTEN = ("metrics.json", "verdict.json", "report.html", MAP, CHANNELS, ERRORS)


def inspect(tokenizer: str, source: str, size: int, samples: int, out: Path, options: list[str]) -> Path:
    """Measure the latent space of any trained tokenizer on any images: a run without training.

    Args:
        tokenizer: a run folder, a tokenizer folder, or a diffusers Hub name.
        source: images, as in `data.source`, all held out. What learns from latents (gmm, probe, difficulty) learns from
            half of them, if the source has no validation split.
        size: side in pixels.
        samples: how many images are measured, and how many more are learnt from.
        out: folder of metrics.json, verdict.json (the findings: `{kind, sentence, evidence}`), report.html and images.
        options: `a.b=c` changes, such as `data.label_key=class`.

    Returns:
        The report's path.

    Raises:
        LatelierError: if `out` holds anything but an earlier inspection, or what is to be opened cannot be.
    """
    recipe = inspection_recipe(tokenizer, source, size, samples, out, options)
    _check_out(Path(tokenizer), recipe, out)
    shutil.rmtree(out / "tokenizer", ignore_errors=True)  # an inspection's copy, perhaps of another tokenizer
    for name in WRITTEN:
        (out / name).unlink(missing_ok=True)
    report = run.complete(recipe)
    found = [asdict(finding) for finding in read_verdict(out)]
    (out / "verdict.json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def _check_out(tokenizer: Path, recipe: Recipe, out: Path) -> None:
    """Refuse a folder in which an inspection would overwrite what no inspection wrote."""
    assert isinstance(recipe.tokenizer, PretrainedSection)
    earlier = load_recipe(out) if (out / "recipe.yaml").is_file() else None
    if earlier and (earlier.tokenizer.kind != "pretrained" or earlier.denoiser is not None):
        raise LatelierError(f"{out} is the folder of a trained run; choose another one with --out.")
    folder, weights = out.resolve(), Path(recipe.tokenizer.path).resolve()
    above, below = {tokenizer.resolve(), weights, *weights.parents}, folder.parents
    if tokenizer.exists() and (folder in above or weights in below):
        raise LatelierError(f"--out {out} would overwrite {tokenizer}, which is to be inspected; choose another one.")
    if not earlier and (found := [name for name in ("tokenizer", *WRITTEN) if (out / name).exists()]):
        raise LatelierError(f"{out} has files that no inspection wrote ({', '.join(found)}); choose another --out.")


def inspection_recipe(tokenizer: str, source: str, size: int, samples: int, out: Path, options: list[str]) -> Recipe:
    """The recipe of an inspection; arguments and errors are those of `inspect`."""
    folder = Path(tokenizer) / "tokenizer"
    tree: dict[str, Any] = {
        "name": out.name,
        "runs": str(out.parent),
        "data": {"source": source, "val_source": source, "image_size": size, "flip": False},
        "tokenizer": {"kind": "pretrained", "path": str(folder) if folder.is_dir() else tokenizer},
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
