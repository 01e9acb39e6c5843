"""Training a MAETok: auxiliary decoders come and go with their phase, resume exactly, and are never saved with it."""

import pytest
import torch
from safetensors.torch import load_file

from latelier.preflight import try_tokenizer
from latelier.tokenizers import decoder_parts
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.maetok import MAETok
from latelier.training.tokenizer_loop import train_tokenizer
from test_phases import assert_resumes
from test_training import newest
from tiny import MAETOK, tiny_recipe

TUNING = {
    "name": "tuning", "images": 16, "train": "decoder", "targets": [], "checkpoint_every": 8,
    "mask": {"low": 0, "high": 0.6, "mode": 0.6, "fade": 8},
}  # fmt: skip


def recipe_in(folder, **changes):
    """Masked training with HOG, then the decoder alone while the masks fade."""
    section = {**MAETOK, "images": 24, "checkpoint_every": 8, "phases": [TUNING], **changes}
    return tiny_recipe(folder, denoiser=None, data={"image_size": 64}, tokenizer=section)


def weights(folder):
    return load_file(folder / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    recipe = recipe_in(tmp_path_factory.mktemp("whole"))
    train_tokenizer(recipe)
    return recipe


def test_tuning_leaves_the_encoder_bit_equal(trained):
    before, after = weights(trained.folder / "phases" / "tokenizer"), weights(trained.folder / "tokenizer")
    parts = decoder_parts(MAETok.from_pretrained(trained.folder / "tokenizer"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(any(name == part or name.startswith(part + ".") for part in parts) for name in changed)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    old, new = (
        MAETok.from_pretrained(trained.folder / part).eval() for part in ("phases/tokenizer", "tokenizer")
    )  # fmt: skip
    with torch.no_grad():
        assert torch.equal(old.moments(images), new.moments(images))
        assert not torch.equal(old.decode_tokens(old.moments(images)), new.decode_tokens(old.moments(images)))


def test_auxiliary_decoders_learn_and_are_in_checkpoints_of_their_phase_only(trained):
    model, averages = newest(trained.folder, "tokenizer")
    name = "auxiliary.hog.head.weight"
    assert not torch.equal(model[name], averages[name])
    assert model[name].std() > 0
    for part in newest(trained.folder, "tuning"):
        assert not any(name.startswith("auxiliary") for name in part)


def test_only_the_tokenizer_is_saved(trained):
    for folder in (trained.folder / "phases" / "tokenizer", trained.folder / "tokenizer"):
        fresh = MAETok((64, 64), **MAETOK["model"])
        assert weights(folder).keys() == fresh.state_dict().keys()
    assert Codec.from_pretrained(trained.folder / "tokenizer").std.shape == (4,)


@pytest.mark.parametrize(
    ("at", "how"), [(("tokenizer", 8), "kill"), (("tokenizer", 8), "signal"), (("tuning", 8), "kill")]
)
def test_resume_at_any_point(trained, tmp_path, monkeypatch, at, how):
    assert_resumes(trained, recipe_in(tmp_path), monkeypatch, at, how)


def test_accumulation_changes_nothing(trained, tmp_path):
    """One share of masked patches for a step, so means over micro-batches are means over the batch."""
    recipe = recipe_in(tmp_path, micro_batch=2, phases=[])
    train_tokenizer(recipe)
    whole, parts = newest(trained.folder, "tokenizer")[1], newest(recipe.folder, "tokenizer")[1]
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_preflight_tries_every_phase(tmp_path):
    rows = {row.stage: row for row in try_tokenizer(recipe_in(tmp_path))}
    assert (set(rows["tokenizer"].terms), set(rows["tuning"].terms)) == ({"mse", "hog"}, {"mse"})
    assert rows["tuning"].parameters < rows["tokenizer"].parameters
