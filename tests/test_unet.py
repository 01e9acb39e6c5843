"""U-Nets: our call, conditions, diffusers' files, the released sizes."""

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from latelier.conditioning.condition import Condition
from latelier.denoisers import build_denoiser, vector_width
from latelier.denoisers.objective import DenoiserSection
from latelier.denoisers.unet import SIZES, CrossAttentionUNet, UNet
from latelier.errors import LatelierError
from latelier.training.runtime import compile_model
from tiny import refused

LATENT = (3, 8, 8)
X, T = torch.randn(2, *LATENT, generator=torch.manual_seed(1)), torch.tensor([0.021, 0.8])


def section(size="tiny", **more):
    return DenoiserSection(kind="unet", size=size, **more)


def random_unet(token_width=0, spatial_channels=0, vector=False, **model):
    """A `tiny` U-Net without the zeros of a fresh one."""
    recipe = section(model={"block_out_channels": (32, 64, 64), **model})
    model = build_denoiser(recipe, LATENT, token_width, spatial_channels, vector)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model.eval()


@pytest.mark.parametrize("token_width", [0, 24])
@torch.no_grad()
def test_call_is_diffusers_with_timestep_1000_t(token_width, tmp_path):
    model = random_unet(token_width, spatial_channels=2, vector=True)
    tokens = torch.randn(2, 5, 24) if token_width else None
    condition = Condition(vector=torch.randn(2, 128), tokens=tokens, spatial=torch.randn(2, 2, 8, 8))
    ours = model(X, T, condition)
    assert (ours.shape, ours.dtype) == (X.shape, torch.float32)

    model.save_pretrained(tmp_path)
    both = torch.cat([X, condition.spatial], 1)
    if token_width:
        plain = UNet2DConditionModel.from_pretrained(tmp_path)
        theirs = plain(both, torch.tensor([21.0, 800.0]), tokens, condition.vector).sample
    else:
        plain = UNet2DModel.from_pretrained(tmp_path)
        theirs = plain(both, torch.tensor([21.0, 800.0]), condition.vector).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again(X, T, condition), ours)


@torch.no_grad()
def test_every_injection_counts():
    model = random_unet(24, spatial_channels=2, vector=True)
    say = {"vector": torch.randn(2, 128), "tokens": torch.randn(2, 5, 24), "spatial": torch.randn(2, 2, 8, 8)}
    out = model(X, T, Condition(**say))
    for key, value in say.items():
        assert not torch.allclose(model(X, T, Condition(**{**say, key: -value})), out, atol=1e-3), key
    zeros = Condition(**{**say, "vector": torch.zeros(2, 128)})
    assert torch.equal(model(X, T, Condition(**{**say, "vector": None})), model(X, T, zeros))
    assert not torch.allclose(model(X, T.flip(0), Condition(**say)), out, atol=1e-3)


@torch.no_grad()
def test_masked_tokens_do_not_matter():
    model, tokens = random_unet(24), torch.randn(2, 5, 24)
    mask = torch.tensor([[True, True, True, False, False], [True, False, True, True, False]])
    out = model(X, T, Condition(tokens=tokens, mask=mask))
    other = torch.where(mask[..., None], tokens, torch.randn(2, 5, 24))
    torch.testing.assert_close(model(X, T, Condition(tokens=other, mask=mask)), out)
    short = model(X[:1], T[:1], Condition(tokens=tokens[:1, :3]))
    torch.testing.assert_close(short, out[:1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(X, T, Condition(tokens=tokens)), out, atol=1e-3)


@pytest.mark.parametrize("token_width", [0, 24])
def test_fresh_model_predicts_zero_and_learns(token_width):
    model = build_denoiser(section(), LATENT, token_width)
    condition = Condition(tokens=torch.randn(2, 5, 24)) if token_width else None
    with torch.autocast("cpu", torch.bfloat16):
        out = model(X, T, condition)
    assert torch.equal(out, torch.zeros_like(X))
    (out - X).square().mean().backward()
    assert model.conv_out.weight.grad.abs().max() > 0


@pytest.mark.parametrize("token_width", [0, 24])
def test_autocast_and_gradient_checkpointing(token_width):
    model = random_unet(token_width).train()
    tokens = torch.randn(2, 5, 24) if token_width else None
    condition = Condition(tokens=tokens, mask=torch.ones(2, 5, dtype=torch.bool)) if token_width else None
    out = model(X, T, condition)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(X, T, condition)
    assert half.dtype == torch.float32
    assert ((half - out).norm() / out.norm()).item() < 0.05

    out.square().sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.enable_gradient_checkpointing()
    model(X, T, condition).square().sum().backward()
    for a, b in zip(plain, model.parameters()):
        torch.testing.assert_close(a, b.grad)


@pytest.mark.parametrize("token_width", [0, 24])
def test_training_compiles_the_whole(token_width, monkeypatch):
    model, calls = random_unet(token_width), []
    monkeypatch.setattr(type(model), "compile", lambda self: calls.append(self))
    compile_model(model)
    assert calls == [model]


@torch.no_grad()
def test_heads_of_all_widths(tmp_path):
    def build(**heads):
        torch.manual_seed(3)
        model = random_unet(block_out_channels=(32, 64, 96), **heads)
        for m in model.modules():  # sharp attention, or all heads would just average
            if hasattr(m, "to_q"):
                m.group_norm.weight.fill_(8.0)
        return model

    narrow, one = build(attention_head_dim=32), build(attention_head_dim=32, heads=1)
    assert {m.heads for m in narrow.modules() if hasattr(m, "to_q")} == {2, 3}
    assert {m.heads for m in one.modules() if hasattr(m, "to_q")} == {1}
    assert not torch.allclose(narrow(X, T), one(X, T), atol=1e-3)
    one.save_pretrained(tmp_path)
    assert torch.equal(UNet.from_pretrained(tmp_path)(X, T), one(X, T))
    refused("5 heads do not divide the 64 channels", build, heads=5)


@pytest.mark.parametrize(
    ("size", "latent", "tokens", "spatial", "parameters"),
    [
        ("ldm-celebahq", (3, 64, 64), 0, 0, 274_056_163),
        ("ldm-churches", (4, 32, 32), 0, 0, 294_966_916),
        ("ldm-cin256", (4, 32, 32), 512, 0, 394_984_196),
        ("ldm-cin256-v2", (3, 64, 64), 512, 0, 400_920_579),
        ("ldm-text2img256", (3, 64, 64), 640, 0, 403_623_939),
        ("ldm-txt2img-1.4b", (4, 32, 32), 1280, 0, 872_300_484),
        ("ldm-layout", (3, 64, 64), 512, 0, 246_277_379),
        ("ldm-semantic", (3, 64, 64), 0, 3, 215_229_315),
        ("ldm-sr", (3, 64, 64), 0, 3, 113_622_563),
        ("ldm-inpainting-big", (3, 64, 64), 0, 4, 387_245_827),
    ],
)
def test_released_sizes(size, latent, tokens, spatial, parameters):
    with torch.device("meta"):
        model = build_denoiser(section(size), latent, tokens, spatial)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert SIZES[size].get("token_width", 0) == tokens
    heads = {m.heads for m in model.modules() if hasattr(m, "to_q")}
    assert "heads" not in SIZES[size] or heads == {SIZES[size]["heads"]}


def test_tokens_choose_the_class():
    assert type(build_denoiser(section(), LATENT)) is UNet
    assert type(build_denoiser(section(), LATENT, 24)) is CrossAttentionUNet
    refused("cannot have cross-attention", build_denoiser, section("ldm-churches"), (4, 32, 32), 24)


def test_vector_width(tmp_path):
    assert vector_width(section()) == 256
    assert vector_width(section(model={"time_embedding_dim": 80})) == 80
    random_unet(vector=True).save_pretrained(tmp_path)
    assert vector_width(section(init=str(tmp_path))) == 128
    refused("has no U-Net", vector_width, section(init=str(tmp_path / "nothing")))


def test_init_must_fit(tmp_path):
    model = random_unet(24, vector=True)
    model.save_pretrained(tmp_path)
    recipe = section(init=str(tmp_path))
    opened = build_denoiser(recipe, LATENT, 24, vector=True)
    assert torch.equal(opened.conv_in.weight, model.conv_in.weight)
    with pytest.raises(LatelierError, match="has in_channels = 3, but the tokenizer and the condition need 5"):
        build_denoiser(recipe, LATENT, 24, 2, True)
    refused(r"has cross_attention_dim = 24, but .* need 32", build_denoiser, recipe, LATENT, 32, vector=True)
    refused("has cross-attention, but the condition makes no tokens", build_denoiser, recipe, LATENT, vector=True)
    random_unet().save_pretrained(tmp_path / "plain")
    with pytest.raises(LatelierError, match="has no cross-attention, but the condition makes tokens"):
        build_denoiser(section(init=str(tmp_path / "plain")), LATENT, 24)


def test_what_does_not_fit():
    refused("2-D grid, but the tokenizer's are 1-D \(32 positions\)", build_denoiser, section(), (16, 32))
    refused(r"sides that 4 divides, not 9 x 30; the nearest are 8 x 32", build_denoiser, section(), (3, 9, 30))
    with pytest.raises(LatelierError, match=r"denoiser.model makes no U-Net: Must provide the same number"):
        build_denoiser(section(model={"block_out_channels": (32, 64)}), LATENT)
    refused(r"denoiser.model.head'; did you mean 'heads'", build_denoiser, section(model={"head": 2}), LATENT)
    refused(r"allowed: tiny, small, ldm-celebahq", build_denoiser, section("B"), LATENT)


def test_conditions_that_do_not_fit():
    model, crossing = random_unet(), random_unet(24)
    refused("sides that 4 divides, not 6 x 8", model, X[:, :, :6], T)
    refused("takes 3 channels, latents and condition together, not 4", model, X, T, Condition(spatial=X[:, :1]))
    refused("takes no vector", model, X, T, Condition(vector=torch.randn(2, 128)))
    refused("cannot take a condition's tokens", model, X, T, Condition(tokens=torch.randn(2, 5, 24)))
    for condition in (None, Condition(), Condition(tokens=torch.randn(2, 5, 25))):
        refused("must have tokens of width 24", crossing, X, T, condition)


@torch.no_grad()
def test_places_tell_the_first_convolution_where_it_is():
    recipe = DenoiserSection(
        kind="unet", size="tiny", model={"coord_channels": True, "block_out_channels": [32, 32, 32]}
    )
    model = build_denoiser(recipe, (4, 8, 8), spatial_channels=1).eval()
    assert model.config["in_channels"] == 4 + 1 + 12
    seen = []
    model.conv_in.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    model(torch.zeros(2, 4, 8, 8), torch.tensor([0.1, 0.9]), Condition(spatial=torch.zeros(2, 1, 8, 8)))
    place = seen[0][0, 5:].flatten(1)  # (12, 64)
    assert torch.equal(seen[0][0, 5:], seen[0][1, 5:])
    assert torch.pdist(place.T).min() > 0.2  # every position has one of its own
    near, far = (torch.dist(place[:, 0], place[:, i]) for i in (1, 4))
    assert near < far
