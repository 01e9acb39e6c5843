"""Both loops: resuming is exact, bad numbers never reach the weights, a full disk loses nothing."""

import json
import signal
from functools import partial, partialmethod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from latelier.losses.terms import LossTerms
from latelier.recipe import build_recipe
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.vmae import VMAEObjective
from latelier.training import checkpoint, runtime
from latelier.training.denoiser_loop import train_denoiser
from latelier.training.runtime import Stage
from latelier.training.step import FiniteCheck, learning_rate
from latelier.training.tokenizer_loop import train_tokenizer
from tiny import CONV, refused, tiny_recipe

LOOPS = {"tokenizer": train_tokenizer, "denoiser": train_denoiser}


class Killed(Exception):
    """Stands for a power cut."""


def newest(folder, stage):
    """Everything in the newest checkpoint that decides how training goes on."""
    path = checkpoint.checkpoints(folder, stage)[-1]
    optimizer = torch.load(path / "optimizer.bin", weights_only=True)["state"]
    moments = {f"{i}.{k}": v for i, state in optimizer.items() for k, v in state.items() if torch.is_tensor(v)}
    return {**load_file(path / "model.safetensors"), **moments}, load_file(path / "ema.safetensors")


def assert_same(a, b):
    for one, other in zip(a, b):
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(one[name], other[name]), name


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that was never interrupted."""
    recipe = tiny_recipe(tmp_path_factory.mktemp("whole"))
    train_tokenizer(recipe)
    train_denoiser(recipe)
    return recipe


def train_in_two_parts(recipe, monkeypatch):
    """The tokenizer's training is stopped after 16 images, and goes on."""
    with monkeypatch.context() as patch:
        patch.setattr(Stage, "should_stop", lambda self: self.images == 16)
        with pytest.raises(SystemExit):
            train_tokenizer(recipe)
    train_tokenizer(recipe)


@pytest.mark.parametrize("stage", LOOPS)
@pytest.mark.parametrize("how", ["signal", "kill"])
def test_resume_equals_uninterrupted(trained, tmp_path, monkeypatch, stage, how):
    """After SIGTERM inside the third step, which is finished and saved, and a power cut inside the fourth."""
    recipe = tiny_recipe(tmp_path)
    if stage == "denoiser":
        train_tokenizer(recipe)
    at, kept, end = (16, "24", SystemExit) if how == "signal" else (24, "16", Killed)

    def advance(self, original=Stage.advance):
        if self.images == at:
            if how == "kill":
                raise Killed
            signal.raise_signal(signal.SIGTERM)
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "advance", advance)
        with pytest.raises(end) as stop:
            LOOPS[stage](recipe)
    assert how == "kill" or stop.value.code == 0
    assert checkpoint.checkpoints(recipe.folder, stage)[-1].name.endswith(kept)
    LOOPS[stage](recipe)
    assert_same(newest(trained.folder, stage), newest(recipe.folder, stage))


def test_accumulation_changes_nothing(trained, tmp_path):
    recipe = tiny_recipe(tmp_path, tokenizer={"micro_batch": 2})
    train_tokenizer(recipe)
    whole, parts = (newest(r.folder, "tokenizer")[1] for r in (trained, recipe))
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-4, atol=1e-5)


def test_run_folder(trained):
    folder = trained.folder
    codec = Codec.from_pretrained(folder / "tokenizer")
    assert codec.std.shape == (4,)
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert {"stage", "images", "loss", "mse_visible", "kl", "grad_norm", "lr", "images_per_second"} <= set(rows[0])
    assert [r["images"] for r in rows if r["stage"] == "tokenizer"] == list(range(8, 65, 8))
    assert len(checkpoint.checkpoints(folder, "tokenizer")) == 2
    assert (folder / "previews" / "tokenizer-000000000064.png").is_file()
    assert (folder / "previews" / "denoiser-000000000064.png").is_file()
    assert (folder / "pipeline" / "model_index.json").is_file()


def test_normalised_latents_have_unit_variance(trained):
    from latelier.opening import open_images

    codec = Codec.from_pretrained(trained.folder / "tokenizer")
    posteriors = [codec.posterior(batch["image"]) for batch in open_images(trained).once(16)]
    z = torch.cat([codec.normalise(p.sample(torch.Generator().manual_seed(0))) for p in posteriors])
    assert z.mean((0, 2, 3)).abs().max() < 0.15
    assert (z.std((0, 2, 3)) - 1).abs().max() < 0.15


def test_a_finished_stage_is_not_trained_again(trained):
    before = (trained.folder / "log.jsonl").read_text()
    train_tokenizer(trained)
    train_denoiser(trained)
    assert (trained.folder / "log.jsonl").read_text() == before


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_non_finite_numbers_never_reach_the_weights(tmp_path, monkeypatch, what, deferred):
    """Neither where the check is read at once, nor where it is read a step later and masks the update meanwhile."""
    recipe = tiny_recipe(tmp_path, denoiser=None)
    weights, later = [], []
    check = partialmethod(FiniteCheck.__init__, deferred=deferred)
    monkeypatch.setattr(FiniteCheck, "__init__", check)

    original = VMAEObjective.forward

    def broken(self, batch):
        terms = original(self, batch)
        if batch["sample_id"][0] < 16:
            return terms
        if weights:  # deferred: the next step runs on weights that the bad one has not touched
            later.append(self.tokenizer.to_latent.weight.detach().clone())
            return terms
        weights.append(self.tokenizer.to_latent.weight.detach().clone())
        if what == "loss":
            return LossTerms({**terms.losses, "mse_masked": terms.losses["mse_masked"] * torch.nan}, terms.weights)
        exploding = self.tokenizer.to_latent.weight.sum().abs().add(1e-30).sqrt() * 0  # its gradient is not finite
        exploding = exploding + (self.tokenizer.to_latent.weight * 0).sum().clamp(min=0).sqrt()
        return LossTerms({**terms.losses, "mse_masked": terms.losses["mse_masked"] + exploding}, terms.weights)

    monkeypatch.setattr(VMAEObjective, "forward", broken)
    words = "loss term mse_masked is not finite" if what == "loss" else "gradient of tokenizer.to_latent.weight is not"
    refused(words, train_tokenizer, recipe)
    saved = load_file(checkpoint.checkpoints(recipe.folder, "tokenizer")[-1] / "model.safetensors")
    assert torch.equal(saved["tokenizer.to_latent.weight"], weights[0])
    assert len(later) == deferred
    assert all(torch.equal(weight, weights[0]) for weight in later)
    diagnostic = next((recipe.folder / "diagnostics").glob("*.safetensors"))
    assert load_file(diagnostic)["sample_id"].tolist() == list(range(16, 24))


def test_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path, denoiser=None)
    from accelerate import Accelerator

    original = Accelerator.save_state

    def save_state(self, folder, **kwargs):
        if "-000000000032" in folder:
            raise OSError(28, "No space left on device")
        return original(self, folder, **kwargs)

    monkeypatch.setattr(Accelerator, "save_state", save_state)
    refused(r"No space left on device.*tokenizer-000000000016, stays", train_tokenizer, recipe)
    assert [p.name for p in (recipe.folder / "checkpoints").iterdir()] == ["tokenizer-000000000016"]
    monkeypatch.undo()
    train_tokenizer(recipe)


def test_checkpoint_of_another_architecture_and_uneven_batches(trained, tmp_path):
    recipe = tiny_recipe(tmp_path, denoiser=None)
    train_tokenizer(recipe)

    uneven = tiny_recipe(tmp_path, denoiser=None, tokenizer={"micro_batch": 3, "images": 128})
    refused(r"tokenizer.batch = 8 is not a multiple of micro_batch 3", train_tokenizer, uneven)
    other = tiny_recipe(tmp_path, denoiser=None, tokenizer={"preset": "vmae-f16d32", "images": 128})
    refused("does not fit this recipe", train_tokenizer, other)


def test_learning_rate_in_images():
    rate = partial(learning_rate, total=1000, batch=100, lr=1.0, warmup=200, schedule="cosine", final_lr=0.1)
    wanted = {0: 1 / 3, 100: 2 / 3, 200: 1.0, 600: 0.1 + 0.9 * 0.5, 1000: 0.1}
    assert {n: rate(n) for n in wanted} == pytest.approx(wanted)
    assert rate(200) == 1.0


@pytest.mark.parametrize("kind", ["vmae", "dit", "conv"])
def test_compile_reaches_what_is_run(kind):
    from latelier.denoisers.dit import DiT
    from latelier.tokenizers.conv import ConvSection, build
    from latelier.tokenizers.vmae import VMAE

    model = {
        "vmae": lambda: VMAE((32, 32), **tiny_recipe(Path()).tokenizer.model),
        "dit": lambda: DiT(4, (4, 4), dim=32, depth=2, heads=2),
        "conv": lambda: build(ConvSection(kind="conv", preset="kl-f8c16-tiny"), 3),
    }[kind]()
    names = list(model.state_dict())
    runtime.compile_model(model)
    compiled = [name for name, module in model.named_modules() if module._compiled_call_impl is not None]
    expected = {
        "vmae": ["blocks.0", "decoder_blocks.0"], "dit": ["blocks.0", "blocks.1"], "conv": ["encoder", "decoder"],
    }[kind]  # fmt: skip
    assert compiled == expected
    assert list(model.state_dict()) == names


def test_convolutional_tokenizer_resumes_exactly_and_opens_in_diffusers(tmp_path, monkeypatch):
    from diffusers import AutoencoderKL

    data, denoiser = {"source": "scenes", "length": 40}, {"process": {"kind": "ddpm"}}
    trees = [tiny_recipe(tmp_path / n, data=data, denoiser=denoiser).model_dump() for n in ("whole", "stopped")]
    whole, stopped = (build_recipe({**tree, "tokenizer": CONV}) for tree in trees)
    train_tokenizer(whole)
    train_in_two_parts(stopped, monkeypatch)
    assert_same(newest(whole.folder, "tokenizer"), newest(stopped.folder, "tokenizer"))
    assert AutoencoderKL.from_pretrained(whole.folder / "tokenizer").config["latent_channels"] == 16
    train_denoiser(whole)
    assert (whole.folder / "pipeline" / "model_index.json").is_file()


@pytest.mark.parametrize("kind", ["pretrained", "identity"])
def test_tokenizers_that_are_not_trained(trained, tmp_path, kind):
    section = {"kind": kind} | ({"path": str(trained.folder / "tokenizer")} if kind == "pretrained" else {})
    tree = tiny_recipe(tmp_path, denoiser={"images": 16, "patch": 4}).model_dump()
    recipe = build_recipe({**tree, "tokenizer": section})
    train_tokenizer(recipe)
    train_denoiser(recipe)
    assert Codec.from_pretrained(recipe.folder / "tokenizer").std is not None
