"""Previews while images are drawn: what a callback sees, which strips are written, what is refused."""

import pytest
import torch
from PIL import Image

from latelier.diffusion.process import DDPM, Flow
from latelier.images import to_uint8
from latelier.pipeline import LatentDiffusionPipeline, Previews, make_previews, short_prefix, shown_lengths
from latelier.recipe import Prefixes, Sample
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.conv import IdentityTokenizer
from sampled import sampled
from test_pipeline import TinyDenoiser, draw, make
from tiny import refused, tiny_recipe

POINT = 0.7


class PointPrior(torch.nn.Module):
    """The optimal prediction for data that are all POINT: its estimate of z is right at every time."""

    def __init__(self, process):
        super().__init__()
        self.process = process

    def forward(self, x_t, t, condition):
        alpha, sigma = self.process.alpha_sigma(t, x_t)
        return self.process.target(torch.full_like(x_t, POINT), t, (x_t - alpha * POINT) / sigma)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm++"])
@pytest.mark.parametrize("process", [Flow(), DDPM(), DDPM(prediction="v")])
def test_the_estimate_is_that_of_the_clean_latents(process, sampler):
    """Whatever scale the scheduler keeps its state in."""
    seen = []
    sample, watch = Sample(steps=4, sampler=sampler), lambda done, z: seen.append((done, z))
    sampled(PointPrior(process), process, sample, (2, 4, 4), [0, 1], watch=watch)
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert len(seen) >= 4
    for _, z in seen:
        torch.testing.assert_close(z, torch.full((2, 2, 4, 4), POINT), atol=2e-3, rtol=0)


class Decay(torch.nn.Module):
    """The velocity of data that are all 0, v = x / t, without the pole at t = 0."""

    def forward(self, x_t, t, condition):
        return x_t / t.view(-1, 1, 1, 1).clamp(min=1e-3)


def test_adaptive_samplers_are_watched_too():
    seen = []
    settings = Sample(steps=4, sampler="dopri5")
    sampled(Decay(), Flow(), settings, (1, 2, 2), [0], watch=lambda n, z: seen.append(n))
    assert seen == list(range(1, len(seen) + 1))
    assert len(seen) > 6


def test_a_callback_sees_every_batch_and_changes_nothing():
    pipeline, seen = make(), []
    expected = draw(pipeline, count=3, batch=2, seed=5)
    found = draw(pipeline, count=3, batch=2, seed=5, callback=lambda *call: seen.append(call))
    assert torch.equal(found, expected)
    assert [(seeds, done) for seeds, done, _ in seen] == [
        (seeds, done) for seeds in ([5, 6], [7]) for done in (1, 2, 3)
    ]
    assert seen[0][2].shape == (2, 4, 8, 12)


def pixels(channels=3):
    """A pipeline whose latents are the pixels."""
    codec = Codec(IdentityTokenizer(channels, channels))
    return LatentDiffusionPipeline.build(codec, TinyDenoiser(channels), None, Flow(), (8, 8))


def test_strips_of_the_first_batch(tmp_path):
    pipeline = pixels()
    (tmp_path / "step-099.png").write_bytes(b"of an earlier call")
    previews = Previews(pipeline.codec, tmp_path, every=2)
    estimates = {}

    def both(seeds, done, z):
        previews(seeds, done, z)
        estimates.setdefault(done, z)

    draw(pipeline, count=5, batch=3, steps=5, callback=both)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-002.png", "step-004.png"]
    for done in (2, 4):
        with Image.open(tmp_path / f"step-00{done}.png") as strip:
            assert strip.size == (3 * 8 + 2 * 2, 8)
            first = torch.tensor(list(strip.crop((0, 0, 8, 8)).getdata())).view(8, 8, 3)
        assert torch.equal(first, to_uint8(estimates[done][0]).permute(1, 2, 0).long())
    with Image.open(previews.save_strips()) as strips:
        assert strips.size == (28, 18)


def test_a_short_prefix_is_decoded(tmp_path):
    previews = Previews(pixels().codec, tmp_path, every=1, channels=1)
    previews([0], 1, torch.ones(1, 3, 8, 8))
    with Image.open(tmp_path / "step-001.png") as strip:
        assert strip.getpixel((4, 4)) == (255, 128, 128)  # the others are zero, which is grey
    previews([0], 2, torch.ones(1, 2, 8, 8)[:, :1])  # fewer channels are drawn than there are
    with Image.open(tmp_path / "step-002.png") as strip:
        assert strip.getpixel((4, 4)) == (255, 128, 128)


def test_how_many_channels():
    assert [short_prefix(Prefixes(first=2), channels) for channels in (128, 32, 8, 3)] == [32, 8, 4, 3]
    assert short_prefix(Prefixes(first=16), 32) == 16
    assert shown_lengths(Prefixes(first=4), 32) == [4, 8, 16, 32]
    assert shown_lengths(Prefixes(), 32) == [16, 32]  # a quarter is shorter than any that is trained
    pipeline, sample = pixels(8), Sample(steps=4)
    plain = tiny_recipe("runs")
    dcae = {"kind": "dcae", "preset": "dcae15-f8c32-tiny", "images": 8}
    tree = plain.model_dump()
    structured = type(plain).model_validate({**tree, "tokenizer": {**dcae, "prefixes": {"first": 2}}})
    for recipe, wanted, expected in ((structured, None, 4), (structured, 6, 6), (plain, None, None), (None, 2, 2)):
        assert make_previews(pipeline, recipe, sample, plain.folder, 2, wanted).channels == expected


@pytest.mark.parametrize(
    ("every", "channels", "message"),
    [
        (0, None, "every 0 steps does not go with 4 steps; choose 1 to 4"),
        (5, None, "every 5 steps does not go with 4 steps"),
        (1, 9, "Previews of 9 channels: choose 1 to 3"),
        (1, 0, "Previews of 0 channels"),
    ],
)
def test_what_is_refused(tmp_path, every, channels, message):
    refused(message, make_previews, pixels(), None, Sample(steps=4), tmp_path, every, channels)
    refused("fewer than 1000 evaluations", Previews(pixels().codec, tmp_path, every=1000).save_strips)
