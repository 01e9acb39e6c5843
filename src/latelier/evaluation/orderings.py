"""What the numbers of several runs say, in tables and sentences: the best, and which run comes before which.

A paper's numbers come from other data, other features and more training, so values are not comparable; orders are. For
every metric that both have, every pair of runs is `reproduced`, `reversed` or `undecided`, whatever one had hoped for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from latelier.evaluation.chart import short
from latelier.evaluation.directions import SAMPLING_SPEED, better, heading, plain
from latelier.evaluation.page import in_words

Verdict = Literal["reproduced", "reversed", "undecided"]

MISSING = "–"
RECEIPT = {
    "n": "n", "n_reference": "n of references", "image_size": "image size", "reference": "images",
    "data": "data", "extractor": "features", "latents": "latents", "sampler": "sampler", "steps": "steps",
    "guidance": "guidance", "seed": "seed", "ema": "EMA", "versions": "versions", "git": "code", "device": "device",
}  # fmt: skip
SAMPLING_RECEIPT = {
    "n": "n", "n_reference": "n of references", "reference": "images", "extractor": "features", "sampler": "sampler",
    "guidance": "guidance", "seed": "seed", "batch": "batch", "threads": "threads", "drawn_on": "drawn on",
    "device": "device",
}  # fmt: skip
MIXTURE = "gmm-nll"  # is measured @ numbers of modes
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
    """What a paper printed.

    Attributes:
        source: where: `Lee et al. 2025, tables 1 and 2: ImageNet 256 px`.
        values: run name to metric name to value; a run or a metric may be missing.
    """

    source: str
    values: dict[str, dict[str, float]]


@dataclass
class Pair:
    """Two runs in one metric.

    Attributes:
        better: the paper's better run (of equals, the earlier one).
        worse: the paper's worse run.
        verdict: what the measurement says of that.
        why: why it is undecided; empty otherwise.
    """

    better: str
    worse: str
    verdict: Verdict
    why: str = ""


@dataclass
class Ordering:
    """One metric, in the paper and as measured, over the runs that both have.

    Attributes:
        metric: our name, with the extractor: `rfd-vgg16`.
        published: the paper's name: `rfd`.
        paper: run names, best first; equal ones together.
        measured: the same of our values.
        pairs: every pair of runs.
        tau: Kendall's tau-b of the two orders, None where it is not defined.
        intervals: how many of our runs have a confidence interval.
    """

    metric: str
    published: str
    paper: list[list[str]]
    measured: list[list[str]]
    pairs: list[Pair]
    tau: float | None
    intervals: Literal["all", "some", "none"]

    def of(self, verdict: Verdict) -> list[Pair]:
        """The pairs with this verdict."""
        return [pair for pair in self.pairs if pair.verdict == verdict]


@dataclass
class Table:
    """Cells in words; the first column is the rows' names.

    Attributes:
        head: names of columns.
        rows: cells, as many in each row as the head has.
        bold: (row, column) of the best cells.
        links: where the names of rows lead; empty, or one for each row, which may be empty.
    """

    head: list[str]
    rows: list[list[str]]
    bold: set[tuple[int, int]] = field(default_factory=set)
    links: Sequence[str] = ()

    def is_number(self, column: int) -> bool:
        """Whether a column reads best flush right."""
        return column > 0 and all(re.match(r"[-–−\d]", row[column]) for row in self.rows)


# -- values -----------------------------------------------------------------------------------------------------------


def steps_of(name: str) -> int | None:
    """The number of sampling steps at which a metric was measured: 50 of `gfd-vgg16@50`; None if it has no such."""
    steps = name.partition("@")[2]
    return int(steps) if steps.isdigit() else None


def at_steps(shown: Iterable[RunSummary], begin: str) -> list[str]:
    """Names of what the runs have measured at given numbers of steps, the fewest first.

    Args:
        shown: the runs.
        begin: of the names: `gfd` or `samples-per-second`.
    """
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


def number(content: Any) -> float | None:
    """A finite number, or None for anything else."""
    right = isinstance(content, int | float) and not isinstance(content, bool) and math.isfinite(content)
    return float(content) if right else None


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
    """Compare the orders of every metric that both have.

    Args:
        shown: our runs.
        published: the paper's values.
        first: metric names that come first, in this order; the others follow as the runs name them.

    Returns:
        One for each metric with a direction and at least two runs that both have.
    """
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
        [_judge(a, b, metric, theirs, ours) for a, b in combinations(runs, 2)],
        _tau(list(theirs.values()), list(ours.values())),
        "all" if known == len(runs) else "some" if known else "none",
    )


def _judge(a: RunSummary, b: RunSummary, metric: str, theirs: Mapping[str, float], ours: Mapping[str, float]) -> Pair:
    """One pair; a value without an interval is an interval of no width."""
    if theirs[b.name] < theirs[a.name]:
        a, b = b, a
    if theirs[a.name] == theirs[b.name]:
        return Pair(a.name, b.name, "undecided", "equal in the paper")
    if ours[a.name] == ours[b.name]:
        return Pair(a.name, b.name, "undecided", "equal as measured")
    (low_a, high_a), (low_b, high_b) = _range(a, metric), _range(b, metric)
    if max(low_a, low_b) <= min(high_a, high_b):
        return Pair(a.name, b.name, "undecided", "intervals overlap")
    return Pair(a.name, b.name, "reproduced" if ours[a.name] < ours[b.name] else "reversed")


def _range(run: RunSummary, metric: str) -> tuple[float, float]:
    single = value(run, metric)
    assert single is not None
    return interval(run, metric) or (single, single)


def _ranks(values: Mapping[str, float]) -> list[list[str]]:
    """Names by value, smallest first, equal ones together."""
    return [[name for name, v in values.items() if v == level] for level in sorted(set(values.values()))]


def _tau(theirs: list[float], ours: list[float]) -> float | None:
    """Kendall's tau-b, None if a side has no order at all."""
    from scipy.stats import kendalltau

    if len(set(theirs)) < 2 or len(set(ours)) < 2:
        return None
    return float(kendalltau(theirs, ours).statistic)


# -- tables -----------------------------------------------------------------------------------------------------------


def measured(shown: Sequence[RunSummary], columns: Sequence[str]) -> list[str | Table]:
    """Our values: one row for each run, one column for each metric; missing ones are a dash."""
    table = Table(["Run", *map(heading, columns)], [[run.name] for run in shown], links=[run.link for run in shown])
    for j, name in enumerate(columns, start=1):
        values = [value(run, name) for run in shown]
        halves = [(ends[1] - ends[0]) / 2 if (ends := interval(run, name)) else None for run in shown]
        for row, text, half in zip(table.rows, texts(values), texts(halves, like=values)):
            row.append(text if half == MISSING or text == MISSING else f"{text} ± {half}")
        table.bold |= {(i, j) for i in best(values, name)}
    words = "↓ lower is better, ↑ higher is better; the best value of a column is bold."
    if any(interval(run, name) for run in shown for name in columns):
        words += " ± is half of the 95 % confidence interval."
    return [table, words]


def sampling(shown: Sequence[RunSummary]) -> list[str | Table]:
    """Quality and speed of sampling, a column for each number of steps; nothing if nobody has measured them."""
    speeds = at_steps(shown, SAMPLING_SPEED)
    names = [*at_steps(shown, "gfd"), *speeds]
    if not speeds:
        return []
    table = measured(shown, names)[0]
    assert isinstance(table, Table)
    table.head = [cell.replace(f"{SAMPLING_SPEED}@", "samples/s @").replace("@", " @") for cell in table.head]
    table.head = [" ".join(cell.split()) for cell in table.head]
    words = "Behind @ stands the number of sampling steps. samples/s is the wall clock's, of the denoiser and the "
    words += "tokenizer's decoder together, after a batch that does not count."
    return [table, words, *receipts(shown, names, SAMPLING_RECEIPT)]


def printed(shown: Sequence[RunSummary], published: Published) -> list[str | Table]:
    """The paper's values, as exact as it printed them; runs that we have come first, in our order."""
    metrics = list(dict.fromkeys(name for values in published.values.values() for name in values))
    runs = [run.name for run in shown if run.name in published.values]
    runs += [name for name in published.values if name not in runs]
    table = Table(["Run", *map(heading, metrics)], [[run] for run in runs])
    for j, name in enumerate(metrics, start=1):
        values = [number(published.values[run].get(name)) for run in runs]
        for row, text in zip(table.rows, _as_printed(values)):
            row.append(text)
        table.bold |= {(i, j) for i in best(values, name)}
    return [f"{published.source}.", table]


def verdicts(orders: Sequence[Ordering], published: Published) -> list[str | Table]:
    """One row for each metric, and how pairs were decided."""
    names = dict.fromkeys(name for values in published.values.values() for name in values)
    left_out = ", ".join(name for name in names if name not in {o.published for o in orders})
    reason = "fewer than two runs have it both there and here, or its better direction is not known"
    note = [f"Without an order to compare: {left_out}; {reason}."] if left_out else []
    return [*_verdict_table(orders), *note]


def _verdict_table(orders: Sequence[Ordering]) -> list[str | Table]:
    if not orders:
        return []
    head = ["Metric", "Published, best first", "Measured, best first", "Reproduced", "Reversed", "Undecided",
            "Kendall's tau", "Reversed pairs, in the published order"]  # fmt: skip
    rows = [
        [o.metric, _chain(o.paper), _chain(o.measured), *(str(len(o.of(v))) for v in ("reproduced", "reversed")),
         str(len(o.of("undecided"))), MISSING if o.tau is None else f"{o.tau:.2f}",
         ", ".join(f"{pair.better} > {pair.worse}" for pair in o.of("reversed")) or MISSING]
        for o in orders
    ]  # fmt: skip
    counts = {verdict: sum(len(o.of(verdict)) for o in orders) for verdict in ("reproduced", "reversed", "undecided")}
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    words = f"Of {sum(counts.values())} pairs of runs, {summary}. A pair is undecided where our 95 % intervals overlap "
    words += "or where two values are equal. " + _without_intervals(orders)
    features = [f"{o.published} there, {o.metric} here" for o in orders if o.metric != plain(o.metric)]
    if features:
        words += f"Distances in different features are compared by order only: {'; '.join(features)}."
    return [Table(head, rows), words.strip()]


def _without_intervals(orders: Sequence[Ordering]) -> str:
    """What the reader must know of pairs that are decided without any interval."""
    words = ""
    if none := [o.metric for o in orders if o.intervals == "none"]:
        words += f"There is no interval for {', '.join(none)}: the value alone decides a pair there, however close. "
    if some := [o.metric for o in orders if o.intervals == "some"]:
        words += f"Not every run has an interval for {', '.join(some)}: a value without one counts as exact. "
    return words


def _chain(ranks: Sequence[Sequence[str]]) -> str:
    return " > ".join(" = ".join(equal) for equal in ranks)


def costs(shown: Sequence[RunSummary]) -> list[str | Table]:
    """What each run is or took; nothing if nothing is known of any."""
    fullest = sorted(shown, key=lambda run: -len(run.facts))  # its order, should others have trained one stage only
    facts = list(dict.fromkeys(fact for run in fullest for fact in run.facts))
    rows = [[run.name, *(_fact(run.facts.get(fact)) for fact in facts)] for run in shown]
    return [Table(["Run", *facts], rows, links=[run.link for run in shown])] if facts else []


def receipts(
    shown: Sequence[RunSummary], columns: Sequence[str], keys: Mapping[str, str] = RECEIPT
) -> list[str | Table]:
    """What was equal in all runs, and what was not, which should make one wary.

    Args:
        shown: the runs.
        columns: metric names.
        keys: of receipts, with the words that stand for them.
    """
    found = {name: [run.metrics.get(name, {}).get("receipt") or {} for run in shown] for name in columns}
    equal: list[str] = []
    unequal: list[str] = []
    for key, word in keys.items():
        metrics: dict[tuple[str, ...], list[str]] = {}  # what the runs say, to the metrics of which they say it
        for name, entries in found.items():
            said = tuple(sorted({_fact(entry[key]) for entry in entries if entry.get(key) is not None}))
            if said:
                metrics.setdefault(said, []).append(name)
        for said, names in metrics.items():
            where = f" ({', '.join(names)})" if len(metrics) > 1 else ""
            (equal if len(said) == 1 else unequal).append(f"{word} {' or '.join(said)}{where}")
    warnings: dict[str, dict[str, None]] = {}
    for name, entries in found.items():
        for entry in entries:
            if "warning" in entry:
                warnings.setdefault(str(entry["warning"]), {})[name] = None
    words: list[str | Table] = [f"Equal in all runs: {'; '.join(equal)}."] if equal else []
    words += [f"Not equal in all runs: {'; '.join(unequal)}."] if unequal else []
    return words + [f"Warning on {', '.join(names)}: {warning}." for warning, names in warnings.items()]


# -- numbers in words -------------------------------------------------------------------------------------------------


def texts(values: Sequence[float | None], like: Sequence[float | None] | None = None) -> list[str]:
    """A column of numbers with equally many decimals: four digits of the largest, five if others are far smaller.

    Args:
        values: the numbers.
        like: numbers that decide how many decimals; by default the values themselves.
    """
    sizes = [abs(v) for v in (values if like is None else like) if v]
    if sizes and not 1e-3 <= max(sizes) < 1e4:
        return [MISSING if v is None else short(v) for v in values]
    most = _power(max(sizes)) if sizes else 3
    decimals = 3 - most + (bool(sizes) and _power(min(sizes)) < most - 1)
    return [MISSING if v is None else f"{v:.{decimals}f}" for v in values]


def _as_printed(values: Sequence[float | None]) -> list[str]:
    """A column of numbers with as many decimals as the most exact of them has."""
    exact = (f"{v:.6f}".rstrip("0").partition(".")[2] for v in values if v is not None)
    decimals = max(map(len, exact), default=0)
    return [MISSING if v is None else f"{v:.{decimals}f}" for v in values]


def _power(size: float) -> int:
    return math.floor(math.log10(size))


def _fact(content: Any) -> str:
    if content is None:
        return MISSING
    single = number(content)
    if single is None:
        return in_words(content)
    return f"{single / 1e12:.4g}T" if abs(single) >= 1e12 else short(single)
