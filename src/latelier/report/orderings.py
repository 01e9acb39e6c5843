"""Runs to be compared: their values, the best of them, and which run comes before which.

A paper's numbers come from other data, other features and more training, so values are not comparable; orders are. For
every metric that both have, every pair of runs is `reproduced`, `reversed` or `undecided`, whatever one had hoped for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from latelier.evaluation.metrics import better, plain
from latelier.report.page import number

Verdict = Literal["reproduced", "reversed", "undecided"]

SAMPLING_SPEED = "samples-per-second"  # this and gfd-<features> are measured @ numbers of sampling steps
MIXTURE = "gmm-nll"  # is measured @ numbers of modes
CONVERGENCE = "convergence-"  # begins the names of what is measured @ images seen
TRAINING_SPEED = "denoiser: training images/s"  # a fact of a run


@dataclass
class RunSummary:
    """One run of a study.

    Attributes:
        name: such as `VMAE`.
        metrics: metric name to `{value, interval, receipt}`, the sections of `metrics.json` merged.
        facts: what it is or cost, in words and numbers: latent shape, images seen, training seconds, ...
        images: kind (`reconstructions`, `samples`) to a PNG file; files may be missing.
        link: of its own report, relative to the comparison; empty if it has none.
    """

    name: str
    metrics: dict[str, dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)
    images: dict[str, Path] = field(default_factory=dict)
    link: str = ""


@dataclass
class Published:
    """What a paper printed, and where: `Lee et al. 2025, tables 1 and 2: ImageNet 256 px`."""

    source: str
    values: dict[str, dict[str, float]]  # by run, then by metric; some may be missing


@dataclass
class Pair:
    """Two runs in one metric: what the measurement says of the paper's order, and why it is undecided."""

    better: str  # of equals, the earlier one
    worse: str
    verdict: Verdict
    why: str = ""


@dataclass
class Ordering:
    """One metric, in the paper and as measured, over the runs that both have."""

    metric: str  # our name, with the extractor: `rfd-vgg16`
    published: str  # the paper's name: `rfd`
    paper: list[list[str]]  # run names, best first; equal ones together
    measured: list[list[str]]
    pairs: list[Pair]  # every two runs
    tau: float | None  # Kendall's tau-b of the two orders, where it is defined
    intervals: Literal["all", "some", "none"]  # how many of our runs have a confidence interval

    def of(self, verdict: Verdict) -> list[Pair]:
        """The pairs with this verdict."""
        return [pair for pair in self.pairs if pair.verdict == verdict]


def read_metrics(folder: Path) -> dict[str, dict[str, Any]]:
    """The entries of a folder's metrics.json by name, whatever their section."""
    sections = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return {name: entry for section in sections.values() for name, entry in section.items()}


# -- values -----------------------------------------------------------------------------------------------------------


def steps_of(name: str) -> int | None:
    """The number of sampling steps at which a metric was measured: 50 of `gfd-vgg16@50`; None if it has no such."""
    steps = name.partition("@")[2]
    return int(steps) if steps.isdigit() else None


def at_steps(shown: Iterable[RunSummary], begin: str) -> list[str]:
    """Names that begin with `gfd`, say, of what was measured at given numbers of steps, the fewest steps first."""
    names = dict.fromkeys(name for run in shown for name in run.metrics if name.startswith(begin))
    found = [(name.partition("@")[0], steps, name) for name in names if (steps := steps_of(name)) is not None]
    return [name for *_, name in sorted(found)]


def value(run: RunSummary, name: str) -> float | None:
    """A run's value of a metric; None if it is missing or not finite."""
    return number(run.metrics.get(name, {}).get("value"))


def interval(run: RunSummary, name: str) -> tuple[float, float] | None:
    """A run's 95 % confidence interval of a metric, if there is one."""
    ends = [number(end) for end in run.metrics.get(name, {}).get("interval") or ()]
    return (ends[0], ends[1]) if len(ends) == 2 and ends[0] is not None and ends[1] is not None else None


def best(values: Sequence[float | None], name: str) -> set[int]:
    """Positions of the best value, several if they share it; none where there is nothing to choose."""
    present = [v for v in values if v is not None]
    direction = better(name)
    if direction is None or len(set(present)) < 2:
        return set()
    winner = min(present) if direction == "lower" else max(present)
    return {i for i, v in enumerate(values) if v == winner}


# -- orders -----------------------------------------------------------------------------------------------------------


def orderings(shown: Sequence[RunSummary], published: Published, first: Iterable[str] = ()) -> list[Ordering]:
    """Compare the orders of every metric with a direction and at least two runs that both have; some metrics first."""
    ours = dict.fromkeys([*first, *(name for run in shown for name in run.metrics)])
    theirs = dict.fromkeys(name for values in published.values.values() for name in values)
    compared = [(a, b) for a in ours for b in theirs if plain(a) == plain(b) and better(a)]
    found = (_ordering(shown, published, a, b) for a, b in compared)
    return [ordering for ordering in found if ordering is not None]


def _ordering(shown: Sequence[RunSummary], published: Published, metric: str, name: str) -> Ordering | None:
    paper = {run.name: number(published.values.get(run.name, {}).get(name)) for run in shown}
    runs = [run for run in shown if value(run, metric) is not None and paper[run.name] is not None]
    if len(runs) < 2:
        return None
    sign = 1 if better(metric) == "lower" else -1
    theirs = {run.name: sign * (paper[run.name] or 0.0) for run in runs}  # the smaller the better
    ours = {run.name: sign * (value(run, metric) or 0.0) for run in runs}
    known = sum(interval(run, metric) is not None for run in runs)
    return Ordering(
        metric,
        name,
        _ranks(theirs),
        _ranks(ours),
        [_compare(a, b, metric, theirs, ours) for a, b in combinations(runs, 2)],
        _tau(list(theirs.values()), list(ours.values())),
        "all" if known == len(runs) else "some" if known else "none",
    )


def _compare(a: RunSummary, b: RunSummary, metric: str, theirs: Mapping[str, float], ours: Mapping[str, float]) -> Pair:
    """One pair; a value without an interval is an interval of no width."""
    if theirs[b.name] < theirs[a.name]:
        a, b = b, a
    if theirs[a.name] == theirs[b.name]:
        return Pair(a.name, b.name, "undecided", "equal in the paper")
    if ours[a.name] == ours[b.name]:
        return Pair(a.name, b.name, "undecided", "equal as measured")
    (low_a, high_a), (low_b, high_b) = (interval(run, metric) or (run.metrics[metric]["value"],) * 2 for run in (a, b))
    if max(low_a, low_b) <= min(high_a, high_b):
        return Pair(a.name, b.name, "undecided", "intervals overlap")
    return Pair(a.name, b.name, "reproduced" if ours[a.name] < ours[b.name] else "reversed")


def _ranks(values: Mapping[str, float]) -> list[list[str]]:
    """Names by value, smallest first, equal ones together."""
    return [[name for name, v in values.items() if v == level] for level in sorted(set(values.values()))]


def _tau(theirs: list[float], ours: list[float]) -> float | None:
    """Kendall's tau-b, None if a side has no order at all."""
    from scipy.stats import kendalltau

    if len(set(theirs)) < 2 or len(set(ours)) < 2:
        return None
    return float(kendalltau(theirs, ours).statistic)
