"""Costs of tokenizers that can be counted by hand, of the two in LDMAE's table, and of sampling by steps."""

import itertools

import pytest
import torch
from diffusers import AutoencoderKL

from latelier.denoisers.unet import UNet, architecture
from latelier.diffusion.process import DDPM
from latelier.evaluation import cost
from latelier.evaluation.cost import count_cost, measure_cost, measure_sampling, without_memory
from latelier.evaluation.distributions import FeatureStatistics
from latelier.evaluation.generation import batches
from latelier.pipeline import LatentDiffusionPipeline
from latelier.recipe import Sample
from latelier.tokenizers import conv, vmae
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.conv import IdentityTokenizer
from tiny import colour_extractor, refused, tiny_recipe


def on_meta(cls, presets, name):
    with torch.device("meta"):
        return Codec(cls(**presets[name]))


@pytest.fixture(scope="module")
def paper():
    """SD3's autoencoder and VMAE at 256 pixels."""
    models = on_meta(AutoencoderKL, conv.PRESETS, "kl-f8c16"), on_meta(vmae.VMAE, vmae.PRESETS, "vmae-f8d16")
    return [count_cost(codec, 256, 256) for codec in models]


def test_the_papers_table(paper):
    sd3, ours = paper
    assert sd3.gflop_paper == pytest.approx(17331.3, abs=0.1)
    assert ours.gflop_paper == pytest.approx(701.4, abs=0.1)
    assert 100 * ours.gflop_paper / sd3.gflop_paper == pytest.approx(4.05, abs=0.01)
    assert (sd3.gflop_encode, sd3.gflop_decode) == pytest.approx((272.9, 622.3), abs=0.06)  # everything counted
    assert (ours.gflop_encode, ours.gflop_decode) == pytest.approx((20.6, 20.7), abs=0.06)
    assert sd3.parameters == 83_819_683
    assert (sd3.mib, ours.mib) == pytest.approx((319.75, 42.69), abs=0.01)
    assert 100 * ours.mib / sd3.mib == pytest.approx(13.35, abs=0.01)
    assert 0.45 < ours.decoder_parameters / ours.parameters < 0.55


class Halves(torch.nn.Module):
    """One strided convolution, one attention with a linear projection, one transposed convolution."""

    def __init__(self):
        super().__init__()
        self.config = {"in_channels": 3, "latent_channels": 4, "patch_size": 2}
        self.encoder = torch.nn.Conv2d(3, 4, 2, stride=2)
        self.mix = torch.nn.Linear(4, 4, bias=False)
        self.decoder = torch.nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.register_buffer("table", torch.zeros(10))

    def encode(self, images):
        z = self.encoder(images)
        tokens = self.mix(z.flatten(2).transpose(1, 2))[:, None]
        mixed = torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)[:, 0]
        return type("Encoded", (), {"latents": mixed.transpose(1, 2).unflatten(2, z.shape[2:])})

    def decode(self, latents):
        return type("Decoded", (), {"sample": self.decoder(latents)})


def test_by_hand():
    cost = count_cost(Codec(Halves()), 8, 6)
    convolution, linear, attention = 2 * 12 * 12 * 4, 2 * 12 * 4 * 4, 2 * 2 * 12 * 12 * 4  # 12 positions
    assert cost.gflop_encode * 1e9 == pytest.approx(convolution + linear + attention)
    assert cost.gflop_decode * 1e9 == pytest.approx(2 * 12 * 4 * 3 * 2 * 2)
    assert cost.gflop_paper * 1e9 == pytest.approx(64 * (convolution + linear))
    assert cost.parameters == (3 * 4 * 4 + 4) + 16 + (4 * 3 * 4 + 3)
    assert cost.decoder_parameters == 4 * 3 * 4 + 3
    assert cost.mib * 2**20 == 4 * (cost.parameters + 10)


def test_the_copy_is_without_memory_and_the_original_stays():
    model = Halves()
    shadow = without_memory(model)
    assert {t.device.type for t in shadow.state_dict().values()} == {"meta"}
    assert {t.device.type for t in model.state_dict().values()} == {"cpu"}


def test_half_precision_costs_the_same_and_pixels_nothing():
    codec, half = Codec(Halves()), Codec(Halves().to(torch.bfloat16))
    assert count_cost(codec, 8, 8).mib == count_cost(half, 8, 8).mib
    refused("not divisible", count_cost, codec, 7, 8)
    nothing = count_cost(Codec(conv.IdentityTokenizer()), 16, 16)
    assert (nothing.parameters, nothing.gflop_encode, nothing.gflop_decode) == (0, 0, 0)


def test_measured():
    codec = Codec(vmae.VMAE(image_size=(16, 16), dim=16, depth=1, heads=2, decoder_dim=16, decoder_depth=1,
                            decoder_heads=2, latent_channels=4))  # fmt: skip
    measured = {m.name: m for m in measure_cost(codec, 16, 16, batch=4, seconds=0.05)}
    assert list(measured) == [
        "parameters", "size-mib", "gflop-encode", "gflop-decode", "gflop-paper",
        "encode-images-per-second", "decode-images-per-second", "memory-gb",
    ]  # fmt: skip
    assert all(m.value > 0 for m in measured.values())
    parameters = measured["parameters"]
    assert parameters.receipt["encoder"] + parameters.receipt["decoder"] == parameters.value
    assert measured["encode-images-per-second"].receipt["repetitions"] >= 1
    assert "whole process" in measured["memory-gb"].receipt["peak"]


@pytest.fixture
def colours(monkeypatch):
    extractor = colour_extractor()
    monkeypatch.setattr(cost, "load_extractor", lambda name, device: extractor)
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
    monkeypatch.setattr(cost.time, "perf_counter", lambda: float(next(ticks)))  # every batch takes one second
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


def test_no_steps_few_references_and_impossible_steps(tmp_path, colours, pipeline):
    read = []
    assert (measure_sampling(pipeline, references(read), recipe(tmp_path, []), {}), read) == ([], [])
    measured = measure_sampling(pipeline, references([], 6), recipe(tmp_path, [1]), {})
    assert [m.receipt["n"] for m in measured] == [6, 6]
    refused("no reference images", measure_sampling, pipeline, [], recipe(tmp_path, [1]), {})
    refused("1001", measure_sampling, pipeline, references([]), recipe(tmp_path, [1001]), {})
    refused(r"evaluate.sampling_steps.1 = 0 is not allowed", recipe, tmp_path, [10, 0])


def test_batches_go_on_where_the_last_ended():
    found = list(batches(Sample(seed=7, batch=4, classes=["a", "b", "c"]), 10))
    assert [(b.seed, b.count) for b in found] == [(7, 4), (11, 4), (15, 2)]
    drawn = [b.classes[i % 3] for b in found for i in range(b.count)]
    assert drawn == list("abcabcabca")
    assert next(batches(Sample(batch=4), 4)).classes is None
