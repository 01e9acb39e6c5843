"""Tokenizers in tiles."""

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from torch import nn

from latelier.tokenizers import TokenizerInfo
from latelier.tokenizers.codec import Codec, decode_tiled, encode_tiled
from latelier.tokenizers.conv import IdentityTokenizer
from tiny import autoencoder, refused


class Local(ModelMixin, ConfigMixin):
    """f = 2, convolutions only: a latent position feels one beyond its own on either side, and so does a pixel."""

    @register_to_config
    def __init__(self, patch_size: int = 2, in_channels: int = 3, latent_channels: int = 4):
        super().__init__()
        self.down = nn.Conv2d(3, 4, 4, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(4, 3, 4, stride=2, padding=1)

    def encode(self, images):
        return VQEncoderOutput(latents=self.down(images))

    def decode(self, z):
        return DecoderOutput(sample=self.up(z))


@pytest.mark.parametrize("grid", [(8, 8), (9, 23), (17, 4), (3, 40)])
@pytest.mark.parametrize(("tile", "overlap"), [(8, 4), (7, 1), (5, 0), (64, 16)])
def test_pixels_stay_pixels(grid, tile, overlap):
    codec, x = Codec(IdentityTokenizer(), torch.randn(3), torch.rand(3) + 0.5), torch.randn(2, 3, *grid)
    torch.testing.assert_close(decode_tiled(codec, x, tile, overlap), codec.decode(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encode_tiled(codec, x, tile, overlap), codec.encode(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("grid", [(20, 31), (9, 40), (16, 16)])
def test_convolutions_do_not_notice_the_tiles(grid):
    codec = Codec(Local(), torch.randn(4), torch.rand(4) + 0.5)
    z, images = torch.randn(2, 4, *grid), torch.randn(2, 3, 2 * grid[0], 2 * grid[1])
    torch.testing.assert_close(decode_tiled(codec, z, 12, 4), codec.decode(z), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encode_tiled(codec, images, 12, 4), codec.encode(images), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(decode_tiled(codec, z, 12, 0), codec.decode(z), atol=1e-2)  # seams


def test_tiles_are_differentiable():
    codec, z = Codec(Local().requires_grad_(False)), torch.randn(1, 4, 10, 10, requires_grad=True)
    decode_tiled(codec, z, 6, 4).square().sum().backward()
    assert z.grad.abs().min() > 0


def test_no_tile_is_larger_than_allowed(monkeypatch):
    codec, seen = Codec(Local()), []
    decode = codec.decode_raw
    monkeypatch.setattr(codec, "decode_raw", lambda z: seen.append(tuple(z.shape[2:])) or decode(z))
    decode_tiled(codec, torch.randn(1, 4, 5, 50), 8, 2)
    assert (set(seen), len(seen)) == ({(5, 8)}, 8)


@torch.no_grad()
def test_an_autoencoder_with_norms_is_near():
    """Group normalisation sees a tile's statistics, not the image's: near for textures, which are alike all over."""
    codec = Codec(autoencoder(2, norm_num_groups=2, mid_block_add_attention=False))
    z, images = torch.randn(1, 4, 40, 40), torch.rand(1, 3, 80, 80) * 2 - 1
    for tiled, whole in (
        (decode_tiled(codec, z, 24, 16), codec.decode(z)),
        (encode_tiled(codec, images, 24, 16), codec.encode(images)),
    ):
        assert tiled.shape == whole.shape
        assert (tiled - whole).square().mean().sqrt() < 0.2 * whole.std()


def test_what_does_not_fit_is_refused():
    class Row(IdentityTokenizer):
        info = TokenizerInfo(1, 32, latent_tokens=128)

    codec = Codec(Local())
    refused("do not lie on a plane", decode_tiled, codec, torch.randn(1, 3, 32), 8, 2)
    refused("overlap = 4 does not go with tile = 4", decode_tiled, codec, torch.randn(1, 4, 8, 8), 4, 4)
    refused("tile = 0", encode_tiled, codec, torch.randn(1, 3, 8, 8), 0, 0)
    refused("not divisible", encode_tiled, codec, torch.randn(1, 3, 9, 8), 4, 1)
    refused(r"\(32, 128\) do not lie on a plane", encode_tiled, Codec(Row()), torch.randn(1, 3, 8, 8), 4, 1)
