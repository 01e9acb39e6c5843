"""Phases of stage 1: hand-over, frozen parts, exact resume at any point, clear refusals."""

import json
import signal

import pytest
import torch
import yaml
from safetensors.torch import load_file

from latelier.recipe import build_recipe, dump
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.vmae import VMAE
from latelier.training import checkpoint
from latelier.training.runtime import Stage
from latelier.training.tokenizer_loop import open_phase, train_tokenizer
from test_training import Killed, assert_same, newest
from tiny import refused, tiny_recipe

TUNING = {
    "name": "tuning", "images": 32, "train": "decoder", "image_size": 48, "mask_ratio": 0, "kl_weight": 0,
    "sample_posterior": False, "lr": 5e-4, "checkpoint_every": 8,
}  # fmt: skip
ENCODER = ("patch_embed", "blocks", "norm", "to_latent")


def staged(folder, **changes):
    """Masked pretraining at 32 px, decoder tuning at 48 px."""
    tokenizer = {"image_size": 32, "images": 32, "phases": [{**TUNING, **changes}]}
    return tiny_recipe(folder, denoiser=None, data={"image_size": 48}, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    recipe = staged(tmp_path_factory.mktemp("whole"))
    train_tokenizer(recipe)
    return recipe


def weights(folder):
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def test_frozen_encoder_stays_bit_equal(trained):
    before, after = weights(trained.folder / "phases" / "tokenizer"), weights(trained.folder / "tokenizer")
    for name in before:
        if name.split(".")[0] in ENCODER:
            assert torch.equal(before[name], after[name]), name
    assert not torch.equal(before["head.weight"], after["head.weight"])
    assert not torch.equal(before["from_latent.weight"], after["from_latent.weight"])
    assert torch.equal(before["mask_token"], after["mask_token"])  # nothing is masked in tuning


def test_released_variant_tunes_everything(tmp_path):
    recipe = staged(tmp_path, train="all")
    train_tokenizer(recipe)
    before, after = weights(recipe.folder / "phases" / "tokenizer"), weights(recipe.folder / "tokenizer")
    assert not torch.equal(before["patch_embed.weight"], after["patch_embed.weight"])


def test_hand_over_keeps_the_function(trained):
    small = VMAE.from_pretrained(trained.folder / "phases" / "tokenizer").eval()
    large = open_phase(trained, 1).eval()
    assert tuple(large.config["image_size"]) == (48, 48)
    assert large.pos_embed.shape[1] == 36
    assert VMAE.from_pretrained(trained.folder / "tokenizer").pos_embed.shape[1] == 36
    for size in (48, 32, 64):
        images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
        with torch.no_grad():
            before, after = small(images).sample, large(images).sample
        # At the new size nothing changes at all; elsewhere tables are interpolated twice.
        tolerance = 1e-6 if size == 48 else 0.1
        assert (before - after).std() < tolerance * before.std()


def test_each_phase_sees_its_own_size_and_new_images(trained):
    rows = [json.loads(line) for line in (trained.folder / "log.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == {"tokenizer", "tuning"}
    tuning = [row for row in rows if row["stage"] == "tuning"]
    assert tuning[-1]["images"] == 32
    assert "mse_masked" not in tuning[-1]
    assert tuning[0]["lr"] != rows[0]["lr"]


def assert_resumes(trained, recipe, monkeypatch, at, how):
    """A recipe of two phases that is stopped, and run again, ends bit for bit where the uninterrupted one did."""
    with monkeypatch.context() as patch:

        def advance(self, original=Stage.advance):
            if (self.name, self.images) == at:
                if how == "kill":
                    raise Killed
                signal.raise_signal(signal.SIGTERM)
            original(self)

        patch.setattr(Stage, "advance", advance)
        with pytest.raises((Killed, SystemExit)):
            train_tokenizer(recipe)
    train_tokenizer(recipe)
    for name in ("tokenizer", "tuning"):
        assert_same(newest(trained.folder, name), newest(recipe.folder, name))
    assert_same([weights(trained.folder / "tokenizer")], [weights(recipe.folder / "tokenizer")])


@pytest.mark.parametrize("at", [("tokenizer", 16), ("tuning", 0), ("tuning", 16)])
@pytest.mark.parametrize("how", ["signal", "kill"])
def test_resume_at_any_point(trained, tmp_path, monkeypatch, at, how):
    assert_resumes(trained, staged(tmp_path), monkeypatch, at, how)


def test_a_later_phase_is_not_built_on_sand(trained):
    longer = trained.model_copy(update={"tokenizer": trained.tokenizer.model_copy(update={"images": 64})})
    refused(r"'tokenizer' is to be trained further, but phase 'tuning'", train_tokenizer, longer)
    assert checkpoint.images_trained(trained.folder, "tokenizer") == 32


def test_phases_inherit_and_survive_the_run_folder(trained):
    section = trained.tokenizer.phase(1)[1]
    assert (section.batch, section.schedule, section.ema) == (8, "cosine", 0.9)
    assert (section.mask_ratio, section.log_every, section.phases) == (0, 8, [])
    assert build_recipe(yaml.safe_load(dump(trained))) == trained


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        ({"images": 8}, "needs a `name` of its own"),
        ({"name": "tokenizer", "images": 8}, "needs a `name` of its own"),
        ({"name": "a"}, "phase 'a' lacks `images`"),
        ({"name": "a", "images": 8, "preset": "vmae-f16d32"}, "phase 'a' cannot change 'preset'"),
        ({"name": "a", "images": 8, "mask_ration": 0}, "did you mean 'mask_ratio'"),
        ({"name": "a", "images": 8, "mask_ratio": 2}, "mask_ratio = 2"),
    ],
)
def test_wrong_phases_are_one_sentence(tmp_path, phase, message):
    refused(message, tiny_recipe, tmp_path, tokenizer={"phases": [phase]})


def test_methods_lie_under_what_is_given(tmp_path):
    recipe = tiny_recipe(tmp_path, tokenizer={"method": "released", "kl_weight": 0.5})
    assert (recipe.tokenizer.mask_ratio, recipe.tokenizer.kl, recipe.tokenizer.kl_weight) == (0.25, "fixed-std", 0.5)
    refused("allowed: paper, released", tiny_recipe, tmp_path, tokenizer={"method": "papper"})
    hed = tiny_recipe(tmp_path, tokenizer={"train": ["hed"]})
    refused(r"no weight belongs to 'hed'; the tokenizer has .*head", train_tokenizer, hed)


@pytest.mark.parametrize(
    "tokenizer",
    [
        {"kl_weight": 0, "sample_posterior": False},
        {"kind": "conv", "preset": "kl-f8c16-tiny", "kl_weight": 0, "model": {"block_out_channels": [32, 32, 32, 32]}},
        {"kind": "conv", "preset": "kl-f8c4", "kl_weight": 0, "model": {"block_out_channels": [32, 32, 32, 32]}},
    ],
    ids=["vmae", "conv", "quantised"],
)
def test_what_is_not_trained_does_not_spread(tmp_path, tokenizer):
    """A deterministic autoencoder's posterior is a point after training, for whoever samples it."""
    base = tiny_recipe(tmp_path, denoiser=None).model_dump()
    if "kind" in tokenizer:
        base["tokenizer"] = {"images": 16, "batch": 8, "perceptual_weight": 0, "weight_decay": 0.1}
    recipe = build_recipe({**base, "tokenizer": {**base["tokenizer"], "images": 16, **tokenizer}})
    codec = Codec.from_pretrained(train_tokenizer(recipe))
    posterior = codec.posterior(torch.rand(2, 3, 32, 32) * 2 - 1)
    assert posterior.std.max() < 1e-6
    assert posterior.mean.std() > 1e-3
    assert codec.std is not None
