"""Atomic checkpoints: written beside, then renamed; the last N are kept; the newest is always whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latelier.errors import LatelierError

STATE = "state.json"


def save(
    folder: Path,
    stage: str,
    images: int,
    accelerator: Accelerator,
    ema: EMAModel | None,
    objective: nn.Module,
    keep: int,
) -> None:
    """Write `checkpoints/<stage>-<images>` with weights, optimiser, EMA and RNG states of all processes.

    Raises:
        LatelierError: if the disk is full or not writable; the last good checkpoint stays.
    """
    root = folder / "checkpoints"
    final = root / f"{stage}-{images:012d}"
    temporary = root / f".{final.name}.tmp"
    try:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if ema is not None:
                names = _trained_names(accelerator.unwrap_model(objective))
                averages = {name: shadow.contiguous() for name, shadow in zip(names, ema.shadow_params)}
                save_file(averages, temporary / "ema.safetensors")
            state = {"stage": stage, "images": images, "ema_step": ema.optimization_step if ema else 0}
            (temporary / STATE).write_text(json.dumps(state))
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            for old in checkpoints(folder, stage)[:-keep]:
                shutil.rmtree(old)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_write_error(error):
            raise
        shutil.rmtree(temporary, ignore_errors=True)
        last = checkpoints(folder, stage)
        kept = f"the last good checkpoint, {last[-1]}, stays" if last else "there was no earlier checkpoint"
        raise LatelierError(
            f"The checkpoint at {images:,} images could not be written to {root} ({_reason(error)}); {kept}. "
            "Free some space and run the same command again."
        ) from None
    accelerator.wait_for_everyone()


def resume(folder: Path, stage: str, accelerator: Accelerator, ema: EMAModel | None, objective: nn.Module) -> int:
    """Load the newest checkpoint of a stage into everything prepared; returns its images seen, 0 without one."""
    found = checkpoints(folder, stage)
    if not found:
        return 0
    try:
        accelerator.load_state(str(found[-1]))
        state = json.loads((found[-1] / STATE).read_text())
        if ema is not None:
            shadow = load_file(found[-1] / "ema.safetensors")
            names = _trained_names(accelerator.unwrap_model(objective))
            for parameter, name in zip(ema.shadow_params, names):
                parameter.copy_(shadow[name])
            ema.optimization_step = state["ema_step"]
    except (RuntimeError, KeyError, ValueError) as error:
        raise LatelierError(
            f"The checkpoint {found[-1]} does not fit this recipe ({str(error).splitlines()[0]}); "
            "give the recipe another name, or delete the folder to begin anew."
        ) from None
    return state["images"]


def checkpoints(folder: Path, stage: str) -> list[Path]:
    """Whole checkpoints of a stage, oldest first."""
    root = folder / "checkpoints"
    return sorted(p for p in root.glob(f"{stage}-*") if (p / STATE).is_file())


def images_trained(folder: Path, stage: str) -> int:
    """Images seen at the newest checkpoint of a stage, 0 without one."""
    found = checkpoints(folder, stage)
    return json.loads((found[-1] / STATE).read_text())["images"] if found else 0


def save_diagnostic(folder: Path, stage: str, images: int, batch: dict[str, Any], process: int) -> Path:
    """The tensors of the batch at which training stopped."""
    path = folder / "diagnostics" / f"{stage}-{images:012d}-{process}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in batch.items() if isinstance(v, Tensor)}, path)
    return path


def _trained_names(objective: nn.Module) -> list[str]:
    return [name for name, parameter in objective.named_parameters() if parameter.requires_grad]


def _is_write_error(error: RuntimeError) -> bool:
    return any(word in str(error).lower() for word in ("write", "no space", "disk", "i/o", "unexpected pos"))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).splitlines()[0]


def export_ema(objective: nn.Module, ema: EMAModel | None) -> None:
    """Put the averaged weights into the model, for good."""
    if ema is not None:
        ema.copy_to(trained(objective))


def make_ema(objective: nn.Module, decay: float) -> EMAModel | None:
    """An exponential moving average of the trained parameters, or None when the recipe has none."""
    if not decay:
        return None
    return EMAModel(trained(objective), decay=decay, foreach=True)


def trained(objective: nn.Module) -> list[torch.nn.Parameter]:
    """Parameters that the optimiser and the EMA see."""
    return [p for p in objective.parameters() if p.requires_grad]
