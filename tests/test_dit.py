"""DiT: switches, grids, conditions."""

import pytest
import torch

from latelier.conditioning.condition import ClassConditioner, Condition
from latelier.denoisers import build_denoiser
from latelier.denoisers.dit import SWITCHES, DiT
from latelier.denoisers.objective import DenoiserSection
from latelier.layers import attention, patchify, rms_norm, unpatchify
from tiny import refused

SMALL = {"dim": 32, "depth": 2, "heads": 2}


def randomise(model):
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model.eval()


@pytest.mark.parametrize("kind", SWITCHES)
@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 6, 10), (4, 16)])
def test_every_switch_on_every_grid(kind, shape):
    model = randomise(DiT(4, shape[1:], patch_size=2, **SMALL, **SWITCHES[kind]))
    x, t = torch.randn(2, *shape), torch.tensor([0.2, 0.9])
    assert model(x, t).shape == x.shape
    assert not torch.allclose(model(x, t), model(x, 1 - t))
    fresh = DiT(4, shape[1:], patch_size=2, **SMALL, **SWITCHES[kind])
    assert torch.equal(fresh(x, t), torch.zeros_like(x))


def test_reversed_time():
    model = randomise(DiT(4, (8, 8), **SMALL))
    turned = DiT(4, (8, 8), **SMALL, reversed_time=True).eval()
    turned.load_state_dict(model.state_dict())
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.25, 0.75])
    torch.testing.assert_close(turned(x, t), -model(x, 1 - t))


def test_grid_beyond_training_and_spatial_condition():
    model = randomise(DiT(4, (8, 8), spatial_channels=3, **SMALL))
    x, spatial = torch.randn(1, 4, 16, 12), torch.randn(1, 3, 16, 12)
    t = torch.tensor([0.5])
    out = model(x, t, Condition(spatial=spatial))
    assert out.shape == x.shape
    assert not torch.allclose(out, model(x, t, Condition(spatial=-spatial)))


def test_gradient_checkpointing_changes_nothing():
    model = randomise(DiT(4, (4, 4), **SMALL)).train()
    x, t = torch.randn(2, 4, 4, 4), torch.rand(2)
    model(x, t).square().sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.enable_gradient_checkpointing()
    model(x, t).square().sum().backward()
    for a, b in zip(plain, model.parameters()):
        torch.testing.assert_close(a, b.grad)


def test_attention_forms_agree():
    q, k, v = torch.randn(3, 2, 2, 10, 8).unbind(0)
    fast = attention(q, k, v)
    explicit = attention(q.requires_grad_(), k, v)
    torch.testing.assert_close(fast, explicit)


@pytest.mark.parametrize("shape", [(3, 8, 12), (3, 12)])
def test_patches_invert(shape):
    x = torch.randn(2, *shape)
    tokens = patchify(x, 4)
    last = tokens.unflatten(2, (3, -1)).transpose(2, 3).flatten(2)  # channel first to channel last inside a patch
    assert torch.equal(unpatchify(last, 4, tuple(s // 4 for s in shape[1:])), x)


def test_recipe_and_latents_must_fit():
    recipe = DenoiserSection(size="XS", patch=2, model={"depth": 1})
    assert build_denoiser(recipe, (4, 8, 8)).config["in_channels"] == 4
    refused(r"denoiser.patch = 2 does not divide the latent grid 7 x 8", build_denoiser, recipe, (4, 7, 8))
    refused("allowed: XS", build_denoiser, DenoiserSection(size="M"), (4, 8, 8))


def test_class_conditioner():
    conditioner = ClassConditioner(3, 8, names=["cat", "dog", "owl"])
    both = conditioner({"label": torch.tensor([1, 2])}, drop=torch.tensor([False, True])).vector
    assert torch.equal(both[1], conditioner.null(1).vector[0])
    assert conditioner.inputs(["owl", 0, "1"])["label"].tolist() == [2, 0, 1]
    refused("Unknown class 'cow'; this model knows: cat, dog, owl", conditioner.inputs, ["cow"])
    refused("no null class", ClassConditioner(3, 8, null=False).null, 1)


@pytest.mark.parametrize("shape", [(8,), (2, 1, 8)])
def test_rms_norm_gradient(shape):
    x = torch.randn(3, 5, 2, 4, 8, requires_grad=True)
    weight = torch.rand(shape, requires_grad=True)
    ours = rms_norm(x, weight, 1e-6)
    theirs = torch.nn.functional.rms_norm(x, (8,), eps=1e-6) * weight
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    outer = torch.randn_like(theirs)
    for a, b in zip(torch.autograd.grad(ours, (x, weight), outer), torch.autograd.grad(theirs, (x, weight), outer)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
