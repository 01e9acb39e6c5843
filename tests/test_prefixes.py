"""Prefixes of latent channels: augmented training, sampling, quality against length, what channels carry."""

import pytest
import torch

from latelier.analysis.sample import collect
from latelier.analysis.smoothness import lengths_of, prefix_quality
from latelier.analysis.statistics import channel_statistics, draw_channel_maps, hoyer
from latelier.denoisers.objective import DenoisingObjective
from latelier.diffusion.process import Flow
from latelier.prefixes import random_prefixes
from latelier.preflight import try_denoiser
from latelier.recipe import Prefixes
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.conv import IdentityTokenizer
from latelier.training.denoiser_loop import train_denoiser
from latelier.training.tokenizer_loop import train_tokenizer
from tiny import refused, tiny_recipe


class Seen(torch.nn.Module):
    """A denoiser that predicts zero and remembers what it was shown."""

    def __init__(self):
        super().__init__()
        self.weight, self.inputs = torch.nn.Parameter(torch.zeros(())), []

    def forward(self, x_t, t, condition=None):
        self.inputs.append((x_t.detach(), t))
        return x_t * self.weight


def batch(seen=0, channels=6):
    mean = torch.randn(4, channels, 2, 2)
    return {"mean": mean, "std": torch.zeros_like(mean), "sample_id": torch.arange(4), "seen": seen}


def objective(prefixes=None, **changes):
    model = Seen()
    return model, DenoisingObjective(model, None, Flow(), seed=0, prefixes=random_prefixes(prefixes, 6), **changes)


def test_at_full_width_the_augmented_loss_is_the_plain_one():
    _, plain = objective()
    _, augmented = objective(Prefixes(lengths=[6]))
    data = batch()
    torch.testing.assert_close(augmented(data).losses["mse"], plain(data).losses["mse"], rtol=0, atol=0)


def test_each_draw_has_its_own_prefix_noise_and_time():
    section = Prefixes(first=2, step=2, draws=2, always_full=True)
    model, augmented = objective(section)
    data = batch()
    terms = augmented(data)
    lengths = random_prefixes(section, 6).draw(0, 0)
    assert [x.shape[1] for x, _ in model.inputs] == lengths
    assert (lengths[0], len(lengths)) == (6, 3)
    assert len({tuple(t.tolist()) for _, t in model.inputs}) == 3
    errors = []
    for x, t in model.inputs:  # the target eps - z, from x_t = (1 - t) z + t eps
        z, t = data["mean"][:, : x.shape[1]], t.view(-1, 1, 1, 1)
        errors.append(((x - z) / t).square().mean())
    torch.testing.assert_close(terms.losses["mse"], torch.stack(errors).mean(), rtol=1e-3, atol=1e-4)


def test_lengths_change_from_step_to_step():
    model, augmented = objective(Prefixes(first=2, step=2))
    for seen in range(0, 320, 8):
        augmented(batch(seen))
    assert {x.shape[1] for x, _ in model.inputs} == {2, 4, 6}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny pipeline whose denoiser was trained on prefixes of four channels."""
    short = {"tokenizer": {"images": 16}, "denoiser": {"images": 16, "prefixes": {"first": 1, "step": 1}}}
    recipe = tiny_recipe(tmp_path_factory.mktemp("prefixes"), **short)
    train_tokenizer(recipe)
    from latelier.pipeline import LatentDiffusionPipeline

    return recipe, LatentDiffusionPipeline.from_pretrained(train_denoiser(recipe))


def test_a_pipeline_draws_any_prefix(trained):
    _, pipeline = trained
    for channels in (1, 3):
        drawn = pipeline(count=2, steps=2, channels=channels, output_type="latent", progress=False).images
        assert drawn.shape[:2] == (2, channels)
    images = pipeline(count=2, steps=2, channels=3, output_type="pt", progress=False).images
    expected = pipeline.codec.decode(drawn, 3).clamp(-1, 1)
    torch.testing.assert_close(images, expected, atol=2e-2, rtol=0)  # under bf16 where the CPU is fast at it
    refused("channels = 5 is not a prefix of 4 latent channels", pipeline, count=1, steps=2, channels=5, progress=False)


def pixels():
    """Pixels as latents: a prefix keeps the first colours."""
    return Codec(IdentityTokenizer())


def make_images():
    yield {"image": torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1}


def test_quality_against_length_is_that_of_the_missing_channels():
    found = prefix_quality(collect(pixels(), make_images(), 8), pixels(), [1, 2], ["psnr"], ["vgg16"])
    assert list(found) == ["prefix-psnr@1", "prefix-psnr@2", "prefix-psnr@3"]
    images = next(make_images())["image"]
    for length in (1, 2):
        squares = torch.cat([torch.zeros_like(images[:, :length]), images[:, length:]], 1).square().mean((1, 2, 3))
        expected = (10 * torch.log10(4 / squares)).mean().item()
        assert found[f"prefix-psnr@{length}"].value == pytest.approx(expected, abs=0.05)
    assert found["prefix-psnr@1"].value < found["prefix-psnr@2"].value < found["prefix-psnr@3"].value


def test_default_lengths_are_quarters():
    assert (lengths_of(None, 32), lengths_of(None, 3)) == ([8, 16, 24, 32], [1, 2, 3])
    assert lengths_of([4], 16) == [4, 16]
    refused("prefix_lengths has 20, but the latents have only 16", lengths_of, [20], 16)


def test_hoyers_sparsity():
    values = torch.zeros(3, 100)
    values[0, 0] = 5  # one value
    values[1] = torch.ones(100)  # all equal
    values[2, :25] = 2  # a quarter: (10 - 5) / 9
    torch.testing.assert_close(hoyer(values), torch.tensor([1.0, 0.0, 5 / 9]), atol=1e-6, rtol=0)


def test_variance_of_channels():
    scale = torch.tensor([3.0, 1.0, 1.0]).view(1, 3, 1, 1)
    noise = torch.randn(64, 3, 16, 16) * scale / 4
    found = channel_statistics(collect(pixels(), [{"image": noise}], 64))
    assert found["variance-first-quarter"].value == pytest.approx(9 / 11, abs=0.01)
    shares = torch.tensor(found["variance-first-quarter"].details["by_channel"])
    torch.testing.assert_close(shares, torch.tensor([9.0, 1, 1]) / 16, atol=0.02, rtol=0)


def test_maps_stand_below_their_images():
    images = next(make_images())["image"]
    found = draw_channel_maps(images, images)
    assert found.size == (8 * 18 - 2, 4 * 18 - 2)  # three channels
    refused("1-D latents have no place", draw_channel_maps, images, images.flatten(2))


def test_training_previews_show_a_row_for_each_length(trained):
    recipe, _ = trained
    from PIL import Image

    with Image.open(recipe.folder / "previews" / "denoiser-000000000016.png") as image:
        assert image.size == (8 * 34 - 2, 3 * 34 - 2)  # eight columns of 32 pixels; lengths 1, 2 and 4


@pytest.mark.parametrize(
    ("channels", "prefixes", "message"),
    [
        (5, {"first": 1, "step": 1}, "sample.channels = 5 is not a prefix of 4 latent channels"),
        (2, None, "sample.channels = 2, but this denoiser is not trained on prefixes"),
    ],
)
def test_channels_that_could_not_be_drawn_are_refused_before_training(tmp_path, channels, prefixes, message):
    recipe = tiny_recipe(tmp_path, denoiser={"prefixes": prefixes}, sample={"channels": channels})
    refused(message, list, try_denoiser(recipe))
