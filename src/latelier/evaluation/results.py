"""The numbers: what they are, how sure they are, the file that keeps them with their receipts, and several processes.

Whatever the number of processes W, batches are the same, and process p works on batches p, p + W, ... The main process
counts what comes of them in the order of batches: sums are those of one process, to the last bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from jaxtyping import Float
from torch import Tensor

from latelier.errors import NotMeasurable
from latelier.publish import write_whole
from latelier.terminal import say

T = TypeVar("T")
LEFT_OUT = "left out"  # in the receipt of what could not be measured, with the reason
NOT_REACHED = "not reached"  # of images until a quality that training never had, in a sentence
AT_MOST = "at most"  # true where the first measurement had reached it already
ERRORS = "error-map.png"  # beside metrics.json, see `reconstruction.draw_errors`


@dataclass
class Measurement:
    """One number with its receipt."""

    name: str  # Fréchet distances carry their extractor: `rfd-vgg16`, `gfd-inception`
    value: float
    receipt: dict[str, Any] = field(default_factory=dict)  # n, reference, versions, ...: all it takes to measure again
    interval: tuple[float, float] | None = None  # of 95 % confidence, where there is one


@dataclass(frozen=True)
class Result:
    """What a metric found."""

    value: float
    interval: tuple[float, float] | None = None  # of 95 % confidence, where there is one
    details: dict[str, Any] = field(default_factory=dict)  # of the receipt, beside the common fields: curves, warnings


def mean_with_interval(values: Float[Tensor, " n"]) -> tuple[float, tuple[float, float] | None]:
    """Mean and its 95 % confidence interval (normal approximation), None for fewer than two values."""
    values = values.double()
    mean = values.mean().item()
    if len(values) < 2:
        return mean, None
    half = 1.96 * values.std().item() / math.sqrt(len(values))
    return mean, (mean - half, mean + half)


def size_warning(n: int, dims: int) -> dict[str, str]:
    """What a receipt adds when there are too few images for a covariance of full rank."""
    if n > dims:
        return {}
    return {"warning": f"n = {n} is below the feature dimension {dims}; compare only at equal n"}


def left_out(metric: str, why: NotMeasurable | str) -> Measurement:
    """A measurement without a number: the sentence that says why, in the receipt and on the terminal."""
    if is_main(True):
        say(f"{metric} is left out: {why}")
    return Measurement(metric, math.nan, {LEFT_OUT: str(why)})


def forget_left_out(path: Path) -> None:
    """Take what an earlier evaluation left out from `metrics.json`: this one may measure it."""
    if path.is_file():
        content = json.loads(path.read_text())
        for title, entries in content.items():
            content[title] = {k: v for k, v in entries.items() if LEFT_OUT not in (v.get("receipt") or {})}
        write_whole(path, json.dumps(content, indent=2))


def write_measurements(path: str | Path, measurements: list[Measurement], section: str) -> None:
    """Merge measurements into `metrics.json`: `{section: {name: {value, interval, receipt}}}`, never half written."""
    path = Path(path)
    content = json.loads(path.read_text()) if path.is_file() else {}
    entries = content.setdefault(section, {})
    for entry in map(asdict, measurements):
        if math.isnan(entry["value"]):
            entry["value"] = None
        entries[entry.pop("name")] = entry
    write_whole(path, json.dumps(content, indent=2, default=str))


def rank() -> tuple[int, int]:
    """This process's number and how many there are."""
    from accelerate import PartialState

    state = PartialState()
    return state.process_index, state.num_processes


def gather_in_order(results: Iterator[dict[str, Any]], shared: bool) -> Iterator[dict[str, Any]]:
    """The results of all processes, (nested) dicts of tensors of their batches, in the order of batches, on the main
    process; nothing on the others. If `shared`, all processes take part, and must all go through it to its end.
    """
    if not shared or rank()[1] == 1:
        yield from results
        return
    from accelerate.utils import gather_object

    while True:
        row = gather_object([_on_cpu(next(results, None))])  # one batch of each process, in order
        if all(batch is None for batch in row):
            return
        if rank()[0] == 0:
            yield from (batch for batch in row if batch is not None)


def agreed(value: T, shared: bool) -> T:
    """The main process's value, on all processes."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0] if shared and rank()[1] > 1 else value


def is_main(shared: bool) -> bool:
    """Whether this process counts, measures and writes."""
    return not shared or rank()[0] == 0


def _on_cpu(content: Any) -> Any:
    """Tensors where every process can read them."""
    if isinstance(content, dict):
        return {key: _on_cpu(value) for key, value in content.items()}
    return content.cpu() if isinstance(content, Tensor) else content
