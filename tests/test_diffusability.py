"""Measures of a latent space on laws whose values are known in closed form, and one golden."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import synth
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from PIL import Image

from latelier.analysis import frequency, interpolation, neighbours, smoothness, structure, uniformity, velocity
from latelier.analysis.difficulty import path_shape
from latelier.analysis.sample import LatentSample, Scale, collect
from latelier.report import figures
from latelier.tokenizers import TokenizerInfo
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.conv import IdentityTokenizer
from tiny import colour_extractor

HALF_PI = math.pi / 2


def sample(z, labels=None):
    """A sample whose normalised latents are `z`."""
    scale = Scale(torch.zeros(z.shape[1]), torch.ones(z.shape[1]), "the test's")
    labels = torch.full((len(z),), -1) if labels is None else labels
    return LatentSample(z.float(), None, labels, torch.arange(len(z)), (len(z),), scale, (32, 32))


def gaussian(n, channels, positions, seed=0):
    """`(n, c, s)` with a covariance that is the product of diagonal ones."""
    noise = torch.randn(n, len(channels), len(positions), generator=torch.Generator().manual_seed(seed)).double()
    return noise * torch.tensor(channels).double().sqrt()[:, None] * torch.tensor(positions).double().sqrt()


def test_the_velocity_variance_of_a_matrix_normal():
    z = gaussian(4000, (4.0, 1.0), (1.0, 1.0, 0.25))
    law = velocity.fit(z)
    assert law.per_number == pytest.approx(1.963495, rel=0.02)  # (pi / 2) 3 * 2.5 / 6
    assert velocity.fit(3 * z + 7).per_number == pytest.approx(3 * law.per_number)
    assert float(law.eigenvalues.sum()) == pytest.approx(6 * velocity.variance(z))
    few = velocity.fit(gaussian(8, (4.0,) * 4, (1.0,) * 16)).per_number  # few images: too small, as the note says
    assert 0.75 * 2 * HALF_PI < few < 2 * HALF_PI


def test_viv_within_classes_and_of_all_images():
    labels = torch.arange(2000) % 2
    z = gaussian(2000, (1.0, 1.0), (1.0, 1.0)) * 0.5 + torch.where(labels == 1, 2.0, -2.0)[:, None, None]
    found = velocity.velocity_variance(sample(z, labels))
    inner, free = found["viv"], found["viv-free"]
    assert inner.value == pytest.approx(HALF_PI * 0.5, rel=0.02)
    assert inner.interval[0] < inner.value < inner.interval[1] < free.value
    assert inner.details["shape"] == pytest.approx(1, abs=0.02)
    mixed = velocity.velocity_variance(sample(z, labels[torch.randperm(2000)]))
    assert mixed["viv"].value == pytest.approx(free.value, rel=0.02)  # wrong labels tell nothing
    assert set(velocity.velocity_variance(sample(z))) == {"viv-free"}
    between = found["viv-mixture"].value  # classes far apart are told apart at most times
    assert inner.value < between < free.value
    assert mixed["viv-mixture"].value == pytest.approx(free.value, rel=0.05)


def law(mean, basis, channels, frame, positions):
    """A Gaussian with these eigenvalues."""
    return velocity.Gaussian(mean.double(), torch.tensor(channels), basis, torch.tensor(positions), frame)


@pytest.mark.parametrize(
    ("a", "inner", "expected"), [(1, 0, 1.017602), (1, 0.25, 1.686202), (2, 0.25, 2.770465), (1, 1, 2.215425)]
)
def test_viv_of_a_mixture_in_closed_form(a, inner, expected):
    one = torch.eye(1).double()
    pair = [law(torch.tensor([[centre]]), one, [float(inner)], one, [1.0]) for centre in (-a, a)]
    value, error = velocity.mixture_variance(pair, torch.tensor([5, 5]), 8000, 0)
    assert abs(value - expected) < 3 * error < 0.1 * expected


def test_viv_of_a_mixture_of_rotated_laws():
    basis, frame = (
        torch.linalg.qr(torch.randn(k, k, generator=torch.Generator().manual_seed(k)).double())[0] for k in (2, 3)
    )
    same = [law(torch.ones(2, 3), basis, [4.0, 1.0], frame, [1.0, 1.0, 0.25])] * 3  # classes that do not differ
    value, error = velocity.mixture_variance(same, torch.tensor([1, 2, 3]), 100, 0)
    assert [value, error] == pytest.approx([1.963495, 0], abs=1e-6)
    apart = [one._replace(mean=one.mean * k) for k, one in enumerate(same)]
    wide = [one._replace(mean=3 * one.mean, channels=9 * one.channels) for one in apart]
    values = [velocity.mixture_variance(laws, torch.tensor([1, 2, 3]), 2000, 0)[0] for laws in (apart, wide)]
    assert values[1] == pytest.approx(3 * values[0], rel=0.04)
    assert velocity.affordable(10, 16, 64) == velocity.DRAWS
    assert velocity.affordable(1000, 16, 4096) == 0


def test_neighbours_of_orthogonal_classes_and_of_random_labels():
    labels = torch.arange(120) % 3
    z = torch.eye(3)[labels][:, :, None] + 0.01 * gaussian(120, (1.0,) * 3, (1.0, 1.0))
    found = neighbours.label_neighbours(sample(z, labels))
    assert [found[name].value for name in ("neighbours-10", "neighbours-1")] == [1, 1]
    assert found["neighbours-10"].details["chance"] == pytest.approx(39 / 119)
    alike = neighbours.consistency(torch.ones(3000, 4), torch.arange(3000) % 3, 10)  # all distances are ties
    assert alike.mean() == pytest.approx(999 / 2999, abs=0.02)
    assert neighbours.label_neighbours(sample(z)) == {}


def columns():
    return torch.arange(16).repeat(16)


TOKENS = {  # name: tokens of a 16 x 16 grid, then lds, cds, rmsc, and srss of the left half
    "equal": (torch.ones(256, 2), 0, 0, 0, 0),
    "halves": (torch.eye(2)[(columns() >= 8).long()], 0.551057, 0.049889, 0.707107, 1),
    "checkerboard": (torch.eye(2)[(columns() + torch.arange(256) // 16) % 2], -0.517899, -2 / 42, 0.707107, -0.50735),
    "turning": (
        torch.stack([(math.pi / 30 * columns()).cos(), (math.pi / 30 * columns()).sin()], 1),
        0.252447, 0.015791, 0.460867, 0.373396,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENS)
def test_spatial_structure_in_closed_form(name):
    tokens, *expected = TOKENS[name]
    found = structure.measure(tokens[None], (16, 16), columns()[None] < 8)
    assert [found[key].item() for key in ("lds", "cds", "rmsc", "srss")] == pytest.approx(expected, abs=1e-5)


def test_spatial_structure_of_the_official_code():
    stored = np.load(Path(__file__).parent / "golden" / "spatial_metrics.npz")
    normal = synth.normal
    blocks = normal((3, 4, 1, 4, 1, 8), 741, "spatial/blocks").repeat(4, 2).repeat(4, 4).reshape(3, 256, 8)
    tokens = normal((3, 256, 8), 740, "spatial/tokens") + 2 * blocks
    mask = normal((3, 4, 1, 4, 1), 742, "spatial/mask").repeat(4, 2).repeat(4, 4).reshape(3, 256) > 0
    found = structure.measure(torch.from_numpy(tokens), (16, 16), torch.from_numpy(mask))
    outputs = json.loads(bytes(stored["meta"]))["outputs"]
    for name, values in found.items():
        np.testing.assert_allclose(values.numpy(), stored[name], 1e-4, outputs[name]["suggested_atol"])


def test_structure_of_a_sample():
    found = structure.spatial_structure(sample(TOKENS["halves"][0].T.reshape(1, 2, 16, 16).repeat(3, 1, 1, 1)))
    assert found["structure-lds"].value == pytest.approx(0.551057, abs=1e-5)
    assert structure.spatial_structure(sample(torch.randn(4, 2, 16))) == {}
    assert "structure-srss" not in found


def test_label_maps_tell_objects_from_the_background():
    """Of four images, two have an object in the upper left quarter, one is all object, and one has none."""
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ids = torch.zeros(4, 16, 16, dtype=torch.long)
    ids[:2, :7, :7], ids[2] = 3, 1
    images[:2, :, :8, :8] = torch.tensor([1.0, -1, 0])[:, None, None]
    batches = [
        {"image": x, "segmentation": y, "label": z}
        for x, y, z in zip(images.split(2), ids.split(2), torch.tensor([[0, 0], [1, 1]]))
    ]
    codec = Codec(Pooled())
    found = collect(codec, batches, 4)
    assert found.foreground.shape == (4, 8, 8)
    assert found.foreground.sum((1, 2)).tolist() == [16, 16, 64, 0]  # 7 pixels reach into a fourth position
    srss = structure.spatial_structure(found)["structure-srss"]
    assert srss.details["n"] == 2
    assert srss.value > 0.5
    torch.testing.assert_close(found[1:].foreground, found.foreground[1:])
    features = neighbours._features(found)
    torch.testing.assert_close(features[0], found.z[0].unflatten(1, (8, 8))[:, :4, :4].mean((1, 2)))
    torch.testing.assert_close(features[2:], found.z[2:].mean(2))
    without = collect(codec, [batches[0], {"image": images[2:]}], 4)
    assert without.foreground is None
    assert "structure-srss" not in structure.spatial_structure(without)


class Pooled(ModelMixin, ConfigMixin):
    """Means of 2 x 2 pixels."""

    info = TokenizerInfo(2, 3, 3)

    @register_to_config
    def __init__(self):
        super().__init__()
        self.register_buffer("nothing", torch.zeros(1))

    def encode(self, images):
        return VQEncoderOutput(latents=torch.nn.functional.avg_pool2d(images, 2))

    def decode(self, z):
        return DecoderOutput(sample=z.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize(("side", "quarter", "half"), [(8, 0.84375, 0.4375), (16, 0.859375, 0.46875)])
def test_high_frequencies_of_white_noise(side, quarter, half):
    assert frequency.above((side, side), 0.25).double().mean() == pytest.approx(quarter)
    assert frequency.above((side, side), 0.5).double().mean() == pytest.approx(half)
    noise = torch.randn(400, 2, side, side, generator=torch.Generator().manual_seed(0))
    found = frequency.high_frequencies(sample(noise))["high-frequency"]
    assert found.value == pytest.approx(quarter, abs=0.01)
    assert found.interval[0] < found.value < found.interval[1]
    assert [energy for _, energy in found.details["spectrum"]] == pytest.approx([1] * (2 * side - 1), abs=0.25)
    coarse = noise[:, :, : side // 2, : side // 2].repeat_interleave(2, 2).repeat_interleave(2, 3)
    upsampled = frequency.high_frequencies(sample(coarse))["high-frequency"].value
    assert upsampled < 0.7 * quarter
    if side == 16:
        assert upsampled == pytest.approx(0.529611, abs=0.01)
    assert frequency.high_frequencies(sample(torch.ones(4, 2, side, side)))["high-frequency"].value < 1e-12


def test_spectra_of_latents_that_are_images(tmp_path):
    """Pixels as latents have the spectrum of the images; channels may differ in mean and scale."""
    draws = torch.Generator().manual_seed(0)
    coarse = torch.randn(40, 3, 4, 4, generator=draws).repeat_interleave(2, 2).repeat_interleave(2, 3)
    noisy = coarse + 0.1 * torch.randn(40, 3, 8, 8, generator=draws)
    images = (noisy * torch.tensor([0.1, 0.2, 0.3])[:, None, None] + 0.1).clamp(-1, 1)
    found = frequency.high_frequencies(collect(Codec(IdentityTokenizer()), [{"image": images}], 40))["high-frequency"]
    ours, theirs = (torch.tensor(found.details[name]) for name in ("log_spectrum", "image_log_spectrum"))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    assert ours[:, 0].tolist() == list(range(1, 15))
    first, second, third = (2 * math.cos(math.pi * k / 16) ** 2 for k in range(3))  # of nearest upsampling, an axis
    expected = 10 * math.log10(third / second) * 2 / 3 + 10 * math.log10(second / first) / 3
    assert float(ours[1, 1]) == pytest.approx(expected, abs=0.6)
    figures.draw_spectrum(tmp_path, found.details)
    with Image.open(tmp_path / figures.SPECTRUM) as image:
        assert image.width == 1800  # twice the page


def test_slerp_keeps_the_norm_and_meets_both_ends():
    a, b = torch.tensor([[1.0, 0, 0], [0, 2, 0]]), torch.tensor([[0.0, 1, 0], [0, 2, 0]])
    middle = interpolation.slerp(a, b, 0.5)
    torch.testing.assert_close(middle, torch.tensor([[0.5**0.5, 0.5**0.5, 0], [0, 2, 0]]))
    torch.testing.assert_close(interpolation.slerp(a, b, 0.0), a)
    torch.testing.assert_close(interpolation.slerp(a, b, 1.0), b)
    assert interpolation.nearest(torch.tensor([[1.0, 0], [0, 1], [5, 0.1]])).tolist() == [2, 2, 0]


def test_interpolation_between_equal_images_is_reconstruction(monkeypatch):
    monkeypatch.setattr(smoothness, "load_extractor", lambda name, device: colour_extractor())
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codec = Codec(IdentityTokenizer())

    def distance(images):
        found = interpolation.interpolation(collect(codec, [{"image": images}], 100), codec, ["any"])
        assert list(found) == ["interpolation-colour"]  # LPIPS needs larger images
        return found["interpolation-colour"].value

    assert distance(torch.cat([images, images])) == pytest.approx(0, abs=1e-6)  # each has its equal as neighbour
    assert distance(images) > 1  # levels: means of two images have less spread


def test_evenness_of_densities():
    found = uniformity.evenness(torch.ones(50))
    assert [found["cv"], found["gini"], found["entropy"]] == pytest.approx([0, 0, 1], abs=1e-12)
    found = uniformity.evenness(torch.eye(50)[7])
    assert [found["cv"], found["gini"], found["entropy"]] == pytest.approx([7, 49 / 50, 0])
    two = uniformity.uniformity(sample(torch.randn(60, 2, 4, generator=torch.Generator().manual_seed(0))))
    assert 0 < two["uniformity-gini"].value < 0.5 < two["uniformity-entropy"].value < 1


def test_shapes_of_paths():
    t = torch.linspace(0, 1, 51)[:, None, None].double()
    noise = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0)).double()

    def path(mu, variance):  # of the exact flow of a Gaussian, t = 1 the latent
        found = path_shape(t * mu + ((1 - t).square() + t.square() * variance).sqrt() * noise)
        return [found["straightness"].mean().item(), found["efficiency"].mean().item()]

    assert path_shape(t * noise)["efficiency"].mean().item() == pytest.approx(1)
    assert path(0, 1) == pytest.approx([47 / 49, 0], abs=1e-5)
    assert path(0, 0.25) == pytest.approx([0.959184, 0.825665], abs=1e-3)
    angle = t * HALF_PI
    circle = path_shape(torch.cat([angle.cos(), angle.sin()], 2))
    assert circle["straightness"].item() == pytest.approx(math.cos(HALF_PI / 50))
    assert circle["efficiency"].item() == pytest.approx(0.900316, abs=1e-4)
