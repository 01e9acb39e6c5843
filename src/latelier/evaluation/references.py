"""What is kept of the features of a set of images, and the cache of those that others are compared with.

Reference images are the same in every run of a comparison, so what their features sum up to is kept in
`$LATELIER_CACHE/references` (by default `~/.cache/latelier/references`). A file's name is a hash of all it depends on:
the data's fingerprint, the transform, the extractor with its weights and preprocessing, and how many images.
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
from torch import Tensor

from latelier.data.loader import ImageDataset
from latelier.errors import LatelierError
from latelier.evaluation.distributions import GROUPS, GroupedStatistics, InceptionScore
from latelier.evaluation.features import FeatureExtractor
from latelier.evaluation.processes import agreed, gather_in_order, is_main

ENVIRONMENT = "LATELIER_CACHE"
MOST_VECTORS = 50_000  # 0.4 GB of 2,048 numbers each
FORMAT = 1  # of the files; another one is another key
Key = Mapping[str, Any]


class FeatureSet:
    """What is kept of a set of images, however many: sums, and of the first 50,000 the vectors too, if need be.

    Args:
        kept: of the extractor's outputs `features`, `spatial` and `logits` those that are summed up, and `vectors`.
    """

    def __init__(self, kept: Collection[str]):
        self.kept = tuple(sorted(kept))
        self.n = 0
        self.sums: dict[str, GroupedStatistics] = {}
        self.score = InceptionScore()
        self._vectors: list[Tensor] = []
        self._held = 0

    def update(self, outputs: Mapping[str, Tensor]) -> None:
        """Count the next images in.

        Args:
            outputs: of `FeatureExtractor.outputs`: `features` `(b, d)`, and what else is kept.
        """
        for name in {"features", "spatial"} & set(self.kept):
            x = outputs[name]  # (b, d)
            self.sums.setdefault(name, GroupedStatistics(x.shape[1], x.device)).update(x)
        if "logits" in self.kept:
            self.score.update(outputs["logits"])
        if "vectors" in self.kept and self._held < MOST_VECTORS:
            part = outputs["features"][: MOST_VECTORS - self._held].cpu()  # (<= b, d)
            self._vectors.append(part)
            self._held += len(part)
        self.n += len(outputs["features"])

    @property
    def vectors(self) -> Float[Tensor, "n d"]:
        """The feature vectors that were kept."""
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
            found.sums[name] = _restore(tensors[f"{name}.n"], tensors[f"{name}.total"], tensors[f"{name}.outer"])
        return found


def _restore(n: Tensor, total: Float[Tensor, "g d"], outer: Float[Tensor, "g half"]) -> GroupedStatistics:
    d = total.shape[1]
    half, sums = torch.triu_indices(d, d), GroupedStatistics(0)
    for group, count, row, values in zip(sums.groups, n.tolist(), total, outer):
        matrix = torch.zeros(d, d, dtype=torch.float64)
        matrix[half[0], half[1]] = values
        group.n, group.total, group.outer = count, row, matrix + matrix.triu(1).T
    return sums


# -- sets of one pass -------------------------------------------------------------------------------------------------


@dataclass
class FeatureCollector:
    """An extractor, and what a `FeatureSet` of its outputs keeps."""

    extractor: FeatureExtractor
    kept: Collection[str]

    def look(self, images: Float[Tensor, "b c h w"]) -> dict[str, Tensor]:
        """Of one forward pass `features`, and what else is kept."""
        found = self.extractor.outputs(images)
        return {name: found[name] for name in found if name == "features" or name in self.kept}


@torch.no_grad()
def collect(
    watchers: Sequence[FeatureCollector], batches: Iterable[Float[Tensor, "_ c h w"]], shared: bool
) -> dict[str, FeatureSet]:
    """Go through images once and keep of each extractor's outputs what is asked for.

    Args:
        watchers: extractors.
        batches: of images in [-1, 1].
        shared: whether all processes take part, each with its own batches, see `processes.gather_in_order`.

    Returns:
        A set for the name of each extractor; they are empty on all processes but the main one.
    """
    sets = {watcher.extractor.name: FeatureSet(watcher.kept) for watcher in watchers}
    seen = ({watcher.extractor.name: watcher.look(images) for watcher in watchers} for images in batches)
    for outputs in gather_in_order(seen, shared):
        for name, found in sets.items():
            found.update(outputs[name])
    return sets


def reference_sets(
    watchers: Sequence[FeatureCollector], batches: Iterable[Float[Tensor, "_ c h w"]], key: Key | None, shared: bool
) -> dict[str, FeatureSet]:
    """The same for reference images, as far as possible from the cache.

    Args:
        watchers: extractors.
        batches: of images in [-1, 1]; not read if all is there.
        key: what the images depend on, see `reference_key`; None caches nothing.
        shared: as for `collect`.
    """
    cached = open_sets(watchers, key, shared)
    missing = [watcher for watcher in watchers if watcher.extractor.name not in cached]
    found = collect(missing, batches, shared) if missing else {}
    if is_main(shared):
        store_sets(missing, key, found)
    return {**cached, **found}


# -- the cache --------------------------------------------------------------------------------------------------------


def reference_key(images: ImageDataset, count: int) -> Key:
    """What features of a dataset's images depend on, besides the extractor.

    Args:
        images: the dataset, passed over by `once`.
        count: how many of its images at most.
    """
    data = images.data
    return {
        "data": images.fingerprint, "shape": list(images.shape), "crop": data.crop,
        "background": str(data.background), "n": count,
    }  # fmt: skip


def open_sets(watchers: Sequence[FeatureCollector], key: Key | None, shared: bool) -> dict[str, FeatureSet]:
    """The cached sets, by the extractor's name; all processes hear of the same ones, the main one has what is in them.

    Of a damaged file a warning tells.
    """
    found = {}
    if key is not None and is_main(shared):
        opened = {watcher.extractor.name: _open(_about(key, watcher), watcher.kept) for watcher in watchers}
        found = {name: one for name, one in opened.items() if one is not None}
    return {name: found.get(name, FeatureSet(())) for name in agreed(list(found), shared)}


def store_sets(watchers: Sequence[FeatureCollector], key: Key | None, sets: Mapping[str, FeatureSet]) -> None:
    """Put sets into the cache, so that no file is ever half there.

    Raises:
        LatelierError: if they cannot be written.
    """
    from safetensors.torch import save

    for watcher in watchers if key is not None else ():
        found = sets[watcher.extractor.name]
        if not found.n:
            continue
        about, content = _about(key, watcher), save(found.tensors())
        path = _path(about)
        try:
            _write(path, content)
            facts = {**about, "sha256": hashlib.sha256(content).hexdigest()}
            _write(path.with_suffix(".json"), json.dumps(facts, indent=2).encode())
        except OSError as error:
            raise LatelierError(
                f"Features of the reference images cannot be kept in {path.parent} ({error}); "
                f"set ${ENVIRONMENT} to a folder with room."
            ) from None


def cache_folder() -> Path:
    """Where features of reference images are kept."""
    return Path(os.environ.get(ENVIRONMENT) or Path.home() / ".cache" / "latelier") / "references"


def _open(about: Mapping[str, Any], kept: Collection[str]) -> FeatureSet | None:
    from safetensors import SafetensorError
    from safetensors.torch import load

    from latelier.terminal import console

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


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_bytes(content)
    partial.replace(path)


def _about(key: Key | None, watcher: FeatureCollector) -> dict[str, Any]:
    facts = {"features": watcher.extractor.describe(), "kept": sorted(watcher.kept), "groups": GROUPS}
    return json.loads(json.dumps({**(key or {}), **facts, "format": FORMAT}, default=str))


def _path(about: Mapping[str, Any]) -> Path:
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
    return cache_folder() / f"{name}.safetensors"
