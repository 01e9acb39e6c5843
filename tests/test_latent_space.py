"""Smoothness and compression, on latents and decoders whose answers are known in closed form."""

import math

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from latelier.analysis import clustering
from latelier.analysis.clustering import measure_spread, perceptual_compression, regions, within_and_separation
from latelier.analysis.sample import collect
from latelier.analysis.smoothness import area_weights, noisy_latents, prefix_quality, smoothness
from latelier.analysis.statistics import channel_statistics, posterior_statistics
from latelier.losses.perceptual import LPIPS
from latelier.tokenizers.codec import Codec
from tiny import needs_lpips, refused

LEVELS = [0.0, 0.1, 0.2, 0.3, 0.5]


class Linear(torch.nn.Module):
    """Latents are the images times a gain; decoding undoes that and adds a constant; flat makes them 1-D."""

    def __init__(self, gain=1.0, shift=0.0, flat=False, logvar=None):
        super().__init__()
        self.gain, self.shift, self.flat, self.logvar = gain, shift, flat, logvar
        self.config = {"in_channels": 3, "latent_channels": 3, "patch_size": 1}

    def encode(self, images):
        z = images * self.gain
        if self.logvar is not None:
            moments = torch.cat([z, torch.full_like(z, self.logvar)], 1)
            return type("Encoded", (), {"latent_dist": DiagonalGaussianDistribution(moments)})
        return type("Encoded", (), {"latents": z.flatten(2) if self.flat else z})

    def decode(self, z):
        side = math.isqrt(z[0, 0].numel())
        return type("Decoded", (), {"sample": z.reshape(len(z), 3, side, side) / self.gain + self.shift})


def codec(sigma=0.1, gain=1.0, **arguments):
    """With statistics: the images' standard deviation in pixels is said to be sigma."""
    return Codec(Linear(gain, **arguments), torch.zeros(3), torch.full((3,), sigma * gain))


def batches(count=3, size=16, batch=4, contrast=0.5):
    """Random images on 8-bit levels, far from black and white."""
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand(count * batch, 3, size, size, generator=generator) - 0.5) * contrast
    images = ((images + 1) * 127.5).round() / 127.5 - 1
    return [{"image": part} for part in images.split(batch)]


# -- smoothness -------------------------------------------------------------------------------------------------------


def measure(toy, images, metrics=("psnr",), levels=LEVELS):
    return smoothness(collect(toy, images, 12), toy, levels, metrics, ["vgg16"])


def expected_psnr(level, sigma, shift):
    """Of noise, a constant of whole 8-bit levels, and the rounding of what is noisy to such levels."""
    rounding = 1 / 12 if level else 0
    return 10 * math.log10(255**2 / (127.5**2 * (level**2 * sigma**2 + shift**2) + rounding))


@pytest.mark.parametrize("gain", [1.0, 30.0])
def test_the_response_of_a_linear_decoder(gain):
    toy = codec(0.1, gain, shift=4 / 127.5)
    ((name, measured),) = measure(toy, batches(), ["psnr", "ssim", "gfd"]).items()
    expected = [expected_psnr(level, 0.1, 4 / 127.5) for level in LEVELS]
    assert name == "smoothness-psnr"
    assert measured.details["curve"] == [[s, pytest.approx(y, abs=0.15)] for s, y in zip(LEVELS, expected)]
    area = (expected[0] / 2 + expected[1] + expected[2] + expected[3] / 2) / 3
    assert measured.value == pytest.approx(area, abs=0.1)
    assert measured.details["drop"] == pytest.approx(expected[3] - expected[0], abs=0.15)
    assert measured.interval[0] < measured.value < measured.interval[1]
    about = measured.details
    assert about["range"] == [0.0, 0.3]
    assert about["latent_scale"] == "the codec's statistics"
    assert "warning" not in about


def test_codecs_without_statistics_measure_them():
    sigma = torch.cat([b["image"] for b in batches()]).std().item()
    (known,) = measure(codec(sigma, 30.0, shift=0.05), batches()).values()
    (measured,) = measure(Codec(Linear(30.0, shift=0.05)), iter(batches())).values()
    assert measured.value == pytest.approx(known.value, abs=0.05)
    assert measured.details["latent_scale"] == "measured on the first 12 images"


def test_measured_statistics_are_of_sampled_latents():
    toy = Codec(Linear(2.0, logvar=math.log(9.0)))
    images = torch.cat([b["image"] for b in batches()])
    sample = collect(toy, batches(), 12)
    variance = (2 * images).transpose(0, 1).flatten(1).var(1, correction=0) + 9
    assert torch.allclose(sample.scale.std, variance.sqrt(), rtol=1e-4)
    assert torch.equal(sample.pixels(slice(0, 12)), images)


def test_scales_of_elements_are_those_of_channels_where_channels_are_measured():
    raw = torch.randn(300, 3, 2, 4) * torch.rand(3, 2, 4) + torch.randn(3, 2, 4)
    by_element = Codec(Linear(), raw.mean(0), raw.std(0, correction=0))
    by_channel = Codec(Linear(), raw.mean((0, 2, 3)), raw.std((0, 2, 3), correction=0))
    one, other = (collect(codec, [{"image": raw}], 300) for codec in (by_element, by_channel))
    torch.testing.assert_close(one.z.std(0, correction=0), torch.ones(3, 8))
    for measure in (posterior_statistics, channel_statistics):
        for name, result in measure(one).items():
            assert result.value == pytest.approx(measure(other)[name].value, rel=1e-4)


def test_the_same_noise_at_each_level_and_in_each_batching():
    z = batches(batch=6)[0]["image"]
    clean, *noisy = noisy_latents(z, [0.0, 0.5, 1.0], seed=3, first=0)
    assert torch.equal(clean, z)
    assert torch.allclose((noisy[0] - clean) * 2, noisy[1] - clean, atol=1e-5)
    tail = list(noisy_latents(z[4:], [0.0, 0.5, 1.0], seed=3, first=4))
    assert torch.allclose(tail[2], noisy[1][4:], atol=1e-6)
    other = next(noisy_latents(z, [1.0], seed=4, first=0))
    assert not torch.allclose(other, noisy[1], atol=1e-2)


def test_one_dimensional_latents_have_the_same_noise_response():
    (measured,) = measure(codec(0.1, flat=True, shift=6 / 127.5), batches()).values()
    assert measured.details["curve"][3][1] == pytest.approx(expected_psnr(0.3, 0.1, 6 / 127.5), abs=0.1)


@needs_lpips
def test_all_metrics_follow_the_noise():
    loud, quiet = (measure(codec(s), batches(), ["psnr", "lpips", "rfd"], [0.0, 0.3, 1.0]) for s in (0.3, 0.03))
    assert list(loud) == ["smoothness-psnr", "smoothness-lpips", "smoothness-rfd-vgg16"]
    for name in ("smoothness-lpips", "smoothness-rfd-vgg16"):
        (_, zero), (_, small), (_, large) = loud[name].details["curve"]
        assert zero == pytest.approx(0, abs=1e-6)
        assert zero < small < large
        assert loud[name].value == pytest.approx(small / 2, rel=1e-3)  # a triangle's area
        assert loud[name].value > quiet[name].value
    assert loud["smoothness-rfd-vgg16"].interval is None
    assert "below the feature dimension" in loud["smoothness-rfd-vgg16"].details["warning"]


def test_area_of_known_curves():
    levels = [0.0, 0.1, 0.25, 0.5]
    weight = area_weights(levels)
    assert weight.sum().item() == pytest.approx(1)
    assert (weight @ torch.tensor(levels, dtype=torch.float64)).item() == pytest.approx(0.15)  # of a straight line
    bump = torch.tensor([0.0, 0, 0, 1], dtype=torch.float64)  # rises to 0.2 at 0.3
    assert (weight @ bump).item() == pytest.approx(0.05 * 0.2 / 2 / 0.3)
    assert area_weights([0.0, 0.2]).tolist() == [0.5, 0.5]


def test_short_ranges_are_said_and_none_is_refused():
    (measured,) = measure(codec(0.1, shift=0.05), batches(), levels=[0.2]).values()
    (_, first), (_, last) = measured.details["curve"]
    assert measured.value == pytest.approx((first + last) / 2)
    assert measured.details["drop"] == pytest.approx(last - first)
    assert "0.2, not to 0.3" in measured.details["warning"]
    refused("no level above 0", measure, codec(), batches(), levels=[0.0])
    assert measure(codec(), batches(), ["gfd"]) == {}


@needs_lpips
def test_what_measures_share_is_computed_once(monkeypatch):
    """Maps of the originals, and the reconstruction as the version without noise and as the longest prefix."""
    passes = []
    features = LPIPS.features
    monkeypatch.setattr(LPIPS, "features", lambda self, x: passes.append(len(x)) or features(self, x))
    toy = codec(0.1, shift=0.1)
    sample, metrics = collect(toy, batches(5), 20), ["psnr", "lpips", "rfd"]
    found = smoothness(sample, toy, [0.3], metrics, ["vgg16"])
    assert sum(passes) == 3 * 20
    found |= prefix_quality(sample, toy, [1], metrics, ["vgg16"])
    perceptual_compression(sample, 2)
    assert sum(passes) == 4 * 20
    alone = prefix_quality(collect(toy, batches(5), 20), toy, [1], metrics, ["vgg16"])
    assert all(result.value == found[name].value for name, result in alone.items())


# -- estimators -------------------------------------------------------------------------------------------------------


def gaussians(means, sizes, sigma=1.0, seed=0):
    """Isotropic clusters around the rows of `means`."""
    generator = torch.Generator().manual_seed(seed)
    clusters = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    x = means[clusters] + sigma * torch.randn(len(clusters), means.shape[1], generator=generator)
    return x, clusters


def estimate(x, clusters):
    within, separation = within_and_separation(x, clusters, torch.ones(1, len(x)))
    return within.item(), separation.item()


@pytest.mark.parametrize("sizes", [[4000, 4000], [6000, 500]])
def test_two_clusters_at_a_distance(sizes):
    dims, distance, sigma = 8, 6.0, 0.7
    means = torch.zeros(2, dims)
    means[1, 0] = distance
    within, separation = estimate(*gaussians(means, sizes, sigma))
    between = distance**2 / 2  # the sample variance of two means
    assert separation == pytest.approx(distance**2 / (2 * dims * sigma**2), rel=0.05)
    assert within == pytest.approx(dims * sigma**2 / (dims * sigma**2 + between), rel=0.05)


def test_four_vectors_by_hand():
    x, clusters = torch.tensor([[0.0], [2.0], [10.0], [12.0]]), torch.tensor([0, 0, 1, 1])
    within, separation = estimate(x, clusters)
    # MSW = 4 / 2 = 2, MSB = 100, n0 = 2; means 1 and 11
    assert within == pytest.approx(2 / (2 + (100 - 2) / 2))
    assert separation == pytest.approx((100 - 2 * (1 / 2 + 1 / 2)) / (2 * 2))


def test_pairs_of_unequal_clusters_as_defined():
    x, clusters = gaussians(torch.randn(4, 5), [3, 9, 20, 40])
    parts = [x[clusters == k].double() for k in range(4)]
    msw = sum((p - p.mean(0)).square().sum() for p in parts) / (len(x) - 4)
    pairs = [
        (a.mean(0) - b.mean(0)).square().sum() - msw * (1 / len(a) + 1 / len(b))
        for i, a in enumerate(parts) for b in parts[i + 1 :]
    ]  # fmt: skip
    assert estimate(x, clusters)[1] == pytest.approx((sum(pairs) / len(pairs) / (2 * msw)).item())


def test_unbiased_with_small_clusters():
    means = 0.5 * torch.randn(10, 16, generator=torch.Generator().manual_seed(5))
    truth = (means - means.mean(0)).square().sum().item() / 9 / 16
    found = [estimate(*gaussians(means, [4, 5] * 5, seed=seed))[1] for seed in range(100)]
    assert sum(found) / 100 == pytest.approx(truth, rel=0.05)


def test_without_clusters():
    generator = torch.Generator().manual_seed(1)
    x, clusters = torch.randn(4000, 6, generator=generator), torch.randint(0, 20, (4000,), generator=generator)
    within, separation = estimate(x, clusters)
    assert (within, separation) == (pytest.approx(1, abs=0.01), pytest.approx(0, abs=0.01))


def test_scaling_and_rotating_change_nothing():
    x, clusters = gaussians(torch.randn(5, 7), [20, 30, 40, 50, 60])
    rotation = torch.linalg.qr(torch.randn(7, 7))[0]
    moved = 1000 * x @ rotation + 77
    assert estimate(moved, clusters) == pytest.approx(estimate(x, clusters), rel=1e-3)


def test_weights_are_repetitions():
    x, clusters = gaussians(torch.randn(3, 4), [10, 20, 30])
    times = torch.randint(0, 4, (60,))
    times[:10] = 0  # the first cluster does not exist
    weighted = within_and_separation(x, clusters, times[None].float())
    repeated = x.repeat_interleave(times, 0), clusters.repeat_interleave(times) - 1
    assert [value.item() for value in weighted] == pytest.approx(estimate(*repeated), rel=1e-5)


def test_a_resample_draws_as_many_images():
    weight = clustering.image_weights(50, seed=0)
    assert torch.equal(weight.sum(1), torch.full((200,), 50.0))
    assert torch.equal(weight, clustering.image_weights(50, seed=0))
    assert not torch.equal(weight, clustering.image_weights(50, seed=1))


def test_intervals_cover_the_truth():
    """Of images with four regions each, which have a shift in common."""
    means = torch.randn(8, 6, generator=torch.Generator().manual_seed(9))
    truth = (means - means.mean(0)).square().sum().item() / 7 / 6
    covered = covered_if_independent = 0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        clusters = torch.randint(0, 8, (150, 4), generator=generator)
        common, own = (torch.randn(150, count, 6, generator=generator) for count in (1, 4))
        x = (means[clusters] + common * 0.7 + own * 0.51**0.5).flatten(0, 1)
        images = torch.arange(150).repeat_interleave(4)
        low, high = measure_spread(x, clusters.flatten(), images, seed).separation_interval
        covered += low <= truth <= high
        low, high = measure_spread(x, clusters.flatten(), torch.arange(600), seed).separation_interval
        covered_if_independent += low <= truth <= high
    assert covered >= 35
    assert covered >= covered_if_independent


def test_the_estimate_lies_in_its_interval():
    x, clusters = gaussians(torch.randn(3, 4), [30, 30, 30])
    spread = measure_spread(x, clusters * 10 - 5, torch.arange(90))
    assert spread.within_interval[0] < spread.within < spread.within_interval[1]
    assert spread.separation_interval[0] < spread.separation < spread.separation_interval[1]
    assert (spread.within, spread.separation) == pytest.approx(estimate(x, clusters))


@pytest.mark.parametrize(
    ("x", "clusters", "message"),
    [(torch.randn(9, 2), torch.zeros(9), "not 1 clusters"), (torch.randn(3, 2), torch.arange(3), "not 3 clusters"),
     (torch.ones(9, 2), torch.arange(9) % 2, "equal, or not finite")],
)  # fmt: skip
def test_what_has_no_spread(x, clusters, message):
    refused(message, measure_spread, x, clusters.long(), torch.arange(len(x)))


# -- regions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "part"), [(1, 1), (4, 1), (8, 2), (10, 2), (11, 1), (16, 4), (32, 8)])
def test_parts_tile_the_grid(side, part):
    assert clustering.part_side(side) == part


def test_latents_and_features_are_of_the_same_place():
    z = torch.arange(2 * 3 * 64.0).view(2, 3, 8, 8)
    place = torch.arange(64.0).view(1, 1, 8, 8).expand(2, 1, 8, 8)
    found = regions(z, [place.repeat_interleave(2, 2).repeat_interleave(2, 3)] * 5)
    assert {name: region.latents.shape for name, region in found.items()} == {
        "object": (2, 1, 192), "part": (2, 16, 12), "pattern": (2, 64, 3),
    }  # fmt: skip
    for region in found.values():
        first = region.latents[0].unflatten(1, (3, -1))[:, 0].mean(-1)  # of the first channel, which counts places
        assert torch.allclose(first, region.looks[0, :, 0])
    row = regions(torch.randn(2, 3, 10), [torch.randn(2, 7, 4, 4)] * 5)  # 1-D latents are objects only
    assert {name: region.latents.shape for name, region in row.items()} == {"object": (2, 1, 30)}


def test_the_choice_of_regions_does_not_depend_on_batches():
    latents, looks, labels = torch.randn(40, 5, 2), torch.randn(40, 5, 3), torch.arange(40)
    kept = []
    for size in (40, 7):
        store = clustering.Regions("part", (1, 1), seed=0, most=30)
        for first in range(0, 40, size):
            part = slice(first, first + size)
            store.add(latents[part], looks[part], labels[part], first)
        kept.append(store)
    assert all(store.latents.shape == (30, 2) and torch.equal(store.labels, store.images) for store in kept)
    assert torch.equal(kept[0].latents, kept[1].latents)
    assert len(kept[0].images.unique()) > 15
    assert torch.isin(kept[0].latents, latents[kept[0].images]).all()


def test_perceptual_clusters_find_directions():
    directions = torch.eye(4)[torch.arange(80) % 4]
    looks = directions * torch.linspace(1, 9, 80)[:, None]  # length does not matter
    clusters = clustering.perceptual_clusters(looks, 64, seed=0)
    assert len(clusters.unique()) == 4
    assert all(len(clusters[k::4].unique()) == 1 for k in range(4))
    assert len(clustering.perceptual_clusters(torch.randn(80, 6), 64, seed=0).unique()) == 10  # an eighth of all


# -- compression ------------------------------------------------------------------------------------------------------


def striped(count=32, size=32, labels=True):
    """Two kinds of images, stripes and checks, of random contrast, with a little noise."""
    generator = torch.Generator().manual_seed(0)
    across, down = torch.arange(size) // 4 % 2, torch.arange(size)[:, None] // 4 % 2
    kinds = torch.stack([across.expand(size, size), across ^ down]).float() - 0.5
    label = torch.arange(count) % 2
    contrast = 0.8 + 0.2 * torch.rand(count, 1, 1, 1, generator=generator)
    images = contrast * kinds[label][:, None].expand(-1, 3, -1, -1)
    images = images + 0.05 * torch.randn(count, 3, size, size, generator=generator)
    parts = zip(images.split(8), label.split(8))
    return [{"image": image, **({"label": kind} if labels else {})} for image, kind in parts]


def compression(toy, images, clusters=8):
    return perceptual_compression(collect(toy, images, 32), clusters)


class Scrambled(Linear):
    """Latents that know nothing of the image but its contrast."""

    def encode(self, images):
        return type("Encoded", (), {"latents": images * torch.randn(images.shape)})


@needs_lpips
def test_latents_that_keep_looks_together_are_told_from_those_that_do_not():
    good, poor = (compression(Codec(tokenizer), striped()) for tokenizer in (Linear(3.0), Scrambled()))
    names = [f"{kind}-{name}" for name in ("class", "object", "part", "pattern") for kind in ("within", "separation")]
    assert list(good) == list(poor) == names
    for name in ("class", "object", "part", "pattern"):
        assert good[f"within-{name}"].value < poor[f"within-{name}"].value - 0.1
        assert good[f"separation-{name}"].value > poor[f"separation-{name}"].value + 0.1
    assert good["within-class"].value < 0.2
    assert poor["within-class"].value > 0.95
    about = good["within-part"].details
    assert (about["regions"], about["dims"], about["window"]) == (512, 192, [8, 8])
    assert (about["granularity"], about["clusters"], about["images"]) == ("part", 8, 32)
    assert "relu4_3" in about["clustering"]
    assert good["within-class"].details["clustering"] == "labels of the data"


@needs_lpips
def test_without_labels_and_in_one_dimension():
    measured = compression(Codec(Linear(flat=True)), striped(labels=False), 4)
    assert list(measured) == ["within-object", "separation-object"]
    assert "1-D latents" in measured["within-object"].details["note"]


@needs_lpips
def test_what_cannot_be_compressed():
    refused("at least 16 images, but there are only 12", compression, codec(), batches())
    refused("8 x 8; take compression out of", compression, codec(), [{"image": torch.zeros(4, 3, 8, 8)}])
