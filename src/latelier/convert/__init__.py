"""Official checkpoints to our models: one key map per source.

What can be read off the shapes is; the rest (number of heads, image size, ...) comes from `config`, whose other entries
are ignored.
"""

from __future__ import annotations

import importlib
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from latelier.conditioning.condition import ClassConditioner
from latelier.errors import LatelierError, first_line, reading

if TYPE_CHECKING:
    from diffusers import ModelMixin

    from latelier.pipeline import LatentDiffusionPipeline
    from latelier.tokenizers.codec import Codec

KINDS = {
    "vmae": "latelier.convert.vmae:convert",
    "maetok": "latelier.convert.maetok:convert",
    "rae": "latelier.convert.rae:convert",
    "sit": "latelier.convert.dit:convert_sit",
    "lightning-dit": "latelier.convert.dit:convert_lightning_dit",
    "maetok-sit": "latelier.convert.dit:convert_maetok_sit",
    "dit-dh": "latelier.convert.dit:convert_dit_dh",
    "dcae": "latelier.convert.dcae:convert",
    "dcae-sit": "latelier.convert.dit:convert_dcae_sit",
    "usit": "latelier.convert.dit:convert_usit",
    "uvit": "latelier.convert.dit:convert_uvit",
    "ldm": "latelier.convert.ldm:convert",
    "ldm-kl": "latelier.convert.ldm_autoencoder:convert_kl",
    "ldm-vq": "latelier.convert.ldm_autoencoder:convert_vq",
    "patchgan": "latelier.convert.ldm_autoencoder:convert_patchgan",
    "ldm-unet": "latelier.convert.ldm_unet:convert",
    "ldm-text": "latelier.convert.ldm:convert_text",
}
PREFIXES = ("module.", "_orig_mod.", "model.diffusion_model.", "diffusion_model.", "first_stage_model.")
WRAPPERS = ("ema", "model_ema", "state_dict", "model")  # what checkpoints of these projects wrap their weights in
STORAGES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool", "Untyped")
ALLOWED = {  # what a pickle may name; all else becomes `Inert`
    "collections.OrderedDict", "torch.storage.UntypedStorage", "torch.Size", "torch.device",
    *(f"torch._utils._rebuild_{kind}" for kind in ("tensor", "tensor_v2", "parameter")),
    *(f"torch.{kind}Storage" for kind in STORAGES),
}  # fmt: skip


@dataclass
class Converted:
    """What a checkpoint became."""

    model: ModelMixin  # in eval mode
    conditioner: ModelMixin | None = None  # of a denoiser that has one
    pipeline: LatentDiffusionPipeline | None = None  # the whole, if the checkpoint has tokenizer and denoiser
    codec: Codec | None = None  # a tokenizer with its latent statistics, where they are known


def from_official(kind: str, state_dict: Mapping[str, Tensor] | Path, **config: Any) -> Converted:
    """Convert a checkpoint of an official implementation.

    Args:
        kind: one of `KINDS`.
        state_dict: original names to tensors, or a file of them; usual wrappers' prefixes are removed.
        config: what the shapes do not tell.
    """
    if kind not in KINDS:
        raise LatelierError(f"Unknown checkpoint kind {kind!r}; allowed: {', '.join(KINDS)}.")
    if isinstance(state_dict, Path):
        state_dict = read_checkpoint(state_dict)
    module, function = KINDS[kind].split(":")
    bare = "" if kind == "ldm" else rf"^({'|'.join(map(re.escape, PREFIXES))})*"  # ldm needs prefixes: it is the whole
    weights = {re.sub(bare, "", name): tensor.detach().float() for name, tensor in state_dict.items()}
    try:
        return getattr(importlib.import_module(module), function)(weights, config)
    except LatelierError:
        raise
    except Exception as error:  # shapes of another architecture can break anything
        raise LatelierError(
            f"This is not a {kind} checkpoint, or its configuration is another ({first_line(error)})."
        ) from None


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The weights in a checkpoint file, EMA weights where there are any.

    PyTorch Lightning's files hold objects of its classes too, so that `weights_only=True` refuses them. Here tensors
    and plain containers are rebuilt, and no code that a file could bring is run.
    """
    path = Path(path)
    if not path.is_file():
        raise LatelierError(f"There is no checkpoint at {path}.")
    advice = "save its state_dict with safetensors.torch.save_file in the environment it came from"
    with reading(f"{path} is not a checkpoint that can be read", advice):
        tree = load_file(path) if path.suffix == ".safetensors" else _read_pickle(path)
    while isinstance(tree, dict) and (inner := next((k for k in WRAPPERS if isinstance(tree.get(k), dict)), None)):
        tree = tree[inner]
    weights = {k: v for k, v in tree.items() if isinstance(v, Tensor)} if isinstance(tree, dict) else {}
    if not weights:
        raise LatelierError(f"{path} holds no tensors by name.")
    for name, tensor in weights.items():  # one number can claim to be any shape
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise LatelierError(f"{path} is not a checkpoint that can be read: {name} has more numbers than its file.")
    return weights


def load_exactly(model: nn.Module, weights: Mapping[str, Tensor], optional: tuple[str, ...] = ()) -> None:
    """Load weights by our names, all but counters and `optional` ones."""
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # shapes that do not fit
        reason = str(error).splitlines()[-1].strip()
        raise LatelierError(f"The checkpoint does not fit {type(model).__name__}: {reason}") from None
    missing = [name for name in missing if name not in optional and not name.endswith(".num_batches_tracked")]
    kinds = {"missing": missing, "unknown": unexpected}
    if what := [f"{len(names)} {kind} ({names[0]})" for kind, names in kinds.items() if names]:
        raise LatelierError(f"The checkpoint does not fit {type(model).__name__}: {' and '.join(what)}.")
    model.eval()


def class_conditioner(table: Tensor | None, classes: int, **options: Any) -> ClassConditioner | None:
    """The conditioner of an embedding table; its last row is the null class if there are more rows than classes."""
    if table is None:
        return None
    rows, dim = table.shape
    conditioner = ClassConditioner(classes, dim, null=rows > classes, **options)
    load_exactly(conditioner, {"embedding_table.weight": table})
    return conditioner


def rename(name: str, prefixes: Mapping[str, str]) -> str:
    """The name with the first old prefix that fits replaced by the new one."""
    return next((new + name[len(old) :] for old, new in prefixes.items() if name.startswith(old)), name)


def below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, without it."""
    return {name[len(prefix) :]: tensor for name, tensor in weights.items() if name.startswith(prefix)}


def count_blocks(weights: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered blocks are under a prefix."""
    numbers = {int(name.split(".")[0]) for name in below(weights, prefix)}
    if numbers and max(numbers) > len(weights):
        raise LatelierError(f"The checkpoint has a block {prefix}{max(numbers)}, but only {len(weights)} tensors.")
    return 1 + max(numbers, default=-1)


def need(weights: Mapping[str, Tensor], name: str, kind: str) -> Tensor:
    """A tensor without which this is not a checkpoint of that kind."""
    if name not in weights:
        raise LatelierError(f"This is not a {kind} checkpoint: it has no {name!r}.")
    return weights[name]


class Inert:
    """Stands for an object of a class that is not allowed: takes any arguments and any state, and does nothing."""

    __init__ = append = extend = __setstate__ = __setitem__ = lambda *_, **__: None  # type: ignore[assignment, misc]

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        return self


class _TensorsOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(module, name) if f"{module}.{name}" in ALLOWED and "." not in name else Inert


def _read_pickle(path: Path) -> Any:
    """What a checkpoint holds: tensors on the CPU, plain containers, and `Inert` for everything else."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise pickle.UnpicklingError("it is a TorchScript program")
    reader = SimpleNamespace(Unpickler=_TensorsOnly, load=lambda file, **_: _TensorsOnly(file).load(), __name__="")
    return torch.load(path, map_location="cpu", pickle_module=reader, weights_only=False)
