"""Several runs side by side: tables, orderings, figures and images, as Markdown for docs and as one HTML page.

Both are written from the same sections. Every requested column is shown, and the orderings say where a paper's order
came out otherwise.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from latelier.errors import LatelierError
from latelier.evaluation.metrics import better
from latelier.images import GAP_COLOUR, save_png
from latelier.publish import write_whole
from latelier.report import tables
from latelier.report.figures import ERRORS, MAP, ImageFile, draw_convergence, draw_figures
from latelier.report.overview import fronts, overview
from latelier.report.page import INK, render
from latelier.report.tables import Published, RunSummary, Table

IMAGE_HEIGHT, IMAGE_WIDTH, MAP_WIDTH, NAME_HEIGHT = 300, 1100, 900, 26


@dataclass
class Section:
    """A heading and what stands below it: paragraphs, tables, images."""

    title: str
    parts: Sequence[str | Table | ImageFile]


def write_comparison(
    folder: Path, title: str, about: str, shown: list[RunSummary], columns: Mapping[str, Sequence[str]],
    published: Published | None, *, facts: str = "", baseline: str | None = None,
    groups: Mapping[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Write `table.md`, `comparison.html`, `comparison.json`, figures and images into a folder.

    Args:
        folder: made if missing.
        title: of the page.
        about: what was compared, plain text; blank lines divide paragraphs.
        shown: the runs, in the order in which they are shown everywhere.
        columns: metric names of each table, by its title; the overview has all of them, in this order.
        published: what a paper printed, to compare orders with.
        facts: heading of the table of facts if that comes first; otherwise it says, further down, what each took.
        baseline: the run against whose end the others' convergence is measured.
        groups: families and repeats of the runs, kept in `comparison.json`.

    Raises:
        LatelierError: if there is no run, or two of the same name.
    """
    names = [run.name for run in shown]
    if not shown or len(set(names)) < len(names):
        raise LatelierError(f"A comparison needs runs of different names, not {names}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    every = list(dict.fromkeys(name for names in columns.values() for name in names))
    orders = tables.orderings(shown, published, every) if published else []
    curves = tables.comparable(shown, tables.read_curves(shown), baseline)
    drawn = [draw_convergence(folder, shown, curves)] if curves else []
    sections = [
        Section(facts, tables.costs(shown) if facts else []),
        Section("At a glance", overview(folder, shown)),
        *(Section(name, [tables.measured(shown, names)]) for name, names in columns.items() if names),
        Section("Sampling", tables.sampling(shown)),
        Section("How to read the tables", [tables.how_to_read(shown, every)]),
        Section("Published", tables.printed(shown, published) if published else []),
        Section("Orderings", tables.verdicts(orders, published) if published else []),
        Section("Convergence", [*drawn, *tables.convergence(shown, curves, baseline)] if curves else []),
        Section("What each run took", [] if facts else tables.costs(shown)),
        Section("Figures", draw_figures(folder, shown, every)),
        Section("Images", _images(folder, shown)),
        Section("Receipt", tables.receipts(shown, every)),
    ]
    content = {
        "title": title,
        "about": about,
        **(groups or {}),
        "columns": {name: better(name) for name in every},
        "runs": [{"name": run.name, "metrics": run.metrics, "facts": run.facts} for run in shown],
        "published": dataclasses.asdict(published) if published else None,
        "orderings": [dataclasses.asdict(ordering) for ordering in orders],
        "fronts": [{**dataclasses.asdict(plane), "front": plane.front} for plane in fronts(shown)],
    }
    text = json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False, default=str)
    write_whole(folder / "comparison.json", text)
    return write_sections(folder / "comparison.html", folder / "table.md", title, about, sections)


def write_sections(page: Path, text: Path, title: str, about: str, sections: Sequence[Section]) -> Path:
    """Write sections that are not empty, as a page and as Markdown; return the page's path."""
    paragraphs = [paragraph for paragraph in re.split(r"\n\s*\n", about.strip()) if paragraph.strip()]
    content = {"title": title, "about": paragraphs, "sections": [section for section in sections if section.parts]}
    write_whole(text, render("comparison.md.j2", **content))
    return write_whole(page, render("comparison.html.j2", **content))


def _images(folder: Path, shown: Sequence[RunSummary]) -> list[ImageFile]:
    """One PNG for each kind: the runs' grids below each other."""
    parts = []
    for kind in dict.fromkeys(kind for run in shown for kind in run.images):
        there = [(run.name, path) for run in shown if (path := run.images.get(kind)) and path.is_file()]
        if there:
            path = save_png(_stack(there), folder / f"{kind}.png")
            words = f"{kind.replace('-', ' ').capitalize()} of {', '.join(name for name, _ in there)}"
            parts.append(ImageFile(path, path.name, words, figure=False))
    return parts


def _stack(images: Sequence[tuple[str, Path]]) -> Image.Image:
    """Each image below its name."""
    from matplotlib import get_data_path

    font = ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), 15)
    grids = [(name, _cut(path)) for name, path in images]
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
    if path.name == ERRORS:  # originals, reconstructions, errors and their scale: the whole of it
        return ImageOps.contain(grid, (IMAGE_WIDTH, grid.height)) if grid.width > IMAGE_WIDTH else grid
    if path.name == MAP:  # a figure, not a grid: the whole of it
        return grid.resize((MAP_WIDTH, round(grid.height * MAP_WIDTH / grid.width)), Image.Resampling.LANCZOS)
    scale = 2 if 2 * grid.width <= IMAGE_WIDTH else 1
    room = IMAGE_HEIGHT // scale
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


def _finite(content: Any) -> Any:
    """The same without infinities and NaN, which JSON does not know."""
    if isinstance(content, Mapping):
        return {str(key): _finite(part) for key, part in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(part) for part in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
