"""REPA and iREPA: parity of the losses, which tokens are projected, cached features, resuming, the stop, refusals."""

import json

import numpy as np
import pytest
import synth
import torch
from safetensors.torch import load_file

from latelier.denoisers.align import Alignment, standardise, tapped
from latelier.denoisers.ddt import DDT
from latelier.denoisers.dit import DiT
from latelier.denoisers.objective import DenoisingObjective
from latelier.denoisers.uvit import UViT
from latelier.layers import patchify
from latelier.losses.teachers import open_teacher
from latelier.opening import open_images
from latelier.pipeline import LatentDiffusionPipeline
from latelier.preflight import try_denoiser
from latelier.training.denoiser_loop import encode_latents, train_denoiser
from latelier.training.runtime import Stage
from latelier.training.tokenizer_loop import train_tokenizer
from test_dit import randomise
from test_goldens import FOLDER, Golden
from test_training import assert_same, newest
from tiny import MAETOK, refused, tiny_recipe

SIZES = {"dim": 32, "depth": 2, "heads": 2}


class Pixels:
    """A teacher whose features are means of pixels."""

    name, dim = "pixels", 3

    def __call__(self, images, grid):
        return torch.nn.functional.adaptive_avg_pool2d(images, grid).flatten(2).transpose(1, 2)


def test_golden_of_both_losses():
    golden = Golden.__new__(Golden)  # no model is converted
    golden.arrays = np.load(FOLDER / "repa_loss.npz")
    golden.meta = json.loads(bytes(golden.arrays["meta"]))
    pairs, _ = synth.read_key_list(FOLDER / "repa_loss.keys.json")
    weights = synth.synthetic_state_dict(pairs, golden.meta["weight_seed"])
    assert synth.checksum(weights) == golden.meta["weights_crc32"]
    offset = torch.from_numpy(synth.normal((1, 1, 48), 732, "repa/offset"))
    features = torch.from_numpy(synth.normal((2, 16, 48), 731, "repa/target")) + 2 * offset
    teacher = Pixels()
    teacher.dim = 48
    for name in ("repa", "irepa_0.6", "irepa_1.0"):
        form, _, gamma = name.partition("_")
        align = Alignment(teacher, 32, (4, 4), form, width=64, gamma=float(gamma or 0))
        prefix = "projectors.0." if form == "repa" else "conv."
        align.projector.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
        hidden = torch.from_numpy(synth.normal((2, 16, 32), 730, "repa/hidden")).requires_grad_()
        before = torch.randn(2, 3, 32)  # tokens of a class, time or caption are passed over
        loss = align(torch.cat([before, hidden], 1), features)
        golden.check(name, loss[None])
        golden.check(f"grad_{name}", torch.autograd.grad(loss, hidden)[0])
    golden.check("target_0.6", standardise(features, 0.6))
    assert (align.weight, Alignment(teacher, 32, (4, 4)).weight) == (1.0, 0.5)


@pytest.mark.parametrize("model", [DiT, DDT, UViT])
def test_the_output_of_a_block_is_taken(model):
    wide = {"decoder_dim": 32, "decoder_heads": 2} if model is DDT else {"vector_token": False} if model is UViT else {}
    model = randomise(model(4, (8, 8), 2, **SIZES, **wide))
    x, t, seen = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.9]), []
    with tapped(model, 2) as outputs:
        plain = model(x, t)
    model.blocks[1].register_forward_hook(lambda _, __, output: seen.append(output))
    model.enable_gradient_checkpointing()
    with tapped(model, 2) as again:
        assert torch.equal(model(x, t), plain)
    model(x, t)
    assert len(outputs) == len(again) == 1
    assert torch.equal(outputs[0], seen[0])
    assert torch.equal(outputs[0], again[0])
    assert outputs[0].shape[1] >= patchify(x, 2).shape[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A recipe whose denoiser learns the latents of its own tokenizer, which is trained."""
    folder = tmp_path_factory.mktemp("aligned")

    def recipe(name="tiny", **changes):
        align = {"teacher": str(folder / "tiny"), "depth": 1, "width": 8, **changes}
        return tiny_recipe(folder, name=name, denoiser={"align": align, "model": SIZES})

    train_tokenizer(recipe())
    return recipe


def copied(recipe):
    """The run's trained tokenizer in the folder of another run."""
    recipe.folder.mkdir(exist_ok=True)
    (recipe.folder / "tokenizer").symlink_to(recipe.folder.parent / "tiny" / "tokenizer")
    return recipe


def test_resumed_equals_uninterrupted_and_the_projection_is_not_exported(runs, monkeypatch):
    """REPA, in two processes, is in test_distributed.py."""
    whole, parts = (copied(runs(name, form="irepa", until=40)) for name in ("whole", "parts"))
    train_denoiser(whole)
    with monkeypatch.context() as patch:
        patch.setattr(Stage, "should_stop", lambda self: self.images == 16)
        with pytest.raises(SystemExit):
            train_denoiser(parts)
    train_denoiser(parts)
    assert_same(newest(whole.folder, "denoiser"), newest(parts.folder, "denoiser"))
    assert any(name.startswith("align.projector.") for name in newest(whole.folder, "denoiser")[0])
    exported = load_file(next((whole.folder / "denoiser" / "ema").glob("*.safetensors")))
    assert not any("projector" in name for name in exported)
    LatentDiffusionPipeline.from_pretrained(whole.folder / "pipeline")
    rows = [json.loads(line) for line in (whole.folder / "log.jsonl").read_text().splitlines()]
    aligned = {row["images"]: row["align"] for row in rows if row["stage"] == "denoiser"}
    assert all((value != 0) == (images <= 40) for images, value in aligned.items())
    assert min(aligned.values()) >= -1


def test_features_are_kept_with_the_latents_and_flipped_like_them(runs, monkeypatch):
    cached, live = copied(runs("cached")), copied(runs("live", cache=False))
    latents, images = encode_latents(cached), open_images(cached)
    teacher = open_teacher(str(cached.folder.parent / "tiny"))
    latents.features = lambda: True
    flips = torch.tensor([False, True, True])
    record = latents.gather(torch.tensor([0, 1, 2]), flips)
    batch = next(images.follow([(latents.index[:3], flips.tolist())]))
    torch.testing.assert_close(record["features"], teacher(batch["image"], (4, 4)), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(record["features"], record["mean"].flatten(2).transpose(1, 2), rtol=2e-3, atol=2e-3)
    other = cached.model_copy(update={"denoiser": cached.denoiser.model_copy(update={"patch": 2})})
    refused("stale.*features", encode_latents, other)

    batches = []

    class Enough(Exception):
        """The first batch is there."""

    def keep(self, batch):
        batches.append(batch)
        raise Enough

    monkeypatch.setattr(DenoisingObjective, "forward", keep)
    for recipe in (cached, live):
        with pytest.raises(Enough):
            train_denoiser(recipe)
    assert torch.equal(batches[0]["sample_id"], batches[1]["sample_id"])
    assert "image" not in batches[1]
    torch.testing.assert_close(batches[0]["features"], batches[1]["features"], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("sentence", "changes"),
    [
        ("align.depth = 3, but the denoiser has 2 blocks", {"model": SIZES, "align": {"depth": 3}}),
        ("'nothing' cannot be loaded.*or choose vgg16", {"align": {"depth": 1, "teacher": "nothing"}}),
        ("UNet has no blocks of tokens", {"kind": "unet", "size": "tiny", "model": {}, "align": {}}),
        ("6 1-D latents; leave align out", {"align": {"depth": 1}}),
    ],
)
def test_what_cannot_be_aligned_is_refused_before_training(tmp_path, runs, sentence, changes):
    align = {"teacher": str(runs().folder), **changes.pop("align")}
    other = {"tokenizer": MAETOK, "data": {"image_size": 64}} if "1-D" in sentence else {}
    refused(sentence, next, try_denoiser(tiny_recipe(tmp_path, denoiser={**changes, "align": align}, **other)))


def test_preflight_tries_both_sides_of_the_stop(tmp_path, runs):
    (row,) = try_denoiser(
        tiny_recipe(tmp_path, denoiser={"align": {"teacher": str(runs().folder), "depth": 1, "until": 8}})
    )
    assert row.terms["align"] == 0
