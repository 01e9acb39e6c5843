"""Autoguidance: away from a weaker model (Karras et al. 2024, "Guiding a diffusion model with a bad version").

out = weak + w (strong - weak), both with the same condition. The weaker model is smaller, or was trained for a shorter
time, on the same latents; a snapshot of the same training will do. `cfg.guided` has the equation.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from diffusers import ModelMixin

from latelier.conditioning import CONDITIONERS
from latelier.conditioning.condition import components
from latelier.denoisers import DENOISERS
from latelier.diffusion.process import Flow, build_process
from latelier.errors import LatelierError, reading
from latelier.publish import manifest
from latelier.sections import check_config, open_model
from latelier.tokenizers.codec import refuse_damage

if TYPE_CHECKING:
    from latelier.pipeline import LatentDiffusionPipeline

SNAPSHOTS = "snapshots"  # `snapshots/<images>` names a snapshot of the pipeline's own run


class Guide(NamedTuple):
    """The weaker model."""

    denoiser: Any
    conditioner: Any


def open_guide(name: str, pipeline: LatentDiffusionPipeline, check_latents: bool = True) -> Guide:
    """The weaker model of a folder, on the pipeline's device.

    Args:
        name: a run, a saved pipeline, a folder of a denoiser (with its conditioner in `conditioner`, or else with the
            pipeline's), or `snapshots/<images>` of the run that the pipeline belongs to.
        pipeline: what it guides.
        check_latents: whether the pipeline's tokenizer is the one of training already.

    Raises:
        LatelierError: if there is none, or it was trained on other latents, process or conditions.
    """
    own = Path(pipeline.name_or_path or "").parent / "denoiser" / name
    folder = own if name.startswith(f"{SNAPSHOTS}/") and own.is_dir() else Path(name)
    is_snapshot = folder.parent.name == SNAPSHOTS and (folder / "config.json").is_file()
    places = [folder.parents[2] / "pipeline"] if is_snapshot else [folder / "pipeline", folder]
    whole = next((place for place in places if (place / "model_index.json").is_file()), None)
    with reading(f"sample.guide = {name} cannot be opened", "give the folder of a run, a pipeline or a denoiser"):
        if whole is None and not (folder / "config.json").is_file():
            raise LatelierError("there is no trained model in it")
        inside = folder if whole is None or is_snapshot else whole / "denoiser"
        places = [inside, *([whole] if whole else [])]
        for place in places:
            refuse_damage(place)
        denoiser = _open(inside, DENOISERS)
        kept = (place / "conditioner" for place in places)
        found = next((place for place in kept if (place / "config.json").is_file()), None)
        borrowed = found is None and whole is None
        conditioner: Any = pipeline.conditioner
        if not borrowed:
            conditioner = found and _open(found, CONDITIONERS, whole=False)
    if wrong := _differs(pipeline, denoiser, conditioner, borrowed) or (
        whole and _trained_otherwise(pipeline, whole, check_latents)
    ):
        raise LatelierError(f"sample.guide = {name} {wrong}; choose a weaker model of the same latents and conditions.")
    if conditioner is not None:
        conditioner = conditioner.to(pipeline.device).eval()
    return Guide(denoiser.to(pipeline.device).eval(), conditioner)


def _open(folder: Path, table: Mapping[str, str], whole: bool = True) -> Any:
    """A model of a class that a module of a table has; `whole` where all of its weights are stored."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    check_config(config)
    modules = [sys.modules[module.split(":")[0]] for module in table.values()]
    cls = next((found for module in modules if (found := getattr(module, str(config["_class_name"]), None))), None)
    if not (isinstance(cls, type) and issubclass(cls, ModelMixin)):
        raise LatelierError(f"its {config['_class_name']} is not known")
    opened: Any = cls
    return open_model(opened, folder) if whole else opened.from_pretrained(folder)


def _differs(pipeline: LatentDiffusionPipeline, denoiser: Any, conditioner: Any, borrowed: bool) -> str | None:
    """What keeps a denoiser from guiding, as far as configurations tell, in words that follow its name."""
    for key in ("in_channels", "spatial_channels", "context_dim", *(("dim",) if borrowed else ())):
        have, wanted = (model.config.get(key) for model in (denoiser, pipeline.denoiser))
        if have != wanted and None not in (have, wanted):
            return f"has {key} = {have}, but this model has {wanted}"
    ours, theirs = (len(model.config.get("grid") or (0, 0)) for model in (pipeline.denoiser, denoiser))
    if ours != theirs:
        return f"is for latents of {theirs} axes, but those of this model have {ours}"
    told, known = (" and ".join(components(c)) or "nothing" for c in (pipeline.conditioner, conditioner))
    return None if told == known else f"is conditioned on {known}, but this model on {told}"


def _trained_otherwise(pipeline: LatentDiffusionPipeline, whole: Path, check_latents: bool) -> str | None:
    """How the training of a saved pipeline differs from that of this one; times may be distributed otherwise."""
    process = build_process(**json.loads((whole / "model_index.json").read_text(encoding="utf-8"))["process"])
    if not (isinstance(process, Flow) and isinstance(pipeline.process, Flow)) and process != pipeline.process:
        return "was trained with another diffusion process"
    if not check_latents:
        return None
    tokenizer = (manifest(whole) or {}).get("tokenizer") or type(pipeline).from_pretrained(whole).codec.hash()
    return None if tokenizer == pipeline.codec.hash() else "was trained on the latents of another tokenizer"
