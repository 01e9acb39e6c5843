"""Anybody's images against anybody's: two folders, `.npz` files, or the statistics of a reference.

Named protocols fix what published numbers depend on, and refuse what does not fit:

    adm-imagenet256, adm-imagenet512   50,000 samples against the ADM evaluator's reference: the gFID of DiT, SiT, ...
    rfid-imagenet-val50k               50,000 reconstructions against the same originals: the rFID of RAE, DC-AE, ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from latelier.data.folder import list_images, open_file
from latelier.data.reading import UNREADABLE
from latelier.data.transforms import Transform, to_float
from latelier.errors import LatelierError, first_line
from latelier.evaluation.archives import Archive
from latelier.evaluation.distributions import FeatureStatistics, frechet_distance, precision_recall
from latelier.evaluation.features import OF_INCEPTION, FeatureExtractor, load_extractor
from latelier.evaluation.generation import NEIGHBOURS, evaluate_generation
from latelier.evaluation.metrics import METRICS
from latelier.evaluation.reconstruction import image_metrics, measure_mean
from latelier.evaluation.references import FeatureCollector, collect
from latelier.evaluation.results import Measurement, mean_with_interval
from latelier.publish import sha256
from latelier.receipt import make_receipt
from latelier.recipe import Evaluate

Batches = Iterator[Float[Tensor, "b c h w"]]
OF_SETS = ("gfd", "kid", "precision", "recall")
OF_PAIRS = ("psnr", "ssim", "lpips")
OF_RUNS = ("fid50k", "fdr", "objects", "convergence")  # which need a run, or are another name
OF_IMAGES = {name for name, metric in METRICS.items() if metric.group == "reconstruction"} - {"rfd"}
STATISTICS = {"gfd": ("mu", "sigma", "features"), "sfid": ("mu_s", "sigma_s", "spatial")}


@dataclass(frozen=True)
class Protocol:
    """What a published number depends on."""

    size: int
    count: int
    features: str
    paired: bool  # each image against its own original, or a set against a reference's statistics


PROTOCOLS = {
    "adm-imagenet256": Protocol(256, 50_000, OF_INCEPTION, False),
    "adm-imagenet512": Protocol(512, 50_000, OF_INCEPTION, False),
    "rfid-imagenet-val50k": Protocol(256, 50_000, OF_INCEPTION, True),
}


@dataclass(frozen=True)
class ImageSet:
    """Images of one size.

    Attributes:
        names: of a folder's images, relative and without suffix; None for archives.
        read: batches in [-1, 1].
        statistics: `mu`, `sigma`, ... of a reference; empty for images.
    """

    path: Path
    count: int
    size: tuple[int, int]
    names: list[str] | None
    read: Callable[[int], Batches]
    statistics: dict[str, Tensor]


def measure(
    ours: str | Path, theirs: str | Path, features: Sequence[str] = ("vgg16",), metrics: Sequence[str] = (),
    size: int | None = None, protocol: str | None = None, batch: int = 64, seed: int = 0,
    device: torch.device | str = "cpu",
) -> list[Measurement]:  # fmt: skip
    """Measures of images against a reference.

    Args:
        ours: a folder of images, or an `.npz` with `arr_0`.
        theirs: the same, or an `.npz` with statistics (`mu`, `sigma`).
        features: extractors, as in `evaluate.features`.
        metrics: of `gfd`, `kid`, `cmmd`, `precision`, `recall`, `inception-score`, `sfid`; where names pair up also
            `psnr`, `ssim`, `lpips`, `ms-ssim`, `l1`; against statistics `gfd`, `sfid`, `precision`, `recall`. By
            default the common ones that apply.
        size: crop images of folders to squares of this side (as ADM does); None: all must have one size.
        protocol: a name in `PROTOCOLS`.
        batch, seed, device: of the networks; seed of KID's subsets.

    Raises:
        LatelierError: for what cannot be read, sizes that differ, pairs that do not match, a metric that does not
            apply, or a protocol that does not fit.
    """
    fixed = _protocol(protocol)
    if fixed is not None:
        size, features = fixed.size, (fixed.features,)
    a, b = open_images(ours, size), open_images(theirs, size)
    if a.statistics and not a.count:
        raise LatelierError(f"{ours} holds statistics and no images; give the images first, then the reference.")
    if a.count and b.count and a.size != b.size:
        raise LatelierError(f"{ours} has images of {_by(a.size)}, {theirs} of {_by(b.size)}; use --size to crop both.")
    paired = a.names is not None and a.names == b.names
    if fixed is not None:
        _check_protocol(str(protocol), fixed, a, b, paired)
    offered = _offered(b, paired)
    for name in metrics:
        if name in OF_IMAGES and not paired:
            raise LatelierError(f"{name} compares pairs of images, but {_unpaired(a, b)}.")
        if name not in offered:
            raise LatelierError(f"{name!r} cannot be measured against {theirs}; allowed: {', '.join(offered)}.")
    wanted = tuple(metrics) or tuple(name for name in offered if b.statistics or name in OF_SETS + OF_PAIRS)
    single = [name for name in wanted if name in OF_IMAGES]
    about = {"images": str(ours), "reference": str(theirs), "image_size": list(a.size), "protocol": protocol or "none"}
    found: list[Measurement] = []
    if b.statistics:
        extractor = _inception(features, b)
        found += _against_statistics(a, b, extractor, wanted, about, batch)
    elif of_sets := [name for name in wanted if name not in single]:
        asked = Evaluate(
            metrics=of_sets, features=list(features), samples=max(a.count, b.count), batch=batch, seed=seed
        )
        references = ({"image": images} for images in b.read(batch))
        found += evaluate_generation(a.read(batch), references, asked, about, device)
    if single:
        each = image_metrics(single, device)
        values: dict[str, list[Tensor]] = {name: [] for name in each}
        for x, y in zip(a.read(batch), b.read(batch)):
            for name, metric in each.items():
                values[name].append(metric(x.to(device), y.to(device)).cpu())
        receipt = make_receipt(n=a.count, **about)
        found += [measure_mean(name, torch.cat(rows), name, receipt) for name, rows in values.items()]
    return [_as_reconstruction(one) for one in found] if paired else found


def open_images(path: str | Path, size: int | None = None) -> ImageSet:
    """A folder of images, or an `.npz` of the ADM evaluator's form."""
    path = Path(path).expanduser()
    if path.suffix == ".npz" and path.is_file():
        archive = Archive(path)
        count, *sides = archive.shape or (0, 0, 0, 3)
        if count and size not in (None, sides[0]):
            raise LatelierError(f"{path} has images of {_by((sides[0], sides[1]))}, but {size} pixels are asked for.")

        def read(batch: int) -> Batches:
            return (to_float(images.permute(0, 3, 1, 2)) for images in archive.batches(batch))

        return ImageSet(path, count, (sides[0], sides[1]), None, read, archive.statistics)
    if not path.is_dir():
        raise LatelierError(f"{path} is neither a folder of images nor an .npz file; check the path.")
    files = list_images(path)
    if not files:
        raise LatelierError(f"There are no images in {path}.")
    first = _pixels(files[0], size)
    size_of_all = (first.shape[1], first.shape[2])

    def images(batch: int) -> Batches:
        for start in range(0, len(files), batch):
            rows = [_pixels(file, size) for file in files[start : start + batch]]
            for file, row in zip(files[start:], rows):
                if row.shape[1:] != size_of_all:
                    raise LatelierError(
                        f"{file} is {_by(row.shape[1:])}, the first image {_by(size_of_all)}; use --size."
                    )
            yield to_float(torch.stack(rows))

    names = [str(file.relative_to(path).with_suffix("")) for file in files]
    return ImageSet(path, len(files), size_of_all, names, images, {})


def _pixels(file: Path, size: int | None) -> Tensor:
    """`(3, h, w)` 8-bit levels; cropped as ADM does."""
    try:
        image = open_file(file)
        sides = (size, size) if size is not None else _sides(image)
        return Transform(sides, flip=False).pixels(image)[0]
    except UNREADABLE as error:
        raise LatelierError(f"{file} cannot be read ({first_line(error)}); take it out of the folder.") from None


def _sides(image: Any) -> tuple[int, int]:
    return image.shape[:2] if hasattr(image, "shape") else (image.height, image.width)


def _offered(b: ImageSet, paired: bool) -> list[str]:
    """What can be measured against a reference."""
    if b.statistics:
        found = [
            name for name, (mean, covariance, _) in STATISTICS.items() if {mean, covariance} <= b.statistics.keys()
        ]
        return found + ["precision", "recall"] * bool(b.count)
    of_sets = [name for name, metric in METRICS.items() if metric.group == "generation" and name not in OF_RUNS]
    return of_sets + [name for name in METRICS if name in OF_IMAGES and paired]


def _against_statistics(
    a: ImageSet, b: ImageSet, extractor: FeatureExtractor, wanted: Sequence[str], about: dict[str, Any], batch: int
) -> list[Measurement]:
    """FID and sFID by a reference's statistics; precision and recall by the images that it has."""
    kept = {"features", "vectors"} | ({"spatial"} if "sfid" in wanted else set())
    ours = collect([FeatureCollector(extractor, kept)], a.read(batch), False)[extractor.name]
    receipt = make_receipt(n=ours.n, **about, reference_sha256=sha256(b.path), **extractor.describe())
    found = []
    for name, (mean, covariance, output) in STATISTICS.items():
        if name in wanted:
            whole: FeatureStatistics = ours.sums[output].whole()
            value = frechet_distance(whole.mean, whole.covariance, b.statistics[mean], b.statistics[covariance])
            shown = f"{name}-{extractor.name}" if name == "gfd" else name
            found.append(Measurement(shown, value, {**receipt, "statistics": "of the file"}))
    if {"precision", "recall"} & set(wanted):
        theirs = collect([FeatureCollector(extractor, {"vectors"})], b.read(batch), False)[extractor.name]
        inside = precision_recall(ours.vectors, theirs.vectors, NEIGHBOURS)
        held = {**receipt, "n_reference": theirs.n, "neighbours": NEIGHBOURS}
        shares = zip(("precision", "recall"), inside)
        found += [Measurement(name, mean_with_interval(x)[0], held) for name, x in shares if name in wanted]
    return found


def _inception(features: Sequence[str], b: ImageSet) -> FeatureExtractor:
    if list(features) != [OF_INCEPTION]:
        raise LatelierError(
            f"{b.path} holds statistics of FID's Inception, but the features are {', '.join(features)}; "
            f"use --features {OF_INCEPTION}."
        )
    return load_extractor(OF_INCEPTION)


def _protocol(name: str | None) -> Protocol | None:
    if name is not None and name not in PROTOCOLS:
        raise LatelierError(f"protocol = {name!r} is not known; allowed: {', '.join(PROTOCOLS)}.")
    return None if name is None else PROTOCOLS[name]


def _check_protocol(name: str, fixed: Protocol, a: ImageSet, b: ImageSet, paired: bool) -> None:
    if a.count != fixed.count:
        raise LatelierError(f"{name} takes {fixed.count:,} images, but {a.path} has {a.count:,}.")
    if a.size != (fixed.size, fixed.size):
        raise LatelierError(f"{name} takes images of {fixed.size} pixels, but {a.path} has {_by(a.size)}.")
    if fixed.paired and not paired:
        raise LatelierError(f"{name} compares each image with its original, but {_unpaired(a, b)}.")
    if not fixed.paired and not b.statistics:
        raise LatelierError(f"{name} needs the ADM evaluator's reference (.npz with mu and sigma), not {b.path}.")


def _unpaired(a: ImageSet, b: ImageSet) -> str:
    """Why two sets are no pairs."""
    if a.names is None or b.names is None:
        return f"{a.path} and {b.path} are not both folders, whose names could pair up"
    alone = next(chain(sorted({*a.names} ^ {*b.names}), ["their order"]))
    return f"the names in {a.path} and {b.path} differ ({alone})"


def _as_reconstruction(found: Measurement) -> Measurement:
    """The Fréchet distance of pairs is called rfd."""
    name = found.name
    return Measurement(f"r{name[1:]}" if name.startswith("gfd-") else name, found.value, found.receipt, found.interval)


def _by(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))
