"""Posteriors whose rate, width, scale and dead channels are known in closed form."""

import json
import math

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from latelier.analysis.sample import collect
from latelier.analysis.statistics import outlier_channels, posterior_statistics
from latelier.tokenizers import remove_spread
from latelier.tokenizers.codec import Codec
from test_mixture import Same, batches
from test_mixture import codec as plain
from test_one_dimensional import make_codec
from tiny import refused

RATE = {"kl-bits-per-pixel", "posterior-std"}
SCALE = {"active-channels", "active-numbers", "latent-std", "largest-variance-ratio", "outlier-channels"}


class Spread(Same):
    """Posterior means are the images times the channels' gain, plus their shift; one standard deviation for all."""

    def __init__(self, channels=2, std=0.5, gain=1.0, shift=0.0, flat=False):
        super().__init__(flat)
        self.config = {"in_channels": channels, "latent_channels": channels, "patch_size": 1}
        self.std, self.gain, self.shift = std, torch.as_tensor(gain), torch.as_tensor(shift)

    def encode(self, images):
        mean = images * self.gain.view(-1, 1, 1) + self.shift.view(-1, 1, 1)
        mean = mean.flatten(2) if self.flat else mean
        moments = torch.cat([mean, torch.full_like(mean, 2 * math.log(self.std))], 1)
        return type("Encoded", (), {"latent_dist": DiagonalGaussianDistribution(moments)})


def noise(n, channels=2, seed=0):
    """Images of 2 x 2 pixels whose numbers have mean 0 and variance 1 over the images, exactly."""
    x = torch.randn(n, channels, 2, 2, generator=torch.Generator().manual_seed(seed)).double()
    return ((x - x.mean(0)) / x.std(0, correction=0)).float()


def measure(codec, images, size=100):
    return posterior_statistics(collect(codec, batches(images, size), 5000))


def test_rate_and_width_of_a_posterior_of_known_spread():
    found = measure(Codec(Spread(std=0.5), torch.zeros(2), torch.full((2,), 2.0)), noise(400))
    assert set(found) == RATE | SCALE
    kl, width = found["kl-bits-per-pixel"], found["posterior-std"]
    nats = 0.5 * (1 + 0.25 - 1 - math.log(0.25))  # of a number; a pixel has two of them
    assert kl.value == pytest.approx(2 * nats / math.log(2), rel=1e-5)
    assert kl.interval[0] < kl.value < kl.interval[1]
    assert kl.details["nats_per_number"] == pytest.approx(nats, rel=1e-5)
    assert kl.details["by_channel"] == pytest.approx([nats, nats], rel=1e-5)
    scaled = 0.5 * (0.25 + 0.0625 - 1 - math.log(0.0625))
    assert kl.details["bits_per_pixel_at_own_scale"] == pytest.approx(2 * scaled / math.log(2), rel=1e-5)
    assert width.value == pytest.approx(0.25)
    assert width.details["by_channel"] == pytest.approx([0.25, 0.25])
    assert kl.details["variational"]
    json.dumps([result.details for result in found.values()])


def test_scale_is_that_of_sampled_latents_and_does_not_hang_on_stored_statistics():
    images = noise(300)
    tokenizer = Spread(std=0.5, gain=[3.0, 1.0], shift=[4.0, 0.0])
    about = measure(Codec(tokenizer), images)["latent-std"]
    first, second = 9.25, 1.25  # variances of the channels
    overall = math.sqrt((first + second) / 2 + 4)  # their means, 4 and 0, have variance 4
    assert about.value == pytest.approx(overall, rel=1e-5)
    assert about.details["scaling_factor"] == pytest.approx(1 / overall, rel=1e-5)
    assert about.details["shift_factor"] == pytest.approx(2, rel=1e-5)
    assert about.details["by_channel"] == pytest.approx([first**0.5, second**0.5], rel=1e-5)
    assert about.details["mean_by_channel"] == pytest.approx([4, 0], abs=1e-4)
    assert about.details["latent_scale"] == "measured on the first 300 images"
    other = measure(Codec(tokenizer, torch.tensor([1.0, -1.0]), torch.tensor([5.0, 0.1])), images)["latent-std"]
    assert other.value == pytest.approx(overall, rel=1e-5)
    assert other.details["latent_scale"] == "the codec's statistics"


def test_a_plain_tokenizer_has_no_rate():
    found = measure(plain(), noise(300))
    assert set(found) == SCALE
    assert found["latent-std"].value == pytest.approx(1, rel=1e-5)
    assert not found["latent-std"].details["variational"]
    assert (found["active-channels"].value, found["active-numbers"].value) == (1, 1)
    assert (found["outlier-channels"].value, found["largest-variance-ratio"].value) == (0, pytest.approx(1, rel=1e-5))


def test_collapsed_channels_and_numbers_are_not_active():
    images = noise(300, channels=4)
    images[:, 1] = images[:, 1] * 0.1  # signal of variance 0.01 beside a posterior of variance 1: just too small
    images[:, 2] = 0.7  # the same for all images
    images[:, 3, 0] = torch.tensor([2.0, -2.0])  # two of four numbers, though they differ from each other
    found = measure(Codec(Spread(channels=4, std=1.0)), images)
    channels, numbers = found["active-channels"], found["active-numbers"]
    assert channels.value == 0.5
    assert channels.details["by_channel"][:3] == pytest.approx([0.5, 0.01 / 1.01, 0], abs=1e-5)
    assert (numbers.value, numbers.details["by_channel"]) == (pytest.approx(6 / 16), [1, 0, 0, 0.5])
    assert (numbers.details["threshold"], numbers.details["latent_positions"]) == (0.01, 4)


def test_rounding_of_a_dead_channel_is_not_activity():
    images = noise(300)
    images[:, 1] = 100 + 1e-5 * images[:, 1]  # about one step of float32
    found = measure(Codec(Same()), images)
    assert found["active-channels"].value == 0.5


def test_one_loud_and_one_silent_channel_are_outliers():
    gain = torch.ones(8)
    gain[7], gain[2] = 40**0.5, 0.1
    found = measure(Codec(Spread(channels=8, std=1e-4, gain=gain)), noise(300, channels=8))
    ratio, outliers = found["largest-variance-ratio"], found["outlier-channels"]
    assert (ratio.value, ratio.details["channel"]) == (pytest.approx(40, rel=1e-4), 7)
    assert outliers.value == 2
    assert (outliers.details["large"], outliers.details["small"]) == ([7], [2])


def test_outliers_are_far_from_the_median_in_units_of_the_others_distance():
    assert outlier_channels(torch.tensor([1.0, 1.0, 3.9, 1.0])) == ([], [])  # alike within the factor
    assert outlier_channels(torch.tensor([1.0, 1.0, 4.1, 1.0])) == ([2], [])
    assert outlier_channels(torch.tensor([1.0, 1.0, 0.0, 1.0])) == ([], [2])
    assert outlier_channels(2.0 ** torch.arange(8)) == ([], [])  # a slope is no outlier
    assert outlier_channels(torch.tensor([5.0])) == ([], [])


def test_heavy_tails_have_an_excess_of_kurtosis():
    signs = torch.tensor([1.0, -1.0]).repeat(50)[:, None, None, None].expand(100, 1, 2, 2)
    rare = torch.zeros(100, 1, 2, 2)
    rare[:10], rare[10:20] = 1, -1
    found = measure(Codec(Same()), torch.cat([signs, rare], 1))
    assert found["latent-std"].details["excess_kurtosis_by_channel"] == pytest.approx([-2, 5 - 3])


def test_batches_and_1d_latents_change_nothing():
    images = noise(300)
    one = measure(Codec(Spread(gain=[2.0, 0.3]), torch.zeros(2), torch.ones(2)), images)
    parts = measure(Codec(Spread(gain=[2.0, 0.3], flat=True), torch.zeros(2), torch.ones(2)), images, 7)
    assert {name: m.value for name, m in parts.items()} == pytest.approx({name: m.value for name, m in one.items()})


def autoencoder(**options):
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4, sample_size=8, **options)


def test_autoencoders_straight_from_diffusers_grey_images_and_1d_latents():
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    found = measure(Codec(autoencoder()), images)
    assert set(found) == RATE | SCALE
    assert found["latent-std"].details["configured_scaling_factor"] == 0.18215
    assert set(measure(Codec(autoencoder(in_channels=1, out_channels=1)), images[:, :1])) == RATE | SCALE
    assert set(measure(make_codec(statistics=False), images)) >= SCALE
    deterministic = autoencoder()
    remove_spread(deterministic)
    assert set(measure(Codec(deterministic), images)) == SCALE


def test_too_few_images_and_latents_that_do_not_vary():
    refused("at least 2 images, not 1", measure, plain(), noise(300)[:1])
    refused("are equal, or not finite", measure, Codec(Same()), torch.ones(5, 2, 2, 2))
    refused("are equal, or not finite", measure, plain(), torch.full((5, 2, 2, 2), float("nan")))
