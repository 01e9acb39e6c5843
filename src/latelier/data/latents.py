"""The latent cache: posteriors of all images, encoded once, in a folder of memory-mapped shards and `cache.json`.

It holds the normalised mean and standard deviation of every image's posterior, and of its mirror image, so that z is
sampled anew whenever it is used.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from latelier.data.records import Images, mirrored, permuted_index, share
from latelier.errors import LatelierError
from latelier.keyed_random import KeyedRandom
from latelier.publish import sync, write_whole
from latelier.terminal import images_bar
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.statistics import Moments

INDEX_FILE = "cache.json"
PIXELS_AT_ONCE = 64 * 256 * 256  # of a forward pass that measures statistics
_verified: set[tuple[Path, int, int, str]] = set()  # shards that were read whole: path, size, time of change, sha256
Plan = Iterator[tuple[Int[Tensor, " b"], Int[Tensor, " b"], Bool[Tensor, " b"]]]  # sample ids, positions, flips


class LatentCache:
    """Posteriors of a dataset's images, from a complete cache; `write` makes one, `open` checks it.

    `about` is the content of its `cache.json`. Where `features` says so, batches have the features that were kept.
    """

    features: Callable[[], bool] = staticmethod(lambda: False)

    def __init__(self, folder: Path, about: dict[str, Any]):
        self.folder, self.about, self.latent_shape = folder, about, tuple(about["latent_shape"])
        self.class_names: list[str] | None = about["class_names"]
        self.flip: bool = about["key"]["flip"]
        self._shards = [_open_shard(folder / s["file"], s["sha256"]) for s in about["shards"] if s["rows"]]
        rows = [len(shard["index"]) for shard in self._shards]
        index = torch.cat([shard["index"] for shard in self._shards])  # (n,)
        order = index.argsort()
        self.index = index[order]  # (n,) images' numbers in the dataset, ascending
        self._shard = torch.arange(len(rows)).repeat_interleave(torch.tensor(rows))[order]  # (n,)
        self._row = torch.cat([torch.arange(n) for n in rows])[order]  # (n,)

    def __len__(self) -> int:
        return len(self.index)

    @classmethod
    def open(cls, folder: str | Path, key: dict[str, Any] | None = None) -> LatentCache:
        """Open a complete cache that was made from `key`, see `write`; None takes any.

        Every shard is compared with its checksum, once per process.
        """
        folder = Path(folder)
        about = _read_about(folder)
        if about is None:
            raise LatelierError(f"There is no latent cache in {folder}; write it with `latelier encode`.")
        if key is not None:
            _check_key(folder, about["key"], json.loads(json.dumps(key)))
        if not about["complete"]:
            raise LatelierError(f"The latent cache in {folder} is unfinished; `latelier encode` continues it.")
        return cls(folder, about)

    @classmethod
    def write(
        cls, folder: str | Path, codec: Codec, dataset: Images, key: dict[str, Any], flip: bool, batch: int,
        accelerator: Accelerator | None = None, shard_size: int = 4096, dtype: torch.dtype = torch.float16,
        overwrite: bool = False, features: Callable[[Tensor], Tensor] | None = None,
    ) -> LatentCache:  # fmt: skip
        """Encode a dataset, or what is still missing of it after an interruption, and open the cache.

        In a distributed launch every process encodes its own shards; all must see the folder.

        Args:
            codec: tokenizer with statistics; the cache holds normalised latents.
            key: what the latents depend on: tokenizer hash, data fingerprint, transform. A cache made from anything
                else is refused.
            flip: encode the mirror images too.
            batch, shard_size: images per forward pass, and per file.
            features: images to what else is kept of them and of their mirror images, see `features` of the class.
        """
        folder = Path(folder)
        process, processes = _rank(accelerator)
        wait = accelerator.wait_for_everyone if accelerator else lambda: None
        key = json.loads(json.dumps({**key, "flip": flip, "dtype": str(dtype).removeprefix("torch.")}))
        about = None if overwrite else _read_about(folder)
        if about is None:
            wait()  # all have looked before one of them writes
            about = _start(folder, codec, dataset, key, max(processes, -(-len(dataset) // shard_size)), process == 0)
        else:
            _check_key(folder, about["key"], key)
        shards = about["shards"]
        complete = about["complete"] and all((folder / shard["file"]).is_file() for shard in shards)
        wait()  # all have looked, at shards too: a damaged one may have been deleted
        if not complete:
            mine = [i for i in range(process, len(shards), processes) if not (folder / shards[i]["file"]).is_file()]
            with images_bar("encoding", len(dataset) * len(mine) // len(shards), process == 0) as advance:
                for i in mine:
                    tensors = _encode(codec, dataset.once(batch, i, len(shards)), about, advance, features)
                    _save_shard(folder / shards[i]["file"], tensors)
            wait()
            if process == 0:
                _finish(folder, about)
            wait()
        return cls.open(folder)

    def stream(
        self, batch: int, start: int = 0, process: int = 0, processes: int = 1, accumulation: int = 1, seed: int = 0
    ) -> Iterator[dict[str, Any]]:
        """Micro-batches without end: samples, order, flips and arguments as in `ImageDataset.stream`.

        They hold `mean` and `std` `(b, c, *grid)` float32, `sample_id`, `index`, and, if known, `label`, `caption`.
        """
        for sample_ids, positions, flipped in self.plan(batch, start, process, processes, accumulation, seed):
            yield {**self.gather(positions, flipped), "sample_id": sample_ids}

    def plan(self, batch: int, start: int, process: int, processes: int, accumulation: int, seed: int) -> Plan:
        """Sample ids, positions in the cache, and flips of the micro-batches of `stream`, without end."""
        micro_batches = [torch.arange(part.start, part.stop) for part in share(batch, process, processes, accumulation)]
        while True:
            for offsets in micro_batches:
                sample_ids = start + offsets  # (b,)
                flipped = mirrored(sample_ids, seed) if self.flip else torch.zeros(len(sample_ids), dtype=torch.bool)
                yield sample_ids, permuted_index(sample_ids, len(self), seed), flipped
            start += batch

    def gather(self, positions: Int[Tensor, " b"], flipped: Bool[Tensor, " b"] | None = None) -> dict[str, Any]:
        """The records at positions 0 .. len - 1, or their mirror images; see `stream`."""
        shard, row = self._shard[positions], self._row[positions]  # (b,)
        side = torch.zeros_like(row) if flipped is None else flipped.long()  # (b,)
        b, known = len(positions), self._shards[0]
        record: dict[str, Any] = {name: torch.empty(b, *self.latent_shape) for name in ("mean", "std")}
        names = ("mean", "std", "features") if self.features() else ("mean", "std")
        if "features" in names:
            record["features"] = torch.empty(b, *known["features"].shape[2:])
        record["index"] = self.index[positions]
        record |= {"label": torch.empty(b, dtype=torch.long)} if "label" in known else {}
        record |= {"caption": [""] * b} if "caption" in known else {}
        for number in shard.unique().tolist():
            where = (shard == number).nonzero()[:, 0]  # positions in the batch
            tensors, rows = self._shards[number], row[where]
            for name in names:  # image, mirror image, image, ...: (n, c, *grid), or (2 n, c, *grid)
                stored = tensors[name].flatten(0, 1)
                record[name][where] = stored[rows * (1 + self.flip) + side[where]].float()
            if "label" in known:
                record["label"][where] = tensors["label"][rows]
            if "caption" in known:
                ends = tensors["caption_end"]
                for i, begin, end in zip(where.tolist(), ends[rows].tolist(), ends[rows + 1].tolist()):
                    record["caption"][i] = bytes(tensors["caption"][begin:end].numpy()).decode()
        return record


def sample_posterior(batch: dict[str, Any], rng: KeyedRandom) -> Float[Tensor, "b c *grid"]:
    """z = mean + std eps."""
    return torch.addcmul(batch["mean"], batch["std"], rng.normal("posterior", *batch["mean"].shape[1:]))


@torch.no_grad()
def latent_statistics(
    codec: Codec, dataset: Images, limit: int, seed: int, accelerator: Accelerator | None = None
) -> tuple[Float[Tensor, " c *grid"], Float[Tensor, " c *grid"]]:
    """Mean and standard deviation, per channel, of raw latents sampled from their posteriors; float64 sums.

    They are per element, `(c, *grid)`, where the tokenizer's `info.statistics` says so. The images are the first
    `limit` of the training stream, cropped and flipped as in training, for any number of processes. What is constant
    gets a deviation of 1e-6, so that it can be normalised.
    """
    process, processes = _rank(accelerator)
    limit = min(limit, len(dataset))
    height, width = dataset.shape[1:]
    size = processes * max(1, min(64, PIXELS_AT_ONCE // (height * width)))
    shape, element = codec.latent_shape(height, width), codec.info.statistics == "element"
    moments = Moments(math.prod(shape) if element else shape[0])
    for batch in islice(dataset.stream(size, 0, process, processes, 1), -(-limit // size)):
        posterior = codec.posterior(batch["image"].to(codec.device))
        rng = KeyedRandom(seed, batch["sample_id"], posterior.mean.device)
        z = posterior.mean + posterior.std * rng.normal("statistics", *posterior.mean.shape[1:])  # (b, c, *grid)
        z = z[(batch["sample_id"] < limit).to(z.device)]
        moments.add(z.flatten(1).T if element else z.transpose(0, 1).flatten(1))  # (k, n)
    if accelerator is not None and processes > 1:
        own = moments.sums.to(accelerator.device)
        moments = Moments(own.shape[1])
        for sums in accelerator.gather(own[None]).cpu():  # (p, 3, k)
            moments.merge(sums)
    mean, std = moments.mean_and_std()
    return (mean.view(shape), std.view(shape)) if element else (mean, std)


def _start(folder: Path, codec: Codec, dataset: Images, key: dict, shards: int, is_main: bool) -> dict[str, Any]:
    """The content of a new `cache.json`; the main process writes it and deletes what was there."""
    about = {
        "complete": False, "key": key, "latent_shape": list(codec.latent_shape(*dataset.shape[1:])),
        "class_names": dataset.class_names,
        "shards": [{"file": f"shard-{i:05d}.safetensors"} for i in range(max(1, min(len(dataset), shards)))],
    }  # fmt: skip
    if is_main:
        for old in (folder / INDEX_FILE, *folder.glob("shard-*")):
            old.unlink(missing_ok=True)
        _write_about(folder, about)
    return about


def _finish(folder: Path, about: dict[str, Any]) -> None:
    """Write the rows and the checksum of every shard; the cache is complete."""
    for shard in about["shards"]:
        with safe_open(folder / shard["file"], "pt") as file:
            shard["sha256"] = file.metadata()["sha256"]
            shard["rows"] = file.get_slice("index").get_shape()[0]
    if not sum(shard["rows"] for shard in about["shards"]):
        raise LatelierError(f"No image could be read, so the latent cache in {folder} is empty; check data.source.")
    _write_about(folder, {**about, "complete": True})


@torch.no_grad()
def _encode(
    codec: Codec, batches: Iterator[dict[str, Any]], about: dict[str, Any], advance: Callable[[int], None],
    features: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """One shard's tensors."""
    dtype, flip = getattr(torch, about["key"]["dtype"]), about["key"]["flip"]
    empty = torch.empty(0, 1 + flip, *about["latent_shape"], dtype=dtype)
    columns: dict[str, list[Tensor]] = {"mean": [empty], "std": [empty], "index": [torch.empty(0, dtype=torch.long)]}
    captions: list[str] = []
    for batch in batches:
        images = batch["image"].to(codec.device)  # (b, c, h, w)
        seen = (images, images.flip(-1)) if flip else (images,)
        sides = [codec.posterior(side) for side in seen]
        columns["mean"].append(torch.stack([codec.normalise(s.mean) for s in sides], 1).to("cpu", dtype))
        columns["std"].append(torch.stack([codec.scale(s.std) for s in sides], 1).to("cpu", dtype))
        if features is not None:
            made = torch.stack([features(side) for side in seen], 1)  # (b, 1 or 2, n, k)
            columns.setdefault("features", []).append(made.to("cpu", dtype))
        columns["index"].append(batch["index"])
        if "label" in batch:
            columns.setdefault("label", []).append(batch["label"])
        captions += batch.get("caption", [])
        advance(len(images))
    tensors = {name: torch.cat(parts) for name, parts in columns.items()}
    if captions:  # one row of bytes, and where each caption begins, so that they are memory-mapped too
        data = [caption.encode() for caption in captions]
        tensors["caption"] = torch.frombuffer(bytearray(b"".join(data) or b" "), dtype=torch.uint8)
        tensors["caption_end"] = torch.tensor([0, *map(len, data)]).cumsum(0)  # (n + 1,)
    return tensors


def _save_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """A shard is never half there."""
    temporary = path.with_suffix(".tmp")
    try:
        save_file(tensors, temporary, metadata={"sha256": _digest(tensors)})
        sync(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise LatelierError(
            f"The latent cache could not be written to {path} ({error}); free some space and run the same command "
            "again, which continues from the last whole shard."
        ) from None


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _open_shard(path: Path, sha256: str) -> dict[str, Tensor]:
    """A shard's tensors, memory-mapped; whole as `_verified` knows it, or an error."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = (path.resolve(), path.stat().st_size, path.stat().st_mtime_ns, sha256)
    except (OSError, SafetensorError) as error:
        raise LatelierError(
            f"The latent cache's {path} cannot be read ({error}); write it anew with `latelier encode --overwrite`."
        ) from None
    if facts not in _verified and _digest(tensors) != sha256:
        raise LatelierError(f"{path} is damaged; delete it and run `latelier encode`.")
    _verified.add(facts)
    return tensors


def _write_about(folder: Path, about: dict[str, Any]) -> None:
    write_whole(folder / INDEX_FILE, json.dumps({**about, "sha256": _hash(about)}, indent=1))


def _read_about(folder: Path) -> dict[str, Any] | None:
    """The content of `cache.json`; None without one."""
    path = folder / INDEX_FILE
    if not path.is_file():
        return None
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        whole = about.pop("sha256", None) in (None, _hash(about))  # None: from before it was written
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise LatelierError(f"{path} is damaged; delete {folder} and run `latelier encode`, or the same command again.")
    return about


def _hash(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _check_key(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Refuse a cache that was made from something else, and say what changed."""
    changed = [f"{name} {old.get(name)!r} -> {new[name]!r}" for name in new if old.get(name) != new[name]]
    if changed:
        raise LatelierError(
            f"The latent cache in {folder} is stale, because this changed: {'; '.join(changed)}. Delete the folder, "
            "or encode again with `latelier encode --overwrite`."
        )


def _rank(accelerator: Accelerator | None) -> tuple[int, int]:
    """This process's number, and how many there are."""
    return (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)


@torch.no_grad()
def encode_batches(codec: Codec, batches: Iterator[dict[str, Any]], device: torch.device) -> Iterator[dict[str, Any]]:
    """Batches of images with their posteriors, normalised: `mean` and `std`."""
    for batch in batches:
        posterior = codec.posterior(batch["image"].to(device))
        yield {**batch, "mean": codec.normalise(posterior.mean), "std": codec.scale(posterior.std)}
