"""U-ViT: published sizes, its tokens and skips, prefixes of channels, conditions of all kinds."""

import pytest
import torch

from latelier.conditioning.condition import Condition
from latelier.denoisers import build_denoiser
from latelier.denoisers.dit import DiT
from latelier.denoisers.objective import DenoiserSection
from latelier.denoisers.unet import CrossAttentionUNet, UNet, architecture
from latelier.denoisers.uvit import SIZES, UViT
from latelier.errors import LatelierError
from tiny import refused

TINY = {"in_channels": 6, "grid": (4, 4), "dim": 16, "depth": 2, "heads": 2}


def shaken(model):
    """Weights of which none is zero, so that every path counts."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def noisy(channels=6):
    return torch.randn(2, channels, 4, 4), torch.tensor([0.2, 0.7])


@pytest.mark.parametrize(
    ("size", "grid", "channels", "millions"),
    [("S", 16, 32, 44.79), ("H", 16, 32, 500.87), ("2B", 16, 32, 1580.40), ("3B", 8, 128, 3107.7)],
)
def test_sizes_have_the_published_numbers_of_parameters(size, grid, channels, millions):
    with torch.device("meta"):
        model = UViT(in_channels=channels, grid=(grid, grid), **SIZES[size])
    count = sum(p.numel() for p in model.parameters()) + 1001 * SIZES[size]["dim"]  # the original's table of classes
    assert count / 1e6 == pytest.approx(millions, abs=0.06)


@torch.no_grad()
def test_the_skip_joins_the_first_block_with_the_last():
    model = shaken(UViT(**TINY, vector_token=False))
    x, t = noisy()
    before = model(x, t)
    model.out_blocks[0].skip_linear.weight[:, 16:] = 0  # the half that sees the early block
    assert not torch.allclose(before, model(x, t))


@torch.no_grad()
def test_class_and_time_are_tokens():
    model = shaken(UViT(**TINY))
    (x, t), vector = noisy(), torch.randn(2, 16)
    out = model(x, t, Condition(vector=vector))
    assert not torch.allclose(out, model(x, t, Condition(vector=-vector)))
    assert not torch.allclose(out, model(x, 1 - t, Condition(vector=vector)))
    refused("has a token for a condition's vector", model, x, t)


@torch.no_grad()
def test_a_conditions_tokens_join_the_sequence_where_the_mask_is_true():
    model = shaken(UViT(**TINY, vector_token=False, context_dim=5))
    (x, t), tokens = noisy(), torch.randn(2, 3, 5)
    mask = torch.tensor([[True, True, False]] * 2)
    out = model(x, t, Condition(tokens=tokens, mask=mask))
    changed = tokens.clone()
    changed[:, 2] = 9
    torch.testing.assert_close(out, model(x, t, Condition(tokens=changed, mask=mask)))
    torch.testing.assert_close(out, model(x, t, Condition(tokens=tokens[:, :2])))
    assert not torch.allclose(out, model(x, t, Condition(tokens=tokens)))


@torch.no_grad()
def test_other_grids_and_reversed_time():
    model = shaken(UViT(**TINY, vector_token=False))
    x, t = torch.randn(2, 6, 8, 4), torch.tensor([0.2, 0.7])
    assert model(x, t).shape == x.shape
    turned = UViT(**TINY, vector_token=False, reversed_time=True).eval()
    turned.load_state_dict(model.state_dict())
    torch.testing.assert_close(turned(x, 1 - t), -model(x, t), atol=1e-5, rtol=1e-5)


def denoisers():
    unet = architecture((32, 32), (2,), head_width=16, layers=1)
    cross = architecture((32, 32), (2,), head_width=16, layers=1, token_width=8)
    size = {"in_channels": 6, "out_channels": 6, "sample_size": 4}
    yield UViT(**TINY, vector_token=False, prefix_channels=True), None
    yield DiT(**TINY, prefix_channels=True), None
    yield UNet(**unet, **size, prefix_channels=True), None
    yield CrossAttentionUNet(**cross, **size, prefix_channels=True), torch.randn(2, 3, 8)


@torch.no_grad()
def test_a_prefix_is_what_sliced_layers_would_give():
    for model, tokens in denoisers():
        shaken(model)
        x, t = noisy()
        told = Condition(tokens=tokens)
        filled = torch.cat([x[:, :2], torch.zeros_like(x[:, 2:])], 1)
        out = model(x[:, :2], t, told)
        assert out.shape == (2, 2, 4, 4)
        torch.testing.assert_close(out, model(filled, t, told)[:, :2], rtol=0, atol=0)
        refused("7 channels do not fit a denoiser of 6", model, torch.randn(2, 7, 4, 4), t, told)
    for model in (UViT(**TINY, vector_token=False), DiT(**TINY)):
        refused("was not trained on prefixes of the channels; train it with", model, *noisy(2))


@torch.no_grad()
def test_the_input_layer_uses_the_first_columns_and_the_head_the_first_rows():
    model = shaken(UViT(**TINY, vector_token=False, prefix_channels=True))
    narrow = UViT(**{**TINY, "in_channels": 2}, vector_token=False).eval()
    state = model.state_dict()
    state["x_embed.weight"] = state["x_embed.weight"][:, :2]
    state["head.weight"], state["head.bias"] = state["head.weight"][:2], state["head.bias"][:2]
    narrow.load_state_dict(state)
    x, t = noisy(2)
    torch.testing.assert_close(model(x, t), narrow(x, t), rtol=1e-5, atol=1e-5)


def test_recipes_build_it():
    recipe = DenoiserSection(kind="usit", size="XS", model={"dim": 32, "depth": 2}, prefixes={"first": 2, "step": 2})
    model = build_denoiser(recipe, (6, 4, 4), vector=True)
    assert isinstance(model, UViT)
    assert model.config["prefix_channels"]
    assert model.config["time_scale"] == 1
    eps = DenoiserSection(kind="uvit", size="XS", model={"dim": 32}, process={"kind": "ddpm"})
    assert build_denoiser(eps, (6, 4, 4)).config["time_scale"] == 1000
    with pytest.raises(LatelierError, match="depth = 3 of a U-ViT must be even"):
        build_denoiser(DenoiserSection(kind="uvit", size="XS", model={"depth": 3}), (6, 4, 4))
    with pytest.raises(LatelierError, match="patch = 3 does not divide the latent grid 4 x 4"):
        build_denoiser(DenoiserSection(kind="uvit", size="XS", patch=3), (6, 4, 4))
