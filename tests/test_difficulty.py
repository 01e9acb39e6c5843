"""How hard a latent space is: latents whose flow loss is known, and what must stay untouched."""

import math

import pytest
import torch

from latelier.analysis import difficulty
from latelier.analysis.difficulty import build_denoiser, choose_patch, diffusion_difficulty, predict, times
from latelier.analysis.sample import collect
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.conv import IdentityTokenizer
from tiny import refused


class Given(torch.nn.Module):
    """Latents are the images; flat makes them 1-D."""

    def __init__(self, flat=False):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(1))
        self.flat, self.config = flat, {"in_channels": 3, "latent_channels": 3, "patch_size": 1}

    def encode(self, images):
        z = images * self.gain
        return type("Encoded", (), {"latents": z.flatten(2) if self.flat else z})


@pytest.fixture
def short(monkeypatch):
    """A training that is as short as it can be and still learns what is asked here."""
    monkeypatch.setattr(difficulty, "STEPS", 60)
    monkeypatch.setattr(difficulty, "WARMUP", 6)
    monkeypatch.setattr(difficulty, "BATCH", 16)


def normal(count, seed=0, size=(4, 2)):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def measure(train, held_out, codec=None, seed=0):
    codec = codec or Codec(Given(), torch.zeros(3), torch.ones(3))
    samples = [collect(codec, [{"image": part} for part in side.split(50)], 10_000) for side in (train, held_out)]
    found = diffusion_difficulty(*samples, codec, seed)
    assert list(found) == ["diffusion-loss", "path-straightness", "path-efficiency"]
    return found["diffusion-loss"]


def test_noise_costs_what_independent_numbers_cost(short, monkeypatch):
    monkeypatch.setattr(difficulty, "STEPS", 30)
    measured = measure(normal(480), normal(100, seed=1))
    t = times()
    bound = (1 / (t**2 + (1 - t) ** 2)).mean().item()  # variance of eps - z, given x_t, where both are normal
    assert measured.value == pytest.approx(bound, rel=0.03)
    assert measured.details["independent"] == pytest.approx(bound, rel=0.03)
    assert measured.details["constant"] == pytest.approx(2, rel=0.05)
    low, high = measured.interval
    assert low < measured.value < high
    assert [at for at, _ in measured.details["by_time"]] == t.tolist()
    assert sum(y for _, y in measured.details["by_time"]) / 8 == pytest.approx(measured.value)


def test_a_single_point_is_easy_and_few_points_are_easier_than_noise(short):
    point, few = normal(1), normal(3)
    easy = measure(point.expand(100, -1, -1, -1), point.expand(32, -1, -1, -1))
    assert easy.details["constant"] == pytest.approx(1, rel=0.05)  # the noise alone; the point is known
    assert easy.details["independent"] == pytest.approx(0, abs=1e-6)
    assert easy.value < 0.5 * easy.details["constant"]
    middle = measure(few[torch.arange(99) % 3], few[torch.arange(32) % 3])
    assert easy.value < middle.value < 0.9 * 1.749  # what noise costs, see above


def test_the_receipt_and_one_dimensional_latents(short, monkeypatch):
    monkeypatch.setattr(difficulty, "STEPS", 2)
    codec = Codec(Given(flat=True), torch.zeros(3), torch.ones(3))
    about = measure(normal(40), normal(30), codec).details
    facts = {key: about[key] for key in ("n", "n_train", "dims", "tokens", "patch", "steps", "batch")}
    assert facts == {"n": 30, "n_train": 32, "dims": 24, "tokens": 8, "patch": 1, "steps": 2, "batch": 16}
    assert about["parameters"] > 500_000
    assert about["latent_scale"] == "the codec's statistics"
    unscaled = measure(5 + 3 * normal(40), 5 + 3 * normal(30, seed=1), Codec(Given())).details
    assert unscaled["latent_scale"] == "measured on the first 40 images"
    assert unscaled["constant"] == pytest.approx(2, rel=0.1)  # held-out latents are put on the same scale


def test_the_same_seed_is_the_same_number_and_nothing_else_is_touched(short, monkeypatch):
    monkeypatch.setattr(difficulty, "STEPS", 3)
    codec, train, held_out = Codec(Given(), torch.zeros(3), torch.ones(3)), normal(40), normal(20, seed=1)
    state = torch.random.get_rng_state()
    with torch.no_grad():  # as the other measures run
        first = measure(train, held_out, codec)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert codec.tokenizer.gain.grad is None
    torch.manual_seed(99)
    assert measure(train, held_out, codec).value == first.value
    assert measure(train, held_out, codec, seed=1).value != first.value


def test_bf16_where_the_codec_has_it(short, monkeypatch):
    monkeypatch.setattr(difficulty, "STEPS", 2)
    seen = []
    monkeypatch.setattr(difficulty, "predict", lambda *a: seen.append(torch.is_autocast_enabled("cpu")) or predict(*a))
    measure(normal(20), normal(10), Codec(Given(), torch.zeros(3), torch.ones(3), precision="bf16"))
    assert all(seen)
    seen.clear()
    measure(normal(20), normal(10))
    assert not any(seen)


def test_an_untrained_denoiser_is_the_best_one_of_independent_numbers():
    model, x = build_denoiser((3, 4, 4), 0), normal(2, size=(4, 4))
    assert torch.allclose(predict(model, x, torch.tensor([0.0, 1.0])), torch.stack([-x[0], x[1]]), atol=1e-6)
    assert predict(model, x, torch.full((2,), 0.5)).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("grid", "patch"), [([8, 8], 1), ([16, 16], 2), ([32, 32], 4), ([128], 2), ([64], 1), ([12, 20], 2), ([13, 17], 1)]
)
def test_at_most_64_tokens_where_a_patch_allows_it(grid, patch):
    assert choose_patch(grid) == patch
    assert math.prod(side // patch for side in grid) <= 64 or grid == [13, 17]


def test_latents_that_do_not_fit_are_left_out(short, monkeypatch):
    monkeypatch.setattr(difficulty, "STEPS", 2)
    monkeypatch.setattr(difficulty, "BYTES", 4 * 24 * 5)
    about = measure(normal(10), normal(7)).details
    assert (about["n_train"], about["n"]) == (5, 5)
    sample = collect(Codec(IdentityTokenizer()), [{"image": normal(4)}], 4)
    refused("there are 0 to learn from and 4", diffusion_difficulty, sample[:0], sample, Codec(IdentityTokenizer()))
