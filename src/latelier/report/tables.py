"""Runs to be compared: their values, which run comes before which, the tables and the sentences around them.

A paper's numbers come from other data, other features and more training, so values are not comparable; orders are. For
every metric that both have, every pair of runs is `reproduced`, `reversed` or `undecided`, whatever one had hoped for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, get_args

from latelier.evaluation.curves import Curve, Reached, reach
from latelier.evaluation.metrics import better, heading, plain
from latelier.evaluation.results import AT_MOST, LEFT_OUT, NOT_REACHED
from latelier.report.page import MISSING, column_texts, in_words, number, short

Verdict = Literal["reproduced", "reversed", "undecided"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
SAMPLING_SPEED = "samples-per-second"  # this and gfd-<features> are measured @ numbers of sampling steps
MIXTURE = "gmm-nll"  # is measured @ numbers of modes
CONVERGENCE = "convergence-"  # begins the names of what is measured @ images seen
LOSS = f"{CONVERGENCE}loss"
COMPARABLE = ("latent_shape", "architecture", "latents", "loss", "cosine_weight", "process")  # equal, or losses differ
TRAINING_SPEED = "denoiser: training images/s"  # a fact of a run
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
Curves = Mapping[str, Mapping[int, Curve]]  # by metric and the run's position
Parts = list["str | Table"]  # paragraphs and tables


@dataclass
class RunSummary:
    """One run of a study or one tokenizer of a comparison."""

    name: str
    metrics: dict[str, dict[str, Any]]  # by name: `{value, interval, receipt}`, the sections of `metrics.json` merged
    facts: dict[str, Any] = field(default_factory=dict)  # what it is or cost: latent shape, images seen, ...
    images: dict[str, Path] = field(default_factory=dict)  # by kind (`samples`): PNG files, some may be missing
    link: str = ""  # to its own report, relative to the comparison


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


def read_metrics(folder: Path, left_out: bool = False) -> dict[str, dict[str, Any]]:
    """The entries of a folder's metrics.json by name, whatever their section; or those of what was left out."""
    sections = json.loads((folder / "metrics.json").read_text(encoding="utf-8")).values()
    every = {name: entry for section in sections for name, entry in section.items()}
    return {name: entry for name, entry in every.items() if (LEFT_OUT in (entry.get("receipt") or {})) == left_out}


def steps_of(name: str) -> int | None:
    """The number of sampling steps at which a metric was measured: 50 of `gfd-vgg16@50`; None without one."""
    steps = name.partition("@")[2]
    return int(steps) if steps.isdigit() else None


def at_steps(shown: Iterable[RunSummary], begin: str) -> list[str]:
    """Names that begin with `gfd`, say, of what was measured at given numbers of steps, the fewest steps first."""
    names = dict.fromkeys(name for run in shown for name in run.metrics if name.startswith(begin))
    found = [(name.partition("@")[0], steps, name) for name in names if (steps := steps_of(name)) is not None]
    return [name for *_, name in sorted(found)]


def by_run(
    shown: Sequence[RunSummary], names: Mapping[str, str], points: Callable[[RunSummary, str], list[Any]]
) -> dict[str, dict[int, list[Any]]]:
    """What `points` gives for metrics, joined by the curves that they belong to and the run's position."""
    found: dict[str, dict[int, list[Any]]] = {}
    for name, curve in names.items():
        for i, run in enumerate(shown):
            if new := points(run, name):
                found.setdefault(curve, {}).setdefault(i, []).extend(new)
    return found


def value(run: RunSummary, name: str) -> float | None:
    """A run's value of a metric; None if it is missing or not finite."""
    return number(run.metrics.get(name, {}).get("value"))


def interval(run: RunSummary, name: str) -> tuple[float, float] | None:
    """A run's 95 % confidence interval of a metric, if there is one."""
    ends = [number(end) for end in run.metrics.get(name, {}).get("interval") or ()]
    return (ends[0], ends[1]) if len(ends) == 2 and ends[0] is not None and ends[1] is not None else None


def best(values: Sequence[float | None], name: str) -> set[int]:
    """Positions of the best value, several if they share it; none where there is nothing to choose."""
    present, direction = [v for v in values if v is not None], better(name)
    winner = (min if direction == "lower" else max)(present, default=None)
    return {i for i, v in enumerate(values) if v == winner} if direction and len(set(present)) > 1 else set()


def orderings(shown: Sequence[RunSummary], published: Published, first: Iterable[str] = ()) -> list[Ordering]:
    """Compare the orders of every metric with a direction and at least two runs that both have; some metrics first."""
    ours = dict.fromkeys([*first, *(name for run in shown for name in run.metrics)])
    theirs = dict.fromkeys(name for values in published.values.values() for name in values)
    compared = [(a, b) for a in ours for b in theirs if plain(a) == plain(b) and better(a)]
    found = (_ordering(shown, published, a, b) for a, b in compared)
    return [ordering for ordering in found if ordering is not None]


def _ordering(shown: Sequence[RunSummary], published: Published, metric: str, name: str) -> Ordering | None:
    from scipy.stats import kendalltau

    paper = {run.name: number(published.values.get(run.name, {}).get(name)) for run in shown}
    runs = [run for run in shown if value(run, metric) is not None and paper[run.name] is not None]
    if len(runs) < 2:
        return None
    sign = 1 if better(metric) == "lower" else -1
    theirs = {run.name: sign * (paper[run.name] or 0.0) for run in runs}  # the smaller the better
    ours = {run.name: sign * (value(run, metric) or 0.0) for run in runs}
    known = sum(interval(run, metric) is not None for run in runs)
    intervals: Literal["all", "some", "none"] = "all" if known == len(runs) else "some" if known else "none"
    pairs = [_compare(a, b, metric, theirs, ours) for a, b in combinations(runs, 2)]
    some = len(set(theirs.values())) > 1 and len(set(ours.values())) > 1
    tau = float(kendalltau(list(theirs.values()), list(ours.values())).statistic) if some else None
    return Ordering(metric, name, _ranks(theirs), _ranks(ours), pairs, tau, intervals)


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


@dataclass
class Table:
    """Cells in words; the first column is the rows' names."""

    head: list[str]
    rows: list[list[str]]
    bold: set[tuple[int, int]] = field(default_factory=set)  # (row, column)
    links: Sequence[str] = ()  # where the names of rows lead; empty, or one for each row, which may be empty

    def is_number(self, column: int) -> bool:
        """Whether a column reads best flush right."""
        return column > 0 and all(re.match(r"[-–−\d]", row[column]) for row in self.rows)


def measured(shown: Sequence[RunSummary], columns: Sequence[str]) -> Table:
    """Our values: one row for each run, one column for each metric; missing ones are a dash."""
    table = Table(["Run", *map(heading, columns)], [[run.name] for run in shown], links=[run.link for run in shown])
    for j, name in enumerate(columns, start=1):
        values = [value(run, name) for run in shown]
        halves = [(ends[1] - ends[0]) / 2 if (ends := interval(run, name)) else None for run in shown]
        texts = [_said(run, name, text) for run, text in zip(shown, column_texts(values))]
        for row, text, half in zip(table.rows, texts, column_texts(halves, like=values)):
            row.append(text if half == MISSING or text == MISSING else f"{text} ± {half}")
        table.bold |= {(i, j) for i in best(values, name)}
    return table


def _said(run: RunSummary, name: str, text: str) -> str:
    """A value in words; what was not reached is no number, and what may have been reached sooner only a bound."""
    receipt = run.metrics.get(name, {}).get("receipt") or {}
    return NOT_REACHED if NOT_REACHED in receipt else f"{AT_MOST} {text}" if receipt.get(AT_MOST) else text


def how_to_read(shown: Sequence[RunSummary], columns: Sequence[str]) -> str:
    """What arrows, bold numbers and ± in the tables of these columns mean."""
    sure = any(interval(run, name) for run in shown for name in columns)
    words = "↓ lower is better, ↑ higher is better; the best value of a column is bold."
    return f"{words}{' ± is half of the 95 % confidence interval.' if sure else ''}"


def sampling(shown: Sequence[RunSummary]) -> Parts:
    """Quality and speed of sampling, a column for each number of steps; nothing if nobody has measured them."""
    speeds = at_steps(shown, SAMPLING_SPEED)
    if not speeds:
        return []
    names = [*at_steps(shown, "gfd"), *speeds]
    table = measured(shown, names)
    heads = [cell.replace(f"{SAMPLING_SPEED}@", "samples/s @").replace("@", " @") for cell in table.head]
    table.head = [" ".join(cell.split()) for cell in heads]
    words = "The number of sampling steps follows the @. samples/s is measured by the wall clock, for the denoiser and "
    words += "the tokenizer's decoder together, after a warm-up batch that does not count."
    return [table, words, *receipts(shown, names, SAMPLING_RECEIPT)]


def printed(shown: Sequence[RunSummary], published: Published) -> Parts:
    """The paper's values, as exact as it printed them; runs that we have come first, in our order."""
    metrics = list(dict.fromkeys(name for values in published.values.values() for name in values))
    runs = [run.name for run in shown if run.name in published.values]
    runs += [name for name in published.values if name not in runs]
    table = Table(["Run", *map(heading, metrics)], [[run] for run in runs])
    for j, name in enumerate(metrics, start=1):
        values = [number(published.values[run].get(name)) for run in runs]
        exact = (f"{v:.6f}".rstrip("0").partition(".")[2] for v in values if v is not None)
        decimals = max(map(len, exact), default=0)  # of the most exact
        for row, v in zip(table.rows, values):
            row.append(MISSING if v is None else f"{v:.{decimals}f}")
        table.bold |= {(i, j) for i in best(values, name)}
    return [f"{published.source}.", table]


def costs(shown: Sequence[RunSummary]) -> Parts:
    """What each run is or took; nothing if nothing is known of any."""
    fullest = sorted(shown, key=lambda run: -len(run.facts))  # its order, should others have trained one stage only
    facts = list(dict.fromkeys(fact for run in fullest for fact in run.facts))
    rows = [[run.name, *(_fact(run.facts.get(fact)) for fact in facts)] for run in shown]
    return [Table(["Run", *facts], rows, links=[run.link for run in shown])] if facts else []


def receipts(shown: Sequence[RunSummary], columns: Sequence[str], keys: Mapping[str, str] = RECEIPT) -> Parts:
    """What was equal in all runs, and what was not, which should make one wary; `keys` of receipts have words."""
    found = {name: [run.metrics.get(name, {}).get("receipt") or {} for run in shown] for name in columns}
    facts: dict[str, list[str]] = {"Equal": [], "Not equal": []}
    for key, word in keys.items():
        metrics: dict[tuple[str, ...], list[str]] = {}  # what the runs say, to the metrics of which they say it
        for name, entries in found.items():
            said = tuple(sorted({_fact(entry[key]) for entry in entries if entry.get(key) is not None}))
            if said:
                metrics.setdefault(said, []).append(name)
        for said, names in metrics.items():
            where = f" ({', '.join(names)})" if len(metrics) > 1 else ""
            facts["Equal" if len(said) == 1 else "Not equal"].append(f"{word} {' or '.join(said)}{where}")
    warnings: dict[str, dict[str, None]] = {}
    for name, warning in ((name, e["warning"]) for name, entries in found.items() for e in entries if "warning" in e):
        warnings.setdefault(str(warning), {})[name] = None
    words = [f"{start} in all runs: {'; '.join(listed)}." for start, listed in facts.items() if listed]
    return [*words, *(f"Warning on {', '.join(names)}: {warning}." for warning, names in warnings.items())]


def _fact(content: Any) -> str:
    single = number(content)
    if single is None:
        return MISSING if content is None else in_words(content)
    return f"{single / 1e12:.4g}T" if abs(single) >= 1e12 else short(single)


def verdicts(orders: Sequence[Ordering], published: Published) -> Parts:
    """One row for each metric, how pairs were decided, and which metrics have no order to compare."""
    names = dict.fromkeys(name for values in published.values.values() for name in values)
    left_out = ", ".join(name for name in names if name not in {o.published for o in orders})
    reason = "fewer than two runs have it both there and here, or its better direction is not known"
    note: Parts = [f"Without an order to compare: {left_out}; {reason}."] if left_out else []
    if not orders:
        return note
    head = ["Metric", "Published, best first", "Measured, best first", "Reproduced", "Reversed", "Undecided",
            "Kendall's tau", "Reversed pairs, in the published order"]  # fmt: skip
    rows = [
        [o.metric, *(" > ".join(map(" = ".join, ranks)) for ranks in (o.paper, o.measured)),
         *(str(len(o.of(verdict))) for verdict in VERDICTS), MISSING if o.tau is None else f"{o.tau:.2f}",
         ", ".join(f"{pair.better} > {pair.worse}" for pair in o.of("reversed")) or MISSING]
        for o in orders
    ]  # fmt: skip
    return [Table(head, rows), _how_decided(orders), *note]


def _how_decided(orders: Sequence[Ordering]) -> str:
    """How many pairs came out how, and what the reader must know of those decided without an interval."""
    counts = {verdict: sum(len(o.of(verdict)) for o in orders) for verdict in VERDICTS}
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    words = f"Of {sum(counts.values())} pairs of runs, {summary}. A pair is undecided where our 95 % intervals overlap "
    words += "or where two values are equal. "
    if none := [o.metric for o in orders if o.intervals == "none"]:
        words += f"There is no interval for {', '.join(none)}: the value alone decides a pair there, however close. "
    if some := [o.metric for o in orders if o.intervals == "some"]:
        words += f"Not every run has an interval for {', '.join(some)}: a value without one counts as exact. "
    if features := [f"{o.published} there, {o.metric} here" for o in orders if o.metric != plain(o.metric)]:
        words += f"Distances in different features are compared by order only: {'; '.join(features)}."
    return words.strip()


def convergence(shown: Sequence[RunSummary], curves: Curves, baseline: str | None) -> Parts:
    """With a baseline, who is sooner where it ends; and how to read the curves, as `comparable` gives them."""
    about = "A loss is that of the denoiser on its own tokenizer's latents, all channels, with the same noise and times"
    about += " at every snapshot. Losses compare only between runs of equal latent shape, kind of tokenizer and "
    about += "objective; "
    if baseline is None:
        return [f"{about}gfd compares between all."]
    left_out = [run.name for i, run in enumerate(shown) if _kind(run) and i not in curves.get(LOSS, {})]
    about += f"they are left out of {', '.join(left_out)}. " if left_out else "as all are here. "
    about += "Even then, latents of two tokenizers need not be equally hard; gfd compares between all."
    position = next((i for i, run in enumerate(shown) if run.name == baseline), None)
    if position is None or not any(position in runs for runs in curves.values()):
        return [f"The baseline, {baseline}, has not been measured yet.", about]
    how = f"Images seen until a run is where {baseline} ends, and how many times fewer they are than {baseline} itself "
    how += "needs: linear between snapshots, on the lowest value so far. At most: the first snapshot is there already. "
    how += "How sure the values are is not considered: factors near 1 may be chance."
    return [speed_table(shown, curves, position), how, about]


def read_curves(shown: Sequence[RunSummary], begin: str = CONVERGENCE) -> dict[str, dict[int, Curve]]:
    """What was measured @ images seen, or @ anything else, by metric and the run's position: the loss comes last."""

    def points(run: RunSummary, name: str) -> Curve:
        return [] if (height := value(run, name)) is None else [(int(name.partition("@")[2]), height)]

    ordered = sorted(at_steps(shown, begin), key=lambda name: (name.startswith(LOSS), steps_of(name), name))
    found = by_run(shown, {name: name.partition("@")[0] for name in ordered}, points)
    return {name: dict(sorted(runs.items())) for name, runs in found.items()}


def comparable(shown: Sequence[RunSummary], curves: Curves, baseline: str | None) -> Curves:
    """The same without losses that do not compare with the baseline's, see `COMPARABLE`."""
    reference = next((run for run in shown if run.name == baseline and _kind(run)), None)
    if LOSS not in curves or reference is None:
        return curves
    return {**curves, LOSS: {i: curve for i, curve in curves[LOSS].items() if _kind(shown[i]) == _kind(reference)}}


def speed_table(shown: Sequence[RunSummary], curves: Curves, baseline: int) -> Table:
    """The last values, the images seen at that of the run `baseline`, and how many times fewer (DC-AE 1.5) they are."""
    table = Table(["Run"], [[run.name] for run in shown])
    for name, runs in curves.items():
        if baseline not in runs:
            continue
        what, level = name.removeprefix(CONVERGENCE), runs[baseline][-1][1]
        end = f"{heading(name).removeprefix(CONVERGENCE)} at the end"
        table.head += [end, f"images to the baseline's {what}", "sooner"]
        reached = {i: reach(curve, level, better(name) == "higher") for i, curve in runs.items()}
        reference = reached[baseline]
        assert reference is not None  # a curve reaches its own end
        last = column_texts([runs[i][-1][1] if i in runs else None for i in range(len(shown))])
        for i, (row, end) in enumerate(zip(table.rows, last)):
            sooner = reached.get(i)
            when = f"{'at most ' * sooner.at_most}{round(sooner.images):,}" if sooner else "not reached"
            row += [end, when if i in runs else MISSING, _factor(sooner, reference)]
    return table


def _kind(run: RunSummary) -> list[Any] | None:
    """What two runs must share for their losses to compare; None without a loss."""
    found = [entry.get("receipt") or {} for name, entry in run.metrics.items() if name.startswith(f"{LOSS}@")]
    return [found[0].get(key) for key in COMPARABLE] if found else None


def _factor(reached: Reached | None, baseline: Reached) -> str:
    """How many times fewer images; a bound where one of the two is one, nothing where both are."""
    if reached is None or (reached.at_most and baseline.at_most):
        return MISSING
    bound = "at least " if reached.at_most else "at most " if baseline.at_most else ""
    return f"{bound}{baseline.images / reached.images:.2f}x"
