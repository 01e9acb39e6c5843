"""A run so small that it takes a second or two, with everything that writes: phases, a discriminator, the latent cache,
snapshots, previews, samples, measures and a report.
"""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

VMAE = {"dim": 16, "depth": 1, "heads": 2, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
GAME = {"layers": 1, "channels": 4, "start": 8, "ahead": 8}
EVERY = {"checkpoint_every": 16, "preview_every": 32, "log_every": 8}
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "data": {"source": "emoji", "image_size": 16, "length": 32},
    "tokenizer": {
        "kind": "vmae", "preset": "vmae-f8d16-tiny", "model": {**VMAE, "latent_channels": 4}, "images": 32, "batch": 8,
        "perceptual_weight": 0, "precision": "fp32", "ema": 0.9, **EVERY,
        "phases": [{"name": "tuning", "images": 16, "train": "decoder", "mask_ratio": 0, "adversarial": GAME, **EVERY}],
    },
    "denoiser": {
        "size": "XS", "model": {"dim": 16, "depth": 1, "heads": 2}, "images": 32, "batch": 8, "precision": "fp32",
        "ema": 0.9, "snapshots": 2, **EVERY,
    },
    "sample": {"steps": 2, "count": 4, "batch": 4, "guidance": 2.0},
    "evaluate": {"metrics": ["psnr", "spectrum"], "samples": 8, "batch": 8},
}  # fmt: skip
KEPT = ("tokenizer", "phases", "denoiser", "pipeline", "latents", "samples", "checkpoints")


def write_recipe(folder: Path, **changes: Any) -> Path:
    """`tiny.yaml` in a folder; its run folder is `runs/tiny` there. Changes are of sections, `None` drops one."""
    tree = copy.deepcopy(RECIPE)
    for name, change in changes.items():
        if change is None:
            del tree[name]
        else:
            tree[name] = {**tree.get(name, {}), **change} if isinstance(change, dict) else change
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def light() -> None:
    """In a fork: nearest images by mean colour instead of a network's features, and no charts; both take seconds."""
    import torch

    from latelier import evaluate
    from latelier.evaluation.features import FeatureExtractor
    from latelier.report import run

    run.line_chart = lambda *args, **options: None

    about = ("colour", 3, "mean", "rounded to 8 bit", "0" * 64, torch.nn.Linear(1, 1))
    evaluate.load_extractor = lambda name: FeatureExtractor(*about, lambda x: x.mean((2, 3)))


def contents(run: Path) -> dict[str, str]:
    """What an uninterrupted and a resumed run must have alike, bit for bit: files by name, and the measured values."""
    found = {}
    for path in sorted(path for name in KEPT for path in (run / name).rglob("*") if path.is_file()):
        if path.name.startswith("random_states") or path.match("checkpoints/*/manifest.json"):
            continue  # states of generators that nothing draws from
        found[str(path.relative_to(run))] = hashlib.sha256(path.read_bytes()).hexdigest()
    metrics = json.loads((run / "metrics.json").read_text()) if (run / "metrics.json").is_file() else {}
    for section, entries in metrics.items():
        found |= {f"metrics.json {section} {name}": repr(entry["value"]) for name, entry in entries.items()}
    return found


def difference(run: Path, whole: dict[str, str], unused: str = "") -> str:
    """What differs from an uninterrupted run, but for one file, or was left behind by a kill; empty for nothing.

    A signal writes a checkpoint of its own, so of checkpoints those are compared that both have.
    """
    found = contents(run)
    names = {n for n in {**whole, **found} if not n.startswith("checkpoints") or (n in whole and n in found)}
    wrong = [name for name in names if whole.get(name) != found.get(name) and name != unused]
    if wrong:
        return f"differs: {', '.join(sorted(wrong)[:4])}{' ...' * (len(wrong) > 4)}"
    left = [str(p.relative_to(run)) for p in run.rglob(".*") if p.name.endswith((".tmp", ".old"))]
    return f"left behind: {', '.join(left[:4])}" if left else ""
