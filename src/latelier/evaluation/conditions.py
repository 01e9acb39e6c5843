"""Are conditions followed? Enlargement, inpainting, layouts, label maps and captions, on held-out records.

What is measured follows from the inputs of the model's conditioner; each number stands beside the same of something
simple: bicubic enlargement, holes in one colour, the layout of another image.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from PIL import Image, ImageDraw
from torch import Tensor

from latelier.conditioning.condition import components
from latelier.data import corruptions as masks
from latelier.errors import LatelierError, NotMeasurable
from latelier.evaluation.distributions import FeatureStatistics
from latelier.evaluation.features import CLIPScore, FeatureExtractor, load_extractor
from latelier.evaluation.generation import describe_sampling
from latelier.evaluation.reconstruction import ImageMetric, image_metrics, measure_mean, to_rgb
from latelier.evaluation.regions import Region, RegionMatch, Templates, box_regions
from latelier.evaluation.results import Measurement, mean_with_interval, size_warning
from latelier.images import make_grid
from latelier.receipt import make_receipt
from latelier.recipe import Evaluate, Sample

HOLES = "thick"  # LaMa's evaluation setting
COLUMNS = 8  # of the grid
LEAST_WIDTH = 160  # of an image in the grid; smaller ones are enlarged, so that words fit in
GOLDEN = 0.618034  # of a turn of hue from one class to the next: neighbours differ, none comes again
BACKGROUND = 235
Batch = dict[str, Any]
Records = Iterable[Mapping[str, Any]]
Baseline = Callable[[Mapping[str, Any], Tensor], Tensor]


@torch.no_grad()
def evaluate_conditions(
    pipeline: Any, records: Records, training: Callable[[], Records], sample: Sample, evaluate: Evaluate,
    receipt: Mapping[str, Any],
) -> list[Measurement]:  # fmt: skip
    """Draw what at most `evaluate.samples` held-out records say, and measure how well it is done.

    `sr-<metric>` and `bicubic-<metric>`, `inpainting-<metric>` and `mean-fill-<metric>`, and the differences in the
    same images, `<task>-<metric>-difference`; `layout-match` and `segmentation-match` with `-chance` and `-real`, by
    templates of the records of `training()`; `clip-score` and `clip-score-real`. Empty for models that are conditioned
    on classes, maps or nothing. `receipt` has reference, data, tokenizer, ema, images_trained.
    """
    device = pipeline.codec.device
    metrics = list(_metrics(components(pipeline.conditioner), training, evaluate, device))
    if not metrics:
        return []
    n, size = 0, (0, 0)
    for batch, drawn in draw_records(pipeline, records, sample, evaluate.samples, evaluate.seed):
        n, size = n + len(drawn), (drawn.shape[2], drawn.shape[3])
        for metric in metrics:
            metric.update(batch, drawn.to(device), batch["image"].to(device))
    if n == 0:
        raise LatelierError("There are no held-out records to draw; see data.val_source and data.val_fraction.")
    settings = {name: value for name, value in describe_sampling(sample, pipeline).items() if name != "classes"}
    about = make_receipt(n=n, image_size=size, **{**settings, **receipt})
    return [measurement for metric in metrics for measurement in metric.compute(about)]


@torch.no_grad()
def draw_records(
    pipeline: Any, records: Records, sample: Sample, count: int, seed: int
) -> Iterator[tuple[Batch, Float[Tensor, "b c h w"]]]:
    """Batches of the first `count` records (with `low`, small images, and `hole`, which depends on `(seed, i)`), and an
    image on the CPU for each, drawn from seed `sample.seed + i`; outside of holes they are the originals.
    """
    known, done = components(pipeline.conditioner), 0
    for record in records:
        batch = {key: value[: count - done] for key, value in record.items()}
        image = batch["image"]
        numbers = torch.arange(done, done + len(image))  # (b,)
        if "low_resolution" in known:
            batch["sample_id"] = sample.seed + numbers
            batch |= known["low_resolution"].prepare(batch, pipeline.codec)  # type: ignore[operator]
        if "inpainting" in known:
            batch["hole"] = masks.draw_masks(masks.SETTINGS[HOLES], (image.shape[2], image.shape[3]), seed, numbers)
        settings = sample.model_copy(update={"seed": sample.seed + done, "count": len(image), "classes": None})
        drawn = pipeline(records=batch, sample=settings, output_type="pt", progress=False).images.cpu()
        yield batch, torch.where(batch["hole"] > 0.5, drawn, image.to(drawn)) if "inpainting" in known else drawn
        done += len(image)
        if done >= count:
            return


def _metrics(
    known: Mapping[str, Any], training: Callable[[], Records], evaluate: Evaluate, device: torch.device
) -> Iterator[Means | Inpainting | RegionMatch | CaptionMatch]:
    """Those that have something to measure: each sees all drawn images in batches, then says its numbers."""
    similar = {"psnr", "ssim", "lpips"} & set(evaluate.metrics)
    if "low_resolution" in known and similar:
        config = known["low_resolution"].config
        about = {"factor": config["factor"], "degradation": config["degradation"], "degradation_seed": config["seed"]}
        about["bicubic"] = "a = -1/2, as PIL and MATLAB"
        metrics = image_metrics(similar, device)
        yield Means(("sr", "bicubic"), metrics, lambda batch, image: enlarge(batch["low"].to(image), image), about)
    if "inpainting" in known and {"lpips", "gfd"} & set(evaluate.metrics):
        extractor = load_extractor(evaluate.features[0], device) if "gfd" in evaluate.metrics else None
        yield Inpainting(image_metrics(similar & {"lpips"}, device), extractor, evaluate.seed)
    for input_name in ("layouts", "segmentations"):
        if input_name in known:
            yield RegionMatch(input_name, Templates.of(training(), input_name))
    if "prompts" in known and evaluate.clip:
        yield CaptionMatch(CLIPScore(evaluate.clip, device))


class Means:
    """Means over images of some metrics, of drawn images and of a simple baseline, whose names begin as `sides` say.

    Images differ far more among each other than drawn and baseline do, so `<drawn>-<metric>-difference`, drawn minus
    baseline, image by image, is known more closely than either. `baseline` makes images from a batch and its originals.
    """

    def __init__(
        self, sides: tuple[str, str], metrics: Mapping[str, ImageMetric], baseline: Baseline, about: Mapping[str, Any]
    ):
        self._sides, self._metrics, self._baseline, self._about = sides, metrics, baseline, about
        self._values: dict[str, list[Tensor]] = {f"{side}-{metric}": [] for side in sides for metric in metrics}

    def update(self, batch: Mapping[str, Any], drawn: Tensor, original: Tensor) -> None:
        for side, images in zip(self._sides, (drawn, self._baseline(batch, original))):
            for name, metric in self._metrics.items():
                self._values[f"{side}-{name}"].append(metric(images, original).cpu())

    def compute(self, about: Mapping[str, Any]) -> list[Measurement]:
        values = {name: torch.cat(each) for name, each in self._values.items()}  # (n,)
        drawn, baseline = self._sides
        for metric in self._metrics:
            values[f"{drawn}-{metric}-difference"] = values[f"{drawn}-{metric}"] - values[f"{baseline}-{metric}"]
        metrics = {name: name.removesuffix("-difference").split("-")[-1] for name in values}
        return [measure_mean(name, each, metrics[name], {**about, **self._about}) for name, each in values.items()]


class Inpainting:
    """Filled images against the originals, beside holes in the mean colour of the rest of the image."""

    def __init__(self, metrics: Mapping[str, ImageMetric], extractor: FeatureExtractor | None, seed: int):
        self._about = {"masks": f"LaMa's {HOLES}, lengths in proportion to the image", "mask_seed": seed}
        self._means = Means(("inpainting", "mean-fill"), metrics, fill_with_mean, {})
        self._extractor, self._covered = extractor, 0.0
        self._sums = [FeatureStatistics(extractor.dims if extractor else 0) for _ in range(3)]  # drawn, filled, real

    def update(self, batch: Mapping[str, Any], drawn: Tensor, original: Tensor) -> None:
        self._covered += batch["hole"].to(original).mean((1, 2, 3)).sum().item()
        self._means.update(batch, drawn, original)
        if self._extractor:
            for statistics, images in zip(self._sums, (drawn, fill_with_mean(batch, original), original)):
                statistics.update(self._extractor(images))

    def compute(self, about: Mapping[str, Any]) -> list[Measurement]:
        receipt = {**about, **self._about, "masked_share": self._covered / about["n"]}
        result = self._means.compute(receipt)
        if self._extractor:
            warning = size_warning(about["n"], self._extractor.dims)
            receipt |= {**self._extractor.describe(), "n_reference": about["n"], **warning}
            for side, statistics in zip(("inpainting", "mean-fill"), self._sums):
                name = f"{side}-fd-{self._extractor.name}"
                result.append(Measurement(name, statistics.distance(self._sums[2]), receipt))
        return result


class CaptionMatch:
    """`clip-score` of images and the captions that they were drawn from, beside that of the original images."""

    def __init__(self, clip: CLIPScore):
        self._clip = clip
        self._scores: dict[str, list[Tensor]] = {"clip-score": [], "clip-score-real": []}

    def update(self, batch: Mapping[str, Any], drawn: Tensor, original: Tensor) -> None:
        if "caption" not in batch:
            raise NotMeasurable("clip-score cannot be measured: the records have no 'caption'; see data.caption_key.")
        for scores, images in zip(self._scores.values(), (drawn, original)):
            scores.append(self._clip(images, batch["caption"]))

    def compute(self, about: Mapping[str, Any]) -> list[Measurement]:
        receipt = {**about, **self._clip.describe()}
        found = {name: mean_with_interval(torch.cat(scores)) for name, scores in self._scores.items()}
        return [Measurement(name, mean, receipt, interval) for name, (mean, interval) in found.items()]


def enlarge(low: Float[Tensor, "b c i j"], like: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Bicubic enlargement with PIL's kernel, a = -1/2 (torch has it only under `antialias`)."""
    return F.interpolate(low, size=like.shape[2:], mode="bicubic", antialias=True).clamp(-1, 1)


def fill_with_mean(batch: Mapping[str, Any], image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """A batch's holes `(b, 1, h, w)` in the mean colour of the rest of each image."""
    hole = batch["hole"].to(image)  # (b, 1, h, w)
    rest = (hole < 0.5).to(image)  # (b, 1, h, w)
    mean = (image * rest).sum((2, 3), keepdim=True) / rest.sum((2, 3), keepdim=True)  # (b, c, 1, 1)
    return torch.where(hole > 0.5, mean, image)


def condition_grid(pipeline: Any, records: Records, sample: Sample, seed: int = 0) -> tuple[Image.Image, list[str]]:
    """Draw the first `COLUMNS` records as `draw_records` does: a column for each, with its inputs, drawn and original.

    Inputs are the small image, enlarged; the image with grey holes; boxes and their classes; the label map; the map;
    and the captions of the columns, which come beside the image.
    """
    known = components(pipeline.conditioner)
    rows: dict[str, list[Tensor]] = {}
    captions: list[str] = []
    for batch, drawn in draw_records(pipeline, records, sample, COLUMNS, seed):
        zoom = -(-LEAST_WIDTH // drawn.shape[3])
        size = (drawn.shape[2] * zoom, drawn.shape[3] * zoom)
        inputs = {name: _draw_input(name, component, batch, size) for name, component in known.items()}
        for name, tiles in {**inputs, "drawn": drawn, "original": batch["image"]}.items():
            if tiles is not None:
                large = F.interpolate(to_rgb(tiles.cpu().float()), size=size, mode="nearest-exact")  # square pixels
                rows.setdefault(name, []).append(large)
        captions += batch["caption"] if "prompts" in known and "caption" in batch else []
    if not rows:
        raise LatelierError("There are no records to draw and show.")
    whole = [torch.cat(tiles) for tiles in rows.values()]  # each (n, 3, H, W)
    return make_grid(torch.cat(whole), columns=len(whole[0])), captions


def _draw_input(name: str, component: Any, batch: Mapping[str, Any], size: tuple[int, int]) -> Tensor | None:
    """Images `(b, c, h, w)` of what a model is conditioned on; None for classes and captions."""
    if name == "low_resolution":
        return batch["low"]
    if name == "inpainting":
        return torch.where(batch["hole"] > 0.5, 0.0, batch["image"].cpu().float())
    if name == "layouts":
        names = component.config.get("names")
        regions = [box_regions(boxes, labels, size) for boxes, labels in zip(batch["boxes"], batch["box_labels"])]
        return torch.stack([draw_boxes(one, size, names) for one in regions])
    if name == "segmentations":
        return colour_map(batch["segmentation"])
    return batch["map"] if name == "maps" else None


def draw_boxes(regions: Sequence[Region], size: tuple[int, int], names: list[str] | None) -> Float[Tensor, "3 h w"]:
    """Rectangles in their classes' colours, with the classes' names or numbers, in [-1, 1]; `size` is (h, w)."""
    canvas = Image.new("RGB", (size[1], size[0]), (BACKGROUND,) * 3)
    draw = ImageDraw.Draw(canvas)
    for label, (x0, y0, x1, y1) in regions:
        draw.rectangle([x0, y0, x1 - 1, y1 - 1], outline=colour(label), width=2)
    for label, (x0, y0, *_) in regions:  # words on top of all lines
        words = str(names[label]) if names and label < len(names) else str(label)
        left = max(0, min(x0 + 4, size[1] - math.ceil(draw.textlength(words))))  # whole words at the right edge too
        draw.rectangle(draw.textbbox((left, y0 + 2), words), fill=(BACKGROUND,) * 3)
        draw.text((left, y0 + 2), words, fill=colour(label))
    return torch.from_numpy(np.array(canvas)).movedim(-1, 0).float() / 127.5 - 1  # (3, h, w)


def colour_map(ids: Integer[Tensor, "b h w"]) -> Float[Tensor, "b 3 h w"]:
    """Label maps in the classes' colours, in [-1, 1]; 0, the background, is light grey."""
    palette = torch.tensor([(BACKGROUND,) * 3, *(colour(i) for i in range(1, int(ids.max()) + 1))])  # (k, 3)
    return palette[ids.cpu().long()].movedim(-1, 1).float() / 127.5 - 1


def colour(label: int) -> tuple[int, int, int]:
    """A class's colour, always the same; dark enough for words on a light background."""
    red, green, blue = (round(255 * x) for x in colorsys.hsv_to_rgb(label * GOLDEN % 1, 0.9, 0.75))
    return red, green, blue
