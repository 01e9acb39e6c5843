"""How good generated images are, as a set, whether they are merely memorized, and how fast a denoiser learns.

Convergence (DC-AE 1.5, figure 1): every snapshot of a training meets the same held-out latents, times, noise and seeds,
with all channels and conditions, so that a curve shows what the weights have learnt.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from latelier.data.latents import encode_batches
from latelier.data.loader import ImageDataset
from latelier.denoisers.objective import DenoisingObjective
from latelier.errors import LatelierError, NotMeasurable
from latelier.evaluation import references
from latelier.evaluation.curves import reach
from latelier.evaluation.distributions import DISCREPANCIES, GROUPS, precision_recall, subset_mmd
from latelier.evaluation.features import NEEDS, FeatureExtractor, check_features, inception_of, load_extractors
from latelier.evaluation.metrics import FOLLOWED, METRICS, better, plain
from latelier.evaluation.objects import measure_objects, open_recogniser, shows_objects
from latelier.evaluation.reconstruction import FRECHET_INTERVAL, read_images
from latelier.evaluation.references import FeatureCollector, FeatureSet, Key, collect, reference_key, reference_sets
from latelier.evaluation.results import (
    AT_MOST,
    NOT_REACHED,
    Measurement,
    is_main,
    left_out,
    mean_with_interval,
    size_warning,
    write_measurements,
)
from latelier.opening import held_out_records, open_images, snapshot_folder
from latelier.pipeline import LatentDiffusionPipeline
from latelier.publish import MANIFEST, sha256
from latelier.receipt import make_receipt
from latelier.recipe import Evaluate, Recipe, Sample
from latelier.tokenizers.codec import Codec

NEIGHBOURS = 3  # of precision and recall
ROUNDING = 1e-6  # of the features' variance: Fréchet distances below are 0
PASSES = 4  # times, each with noise of its own, at which convergence meets each held-out latent
CLIP = "clip"  # how extractors' names begin that CMMD is defined in
KEPT = {"gfd": "features", "fid50k": "features", "fdr": "features", "sfid": "spatial", "inception-score": "logits"}
KEPT |= dict.fromkeys(("kid", "cmmd", "precision", "recall"), "vectors")


@torch.no_grad()
def evaluate_generation(
    samples: Iterable[Float[Tensor, "_ c h w"]], references: Iterable[Mapping[str, Any]], evaluate: Evaluate,
    receipt: Mapping[str, Any], device: torch.device | str = "cpu", key: Key | None = None, shared: bool = False,
    held_out: Iterable[Mapping[str, Any]] = (), held_out_key: Key | None = None,
) -> list[Measurement]:  # fmt: skip
    """Compare generated images with real ones, at most `evaluate.samples` of each, as distributions of features.

    As far as `evaluate` names them: `gfd-<features>` and `kid-<features>` for each of the features, `cmmd-<features>`
    for each CLIP, `precision` and `recall` (k = 3) in the first; `sfid` and `inception-score` in the first that gives
    what they need, `fid50k` in `inception`. `fdr-<features>`, and `fdr` of several, compare with `held_out` images, see
    `relative_distances`, which have a key of their own. Nothing on processes that only take part.

    Samples are batches of images in [-1, 1], references dicts with `image`, of which features are cached under `key`,
    see `reference_key`; `receipt` says how samples came about: reference, sampler, steps, guidance, ema, seed,
    tokenizer. If `shared`, all processes take part, each with its own batches, see `gather_in_order`.
    """
    wanted = set(KEPT) & set(evaluate.metrics)
    if not wanted:
        return []
    check_features(evaluate)
    spaces = _spaces(wanted, load_extractors(evaluate.features, device))
    collectors = [collector for collector, _ in spaces]
    ours = collect(collectors, read_images(({"image": batch} for batch in samples), evaluate.samples), shared)
    known = [FeatureCollector(c.extractor, {*c.kept} - {"logits"} or {"features"}) for c in collectors]
    theirs = reference_sets(known, read_images(references, evaluate.samples), key, shared)
    yardstick: dict[str, FeatureSet] = {}
    if "fdr" in wanted:
        plain = [FeatureCollector(c.extractor, ("features",)) for c in collectors]
        yardstick = reference_sets(plain, read_images(held_out, evaluate.samples), held_out_key, shared)
    if not is_main(shared):
        return []
    result: list[Measurement] = []
    for collector, metrics in spaces:
        a, b = ours[collector.name], theirs[collector.name]
        if not a.n or not b.n:
            raise LatelierError(f"Generation cannot be evaluated from {a.n} samples and {b.n} reference images.")
        about = make_receipt(n=a.n, n_reference=b.n, **receipt, **collector.extractor.describe())
        result += _measure(collector.extractor, metrics, a, b, about, evaluate.seed)
    if "fdr" in wanted:
        chosen = [collector.extractor for collector, metrics in spaces if "fdr" in metrics]
        about = make_receipt(**receipt, held_out=(held_out_key or {}).get("data"))
        result += relative_distances(chosen, ours, theirs, yardstick, about)
    return result


def relative_distances(
    extractors: Sequence[FeatureExtractor], samples: Mapping[str, FeatureSet], training: Mapping[str, FeatureSet],
    held_out: Mapping[str, FeatureSet], receipt: Mapping[str, Any],
) -> list[Measurement]:  # fmt: skip
    """`fdr-<features>` = FD(samples, training images) / FD(held-out images, training images), and `fdr`, the plain mean
    over several extractors: FDr^k (2026, arXiv 2604.28190). 1 is as far as held-out images are, 0 the training images.

    The divisor is always measured here, on as many held-out images as there are samples: constants from elsewhere hold
    for their weights and images only. Left out, with the reason, where there are fewer.
    """
    found: list[Measurement] = []
    for extractor in extractors:
        ours, theirs, real = (sets[extractor.name] for sets in (samples, training, held_out))
        if why := METRICS["fdr"].lacks(min(ours.n, real.n), 3, (1, 1)):
            return [left_out("fdr", f"{why} on the smaller side of samples and held-out images")]
        if real.n < ours.n:
            why = f"it needs as many held-out images as samples, and there are {real.n:,} for {ours.n:,}"
            return [left_out("fdr", f"{why}; hold out more, or set evaluate.samples={real.n}")]
        whole, *others = (each.sums["features"].whole() for each in (theirs, ours, real))
        distance, divisor = (other.distance(whole) for other in others)
        if not divisor > ROUNDING * float(whole.covariance.trace()):
            return [left_out("fdr", "the held-out images are the training images; give others with data.val_source")]
        about = {**receipt, "n": ours.n, "n_reference": theirs.n, "n_held_out": real.n, **extractor.describe()}
        about |= {"distance": distance, "held_out_distance": divisor, **size_warning(ours.n, extractor.dims)}
        found.append(Measurement(f"fdr-{extractor.name}", distance / divisor, about))
    if len(found) > 1:
        mean = sum(one.value for one in found) / len(found)
        about = {**receipt, "n": found[0].receipt["n"], "features": [e.name for e in extractors], "mean": "plain"}
        found.append(Measurement("fdr", mean, about))
    return found


def batches(sample: Sample, count: int) -> Iterator[Sample]:
    """Settings of `count` images in batches; image i has the seed `sample.seed + i`, and the i-th class in turn."""
    for done in range(0, count, sample.batch):
        turn, size = done % len(sample.classes or [0]), min(sample.batch, count - done)
        classes = sample.classes and sample.classes[turn:] + sample.classes[:turn]
        yield sample.model_copy(update={"seed": sample.seed + done, "count": size, "classes": classes})


def generate_images(
    pipeline: LatentDiffusionPipeline, recipe: Recipe, count: int, process: int = 0, processes: int = 1
) -> Iterator[Float[Tensor, "b c h w"]]:
    """A process's batches of `count` samples with the recipe's settings; image i has the seed `sample.seed + i`, and a
    model that is conditioned on more than classes gets the held-out records in turn.
    """
    records = held_out_records(recipe, pipeline)
    for settings in list(batches(recipe.sample, count))[process::processes]:
        inputs = records(settings.seed - recipe.sample.seed, settings.count)
        yield pipeline(sample=settings, records=inputs, output_type="pt", progress=False).images


def describe_sampling(sample: Sample, pipeline: Any) -> dict[str, Any]:
    """What receipts say of how images were sampled."""
    said = {name: value for name, value in sample.model_dump().items() if name not in ("count", "batch")}
    return {**said, "shift": pipeline.sampling_shift(sample)}


def _spaces(wanted: set[str], extractors: Sequence[FeatureExtractor]) -> list[tuple[FeatureCollector, set[str]]]:
    """The extractors in their order, and what is measured in each."""
    chosen = {extractor.name: wanted & {"gfd", "kid", "fdr"} for extractor in extractors}
    chosen[extractors[0].name] |= wanted & {"precision", "recall"}
    for extractor in extractors:
        if extractor.name.startswith(CLIP):
            chosen[extractor.name] |= wanted & {"cmmd"}
    for metric in wanted & set(NEEDS):
        chosen[inception_of(extractors, metric).name].add(metric)
    used = [(extractor, chosen[extractor.name]) for extractor in extractors if chosen[extractor.name]]
    return [(FeatureCollector(e, sorted({KEPT[m] for m in metrics})), metrics) for e, metrics in used]


def _measure(
    extractor: FeatureExtractor, wanted: set[str], ours: FeatureSet, theirs: FeatureSet, about: Mapping[str, Any],
    seed: int,
) -> list[Measurement]:  # fmt: skip
    """All metrics of one extractor, in a fixed order."""
    result: list[Measurement] = []

    def frechet(names: Sequence[str], output: str) -> None:
        value, interval = ours.sums[output].distance(theirs.sums[output])
        described = extractor.describe(output)
        warning = size_warning(min(ours.n, theirs.n), described["dims"])
        scale = theirs.sums[output].scale() if interval else {}
        receipt = {**about, **described, **scale, **warning, "interval": FRECHET_INTERVAL}
        result.extend(Measurement(name, value, receipt, interval) for name in names)

    if "fid50k" in wanted and (why := METRICS["fid50k"].lacks(min(ours.n, theirs.n), 3, (1, 1))):
        raise LatelierError(f"fid50k: {why}; what fewer images give is called gfd-inception: ask for gfd.")
    if names := [f"gfd-{extractor.name}"] * ("gfd" in wanted) + ["fid50k"] * ("fid50k" in wanted):
        frechet(names, "features")
    if "sfid" in wanted:
        frechet(["sfid"], "spatial")
    if "inception-score" in wanted:
        value, interval = ours.score.measure()
        receipt = {**about, **extractor.describe("logits"), "splits": GROUPS, "interval": "Student's t over splits"}
        result.append(Measurement("inception-score", value, receipt, interval))
    held = {**about, "n_vectors": len(ours.vectors), "n_reference_vectors": len(theirs.vectors)}
    for metric, (kernel, scale, words) in DISCREPANCIES.items():
        if metric in wanted:
            value, interval, subsets = subset_mmd(ours.vectors, theirs.vectors, kernel, seed)
            if "standard_error" in subsets:
                subsets["standard_error"] *= scale
            receipt = {**held, "kernel": words, **subsets, "interval": "Student's t over subsets"}
            ends = interval and (scale * interval[0], scale * interval[1])
            result.append(Measurement(f"{metric}-{extractor.name}", scale * value, receipt, ends))
    if wanted & {"precision", "recall"}:
        x, y = (each.vectors.to(extractor.device) for each in (ours, theirs))  # (n, d), (m, d)
        inside = precision_recall(x, y, NEIGHBOURS)
        for name, each in zip(("precision", "recall"), inside):
            if name in wanted:
                mean, interval = mean_with_interval(each)
                ends = interval and (max(0.0, interval[0]), min(1.0, interval[1]))  # a share cannot leave [0, 1]
                result.append(Measurement(name, mean, {**held, "neighbours": NEIGHBOURS}, ends))
    return result


@dataclass
class Neighbours:
    """The nearest training images of some samples."""

    indices: Int[Tensor, "n k"]  # in the order in which references came
    distances: Float[Tensor, "n k"]  # Euclidean, of features, ascending
    images: Float[Tensor, "n k c h w"]


@torch.no_grad()
def nearest(
    samples: Float[Tensor, "n c h w"], references: Iterable[Mapping[str, Any]], extractor: FeatureExtractor, k: int = 1
) -> Neighbours:
    """Each sample's k nearest images of `references`, dicts with `image`, in an extractor's features, in one pass."""
    own = extractor(samples).cpu()  # (n, d)
    n, seen = len(samples), 0
    best = Neighbours(torch.zeros(n, 0).long(), torch.zeros(n, 0), samples.cpu().float()[:, None][:, :0])  # none yet
    for batch in references:
        images = batch["image"].cpu().float()  # (b, c, h, w)
        distances = torch.cdist(own, extractor(images).cpu(), compute_mode="donot_use_mm_for_euclid_dist")  # (n, b)
        near = distances.topk(min(k, len(images)), largest=False)  # (n, <= k)
        found = (near.indices + seen, near.values, images[near.indices])
        merged = [torch.cat(pair, 1) for pair in zip((best.indices, best.distances, best.images), found)]
        order = merged[1].argsort(dim=1, stable=True)[:, :k]  # (n, k); of equals the earlier
        best = Neighbours(*(each[torch.arange(n)[:, None], order] for each in merged))
        seen += len(images)
    if seen < k:
        raise LatelierError(f"{k} nearest training images were asked for, but there are only {seen}.")
    return best


def measure_convergence(recipe: Recipe, codec: Codec, held_out: ImageDataset) -> list[Measurement]:
    """Measure every snapshot of the run's denoiser, if the recipe asks for `convergence` or has measured `every`.

    For each, by images seen, what it generates, see `measure_snapshot`, and for `convergence` the loss on held-out
    images, `convergence-loss@<images>`; metrics.json has them at once. In the end `images_to` the levels of
    `evaluate.quality`.
    """
    section, settings = recipe.denoiser, recipe.evaluate
    losses = "convergence" in settings.metrics
    if section is None or not (losses or settings.every):
        return []
    folders = {images: snapshot_folder(recipe.folder, images) for images in section.snapshots_at(settings.every)}
    if missing := [f"{images:,}" for images, folder in folders.items() if not folder.is_dir()]:
        raise NotMeasurable(
            f"{recipe.folder} has no snapshots at {' and '.join(missing)} images, which convergence and `every` need; "
            "they are kept while the denoiser is trained. Train it anew, or take these two out of `evaluate`."
        )
    pipeline = LatentDiffusionPipeline.from_pretrained(recipe.folder / "pipeline").to(codec.device)
    shared = {
        **references.describe_images(recipe, held_out, "val"), "passes": PASSES,
        "seed": settings.seed, "precision": section.precision,
        "latent_shape": list(codec.latent_shape(*recipe.data.image_size)),
        "architecture": type(codec.tokenizer).__name__, "loss": section.loss, "cosine_weight": section.cosine_weight,
        "process": section.process.model_dump(), "channels": "all", "dropped": "nothing",
        "latents": "drawn from the posterior" if section.sample_posterior else "posterior mean",
    }  # fmt: skip
    found: list[Measurement] = []
    tokenizer = codec.hash()
    for images, folder in folders.items():
        found += measure_snapshot(recipe, pipeline, images)
        write_measurements(recipe.folder / "metrics.json", found, "convergence")
        if not losses:
            continue
        load_snapshot(pipeline, folder)
        about = {"images_trained": images, "of": section.images, "ema": section.ema, "tokenizer": tokenizer}
        objective = DenoisingObjective(
            pipeline.denoiser, pipeline.conditioner, pipeline.process, settings.seed, dropout=(), loss=section.loss,
            cosine_weight=section.cosine_weight, sample_posterior=section.sample_posterior,
        )  # fmt: skip
        latents = held_out.once(settings.batch, limit=settings.samples)
        loss, n = held_out_loss(objective.eval(), codec, latents, lambda: pipeline._autocast(section.precision))
        found.append(Measurement(f"{FOLLOWED}loss@{images}", loss, make_receipt(n=n, **shared, **about)))
        write_measurements(recipe.folder / "metrics.json", found, "convergence")
    return found + images_to(found, settings.quality)


def load_snapshot(pipeline: LatentDiffusionPipeline, folder: Path) -> None:
    """Put a snapshot's denoiser, and its conditioner if that was trained, in place of the pipeline's."""
    for name, source in {"denoiser": folder, "conditioner": folder / "conditioner"}.items():
        if source.is_dir():
            model = type(getattr(pipeline, name)).from_pretrained(source)
            pipeline.register_modules(**{name: model.to(pipeline.device).eval()})


@torch.no_grad()
def held_out_loss(
    objective: DenoisingObjective, codec: Codec, images: Iterator[dict[str, Any]],
    precision: Callable[[], AbstractContextManager] = nullcontext,
) -> tuple[float, int]:  # fmt: skip
    """The objective's loss (in evaluation mode), mean over `PASSES` times and noises of each image's latent, and how
    many images. Image i meets the times and noises of the sample ids `PASSES i + k`; `precision` makes a context.
    """
    total, n = torch.zeros((), dtype=torch.float64), 0
    for batch in encode_batches(codec, images, codec.device):
        count = len(batch["mean"])
        there = {k: v.to(codec.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        for k in range(PASSES):
            drawn = {**there, "sample_id": torch.arange(n, n + count) * PASSES + k}
            with precision():
                if objective.conditioner is not None:
                    drawn |= objective.conditioner.prepare(drawn, codec)
                total += count * objective(drawn).total.double().cpu()
        n += count
    if not n:
        raise LatelierError("convergence is measured on held-out images, but there are none.")
    return total.item() / (PASSES * n), n


def measure_snapshot(recipe: Recipe, pipeline: LatentDiffusionPipeline, images: int) -> list[Measurement]:
    """What a snapshot of the run's denoiser generates: `convergence-<metric>@<images>` of each metric that is followed,
    in the first of `evaluate.features`.

    With `evaluate.every` there are `every_samples` samples, and no guide, which may not be there yet. What metrics.json
    has of these very weights, measured in the same way, is not measured again.
    """
    settings, sample, training = recipe.evaluate, recipe.sample, open_images(recipe)
    count = settings.every_samples if settings.every else settings.samples
    if settings.every and sample.guide:
        sample = sample.model_copy(update={"guide": None, "guidance": 1.0})
    wanted = [name for name in settings.metrics if METRICS[name].followed]
    wanted = [name for name in wanted if not METRICS[name].lacks(count, recipe.data.channels, recipe.data.image_size)]
    if "objects" in wanted and not shows_objects(training.source, recipe.data.channels):  # which evaluation will tell
        wanted.remove("objects")
    if not wanted:
        return []
    first = settings.model_copy(update={"metrics": wanted, "features": settings.features[:1], "samples": count})
    folder = snapshot_folder(recipe.folder, images)
    receipt = {
        "images_trained": images,
        "ema": recipe.denoiser and recipe.denoiser.ema,
        "tokenizer": pipeline.codec.hash(),
        "snapshot": sha256(folder / MANIFEST),  # which has the hashes of its weights
        "asked": {"samples": count, "features": first.features[0]},
        **references.describe_images(recipe, training, "train"),
        **describe_sampling(sample, pipeline),
    }
    known = _known(recipe.folder / "metrics.json", receipt)
    if all(any(f"{one.name}-".startswith(f"{FOLLOWED}{name}-") for one in known) for name in wanted):
        return [replace(one, name=f"{one.name}@{images}") for one in known]
    load_snapshot(pipeline, folder)
    real = training.once(settings.batch, limit=count)
    drawn = generate_images(pipeline, recipe.model_copy(update={"sample": sample}), min(count, len(training)))
    kept: list[Tensor] = []
    found = evaluate_generation(
        _keep(drawn, kept), real, first, receipt, pipeline.device, reference_key(training, count)
    )
    if "objects" in wanted:
        scenes: Any = open_images(recipe, "val").source
        samples = torch.cat([*kept, *drawn])  # what no other metric has drawn, too
        result = measure_objects(samples, open_recogniser(scenes, recipe.data.flip))["objects"]
        found.append(Measurement("objects", result.value, make_receipt(**receipt, **result.details), result.interval))
    return [replace(one, name=f"{FOLLOWED}{one.name}@{images}") for one in found]


def _keep(batches: Iterable[Tensor], kept: list[Tensor]) -> Iterator[Tensor]:
    """The same batches, which are appended to `kept` as well."""
    for batch in batches:
        kept.append(batch)
        yield batch


def _known(path: Path, receipt: Mapping[str, Any]) -> list[Measurement]:
    """What metrics.json has of a snapshot with such a receipt; names without the number of images."""
    entries = json.loads(path.read_text()).get("convergence", {}) if path.is_file() else {}
    wanted = json.loads(json.dumps(receipt, default=str)).items()
    return [
        Measurement(
            name.partition("@")[0], entry["value"], entry["receipt"], entry["interval"] and (*entry["interval"],)
        )
        for name, entry in entries.items()
        if wanted <= entry["receipt"].items()
    ]


def images_to(found: Sequence[Measurement], quality: Mapping[str, float]) -> list[Measurement]:
    """Images seen until snapshots reach levels: `images-to-<metric>-<level>` (EP_FID of RAEv2, arXiv 2605.18324).

    Linear in the logarithm of images between snapshots, on the best value so far. NaN where a level is not reached, and
    the receipt says so; where the first snapshot is there already, its images are a bound, which the receipt says too.
    """
    result = []
    for metric, level in quality.items():
        ours = [one for one in found if plain(one.name.partition("@")[0].removeprefix(FOLLOWED)) == metric]
        curve = sorted((int(one.receipt["images_trained"]), one.value) for one in ours)
        if not curve:
            continue
        reached = reach(curve, level, better(metric) == "higher", logarithmic=True)
        receipt = {**ours[-1].receipt, "level": level, "curve": curve, "interpolation": "linear in log images"}
        if reached is None:
            receipt[NOT_REACHED] = f"{metric} {level:g} was not reached by {curve[-1][0]:,} images"
        elif reached.at_most:
            receipt[AT_MOST] = True
        name = f"images-to-{metric}-{level:g}"
        result.append(Measurement(name, math.nan if reached is None else reached.images, receipt))
    return result
