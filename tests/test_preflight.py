"""Preflight: every phase and loss term is tried, and what an image costs is counted."""

import pytest
import torch
from diffusers import AutoencoderKL

from latelier.preflight import check, try_denoiser, try_tokenizer
from latelier.recipe import build_recipe
from test_adversarial import CONV
from test_codebook import vq_recipe
from tiny import tiny_recipe

GAME = {"layers": 1, "channels": 8}


def test_every_phase_and_term_is_tried(tmp_path):
    phase = {"name": "sharpening", "images": 32, "train": "decoder", "mask_ratio": 0, "adversarial": GAME}
    recipe = tiny_recipe(tmp_path, tokenizer={"mask_ratio": 0.5, "phases": [phase]})
    rows = {row.stage: row for row in check(recipe)}
    assert list(rows) == ["tokenizer", "sharpening", "denoiser"]
    assert {"mse_visible", "mse_masked", "kl"} <= set(rows["tokenizer"].terms)
    assert {"adversarial", "adaptive_weight", "d_loss", "d_accuracy"} <= set(rows["sharpening"].terms)
    assert set(rows["denoiser"].terms) == {"mse"}
    assert rows["sharpening"].parameters < rows["tokenizer"].parameters  # the encoder is frozen
    assert all(row.seconds_per_image > 0 and row.memory_gb > 0 for row in rows.values())
    assert not recipe.folder.exists()


def test_a_late_discriminator_costs_its_share(tmp_path):
    base = tiny_recipe(tmp_path, denoiser=None).model_dump()

    def price(start):
        game = {**CONV, "images": 4096, "adversarial": {**GAME, "start": start}}
        (row,) = try_tokenizer(build_recipe({**base, "tokenizer": game}), count=True)
        assert "d_loss" in row.terms  # it is tried even if its start lies far ahead
        return row.flops_per_image

    always, half, never = price(0), price(2048), price(1_000_000)
    assert never < half < always
    assert half == pytest.approx((always + never) / 2, rel=1e-6)


def test_codebooks_are_tried_too(tmp_path):
    (row,) = try_tokenizer(vq_recipe(tmp_path), count=True)
    assert "codebook" in " ".join(row.terms)
    assert row.flops_per_image > 0


def test_denoisers_cost_what_their_layers_do(tmp_path):
    (shallow,) = try_denoiser(tiny_recipe(tmp_path), count=True)
    (deep,) = try_denoiser(
        tiny_recipe(tmp_path, denoiser={"model": {"dim": 32, "depth": 2, "heads": 2}}), count=True
    )  # fmt: skip
    assert deep.flops_per_image > 1.5 * shallow.flops_per_image
    assert deep.stage == "denoiser"


def test_a_pretrained_tokenizer_is_normalised_as_in_the_run(tmp_path):
    torch.manual_seed(0)
    tokenizer = AutoencoderKL(block_out_channels=[8], norm_num_groups=4, latent_channels=4, sample_size=32)
    with torch.no_grad():
        tokenizer.quant_conv.weight *= 100  # raw latents far from the scale of the noise
    tokenizer.save_pretrained(tmp_path / "vae")
    section = {"kind": "pretrained", "path": str(tmp_path / "vae")}
    recipe = tiny_recipe(tmp_path, denoiser={"log_every": 8})
    recipe = build_recipe({**recipe.model_dump(), "tokenizer": section})
    (row,) = try_denoiser(recipe)
    assert row.terms["mse"] == pytest.approx(2, abs=0.5)  # noise and latents of variance 1, before anything is learnt
