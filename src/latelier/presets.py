"""Presets are dictionaries of constructor arguments; these two functions turn them and a recipe into models."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from latelier.errors import LatelierError
from latelier.sections import hint

Model = TypeVar("Model")


def preset_arguments(
    cls: type, presets: dict[str, dict], name: str, overrides: dict[str, Any], section: str = "tokenizer"
) -> dict[str, Any]:
    """A preset's arguments with the recipe's overrides.

    Raises:
        LatelierError: for an unknown preset, or an override that the constructor does not have.
    """
    if name not in presets:
        key = "size" if section == "denoiser" else "preset"
        raise LatelierError(f"{section}.{key} = {name!r} is not known; allowed: {', '.join(presets)}.")
    known = [p for p in inspect.signature(cls).parameters if p != "self"]
    for key in overrides:
        if key not in known:
            raise LatelierError(f"Unknown key '{section}.model.{key}'; {hint(key, known)}")
    return {**presets[name], **overrides}


def open_init(cls: type[Model], path: str, wanted: Mapping[str, Any] | None = None) -> Model:
    """The model that a recipe starts from instead of random weights.

    Args:
        cls: its class.
        path: a folder or Hub name.
        wanted: of a denoiser, what its configuration must say.

    Raises:
        LatelierError: if it cannot be opened, or its configuration says otherwise.
    """
    try:
        model = cls.from_pretrained(path)  # type: ignore[attr-defined]
    except OSError as error:
        raise LatelierError(
            f"init: {path} has no {cls.__name__} that can be opened ({str(error).splitlines()[0]})."
        ) from None
    for key, value in (wanted or {}).items():
        if model.config[key] != value:
            raise LatelierError(
                f"denoiser.init = {path} has {key} = {model.config[key]}, but the tokenizer and the condition need "
                f"{value}."
            )
    return model
