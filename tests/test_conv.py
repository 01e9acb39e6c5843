"""Convolutional tokenizers: LDM's sizes, what the small ones cost, and the objective's closed forms."""

import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from torch.utils.flop_counter import FlopCounterMode

from latelier.errors import LatelierError
from latelier.losses.reconstruction import mean_kl
from latelier.tokenizers import build_objective, remove_spread
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.conv import ConvSection, build
from tiny import refused

# Of the released models; nothing was released for f = 2.
PARAMETERS = {
    "kl-f4": 55_312_063, "kl-f8": 83_653_863, "kl-f16": 69_610_963, "kl-f32": 103_880_131, "vq-f4": 55_322_782,
    "vq-f4-noattn": 53_219_486, "vq-f8": 67_717_295, "vq-f8-n256": 67_652_783, "vq-f16": 69_593_371,
}  # fmt: skip
LATENTS = {
    "kl-f2": 2, "kl-f4": 3, "kl-f8": 4, "kl-f16": 16, "kl-f32": 64, "vq-f2": 2, "vq-f2-n64": 2, "vq-f4": 3,
    "vq-f4-noattn": 3, "vq-f8": 4, "vq-f8-n256": 4, "vq-f16": 8, "kl-f2-small": 2, "kl-f4-small": 3, "kl-f8-small": 4,
    "kl-f16-small": 16, "vq-f4-small": 3, "vq-f8-small": 4,
}  # fmt: skip
CODES = {
    "vq-f2": 2048, "vq-f2-n64": 64, "vq-f4": 8192, "vq-f4-noattn": 8192, "vq-f8": 16384, "vq-f8-n256": 256,
    "vq-f16": 16384, "vq-f4-small": 512, "vq-f8-small": 512,
}  # fmt: skip
NARROW = {"block_out_channels": [8, 8, 8], "norm_num_groups": 4}


def conv(preset, **changes):
    return build(ConvSection(kind="conv", preset=preset, **changes), 3)


@pytest.mark.parametrize("preset", LATENTS)
def test_sizes_are_those_of_the_paper(preset):
    with torch.device("meta"):
        model = conv(preset)
        latents = Codec(model).encode(torch.zeros(1, 3, 64, 64))
    factor = int(preset.split("-")[1][1:])
    assert latents.shape == (1, LATENTS[preset], 64 // factor, 64 // factor)
    assert Codec(model).latent_shape(64, 64) == latents.shape[1:]
    assert model.config["scaling_factor"] == 1.0
    assert isinstance(model, VQModel if preset in CODES else AutoencoderKL)
    if preset in CODES:
        assert model.quantize.embedding.weight.shape == (CODES[preset], LATENTS[preset])
    if preset in PARAMETERS:
        assert sum(p.numel() for p in model.parameters()) == PARAMETERS[preset]


@pytest.mark.parametrize(
    ("preset", "levels"), [("kl-f4", []), ("kl-f16", [4]), ("kl-f32", [4, 5]), ("vq-f8", [3]), ("vq-f16", [4])]
)
def test_attention_lies_in_the_levels_of_the_paper(preset, levels):
    with torch.device("meta"):
        model = conv(preset)
    down = [i for i, block in enumerate(model.encoder.down_blocks) if hasattr(block, "attentions")]
    up = [i for i, block in enumerate(reversed(model.decoder.up_blocks)) if hasattr(block, "attentions")]
    assert down == up == levels
    found = [module for module in model.modules() if type(module).__name__ == "Attention"]
    assert len(found) == 2 + 5 * len(levels)  # after each of 2 and 3 blocks, and in the two middles
    assert all(attention.heads == 1 for attention in found)


def test_small_ones_cost_about_the_same():
    flops = {}
    for preset in [name for name in LATENTS if name.endswith("-small")]:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            model = conv(preset)
            model.decode(Codec(model).encode(torch.zeros(1, 3, 64, 64)))
        flops[preset] = counter.get_total_flops()
    assert max(flops.values()) < 1.2 * min(flops.values())
    assert max(flops.values()) < 3e9


def test_wrong_architectures_are_one_sentence():
    refused(r"'vq-f3' is not known; allowed: .*kl-f2, .*vq-f8-small", conv, "vq-f3")
    refused(r"has 2 entries, but kl-f4-small has 3 levels", conv, "kl-f4-small", model={"block_out_channels": [8, 8]})
    with pytest.raises(LatelierError, match=r"Unknown key 'tokenizer.model.num_vq_embedding'; .*'num_vq_embeddings'"):
        conv("vq-f4-small", model={"num_vq_embedding": 8})
    refused(r"Unknown key 'tokenizer.model.num_vq_embeddings'", conv, "kl-f4-small", model={"num_vq_embeddings": 8})


def test_starting_from_what_there_is(tmp_path):
    first = conv("vq-f4-small", model=NARROW)
    first.save_pretrained(tmp_path)
    again = conv("vq-f4-small", init=str(tmp_path))
    assert torch.equal(again.quantize.embedding.weight, first.quantize.embedding.weight)


def terms(tokenizer, size=32, **changes):
    section = ConvSection(kind="conv", preset="kl-f4-small", perceptual_weight=0, **changes)
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    batch = {"image": images, "sample_id": torch.arange(2), "seen": 0}
    return build_objective(section, 0, tokenizer)(batch), images


def test_terms_of_a_plain_autoencoder():
    tokenizer = conv("kl-f4-small", model=NARROW)
    found, images = terms(tokenizer, kl_weight=0, reconstruction="l2")
    assert found.weights == {"l2": 1.0}
    expected = tokenizer.decode(tokenizer.encode(images).latent_dist.mean).sample
    torch.testing.assert_close(found.losses["l2"], (expected - images).square().mean())


def test_kl_per_pixel_is_the_released_loss():
    """c h w times ours is LDM's sum of pixel errors and KL, for each image."""
    tokenizer = conv("kl-f4-small", model=NARROW)
    remove_spread(tokenizer)  # so that noise plays no part
    for size in (32, 48):
        found, images = terms(tokenizer, size, kl_weight=1e-2, kl_per_pixel=True)
        posterior = tokenizer.encode(images).latent_dist
        reconstruction = tokenizer.decode(posterior.mean).sample
        kl = mean_kl(posterior.mean, posterior.logvar)
        released = (reconstruction - images).abs().sum() / 2 + 1e-2 * kl
        torch.testing.assert_close(found.total * 3 * size**2, released, rtol=1e-4, atol=1e-3)
        plain, _ = terms(tokenizer, size, kl_weight=1e-2)
        assert plain.weights["kl"] == 1e-2
        torch.testing.assert_close(plain.losses["kl"], found.losses["kl"])


def test_methods_of_ldm():
    kl = ConvSection(kind="conv", method="kl-reg", preset="kl-f8")
    assert (kl.reconstruction, kl.perceptual_weight, kl.kl_weight, kl.kl_per_pixel) == ("l1", 1.0, 1e-6, True)
    assert (kl.adversarial.weight, kl.adversarial.norm, kl.adversarial.adaptive) == (0.5, "batch", True)
    vq = ConvSection(kind="conv", method="vq-reg", preset="vq-f8-n256")
    assert (vq.codebook_weight, vq.codebook_form, vq.adversarial.weight) == (1.0, "legacy", 0.75)
    assert not ConvSection(kind="conv", method="sd-vae").kl_per_pixel
    assert ConvSection(kind="conv", method="ae").deterministic
