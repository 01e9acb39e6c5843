"""Several runs side by side: tables, orderings, figures and pictures, as Markdown for docs and as one HTML page.

Both texts are written from the same sections, so they cannot say different things. Nothing is chosen for effect: every
column asked for is shown, and the orderings say where a paper's order came out otherwise.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

from latelier.errors import LatelierError
from latelier.evaluation.chart import LOG_RATIO
from latelier.evaluation.orderings import (
    Ordering,
    Published,
    Shown,
    Table,
    best,
    better,
    costs,
    heading,
    interval,
    measured,
    number,
    orderings,
    printed,
    receipts,
    texts,
    value,
    verdicts,
)
from latelier.evaluation.report import inline_image, page
from latelier.images import GAP_COLOUR, save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Published", "Shown", "write_comparison"]

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8a8a8a", "#5b4a8a")  # Okabe & Ito 2008
MARKERS = "osD^vPX"
INK, SOFT, LINE = "#1d1f23", "#5f6570", "#e2e2de"  # of the page
WIDTH = 9.0  # inches, 900 px at 100 dpi
FLAT = 0.3  # levels up to here are what the areas under the curves are taken over
PICTURE_HEIGHT, PICTURE_WIDTH, NAME_HEIGHT = 300, 1100, 26

DARK = "@media (prefers-color-scheme: dark) { .figure img { filter: invert(.89) hue-rotate(180deg); } }"
STYLE = (
    f"<style>.card, .figure, .picture {{ margin-bottom: 10px; }} th.number {{ white-space: normal; }} {DARK}</style>"
)


@dataclass
class Picture:
    """A PNG for the page, and the file that Markdown links to; figures may change colours with the page's scheme."""

    png: Path
    link: str
    words: str
    figure: bool


@dataclass
class Section:
    """A heading and what stands below it: paragraphs, tables, pictures."""

    title: str
    parts: Sequence[str | Table | Picture]


def write_comparison(
    folder: Path,
    title: str,
    about: str,
    shown: list[Shown],
    columns: Mapping[str, Sequence[str]],
    published: Published | None,
) -> Path:
    """Write `table.md`, `comparison.html`, `comparison.json`, figures and pictures into a folder.

    Args:
        folder: made if missing.
        title: a heading.
        about: what was compared, plain text; blank lines divide paragraphs.
        shown: the runs, in the order in which they are shown everywhere.
        columns: metric names of each table, by its title; the overview has all of them, in this order.
        published: what a paper printed, to compare orders with.

    Returns:
        The path of `comparison.html`.

    Raises:
        LatelierError: if there is no run, or two of the same name.
    """
    names = [run.name for run in shown]
    if not shown or len(set(names)) < len(names):
        raise LatelierError(f"A comparison needs runs of different names, not {names}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    every = list(dict.fromkeys(name for names in columns.values() for name in names))
    orders = orderings(shown, published, every) if published else []
    sections = [
        *(Section(name, measured(shown, names)[:1]) for name, names in columns.items() if names),
        Section("How to read the tables", measured(shown, every)[1:]),
        Section("Published", printed(shown, published) if published else []),
        Section("Orderings", verdicts(orders, published) if published else []),
        Section("What each run took", costs(shown)),
        Section("Figures", _figures(folder, shown, every)),
        Section("Pictures", _pictures(folder, shown)),
        Section("Receipt", receipts(shown, every)),
    ]
    sections = [section for section in sections if section.parts]
    _write(folder / "comparison.json", _json(title, about, shown, every, published, orders))
    _write(folder / "table.md", _markdown(title, about, sections).encode())
    return _write(folder / "comparison.html", _html(title, about, sections).encode())


# -- figures ----------------------------------------------------------------------------------------------------------


def _figures(folder: Path, shown: Sequence[Shown], columns: Sequence[str]) -> list[Picture]:
    """Draw what there is to draw, as SVG for docs and as PNG."""
    from matplotlib import rc_context

    settings: Any = {
        "font.size": 8.5, "axes.edgecolor": LINE, "axes.spines.top": False, "axes.spines.right": False,
        "axes.titlesize": 9, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.labelcolor": SOFT,
        "xtick.color": LINE, "ytick.color": LINE, "ytick.labelcolor": INK, "xtick.labelcolor": SOFT,
        "xtick.labelsize": 8, "text.parse_math": False, "svg.hashsalt": "latelier",
        "axes.axisbelow": True, "grid.color": LINE, "grid.linewidth": 0.7,
    }  # fmt: skip
    there = [name for name in columns if any(value(run, name) is not None for run in shown)]
    curves = {name: found for name in _smoothness(shown) if (found := _curves(shown, name))}
    parts: list[Picture] = []
    with rc_context(settings):
        if there:
            words = "Every metric of every run; lines are 95 % intervals"
            parts.append(_save(folder, "overview", _overview(shown, there), words))
        if curves:
            words = f"Quality of pictures decoded from noisy latents; the shaded levels, up to {FLAT}, make the mean"
            parts.append(_save(folder, "smoothness", _smooth(shown, curves), words))
    return parts


def _save(folder: Path, name: str, figure: Figure, words: str) -> Picture:
    for kind in ("svg", "png"):
        stream = io.BytesIO()
        figure.savefig(stream, format=kind, dpi=200, metadata={"Date": None} if kind == "svg" else None)
        _write(folder / f"{name}.{kind}", stream.getvalue())
    return Picture(folder / f"{name}.png", f"{name}.svg", words, figure=True)


def _overview(shown: Sequence[Shown], columns: Sequence[str]) -> Figure:
    """Horizontal bars, one panel for each metric, the runs in the same order and colours everywhere."""
    figure, panels = _panels(len(columns), 4, height=0.55 + 0.24 * len(shown))
    for i, (name, axes) in enumerate(zip(columns, panels)):
        _bars(axes, shown, name)
        axes.set_yticks(range(len(shown)), [_fit(run.name) for run in shown] if i % 4 == 0 else [])
    return figure


def _bars(axes: Axes, shown: Sequence[Shown], name: str) -> None:
    values = [value(run, name) for run in shown]
    winners, words = best(values, name), texts(values)
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


def _smoothness(shown: Iterable[Shown]) -> list[str]:
    return list(dict.fromkeys(name for run in shown for name in run.metrics if name.startswith("smoothness-")))


def _curves(shown: Sequence[Shown], name: str) -> dict[int, list[tuple[float, float]]]:
    """(noise level, value), ascending, by the run's position; without runs that have none."""
    found = {}
    for i, run in enumerate(shown):
        points = (run.metrics.get(name, {}).get("receipt") or {}).get("curve") or []
        finite = sorted((float(x), float(y)) for x, y in points if number(x) is not None and number(y) is not None)
        if finite:
            found[i] = finite
    return found


def _smooth(shown: Sequence[Shown], curves: Mapping[str, Mapping[int, list[tuple[float, float]]]]) -> Figure:
    """One panel for each metric over the noise level; its square root has a zero and room for small levels."""
    from matplotlib.lines import Line2D

    figure, panels = _panels(len(curves), 3, height=2.7, above=0.4)
    styles: list[dict[str, Any]] = [
        {"color": colour, "marker": marker, "linewidth": 1.6, "markersize": 4}
        for _, colour, marker in zip(shown, cycle(COLOURS), cycle(MARKERS))
    ]
    for (name, runs), axes in zip(curves.items(), panels):
        for i, points in runs.items():
            axes.plot(*zip(*points), clip_on=False, zorder=3, **styles[i])
        _level_axis(axes, [x for points in runs.values() for x, _ in points])
        heights = [y for points in runs.values() for _, y in points]
        logarithmic = min(heights) > 0 and max(heights) / min(heights) > LOG_RATIO
        axes.set_yscale("log" if logarithmic else "linear")
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axes.yaxis.set_minor_formatter(lambda y, _: "")
        axes.set_title(f"{heading(name.removeprefix('smoothness-'))}{' · log' if logarithmic else ''}")
        axes.grid(axis="y")
        axes.tick_params(length=0)
        axes.tick_params(axis="y", labelcolor=SOFT)
    figure.supxlabel("noise level, standard deviations of each latent channel", fontsize=8.5, color=SOFT)
    there = [i for i in range(len(shown)) if any(i in runs for runs in curves.values())]
    figure.legend(
        [Line2D([], [], **styles[i]) for i in there], [_fit(shown[i].name) for i in there],
        loc="outside upper left", ncols=2 * max(2, min(3, len(curves))), frameon=False, fontsize=8.5,
    )  # fmt: skip
    return figure


def _level_axis(axes: Axes, levels: Sequence[float]) -> None:
    """Square roots of levels; ticks at the levels themselves, as far as their numbers do not touch."""
    last = max(max(levels), 1e-6)
    kept: list[float] = []
    for level in sorted(set(levels), key=lambda x: (x not in (0, FLAT, last), x)):  # these three come first
        if all(abs(math.sqrt(level / last) - math.sqrt(other / last)) > 0.11 for other in kept):
            kept.append(level)
    axes.set_xscale("function", functions=(lambda x: abs(x) ** 0.5, lambda x: x**2))
    axes.set_xlim(0, last)
    axes.set_xticks(kept, [f"{level:g}" for level in kept])
    axes.minorticks_off()
    axes.axvspan(0, min(FLAT, last), color="#f1f1ee", zorder=0)


def _panels(count: int, most: int, height: float, above: float = 0.0) -> tuple[Figure, list[Axes]]:
    """A figure as wide as the page, or less for few panels, and its panels, row by row, so many in a row at most."""
    from matplotlib.figure import Figure

    across, down = min(most, count), -(-count // most)
    figure = Figure(
        figsize=(WIDTH * max(across, 2) / most, down * height + above), layout="constrained", facecolor="white"
    )
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for spare in panels[count:]:
        spare.set_axis_off()
    return figure, panels


def _fit(name: str, most: int = 22) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


# -- pictures ---------------------------------------------------------------------------------------------------------


def _pictures(folder: Path, shown: Sequence[Shown]) -> list[Picture]:
    """One PNG for each kind: the runs' grids below each other."""
    parts: list[Picture] = []
    for kind in dict.fromkeys(kind for run in shown for kind in run.pictures):
        there = [(run.name, path) for run in shown if (path := run.pictures.get(kind)) and path.is_file()]
        if there:
            path = save_png(_stack(there), folder / f"{kind}.png")
            parts.append(Picture(path, path.name, f"{kind.capitalize()} of {', '.join(n for n, _ in there)}", False))
    return parts


def _stack(pictures: Sequence[tuple[str, Path]]) -> Image.Image:
    """Each picture below its name."""
    from matplotlib import get_data_path

    font = ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), 15)
    grids = [(name, _cut(path)) for name, path in pictures]
    width = max([grid.width for _, grid in grids] + [math.ceil(font.getlength(name)) + 4 for name, _ in grids])
    height = sum(grid.height + NAME_HEIGHT for _, grid in grids) + 6 * (len(grids) - 1)
    canvas = Image.new("RGB", (width, height), "white")
    draw, top = ImageDraw.Draw(canvas), 0
    for name, grid in grids:
        draw.text((1, top + NAME_HEIGHT // 2), name, fill=INK, font=font, anchor="lm")
        canvas.paste(grid, (0, top + NAME_HEIGHT))
        top += grid.height + NAME_HEIGHT + 6
    return canvas


def _cut(path: Path) -> Image.Image:
    """The top of a grid, enlarged twice where there is room; whole rows, an even number: they may be pairs."""
    with Image.open(path) as opened:
        grid = opened.convert("RGB")
    scale = 2 if 2 * grid.width <= PICTURE_WIDTH else 1
    room = PICTURE_HEIGHT // scale
    if grid.height > room:
        row = _row_height(grid)
        keep = max(2, room // row // 2 * 2) * row - 2 if row else room
        grid = grid.crop((0, 0, grid.width, min(keep, grid.height)))
    return grid.resize((grid.width * scale, grid.height * scale), Image.Resampling.NEAREST)


def _row_height(grid: Image.Image) -> int | None:
    """Pixels from one row of `make_grid` to the next, found by its gaps of two grey lines; None without any."""
    width, height = grid.size
    gap = Image.new("RGB", (width, 2), GAP_COLOUR).tobytes()
    for row in range(3, height // 2 + 2):
        if (height + 2) % row == 0:
            gaps = (grid.crop((0, y - 2, width, y)).tobytes() for y in range(row, height, row))
            if all(found == gap for found in gaps):
                return row
    return None


# -- files ------------------------------------------------------------------------------------------------------------


def _json(
    title: str, about: str, shown: Sequence[Shown], columns: Sequence[str], published: Published | None,
    orders: Sequence[Ordering],
) -> bytes:  # fmt: skip
    content = {
        "title": title,
        "about": about,
        "columns": {name: better(name) for name in columns},
        "runs": [{"name": run.name, "metrics": run.metrics, "facts": run.facts} for run in shown],
        "published": dataclasses.asdict(published) if published else None,
        "orderings": [dataclasses.asdict(ordering) for ordering in orders],
    }
    return json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False, default=str).encode()


def _finite(content: Any) -> Any:
    """The same without infinities and NaN, which JSON does not know."""
    if isinstance(content, Mapping):
        return {str(key): _finite(part) for key, part in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(part) for part in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _markdown(title: str, about: str, sections: Sequence[Section]) -> str:
    blocks = [f"## {_literal(title)}", *map(_literal, _paragraphs(about))]
    for section in sections:
        blocks.append(f"### {section.title}")
        for part in section.parts:
            if isinstance(part, Table):
                blocks.append(_markdown_table(part))
            elif isinstance(part, Picture):
                blocks.append(f"![{_literal(part.words)}]({part.link})")
            else:
                blocks.append(_literal(part))
    return "\n\n".join(blocks) + "\n"


def _markdown_table(table: Table) -> str:
    cells = [[_literal(cell) for cell in row] for row in table.rows]
    for i, j in table.bold:
        cells[i][j] = f"**{cells[i][j]}**"
    rule = ["---:" if table.is_number(j) else "---" for j in range(len(table.head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [[_literal(name) for name in table.head], rule, *cells])


def _literal(text: str) -> str:
    """Words in which nothing is Markdown or HTML, in one line."""
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", escape(" ".join(text.split()), quote=False))


def _html(title: str, about: str, sections: Sequence[Section]) -> str:
    words = "".join(f"<p>{escape(paragraph)}</p>" for paragraph in _paragraphs(about))
    body = [f"{STYLE}<header><h1>{escape(title)}</h1>{words}</header>"]
    for section in sections:
        body.append(f"<section><h2>{escape(section.title)}</h2>")
        for part in section.parts:
            if isinstance(part, Table):
                body.append(_html_table(part))
            elif isinstance(part, Picture):
                kind = "figure" if part.figure else "picture"
                body.append(f'<div class="{kind}">{inline_image(part.png, part.words)}</div>')
                body.append(f'<p class="soft">{escape(part.words)}.</p>')
            else:
                body.append(f'<p class="soft">{escape(part)}</p>')
        body.append("</section>")
    return page(title, "".join(body))


def _html_table(table: Table) -> str:
    kinds = [' class="number"' if table.is_number(j) else "" for j in range(len(table.head))]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for name, kind in zip(table.head, kinds))
    rows = ""
    for i, row in enumerate(table.rows):
        texts = (f"<b>{escape(cell)}</b>" if (i, j) in table.bold else escape(cell) for j, cell in enumerate(row))
        rows += "<tr>" + "".join(f"<td{kind}>{text}</td>" for kind, text in zip(kinds, texts)) + "</tr>"
    return f'<div class="card scroll"><table><tr>{head}</tr>{rows}</table></div>'


def _paragraphs(text: str) -> list[str]:
    return [paragraph for paragraph in re.split(r"\n\s*\n", text.strip()) if paragraph.strip()]


def _write(path: Path, content: bytes) -> Path:
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_bytes(content)
    partial.replace(path)
    return path
