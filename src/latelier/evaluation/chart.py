"""Charts as SVG text: a line over some quantity, or a bar for each channel, in colours of the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from statistics import median

WIDTH, HEIGHT = 340, 168
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 22
MOST_POINTS = 400
LOG_RATIO = 20  # above this ratio of largest to smallest value the axis is logarithmic
OUTLIER = 3  # times the median: a bar of another colour

Number = float | int
Points = Sequence[tuple[Number, Number]]


def line_chart(title: str, points: Points, smooth: bool = True, over: str = "images seen") -> str:
    """A figure with one line.

    Args:
        title: what is drawn.
        points: (x, value), ascending; values that are not finite are left out.
        smooth: draw a moving average over the raw values.
        over: what x is, for those who hear the page.

    Returns:
        HTML of the figure, empty if there is no finite value.
    """
    points = subsample([(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)])
    if not points:
        return ""
    values = [y for _, y in points]
    smoothed = average(values) if smooth and len(values) > 20 else None
    logarithmic = min(values) > 0 and max(values) / min(values) > LOG_RATIO
    x_ticks = ticks(0, max(x for x, _ in points), 4)
    low, high = min(values), max(values)
    y_ticks = log_ticks(low, high) if logarithmic else ticks(low, high, 4)
    place = _Scale((0, max(x_ticks[-1], points[-1][0])), (min(low, *y_ticks), max(high, *y_ticks)), logarithmic)
    parts = [_grid(place, x_ticks, y_ticks)]
    if len(points) == 1:
        parts.append(f'<circle class="dot" cx="{place.x(points[0][0]):.1f}" cy="{place.y(values[0]):.1f}" r="3"/>')
    elif smoothed is None:
        parts.append(_path("smooth", place, points))
    else:
        parts.append(_path("raw", place, points))
        parts.append(_path("smooth", place, [(x, y) for (x, _), y in zip(points, smoothed)]))
    last = (smoothed or values)[-1]
    label = f"{title} over {over}, last value {short(last)}"
    return (
        f'<figure class="chart card"><figcaption><b>{escape(title)}</b><span>{short(last)}'
        f"{' · log' if logarithmic else ''}</span></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg></figure>'
    )


def bar_chart(title: str, values: Sequence[Number], over: str) -> str:
    """A figure with a bar for each value, a line at their median, and another colour for what is 3 times as high.

    Args:
        title: what is drawn.
        values: heights, 0 or more; those that are not finite have no bar.
        over: what is counted from left to right: `channel`.

    Returns:
        HTML of the figure, empty if there is no finite value.
    """
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return ""
    middle, y_ticks = median(finite), ticks(0, max(*finite, 1e-12), 4)
    place = _Scale((-0.5, len(values) - 0.5), (0, y_ticks[-1]), False)
    wide = max(0.5, 0.8 * (WIDTH - LEFT - RIGHT) / len(values))
    bars = "".join(
        f'<rect class="{"outlier" if v > OUTLIER * middle else "bar"}" x="{place.x(i) - wide / 2:.1f}" '
        f'y="{place.y(max(0, v)):.1f}" width="{wide:.1f}" height="{max(0.0, place.y(0) - place.y(max(0, v))):.1f}">'
        f"<title>{over} {i}: {short(v)}</title></rect>"
        for i, v in enumerate(values)
        if math.isfinite(v)
    )
    line = (
        f'<line class="median" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place.y(middle):.1f}" y2="{place.y(middle):.1f}"/>'
    )
    numbers = [i for i in ticks(0, len(values) - 1, 4) if i <= len(values) - 1 and i == int(i)]
    label = f"{title} of {len(values)} {over}s, median {short(middle)}, largest {short(max(finite))}"
    return (
        f'<figure class="chart card"><figcaption><b>{escape(title)}</b><span>median {short(middle)}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{_grid(place, numbers, y_ticks)}{bars}{line}</svg></figure>"
    )


def short(value: Number) -> str:
    """A number in four significant digits with a unit: 1.5M, 64k, 0.0321, 2e-05."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            scale = 1e3 if unit == "k" else limit
            return f"{value / scale:.4g}{unit}"
    return f"{value:.4g}"


def subsample(points: Points) -> list[tuple[Number, Number]]:
    """At most `MOST_POINTS` points: means of neighbours."""
    size = -(-len(points) // MOST_POINTS)
    if size <= 1:
        return list(points)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def average(values: Sequence[Number]) -> list[float]:
    """Mean over a centred window of a twentieth of the values, narrower at the beginning, where curves are steep."""
    half = max(1, len(values) // 40)
    windows = (values[max(0, i - min(i, half)) : i + min(i, half) + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def ticks(low: Number, high: Number, count: int) -> list[Number]:
    """About `count` round numbers that span low to high."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next((m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw), 10 * power)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: Number, high: Number) -> list[Number]:
    """Powers of ten in range, thinned to about five."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    step = max(1, round((last - first) / 5))
    return [10.0**i for i in range(first, last + 1, step)]


class _Scale:
    """From values to places in the image."""

    def __init__(self, xs: tuple[Number, Number], ys: tuple[Number, Number], logarithmic: bool):
        self._map = math.log10 if logarithmic else float
        self._xs = xs
        self._ys = (self._map(ys[0]), self._map(ys[1]))

    def x(self, value: Number) -> float:
        low, high = self._xs
        share = (value - low) / (high - low) if high > low else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: Number) -> float:
        low, high = self._ys
        share = (self._map(value) - low) / (high - low) if high > low else 0.5
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _grid(place: _Scale, x_ticks: Sequence[Number], y_ticks: Sequence[Number]) -> str:
    parts = []
    for value in y_ticks:
        y = place.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>')
    for value in x_ticks:
        anchor = "end" if place.x(value) > WIDTH - RIGHT - 12 else "middle"
        parts.append(f'<text x="{place.x(value):.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{short(value)}</text>')
    return "".join(parts)


def _path(style: str, place: _Scale, points: Points) -> str:
    steps = " ".join(f"{place.x(x):.1f},{place.y(y):.1f}" for x, y in points)
    return f'<polyline class="{style}" points="{steps}"/>'
