"""The figures of a comparison: bars of every metric, curves over noise, quality against speed; as SVG and as PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latelier.evaluation.metrics import heading, unit
from latelier.publish import write_whole
from latelier.report import tables
from latelier.report.page import INK, LINE, LOG_RATIO, SOFT, column_texts, number, short
from latelier.report.tables import Curves, RunSummary, best, interval, value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8a8a8a", "#5b4a8a")  # Okabe & Ito 2008
MARKERS = "osD^vPX"
MAP, CHANNELS, ERRORS, SPECTRUM = "latent-map.png", "channels.png", "error-map.png", "spectrum.png"  # files of a run
WIDTH = 9.0  # inches, 900 px at 100 dpi
FLAT = 0.3  # levels up to here are what the areas under the curves are taken over
STYLE: Any = {
    "font.size": 8.5, "axes.edgecolor": LINE, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlesize": 9, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.labelcolor": SOFT,
    "xtick.color": LINE, "ytick.color": LINE, "ytick.labelcolor": INK, "xtick.labelcolor": SOFT,
    "xtick.labelsize": 8, "text.parse_math": False, "svg.hashsalt": "latelier",
    "axes.axisbelow": True, "grid.color": LINE, "grid.linewidth": 0.7,
}  # fmt: skip


@dataclass
class ImageFile:
    """An image below a heading."""

    png: Path  # on the page
    link: str  # of Markdown
    words: str
    figure: bool  # whether it may change colours with the page's scheme


def draw_figures(folder: Path, shown: Sequence[RunSummary], columns: Sequence[str]) -> list[ImageFile]:
    """Draw what there is to draw, as SVG for docs and as PNG."""
    from matplotlib import rc_context

    there = [name for name in columns if any(value(run, name) is not None for run in shown)]
    parts, save = [], partial(save_figure, folder)
    with rc_context(STYLE):
        if there:
            words = "Every metric of every run; lines are 95 % intervals"
            parts.append(save("overview", _overview(shown, there), words))
        if curves := _noise_curves(shown):
            figure = _lines(shown, curves, _dress_noise, most=3, height=2.7, across=2 * max(2, min(3, len(curves))))
            figure.supxlabel("noise level, standard deviations of each latent channel", fontsize=8.5, color=SOFT)
            words = f"Quality of images decoded from noisy latents; the shaded levels, up to {FLAT}, make the mean"
            parts.append(save("smoothness", figure, words))
        if mixtures := tables.read_curves(shown, tables.MIXTURE):  # MAETok (Chen et al. 2025), section 3
            words = "GMM negative log-likelihood of held-out latents against the number of modes"
            parts.append(save("modes", _lines(shown, mixtures, _dress_modes), words))
        if lines := _trade_offs(shown):  # Rombach et al. 2022, figure 7
            words = "Quality against the speed of sampling; at each point stands the number of sampling steps"
            figure = _lines(shown, lines, partial(_dress_speed, words="samples"), height=3.6, across=6)
            parts.append(save("sampling", figure, words))
        if speeds := _trained(shown):  # Rombach et al. 2022, figures 5 and 6, at one length of training
            words = "Quality against the speed of the denoiser's training"
            figure = _lines(shown, speeds, partial(_dress_speed, words="training images"), height=3.0, across=0)
            parts.append(save("training", figure, words))
    return parts


def draw_convergence(folder: Path, shown: Sequence[RunSummary], curves: Curves) -> ImageFile:
    """Quality over images seen (DC-AE 1.5, Chen et al. 2025, figure 1): a line for each run, a point a snapshot."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        drawn = {name: runs for name, runs in curves.items() if runs}
        figure = _lines(shown, drawn, _dress_convergence, above=0.6, across=3)
        words = "Quality of the averaged weights over images seen in the denoiser's training"
        return save_figure(folder, "convergence", figure, words)


def draw_spectrum(folder: Path, about: Mapping[str, Any]) -> None:
    """Spectra of latents and of images of the same size, by the receipt of `high-frequency`: one point each u + v (the
    figure of Skorokhodov et al. 2025). Latents that lie above the images have more fine detail than pixels have.
    """
    from matplotlib import rc_context
    from matplotlib.ticker import MaxNLocator

    lines = {"latents": ("log_spectrum", COLOURS[0], "o"), "images": ("image_log_spectrum", COLOURS[1], "s")}
    with rc_context(STYLE):
        figure, (axes,) = make_panels(1, 1, height=3.4)
        for words, (name, colour, marker) in lines.items():
            if points := about.get(name):
                axes.plot(*zip(*points), color=colour, marker=marker, markersize=4, linewidth=1.6, label=words)
        quiet(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title("Energy of the discrete cosine transform, dB relative to the lowest frequency")
        axes.set_xlabel(f"frequency u + v, on a grid of {' x '.join(map(str, about.get('grid') or ()))}")
        axes.legend(frameon=False, fontsize=8.5)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=200)
    write_whole(folder / SPECTRUM, stream.getvalue())


def save_figure(folder: Path, name: str, figure: Figure, words: str) -> ImageFile:
    """Save a figure as SVG and as PNG; `words` stand below it, without a full stop."""
    for kind in ("svg", "png"):
        stream = io.BytesIO()
        figure.savefig(stream, format=kind, dpi=200, metadata={"Date": None} if kind == "svg" else None)
        write_whole(folder / f"{name}.{kind}", stream.getvalue())
    return ImageFile(folder / f"{name}.png", f"{name}.svg", words, figure=True)


def _overview(shown: Sequence[RunSummary], columns: Sequence[str]) -> Figure:
    """Horizontal bars, one panel for each metric, the runs in the same order and colours everywhere."""
    figure, panels = make_panels(len(columns), 4, height=0.55 + 0.24 * len(shown))
    for i, (name, axes) in enumerate(zip(columns, panels)):
        _bars(axes, shown, name)
        axes.set_yticks(range(len(shown)), [fit(run.name) for run in shown] if i % 4 == 0 else [])
    return figure


def _bars(axes: Axes, shown: Sequence[RunSummary], name: str) -> None:
    values = [value(run, name) for run in shown]
    winners, words = best(values, name), column_texts(values)
    ends = [interval(run, name) if v is not None else None for run, v in zip(shown, values)]
    reach = [max(0.0, v or 0.0, *(e or ())) for v, e in zip(values, ends)]
    low = min(min(0.0, v or 0.0, *(e or ())) for v, e in zip(values, ends))
    span = (max(reach) - low) or 1.0
    for i, (v, colour) in enumerate(zip(values, cycle(COLOURS))):
        if v is not None:
            axes.barh(i, v, color=colour, height=0.62)
        if e := ends[i]:
            axes.plot(e, (i, i), color=INK, linewidth=1.1)
        weight = "bold" if i in winners else "normal"
        axes.text(reach[i] + span * 0.04, i, words[i], va="center", fontsize=8, fontweight=weight)
    axes.set_xlim(low * 1.05, max(reach) + span * 0.42)  # room for the values
    axes.set_ylim(len(shown) - 0.45, -0.55)  # the first run on top
    axes.set_title(heading(name))
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    axes.spines[["bottom", "left"]].set_visible(False)
    axes.axvline(0, color=LINE, linewidth=0.8)


def _lines(
    shown: Sequence[RunSummary], curves: Mapping[str, Mapping[int, Sequence[Any]]],
    dress: Callable[[Axes, str, list[tuple]], None], most: int = 2, height: float = 3.2, above: float = 0.4,
    across: int = 4,
) -> Figure:  # fmt: skip
    """One panel for each metric, one line for each run; a third entry of a point is a note above it.

    `dress(axes, metric, points)` sets scales and words; `above` inches are for the legend of `across` columns, 0: none.
    """
    figure, panels = make_panels(len(curves), most, height, above * bool(across))
    looks = styles(shown)
    for (name, runs), axes in zip(curves.items(), panels):
        for i, points in runs.items():
            axes.plot([x for x, *_ in points], [y for _, y, *_ in points], zorder=3, clip_on=False, **looks[i])
            for x, y, *notes in points:
                for note in map(str, notes):
                    axes.annotate(note, (x, y), (0, 5), textcoords="offset points", ha="center", fontsize=7, color=SOFT)
        axes.set_title(heading(name))
        quiet(axes)
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        dress(axes, name, [point for points in runs.values() for point in points])
    if across:
        legend(figure, shown, [i for i in range(len(shown)) if any(i in runs for runs in curves.values())], across)
    return figure


def _dress_noise(axes: Axes, name: str, points: list[tuple]) -> None:
    """The square root of a level has a zero, and room for small ones."""
    heights = [y for _, y in points]
    logarithmic = min(heights) > 0 and max(heights) / min(heights) > LOG_RATIO
    axes.set_yscale("log" if logarithmic else "linear")
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_title(f"{heading(name.removeprefix('smoothness-'))}{' · log' if logarithmic else ''}")
    axes.grid(visible=False, axis="x")
    levels = sorted({x for x, _ in points})
    last = max(levels[-1], 1e-6)
    kept: list[float] = []  # ticks, as far as their numbers do not touch; these three come first
    for level in sorted(levels, key=lambda x: (x not in (0, FLAT, last), x)):
        if all(abs(math.sqrt(level / last) - math.sqrt(other / last)) > 0.11 for other in kept):
            kept.append(level)
    axes.set_xscale("function", functions=(lambda x: abs(x) ** 0.5, lambda x: x**2))
    axes.set_xlim(0, last)
    axes.set_xticks(kept, [f"{level:g}" for level in kept])
    axes.minorticks_off()
    axes.axvspan(0, min(FLAT, last), color="#f1f1ee", zorder=0)


def _dress_modes(axes: Axes, name: str, points: list[tuple]) -> None:
    axes.set_xscale("log")
    ticks = sorted({modes for modes, _ in points})
    axes.set_xticks(ticks, [f"{modes:g}" for modes in ticks])
    axes.minorticks_off()
    axes.set_title(f"GMM negative log-likelihood against the number of modes{heading(name).removeprefix(name)}")
    axes.set_xlabel("modes · log")
    axes.set_ylabel(unit(name) or "")


def _dress_speed(axes: Axes, name: str, points: list[tuple], words: str) -> None:
    log_axes(axes, [x for x, *_ in points], [y for _, y, *_ in points])
    axes.set_xlabel(f"{words} per second · log")


def _dress_convergence(axes: Axes, name: str, points: list[tuple]) -> None:
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda images, _: short(images))
    axes.set_title(heading(name).removeprefix(tables.CONVERGENCE))
    axes.set_xlabel("images seen")


def _noise_curves(shown: Sequence[RunSummary]) -> dict[str, dict[int, list[Any]]]:
    """(noise level, value), ascending, by metric and the run's position; without those that have none."""

    def points(run: RunSummary, name: str) -> list[tuple[float, float]]:
        curve = (run.metrics.get(name, {}).get("receipt") or {}).get("curve") or []
        return sorted((float(x), float(y)) for x, y in curve if number(x) is not None and number(y) is not None)

    names = dict.fromkeys(name for run in shown for name in run.metrics if name.startswith("smoothness-"))
    return tables.by_run(shown, {name: name for name in names}, points)


def _trade_offs(shown: Sequence[RunSummary]) -> dict[str, dict[int, list[Any]]]:
    """(samples per second, Fréchet distance, steps), ascending in steps, by distance and the run's position."""

    def points(run: RunSummary, name: str) -> list[tuple[float, float, int]]:
        steps = name.partition("@")[2]
        speed, quality = value(run, f"{tables.SAMPLING_SPEED}@{steps}"), value(run, name)
        return [(speed, quality, int(steps))] if speed and speed > 0 and quality is not None else []

    return tables.by_run(shown, {name: name.partition("@")[0] for name in tables.at_steps(shown, "gfd")}, points)


def _trained(shown: Sequence[RunSummary]) -> dict[str, dict[int, list[Any]]]:
    """(training images per second, Fréchet distance, run) by distance and the run's position.

    The distance is that of the recipe's own sampling steps; where no run has it, that of the most steps measured.
    """

    def points(run: RunSummary, name: str) -> list[tuple[float, float, str]]:
        speed, quality = number(run.facts.get(tables.TRAINING_SPEED)), value(run, name)
        return [(speed, quality, fit(run.name))] if speed and speed > 0 and quality is not None else []

    names = dict.fromkeys(name for run in shown for name in run.metrics if name.startswith("gfd"))
    chosen = {name.partition("@")[0]: name for name in tables.at_steps(shown, "gfd")}  # the last has the most steps
    chosen |= {name: name for name in names if "@" not in name}
    return tables.by_run(shown, {name: name for name in chosen.values()}, points)


def log_axes(axes: Axes, speeds: Sequence[float], heights: Sequence[float]) -> None:
    """Speeds are logarithmic; so are heights that differ much."""
    from matplotlib.ticker import LogLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if max(speeds) / min(speeds) > 1000 else (1.0, 2.0, 5.0)))
    axes.set_xlim(min(speeds) / 1.25, max(speeds) * 1.25)
    if min(heights) > 0 and max(heights) / min(heights) > LOG_RATIO:
        axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda number, _: f"{number:g}")
        axis.set_minor_formatter("")
    axes.margins(y=0.12)
    quiet(axes)


def quiet(axes: Axes) -> None:
    """A grid without ticks."""
    axes.grid()
    axes.tick_params(which="both", length=0)
    axes.tick_params(axis="y", labelcolor=SOFT)


def styles(shown: Sequence[RunSummary]) -> list[dict[str, Any]]:
    """Colour and marker of each run."""
    looks = zip(shown, cycle(COLOURS), cycle(MARKERS))
    return [{"color": colour, "marker": mark, "linewidth": 1.6, "markersize": 4} for _, colour, mark in looks]


def legend(figure: Figure, shown: Sequence[RunSummary], there: Sequence[int], across: int) -> None:
    """Names of the runs at these positions, above all panels."""
    from matplotlib.lines import Line2D

    lines, looks = [Line2D([], [], **look) for look in styles(shown)], {"frameon": False, "fontsize": 8.5}
    names = [fit(shown[i].name) for i in there]
    figure.legend([lines[i] for i in there], names, loc="outside upper left", ncols=across, **looks)


def make_panels(count: int, most: int, height: float, above: float = 0.0) -> tuple[Figure, list[Axes]]:
    """A figure as wide as the page, or less for few panels, and its panels, row by row, at most `most` in a row."""
    from matplotlib.figure import Figure

    across, down = min(most, count), -(-count // most)
    size = (WIDTH * min(max(across, 2), most) / most, down * height + above)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for spare in panels[count:]:
        spare.set_axis_off()
    return figure, panels


def fit(name: str, most: int = 22) -> str:
    """A name, cut to at most `most` letters."""
    return name if len(name) <= most else f"{name[: most - 1]}…"
