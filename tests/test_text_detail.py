"""Letters after a tokenizer: read without an error from the originals, by chance from nothing."""

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.autoencoders.vq_model import VQEncoderOutput

from latelier.analysis import text
from latelier.analysis.sample import collect
from latelier.tokenizers import TokenizerInfo
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.conv import IdentityTokenizer
from tiny import refused


class Coarse(ModelMixin, ConfigMixin):
    """Means of squares of pixels; all images become one color if `constant`."""

    info = TokenizerInfo(1, 1, 1)

    @register_to_config
    def __init__(self, pixels: int = 1, constant: bool = False):
        super().__init__()
        self.register_buffer("nothing", torch.zeros(1))

    def encode(self, images):
        return VQEncoderOutput(latents=images)

    def decode(self, z):
        pixels = self.config["pixels"]
        small = torch.nn.functional.avg_pool2d(z, pixels, 1, pixels // 2)
        return DecoderOutput(sample=small * 0 + 0.3 if self.config["constant"] else small)


def measure(tokenizer, size=64):
    codec = Codec(tokenizer)
    images = torch.rand(2, codec.image_channels, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return text.readable_text(collect(codec, [{"image": images}], 2), codec)


def test_identity_is_read_like_the_originals():
    found = measure(IdentityTokenizer())
    assert [*found] == ["text", "text@6", "text@8", "text@12", "text@16"]
    for result in found.values():
        assert result.value == result.details["originals"] == 1
        assert result.details["chance"] == 1 / 36
    assert found["text@8"].details["n"] == 4 * 36


def test_a_constant_is_read_by_chance():
    found = measure(Coarse(constant=True))
    assert [found[name].value for name in found] == pytest.approx([1 / 36] * 5)


def test_blur_takes_small_letters_first():
    found = measure(Coarse(5))
    shares = [found[f"text@{height}"].value for height in (6, 8, 12, 16)]
    assert shares[0] < 0.5 < 0.8 < shares[-1] <= 1
    assert found["text"].value == pytest.approx(sum(shares) / 4)
    assert found["text@16"].details["originals"] == 1


def test_ink_may_be_dark_or_light_and_images_may_be_small():
    sheet = text.draw_sheet(8, (64, 64))
    assert sheet.glyphs.bincount().tolist() == [4] * 36
    assert torch.equal(sheet.read(-sheet.images), sheet.glyphs)
    assert text.draw_sheet(16, (24, 24)) is None
    refused("glyphs of 6 pixels fit, not 16 x 16", measure, IdentityTokenizer(), 16)
