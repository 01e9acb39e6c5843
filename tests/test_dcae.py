"""Deep-compression autoencoders: sizes as published, prefixes of the latents, what each phase trains."""

import pytest
import torch
from diffusers import AutoencoderDC

from latelier.errors import LatelierError
from latelier.prefixes import keep_prefix, random_prefixes
from latelier.preflight import try_tokenizer
from latelier.recipe import Prefixes
from latelier.tokenizers import build_objective, freeze, last_layer
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.dcae import PRESETS, DCAESection, build
from latelier.training.tokenizer_loop import train_tokenizer
from tiny import DCAE, refused, tiny_recipe

SMALL = {
    "encoder_block_out_channels": (8, 16, 16), "decoder_block_out_channels": (8, 16, 16),
    "encoder_layers_per_block": (0, 1, 1), "decoder_layers_per_block": (0, 1, 1),
    "encoder_qkv_multiscales": ((), (), ()), "decoder_qkv_multiscales": ((), (), ()), "latent_channels": 8,
}  # fmt: skip


def recipe(**changes):
    return DCAESection(kind="dcae", preset="dcae15-f8c32-tiny", model=SMALL, perceptual_weight=0, **changes)


def tokenizer(**changes):
    torch.manual_seed(0)
    return build(recipe(**changes), 3)


def batch(seen=0):
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return {"image": images, "sample_id": torch.arange(2), "seen": seen}


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("dcae-f32c32", 323.36), ("dcae-f64c128", 676.90), ("dcae-f128c512", 1120.68), ("dcae-f32c32-sana", 312.25),
        ("dcae15-f32c128", 523.61), ("dcae15-f64c128", 714.74),
    ],
)  # fmt: skip
def test_presets_have_the_published_numbers_of_parameters(name, millions):
    with torch.device("meta"):
        model = AutoencoderDC(**PRESETS[name])
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


@torch.no_grad()
def test_a_prefix_decodes_like_a_masked_latent_bit_for_bit():
    model = tokenizer().eval()
    mean, std = torch.randn(8), torch.rand(8) + 0.5
    codec = Codec(model, mean, std)
    z = codec.encode(batch()["image"])
    raw = codec.denormalise(z)
    for length in (1, 3, 8):
        masked = raw * (torch.arange(8) < length).view(1, -1, 1, 1)
        masked = model.decode(masked.contiguous(memory_format=torch.channels_last)).sample
        torch.testing.assert_close(codec.decode(z, length), masked, rtol=0, atol=0)
        torch.testing.assert_close(codec.decode(z[:, :length], length), masked, rtol=0, atol=0)
    for wrong in (0, 9):
        refused(f"channels = {wrong} is not a prefix of 8", codec.decode, z, wrong)


def test_lengths_end_with_all_channels():
    assert Prefixes().of(32) == [16, 20, 24, 28, 32]
    refused(r"prefixes\.first = 16 leaves no prefix of 8 channels", Prefixes().of, 8)
    assert Prefixes(lengths=[4, 2]).of(8) == [2, 4, 8]
    refused("has 9, but the latents have only 8 channels", Prefixes(lengths=[9]).of, 8)
    refused("give numbers of channels", Prefixes, lengths=[0])


def test_draws_cover_the_list_and_depend_on_images_seen_alone():
    prefixes = random_prefixes(Prefixes(first=2, step=2), 8)
    drawn = [prefixes.draw(3, seen)[0] for seen in range(0, 6400, 32)]
    assert set(drawn) == {2, 4, 6, 8}
    assert all(30 < drawn.count(length) < 75 for length in (2, 4, 6, 8))  # 200 draws, uniform
    assert drawn == [prefixes.draw(3, seen)[0] for seen in range(0, 6400, 32)]
    assert drawn != [prefixes.draw(4, seen)[0] for seen in range(0, 6400, 32)]


def test_several_draws_and_all_channels():
    drawn = random_prefixes(Prefixes(first=2, step=2, draws=3, always_full=True), 8).draw(0, 64)
    assert (drawn[0], len(drawn)) == (8, 4)
    one = random_prefixes(Prefixes(first=2, step=2, always_full=True), 8)  # besides all channels, not instead of them
    assert {length for seen in range(40) for length in one.draw(0, seen)[1:]} == {2, 4, 6, 8}
    often = random_prefixes(Prefixes(first=2, step=2, full_share=0.6), 8)
    drawn = [often.draw(3, seen)[0] for seen in range(0, 12800, 32)]  # 400 draws
    assert 250 < drawn.count(8) < 310  # 0.6, and a quarter of the rest
    assert all(20 < drawn.count(length) < 65 for length in (2, 4, 6))


def test_dropped_channels_get_no_gradient():
    z = torch.randn(2, 8, 2, 2, requires_grad=True)
    (keep_prefix(z, 3) ** 2).sum().backward()
    assert (z.grad[:, 3:] == 0).all()
    assert (z.grad[:, :3] != 0).all()


def test_the_encoder_runs_once_and_losses_are_means_over_draws():
    model = tokenizer()
    section = recipe(prefixes={"lengths": [2, 8], "draws": 2, "always_full": True})
    objective = build_objective(section, 0, model)
    calls = []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    terms = objective(batch())
    assert len(calls) == 1
    lengths = random_prefixes(section.prefixes, 8).draw(0, 0)
    z = model.encode(batch()["image"]).latent
    expected = [(model.decode(keep_prefix(z, k)).sample - batch()["image"]).abs().mean() for k in lengths]
    torch.testing.assert_close(terms.losses["l1"], torch.stack(expected).mean())
    assert terms.losses["prefix"] == sum(lengths) / 3
    assert "prefix" not in terms.weights


def test_without_prefixes_it_is_a_plain_autoencoder():
    model = tokenizer()
    terms = build_objective(recipe(), 0, model)(batch())
    expected = (model.decode(model.encode(batch()["image"]).latent).sample - batch()["image"]).abs().mean()
    torch.testing.assert_close(terms.losses["l1"], expected)
    assert set(terms.losses) == {"l1"}


@pytest.mark.parametrize(
    ("train", "names"),
    [
        ("middle", {"encoder.conv_out", "decoder.conv_in"}),
        ("head", {"decoder.norm_out", "decoder.conv_out"}),
        ("decoder", {"decoder"}),
    ],
)
def test_phases_train_the_named_layers(train, names):
    model = tokenizer()
    freeze(model, train)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == any(name.startswith(part + ".") for part in names), name


def test_the_discriminator_compares_gradients_at_the_last_convolution():
    model = tokenizer()
    assert last_layer(model) is model.decoder.conv_out.conv.weight  # behind it pixels are only shuffled
    terms = build_objective(recipe(), 0, model)(batch())
    assert torch.autograd.grad(terms.total, last_layer(model))[0].abs().sum() > 0


def test_frozen_batch_norms_keep_their_statistics():
    changes = {**SMALL, "decoder_norm_types": ("batch_norm",) * 3}
    section = DCAESection(kind="dcae", preset="dcae15-f8c32-tiny", model=changes, perceptual_weight=0)
    model = build(section, 3)
    objective = build_objective(section.model_copy(update={"train": "head"}), 0, model).train()
    before = {name: value.clone() for name, value in model.state_dict().items() if "running" in name}
    assert before
    objective(batch())
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    build_objective(section, 0, model).train()(batch())
    assert not all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_widths_that_do_not_fit_are_told():
    bad = {**SMALL, "encoder_layers_per_block": (1,)}
    with pytest.raises(LatelierError, match=r"tokenizer\.model does not fit preset dcae15-f8c32-tiny"):
        build(DCAESection(kind="dcae", preset="dcae15-f8c32-tiny", model=bad), 3)


@pytest.mark.parametrize("first", [train_tokenizer, lambda recipe: list(try_tokenizer(recipe))], ids=["train", "check"])
def test_a_late_phases_size_is_refused_before_the_first_begins(tmp_path, first):
    phases = [{"name": "high", "images": 8, "image_size": 36, "train": "middle"}]
    section = {"kind": "dcae", "preset": "dcae15-f8c32-tiny", "model": {**DCAE}, "phases": phases}
    with pytest.raises(LatelierError, match="36 x 36 is not divisible by the tokenizer's factor 8; use 32 x 32"):
        first(tiny_recipe(tmp_path, tokenizer=section))
    assert not list(tmp_path.glob("**/checkpoints/*"))
