"""Checkpoints: published whole, checked when they are opened; the last N are kept, a damaged one is passed over."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latelier import publish
from latelier.errors import LatelierError, failed_to_write, first_line
from latelier.terminal import console


def save(
    folder: Path,
    stage: str,
    images: int,
    accelerator: Accelerator,
    ema: EMAModel | None,
    objective: nn.Module,
    keep: int,
) -> None:
    """Publish `checkpoints/<stage>-<images>` with weights, optimiser, EMA and RNG states of all processes.

    Raises:
        LatelierError: if a weight is not finite, or the disk is full or not writable; the last good checkpoint stays.
    """
    root = folder / "checkpoints"
    final = root / f"{stage}-{images:012d}"
    refuse_non_finite(objective, f"The {stage} at {images:,} images", folder, stage)
    try:
        temporary = publish.begin(final) if accelerator.is_main_process else final.with_name(f".{final.name}.tmp")
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if ema is not None:
                names = _trained_names(accelerator.unwrap_model(objective))
                averages = {name: shadow.contiguous() for name, shadow in zip(names, ema.shadow_params)}
                save_file(averages, temporary / "ema.safetensors")
            publish.finish(temporary, final, stage=stage, images=images, ema_step=ema.optimization_step if ema else 0)
            for old in checkpoints(folder, stage)[:-keep]:
                shutil.rmtree(old)
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not failed_to_write(error):
            raise
        shutil.rmtree(final.with_name(f".{final.name}.tmp"), ignore_errors=True)
        last = checkpoints(folder, stage)
        kept = f"the last good checkpoint, {last[-1]}, stays" if last else "there was no earlier checkpoint"
        raise LatelierError(
            f"The checkpoint at {images:,} images could not be written to {root} ({first_line(error)}); {kept}. "
            "Free some space and run the same command again."
        ) from None
    accelerator.wait_for_everyone()


def resume(folder: Path, stage: str, accelerator: Accelerator, ema: EMAModel | None, objective: nn.Module) -> int:
    """Load the newest undamaged checkpoint of a stage into everything prepared.

    Returns:
        Its images seen; 0 where there is no checkpoint.

    Raises:
        LatelierError: if all checkpoints are damaged, or the newest is of another architecture.
    """
    path = _newest_whole(folder, stage, accelerator)
    if path is None:
        return 0
    facts = publish.manifest(path)
    assert facts is not None
    try:
        accelerator.load_state(str(path))
        if ema is not None:
            shadow = load_file(path / "ema.safetensors")
            names = _trained_names(accelerator.unwrap_model(objective))
            for parameter, name in zip(ema.shadow_params, names):
                parameter.copy_(shadow[name])
            ema.optimization_step = facts["ema_step"]
    except (OSError, RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise LatelierError(
            f"The checkpoint {path} does not fit this recipe ({first_line(error)}); "
            "give the recipe another name, or delete the folder to begin anew."
        ) from None
    return facts["images"]


def _newest_whole(folder: Path, stage: str, accelerator: Accelerator) -> Path | None:
    """The newest checkpoint whose files are as they were written; damaged ones are named and passed over."""
    found = checkpoints(folder, stage)
    for path in reversed(found):
        wrong = publish.damage(path)
        if wrong is None:
            return path
        if accelerator.is_main_process:
            console.print(f"The checkpoint {path} is damaged (it {wrong}); going on from the one before.")
    if found:
        raise LatelierError(
            f"All checkpoints of the {stage} in {folder / 'checkpoints'} are damaged; delete that folder to begin anew."
        )
    return None


def checkpoints(folder: Path, stage: str) -> list[Path]:
    """Finished checkpoints of a stage, oldest first."""
    root = folder / "checkpoints"
    return sorted(p for p in root.glob(f"{stage}-*") if publish.manifest(p))


def images_trained(folder: Path, stage: str) -> int:
    """Images seen at the newest checkpoint of a stage, 0 without one."""
    found = checkpoints(folder, stage)
    return (publish.manifest(found[-1]) or {})["images"] if found else 0


def is_exported(folder: Path, images: int, psnr: float | None = None) -> bool:
    """Whether a folder holds a finished export made after at least `images` images, or one that ended sooner because
    it reached at least `psnr` dB.
    """
    facts = publish.manifest(folder) or {}
    return facts.get("images", -1) >= images or (psnr is not None and (facts.get("psnr") or 0.0) >= psnr)


def whole_export(run: Path, stage: str, folder: Path, images: int, psnr: float | None = None) -> bool:
    """Whether a stage's export is there, see `is_exported`, and as it was written; a damaged one is made again from the
    last checkpoint.

    Raises:
        LatelierError: if it is damaged and there is no such checkpoint.
    """
    if not is_exported(folder, images, psnr):
        return False
    wrong = publish.damage(folder)
    if wrong is None:
        return True
    if images_trained(run, stage) < min(images, (publish.manifest(folder) or {})["images"]):
        raise LatelierError(f"{folder} is damaged (it {wrong}); put back a copy, or delete it to train it again.")
    console.print(f"{folder} is damaged (it {wrong}); it is written again from the last checkpoint.")
    return False


def refuse_non_finite(model: nn.Module, what: str, folder: Path, stage: str) -> None:
    """Weights that are not finite are never saved: training from them, and sampling with them, would be lost.

    Raises:
        LatelierError: naming the first such weight.
    """
    weights = [(name, p) for name, p in model.named_parameters() if p.is_floating_point()]
    if not weights:
        return
    norms = torch.stack(torch._foreach_norm([p.detach() for _, p in weights]))  # (k,), one look for all
    if not bool(torch.isfinite(norms).all()):
        name = next(name for (name, _), norm in zip(weights, norms) if not torch.isfinite(norm))
        last = checkpoints(folder, stage)
        raise LatelierError(
            f"{what} has weights that are not finite ({name}), so it is not saved; lower lr of the {stage} and run "
            f"again{f' with --accept-changes, to go on from {last[-1]}' if last else ', from the beginning'}."
        )


def save_diagnostic(folder: Path, stage: str, images: int, batch: dict[str, Any], process: int) -> Path:
    """The tensors of the batch at which training stopped."""
    path = folder / "diagnostics" / f"{stage}-{images:012d}-{process}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in batch.items() if isinstance(v, Tensor)}, path)
    return path


def _trained_names(objective: nn.Module) -> list[str]:
    return [name for name, parameter in objective.named_parameters() if parameter.requires_grad]


def export_ema(objective: nn.Module, ema: EMAModel | None) -> None:
    """Put the averaged weights into the model, for good."""
    if ema is not None:
        ema.copy_to(trained(objective))


@contextmanager
def averaged(objective: nn.Module, ema: EMAModel | None, model: nn.Module | None = None) -> Iterator[None]:
    """Evaluation with the averaged weights in place of the last ones, if there are any; training goes on unchanged.

    `model` is the part of the objective that is evaluated, by default all of it.
    """
    parameters, model = trained(objective), model or objective
    if ema is not None:
        ema.store(parameters)
        ema.copy_to(parameters)
    model.eval()
    try:
        yield
    finally:
        model.train()
        if ema is not None:
            ema.restore(parameters)


def make_ema(objective: nn.Module, decay: float) -> EMAModel | None:
    """An exponential moving average of the trained parameters, or None when the recipe has none."""
    if not decay:
        return None
    return EMAModel(trained(objective), decay=decay, foreach=True)


def trained(objective: nn.Module) -> list[torch.nn.Parameter]:
    """Parameters that the optimiser and the EMA see."""
    return [p for p in objective.parameters() if p.requires_grad]
