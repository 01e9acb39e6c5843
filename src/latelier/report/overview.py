"""Tokenizers at a glance: a radar of what is good about each, and quality against cost with the ones nobody beats.

A radar's axis is a measure with a known better direction, scaled between the worst and the best of those compared. In a
plane of one quality and one cost a tokenizer is dominated if another one is at least as good in both and better in one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from latelier.evaluation.metrics import ARROWS, Better, better, heading, plain
from latelier.report.figures import STYLE, WIDTH, ImageFile, fit, legend, log_axes, make_panels, save_figure, styles
from latelier.report.page import INK, MISSING, SOFT, column_texts, number
from latelier.report.tables import RunSummary, Table, value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import SubplotSpec
    from matplotlib.projections.polar import PolarAxes

NUMBERS = "numbers per pixel"  # facts of a run
BITS = "bits per pixel"
GFLOP = "gflop"
AXES = (
    "psnr", "ssim", "lpips", "rfd", "smoothness-lpips", "within-object", "probe-accuracy", "gmm-modes",
    "diffusion-loss", "equivariance-scale", GFLOP,
)  # fmt: skip
QUALITIES = ("lpips", "psnr", "rfd")
FEWEST_AXES = 3
INNER = 0.25  # radius of the worst, so that a shape never shrinks to a point
ACROSS = 2  # small radars in a row, beside the large one

Points = dict[str, tuple[float, float]]  # (cost, quality) by the run's name


class Axis(NamedTuple):
    """One measure of all runs as a radar shows it."""

    words: str
    values: list[float]
    shares: list[float]  # 0 for the worst, 1 for the best


class Cost(NamedTuple):
    """What one pays for a tokenizer: words, the better direction, and a run's value, None where it is not known."""

    words: str
    better: Better
    of: Callable[[RunSummary], float | None]


@dataclass
class Front:
    """One quality against one cost, in words."""

    quality: str
    cost: str
    points: Points  # of those that have both
    dominated: dict[str, list[str]]  # names of dominated runs, and of those that dominate them

    @property
    def front(self) -> list[str]:
        """Names of the runs that no other dominates."""
        return [name for name in self.points if name not in self.dominated]


def gflop(run: RunSummary) -> float | None:
    """GFLOP to encode an image and to decode it."""
    encode, decode = value(run, "gflop-encode"), value(run, "gflop-decode")
    return None if encode is None or decode is None else encode + decode


def speed(run: RunSummary) -> float | None:
    """Images per second, encoded and decoded one after the other."""
    rates = [value(run, f"{side}-images-per-second") for side in ("encode", "decode")]
    return 1 / sum(1 / rate for rate in rates if rate) if all(rates) else None


def bits(run: RunSummary) -> float | None:
    """What the latents of an image say, in bits per pixel: their codes, or the KL divergence from the prior."""
    codes = number(run.facts.get(BITS))
    return value(run, "kl-bits-per-pixel") if codes is None else codes


COSTS = (
    Cost("GFLOP, encode + decode", "lower", gflop),
    Cost("images/s, encode + decode", "higher", speed),
    Cost("latent numbers per pixel", "lower", lambda run: number(run.facts.get(NUMBERS))),
    Cost("bits per pixel, codes or KL", "lower", bits),
)


def axes_of(shown: Sequence[RunSummary]) -> tuple[list[Axis], list[str]]:
    """Those of `AXES` that all runs have and in which they differ; and names of measured ones that some run lacks."""
    values = {
        name: [v for run in shown if (v := gflop(run) if name == GFLOP else value(run, name)) is not None]
        for name in _measured(shown, AXES)
    }
    whole = {name: there for name, there in values.items() if len(there) == len(shown) and len(set(there)) > 1}
    axes = [Axis(heading(name), there, scaled(there, better(name))) for name, there in whole.items()]
    return axes, [name for name, there in values.items() if len(there) < len(shown)]


def scaled(values: Sequence[float], direction: Better | None) -> list[float]:
    """Linear, 0 for the worst value and 1 for the best."""
    low, high = min(values), max(values)
    shares = [(v - low) / (high - low) for v in values]
    return [1 - share for share in shares] if direction == "lower" else shares


def fronts(shown: Sequence[RunSummary]) -> list[Front]:
    """Every quality against every cost that at least two runs have."""
    found = []
    for name, cost in product(_measured(shown, QUALITIES), COSTS):
        points = {run.name: (c, q) for run in shown if (c := cost.of(run)) and (q := value(run, name)) is not None}
        if len(points) > 1:
            beaten = dominated(points, cost.better, better(name))
            found.append(Front(name, f"{cost.words}{ARROWS[cost.better]}", points, beaten))
    return found


def dominated(points: Points, cost: Better | None, quality: Better | None) -> dict[str, list[str]]:
    """Who of these `(cost, quality)` is dominated, and by whom; `cost` and `quality` are the better directions."""
    signs = [1 if direction == "lower" else -1 for direction in (cost, quality)]
    costs = {name: (signs[0] * c, signs[1] * q) for name, (c, q) in points.items()}  # the smaller the better, both
    found: dict[str, list[str]] = {}
    for (name, (c, q)), (other, (x, y)) in product(costs.items(), repeat=2):
        if (x, y) != (c, q) and x <= c and y <= q:
            found.setdefault(name, []).append(other)
    return found


def _measured(shown: Sequence[RunSummary], wanted: Sequence[str]) -> list[str]:
    """Names of metrics as they were measured, in the order of `wanted`: `rfd` is `rfd-vgg16`."""
    known = dict.fromkeys(name for run in shown for name in run.metrics if "@" not in name)
    found = [name for begin in wanted for name in known if plain(name) == begin]
    return [*found, GFLOP] if GFLOP in wanted and any(gflop(run) is not None for run in shown) else found


def overview(folder: Path, shown: Sequence[RunSummary]) -> list[str | Table | ImageFile]:
    """Radar, Pareto plots and who is on which front, drawn into the folder; nothing for fewer than two runs."""
    from matplotlib import rc_context

    parts: list[str | Table | ImageFile] = []
    axes, lacking = axes_of(shown) if len(shown) > 1 else ([], [])
    planes = fronts(shown)
    with rc_context(STYLE):
        if len(axes) >= FEWEST_AXES:
            words = "Each axis from the worst (inner ring) to the best (outer ring) of those compared, linear; the "
            words += "numbers are these two. A shape says nothing about a tokenizer alone"
            words += f". Without an axis, as not all have it: {', '.join(lacking)}" if lacking else ""
            parts.append(save_figure(folder, "radar", _radar(shown, axes), words))
        if planes:
            words = "Quality against cost. Filled: on the Pareto front, the dotted line; hollow: dominated, another is "
            words += "at least as good in both and better in one. By the values alone, without their intervals"
            sides = [(", ".join(plane.front), ", ".join(plane.dominated) or MISSING) for plane in planes]
            rows = [[heading(plane.quality), plane.cost, *side] for plane, side in zip(planes, sides)]
            table = Table(["Quality", "Cost", "On the Pareto front", "Dominated"], rows)
            parts += [save_figure(folder, "pareto", _pareto(shown, planes), words), table]
    return parts


def _radar(shown: Sequence[RunSummary], axes: Sequence[Axis]) -> Figure:
    """One large radar with all runs, and a small one for each, as many lines hide each other."""
    from matplotlib.figure import Figure

    rows = max(2, -(-len(shown) // ACROSS))
    figure = Figure(figsize=(WIDTH, max(4.6, 1.35 * rows + 0.4)), layout="constrained", facecolor="white")
    grid = figure.add_gridspec(rows, ACROSS + 1, width_ratios=[4.2, *[1] * ACROSS])
    large, looks = _polar(figure, grid[:, 0], axes), styles(shown)
    for i, look in enumerate(looks):
        _shape(large, axes, i, look["color"], look["marker"])
    large.tick_params(axis="x", pad=4)
    ends = [(axis.words, *sorted(zip(axis.shares, column_texts(axis.values)))) for axis in axes]  # worst to best
    names = [f"{words}\n{worst} to {most}" for words, (_, worst), *_, (_, most) in ends]
    for angle, label in zip(_angles(axes), large.set_xticklabels(names, fontsize=7.5)):
        side = math.sin(angle)  # words begin at the ring on the right, and end there on the left
        label.set_horizontalalignment("center" if abs(side) < 0.3 else "left" if side > 0 else "right")
    for i, run in enumerate(shown):
        small = _polar(figure, grid[i // ACROSS, 1 + i % ACROSS], axes)
        _shape(small, axes, i, looks[i]["color"])
        small.set_title(fit(run.name, 16), fontsize=8, loc="center")
    legend(figure, shown, range(len(shown)), 4)
    return figure


def _polar(figure: Figure, place: SubplotSpec, axes: Sequence[Axis]) -> PolarAxes:
    """Empty polar axes, the first measure on top, the others clockwise."""
    polar = cast("PolarAxes", figure.add_subplot(place, projection="polar"))
    polar.set_theta_zero_location("N")
    polar.set_theta_direction(-1)
    polar.set_ylim(0, 1)
    polar.set_yticks([INNER, 1], [])
    polar.set_xticks(_angles(axes), [])
    polar.spines["polar"].set_visible(False)
    return polar


def _shape(polar: Axes, axes: Sequence[Axis], run: int, colour: str, marker: str = "") -> None:
    """A run's closed line with markers; without, the area inside it."""
    angles = _angles(axes)
    radii = [INNER + (1 - INNER) * axis.shares[run] for axis in axes]
    look: Any = {"color": colour, "linewidth": 1.6 if marker else 1.4, "marker": marker, "markersize": 4}
    polar.plot([*angles, angles[0]], [*radii, radii[0]], clip_on=False, zorder=3, **look)
    if not marker:
        polar.fill(angles, radii, color=colour, alpha=0.25, zorder=2.5)


def _angles(axes: Sequence[Axis]) -> list[float]:
    return [2 * math.pi * i / len(axes) for i in range(len(axes))]


def _pareto(shown: Sequence[RunSummary], planes: Sequence[Front]) -> Figure:
    """A row of panels for each quality, a column for each cost."""
    costs = list(dict.fromkeys(plane.cost for plane in planes))
    qualities = list(dict.fromkeys(plane.quality for plane in planes))
    figure, panels = make_panels(len(costs) * len(qualities), len(costs), height=2.4, above=0.5)
    places = dict(zip(product(qualities, costs), panels))
    for plane in planes:
        axes = places.pop((plane.quality, plane.cost))
        front = zip(*sorted(plane.points[name] for name in plane.front))
        axes.plot(*front, color=SOFT, linewidth=1, linestyle=":", zorder=2)
        for run, look in zip(shown, styles(shown)):
            if run.name in plane.points:
                hollow = {"markerfacecolor": "white"} if run.name in plane.dominated else {"markeredgecolor": INK}
                axes.plot(*([x] for x in plane.points[run.name]), zorder=3, **{**look, "markersize": 7, **hollow})
        log_axes(axes, *zip(*plane.points.values()))
        axes.set_title(heading(plane.quality))
        if plane.quality == qualities[-1]:
            axes.set_xlabel(f"{plane.cost}\nlog")
    for empty in places.values():
        empty.set_axis_off()
    there = [i for i, run in enumerate(shown) if any(run.name in plane.points for plane in planes)]
    legend(figure, shown, there, 4)
    return figure
