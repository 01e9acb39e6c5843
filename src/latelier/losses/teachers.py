"""Frozen vision models whose features are learned: DINOv2, SigLIP, CLIP, any ViT of `transformers`, VGG16, our own.

A teacher gives one vector for each patch of *our* grid. For a ViT the image is resized so that its own patches are as
many, and its position table is interpolated; where a model's map of features has another size, it is resampled.

Features are the last hidden state after the final norm, without CLS and registers. MAETok's released code normalises
images of all teachers with ImageNet's statistics; here each gets those that its checkpoint was trained with.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn

from latelier.errors import LatelierError
from latelier.layers import fast_bf16
from latelier.losses.perceptual import LPIPS, SCALE, SHIFT
from latelier.weights import ENVIRONMENT, quiet

# Classes that hold only the vision half of a model; other kinds are opened by AutoModel.
VISION_HALF = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}
NORM_LEFT_OUT = ("clip_vision_model",)  # transformers applies the final norm to the pooled CLS only
UNUSED = ("pooler", "head.")  # weights that no patch feature needs

# Mean and standard deviation for images in [0, 1], of checkpoints without a preprocessor's file.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
STATISTICS = {
    "clip_vision_model": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip_vision_model": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
VGG_CHANNELS, VGG_LEAST = 512, 16  # of relu4_3; pixels below which VGG16's pooling leaves nothing
UNREADABLE = (OSError, ValueError, ImportError, KeyError, RuntimeError, TypeError, AttributeError, SafetensorError)


@runtime_checkable
class Features(Protocol):
    """What `open_teacher` returns; no module, so that an objective neither trains nor saves it.

    Attributes:
        name, dim: what a recipe calls it, width of its features.
    """

    name: str
    dim: int

    def __call__(self, images: Float[Tensor, "b c h w"], grid: tuple[int, int]) -> Float[Tensor, "b n d"]:
        """Features of images in [-1, 1]: float32, without gradients, one for each cell of a grid in raster order."""
        ...


def open_teacher(name: str, device: torch.device | str = "cpu", normalise: Literal["own", "none"] = "own") -> Features:
    """A frozen model that gives features on any grid; a call moves it to where its images are.

    Args:
        name: `vgg16`, the network of LPIPS (512 channels of relu4_3 at 1/8 of the image's side); the folder of a run
            or of a tokenizer trained here (its normalised latents); or a ViT of `transformers`, see `Teacher`.
        device: where it begins.
        normalise: `own`: images get the mean and standard deviation that the model was trained with; `none`: it sees
            them in [-1, 1], as in VA-VAE's released code.

    Raises:
        LatelierError: if there is no such model, or its latents lie on no grid.
    """
    if name == "vgg16":
        return MapTeacher(name, *_vgg16(device, normalise))
    folder = Path(name).expanduser()
    for place in (folder, folder / "tokenizer"):
        if (place / "config.json").is_file() and "_class_name" in (place / "config.json").read_text(errors="replace"):
            return MapTeacher(name, *_latents(name, place, device))
    try:
        return Teacher(name, device, normalise)
    except LatelierError as error:
        advice = "or choose vgg16, or the folder of a tokenizer trained here"
        raise LatelierError(f"{str(error).rstrip('.')}; {advice}.") from None


class MapTeacher:
    """A function from images to a map of features, resampled to the grid that is asked for."""

    def __init__(self, name: str, dim: int, features: Callable[[Tensor], Tensor]):
        self.name, self.dim, self.features = name, dim, features

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "b c h w"], grid: tuple[int, int]) -> Float[Tensor, "b n d"]:
        """See `Features`."""
        kind = images.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=fast_bf16(kind)):
            return _to_grid(self.features(images.float()), grid)


def _vgg16(device: torch.device | str, normalise: str) -> tuple[int, Callable[[Tensor], Tensor]]:
    """Channels and map of VGG16's relu4_3; an error for images that it cannot see."""
    model = LPIPS("vgg").to(device)
    shift, scale = (torch.tensor(numbers).view(3, 1, 1) for numbers in (SHIFT, SCALE))

    def features(images: Tensor) -> Tensor:
        channels, height, width = images.shape[1:]
        if channels not in (1, 3) or min(height, width) < VGG_LEAST:
            raise LatelierError(
                f"The teacher vgg16 looks at images of 1 or 3 channels and {VGG_LEAST} pixels a side or more, not at "
                f"{channels} x {height} x {width}; use larger images, or another teacher."
            )
        if normalise == "none":  # takes back what the network does first
            images = images * scale.to(images) + shift.to(images)
        return model.to(images.device).features(images)[3]  # (b, 512, h / 8, w / 8)

    return VGG_CHANNELS, features


def _latents(name: str, folder: Path, device: torch.device | str) -> tuple[int, Callable[[Tensor], Tensor]]:
    """Channels and map of a tokenizer's normalised latents; an error if they lie on no grid."""
    from latelier.tokenizers.codec import Codec  # which imports much

    codec = Codec.from_pretrained(folder).to(device)
    codec.tokenizer.requires_grad_(False).eval()
    if codec.info.latent_tokens is not None:
        raise LatelierError(
            f"The teacher {name} has 1-D latents, which belong to no place in the image; use a tokenizer with a grid."
        )
    return codec.channels, lambda images: codec.to(images.device).encode(images)


def _to_grid(planes: Float[Tensor, "b d i j"], grid: tuple[int, int]) -> Float[Tensor, "b n d"]:
    """A map of features as tokens in raster order, resampled if the grid is another."""
    if tuple(planes.shape[2:]) != tuple(grid):
        planes = F.interpolate(planes.float(), grid, mode="bilinear", antialias=True)
    return planes.float().flatten(2).transpose(1, 2)  # (b, n, d)


class Teacher:
    """A frozen vision transformer.

    Args:
        name: a Hub name, a folder of `save_pretrained`, or the name of a folder in `$LATELIER_WEIGHTS`.
        device: where it runs; in bf16 where the hardware is fast at that, else in float32.
        normalise: see `open_teacher`.

    Attributes:
        dim, patch: width of the features, side of its own patches in pixels.
        mean, std: `(3, 1, 1)` for images in [0, 1].
    """

    def __init__(self, name: str, device: torch.device | str = "cpu", normalise: Literal["own", "none"] = "own"):
        self.name, self.model = name, load_vision(name)
        config = self.model.config
        self.dim, self.patch, self._native = _sizes(name, config)
        statistics = read_statistics(name, config) if normalise == "own" else ([0.5] * 3, [0.5] * 3)
        self.mean, self.std = (torch.tensor(numbers).view(3, 1, 1) for numbers in statistics)
        resizes = "interpolate_pos_encoding" in inspect.signature(self.model.forward).parameters
        self._options = {"interpolate_pos_encoding": True} if resizes else {}
        self._flexible = resizes or any(
            hasattr(m, "interpolate_pos_encoding") or "Rope" in type(m).__name__ for m in self.model.modules()
        )
        self.to(device)

    def to(self, device: torch.device | str) -> Teacher:
        """Move to another device; a call moves to where its images are."""
        self.device = torch.device(device)
        self.model.to(self.device)
        self.mean, self.std = self.mean.to(self.device), self.std.to(self.device)
        return self

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "b c h w"], grid: tuple[int, int]) -> Float[Tensor, "b n d"]:
        """Features of images in [-1, 1], of 1 or 3 channels: float32, one for each cell of a grid in raster order."""
        if images.shape[1] not in (1, 3):
            raise LatelierError(
                f"The teacher {self.name} looks at 1 or 3 channels, not {images.shape[1]}; use kind hog, which takes "
                "any number."
            )
        if images.device != self.device:
            self.to(images.device)
        rows, columns = grid if self._flexible else self._native
        pixels = self.preprocess(images, (rows * self.patch, columns * self.patch))  # (b, 3, h, w)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=fast_bf16(self.device.type)):
            tokens = self._tokens(pixels)  # (b, m, d)
        tokens = self._patches(tokens, rows * columns).float()  # (b, rows columns, d)
        if (rows, columns) == tuple(grid):
            return tokens
        return _to_grid(tokens.transpose(1, 2).unflatten(2, (rows, columns)), grid)

    def preprocess(self, images: Float[Tensor, "b c h w"], size: tuple[int, int]) -> Float[Tensor, "b 3 i j"]:
        """Images in [-1, 1] at a size in pixels, with the teacher's mean and standard deviation."""
        pixels = images.float().expand(-1, 3, -1, -1)  # (b, 3, h, w)
        if tuple(pixels.shape[2:]) != tuple(size):
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(-1, 1)
        return ((pixels + 1) / 2 - self.mean) / self.std

    def _tokens(self, pixels: Float[Tensor, "b 3 i j"]) -> Tensor:
        """The last hidden state after the final norm, CLS and registers included."""
        tokens = self.model(pixel_values=pixels, **self._options).last_hidden_state
        if self.model.config.model_type in NORM_LEFT_OUT:
            inner = getattr(self.model, "vision_model", self.model)  # where transformers 4 keeps it
            tokens = inner.post_layernorm(tokens)
        return tokens

    def _patches(self, tokens: Tensor, count: int) -> Float[Tensor, "b n d"]:
        """The tokens of the patches, the last ones; before them come CLS, a distillation token, or registers."""
        most = 2 + (getattr(self.model.config, "num_register_tokens", None) or 0)
        if tokens.ndim != 3 or not count <= tokens.shape[1] <= count + most:
            raise LatelierError(
                f"The teacher {self.name} ({type(self.model).__name__}) gives {tuple(tokens.shape)} for {count} "
                "patches; use a vision transformer with one token for each patch, such as DINOv2, SigLIP or CLIP."
            )
        return tokens[:, -count:]


def load_vision(name: str) -> nn.Module:
    """A vision model of `transformers`, frozen and in float32; of CLIP and SigLIP only the vision half."""
    library = _transformers()
    place = find_pretrained(name)
    try:
        kind = library.AutoConfig.from_pretrained(place, trust_remote_code=False).model_type
        cls = getattr(library, VISION_HALF.get(kind, "AutoModel"))
        with quiet(library):  # of the text half's weights, which are left aside
            options = {"use_safetensors": True, "trust_remote_code": False}  # neither pickles nor a checkpoint's code
            model, report = cls.from_pretrained(place, output_loading_info=True, **options)
    except UNREADABLE as error:
        raise LatelierError(_not_loaded(name, error)) from None
    lacking = sorted(key for key in report["missing_keys"] if not any(part in key for part in UNUSED))
    if lacking:
        raise LatelierError(f"{name} lacks weights of {type(model).__name__}: {', '.join(lacking[:3])}.")
    return model.float().requires_grad_(False).eval()


def find_pretrained(name: str) -> str:
    """Where a model is: a folder of that name, or of its last part in `$LATELIER_WEIGHTS`, or else the Hub."""
    if Path(name).expanduser().is_dir():
        return str(Path(name).expanduser())
    chosen = os.environ.get(ENVIRONMENT)
    folder = Path(chosen).expanduser() / Path(name).name if chosen else None
    return str(folder) if folder is not None and folder.is_dir() else name


def read_statistics(name: str, config: Any) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of a checkpoint's preprocessor (default: its kind's), for images in [0, 1]."""
    mixin = importlib.import_module("transformers.image_processing_base").ImageProcessingMixin
    try:
        content, _ = mixin.get_image_processor_dict(find_pretrained(name))
    except UNREADABLE:
        content = {}
    if content.get("do_normalize") is False:
        return [0.0] * 3, [1.0] * 3
    mean, std = STATISTICS.get(config.model_type, IMAGENET)
    return list(content.get("image_mean") or mean), list(content.get("image_std") or std)


def _sizes(name: str, config: Any) -> tuple[int, int, tuple[int, int]]:
    """Width, patch, and the grid that a model was trained with."""
    dim, *sides = (getattr(config, key, None) for key in ("hidden_size", "patch_size", "image_size"))
    pairs = [(side, side) if isinstance(side, int) else tuple(side or ()) for side in sides]
    pyramid = hasattr(config, "depths")  # stages of coarser and coarser maps, as Swin's
    if not isinstance(dim, int) or pyramid or any(len(pair) != 2 for pair in pairs) or len(set(pairs[0])) > 1:
        raise LatelierError(
            f"{name} is a {config.model_type}, which has no square patches; name a vision transformer, such as DINOv2, "
            "SigLIP or CLIP."
        )
    patch = pairs[0][0]
    return dim, patch, (pairs[1][0] // patch, pairs[1][1] // patch)


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError:
        raise LatelierError("Teachers need the package transformers: pip install 'latelier[text]'.") from None


def _not_loaded(name: str, error: Exception) -> str:
    first = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return (
        f"The teacher {name!r} cannot be loaded ({first}); give a name on the Hugging Face Hub when online, a folder "
        f"that save_pretrained wrote with safetensors, or put that folder as {Path(name).name!r} into a folder and set "
        f"{ENVIRONMENT} to it."
    )
