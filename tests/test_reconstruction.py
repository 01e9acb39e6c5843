"""Reconstructions: image metrics against closed forms, a tokenizer whose error is known, and maps of errors."""

import json
import math

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from latelier import run, weights
from latelier.errors import LatelierError
from latelier.evaluation.reconstruction import (
    NARROWEST,
    draw_errors,
    evaluate_reconstruction,
    heat,
    l1,
    ms_ssim,
    pixel_errors,
    psnr,
    ssim,
)
from latelier.evaluation.results import ERRORS
from latelier.images import save_png
from latelier.recipe import Evaluate, build_recipe
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.conv import IdentityTokenizer
from test_one_dimensional import make_codec
from tiny import needs_lpips, refused, tiny_recipe


class Shifted(torch.nn.Module):
    """Latents are the images; decoding adds a constant; samples of the posterior are far from its mean."""

    def __init__(self, shift):
        super().__init__()
        self.shift, self.config = shift, {"in_channels": 3, "latent_channels": 3, "patch_size": 1}

    def encode(self, images):
        moments = torch.cat([images, torch.full_like(images, 5.0)], 1)
        return type("Encoded", (), {"latent_dist": DiagonalGaussianDistribution(moments)})

    def decode(self, latents):
        return type("Decoded", (), {"sample": latents + self.shift})


def batches(count=3, size=16):
    generator = torch.Generator().manual_seed(0)
    return [{"image": torch.rand(4, 3, size, size, generator=generator) - 0.75} for _ in range(count)]


def test_constant_error_is_found_and_receipted():
    evaluate = Evaluate(metrics=["l1", "psnr", "ssim", "gfd"], samples=10)
    codec = Codec(Shifted(20 / 127.5))
    measured = {m.name: m for m in evaluate_reconstruction(codec, batches(), evaluate, "toy/val", {"seed": 7})}
    assert set(measured) == {"l1", "psnr", "ssim"}
    assert measured["l1"].value == pytest.approx(20 / 127.5, abs=1e-3)
    assert measured["psnr"].value == pytest.approx(22.11, abs=0.05)
    assert measured["psnr"].interval[0] <= measured["psnr"].value <= measured["psnr"].interval[1]
    receipt = measured["psnr"].receipt
    assert (receipt["n"], receipt["reference"], receipt["seed"]) == (10, "toy/val", 7)
    assert receipt["tokenizer"] == codec.hash()
    assert "torch" in receipt["versions"]


def test_reconstructions_are_clamped():
    evaluate = Evaluate(metrics=["l1"], samples=4)
    white = [{"image": torch.ones(4, 3, 16, 16)}]
    (measured,) = evaluate_reconstruction(Codec(Shifted(3.0)), white, evaluate, "white")
    assert measured.value == 0
    refused("no images in toy/val", evaluate_reconstruction, Codec(Shifted(0.0)), [], evaluate, "toy/val")


@needs_lpips
def test_perfect_and_worse_tokenizers():
    evaluate = Evaluate(metrics=["lpips", "rfd"], samples=12)
    measured = [evaluate_reconstruction(Codec(Shifted(s)), batches(), evaluate, "toy/val") for s in (0.0, 0.02, 0.3)]
    lpips, rfd = measured[0]
    assert lpips.value == 0
    assert rfd.name == "rfd-vgg16"
    assert rfd.value == pytest.approx(0, abs=1e-6)
    assert 0 < measured[1][1].value < measured[2][1].value
    assert "n = 12 is below the feature dimension 512" in rfd.receipt["warning"]
    assert rfd.receipt["weights_sha256"] == weights.LPIPS_WEIGHTS["vgg"].digest
    assert "8 bit" in rfd.receipt["preprocessing"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class TestPerImage:
    def test_closed_forms(self):
        x = torch.zeros(2, 3, 16, 16)
        y = x.clone()
        y[1] += 20 / 127.5  # 20 levels of 255
        x, y = x + 0.5 / 127.5, y + 0.5 / 127.5  # in the middle of levels, away from rounding ties
        assert l1(x, y).tolist() == pytest.approx([0, 20 / 127.5])
        assert psnr(x, y).tolist() == pytest.approx([100, 20 * math.log10(255 / 20)], abs=1e-4)

    def test_equal_images_are_similar(self):
        x = torch.rand(2, 3, 24, 16, generator=generator()) * 2 - 1
        assert ssim(x, x).tolist() == pytest.approx([1, 1])
        assert ssim(x, -x).max() < 0
        assert ssim(x[:1], x[:1]).shape == (1,)

    def test_images_are_compared_as_saved(self):
        x = torch.rand(1, 3, 16, 16, generator=generator()) * 2 - 1
        below = 0.2 / 127.5
        levels = (x * 127.5 + 127.5).round() / 127.5 - 1
        assert l1(levels, levels + below).item() == 0
        assert l1(torch.full_like(x, 5.0), torch.ones_like(x)).item() == 0

    def test_one_scale_after_the_other(self):
        """Equal images are similar at all scales; noise that coarse scales average away hurts less than in SSIM."""
        x = torch.nn.functional.interpolate(torch.rand(2, 3, 24, 24, generator=generator()), 176, mode="bicubic")
        noisy = x + 0.1 * torch.randn(x.shape, generator=generator(1))
        assert ms_ssim(x, x).tolist() == pytest.approx([1, 1])
        assert (ms_ssim(noisy, x) > ssim(noisy, x) + 0.1).all()
        assert torch.allclose(ms_ssim(noisy, x)[1:], ms_ssim(noisy[1:], x[1:]))
        assert ms_ssim(-x, x).isfinite().all()

    def test_windows_and_scales_need_room(self):
        refused("at least 11 pixels a side, not 8 x 16", ssim, torch.zeros(1, 3, 8, 16), torch.zeros(1, 3, 8, 16))
        with pytest.raises(LatelierError, match="at least 176 pixels a side, not 175 x 200"):
            ms_ssim(torch.zeros(1, 3, 175, 200), torch.zeros(1, 3, 175, 200))


BLACK, WHITE = (0, 0, 4), (252, 255, 164)  # the ends of the scale


class Brighter(IdentityTokenizer):
    """Reconstructions are brighter in the left half."""

    by = 128.0

    def decode(self, z):
        z = z.clone()
        z[..., : z.shape[-1] // 2] += self.by / 127.5
        return super().decode(z)


def draw(codec, images, path):
    draw_errors(codec, [{"image": images}], path)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), np.int64)


def test_errors_are_8_bit_levels_averaged_over_colours():
    images = torch.zeros(1, 3, 2, 2)
    other = images.clone()
    other[:, 0, 0, 0] += 6 / 127.5
    other[:, :, 1, 1] = 9  # clamped
    errors = pixel_errors(other, images)
    assert (errors[0, 0, 0], errors[0, 1, 1]) == (pytest.approx(2), pytest.approx(127))
    assert errors[0, 0, 1] == 0


def test_colours_grow_with_the_error_up_to_a_fixed_end():
    colours = heat(torch.tensor([[0.0, 1.0, 4.0, 16.0, 64.0, 200.0]]))  # (3, 1, 6)
    assert colours.shape == (3, 1, 6)
    brightness = colours.mean(0)[0]
    assert (brightness.diff()[:4] > 0.05).all()
    assert torch.equal(colours[..., 4], colours[..., 5])
    assert ((colours[:, 0, 0] + 1) * 127.5).round().tolist() == list(BLACK)


def test_originals_reconstructions_and_errors_lie_below_each_other(tmp_path):
    pixels = draw(Codec(Brighter()), torch.full((2, 3, 20, 20), -1.0), tmp_path / "a" / ERRORS)
    size, gap = 20, 2
    rows = [pixels[i * (size + gap) : i * (size + gap) + size, :size] for i in range(3)]
    assert (rows[0] == 0).all()
    assert (rows[1][:, :10] == 128).all()
    assert (rows[1][:, 10:] == 0).all()
    assert (rows[2][:, :10] == WHITE).all()  # 128 levels are beyond the end of the scale
    assert (rows[2][:, 10:] == BLACK).all()
    scale = pixels[3 * size + 2 * gap :]
    assert scale.shape[1] == NARROWEST
    for end in (BLACK, WHITE):
        assert (np.abs(scale - end).max(-1) <= 2).any()


def test_small_errors_look_the_same_beside_large_ones(tmp_path):
    """The scale does not hang on what is drawn."""
    images = torch.full((2, 3, 20, 20), -1.0)
    tokenizer = Brighter()
    tokenizer.by = 8.0
    alone = draw(Codec(tokenizer), images, tmp_path / "small.png")[44:64, :20]
    assert (alone[:, :10] == ((heat(torch.tensor([[8.0]]))[:, 0, 0] + 1) * 127.5).round().numpy()).all()


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_images_of_other_channels(tmp_path, channels):
    pixels = draw(Codec(Brighter(channels, channels)), torch.zeros(3, channels, 16, 16), tmp_path / ERRORS)
    assert (pixels[:16, :16] == 128).all()
    assert (pixels[36:52, 8:16] == BLACK).all()


def test_latents_in_a_row_and_at_most_eight_images(tmp_path):
    images = torch.rand(11, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert draw(make_codec(), images, tmp_path / ERRORS).shape[1] == 8 * 34 - 2


def test_no_images(tmp_path):
    for nothing in ([], [{"image": torch.zeros(0, 3, 8, 8)}]):
        refused("no images to draw errors of", draw_errors, Codec(IdentityTokenizer()), nothing, tmp_path / ERRORS)
    assert not (tmp_path / ERRORS).exists()


def test_a_run_measures_its_posterior_and_draws_its_errors(tmp_path):
    folder = tmp_path / "images"
    for i in range(6):
        noise = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(i)) * 2 - 1
        save_png(Image.fromarray(((noise[0].movedim(0, -1) + 1) * 127.5).byte().numpy()), folder / f"{i}.png")
    IdentityTokenizer().save_pretrained(tmp_path / "identity")
    data = {"source": str(folder), "val_source": str(folder), "image_size": 16, "length": None, "flip": False}
    tree = tiny_recipe(tmp_path, denoiser=None).model_dump() | {
        "data": data, "tokenizer": {"kind": "pretrained", "path": str(tmp_path / "identity")},
        "evaluate": {"metrics": ["psnr", "posterior", "equivariance", "codebook"], "samples": 6, "batch": 4},
    }  # fmt: skip
    recipe = build_recipe(tree)
    run.complete(recipe)
    numbers = json.loads((recipe.folder / "metrics.json").read_text())["latent space"]
    assert {"latent-std", "active-channels", "equivariance-shift", "psnr-after-scale"} <= set(numbers)
    assert not {"kl-bits-per-pixel", "codebook-usage"} & set(numbers)  # it has neither a posterior nor codes
    assert numbers["psnr-after-flip"]["value"] == 100
    with Image.open(recipe.folder / ERRORS) as image:
        assert image.width == NARROWEST
