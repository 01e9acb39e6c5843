"""The codebook: loss and gradients against the original, codes that are used, codes that are born again."""

import json
import math

import numpy as np
import pytest
import synth
import torch

from latelier.errors import LatelierError
from latelier.losses import codebook as module
from latelier.losses.codebook import CodebookUse, nearest_codes, perplexity, quantise
from latelier.recipe import build_recipe
from latelier.tokenizers import build_objective, build_tokenizer
from latelier.tokenizers.codec import Codec
from latelier.training import checkpoint
from latelier.training.tokenizer_loop import train_tokenizer
from test_goldens import FOLDER
from test_training import assert_same, newest, train_in_two_parts
from tiny import tiny_recipe

VQ = {
    "kind": "conv", "preset": "vq-f4-small", "images": 32, "batch": 8, "perceptual_weight": 0, "precision": "fp32",
    "model": {"block_out_channels": [8, 8, 8], "norm_num_groups": 4, "num_vq_embeddings": 32}, "ema": 0.9, "lr": 1e-3,
    "checkpoint_every": 8, "log_every": 8, "preview_every": 32, "codebook_window": 16,
}  # fmt: skip


def vq_recipe(folder, **changes):
    return build_recipe({**tiny_recipe(folder, denoiser=None).model_dump(), "tokenizer": {**VQ, **changes}})


@pytest.fixture
def objective(tmp_path):
    recipe = vq_recipe(tmp_path)
    return build_objective(recipe.tokenizer, 0, build_tokenizer(recipe.tokenizer, recipe.data))


def batch(seen=0, start=0):
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return {"image": images, "sample_id": torch.arange(start, start + 4), "seen": seen}


@pytest.mark.parametrize("form", ["legacy", "fixed"])
def test_values_gradients_and_indices_are_the_originals(form, monkeypatch):
    monkeypatch.setattr(module, "DISTANCES_AT_ONCE", 64 * 50)  # in three pieces
    pairs, _ = synth.read_key_list(FOLDER / "ldm_vq_loss.keys.json")
    arrays = np.load(FOLDER / "ldm_vq_loss.npz")
    meta = json.loads(bytes(arrays["meta"]))
    codebook = synth.synthetic_state_dict(pairs, 0)["quantize.embedding.weight"].requires_grad_()
    z = (0.7 * torch.from_numpy(synth.normal((2, 4, 8, 8), 150, "vq/z"))).requires_grad_()
    quantised = quantise(z, codebook, 0.25, form)
    (100 * quantised.loss + quantised.z.square().sum()).backward()
    found = {
        f"loss_{form}": quantised.loss[None], f"grad_codebook_{form}": codebook.grad, f"grad_z_{form}": z.grad,
        "quantised": quantised.z,
    }  # fmt: skip
    for name, value in found.items():
        atol = meta["outputs"][name]["suggested_atol"]
        np.testing.assert_allclose(value.detach().numpy(), arrays[name], rtol=1e-4, atol=atol)
    assert np.array_equal(quantised.indices.numpy(), arrays["indices"])


def test_gradients_go_straight_through():
    z, codebook = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(8, 3, requires_grad=True)
    wanted = torch.randn(2, 3, 4, 4)
    (quantise(z, codebook).z * wanted).sum().backward()
    assert torch.equal(z.grad, wanted)
    assert codebook.grad is None


def test_loss_has_its_closed_form():
    codebook, z = torch.tensor([[0.0, 0.0], [10.0, 10.0]]), torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)
    for form in ("legacy", "fixed"):
        quantised = quantise(z, codebook, beta=0.5, form=form)
        assert (quantised.loss.item(), quantised.indices.item()) == (pytest.approx(1.5 * 25 / 2), 0)


def test_nearest_codes_ignore_autocast():
    vectors, codebook = torch.randn(500, 3), torch.randn(300, 3)
    exact = torch.cdist(vectors.double(), codebook.double()).argmin(1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_codes(vectors, codebook), exact)


def test_perplexity_has_its_closed_forms():
    assert perplexity(torch.tensor([4.0, 4.0, 4.0, 4.0])).item() == pytest.approx(4)
    assert perplexity(torch.tensor([0.0, 7.0, 0.0])).item() == pytest.approx(1)
    half = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert perplexity(torch.tensor([3.0, 1.0])).item() == pytest.approx(half)


def test_usage_looks_back_over_a_window():
    use = CodebookUse(4, seed=0)
    for seen, code in enumerate((0, 1, 1, 2)):
        use.count(torch.full((1, 2, 2), code), seen * 8)
    assert (use.share(24, 100).item(), use.share(24, 16).item()) == (0.75, 0.5)
    assert use.share(24, 1).item() == 0.25


def test_terms_of_a_quantised_autoencoder(objective):
    given = batch()
    terms = objective(given)
    assert terms.weights == {"l1": 1.0, "codebook": 1.0}
    tokenizer = objective.tokenizer
    latents = tokenizer.encode(given["image"]).latents
    image = tokenizer.decode(latents)  # diffusers quantises by itself
    l1 = (image.sample - given["image"]).abs().mean()
    torch.testing.assert_close(terms.losses["l1"], l1)
    torch.testing.assert_close(terms.losses["codebook"], image.commit_loss)
    codes = tokenizer.quantize(latents)[2][2].bincount(minlength=32)
    assert terms.losses["codebook_usage"].item() == pytest.approx((codes > 0).float().mean().item())
    assert terms.losses["codebook_perplexity"].item() == pytest.approx(perplexity(codes.float()).item(), rel=1e-5)
    terms.total.backward()
    assert all(p.grad is not None for p in tokenizer.parameters())


def test_restart_takes_latents_of_the_batch_wherever_they_lie():
    codebook, latents = torch.zeros(6, 3), torch.randn(4, 3, 4, 4)
    use = CodebookUse(6, seed=3)
    use.last_used[:3] = torch.tensor([90, 60, 50])
    dead = use.restart(codebook, latents, torch.arange(4), seen=100, after=50)
    assert dead.tolist() == [2, 3, 4, 5]
    assert (codebook[:2] == 0).all()
    vectors = latents.permute(0, 2, 3, 1).reshape(-1, 3).tolist()
    assert all(code in vectors for code in codebook[2:].tolist())
    assert len({tuple(code) for code in codebook[2:].tolist()}) == 4
    again, order = torch.zeros(6, 3), torch.tensor([2, 0, 3, 1])
    use.restart(again, latents[order], order, seen=100, after=50)
    assert torch.equal(again, codebook)  # the order of images, and so of processes, does not matter


def test_restart_revives_dead_codes(tmp_path):
    usage = {}
    for after in (0, 16):
        torch.manual_seed(0)
        recipe = vq_recipe(tmp_path, codebook_restart=after)
        objective = build_objective(recipe.tokenizer, 0, build_tokenizer(recipe.tokenizer, recipe.data))
        objective.tokenizer.quantize.embedding.weight.data[4:] = 100.0  # far from every latent
        for step in range(4):
            terms = objective(batch(seen=8 * step, start=8 * step))
        usage[after] = terms.losses["codebook_usage"].item()
    assert usage[0] <= 4 / 32
    assert usage[16] > 0.9


def test_a_frozen_or_evaluated_codebook_is_left_alone(tmp_path):
    recipe = vq_recipe(tmp_path, codebook_restart=1, train=["encoder"])
    objective = build_objective(recipe.tokenizer, 0, build_tokenizer(recipe.tokenizer, recipe.data))
    weight = objective.tokenizer.quantize.embedding.weight
    before = weight.clone()
    objective(batch(seen=8))
    weight.requires_grad_(True)
    objective.eval()(batch(seen=16))
    assert torch.equal(weight, before)
    objective.train()(batch(seen=24))
    assert not torch.equal(weight, before)


def test_the_decoder_begins_with_the_codes(tmp_path):
    recipe = vq_recipe(tmp_path, train="decoder")
    objective = build_objective(recipe.tokenizer, 0, build_tokenizer(recipe.tokenizer, recipe.data))
    learning = {name.split(".")[0] for name, p in objective.tokenizer.named_parameters() if p.requires_grad}
    assert learning == {"quantize", "decoder", "post_quant_conv"}
    objective(batch()).total.backward()
    assert objective.tokenizer.quantize.embedding.weight.grad.abs().sum() > 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    recipe = vq_recipe(tmp_path_factory.mktemp("whole"), codebook_restart=8)
    train_tokenizer(recipe)
    return recipe


def test_training_resumes_exactly_with_restarts(trained, tmp_path, monkeypatch):
    recipe = vq_recipe(tmp_path, codebook_restart=8)
    train_in_two_parts(recipe, monkeypatch)
    assert_same(newest(trained.folder, "tokenizer"), newest(recipe.folder, "tokenizer"))
    assert "use.last_used" in newest(recipe.folder, "tokenizer")[0]
    logs = [(r.folder / "log.jsonl").read_text().splitlines()[-1] for r in (trained, recipe)]
    whole, parts = (json.loads(log) for log in logs)
    assert whole["codebook_usage"] == parts["codebook_usage"] > 0
    assert whole["codebook_perplexity"] == parts["codebook_perplexity"] >= 1
    assert "kl" not in whole


def test_a_trained_codec_quantises_when_it_decodes(trained):
    codec = Codec.from_pretrained(trained.folder / "tokenizer")
    assert (codec.factor, codec.latent_shape(32, 32), codec.std.shape) == (4, (3, 8, 8), (3,))
    images = batch()["image"]
    posterior = codec.posterior(images)
    assert (posterior.std == 0).all()
    assert posterior.mean.std() > 1e-4
    z = codec.normalise(posterior.mean)
    codes = codec.tokenizer.quantize(posterior.mean)[0]
    with torch.no_grad():
        torch.testing.assert_close(codec.decode(z), codec.decode(codec.normalise(codes)), atol=1e-4, rtol=1e-4)
    assert checkpoint.images_trained(trained.folder, "tokenizer") == 32


def test_methods_and_presets_must_match(tmp_path):
    recipe = vq_recipe(tmp_path, method="vq-reg").tokenizer
    assert (recipe.quantised, recipe.deterministic) == (True, False)
    assert (recipe.adversarial.weight, recipe.codebook_beta, recipe.kl_per_pixel) == (0.75, 0.25, False)
    with pytest.raises(LatelierError, match=r"method = 'kl-reg' is not for preset 'vq-f4-small'; .* begins with kl"):
        vq_recipe(tmp_path, method="kl-reg")
    with pytest.raises(LatelierError, match=r"method = 'vq-reg' is not for preset 'kl-f4'; .* begins with vq"):
        vq_recipe(tmp_path, method="vq-reg", preset="kl-f4", model={})
