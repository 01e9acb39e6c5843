"""Official checkpoints to our models: one key map per source.

`from_official(kind, state_dict, **config)` takes the original names and tensors; what can be read off the shapes is,
the rest (number of heads, image size, ...) comes from `config`, whose other entries are ignored.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latelier.errors import LatelierError

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from torch import Tensor, nn

    from latelier.pipeline import LatentDiffusionPipeline
    from latelier.tokenizers.codec import Codec

KINDS = {
    "vmae": "latelier.convert.vmae:convert",
    "maetok": "latelier.convert.maetok:convert",
    "sit": "latelier.convert.dit:convert_sit",
    "lightning-dit": "latelier.convert.dit:convert_lightning_dit",
    "maetok-sit": "latelier.convert.dit:convert_maetok_sit",
    "dcae": "latelier.convert.dcae:convert",
    "dcae-sit": "latelier.convert.dit:convert_dcae_sit",
    "usit": "latelier.convert.uvit:convert_usit",
    "uvit": "latelier.convert.uvit:convert_uvit",
    "ldm": "latelier.convert.ldm:convert",
    "ldm-kl": "latelier.convert.ldm_autoencoder:convert_kl",
    "ldm-vq": "latelier.convert.ldm_autoencoder:convert_vq",
    "patchgan": "latelier.convert.ldm_autoencoder:convert_patchgan",
    "ldm-unet": "latelier.convert.ldm_unet:convert",
    "ldm-text": "latelier.convert.ldm_text:convert",
}
WHOLE = ("ldm",)  # kinds whose parts are told apart by prefixes
PREFIXES = ("module.", "_orig_mod.", "model.diffusion_model.", "diffusion_model.", "first_stage_model.")
WRAPPERS = ("ema", "model_ema", "state_dict", "model")  # what checkpoints of these projects wrap their weights in


@dataclass
class Converted:
    """What a checkpoint became.

    Attributes:
        model: in eval mode.
        conditioner: of a denoiser that has one.
        pipeline: the whole, if the checkpoint has tokenizer and denoiser.
        codec: of a tokenizer whose latent statistics are known: the model with them.
    """

    model: ModelMixin
    conditioner: ModelMixin | None = None
    pipeline: LatentDiffusionPipeline | None = None
    codec: Codec | None = None


def from_official(kind: str, state_dict: Mapping[str, Tensor], **config: Any) -> Converted:
    """Convert a checkpoint of an official implementation.

    Args:
        kind: one of `KINDS`.
        state_dict: original names to tensors; usual wrappers' prefixes are removed.
        config: what the shapes do not tell.

    Raises:
        LatelierError: for an unknown kind, or names that do not fit the architecture.
    """
    if kind not in KINDS:
        raise LatelierError(f"Unknown checkpoint kind {kind!r}; allowed: {', '.join(KINDS)}.")
    module, function = KINDS[kind].split(":")
    bare = (lambda name: name) if kind in WHOLE else _bare
    weights = {bare(name): tensor.detach().float() for name, tensor in state_dict.items()}
    return getattr(importlib.import_module(module), function)(weights, config)


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The weights in a checkpoint file, EMA weights where there are any.

    Of pickles nothing is rebuilt but tensors and plain containers, see `latelier.convert.pickles`.

    Raises:
        LatelierError: if there is no such file, or no tensors are in it.
    """
    import pickle

    import torch
    from safetensors.torch import load_file

    from latelier.convert.pickles import read_tensors

    path = Path(path)
    if not path.is_file():
        raise LatelierError(f"There is no checkpoint at {path}.")
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        tree = read_tensors(path)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, IndexError) as error:
        raise LatelierError(
            f"{path} is not a checkpoint that can be read ({error}); "
            "save its state_dict with safetensors.torch.save_file in the environment it came from."
        ) from None
    while isinstance(tree, dict) and (inner := next((k for k in WRAPPERS if isinstance(tree.get(k), dict)), None)):
        tree = tree[inner]
    weights = {k: v for k, v in tree.items() if isinstance(v, torch.Tensor)} if isinstance(tree, dict) else {}
    if not weights:
        raise LatelierError(f"{path} holds no tensors by name.")
    return weights


def load_exactly(model: nn.Module, weights: dict[str, Tensor], optional: tuple[str, ...] = ()) -> None:
    """Load weights by our names; whatever is left over or lacking is an error."""
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if name not in optional]
    if missing or unexpected:
        kinds = (("missing", missing), ("unknown", unexpected))
        what = [f"{len(names)} {kind} ({names[0]})" for kind, names in kinds if names]
        raise LatelierError(f"The checkpoint does not fit {type(model).__name__}: {' and '.join(what)}.")
    model.eval()


def count_blocks(weights: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered blocks there are under a prefix."""
    return 1 + max((int(name[len(prefix) :].split(".")[0]) for name in weights if name.startswith(prefix)), default=-1)


def need(weights: Mapping[str, Tensor], name: str, kind: str) -> Tensor:
    """A tensor without which this is not a checkpoint of that kind."""
    if name not in weights:
        raise LatelierError(f"This is not a {kind} checkpoint: it has no {name!r}.")
    return weights[name]


def _bare(name: str) -> str:
    while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
        name = name[len(prefix) :]
    return name
