"""Preflight: every phase and loss term is tried, and what an image costs is counted."""

import pytest

from latelier.preflight import check, try_denoiser, try_tokenizer
from latelier.recipe import build_recipe
from test_codebook import vq_recipe
from tiny import CONV, tiny_recipe

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
