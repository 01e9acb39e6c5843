"""Do things stand where they should? Regions of drawn images against the mean look of each class.

The template of a class is the mean of its regions in training images; a region shows the class whose template it
correlates with most. Its share of hits compares only with those of real images and of other images' layouts.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Integer
from torch import Tensor

from latelier.errors import NotMeasurable
from latelier.evaluation.results import Measurement

SIDE = 24  # pixels of a template
MOST_TRAINING = 4_000  # images that templates are made of
FLAT = 1e-4  # standard deviation in [-1, 1] below which a region shows nothing
COMPARED = {"": "regions asked for", "-chance": "regions of the next record"}  # by the end of a result's name
COMPARED["-real"] = "regions asked for, in the original images"


class Region(NamedTuple):
    """A class and where it is: x0 y0 x1 y1 in pixels, the last two just outside; at least one pixel."""

    label: int
    box: tuple[int, int, int, int]


def read_regions(batch: Mapping[str, Any], input_name: str) -> list[list[Region]]:
    """The regions of each image of a batch: of `boxes` and `box_labels`, or of `segmentation`."""
    for key in ("boxes", "box_labels") if input_name == "layouts" else ("segmentation",):
        if key not in batch:
            raise NotMeasurable(f"Drawn {input_name} cannot be evaluated: the records have no {key!r}.")
    if input_name == "segmentations":
        return [map_regions(ids) for ids in batch["segmentation"]]
    size = (batch["image"].shape[2], batch["image"].shape[3])
    return [box_regions(boxes, labels, size) for boxes, labels in zip(batch["boxes"], batch["box_labels"])]


def box_regions(boxes: Float[Tensor, "n 4"], labels: Int[Tensor, " n"], size: tuple[int, int]) -> list[Region]:
    """Regions of boxes, relative x0 y0 x1 y1, in an image of a height and a width."""
    found = []
    for label, (x0, y0, x1, y1) in zip(labels.tolist(), boxes.tolist()):
        (left, right), (top, bottom) = _span(x0, x1, size[1]), _span(y0, y1, size[0])
        found.append(Region(label, (left, top, right, bottom)))
    return found


def map_regions(ids: Integer[Tensor, "h w"]) -> list[Region]:
    """The bounding box of every id of a label map; 0 is the background, and no region."""
    found = []
    for label in ids.unique().tolist():
        if label > 0:
            rows, columns = (ids == label).nonzero().unbind(1)  # 2 x (n,)
            box = (columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1)
            found.append(Region(label, box))
    return found


def _span(low: float, high: float, length: int) -> tuple[int, int]:
    """The nearest whole pixels of an interval, at least one."""
    start = min(max(round(low * length), 0), length - 1)
    return start, min(max(round(high * length), start + 1), length)


class Templates:
    """The mean look of each class: one pattern for each label, before normalisation, made of `images` images."""

    def __init__(self, labels: Int[Tensor, " k"], patterns: Float[Tensor, "k d"], images: int):
        self.labels, self.patterns, self.images = labels, normalise(patterns), images

    @classmethod
    def of(cls, batches: Iterable[Mapping[str, Any]], input_name: str, most: int = MOST_TRAINING) -> Templates:
        """The mean region of each class over at most `most` training images; an error if none has a region."""
        sums: dict[int, Tensor] = {}
        counts: dict[int, int] = defaultdict(int)
        seen = 0
        for batch in batches:
            for image, regions in zip(batch["image"].float().cpu()[: most - seen], read_regions(batch, input_name)):
                seen += 1
                for label, row in zip((r.label for r in regions), patterns(image, regions)):
                    sums[label] = sums[label] + row if label in sums else row.clone()
                    counts[label] += 1
            if seen >= most:
                break
        if not sums:
            raise NotMeasurable(f"Drawn {input_name} cannot be evaluated: none of {seen} training images has a region.")
        labels = sorted(sums)
        return cls(torch.tensor(labels), torch.stack([sums[k] / counts[k] for k in labels]), seen)

    def hits(self, image: Float[Tensor, "c h w"], regions: Sequence[Region]) -> tuple[int, int]:
        """How many regions of an image show what they should, and of how many with a template; flat ones do not."""
        known = set(self.labels.tolist())
        regions = [region for region in regions if region.label in known]
        if not regions:
            return 0, 0
        rows = normalise(patterns(image, regions))  # (n, d)
        nearest = self.labels[(rows @ self.patterns.T).argmax(1)]  # (n,)
        wanted = torch.tensor([region.label for region in regions])  # (n,)
        return int(((nearest == wanted) & rows.any(1)).sum()), len(regions)


def patterns(image: Float[Tensor, "c h w"], regions: Sequence[Region]) -> Float[Tensor, "n d"]:
    """The regions of an image, each resized to `SIDE` x `SIDE`."""
    rows = [image.new_zeros(0, image.shape[0] * SIDE**2)]
    for _, (x0, y0, x1, y1) in regions:
        crop = image[None, :, y0:y1, x0:x1]  # (1, c, i, j)
        rows.append(F.interpolate(crop, size=(SIDE, SIDE), mode="bilinear", antialias=True).flatten(1))  # (1, d)
    return torch.cat(rows)


def normalise(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Mean 0 (of all channels together) and length 1, so that products are correlations; flat rows become zero."""
    centred = rows - rows.mean(1, keepdim=True)  # (n, d)
    flat = rows.std(1, keepdim=True) < FLAT  # (n, 1)
    return F.normalize(centred, dim=1).masked_fill(flat, 0.0)


def share_of_hits(counts: Sequence[tuple[int, int]]) -> tuple[float, tuple[float, float] | None]:
    """The share of regions that are hits, and its 95 % interval, None for fewer than two images.

    Regions of one image are not independent, so m images are the sample: with h_i hits among n_i regions,

        p = sum h_i / sum n_i,    var p = m / (m - 1) sum (h_i - p n_i)^2 / (sum n_i)^2  (Cochran 1977, section 6.3)
    """
    hits, total = torch.tensor([pair for pair in counts if pair[1]], dtype=torch.float64).T  # 2 x (m,)
    images, share = len(total), (hits.sum() / total.sum()).item()
    if images < 2:
        return share, None
    spread = (hits - share * total).square().sum().item()
    half = 1.96 * math.sqrt(images / (images - 1) * spread) / total.sum().item()
    return share, (max(0.0, share - half), min(1.0, share + half))


class RegionMatch:
    """Regions of drawn images against templates of classes, beside the two ends of the scale: `-chance` compares image
    i with the regions of record i + 1 (the last one with those of the first), `-real` the original images.
    """

    def __init__(self, input_name: str, templates: Templates):
        self._input, self._templates = input_name, templates  # `layouts` or `segmentations`
        self._counts: dict[str, list[tuple[int, int]]] = {end: [] for end in COMPARED}  # hits and regions of images
        self._first: list[Region] = []  # of all images
        self._last: Tensor | None = None  # the drawn image before
        self._regions = 0

    def update(
        self, batch: Mapping[str, Any], drawn: Float[Tensor, "b c h w"], original: Float[Tensor, "b c h w"]
    ) -> None:
        hits = self._templates.hits
        for regions, one, real in zip(read_regions(batch, self._input), drawn.cpu().float(), original.cpu().float()):
            self._counts[""].append(hits(one, regions))
            self._counts["-real"].append(hits(real, regions))
            if self._last is None:
                self._first = regions
            else:
                self._counts["-chance"].append(hits(self._last, regions))
            self._last, self._regions = one, self._regions + len(regions)

    def compute(self, about: Mapping[str, Any]) -> list[Measurement]:
        """`<input>-match`, `-match-chance` and `-match-real`; an error without regions, or for one image."""
        name = f"{self._input.removesuffix('s')}-match"
        regions = sum(total for _, total in self._counts[""])
        if about["n"] < 2 or not regions:
            raise NotMeasurable(
                f"{name} needs 2 images and a region of a class that training images show, not {about['n']} "
                f"images with {regions}; raise evaluate.samples."
            )
        assert self._last is not None
        chance = [*self._counts["-chance"], self._templates.hits(self._last, self._first)]
        counts = {**self._counts, "-chance": chance}
        receipt = {
            **about, "regions": regions, "regions_without_template": self._regions - regions,
            "classes": len(self._templates.labels), "template_images": self._templates.images,
            "matcher": f"nearest mean training region, {SIDE} x {SIDE}, correlation over all channels",
        }  # fmt: skip
        result = []
        for end, words in COMPARED.items():
            share, interval = share_of_hits(counts[end])
            result.append(Measurement(name + end, share, {**receipt, "images": words}, interval))
        return result
