"""Reading old checkpoints, which are pickles, without running anything that they bring.

Files of PyTorch Lightning hold objects of its classes beside the weights, so that `weights_only=True` refuses them.
Here tensors are rebuilt, and whatever else a pickle names becomes an inert object that does nothing.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

STORAGES = frozenset(
    f"{kind}Storage"
    for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool", "Untyped")
)
ALLOWED = frozenset(
    (
        ("collections", "OrderedDict"),
        ("torch._utils", "_rebuild_tensor"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch.storage", "UntypedStorage"),
        ("torch", "Size"),
        ("torch", "device"),
        *(("torch", name) for name in STORAGES),
    )
)


class Inert:
    """Stands for an object of a class that is not admitted: takes any arguments and any state, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        """Lists' items are dropped."""

    def extend(self, items: Any) -> None:
        """Lists' items are dropped."""


class _TensorsOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(module, name) if (module, name) in ALLOWED else Inert


def read_tensors(path: Path) -> Any:
    """What a checkpoint holds, tensors on the CPU, everything that is neither tensor nor plain container inert.

    Raises:
        pickle.UnpicklingError, RuntimeError, EOFError: if it is no checkpoint.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise pickle.UnpicklingError("it is a TorchScript program")
    reader = SimpleNamespace(Unpickler=_TensorsOnly, load=lambda file, **_: _TensorsOnly(file).load(), __name__="")
    return torch.load(path, map_location="cpu", pickle_module=reader, weights_only=False)
