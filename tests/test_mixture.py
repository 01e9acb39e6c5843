"""Mixtures of Gaussians on latents whose likelihood is known in closed form."""

import math

import pytest
import torch

from latelier.analysis import sample as sampling
from latelier.analysis.mixture import affordable_modes, fit_mixture, gaussian_mixtures, modes_needed, principal_space
from latelier.analysis.sample import collect, random_share
from latelier.tokenizers.codec import Codec
from tiny import refused

GAUSSIAN = 0.5 * math.log(2 * math.pi * math.e)  # nats in one standard normal number


class Same(torch.nn.Module):
    """Latents are the images; flat makes them 1-D."""

    def __init__(self, flat=False):
        super().__init__()
        self.flat, self.config = flat, {"in_channels": 2, "latent_channels": 2, "patch_size": 1}

    def encode(self, images):
        return type("Encoded", (), {"latents": images.flatten(2) if self.flat else images})


def codec(flat=False):
    return Codec(Same(flat), torch.zeros(2), torch.ones(2))


def noise(n, seed=0):
    """Standard normal images of 2 x 2 x 2 numbers."""
    return torch.randn(n, 2, 2, 2, generator=torch.Generator().manual_seed(seed))


def modal(n, modes=4, sigma=0.2, seed=0):
    """Images around `modes` corners, equally many, that no two images of different modes come near."""
    corners = torch.randn(modes, 2, 2, 2, generator=torch.Generator().manual_seed(99))
    return corners[torch.arange(n) % modes] + sigma * noise(n, seed)


def batches(images, batch=100):
    return [{"image": part} for part in images.split(batch)]


def sample(images, flat=False, batch=100):
    return collect(codec(flat), batches(images, batch), 5000)


def test_one_gaussian_has_its_entropy_at_one_mode_and_needs_no_more():
    found = gaussian_mixtures(sample(noise(2000)), sample(noise(2000, 1)), [1, 2, 5])
    assert list(found) == ["gmm-nll@1", "gmm-nll@2", "gmm-nll@5", "gmm-modes"]
    one = found["gmm-nll@1"]
    assert one.value == pytest.approx(GAUSSIAN, abs=0.02)
    assert one.interval[0] < one.value < one.interval[1]
    assert found["gmm-nll@5"].value >= one.value - 0.01
    assert found["gmm-nll@5"].details["fitted"] < one.details["fitted"]  # where more modes always win
    assert found["gmm-modes"].value == 1
    about = one.details
    assert (about["n"], about["n_fitted"], about["n_axes"]) == (2000, 1000, 1000)
    assert about["dims"] == 8  # 7 of 8 equal directions explain less than 90 %
    assert about["explained_variance"] == pytest.approx(1)
    assert about["per_image"] == pytest.approx(8 * one.value)
    assert "warning" not in about


def test_separate_modes_have_the_entropy_of_the_mixture():
    learnt = modal(800)
    found = gaussian_mixtures(sample(learnt), sample(modal(400, seed=1)), [2, 4, 8])
    four = found["gmm-nll@4"]
    away = random_share(800, 0.5, 0, "gmm-axes")
    other = learnt[~away].flatten(1).numpy()
    space = principal_space(learnt[away].flatten(1).numpy(), other, 0)
    shrink = math.log(0.2) * len(space.axes) + torch.linalg.slogdet(torch.tensor(space.axes @ space.axes.T))[1] / 2
    expected = GAUSSIAN + (math.log(4) + shrink.item()) / len(space.axes)  # of standardised components
    assert four.details["dims"] == len(space.axes) < 4  # four corners span three directions
    assert four.value == pytest.approx(expected, abs=0.08)
    assert found["gmm-nll@2"].value > four.value + 0.2
    assert found["gmm-modes"].value == 4
    assert found["gmm-modes"].interval == (4.0, 4.0)
    curve = found["gmm-modes"].details["curve"]
    assert [k for k, _, _ in curve] == [1, 2, 4, 8]  # one Gaussian is always there to compare with
    assert "gmm-nll@1" not in found


def test_too_many_modes_win_only_where_they_were_fitted():
    x, held_out = noise(300).flatten(1).double().numpy(), noise(300, 1).flatten(1).double().numpy()
    one, many = (fit_mixture(x, held_out, k, 0) for k in (1, 30))
    assert many.fitted < one.fitted - 0.1
    assert many.held_out.mean() > one.held_out.mean() + 0.1


def test_axes_do_not_flatter_the_images_that_chose_them():
    """Of noise in more dimensions than images, one Gaussian finds new images as likely as the fitted ones."""
    x, other, new = (torch.randn(200, 400, generator=torch.Generator().manual_seed(s)).numpy() for s in range(3))
    space = principal_space(x, other, 0)
    assert space(other).std(0) == pytest.approx(1, abs=1e-3)
    assert space.explained == pytest.approx(20 / 400, abs=0.01)  # a tenth as many components as images
    assert fit_mixture(space(other), space(new), 1, 0).held_out.mean().item() == pytest.approx(GAUSSIAN, abs=0.03)


def test_scale_rotation_and_shape_of_latents_change_nothing():
    learnt, held_out = modal(400, sigma=0.3), modal(200, sigma=0.3, seed=1)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(5)))[0]
    plain = gaussian_mixtures(sample(learnt), sample(held_out), [1, 4])
    moved = [(7 * x.flatten(1) @ turn + 3).unflatten(1, (2, 2, 2)) for x in (learnt, held_out)]
    turned = gaussian_mixtures(*(sample(x, flat=True) for x in moved), [1, 4])
    assert [m.value for m in turned.values()] == pytest.approx([m.value for m in plain.values()], rel=1e-3)
    assert turned["gmm-modes"].details["latent_positions"] == 4


def test_without_training_images_a_quarter_is_held_out():
    images = modal(300)
    (first, *_, last), (again, *_) = (
        gaussian_mixtures(None, sample(images, batch=size), [1, 4, 50]).values() for size in (100, 64)
    )
    assert first.value == again.value
    assert (first.details["n"], first.details["n_fitted"], first.details["fitted_to"][:3]) == (75, 112, "75%")
    assert last.value == 4
    assert first.details["skipped"] == "[50] modes: fewer than 10 of 112 images each"
    assert gaussian_mixtures(None, sample(images), [1, 4, 50], seed=1)["gmm-nll@1"].value != first.value


def test_what_components_leave_out_is_said():
    measured, _ = gaussian_mixtures(sample(noise(60)), sample(noise(60, 1)), [1]).values()
    assert measured.details["dims"] == 3  # a tenth of 30 images
    assert "3 components explain only" in measured.details["warning"]


def test_as_many_modes_as_pay():
    single = torch.randn(500, generator=torch.Generator().manual_seed(0))
    flat = torch.stack([single, single - 0.98, single - 1.0, single - 0.9], 1)
    assert modes_needed(flat) == 1  # has 98 % of what is gained
    assert modes_needed(flat[:, [0, 2]]) == 1
    assert modes_needed(flat[:, [0, 3, 2]]) == 2  # 90 % are not enough
    noisy = torch.stack([single, single + torch.randn(500, generator=torch.Generator().manual_seed(1))], 1)
    assert modes_needed(noisy - torch.tensor([0.0, noisy[:, 1].mean() - single.mean() + 0.01])) == 0  # within the error


def test_modes_that_images_carry():
    assert affordable_modes([100, 5, 2], 60) == ([1, 2, 5], [100])
    refused(r"evaluate.modes \[100\] met only 60", affordable_modes, [100], 60)
    few = sample(noise(40))
    refused("there are 40 and 0", gaussian_mixtures, few, few[:0], [1])
    refused("equal, or not finite", gaussian_mixtures, None, sample(torch.ones(80, 2, 2, 2)), [1])


def test_latents_are_collected_on_the_scale_of_the_statistics():
    images = 3 * noise(30) + 5
    parts = [{"image": images[:20], "label": torch.arange(20) % 3 - 1}, {"image": images[20:]}]
    plain = collect(Codec(Same()), parts, 25)
    assert plain.z.shape == (25, 2, 4)
    assert plain.z.mean((0, 2)) == pytest.approx(0, abs=1e-5)
    assert (plain.scale.origin, plain.sizes) == ("measured on the first 25 images", (20, 5))
    assert (plain.labels[20:] == -1).all()
    assert torch.equal(plain.pixels(slice(0, 25)), images[:25])
    labelled = plain[plain.labels >= 0]
    assert labelled.sizes == (13,)
    assert torch.equal(labelled.z, plain.z[plain.labels >= 0])
    own = labelled.on_own_scale()
    assert own.z.mean((0, 2)) == pytest.approx(0, abs=1e-5)
    assert own.flat().shape == (13, 8)
    assert torch.equal(plain.on_scale_of(own)[:13].mean, plain.mean[:13])
    refused("no images", collect, Codec(Same()), [], 5)


def test_images_of_8_bit_are_kept_as_such_and_come_back_as_they_were(monkeypatch):
    levels = torch.randint(0, 256, (12, 2, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = levels.float() / 127.5 - 1
    for in_memory in (sampling.IN_MEMORY, 16):  # and in a temporary file
        monkeypatch.setattr(sampling, "IN_MEMORY", in_memory)
        kept = sample(images, batch=5)
        assert torch.equal(kept.images, levels)
        assert torch.equal(kept.pixels(slice(3, 9)), images[3:9])
        assert torch.equal(kept.mean, images)
    mixed = sample(torch.cat([images, noise(4)]), batch=5)
    assert torch.equal(mixed.pixels(slice(0, 16)), torch.cat([images, noise(4)]))
    assert [(rows.start, rows.stop) for rows in kept.parts(3 * 4, images=7)] == [(0, 3), (3, 5), (5, 7)]


def test_what_is_encoded_already_is_not_encoded_again():
    class Counting(Same):
        seen = 0

        def encode(self, images):
            self.seen += len(images)
            return super().encode(images)

    images = noise(20)
    counting = Codec(Counting())
    every = [{"image": images[rows], "index": rows} for rows in torch.arange(20).split(7)]
    even = collect(counting, [{"image": images[::2], "index": torch.arange(0, 20, 2)}], 10)
    union = collect(counting, every, 20, known=even)
    assert counting.tokenizer.seen == 20
    assert torch.equal(union.mean, collect(Codec(Same()), every, 20).mean)
    assert torch.equal(union.index, torch.arange(20))


def test_whole_latents_are_cut_where_memory_ends(monkeypatch):
    monkeypatch.setattr(sampling, "MOST_NUMBERS", 8 * 25)
    few = sample(noise(40)).first()
    assert len(few) == 25
    assert "more than 25 images of 8 numbers" in few.about()["note"]
    assert torch.equal(few.z, noise(40)[:25].flatten(2))
    assert not sample(noise(25)).first().cut
    assert not sample(noise(40)).first(20).cut


def test_shares_are_drawn_by_number():
    mask = random_share(10, 0.25, 0, "some")
    assert mask.sum() == 3
    assert torch.equal(mask, random_share(10, 0.25, 0, "some"))
    assert not all(torch.equal(mask, random_share(10, 0.25, seed, "some")) for seed in range(1, 4))
