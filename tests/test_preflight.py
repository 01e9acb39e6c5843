"""Preflight: every phase and loss term is tried, and what an image costs is counted."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from latelier.errors import LatelierError
from latelier.opening import held_out_records
from latelier.pipeline import LatentDiffusionPipeline
from latelier.preflight import check, check_sources, try_denoiser, try_tokenizer
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


# -- what the run will read -----------------------------------------------------------------------------------------


def photos(folder, *names, caption="words"):
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 32, 3), 20 * i, np.uint8)).save(path)
        if caption is not None:
            path.with_suffix(".txt").write_text(caption)
    return folder


def recipe_on(tmp_path, kind="class", **data):
    """Of the images in `photos`."""
    return tiny_recipe(
        tmp_path,
        data={"source": str(tmp_path / "photos"), "length": None, "val_fraction": 0.25, **data},
        denoiser={"condition": kind},
    )


def test_every_split_is_opened_and_shown(tmp_path, capsys):
    photos(tmp_path / "photos", *(f"train/{c}/{i}.png" for c in ("[b]", "cat") for i in range(3)), "val/cat/7.png")
    check(recipe_on(tmp_path))
    words = " ".join(capsys.readouterr().err.split())
    assert "Data, training: 6 images of 3 x 32 x 32, 2 classes: [b] 3, cat 3." in words
    assert "Data, held-out: 1 images of 3 x 32 x 32, 2 classes: [b] 0, cat 1." in words


def test_held_out_images_of_other_classes_are_told_before_training(tmp_path):
    photos(tmp_path / "photos", "train/n01/images/1.png", "train/n02/images/2.png", "val/images/3.png")
    with pytest.raises(LatelierError, match=r"class 'images', which the training images do not have.*n01/images"):
        check_sources(recipe_on(tmp_path))
    with pytest.raises(LatelierError, match="no validation split"):
        check_sources(recipe_on(tmp_path, source=str(tmp_path / "photos/train"), val_fraction=0))


def test_conditions_that_the_images_do_not_have_are_told_before_training(tmp_path):
    photos(tmp_path / "photos", "train/a/1.png", "train/a/2.png")
    photos(tmp_path / "photos", "val/a/3.png", caption=None)
    check_sources(recipe_on(tmp_path))
    with pytest.raises(LatelierError, match=r"'text' needs 'caption' of each image, but the held-out images"):
        check_sources(recipe_on(tmp_path, {"kind": "text"}))
    with pytest.raises(LatelierError, match=r"'layout' needs 'boxes' .* the training images"):
        check_sources(recipe_on(tmp_path, {"kind": "layout"}))
    photos(tmp_path / "photos", "val/a/3.png")
    photos(tmp_path / "photos", "val/a/4.png", caption=None)
    with pytest.raises(LatelierError, match=r"1 of 2 images have no caption, the first a/4.png"):
        check_sources(recipe_on(tmp_path, {"kind": "text"}))
    check_sources(recipe_on(tmp_path, {"kind": "text"}, empty_captions=True))


@pytest.mark.parametrize("in_memory", [True, False])
def test_held_out_images_that_cannot_be_read_are_left_out_of_previews(tmp_path, in_memory, monkeypatch):
    monkeypatch.setattr("latelier.opening.components", lambda conditioner: {"prompts": conditioner})
    photos(tmp_path / "photos", "train/a/1.png", *(f"val/a/{i}.png" for i in range(5)))
    for i in (0, 3):
        (tmp_path / f"photos/val/a/{i}.png").write_bytes(b"junk")
    recipe = recipe_on(tmp_path, {"kind": "text"}, max_skipped=0.4, in_memory=in_memory, workers=0)
    records = held_out_records(recipe, Captioned())
    assert records(0, 4)["index"].tolist() == [1, 2]
    assert records(3, 1)["index"].tolist() == [4]
    assert records(3, 4)["index"].tolist() == [4, 1]
    entries = [json.loads(line)["name"] for line in (recipe.folder / "skipped.jsonl").read_text().splitlines()]
    assert sorted(entries) == ["a/0.png", "a/3.png"]
    with pytest.raises(LatelierError, match=r"5 of 5|2 of 5"):
        held_out_records(recipe_on(tmp_path, {"kind": "text"}, max_skipped=0.2, workers=0), Captioned())(0, 4)


class Captioned(LatentDiffusionPipeline):
    """Asks for captions."""

    conditioner = None

    def __init__(self):
        pass
