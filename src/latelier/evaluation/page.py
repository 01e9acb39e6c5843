"""What every page is made of: one HTML file with its style, images and script inside, and numbers in words."""

from __future__ import annotations

import base64
import importlib.resources
import math
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

ZOOM = """
const box = document.querySelector("dialog");
document.querySelectorAll("main img").forEach(i => i.onclick = () => { box.firstChild.src = i.src; box.showModal(); });
box.onclick = () => box.close();
"""


def page(name: str, body: str) -> str:
    """A whole page: nothing in it is fetched from anywhere.

    Args:
        name: of the browser's tab, plain text.
        body: HTML.
    """
    style = importlib.resources.files("latelier.evaluation").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><link rel="icon" href="data:,">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)} · latelier</title><style>{style}</style></head><body><main>{body}"
        f'<footer>Written by latelier. Click an image to enlarge it.</footer></main><dialog><img alt=""></dialog>'
        f"<script>{ZOOM}</script></body></html>"
    )


def section(title: str, body: str) -> str:
    """A heading that links can point to, and what stands below it."""
    return f'<section id="{anchor(title)}"><h2>{escape(title)}</h2>{body}</section>'


def anchor(title: str) -> str:
    """What links to a heading point to."""
    return re.sub(r"[^a-z]+", "-", title.lower())


def inline_image(path: Path, words: str) -> str:
    """A PNG file inside the page; `words` are for those who hear it."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(words)}" loading="lazy">'


def definitions(values: Mapping[str, Any]) -> str:
    """A list of names and values; nested values in one line."""
    rows = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(in_words(v))}</dd>" for k, v in values.items())
    return f"<dl>{rows}</dl>"


def digits(value: Any) -> str:
    """Four significant digits, never in powers of ten for everyday sizes."""
    if not isinstance(value, int | float):
        return str(value)
    if not math.isfinite(value) or value == 0 or not 1e-4 <= abs(value) < 1e7:
        return f"{value:.4g}"
    return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def in_words(value: Any) -> str:
    """Any value of a receipt as plain text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {in_words(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return (
            " x ".join(map(in_words, value))
            if all(isinstance(v, int) for v in value)
            else ", ".join(map(in_words, value))
        )
    return "none" if value is None else str(value)
