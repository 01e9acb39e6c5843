"""What every page is made of: Jinja2 templates, numbers in words, small charts.

A page is one HTML file with everything inside: nothing is fetched. Templates escape all that is put into them.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MISSING = "–"
INK, SOFT, LINE, ACCENT, BAD = "#1d1f23", "#5f6570", "#e2e2de", "#2563c9", "#b3261e"  # of style.css, in light
PAGE_COLOURS = {ACCENT: "--accent", BAD: "--bad", SOFT: "--soft", LINE: "--line"}  # follow light and dark
MOST_POINTS = 400  # of a chart
LOG_RATIO = 20  # above this ratio of largest to smallest value an axis is logarithmic
ROUND = (1, 2, 2.5, 5, 10)  # steps between ticks, times a power of ten
OUTLIER = 3  # times the median: a bar of another colour

Number = float | int
Points = Sequence[tuple[Number, Number]]


def render(template: str, **context: Any) -> str:
    """The text of a template, with these names in it."""
    return _environment().get_template(template).render(context)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    options: Any = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=PackageLoader("latelier.report"), autoescape=True, **options)
    environment.filters |= {"at_a_glance": at_a_glance, "in_words": in_words, "literal": _literal, "short": short}
    environment.filters["data_uri"] = lambda png: f"data:image/png;base64,{base64.b64encode(png.read_bytes()).decode()}"
    environment.filters["anchor"] = lambda title: re.sub(r"[^a-z]+", "-", title.lower())  # where links to headings lead
    return environment


def _literal(text: str) -> Markup:
    """Words in which nothing is Markdown or HTML, in one line."""
    from markupsafe import Markup

    return Markup(re.sub(r"([\\`*_\[\]|])", r"\\\1", escape(" ".join(text.split()), quote=False)))


def number(content: Any) -> float | None:
    """A finite number; None for anything else."""
    right = isinstance(content, int | float) and not isinstance(content, bool) and math.isfinite(content)
    return float(content) if right else None


def digits(value: Any) -> str:
    """Four significant digits, never in powers of ten for everyday sizes."""
    if not isinstance(value, int | float):
        return MISSING if value is None else str(value)
    if not math.isfinite(value) or value == 0 or not 1e-4 <= abs(value) < 1e7:
        return f"{value:.4g}"
    return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def short(value: Number) -> str:
    """At most four significant digits, with a unit where it is large: 1.5M, 64k, 0.0321, 2e-05."""
    for limit, scale, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            return f"{value / scale:.4g}{unit}"
    return f"{value:.4g}"


def at_a_glance(value: Number) -> str:
    """A number for a glance: 23M, 10, 0.4650."""
    if abs(value) >= 1e4:
        return short(value)
    return f"{value:.0f}" if value == round(value) else digits(value)


def in_words(value: Any) -> str:
    """Any value of a receipt as plain text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {in_words(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        between = " x " if all(isinstance(v, int) for v in value) else ", "
        return between.join(map(in_words, value))
    return "none" if value is None else str(value)


def column_texts(values: Sequence[float | None], like: Sequence[float | None] | None = None) -> list[str]:
    """Numbers with equally many decimals: four digits of the largest of `like`, five if others are far smaller."""
    sizes = [abs(v) for v in (values if like is None else like) if v]
    if sizes and not 1e-3 <= max(sizes) < 1e4:
        return [MISSING if v is None else short(v) for v in values]
    most = math.floor(math.log10(max(sizes))) if sizes else 3
    decimals = 3 - most + (bool(sizes) and math.floor(math.log10(min(sizes))) < most - 1)
    return [MISSING if v is None else f"{v:.{decimals}f}" for v in values]


@dataclass
class Chart:
    """A small chart inside a page, in the colours of its style sheet."""

    title: str
    note: str  # the number that counts, in words
    svg: str


def line_chart(title: str, points: Points, smooth: bool = True, over: str = "images seen") -> Chart | None:
    """One line through (x, value), ascending, perhaps with a moving average; None if there is no finite value."""
    points = subsample([(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)])
    if not points:
        return None
    xs, ys = zip(*points)
    smoothed = average(ys) if smooth and len(ys) > 20 else None
    logarithmic = min(ys) > 0 and max(ys) / min(ys) > LOG_RATIO
    figure, axes = _small_axes()
    if smoothed:
        axes.plot(xs, ys, color=ACCENT, alpha=0.27, linewidth=0.8, clip_on=False)
    marker = "o" if len(points) == 1 else ""
    axes.plot(xs, smoothed or ys, color=ACCENT, linewidth=1.5, marker=marker, markersize=4, clip_on=False)
    _small_ticks(axes, (0, max(xs)), (min(ys), max(ys)), logarithmic)
    last = short((smoothed or ys)[-1])
    svg = _inline(figure, f"{title} over {over}, last value {last}")
    return Chart(title, f"{last}{' · log' if logarithmic else ''}", svg)


def bar_chart(title: str, values: Sequence[Number], over: str) -> Chart | None:
    """A bar for each value, another colour above 3 times the median, a line at the median; None if all are NaN."""
    finite = {i: v for i, v in enumerate(values) if math.isfinite(v)}
    if not finite:
        return None
    middle = median(finite.values())
    figure, axes = _small_axes()
    for i, v in finite.items():
        (bar,) = axes.bar(i, max(0, v), 0.8, color=BAD if v > OUTLIER * middle else ACCENT, clip_on=False)
        bar.set_gid(f"{over} {i}: {short(v)}")
    axes.axhline(middle, color=SOFT, linewidth=0.8, linestyle=(0, (3, 3)), clip_on=False)
    _small_ticks(axes, (0, len(values) - 1), (0, max(*finite.values(), 1e-12)), False)
    axes.set_xlim(-0.5, len(values) - 0.5)
    words = f"{title} of {len(values)} {over}s, median {short(middle)}, largest {short(max(finite.values()))}"
    return Chart(title, f"median {short(middle)}", _inline(figure, words))


def subsample(points: Points) -> list[tuple[Number, Number]]:
    """At most `MOST_POINTS` points: means of neighbours."""
    size = -(-len(points) // MOST_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size or 1)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def average(values: Sequence[Number]) -> list[float]:
    """Mean over a centred window of a twentieth of the values, narrower at the beginning, where curves are steep."""
    half = max(1, len(values) // 40)
    windows = (values[max(0, i - min(i, half)) : i + min(i, half) + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _small_axes() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4, 1.68))
    axes = figure.add_axes((0.135, 0.14, 0.835, 0.81))
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    return figure, axes


def _small_ticks(axes: Axes, xs: tuple[Number, Number], ys: tuple[Number, Number], logarithmic: bool) -> None:
    """About five round numbers on each side, a line for those of the left one; limits that hold them and the data."""
    from matplotlib.ticker import MaxNLocator

    heights = [float(tick) for tick in MaxNLocator(4, steps=ROUND).tick_values(*ys)]
    if logarithmic:
        axes.set_yscale("log")
        first, last = math.floor(math.log10(ys[0])), math.ceil(math.log10(ys[1]))
        heights = [10.0**power for power in range(first, last + 1, max(1, round((last - first) / 5)))]
    ticks = MaxNLocator(4, steps=ROUND, integer=xs[1] > 3).tick_values(*xs)
    places = [float(tick) for tick in ticks if xs[0] <= tick <= xs[1] * 1.001]
    axes.set_xlim(0, max(xs[1], 1e-9))
    axes.set_ylim(min(ys[0], *heights), max(ys[1], *heights))
    axes.minorticks_off()
    axes.set_xticks(places, [short(tick) for tick in places], color=SOFT, fontsize=8)
    axes.set_yticks(heights, [short(tick) for tick in heights], color=SOFT, fontsize=8)
    axes.tick_params(length=0, pad=4)
    for height in heights:
        axes.axhline(height, color=LINE, linewidth=0.75, clip_on=False, zorder=0)


def _inline(figure: Figure, words: str) -> str:
    """A figure as an `<svg>` element: text stays text, colours are the page's, so that they follow its scheme.

    Ids of artists become titles, which browsers show below the pointer; all other ids that nothing refers to go.
    """
    from matplotlib import rc_context

    stream = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "latelier", "text.parse_math": False}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|\n\s*", "", stream.getvalue(), flags=re.DOTALL)
    svg = re.sub(r'<g id="([^"]*: [^"]*)">', r"<g><title>\1</title>", svg)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg[svg.index("<svg") :])
    for colour, variable in PAGE_COLOURS.items():
        svg = svg.replace(colour, f"var({variable})")
    view = re.findall(r'viewBox="[^"]*"', svg)[0]
    return f'<svg {view} role="img" aria-label="{escape(words)}">{svg[svg.index(">") + 1 :]}'
