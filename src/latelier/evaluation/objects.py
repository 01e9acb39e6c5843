"""Which objects do generated scenes show? A metric for the built-in `scenes` with single emoji as classes.

An object is recognised where a sprite fits better than a threshold, see `latelier.evaluation.sprites`; an image, if it
has as many objects as scenes have and nothing else. What else there is can be told because backgrounds are mixtures of
two colours: pixels that are neither in the box of an object nor near one line in the space of colours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from latelier.data.builtin import OBJECTS, SceneSource, list_emoji, relations_of
from latelier.errors import NotMeasurable
from latelier.evaluation.results import Result, mean_with_interval
from latelier.evaluation.sprites import RING, Found, SpriteFinder, area, iou

MOST_CLASSES = 64  # sprites of every class are sought in every image
MOST_SAMPLES, MOST_ORIGINALS, MOST_SCENES = 2_000, 400, 20_000  # images, originals to calibrate on, scenes not painted
PASS = 0.99  # share of originals that should be recognised, and of scrambled ones that should not
OFF = 0.2  # distance from the background's colours, in [-1, 1], from which a pixel shows something
EMPTY = 0.01  # share of pixels that may show something else than the objects
TILES = 8  # of scrambled images, along a side
CELLS = 3  # along a side of the grid of places
SAME_BOX, SAME_PLACE = 0.5, 0.85  # intersection over union of a box that was asked for, of a copy
Rows = Sequence[Sequence[Found]]
_recognisers: dict[tuple[str, bool], Recogniser] = {}
Condition = Literal["class", "text", "layout"]


class Asked(NamedTuple):
    """What images were asked for: by class the main object alone, else all objects of a scene, the main one first."""

    condition: Condition
    objects: Rows


class Recogniser:
    """Finds objects in scenes, with a threshold from held-out originals.

    Half of the originals, with their scrambled images, set the threshold: halfway between what the least object in 99 %
    of them has and what the best fit in 99 % of the scrambled ones is, or, if that is higher, at the first. The other
    half tells in `about` the shares of originals that are recognised and of scrambled ones that are not.

    Args:
        originals: held-out scenes with single emoji as classes.
        mirrored: whether images may show mirror images of the emoji (`data.flip`).
        count: originals that are looked at, at most.

    Raises:
        NotMeasurable: for other data, or classes that are categories.
    """

    def __init__(self, originals: SceneSource, mirrored: bool = False, count: int = MOST_ORIGINALS):
        self.source = check_scenes(originals)
        self.finder = SpriteFinder(originals.class_names or [], originals.size, mirrored)
        count = min(count, len(originals))
        self.originals = torch.stack([paint(originals, i) for i in range(count)])  # (m, 3, h, w)
        self.known = [known_objects(originals, i) for i in range(min(len(originals), MOST_SCENES))]
        found, scrambled = self.finder.find(self.originals), scramble(self.originals)
        false = self.finder.find(scrambled)
        least = torch.tensor([_least_fit(ours, theirs) for ours, theirs in zip(found, self.known)])
        most = torch.tensor([max((one.fit for one in rows), default=0.0) for rows in false])
        real, other = float(least[::2].quantile(1 - PASS)), float(most[::2].quantile(PASS))
        self.threshold = min(real, (real + other) / 2)
        rest = slice(1, None, 2) if count > 1 else slice(None)
        self.about: dict[str, Any] = {
            "n_originals": count, "threshold": self.threshold, "backgrounds": originals.backgrounds,
            "originals_pass": _mean(self._whole(self.originals[rest], self.above(found[rest]))),
            "originals_right": _mean(least[rest] >= self.threshold),
            "scrambled_fail": 1 - _mean(self._whole(scrambled[rest], self.above(false[rest]))),
            "scrambled_without_objects": _mean(most[rest] < self.threshold),
        }  # fmt: skip

    def see(self, images: Float[Tensor, "n 3 h w"]) -> tuple[list[list[Found]], Float[Tensor, " n"]]:
        """The objects of images in [-1, 1], and 1 for images that are recognised as a whole."""
        found = self.above(self.finder.find(images))
        return found, self._whole(images, found)

    def above(self, found: Rows) -> list[list[Found]]:
        """The objects above the threshold."""
        return [[one for one in rows if one.fit >= self.threshold] for rows in found]

    def reconstructed(self, reconstruct: Callable[[Tensor], Tensor]) -> Result:
        """The share of reconstructed originals that are recognised: no generated images can be expected to show more,
        whatever the denoiser. `reconstruct` maps images in [-1, 1], batch by batch.
        """
        images = torch.cat([reconstruct(part).clamp(-1, 1).float().cpu() for part in self.originals.split(64)])
        found, whole = self.see(images)
        right = [float(_least_fit(a, b) > 0) for a, b in zip(found, self.known)]
        about = {**self.about, "n": len(images), "right_objects": float(np.mean(right))}
        return Result(*mean_with_interval(whole), about)

    def _whole(self, images: Tensor, found: Rows) -> Float[Tensor, " n"]:
        few = torch.tensor([OBJECTS[0] <= len(rows) <= OBJECTS[1] for rows in found])
        return (few & (unexplained(images.float().cpu(), found) <= EMPTY)).double()


def open_recogniser(originals: SceneSource, mirrored: bool = False) -> Recogniser:
    """The recogniser of some scenes; a process calibrates it once."""
    key = (check_scenes(originals).fingerprint, mirrored)
    if key not in _recognisers:
        _recognisers[key] = Recogniser(originals, mirrored)
    return _recognisers[key]


@torch.no_grad()
def measure_objects(
    generated: Float[Tensor, "n 3 h w"], originals: SceneSource | Recogniser, training: SceneSource | None = None,
    asked: Asked | None = None,
) -> dict[str, Result]:  # fmt: skip
    """What generated scenes show; higher is better but for copies.

    `objects`: share of images that are recognised; `objects-counts`, `-classes`, `-places`: 1 - total variation between
    generated and held-out images of how many objects there are, which, and where on a grid of 3 x 3. With `training`,
    `objects-copies`: share, of images with two objects or more, whose objects are those of a training scene at the same
    places. With `asked`, `objects-asked`: share of images that show it, and for captions `objects-relations`: share of
    the relations, such as left of, that hold.

    Args:
        generated: images in [-1, 1], of which 2,000 are looked at.
        originals: held-out scenes of the same kind, or what recognises their objects.
        training: scenes that were learnt from, of which 20,000 are looked at.
        asked: what each image should show.

    Raises:
        NotMeasurable: for other data, or classes that are categories.
    """
    recogniser = originals if isinstance(originals, Recogniser) else Recogniser(originals)
    found, whole = recogniser.see(generated[:MOST_SAMPLES])
    about: dict[str, Any] = {**recogniser.about, "n": len(found)}
    results = {"objects": Result(*mean_with_interval(whole), about)}
    seen = [known_objects(training, i) for i in range(min(len(training), MOST_SCENES))] if training else []
    ours, theirs, those = (
        _distributions(rows, recogniser.finder) for rows in (found, recogniser.known, seen[: len(found)])
    )
    for name in ours:
        alike = {"alike": _overlap(those[name], theirs[name])} if seen else {}  # what as many training scenes have
        results[f"objects-{name}"] = Result(_overlap(ours[name], theirs[name]), None, {**about, **alike})
    several = [rows for rows in found if len(rows) > 1]
    if seen and several:
        by_chance = _mean(_copied([rows for rows in recogniser.known if len(rows) > 1], seen))
        details = {**about, "n": len(several), "n_training": len(seen), "originals_copied": by_chance}
        results["objects-copies"] = Result(*mean_with_interval(_copied(several, seen)), details)
    return {**results, **(_follow(found, asked, about) if asked else {})}


def check_scenes(source: Any, channels: int = 3) -> SceneSource:
    """The scenes in which objects can be recognised; an error for other data."""
    if not isinstance(source, SceneSource) or channels != 3:
        what = "other data" if not isinstance(source, SceneSource) else f"{channels} channels"
        raise NotMeasurable(f"objects recognises the emoji of data.source = scenes in RGB, and these are {what}.")
    names, known = source.class_names or [], {emoji.name for emoji in list_emoji()}
    wide = [name for name in names if name not in known]
    if wide or len(names) > MOST_CLASSES:
        what = f"{wide[0]!r} is a category" if wide else f"there are {len(names)} classes"
        raise NotMeasurable(f"objects looks for single emoji, and {what}; name at most {MOST_CLASSES} in data.classes.")
    return source


def shows_objects(source: Any, channels: int = 3) -> bool:
    """Whether objects can be recognised in a source's images."""
    try:
        return bool(check_scenes(source, channels))
    except NotMeasurable:
        return False


def known_objects(source: SceneSource, index: int) -> list[Found]:
    """The objects of a scene as it was made, the main one first."""
    return [Found(placed.label, placed.box) for placed in source.objects(index)]


def paint(source: SceneSource, index: int) -> Float[Tensor, "3 h w"]:
    """A scene in [-1, 1]."""
    return torch.from_numpy(np.array(source[index]["image"])).permute(2, 0, 1) / 127.5 - 1


def scramble(images: Float[Tensor, "n c h w"], tiles: int = TILES) -> Float[Tensor, "n c h w"]:
    """Images whose tiles are shuffled, all in the same way; what is left over at the right and below stays."""
    side = max(2, min(images.shape[2:]) // tiles)
    rows, columns = images.shape[2] // side, images.shape[3] // side
    order = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(0)).tolist()
    result = images.clone()
    for to, of in enumerate(order):
        (y, x), (i, j) = (divmod(n, columns) for n in (to, of))
        result[:, :, y * side :, x * side :][:, :, :side, :side] = images[:, :, i * side :, j * side :][
            :, :, :side, :side
        ]
    return result


def unexplained(images: Float[Tensor, "n 3 h w"], found: Rows) -> Float[Tensor, " n"]:
    """Share of an image's pixels that are neither in a box nor of the background's colours: the line in the space of
    colours that is nearest to all pixels outside of the boxes.
    """
    outside = torch.ones(len(images), *images.shape[2:], dtype=torch.float64)  # (n, h, w)
    for row, objects in zip(outside, found):
        for x0, y0, x1, y1 in (one.box for one in objects):
            row[max(0, y0 - RING) : y1 + RING, max(0, x0 - RING) : x1 + RING] = 0
    smooth = F.avg_pool2d(F.pad(images, (1,) * 4, mode="replicate"), 3, 1).double()  # so that noise is no object
    x, w = smooth.flatten(2), outside.flatten(1)[:, None]  # (n, 3, p), (n, 1, p)
    x = x - (x * w).sum(2, keepdim=True) / w.sum(2, keepdim=True).clamp(min=1)
    line = torch.linalg.eigh((x * w) @ x.mT).eigenvectors[..., -1:]  # (n, 3, 1)
    distance = (x - line * (line * x).sum(1, keepdim=True)).norm(dim=1)  # (n, p)
    return ((distance > OFF) * w[:, 0]).mean(1)


def _follow(found: Rows, asked: Asked, about: dict[str, Any]) -> dict[str, Result]:
    """Whether images show what was asked for."""
    follows = {"class": _main_is, "text": _same_labels, "layout": _in_boxes}[asked.condition]
    about = {**about, "asked": asked.condition}
    shown = torch.tensor([float(follows(ours, theirs)) for ours, theirs in zip(found, asked.objects)])
    results = {"objects-asked": Result(*mean_with_interval(shown), about)}
    if asked.condition == "text":
        held = torch.tensor([one for ours, theirs in zip(found, asked.objects) for one in _relations(ours, theirs)])
        if len(held):
            results["objects-relations"] = Result(*mean_with_interval(held), {**about, "n_relations": len(held)})
    return results


def _main_is(ours: Sequence[Found], asked: Sequence[Found]) -> bool:
    return bool(ours) and max(ours, key=lambda one: area(one.box)).label == asked[0].label


def _same_labels(ours: Sequence[Found], asked: Sequence[Found]) -> bool:
    return _labels(ours) == _labels(asked)


def _in_boxes(ours: Sequence[Found], asked: Sequence[Found]) -> bool:
    return all(any(a.label == b.label and iou(a.box, b.box) > SAME_BOX for a in ours) for b in asked)


def _relations(ours: Sequence[Found], asked: Sequence[Found]) -> list[float]:
    """1 for each relation of the main object to another one that two objects of these classes have."""
    main, *others = asked
    pairs = [(a.label, b.label, *relations_of([a.box, b.box])) for a, b in permutations(ours, 2)]
    wanted = zip(others, relations_of([one.box for one in asked]))
    return [float((main.label, other.label, relation) in pairs) for other, relation in wanted]


def _least_fit(ours: Sequence[Found], known: Sequence[Found]) -> float:
    """The fit of the object that was found least well, 0 if one was not found."""
    return min(
        max((a.fit for a in ours if a.label == b.label and iou(a.box, b.box) > SAME_BOX), default=0.0) for b in known
    )


def _copied(found: Rows, seen: Rows) -> Float[Tensor, " n"]:
    """1 for images whose objects are, one for one, those of a scene that was seen."""
    by_labels: dict[tuple[int, ...], list[Sequence[Found]]] = {}
    for objects in seen:
        by_labels.setdefault(_labels(objects), []).append(objects)

    def same(a: Found, b: Found) -> bool:
        return a.label == b.label and iou(a.box, b.box) > SAME_PLACE

    def copied(rows: Sequence[Found]) -> bool:
        return any(all(any(same(a, b) for b in those) for a in rows) for those in by_labels.get(_labels(rows), []))

    return torch.tensor([float(copied(rows)) for rows in found])


def _labels(objects: Sequence[Found]) -> tuple[int, ...]:
    return tuple(sorted(one.label for one in objects))


def _distributions(found: Rows, finder: SpriteFinder) -> dict[str, Float[Tensor, " _"]]:
    """How many objects there are in an image, of which classes, and in which cells of a grid."""
    objects = [one for rows in found for one in rows]
    middles = torch.tensor([(y0 + y1, x0 + x1) for x0, y0, x1, y1 in (one.box for one in objects)]).view(-1, 2) / 2
    cells = (middles / torch.tensor(finder.size) * CELLS).long().clamp(0, CELLS - 1)  # (m, 2)
    return {
        "counts": _shares([min(len(rows), OBJECTS[1] + 1) for rows in found], OBJECTS[1] + 2),
        "classes": _shares([one.label for one in objects], len(finder.classes)),
        "places": _shares((cells[:, 0] * CELLS + cells[:, 1]).tolist(), CELLS**2),
    }


def _shares(values: list[int], bins: int) -> Float[Tensor, " k"]:
    counts = torch.bincount(torch.tensor(values, dtype=torch.long), minlength=bins).double()
    return counts / counts.sum().clamp(min=1)


def _overlap(a: Float[Tensor, " k"], b: Float[Tensor, " k"]) -> float:
    """1 - total variation of two distributions; 0 if one of them is of nothing."""
    return float(torch.minimum(a, b).sum())


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
