"""How well a model does what it is told: enlarges, fills holes, follows layouts, maps and captions.

What is measured follows from what the model's conditioner asks for. Each held-out record is drawn once, and each number
stands beside the same of something simple: bicubic enlargement, holes in one colour, the layout of another image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from latelier.conditioning.condition import components
from latelier.errors import LatelierError
from latelier.evaluation.clip import CLIPScore
from latelier.evaluation.distributions import FeatureStatistics
from latelier.evaluation.features import FeatureExtractor, load_extractor
from latelier.evaluation.reconstruction import SETTINGS, image_metrics
from latelier.evaluation.regions import RegionJudge, Templates
from latelier.evaluation.results import Measurement, mean_with_interval, size_warning
from latelier.receipt import make_receipt
from latelier.recipe import Evaluate, Sample

HOLES = "thick"  # LaMa's evaluation setting
Batch = dict[str, Any]
Metrics = Mapping[str, Callable[[Tensor, Tensor], Tensor]]


@torch.no_grad()
def evaluate_tasks(
    pipeline: Any,
    records: Iterable[Mapping[str, Any]],
    training: Callable[[], Iterable[Mapping[str, Any]]],
    sample: Sample,
    evaluate: Evaluate,
    receipt: Mapping[str, Any],
) -> list[Measurement]:
    """Draw what held-out records say, and judge it.

    Args:
        pipeline: a `LatentDiffusionPipeline`.
        records: batches of held-out records; at most `evaluate.samples` images are read.
        training: gives batches of training records, for the templates of layouts and label maps.
        sample: how images are drawn; image i from seed `sample.seed + i`.
        evaluate: which metrics (psnr, ssim and lpips of enlarged, lpips and gfd of filled images), the first of
            which features, which CLIP, and the seed of the holes.
        receipt: what is known besides: reference, data, tokenizer, ema, images_trained.

    Returns:
        `sr-<metric>` and `bicubic-<metric>`, `inpainting-<metric>` and `mean-fill-<metric>`, and how far the first is
        above the second in the same images, `<task>-<metric>-difference`; `layout-match` and
        `segmentation-match` with `-chance` and `-real`; `clip-score` and `clip-score-real`. Empty for models that are
        told classes, maps or nothing.

    Raises:
        LatelierError: if there are no records, or they lack what is needed.
    """
    device = pipeline.codec.device
    judges = _judges(components(pipeline.conditioner), training, evaluate, device)
    if not judges:
        return []
    n, size = 0, (0, 0)
    for batch, drawn in draw_records(pipeline, records, sample, evaluate.samples, evaluate.seed):
        n, size = n + len(drawn), (drawn.shape[2], drawn.shape[3])
        for judge in judges:
            judge.look(batch, drawn.to(device), batch["image"].to(device))
    if n == 0:
        raise LatelierError("There are no held-out records to draw; see data.val_source and data.val_fraction.")
    settings = {k: v for k, v in sample.model_dump().items() if k not in ("count", "batch", "classes")}
    about = make_receipt(n=n, image_size=size, **{**settings, **receipt})
    return [measurement for judge in judges for measurement in judge.measure(about)]


@torch.no_grad()
def draw_records(
    pipeline: Any, records: Iterable[Mapping[str, Any]], sample: Sample, count: int, seed: int
) -> Iterator[tuple[Batch, Float[Tensor, "b c h w"]]]:
    """One image for each record, on the CPU; filled ones are the originals outside of the holes.

    Args:
        pipeline: a `LatentDiffusionPipeline`.
        records: batches of records.
        sample: how images are drawn; image i from seed `sample.seed + i`.
        count: images at most.
        seed: of the holes; those of image i are a function of `(seed, i)`.

    Yields:
        A batch of records, with what was made of them before they were drawn: `low`, small images, and `hole`; and
        the images.
    """
    from latelier.conditioning.spatial import compose
    from latelier.data import masks

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
        yield batch, compose(drawn, image.to(drawn), batch["hole"]) if "inpainting" in known else drawn
        done += len(image)
        if done >= count:
            return


def _judges(
    known: Mapping[str, Any],
    training: Callable[[], Iterable[Mapping[str, Any]]],
    evaluate: Evaluate,
    device: torch.device,
) -> list[Judge]:
    """Those who have something to measure."""
    judges: list[Judge] = []
    wanted = [name for name in ("psnr", "ssim", "lpips") if name in evaluate.metrics]
    if "low_resolution" in known and wanted:
        metrics = image_metrics(evaluate, device)
        judges.append(EnlargementJudge({name: metrics[name] for name in wanted}, known["low_resolution"].config))
    if "inpainting" in known and {"lpips", "gfd"} & set(evaluate.metrics):
        lpips = {k: v for k, v in image_metrics(evaluate, device).items() if k == "lpips"}
        extractor = load_extractor(evaluate.features[0], device) if "gfd" in evaluate.metrics else None
        judges.append(FillingJudge(lpips, extractor, evaluate.seed))
    for input_name in ("layouts", "segmentations"):
        if input_name in known:
            judges.append(RegionJudge(input_name, Templates.of(training(), input_name)))
    if "prompts" in known and evaluate.clip:
        judges.append(CaptionJudge(CLIPScore(evaluate.clip, device)))
    return judges


class Judge(Protocol):
    """Sees all drawn images in batches, then says its numbers."""

    def look(self, batch: Mapping[str, Any], drawn: Tensor, original: Tensor) -> None: ...

    def measure(self, about: Mapping[str, Any]) -> list[Measurement]: ...


class Means:
    """Means over images of some metrics, of drawn images and of a simple rival.

    Args:
        metrics: by name, `(images, originals)` to `(b,)`.
        names: of the two, before the metric's.
    """

    def __init__(self, metrics: Metrics, names: tuple[str, str]):
        self._metrics, self._names = metrics, names
        self._values: dict[str, list[Tensor]] = {f"{side}-{metric}": [] for side in names for metric in metrics}

    def add(self, drawn: Tensor, rival: Tensor, original: Tensor) -> None:
        """Count a batch in."""
        for side, images in zip(self._names, (drawn, rival)):
            for name, metric in self._metrics.items():
                self._values[f"{side}-{name}"].append(metric(images, original).cpu())

    def measure(self, about: Mapping[str, Any]) -> list[Measurement]:
        """`<side>-<metric>`, and `<drawn>-<metric>-difference`: drawn minus rival, image by image; with intervals.

        Images differ far more among each other than drawn and rival do, so the difference is known more closely.
        """
        values = {name: torch.cat(parts_) for name, parts_ in self._values.items()}  # (n,)
        drawn, rival = self._names
        for metric in self._metrics:
            values[f"{drawn}-{metric}-difference"] = values[f"{drawn}-{metric}"] - values[f"{rival}-{metric}"]
        result = []
        for name, each in values.items():
            metric = name.removesuffix("-difference").split("-")[-1]
            mean, interval = mean_with_interval(each)
            result.append(Measurement(name, mean, {**about, "settings": SETTINGS[metric]}, interval))
        return result


class EnlargementJudge:
    """Super-resolution against the originals, beside bicubic enlargement of the same small images.

    Args:
        metrics: of psnr, ssim, lpips.
        config: of the conditioner.
    """

    def __init__(self, metrics: Metrics, config: Mapping[str, Any]):
        self._means = Means(metrics, ("sr", "bicubic"))
        self._about = {
            "factor": config["factor"], "degradation": config["degradation"], "degradation_seed": config["seed"],
            "bicubic": "a = -1/2, as PIL and MATLAB",
        }  # fmt: skip

    def look(self, batch: Mapping[str, Any], drawn: Tensor, original: Tensor) -> None:
        """See drawn images; `batch["low"]` is what they were drawn from."""
        self._means.add(drawn, enlarge(batch["low"].to(original), original.shape[2], original.shape[3]), original)

    def measure(self, about: Mapping[str, Any]) -> list[Measurement]:
        """`sr-<metric>`, `bicubic-<metric>`."""
        return self._means.measure({**about, **self._about})


class FillingJudge:
    """Inpainting against the originals, beside holes in the mean colour of the rest of the image.

    Args:
        metrics: lpips, or nothing.
        extractor: of the features whose distributions are compared; None for none.
        seed: of the holes, for the receipt.
    """

    def __init__(self, metrics: Metrics, extractor: FeatureExtractor | None, seed: int):
        self._means, self._extractor = Means(metrics, ("inpainting", "mean-fill")), extractor
        dims = extractor.dims if extractor else 0
        self._drawn, self._filled, self._real = (FeatureStatistics(dims) for _ in range(3))
        self._about = {"masks": f"LaMa's {HOLES}, lengths in proportion to the image", "mask_seed": seed}
        self._covered = 0.0

    def look(self, batch: Mapping[str, Any], drawn: Tensor, original: Tensor) -> None:
        """See images whose `batch["hole"]` was filled."""
        hole = batch["hole"].to(original)  # (b, 1, h, w)
        filled = fill_with_mean(original, hole)
        self._covered += hole.mean((1, 2, 3)).sum().item()
        self._means.add(drawn, filled, original)
        if self._extractor:
            self._drawn.update(self._extractor(drawn))
            self._filled.update(self._extractor(filled))
            self._real.update(self._extractor(original))

    def measure(self, about: Mapping[str, Any]) -> list[Measurement]:
        """`inpainting-` and `mean-fill-`: `lpips` and `fd-<features>`."""
        told = {**about, **self._about, "masked_share": self._covered / about["n"]}
        result = self._means.measure(told)
        if self._extractor:
            warning = size_warning(about["n"], self._extractor.dims)
            told |= {**self._extractor.describe(), "n_reference": about["n"], **warning}
            for side, statistics in (("inpainting", self._drawn), ("mean-fill", self._filled)):
                name = f"{side}-fd-{self._extractor.name}"
                result.append(Measurement(name, statistics.distance(self._real), told))
        return result


class CaptionJudge:
    """Images and the captions that they were drawn from, beside the original images.

    Args:
        clip: what compares them.
    """

    def __init__(self, clip: CLIPScore):
        self._clip = clip
        self._drawn: list[Tensor] = []
        self._real: list[Tensor] = []

    def look(self, batch: Mapping[str, Any], drawn: Tensor, original: Tensor) -> None:
        """See images that `batch["caption"]` describes."""
        if "caption" not in batch:
            raise LatelierError("clip-score cannot be measured: the records have no 'caption'; see data.caption_key.")
        self._drawn.append(self._clip(drawn, batch["caption"]))
        self._real.append(self._clip(original, batch["caption"]))

    def measure(self, about: Mapping[str, Any]) -> list[Measurement]:
        """`clip-score`, and what CLIP says of the originals."""
        result, told = [], {**about, **self._clip.describe()}
        for name, scores in (("clip-score", self._drawn), ("clip-score-real", self._real)):
            mean, interval = mean_with_interval(torch.cat(scores))
            result.append(Measurement(name, mean, told, interval))
        return result


# -- simple rivals ----------------------------------------------------------------------------------------------------


def enlarge(low: Float[Tensor, "b c i j"], height: int, width: int) -> Float[Tensor, "b c h w"]:
    """Bicubic enlargement with PIL's kernel, a = -1/2 (torch has it only under `antialias`)."""
    return F.interpolate(low, size=(height, width), mode="bicubic", antialias=True).clamp(-1, 1)


def fill_with_mean(image: Float[Tensor, "b c h w"], hole: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b c h w"]:
    """Holes in the mean colour of the rest of each image."""
    rest = (hole < 0.5).to(image)  # (b, 1, h, w)
    mean = (image * rest).sum((2, 3), keepdim=True) / rest.sum((2, 3), keepdim=True)  # (b, c, 1, 1)
    return torch.where(hole > 0.5, mean, image)
