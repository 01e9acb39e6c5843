"""What is wrong with a recipe, in one sentence that names the key, the value and what is allowed."""

from __future__ import annotations

import difflib
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


def first_problem(error: ValidationError, root: type[BaseModel], prefix: str = "") -> str:
    """One sentence for the first problem, unknown keys first, since they often cause the others.

    Args:
        error: pydantic's.
        root: the model that was validated.
        prefix: what comes before its keys, such as `denoiser.condition.`.
    """
    problems = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    first = problems[0]
    place, found = _walk(first["loc"], root)
    key, value = prefix + ".".join(place), first["input"]
    if first["type"] == "extra_forbidden":
        known = [name for model in _walk(first["loc"][:-1], root)[1] for name in model.model_fields]
        near = difflib.get_close_matches(place[-1], known, 1, 0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}."
        return f"Unknown key {key!r} in the recipe; {hint}"
    if first["type"] == "missing":
        return f"The recipe lacks {key!r}."
    if first["type"].startswith("union_tag"):
        kind = value.get("kind") if isinstance(value, dict) else value
        return f"{key}.kind = {kind!r} is not known; allowed: {', '.join(k for m in found for k in _kinds(m))}."
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return f"{key} = {value!r} is not allowed; it should be {message}."


def _walk(location: tuple, root: type[BaseModel]) -> tuple[list[str], list[type[BaseModel]]]:
    """The keys at a pydantic location as users write them, without the kinds of unions, and the models there."""
    place, models = [], [root]
    for part in location:
        of_kind = [model for model in models if part in _kinds(model)]
        if of_kind and not any(part in model.model_fields for model in models):
            models = of_kind
            continue
        place.append(str(part))
        if not isinstance(part, int):
            models = [
                inner
                for model in models
                if part in model.model_fields
                for inner in _models(model.model_fields[part].annotation)
            ]
    return place, models


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models in a type, however nested."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _kinds(model: type[BaseModel]) -> tuple[str, ...]:
    """The values of `kind` by which a union knows a model."""
    field = model.model_fields.get("kind")
    return tuple(k for k in get_args(field.annotation) if isinstance(k, str)) if field else ()
