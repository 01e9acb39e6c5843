"""The latent cache: what goes in comes out, in the right order, whoever wrote it and however often he was stopped."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from latelier.data import latents
from latelier.data.latents import LatentCache, latent_statistics, sample_posterior
from latelier.data.loader import ImageDataset
from latelier.data.records import permuted_index, share
from latelier.data.sources import open_source
from latelier.keyed_random import KeyedRandom
from latelier.recipe import Data
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.conv import IdentityTokenizer
from latelier.tokenizers.statistics import Moments
from tiny import refused

MAPS = Path("/proc/self/maps")
KEY = {"tokenizer": "abc", "data": "def", "transform": "center crop 4x6"}


class Images:
    """Image i is filled with i / 100 and has a bright left edge; number 5 cannot be read."""

    class_names = ("even", "odd")
    shape = (3, 4, 6)

    def __init__(self, size=23, unreadable=(5,)):
        self.class_names = ["even", "odd"]
        self.size, self.unreadable, self.asked = size, unreadable, []

    def __len__(self):
        return self.size

    def image(self, index):
        image = torch.full((3, 4, 6), index / 100)
        image[..., 0] = 1
        return image

    def once(self, batch, process=0, processes=1):
        self.asked.append(process)
        mine = [i for i in range(process, self.size, processes) if i not in self.unreadable]
        for start in range(0, len(mine), batch):
            part = mine[start : start + batch]
            yield {
                "image": torch.stack([self.image(i) for i in part]),
                "index": torch.tensor(part),
                "label": torch.tensor(part) % 2,
                "caption": [f"№ {i}" for i in part],
            }

    def stream(self, batch, start=0, process=0, processes=1, accumulation=1):
        while True:
            for part in share(batch, process, processes, accumulation):
                draws = torch.arange(start + part.start, start + part.stop)
                index = permuted_index(draws, self.size, 0).tolist()
                yield {"image": torch.stack([self.image(i) for i in index]), "sample_id": draws}
            start += batch


class NoisyPixels(IdentityTokenizer):
    """Pixels with a posterior of deviation 0.5."""

    def encode(self, images):
        parameters = torch.cat([images, torch.full_like(images, 0.5).log() * 2], 1)
        return type("Output", (), {"latent_dist": DiagonalGaussianDistribution(parameters)})()


class Elements(NoisyPixels):
    """Noisy pixels whose statistics are of elements."""

    @property
    def info(self):
        return replace(super().info, statistics="element")


class Numbered:
    """Image i is filled with 10 i and has a bright left edge."""

    class_names = labels = None
    fingerprint = "numbered"

    def __len__(self):
        return 13

    def __getitem__(self, index):
        image = np.full((4, 6, 3), 10 * index, np.uint8)
        image[:, 0] = 255
        return {"image": image}

    def name(self, index):
        return str(index)


@pytest.fixture
def codec():
    return Codec(NoisyPixels(), torch.tensor([0.0, 0.1, 0.2]), torch.tensor([1.0, 2.0, 4.0]))


def write(folder, codec, images=None, **options):
    return LatentCache.write(folder, codec, images or Images(), KEY, True, 4, shard_size=6, **options)


def test_round_trip(tmp_path, codec):
    cache = write(tmp_path, codec, dtype=torch.float32)
    assert (len(cache), cache.latent_shape, cache.class_names) == (22, (3, 4, 6), ["even", "odd"])
    assert cache.index.tolist() == [i for i in range(23) if i != 5]
    positions = torch.tensor([21, 0, 5, 5])
    flipped = torch.tensor([False, True, False, True])
    record = cache.gather(positions, flipped)
    assert (record["index"].tolist(), record["label"].tolist()) == ([22, 0, 6, 6], [0, 0, 0, 0])
    assert record["caption"] == ["№ 22", "№ 0", "№ 6", "№ 6"]
    images = torch.stack([Images().image(i) for i in (22, 0, 6, 6)])
    images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
    torch.testing.assert_close(record["mean"], codec.encode(images))
    torch.testing.assert_close(record["std"][0, :, 0, 0], torch.tensor([0.5, 0.25, 0.125]))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "cache.json",
        *(f"shard-0000{i}.safetensors" for i in range(4)),
    ]


def test_half_precision_is_the_default(tmp_path, codec):
    cache = write(tmp_path, codec)
    assert cache.about["key"]["dtype"] == "float16"
    exact = codec.encode(torch.stack([Images().image(3)]))
    torch.testing.assert_close(cache.gather(torch.tensor([3]))["mean"], exact, rtol=1e-3, atol=1e-3)


def test_interrupted_write_goes_on(tmp_path, codec):
    class Interrupted(Images):
        def once(self, batch, process=0, processes=1):
            for count, record in enumerate(super().once(batch, process, processes)):
                if process == 2 and count == 1:
                    raise KeyboardInterrupt
                yield record

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a", codec, Interrupted())
    assert len(list((tmp_path / "a").glob("*.safetensors"))) == 2
    refused(r"unfinished; `latelier encode` continues it", LatentCache.open, tmp_path / "a", KEY)
    images = Images()
    cache = write(tmp_path / "a", codec, images)
    assert images.asked == [2, 3]  # the whole shards are kept
    whole = write(tmp_path / "b", codec)
    assert [s["sha256"] for s in cache.about["shards"]] == [s["sha256"] for s in whole.about["shards"]]
    again = Images()
    write(tmp_path / "a", codec, again)
    assert again.asked == []


def test_stale_key_is_refused_and_says_what_changed(tmp_path, codec):
    write(tmp_path, codec)
    other = {**KEY, "tokenizer": "xyz"}
    refused(r"tokenizer 'abc' -> 'xyz'\. Delete the folder, or .*--overwrite", LatentCache.open, tmp_path, other)
    refused(r"stale.*flip True -> False", LatentCache.write, tmp_path, codec, Images(), KEY, False, 4)
    cache = LatentCache.write(tmp_path, codec, Images(), other, False, 4, shard_size=6, overwrite=True)
    assert not LatentCache.open(tmp_path, other).flip
    torch.testing.assert_close(cache.gather(torch.tensor([21]))["index"], torch.tensor([22]))


def test_missing_damaged_and_empty(tmp_path, codec):
    refused("no latent cache", LatentCache.open, tmp_path / "nowhere", KEY)
    refused("No image could be read", write, tmp_path / "empty", codec, Images(4, unreadable=range(4)))
    cache = write(tmp_path, codec)
    del cache
    path, opened = tmp_path / "shard-00001.safetensors", partial(LatentCache.open, tmp_path, KEY)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    refused(r"shard-00001\.safetensors is damaged; delete it and run `latelier encode`", opened)
    path.write_bytes(content[:-9])
    refused(r"shard-00001\.safetensors cannot be read", opened)
    path.unlink()
    images = Images()
    assert len(write(tmp_path, codec, images)) == 22
    assert images.asked == [1]  # the other shards are kept


def test_a_shard_is_compared_with_its_checksum_once_a_process(tmp_path, codec, monkeypatch):
    write(tmp_path, codec)
    monkeypatch.setattr(latents, "_digest", lambda tensors: pytest.fail("was read again"))
    assert len(LatentCache.open(tmp_path, KEY)) == 22


def test_foreign_files_in_the_folder_stay(tmp_path, codec):
    (tmp_path / "notes.txt").write_text("mine")
    write(tmp_path, codec)
    write(tmp_path, codec, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_stream_shows_every_image_once_an_epoch(tmp_path, codec):
    stream = write(tmp_path, codec).stream(11, seed=3)
    epochs = [torch.cat([next(stream)["index"] for _ in range(2)]) for _ in range(2)]
    assert [sorted(epoch.tolist()) for epoch in epochs] == [[i for i in range(23) if i != 5]] * 2
    assert not torch.equal(*epochs)
    refused(r"batch = 10 .* 2 processes x 3 micro-batches; use a multiple of 6", share, 10, 0, 2, 3)


@pytest.mark.parametrize("start", [0, 12])
def test_stream_is_the_same_however_it_is_split(tmp_path, codec, start):
    cache = write(tmp_path, codec)
    whole = [next(cache.stream(12, start, seed=1))]
    parts = [part for p in range(2) for part in islice(cache.stream(12, start, p, 2, 3, seed=1), 3)]
    resumed = list(islice(cache.stream(12, 0, seed=1), 2))[start // 12]
    for name in ("mean", "std", "label", "index", "sample_id"):
        split = torch.cat([part[name] for part in parts])[torch.cat([part["sample_id"] for part in parts]).argsort()]
        assert torch.equal(split, whole[0][name])
        assert torch.equal(resumed[name], whole[0][name])
    assert resumed["sample_id"].tolist() == list(range(start, start + 12))


def test_both_mirror_images_are_shown(tmp_path, codec):
    cache = write(tmp_path, codec)
    mean = torch.cat([batch["mean"] for batch in islice(cache.stream(22), 20)])
    left = (mean[:, 0, 0, 0] > mean[:, 0, 0, -1]).float().mean()
    assert 0.4 < left < 0.6


def test_cached_and_image_stream_mirror_the_same_samples(tmp_path, codec):
    source = Numbered()
    dataset = ImageDataset(source, Data(source="none", image_size=(4, 6), workers=0), seed=7)
    cache = LatentCache.write(tmp_path, codec, dataset, KEY, dataset.flips_latents, 4, dtype=torch.float32)
    place = (10, 5, 1, 2, 1)  # batch, start, process, processes, accumulation
    for one, other in islice(zip(dataset.stream(*place), cache.stream(*place, seed=7)), 8):
        assert torch.equal(one["sample_id"], other["sample_id"])
        assert torch.equal(one["index"], other["index"])
        torch.testing.assert_close(codec.encode(one["image"]), other["mean"])
    flips = torch.cat([flips for _, _, flips in islice(cache.plan(*place, seed=7), 8)])
    assert flips.any()
    assert not flips.all()


def test_captions_of_mirror_images_keep_them_out_of_the_cache():
    data = Data(source="scenes", image_size=32, length=4, in_memory=True)
    dataset = ImageDataset(open_source(data), data)
    assert dataset.transform.flip
    assert not dataset.flips_latents
    captions = [next(dataset.once(4, flip=flip))["caption"] for flip in (False, True)]
    assert captions[1] == [dataset.source[i]["caption_mirrored"] for i in range(4)]
    assert ImageDataset(Numbered(), Data(source="none")).flips_latents
    assert not ImageDataset(Numbered(), Data(source="none", flip=False)).flips_latents


def test_drawn_latents_follow_the_posterior():
    b = 500
    batch = {"mean": torch.full((b, 2, 3, 3), 2.0), "std": torch.full((b, 2, 3, 3), 0.5), "sample_id": torch.arange(b)}
    z = sample_posterior(batch, KeyedRandom(0, batch["sample_id"]))
    assert abs(z.mean() - 2) < 0.02
    assert abs(z.std() - 0.5) < 0.02
    part = {name: value[7:9] for name, value in batch.items()}
    assert torch.equal(sample_posterior(part, KeyedRandom(0, part["sample_id"])), z[7:9])


def test_statistics_are_those_of_sampled_latents():
    images = Images(4000, ())
    images.image = lambda i: (
        torch.linspace(-1, 1, 4000)[i] * torch.tensor([1.0, 2.0, 0.0])[:, None, None].expand(3, 4, 6)
    )
    mean, std = latent_statistics(Codec(NoisyPixels()), images, 4000, seed=0)
    torch.testing.assert_close(mean, torch.zeros(3), atol=0.01, rtol=0)
    expected = (torch.tensor([1.0, 4.0, 0.0]) / 3 + 0.25).sqrt()  # variance of the means, and of the posteriors
    torch.testing.assert_close(std, expected, atol=0.01, rtol=0)
    few, _ = latent_statistics(Codec(IdentityTokenizer()), Images(), 10, seed=0)
    shown = torch.stack([Images().image(i) for i in permuted_index(torch.arange(10), 23, 0).tolist()])
    torch.testing.assert_close(few, shown.mean((0, 2, 3)))


def test_statistics_of_elements_are_exact(tmp_path):
    images = Images()
    mean, std = latent_statistics(Codec(Elements()), images, 20, seed=0)
    ids = torch.arange(20)
    shown = torch.stack([images.image(i) for i in permuted_index(ids, 23, 0).tolist()])
    noise = KeyedRandom(0, ids).normal("statistics", *shown.shape[1:])
    z = shown + 0.5 * noise  # (n, c, h, w)
    torch.testing.assert_close(mean, z.mean(0))
    torch.testing.assert_close(std, z.std(0, correction=0))
    cache = write(tmp_path, codec := Codec(Elements(), mean, std.clamp(min=0.1)), dtype=torch.float32)
    batch = cache.gather(torch.tensor([3]))
    torch.testing.assert_close(batch["mean"][0], (images.image(3) - mean) / codec.std)
    torch.testing.assert_close(batch["std"][0], 0.5 / codec.std)


def test_moments_do_not_lose_digits_of_a_large_mean():
    values = torch.randn(2, 1000, dtype=torch.float64) + 1e9
    parts = [Moments(2) for _ in range(3)]
    for part, columns in zip(parts, values.split((300, 700, 0), 1)):
        part.add(columns)
    for part in parts[1:]:
        parts[0].merge(part.sums)
    _, std = parts[0].mean_and_std()
    torch.testing.assert_close(std, values.std(1, correction=0).float())


def test_two_processes_write_what_one_writes(tmp_path, codec):
    script = tmp_path / "two.py"
    script.write_text(
        "import json, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from accelerate import Accelerator\n"
        "from test_latents import *\n"
        "accelerator = Accelerator(cpu=True)\n"
        "codec = Codec(NoisyPixels(), torch.tensor([0.0, 0.1, 0.2]), torch.tensor([1.0, 2.0, 4.0]))\n"
        "images = Images()\n"
        f"cache = write({str(tmp_path / 'two')!r}, codec, images, accelerator=accelerator)\n"
        "assert images.asked == list(range(accelerator.process_index, 4, 2))\n"
        "found = [latent_statistics(Codec(kind()), Images(), 20, 0, accelerator) for kind in (NoisyPixels, Elements)]\n"
        "if accelerator.is_main_process:\n"
        f"    open({str(tmp_path / 'two.json')!r}, 'w').write(json.dumps([[x.tolist() for x in s] for s in found]))\n"
        "torch.distributed.destroy_process_group()\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = [{**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    started = [
        subprocess.Popen([sys.executable, script], env=rank, stderr=subprocess.PIPE, text=True) for rank in ranks
    ]
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    one, two = write(tmp_path / "one", codec), LatentCache.open(tmp_path / "two", KEY)
    assert [s["sha256"] for s in one.about["shards"]] == [s["sha256"] for s in two.about["shards"]]
    for kind, found in zip((NoisyPixels, Elements), json.loads((tmp_path / "two.json").read_text())):
        expected = latent_statistics(Codec(kind()), Images(), 20, 0)
        torch.testing.assert_close(torch.tensor(found[0]), expected[0])
        torch.testing.assert_close(torch.tensor(found[1]), expected[1])


@pytest.mark.skipif(not MAPS.is_file(), reason="the list of mapped files is Linux's")
def test_shards_are_memory_mapped(tmp_path, codec):
    cache = write(tmp_path, codec)
    assert all(str(tmp_path / shard["file"]) in MAPS.read_text() for shard in cache.about["shards"])
