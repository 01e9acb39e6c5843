"""Enlarging and filling holes: any size in, the same image outside, one sentence for what cannot be done."""

import pytest
import torch

from latelier import run
from latelier.conditioning.layout import read_layout
from latelier.conditioning.spatial import InpaintingConditioner, LowResolutionConditioner
from latelier.denoisers.dit import DiT
from latelier.diffusion.process import Flow
from latelier.errors import LatelierError
from latelier.pipeline import LatentDiffusionPipeline
from latelier.tokenizers.codec import Codec
from tiny import autoencoder, refused


def make(conditioner):

    channels = conditioner.spatial_channels
    denoiser = DiT(3, (4, 4), patch_size=2, dim=16, depth=1, heads=2, spatial_channels=channels).eval()
    torch.nn.init.normal_(denoiser.head.weight, std=0.1)
    return LatentDiffusionPipeline.build(Codec(autoencoder(3, 3)), denoiser, conditioner, Flow(), (16, 16), [])


@pytest.fixture(scope="module")
def enlarger():
    return make(LowResolutionConditioner(4, latent_factor=4))


@pytest.fixture(scope="module")
def filler():
    return make(InpaintingConditioner("train", 3, 3, 0))


def settings(**more):
    return {"steps": 2, "progress": False, "precision": "fp32", **more}


@pytest.mark.parametrize("size", [(4, 4), (5, 7)])
def test_any_size_is_enlarged(enlarger, size):
    small = torch.rand(3, *size) * 2 - 1
    large = run.upscale(enlarger, small, **settings())
    assert large.shape == (3, 4 * size[0], 4 * size[1])
    other = run.upscale(enlarger, -small, **settings())
    assert not torch.allclose(large, other)  # the small image is seen


@pytest.mark.parametrize("size", [(16, 16), (13, 21)])
def test_outside_of_the_mask_nothing_changes(filler, size):
    image = torch.rand(3, *size) * 2 - 1
    mask = torch.zeros(size, dtype=torch.bool)
    mask[3:9, 2:11] = True
    filled = run.inpaint(filler, image, mask, **settings())
    assert torch.equal(filled[:, ~mask], image[:, ~mask])
    assert not torch.allclose(filled[:, mask], image[:, mask])
    hidden = torch.where(mask, 0.3, image)  # what is under the mask is not seen
    assert torch.equal(run.inpaint(filler, hidden, mask, **settings())[:, mask], filled[:, mask])


def test_what_cannot_be_done(enlarger, filler, tmp_path):
    image = torch.zeros(3, 16, 16)
    with pytest.raises(LatelierError, match="not trained to fill holes: it is conditioned on low_resolution"):
        run.inpaint(enlarger, image, torch.ones(16, 16), **settings())
    refused("not trained to enlarge images: it is conditioned on inpainting", run.upscale, filler, image, **settings())
    refused(r"The mask is 8 x 16 .* but the image 16 x 16", run.inpaint, filler, image, torch.ones(8, 16), **settings())
    refused("has no hole", run.inpaint, filler, image, torch.zeros(16, 16), **settings())
    refused("there is no file", run.upscale, enlarger, tmp_path / "nowhere.png", **settings())


def test_layouts_in_words_and_files(tmp_path):
    assert read_layout("red apple 0 0.1 0.5 1; owl 0.5 0 1 1") == [
        ("red apple", 0, 0.1, 0.5, 1), ("owl", 0.5, 0, 1, 1),
    ]  # fmt: skip
    (tmp_path / "layout.json").write_text('[["owl", 0, 0, 1, 1]]')
    assert read_layout(str(tmp_path / "layout.json")) == [["owl", 0, 0, 1, 1]]
    refused("'owl 1 2' is not a class and four numbers", read_layout, "owl 1 2")
