"""Costs of tokenizers whose operations can be counted by hand, and of the two in LDMAE's table."""

import pytest
import torch
from diffusers import AutoencoderKL

from latelier.errors import LatelierError
from latelier.evaluation.cost import count_cost, measure_cost, without_memory
from latelier.tokenizers import conv, vmae
from latelier.tokenizers.codec import Codec


def on_meta(cls, presets, name):
    with torch.device("meta"):
        return Codec(cls(**presets[name]))


@pytest.fixture(scope="module")
def paper():
    """SD3's autoencoder and VMAE at 256 pixels."""
    models = on_meta(AutoencoderKL, conv.PRESETS, "kl-f8c16"), on_meta(vmae.VMAE, vmae.PRESETS, "vmae-f8d16")
    return [count_cost(codec, 256, 256) for codec in models]


def test_the_papers_rule(paper):
    sd3, ours = paper
    assert sd3.gflop_paper == pytest.approx(17331.3, abs=0.1)
    assert ours.gflop_paper == pytest.approx(701.4, abs=0.1)
    assert 100 * ours.gflop_paper / sd3.gflop_paper == pytest.approx(4.05, abs=0.01)


def test_everything_counted(paper):
    sd3, ours = paper
    assert (sd3.gflop_encode, sd3.gflop_decode) == pytest.approx((272.9, 622.3), abs=0.06)
    assert (ours.gflop_encode, ours.gflop_decode) == pytest.approx((20.6, 20.7), abs=0.06)


def test_sizes(paper):
    sd3, ours = paper
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


def test_half_precision_weights_cost_the_same():
    codec, half = Codec(Halves()), Codec(Halves().to(torch.bfloat16))
    assert count_cost(codec, 8, 8).mib == count_cost(half, 8, 8).mib


def test_the_copy_is_without_memory_and_the_original_stays():
    model = Halves()
    shadow = without_memory(model)
    assert {t.device.type for t in shadow.state_dict().values()} == {"meta"}
    assert {t.device.type for t in model.state_dict().values()} == {"cpu"}


def test_measured():
    codec = Codec(vmae.VMAE(image_size=(16, 16), dim=16, depth=1, heads=2, decoder_dim=16, decoder_depth=1,
                            decoder_heads=2, latent_channels=4))  # fmt: skip
    measured = {m.name: m for m in measure_cost(codec, 16, 16, batch=4, seconds=0.05, extra={"run": "toy"})}
    assert list(measured) == [
        "parameters", "size-mib", "gflop-encode", "gflop-decode", "gflop-paper",
        "encode-images-per-second", "decode-images-per-second", "memory-gb",
    ]  # fmt: skip
    assert all(m.value > 0 and m.receipt["run"] == "toy" for m in measured.values())
    parameters = measured["parameters"]
    assert parameters.receipt["encoder"] + parameters.receipt["decoder"] == parameters.value
    assert measured["encode-images-per-second"].receipt["repetitions"] >= 1
    assert "whole process" in measured["memory-gb"].receipt["peak"]


def test_pixels_cost_nothing():
    cost = count_cost(Codec(conv.IdentityTokenizer()), 16, 16)
    assert (cost.parameters, cost.gflop_encode, cost.gflop_decode) == (0, 0, 0)


def test_size_that_the_factor_does_not_divide():
    with pytest.raises(LatelierError, match="not divisible"):
        count_cost(Codec(Halves()), 7, 8)
