"""Which codes are used: counts that are known, for a real VQModel and for tokenizers without codes."""

import pytest
import torch
from diffusers import VQModel

from latelier.analysis.sample import collect
from latelier.analysis.statistics import codebook_usage
from latelier.tokenizers import TokenizerInfo
from latelier.tokenizers.codec import Codec
from test_mixture import batches
from test_mixture import codec as plain


class Pixels(VQModel):
    """Latents are the images: a pixel is nearest to the code of its own value."""

    info = TokenizerInfo(factor=1, latent_channels=3)

    def encode(self, images):
        return type("Encoded", (), {"latents": images})


def tokenizer(kind=VQModel, codes=8):
    torch.manual_seed(0)
    return kind(block_out_channels=(4,), norm_num_groups=2, latent_channels=3, num_vq_embeddings=codes)


def pixels(codes=8):
    model = tokenizer(Pixels, codes)
    model.quantize.embedding.weight.data = torch.arange(codes)[:, None].expand(-1, 3).float()
    return Codec(model)


def make_images(values, count=1):
    """Images of 2 x 2 pixels, whose pixels take these values in turn."""
    values = torch.as_tensor(values).float().repeat(count).view(-1, 1, 2, 2)
    return values.expand(-1, 3, -1, -1)


def measure(codec, images, size=100):
    return codebook_usage(collect(codec, batches(images, size), 5000), codec)


def test_codes_that_are_used_alike():
    found = measure(pixels(), make_images([0, 1, 2, 3], 40))
    assert list(found) == ["codebook-usage", "codebook-perplexity", "dead-codes"]
    assert [m.value for m in found.values()] == pytest.approx([0.5, 4, 4])
    about = found["codebook-perplexity"].details
    assert (about["codes"], about["vectors"]) == (8, 160)
    assert [share for _, share in about["shares_by_rank"]] == [0.25] * 4 + [0] * 4
    assert "warning" not in about


def test_codes_of_unequal_use():
    found = measure(pixels(), make_images([5, 5, 6, 7], 40))
    assert [m.value for m in found.values()] == pytest.approx([3 / 8, 2**1.5, 5])
    assert [m.value for m in measure(pixels(), make_images([5] * 4, 40)).values()] == pytest.approx([1 / 8, 1, 7])


def test_few_vectors_warn_and_batches_change_nothing():
    images = make_images([0, 1, 2, 2, 3, 3, 3, 3])
    found, parts = measure(pixels(64), images), measure(pixels(64), images, 1)
    assert {n: m.value for n, m in found.items()} == {n: m.value for n, m in parts.items()}
    assert found["dead-codes"].details["warning"].startswith("8 latent vectors cannot show all of 64 codes")


def test_the_codes_are_those_that_the_tokenizer_takes():
    model = tokenizer(codes=16).eval()
    model.quantize.embedding.weight.data *= 10  # fresh codes are all nearest to 0
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mean, std = torch.randn(3), torch.rand(3) + 0.5  # normalisation does not count
    found = measure(Codec(model, mean, std), images, 4)
    with torch.no_grad():
        used = model.quantize(model.encode(images).latents)[2][2].unique()
    assert 1 < len(used) < 16
    assert found["codebook-usage"].value == len(used) / 16
    assert found["dead-codes"].value == 16 - len(used)
    assert measure(plain(), torch.zeros(3, 2, 2, 2)) == {}  # no codebook, no numbers
