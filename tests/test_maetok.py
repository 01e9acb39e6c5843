"""MAETok: a sequence of latents, positions that turn patches only, masks that hide pixels."""

import math

import pytest
import torch

from latelier.errors import LatelierError
from latelier.keyed_random import KeyedRandom
from latelier.layers import Attention, axial_frequencies, mixed_frequencies, mixed_rope_table, rotate, sincos_positions
from latelier.tokenizers import build_tokenizer, freeze, last_layer
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.maetok import PRESETS, MAETok, MAETokSection, build
from latelier.tokenizers.maetok_decoder import LatentDecoder
from tiny import MAETOK, refused, tiny_recipe

SMALL = {"dim": 32, "depth": 2, "heads": 2, "decoder_dim": 48, "decoder_depth": 2, "decoder_heads": 3}


def awake(model):
    """Random numbers in place of zeros and of small gains, so that every branch is heard."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modulation" in name or "scale" in name:
                parameter.copy_(torch.randn_like(parameter) / 3)
    return model.eval()


def tokenizer(image_size=(32, 32), **arguments):
    return awake(MAETok(image_size, 8, latent_tokens=6, latent_channels=4, **{**SMALL, **arguments}))


# -- positions --------------------------------------------------------------------------------------------------------


def test_mixed_positions_are_complex_factors():
    frequencies, (h, w) = torch.randn(2, 3, 2 * 4), (2, 3)
    table = mixed_rope_table(frequencies, (h, w), heads=2)  # (depth, n, h, k)
    x = torch.randn(1, h * w, 2, 8)  # (b, n, heads, d)
    turned = rotate(x, table[1])
    for n in range(h * w):
        for head in range(2):
            for k in range(4):
                fx, fy = frequencies[:, 1, head * 4 + k].tolist()
                angle = (n % w) * fx + (n // w) * fy
                pair = complex(*x[0, n, head, 2 * k : 2 * k + 2].tolist()) * complex(math.cos(angle), math.sin(angle))
                expected = torch.tensor([pair.real, pair.imag])
                torch.testing.assert_close(turned[0, n, head, 2 * k : 2 * k + 2], expected)


def test_scores_depend_on_offsets_alone():
    table = mixed_rope_table(mixed_frequencies(1, 2, 8), (5, 5), heads=2)[0]
    q, k = (rotate(torch.randn(2, 8).expand(1, 25, 2, 8), table)[0].view(5, 5, 2, 8) for _ in range(2))
    torch.testing.assert_close((q[0, 0] * k[1, 3]).sum(-1), (q[3, 1] * k[4, 4]).sum(-1), rtol=1e-4, atol=1e-5)
    assert not torch.allclose((q[0, 0] * k[1, 3]).sum(-1), (q[0, 0] * k[3, 1]).sum(-1))


def test_only_patches_are_turned():
    table = mixed_rope_table(torch.randn(2, 1, 8), (2, 2), heads=2)[0]
    x = torch.randn(1, 1 + 4 + 3, 2, 2, 8)  # CLS, patches, latents; q and k
    turned = rotate(x, table, first=1)
    assert torch.equal(turned[:, :1], x[:, :1])
    assert torch.equal(turned[:, 5:], x[:, 5:])
    torch.testing.assert_close(turned[:, 1:5], rotate(x[:, 1:5].contiguous(), table))
    attention = Attention(16, 2)
    alone = attention(x.flatten(2)[..., :16], torch.ones_like(table), 1)
    torch.testing.assert_close(alone, attention(x.flatten(2)[..., :16]))


def test_where_frequencies_begin():
    frequencies = mixed_frequencies(2, 3, 8).view(2, 2, 3, 2, 2)  # (axis, depth, head, along and across, magnitude)
    length = frequencies.square().sum(0).sqrt()
    torch.testing.assert_close(length, torch.tensor([1.0, 10**-0.5]).expand_as(length))
    along, across = frequencies.unbind(3)
    torch.testing.assert_close((along * across).sum(0), torch.zeros(2, 3, 2), atol=1e-6, rtol=0)
    assert along[0, ..., 0].flatten().unique().numel() == 6  # each head has its own direction
    fixed = axial_frequencies(1, 1, 8)[:, 0]
    torch.testing.assert_close(fixed, torch.tensor([[1.0, 0.1, 0.0, 0.0], [0.0, 0.0, 1.0, 0.1]]))


@pytest.mark.parametrize("positions", ["mixed", "axial", "absolute"])
def test_kinds_of_positions(positions, tmp_path):
    model, images = tokenizer(positions=positions, decoder_cls_token=True), torch.rand(1, 3, 32, 32)
    assert ("freqs" in dict(model.named_parameters())) == (positions == "mixed")
    assert (model.decoder.pos_embed is not None) == (positions == "absolute")
    z = torch.randn(1, 6, 4)
    features = model.decoder(z)[0]
    assert (features[1:] - features[:1]).abs().amax(1).min() > 1e-3  # patches know where they are
    model.decode_tokens(z).square().mean().backward()
    assert positions != "mixed" or model.decoder.freqs.grad.abs().max() > 0
    Codec(model).save_pretrained(tmp_path)
    again = Codec.from_pretrained(tmp_path)
    assert again.hash() == Codec(model).hash()
    assert torch.equal(again.encode(images), Codec(model).encode(images))


def test_positions_and_masks_that_cannot_be():
    refused("positions = 'sine' is not known; allowed: mixed, axial, absolute", tokenizer, positions="sine")
    refused("width is a multiple of 4, but 36 / 6 is 6", tokenizer, dim=36, heads=6)
    refused("32 is not divisible by 5 heads", tokenizer, heads=5)
    mask = torch.ones(1, 20, dtype=torch.bool)
    message = r"mask of \(1, 20\) does not fit 1 images of 16 patches"
    refused(message, tokenizer().moments, torch.rand(1, 3, 32, 32), mask)


# -- masks ------------------------------------------------------------------------------------------------------------


def test_masked_patches_do_not_reach_the_latents():
    model, images, mask = tokenizer(), torch.rand(2, 3, 32, 32), torch.rand(2, 16) < 0.5
    hidden = mask.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    other = torch.where(hidden, torch.rand_like(images), images)
    assert torch.equal(model.moments(images, mask), model.moments(other, mask))
    assert not torch.allclose(model.moments(images), model.moments(other))
    assert torch.equal(model.moments(images, torch.zeros(2, 16, dtype=torch.bool)), model.moments(images))
    assert torch.equal(model.encode(images, mask).latent, model.moments(images, mask).transpose(1, 2))
    model.moments(images, mask).sum().backward()
    assert model.mask_token.grad.abs().max() > 0


# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("latents", "channels"), [(1, 7), (20, 2)])
def test_latents_are_free(latents, channels):
    model = MAETok((32, 48), 8, latent_tokens=latents, latent_channels=channels, **SMALL).eval()
    codec, images = Codec(model), torch.rand(2, 3, 32, 48)
    z = codec.encode(images)
    assert z.shape[1:] == codec.latent_shape(32, 48) == (channels, latents)
    assert codec.decode(z).shape == images.shape
    wrong = (latents + 1, channels)
    with pytest.raises(LatelierError, match=rf"takes {latents} latents of {channels} channels, not {latents + 1} of"):
        model.decode_tokens(torch.zeros(1, *wrong))


@pytest.mark.parametrize("positions", ["mixed", "axial", "absolute"])
@pytest.mark.parametrize("cls", [True, False])
@torch.no_grad()
def test_resized_computes_the_same(positions, cls):
    model = tokenizer(positions=positions, decoder_cls_token=cls)
    other = model.resized((48, 24)).eval()
    images, z = torch.rand(1, 3, 48, 24), torch.randn(1, 6, 4)
    assert torch.equal(other.moments(images), model.moments(images))
    assert torch.equal(other.decode_tokens(z), model.decode_tokens(z, (6, 3)))
    assert torch.equal(other(images).sample, model(images).sample)
    assert other(images).sample.shape == images.shape
    assert other.config["image_size"] == (48, 24)


def test_other_sizes_are_refused_by_the_codec():
    model = tokenizer()
    with pytest.raises(
        LatelierError, match=r"decodes to 32 x 32 pixels, .* here 32 x 64; .* tokenizer.resized\(\(32, 64\)"
    ):
        Codec(model).encode(torch.rand(1, 3, 32, 64))
    refused("decodes to 32 x 32 pixels", Codec(model).latent_shape, 64, 64)
    assert Codec(model.resized((32, 64))).encode(torch.rand(1, 3, 32, 64)).shape == (1, 4, 6)


# -- the decoder ------------------------------------------------------------------------------------------------------


def test_latents_are_modulated_and_silent_at_first():
    decoder, z = LatentDecoder(6, 4, (4, 4), 32, 2, 2).eval(), torch.randn(2, 6, 4)
    assert torch.equal(decoder(z)[0], decoder(z)[1])  # normed latents are multiplied by zero, so nothing is heard
    decoder(z).sum().backward()
    assert decoder.blocks[0].modulation.weight.grad.abs().max() > 0  # but it will be
    awake(decoder)
    assert (decoder(z)[0] - decoder(z)[1]).abs().max() > 1e-2


def test_latents_may_speak_from_the_start():
    torch.manual_seed(0)
    for scale, silent in ((0.0, True), (1.0, False)):
        model = MAETok((32, 32), 8, latent_tokens=6, latent_channels=4, latent_scale=scale, **SMALL).eval()
        z = torch.randn(2, *model.info.latent_shape(32, 32))
        assert torch.allclose(model.decode(z).sample[0], model.decode(z).sample[1]) == silent


def test_learned_positions_begin_as_sinusoids():
    model = MAETok((32, 32), 8, latent_tokens=6, latent_channels=4, positions="absolute", **SMALL)
    for table in (model.pos_embed, model.decoder.pos_embed):
        patches = table[:, -model.grid[0] * model.grid[1] :]
        torch.testing.assert_close(patches.detach(), sincos_positions(table.shape[2], model.grid))


def test_stochastic_depth_is_addressed():
    model = tokenizer(decoder_drop_path=0.9).train()
    z, draws = torch.randn(8, 6, 4), KeyedRandom(0, torch.arange(8))
    whole, without = model.decode_tokens(z, rng=draws), model.decode_tokens(z)
    assert torch.equal(model.eval().decode_tokens(z, rng=draws), without)
    changed = (whole - without).abs().amax((1, 2, 3)) > 1e-4
    assert changed.all()  # a branch that stays is ten times as loud
    half = model.train().decode_tokens(z[4:], rng=KeyedRandom(0, torch.arange(4, 8)))
    torch.testing.assert_close(half, whole[4:])


def test_stochastic_depth_keeps_the_mean():
    decoder = LatentDecoder(2, 4, (2, 2), 8, 3, 1, drop_path=0.5).train()
    kept = torch.stack(decoder._kept(KeyedRandom(0, torch.arange(4000))))[..., 0, 0]  # (depth, 2, b)
    assert torch.equal(kept[0], torch.ones(2, 4000))  # the first block is never left out
    assert kept[1].unique().tolist() == pytest.approx([0, 4 / 3])
    assert kept[2].unique().tolist() == [0, 2]
    torch.testing.assert_close(kept.mean(2), torch.ones(3, 2), atol=0.06, rtol=0)


def test_gradient_checkpointing_changes_nothing():
    model, images = tokenizer(decoder_drop_path=0.3).train(), torch.rand(2, 3, 32, 32)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        model.decode_tokens(model.moments(images), rng=KeyedRandom(0, torch.arange(2))).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert model.decoder.gradient_checkpointing
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


# -- forms, recipes, folders ------------------------------------------------------------------------------------------


def test_plain_and_variational():
    images = torch.rand(2, 3, 32, 32)
    plain, spread = Codec(tokenizer()), Codec(tokenizer(variational=True))
    assert plain.posterior(images).std.max() == 0
    assert spread.tokenizer.moments(images).shape == (2, 6, 8)
    posterior = spread.posterior(images)
    assert posterior.mean.shape == posterior.std.shape == (2, 4, 6)
    mean, logvar = spread.tokenizer.moments(images).transpose(1, 2).chunk(2, 1)
    torch.testing.assert_close(posterior.mean, mean)
    torch.testing.assert_close(posterior.std, (0.5 * logvar).exp())
    assert not torch.equal(spread.encode(images, torch.Generator().manual_seed(0)), spread.encode(images))
    torch.testing.assert_close(spread.tokenizer(images).sample, spread.decode(posterior.mean))


def test_bf16_rounds_only():
    model, images = tokenizer(), torch.rand(2, 3, 32, 32)
    z = Codec(model).encode(images)
    rounded = Codec(model, precision="fp32")
    with torch.autocast("cpu", torch.bfloat16):
        close = rounded.encode(images), rounded.decode(z)
    assert (close[0] - z).abs().max() < 0.1 * z.abs().max()
    assert (close[1] - Codec(model).decode(z)).abs().max() < 0.2


def test_the_papers_size():
    with torch.device("meta"):
        model = MAETok(**PRESETS["maetok-b-128"])
    inert = 257 * 768 + (768 * 768 + 768) + 33 * 2 * 768  # unused by the original's decoder: positions, patches, norm
    count = sum(p.numel() for p in model.parameters())
    decoder = sum(p.numel() for n, p in model.named_parameters() if n.startswith(("decoder.", "head.")))
    decoder += inert - sum(p.numel() for p in model.decoder.input.parameters())
    linears = (768 * 32 + 32) + (32 * 768 + 768)
    assert (count + inert, decoder) == (173_891_360, pytest.approx(87.77e6, abs=5e3))
    assert count + inert - decoder - linears == pytest.approx(86.07e6, abs=5e3)


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    recipe = MAETokSection(kind="maetok", preset=name, model={"depth": 1, "decoder_depth": 1})
    model = build(recipe, 1, (64, 64))
    assert model(torch.rand(1, 1, 64, 64)).sample.shape == (1, 1, 64, 64)
    assert not model.config["variational"]


def test_recipes_and_frozen_encoders(tmp_path):
    recipe = tiny_recipe(tmp_path, tokenizer={**MAETOK, "kl_weight": 1e-6})
    model = build_tokenizer(recipe.tokenizer, recipe.data)
    assert model.config["variational"]
    freeze(model, "decoder")
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"decoder", "head"}
    images = torch.rand(1, 3, *model.config["image_size"])
    z = model.moments(images).detach()[..., :4]
    model.decode_tokens(z).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert last_layer(model) is model.head.weight
    model.save_pretrained(tmp_path / "saved")
    again = build(recipe.tokenizer.model_copy(update={"init": str(tmp_path / "saved")}), 3, recipe.data.image_size)
    assert torch.equal(again.head.weight, model.head.weight)
    refused("allowed: maetok-s-128", build, MAETokSection(kind="maetok", preset="maetok-xl"), 3, (64, 64))
    refused("did you mean 'latent_tokens'", build, MAETokSection(kind="maetok", model={"latent_token": 3}), 3, (64, 64))
