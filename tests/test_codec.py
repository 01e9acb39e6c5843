"""The codec: any tokenizer, one interface."""

import pytest
import torch
from diffusers import AutoencoderKL, VQModel

from latelier.errors import LatelierError
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.conv import PRESETS, ConvSection, IdentityTokenizer, build


@pytest.fixture
def tokenizers():
    small = {"block_out_channels": [8, 8], "down_block_types": ["DownEncoderBlock2D"] * 2, "norm_num_groups": 4}
    small |= {"up_block_types": ["UpDecoderBlock2D"] * 2, "latent_channels": 4}
    return {
        "kl": build(ConvSection(kind="conv", preset="kl-f8c16-tiny", model=small), 3).eval(),
        "vq": VQModel(**small, num_vq_embeddings=16, scaling_factor=1.0).eval(),
        "pixels": IdentityTokenizer(3, 3),
    }


@pytest.mark.parametrize("kind", ["kl", "vq", "pixels"])
def test_round_trip_and_folder(tokenizers, kind, tmp_path):
    plain = Codec(tokenizers[kind])
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    raw = plain.encode(images)
    assert raw.shape[1:] == plain.latent_shape(16, 24)
    codec = Codec(tokenizers[kind], raw.mean((0, 2, 3)), raw.std((0, 2, 3)) + 0.1, {"images": 2})
    z = codec.encode(images)
    torch.testing.assert_close(codec.denormalise(z), raw)
    torch.testing.assert_close(codec.decode(z), plain.decode(raw))
    codec.save_pretrained(tmp_path)
    again = Codec.from_pretrained(tmp_path)
    torch.testing.assert_close(again.encode(images), z)
    assert again.hash() == codec.hash() != plain.hash()
    assert again.receipt == {"images": 2}


def test_opens_in_diffusers(tokenizers, tmp_path):
    Codec(tokenizers["kl"]).save_pretrained(tmp_path)
    images = torch.rand(1, 3, 16, 16)
    theirs = AutoencoderKL.from_pretrained(tmp_path).encode(images).latent_dist.mean
    torch.testing.assert_close(theirs, tokenizers["kl"].encode(images).latent_dist.mean)


def test_sampling_follows_the_posterior(tokenizers):
    codec = Codec(tokenizers["kl"])
    images = torch.rand(1, 3, 16, 16)
    posterior = codec.posterior(images)
    draws = torch.cat([codec.encode(images, torch.Generator().manual_seed(i)) for i in range(200)])
    assert (draws.mean(0) - posterior.mean[0]).abs().max() < 6 * posterior.std.max() / 200**0.5
    assert torch.equal(codec.encode(images), posterior.mean)


def test_prefix_decoding_is_zero_padding(tokenizers):
    codec = Codec(tokenizers["kl"])
    z = torch.randn(1, 4, 8, 8)
    padded = torch.cat([z[:, :2], torch.zeros(1, 2, 8, 8)], 1)
    assert torch.equal(codec.decode(z, channels=2), codec.decode(padded))
    with pytest.raises(LatelierError, match="channels = 5"):
        codec.decode(z, channels=5)


def test_size_that_the_factor_does_not_divide(tokenizers):
    with pytest.raises(LatelierError, match="15 x 16 is not divisible by the tokenizer's factor 2; use 16 x 16"):
        Codec(tokenizers["kl"]).latent_shape(15, 16)


def test_parameter_count_of_the_published_shapes():
    with torch.device("meta"):
        counts = {
            name: sum(p.numel() for p in AutoencoderKL(**PRESETS[name]).parameters())
            for name in ("kl-f8c4", "kl-f8c16")
        }
    assert counts == {"kl-f8c4": 83_653_863, "kl-f8c16": 83_819_683}
