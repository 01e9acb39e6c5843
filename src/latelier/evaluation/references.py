"""Which images numbers refer to, what is kept of their features, and the cache of those that others are compared with.

It is in `$LATELIER_CACHE/references` (by default `~/.cache/latelier/references`); files are named by a hash of data,
transform, extractor with its weights, and how many images.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from latelier.data.folder import FolderSource
from latelier.data.loader import ImageDataset
from latelier.data.sources import BUILT_IN, Selection, open_source
from latelier.data.tensors import IN_MEMORY
from latelier.errors import LatelierError
from latelier.evaluation.distributions import GROUPS, GroupedStatistics, InceptionScore
from latelier.evaluation.features import FeatureExtractor
from latelier.evaluation.results import agreed, gather_in_order, is_main
from latelier.publish import write_whole
from latelier.recipe import Data, Recipe, load_recipe
from latelier.terminal import console
from latelier.tokenizers.pretrained import PretrainedSection

ENVIRONMENT = "LATELIER_CACHE"
SELECTING = ("source", "split", "val_split", "val_fraction", "classes", "boxes", "streaming")  # keys of `data`
MOST_VECTORS = 50_000  # 0.4 GB of 2,048 numbers each
FORMAT = 1  # of the files; another one is another key
Key = Mapping[str, Any]


class FeatureSet:
    """What is kept of images: sums of `features`, `spatial` and `logits`, and `vectors` of the first 50,000."""

    def __init__(self, kept: Collection[str]):
        self.kept, self.n, self.score = tuple(sorted(kept)), 0, InceptionScore()
        self.sums: dict[str, GroupedStatistics] = {}
        self._vectors: list[Tensor] = []
        self._held = 0

    def update(self, outputs: Mapping[str, Tensor]) -> None:
        """Count the next images in: `features` `(b, d)` of `FeatureExtractor.outputs`, and what else is kept."""
        for name in {"features", "spatial"} & set(self.kept):
            x = outputs[name]  # (b, d)
            self.sums.setdefault(name, GroupedStatistics(x.shape[1], x.device)).update(x)
        if "logits" in self.kept:
            self.score.update(outputs["logits"])
        if "vectors" in self.kept and self._held < MOST_VECTORS:
            self._vectors.append(outputs["features"][: MOST_VECTORS - self._held].cpu())  # (<= b, d)
            self._held += len(self._vectors[-1])
        self.n += len(outputs["features"])

    @property
    def vectors(self) -> Float[Tensor, "n d"]:
        if len(self._vectors) > 1:
            self._vectors = [torch.cat(self._vectors)]
        return self._vectors[0] if self._vectors else torch.zeros(0, 0)

    def tensors(self) -> dict[str, Tensor]:
        """All that `restore` needs; of symmetric matrices the upper half."""
        found = {"vectors": self.vectors, "n": torch.tensor([self.n])}
        for name, sums in self.sums.items():
            sums.flush()
            d = len(sums.groups[0].total)
            half = torch.triu_indices(d, d)  # (2, d (d + 1) / 2)
            found[f"{name}.n"] = torch.tensor([group.n for group in sums.groups])
            found[f"{name}.total"] = torch.stack([group.total.cpu() for group in sums.groups])  # (g, d)
            found[f"{name}.outer"] = torch.stack([group.outer.cpu()[half[0], half[1]] for group in sums.groups])
        return found

    @classmethod
    def restore(cls, kept: Collection[str], tensors: Mapping[str, Tensor]) -> FeatureSet:
        """The set that was taken apart by `tensors`; it cannot be added to."""
        found = cls(kept)
        found.n, found._vectors = int(tensors["n"]), [tensors["vectors"]]
        for name in {"features", "spatial"} & set(kept):
            counts, totals, halves = (tensors[f"{name}.{part}"] for part in ("n", "total", "outer"))
            d, sums = totals.shape[1], GroupedStatistics(0)
            half = torch.triu_indices(d, d)
            for group, count, total, values in zip(sums.groups, counts.tolist(), totals, halves):
                matrix = torch.zeros(d, d, dtype=torch.float64)
                matrix[half[0], half[1]] = values
                group.n, group.total, group.outer = count, total, matrix + matrix.triu(1).T
            found.sums[name] = sums
        return found


@dataclass
class FeatureCollector:
    """An extractor, and what a `FeatureSet` of its outputs keeps."""

    extractor: FeatureExtractor
    kept: Collection[str]

    @property
    def name(self) -> str:
        return self.extractor.name

    def extract(self, images: Float[Tensor, "b c h w"]) -> dict[str, Tensor]:
        """Of one forward pass `features`, and what else is kept."""
        found = self.extractor.outputs(images)
        return {name: found[name] for name in found if name == "features" or name in self.kept}


@torch.no_grad()
def collect(
    collectors: Sequence[FeatureCollector], batches: Iterable[Float[Tensor, "_ c h w"]], shared: bool
) -> dict[str, FeatureSet]:
    """Go through images in [-1, 1] once and keep of each extractor's outputs what its collector says, by its name; if
    `shared`, all processes take part, each with its own batches, and only the main one's sets are filled.
    """
    sets = {collector.name: FeatureSet(collector.kept) for collector in collectors}
    seen = ({collector.name: collector.extract(images) for collector in collectors} for images in batches)
    for outputs in gather_in_order(seen, shared):
        for name, found in sets.items():
            found.update(outputs[name])
    return sets


def reference_sets(
    collectors: Sequence[FeatureCollector], batches: Iterable[Float[Tensor, "_ c h w"]], key: Key | None, shared: bool
) -> dict[str, FeatureSet]:
    """The same for reference images, which are not read if all is in the cache; without a key nothing is cached."""
    cached = open_sets(collectors, key, shared)
    missing = [collector for collector in collectors if collector.name not in cached]
    found = collect(missing, batches, shared) if missing else {}
    if is_main(shared):
        store_sets(missing, key, found)
    return {**cached, **found}


def describe_images(recipe: Recipe, images: ImageDataset, split: str) -> dict[str, Any]:
    """What receipts say of a split of a recipe's images: `data`, their fingerprint; `reference`, their source and what
    they are to the run's models; and `trained_on`, how many of the held-out ones were trained on, if any.
    """
    where = (split == "val" and recipe.data.val_source) or recipe.data.source
    seen = [_share_seen(recipe.data, images, split, where, training) for training in _trained_on(recipe)]
    most = max((share or 0.0 for share in seen), default=0.0)
    words, count = ("training images", "all") if most == 1 else ("partly training images", f"{most:.0%}")
    if not most:
        words, count = ("perhaps training images", "perhaps some") if None in seen else ("held out", "")
    # Nobody knows what a tokenizer from elsewhere was trained on.
    about = {"reference": f"{where}, {words}" if seen else where, "data": images.fingerprint}
    return about | ({"trained_on": f"{count} of these images"} if seen and count and split == "val" else {})


def _trained_on(recipe: Recipe) -> list[Data]:
    """What a run's models were trained on: its folder's recipe says so, and that beside its pretrained tokenizer."""
    own = load_recipe(recipe.folder) if (recipe.folder / "recipe.yaml").is_file() else recipe
    found = [own.data] if own.denoiser is not None or own.tokenizer.kind != "pretrained" else []
    if isinstance(own.tokenizer, PretrainedSection):
        place = Path(own.tokenizer.path)
        found += [load_recipe(folder).data for folder in (place, place.parent) if (folder / "recipe.yaml").is_file()]
    return found


def _share_seen(data: Data, images: ImageDataset, split: str, where: str, training: Data) -> float | None:
    """The share of a split's images that are among the training images of a recipe; None where that is not known."""
    keys = SELECTING if split == "val" else (*SELECTING, "length")
    if where == IN_MEMORY:
        return None
    same = data.val_source is None and all(getattr(data, key) == getattr(training, key) for key in keys)
    if same or (where == training.source and where in BUILT_IN):  # splits have no image in common
        return float(split == "train")
    try:
        ours, theirs = _identities(images.source), _identities(open_source(training, "train"))
    except LatelierError:  # they are not here any more, or a stream of unknown length
        return None
    unknown = where == training.source and not Path(where).expanduser().is_dir()
    return len(ours & theirs) / len(ours) or (None if unknown else 0.0)


def _identities(source: Any) -> set[Any]:
    """Of each image what tells it from all others: its file, or its name in a source."""
    whole = source
    while isinstance(whole, Selection):
        whole = whole.source
    if isinstance(whole, FolderSource):
        return {whole.root.resolve() / source.name(i) for i in range(len(source))}
    return {(whole.fingerprint, source.name(i)) for i in range(len(source))}


def reference_key(images: ImageDataset, count: int) -> Key:
    """What features of the first `count` images of a pass over a dataset depend on besides the extractor."""
    about = {"crop": images.data.crop, "background": str(images.data.background), "n": count}
    return {"data": images.fingerprint, "shape": list(images.shape), **about}


def open_sets(collectors: Sequence[FeatureCollector], key: Key | None, shared: bool) -> dict[str, FeatureSet]:
    """The cached sets by extractor; all processes know their names, the main one has what is in them."""
    found = {}
    for collector in collectors if key is not None and is_main(shared) else ():
        if (opened := _open(_about(key, collector), collector.kept)) is not None:
            found[collector.name] = opened
    return {name: found.get(name, FeatureSet(())) for name in agreed(list(found), shared)}


def store_sets(collectors: Sequence[FeatureCollector], key: Key | None, sets: Mapping[str, FeatureSet]) -> None:
    """Put sets into the cache, so that no file is ever half there; an error if they cannot be written."""
    for collector in collectors if key is not None else ():
        if not sets[collector.name].n:
            continue
        about, content = _about(key, collector), save(sets[collector.name].tensors())
        path = _path(about)
        try:
            write_whole(path, content)
            facts = {**about, "sha256": hashlib.sha256(content).hexdigest()}
            write_whole(path.with_suffix(".json"), json.dumps(facts, indent=2).encode())
        except OSError as error:
            raise LatelierError(
                f"Features of the reference images cannot be kept in {path.parent} ({error}); "
                f"set ${ENVIRONMENT} to a folder with room."
            ) from None


def _open(about: Mapping[str, Any], kept: Collection[str]) -> FeatureSet | None:
    path = _path(about)
    if not path.is_file():
        return None
    try:
        facts, content = json.loads(path.with_suffix(".json").read_text()), path.read_bytes()
        if facts != {**about, "sha256": hashlib.sha256(content).hexdigest()}:
            raise ValueError("its content is not what was written")
        return FeatureSet.restore(kept, load(content))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        console.print(f"Warning: the cached features in {path} are damaged ({error}); they are computed anew.")
        return None


def _about(key: Key | None, collector: FeatureCollector) -> dict[str, Any]:
    facts = {"features": collector.extractor.describe(), "kept": sorted(collector.kept), "groups": GROUPS}
    return json.loads(json.dumps({**(key or {}), **facts, "format": FORMAT}, default=str))


def _path(about: Mapping[str, Any]) -> Path:
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
    return cache_folder() / f"{name}.safetensors"


def cache_folder() -> Path:
    return Path(os.environ.get(ENVIRONMENT) or Path.home() / ".cache" / "latelier") / "references"
