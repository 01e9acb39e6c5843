"""From a user's inputs to a `Condition` and the unconditional one for guidance; from images and masks to tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ModelMixin
from jaxtyping import Bool, Float
from PIL import Image, ImageOps
from torch import Tensor

from latelier.conditioning.condition import CompositeConditioner, Condition, components
from latelier.data.records import UNREADABLE
from latelier.data.transforms import to_float
from latelier.errors import LatelierError


@dataclass
class Inputs:
    """What images are conditioned on; image i gets entry `i % len` of each list."""

    wanted: dict[str, list[Any]]  # by the conditioners' input names: `classes`, `prompts`, `layouts`, ...
    records: Mapping[str, Any] = field(default_factory=dict)  # as training's batches have them, instead of `wanted`
    negative_prompts: list[str] | None = None  # what guidance leads away from, instead of the empty caption

    def __len__(self) -> int:
        """Length of the longest list, at least one."""
        return max([1, *map(len, self.wanted.values()), *map(len, self.records.values())])

    def check(self, conditioner: ModelMixin | None, guidance: float, dropped: Sequence[str]) -> Inputs:
        """The inputs of this model, all classes in turn where none is named; an error if it cannot follow them."""
        known = components(conditioner)
        about = f"is conditioned on {' and '.join(known)}" if known else "is unconditional"
        for name, values in self.wanted.items():
            if name not in known:
                first = repr(values[0]) if values else "[]"
                first = first if len(first) < 60 else first[:57] + "..."
                raise LatelierError(f"{name} = {first} is no input of this model, which {about}.")
        if self.negative_prompts and "prompts" not in known:
            raise LatelierError(f"negative_prompts is no input of this model, which {about}.")
        if guidance != 1 and not known:
            raise LatelierError(f"guidance = {guidance}, but this model is unconditional; set guidance to 1.")
        if guidance != 1 and not dropped:
            raise LatelierError(
                f"guidance = {guidance}, but this model was trained without dropping its conditions, so it cannot be "
                "guided; set guidance to 1."
            )
        if self.negative_prompts and guidance == 1:
            raise LatelierError("negative_prompts act through guidance; set it above 1.")
        wanted = dict(self.wanted)
        for name, component in known.items():
            if name == "classes" and name not in wanted and "label" not in self.records:
                wanted[name] = list(range(component.config["num_classes"]))
            elif name not in wanted and not self.records:
                raise LatelierError(f"This model {about}; give {name}, one or more.")
        return Inputs(wanted, self.records, self.negative_prompts)

    def conditions(
        self, conditioner: ModelMixin | None, seeds: list[int], first: int, size: tuple[int, int], codec: Any,
        dropped: Sequence[str] | None,
    ) -> tuple[Condition | None, Condition | None, Mapping[str, Any]]:  # fmt: skip
        """The condition of some images, the unconditional one for guidance, and the record entries.

        Args:
            seeds, first: of the images, and of the first of all; random masks and degradations are drawn from them.
            size: height and width in pixels.
            dropped: which components guidance leaves out; None makes no unconditional condition.
        """
        if conditioner is None:
            return None, None, {}
        numbers = [seed - first for seed in seeds]
        known = components(conditioner)
        batch = {key: cycle_rows(value, numbers) for key, value in self.records.items()}
        for name, values in self.wanted.items():
            batch |= known[name].inputs(cycle_rows(values, numbers), size)
        batch["sample_id"] = torch.tensor(seeds)
        batch = {k: v.to(conditioner.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        batch |= conditioner.prepare(batch, codec)  # type: ignore[operator]
        cond = conditioner(batch)
        if dropped is None:
            return cond, None, batch
        other = batch
        if self.negative_prompts:  # they take the place of the empty caption
            dropped = [name for name in dropped if name != "prompts"]
            other = {**batch, "caption": cycle_rows(self.negative_prompts, numbers)}
            other |= conditioner.prepare(other, codec)  # type: ignore[operator]
        drop = torch.tensor([name in dropped for name in known], device=conditioner.device)  # (k,)
        drop = drop.expand(len(seeds), -1)  # (b, k)
        return cond, conditioner(other, drop if isinstance(conditioner, CompositeConditioner) else drop[:, 0]), batch


def cycle_rows(values: Any, numbers: Sequence[int]) -> Any:
    """The entries of some images; they start again where there are fewer entries than images."""
    rows = [n % len(values) for n in numbers]
    return values[rows] if isinstance(values, Tensor) else [values[row] for row in rows]


def open_image(entry: Any, input_name: str) -> Image.Image:
    """A PIL image, or one from a file, upright; an error that names the input for anything else."""
    if isinstance(entry, str | Path):
        if not Path(entry).is_file():
            raise LatelierError(f"{input_name}: there is no file {str(entry)!r}.")
        try:
            with Image.open(entry) as image:
                image.load()
                return ImageOps.exif_transpose(image)
        except UNREADABLE as error:
            raise LatelierError(f"{input_name}: {str(entry)!r} cannot be read as an image ({error}).") from None
    if not isinstance(entry, Image.Image):
        raise LatelierError(f"{input_name} takes images, files or arrays, not {type(entry).__name__}.")
    return entry


def read_image(entry: Any, channels: int, input_name: str) -> Float[Tensor, "c h w"]:
    """An image of `channels` channels in [-1, 1] from a PIL image or a file, which become grey or RGB as needed, an
    array `(h, w)` or `(h, w, c)`, or a tensor `(c, h, w)`; uint8 means 0..255, floats are in [-1, 1] already.
    """
    if isinstance(entry, Tensor):
        pixels = entry.detach().cpu()
    else:
        array = entry if isinstance(entry, np.ndarray) else _decode(open_image(entry, input_name), channels, input_name)
        pixels = torch.from_numpy(np.atleast_3d(array).copy()).movedim(-1, 0)
    if pixels.ndim != 3 or len(pixels) != channels:
        raise LatelierError(
            f"{input_name}: images must have {channels} channels, tensors as (c, h, w), arrays as (h, w, c); "
            f"this one is {by(pixels.shape)}."
        )
    if pixels.dtype == torch.uint8:
        return to_float(pixels)
    if not pixels.is_floating_point() or not bool((pixels.abs() <= 1).all()):
        found = f"{pixels.dtype} from {pixels.min().item():g} to {pixels.max().item():g}" if pixels.numel() else "none"
        raise LatelierError(f"{input_name}: numbers must be uint8, or floats in [-1, 1]; these are {found}.")
    return pixels.float()


def _decode(image: Image.Image, channels: int, input_name: str) -> np.ndarray:
    """Pixels as uint8, or those of 16 bits as floats in [-1, 1]."""
    if image.mode.startswith("I;16"):
        return (np.asarray(image).astype(np.float64) / 32767.5 - 1).astype(np.float32)
    if image.mode in ("I", "F"):
        raise LatelierError(
            f"{input_name}: images of mode {image.mode} (32 bits) have no fixed range; give 8 or 16 bits."
        )
    if image.has_transparency_data:
        if np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
            raise LatelierError(f"{input_name}: an image has transparent pixels; put it on a background first.")
        image = image.convert("RGB") if channels == 3 else image
    if channels in (1, 3):
        image = image.convert("L" if channels == 1 else "RGB")
    return np.asarray(image)


def read_mask(entry: Any, input_name: str) -> Bool[Tensor, "h w"]:
    """A mask, true in holes, from a PIL image or a file, where bright pixels (from 128 of 255 on) are holes, or the
    transparent ones if some are transparent and some are not; or from an array or tensor `(h, w)` or `(1, h, w)` of
    booleans, of uint8 in 0..255 or 0..1, or of floats in [0, 1].
    """
    if isinstance(entry, np.ndarray | Tensor):
        values = torch.from_numpy(entry.copy()) if isinstance(entry, np.ndarray) else entry.detach().cpu()
    else:
        image = open_image(entry, input_name)
        erased = np.asarray(image.convert("RGBA"))[..., 3] < 128  # (h, w) as editors mark what is to be filled
        values = torch.from_numpy(erased if erased.any() and not erased.all() else np.array(image.convert("L")))
    values = values[0] if values.ndim == 3 and len(values) == 1 else values
    if values.ndim != 2 or not (values.is_floating_point() or values.dtype in (torch.bool, torch.uint8)):
        raise LatelierError(
            f"{input_name}: masks are (h, w) of booleans, uint8, or floats in [0, 1], not {by(values.shape)} of "
            f"{values.dtype}."
        )
    if values.is_floating_point() and not bool(((values >= 0) & (values <= 1)).all()):
        raise LatelierError(
            f"{input_name}: a mask's floats are in [0, 1], but these go from {values.min():g} to {values.max():g}."
        )
    bright = values.dtype == torch.uint8 and bool((values > 1).any())
    return values > (127 if bright else 0.5)


def by(size: Sequence[int]) -> str:
    """A size in words: `8 x 12`."""
    return " x ".join(map(str, size))
