"""Sampling at several numbers of steps: what is measured, on which images, and what the clock counts."""

import itertools

import pytest
import torch

from latelier.denoisers.unet import UNet, architecture
from latelier.diffusion.process import DDPM
from latelier.errors import LatelierError
from latelier.evaluation import speed
from latelier.evaluation.distributions import FeatureStatistics
from latelier.evaluation.speed import batches, measure_sampling
from latelier.pipeline import LatentDiffusionPipeline
from latelier.recipe import Sample, build_recipe
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.conv import IdentityTokenizer
from tiny import colour_extractor, tiny_recipe


@pytest.fixture
def colours(monkeypatch):
    extractor = colour_extractor()
    monkeypatch.setattr(speed, "load_extractor", lambda name, device: extractor)
    return extractor


@pytest.fixture
def pipeline():
    model = UNet(**architecture((8, 16), (), head_width=8, layers=1), in_channels=3, out_channels=3, norm_num_groups=4)
    tokenizer = Codec(IdentityTokenizer(), torch.zeros(3), torch.ones(3))
    return LatentDiffusionPipeline.build(tokenizer, model.eval(), None, DDPM(), (16, 16))


def recipe(folder, steps, samples=10):
    sample = {"guidance": 1.0, "batch": 4, "seed": 5, "sampler": "ddim"}
    return tiny_recipe(folder, sample=sample, evaluate={"samples": samples, "sampling_steps": steps})


def references(read, n=12):
    """Batches of four images, which note that they were read."""
    for part in (torch.rand(n, 3, 16, 16) * 2 - 1).split(4):
        read.append(len(part))
        yield {"image": part}


def test_quality_and_speed_at_each_number_of_steps(tmp_path, colours, pipeline, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(speed.time, "perf_counter", lambda: float(next(ticks)))  # every batch takes one second
    read = []
    measured = measure_sampling(pipeline, references(read), recipe(tmp_path, [3, 2]), {"reference": "toy", "steps": 50})
    assert [m.name for m in measured] == [
        "gfd-colour@2", "samples-per-second@2", "gfd-colour@3", "samples-per-second@3",
    ]  # fmt: skip
    assert read == [4, 4, 4]  # once, not for each number of steps
    assert next(ticks) == 2 * (1 + 3 + 3)  # a batch to warm up, then three batches of each
    for m in measured:
        receipt = m.receipt
        assert (receipt["n"], receipt["n_reference"], receipt["batch"], receipt["reference"]) == (10, 10, 4, "toy")
        assert receipt["steps"] == int(m.name.partition("@")[2])
        assert receipt["extractor"] == "colour"
        assert (receipt["threads"], receipt["drawn_on"]) == (torch.get_num_threads(), "cpu")
        assert receipt["device"]
    assert [m.value for m in measured[1::2]] == [pytest.approx(10 / 3)] * 2
    assert measured[1].receipt["seconds"] == 3


def test_the_clock_runs(tmp_path, colours, pipeline):
    measured = measure_sampling(pipeline, references([]), recipe(tmp_path, [1, 20]), {})
    few, many = (m.value for m in measured[1::2])
    assert few > many > 0


def test_images_have_the_same_seeds_whatever_the_batch(tmp_path, colours, pipeline):
    torch.manual_seed(1)
    settings = recipe(tmp_path, [2])
    measured = measure_sampling(pipeline, references([]), settings, {})
    sample = settings.sample.model_copy(update={"steps": 2, "count": 10, "batch": 10})
    drawn = pipeline(sample=sample, output_type="pt", progress=False).images
    torch.manual_seed(1)
    real = torch.cat([batch["image"] for batch in references([])])[:10]
    sides = [FeatureStatistics(3), FeatureStatistics(3)]
    for side, images in zip(sides, (drawn, real)):
        side.update(colours(images))
    assert measured[0].value == pytest.approx(sides[0].distance(sides[1]), rel=1e-3)


def test_without_steps_nothing_is_read(tmp_path, pipeline):
    read = []
    assert measure_sampling(pipeline, references(read), recipe(tmp_path, []), {}) == []
    assert read == []


def test_few_references_are_matched(tmp_path, colours, pipeline):
    measured = measure_sampling(pipeline, references([], 6), recipe(tmp_path, [1]), {})
    assert [m.receipt["n"] for m in measured] == [6, 6]
    with pytest.raises(LatelierError, match="no reference images"):
        measure_sampling(pipeline, [], recipe(tmp_path, [1]), {})


def test_impossible_steps(tmp_path, colours, pipeline):
    with pytest.raises(LatelierError, match="1001"):
        measure_sampling(pipeline, references([]), recipe(tmp_path, [1001]), {})
    tree = recipe(tmp_path, [1]).model_dump()
    tree["evaluate"]["sampling_steps"] = [10, 0]
    with pytest.raises(LatelierError, match=r"evaluate.sampling_steps.1 = 0 is not allowed"):
        build_recipe(tree)


def test_batches_go_on_where_the_last_ended():
    found = list(batches(Sample(seed=7, batch=4, classes=["a", "b", "c"]), 10))
    assert [(b.seed, b.count) for b in found] == [(7, 4), (11, 4), (15, 2)]
    drawn = [b.classes[i % 3] for b in found for i in range(b.count)]
    assert drawn == list("abcabcabca")
    assert next(batches(Sample(batch=4), 4)).classes is None
