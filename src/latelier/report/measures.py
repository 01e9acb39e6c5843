"""Numbers and receipts of metrics.json as rules read them, and the findings that rules make of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from latelier.report.page import number

Kind = Literal["good", "fair", "bad"]
KINDS: tuple[Kind, ...] = ("bad", "fair", "good")  # in the order of the page


@dataclass(frozen=True)
class Finding:
    """One sentence about a latent space: `bad` (see to it before training), `fair` (know it) or `good`."""

    kind: Kind
    sentence: str
    evidence: dict[str, float]  # the numbers that it rests on, by the names of their metrics


def read_entries(metrics: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Sections of metrics.json and their entries, as far as they are what they should be."""
    sections = {title: entries for title, entries in metrics.items() if isinstance(entries, dict)}
    return {title: {k: v for k, v in entries.items() if isinstance(v, dict)} for title, entries in sections.items()}


class Measures:
    """Finite numbers and receipts of metrics.json by name; NaN is what is missing, and no comparison with it holds."""

    def __init__(self, metrics: Mapping[str, Any]):
        every = {name: entry for entries in read_entries(metrics).values() for name, entry in entries.items()}
        found = {name: number(entry.get("value")) for name, entry in every.items()}
        self.values = {name: v for name, v in found.items() if v is not None}
        self.receipts: dict[str, dict[str, Any]] = {name: entry.get("receipt") or {} for name, entry in every.items()}
        self.intervals = {name: entry.get("interval") for name, entry in every.items()}

    def __getitem__(self, name: str) -> float:
        """The value of a metric."""
        return self.values.get(name, math.nan)

    def about(self, name: str, key: str) -> Any:
        """A field of a metric's receipt, None if it is missing."""
        return self.receipts.get(name, {}).get(key)

    def number(self, name: str, key: str) -> float:
        """A number of a metric's receipt, if the metric itself is a number."""
        found = number(self.about(name, key)) if name in self.values else None
        return math.nan if found is None else found

    def begin(self, start: str) -> dict[str, float]:
        """The metrics whose names begin so."""
        return {name: v for name, v in self.values.items() if name.startswith(start)}


Findings = Iterator[Finding]  # of a rule: the first one counts, if there is any
Rule = Callable[[Measures], Findings]


def near(value: float) -> str:
    """Three significant digits, which are enough for a sentence."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
