"""LDM's autoencoders and discriminators under their original names.

Numbers of the originals at full size are compared where they are cheap; set `LATELIER_GOLDENS` to a folder with the
whole files to compare decoders too. An autoencoder written down from its description stands in for them at test size.
"""

import math
import os
from functools import partial
from pathlib import Path

import pytest
import synth
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, VQModel

import test_goldens
from latelier.convert import from_official
from latelier.losses.adversarial import adaptive_weight, discriminator_loss, generator_loss
from latelier.losses.codebook import quantise
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.conv import PRESETS
from test_goldens import FOLDER, Golden
from tiny import refused

WHOLE = os.environ.get("LATELIER_GOLDENS")
PART = {"loss.logvar": torch.zeros(()), "loss.perceptual_loss.lin0.model.1.weight": torch.zeros(1, 64, 1, 1)}


@pytest.fixture(autouse=True)
def _whole_goldens(monkeypatch):
    if WHOLE:
        monkeypatch.setattr(test_goldens, "FOLDER", Path(WHOLE))


# -- the originals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kl_f16", "kl_f8"] if WHOLE else ["kl_f16"])
@torch.no_grad()
def test_kl_golden(name):
    golden = Golden(f"ldm_ae_{name}", "ldm-kl")
    codec = Codec(golden.converted.model)
    posterior = codec.posterior(synth.synthetic_images(1, 256, 90))
    golden.check("moments", torch.cat([posterior.mean, posterior.logvar], 1))
    golden.check("kl", 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).sum()[None])
    if WHOLE:
        golden.check("decode_mean", codec.decode(posterior.mean))
        golden.check("decode_noise", codec.decode(golden.normal(golden.inputs["noise_latent"])))


@torch.no_grad()
def test_vq_golden():
    golden = Golden("ldm_ae_vq_f4", "ldm-vq")
    codec = Codec(golden.converted.model)
    codebook = codec.tokenizer.quantize.embedding.weight
    latents = codec.encode(synth.synthetic_images(1, 256, 90))
    golden.check("latent", latents)
    quantised = quantise(latents, codebook)
    golden.check("codebook_loss", quantised.loss[None])
    indices = torch.from_numpy(golden.arrays["indices"]).long()
    assert (quantised.indices != indices).float().mean() < 1e-3  # near ties
    if WHOLE:
        codes = F.embedding(indices, codebook).permute(0, 3, 1, 2)
        golden.check("decode_quantised", codec.tokenizer.decode(codes, force_not_quantize=True).sample)
        golden.check("decode_noise", codec.decode(golden.normal(golden.inputs["noise_latent"])))


@pytest.mark.parametrize("layers", [2, 3])
@torch.no_grad()
def test_patchgan_golden(layers):
    golden = Golden(f"ldm_patchgan_n{layers}", "patchgan")
    real, fake = (golden.converted.model(synth.synthetic_images(2, 128, seed)) for seed in (120, 121))
    golden.check("logits_real", real)
    golden.check("logits_fake", fake)
    golden.check("hinge_d", discriminator_loss(real, fake)[None])
    golden.check("vanilla_d", discriminator_loss(real, fake, "non-saturating")[None])
    golden.check("generator", generator_loss(fake)[None])


def test_adaptive_weight_golden(monkeypatch):
    monkeypatch.setattr(test_goldens, "from_official", lambda kind, weights, **_: weights)
    golden = Golden("ldm_adaptive_weight", "none")
    weights = {name: tensor.requires_grad_() for name, tensor in golden.converted.items()}
    images = synth.synthetic_images(2, 32, 130)
    body = torch.tanh(F.conv2d(images, weights["body.weight"], weights["body.bias"], padding=1))
    last = weights["conv_out.weight"]
    made = F.conv2d(body, last, weights["conv_out.bias"], padding=1)
    adversarial = generator_loss(F.conv2d(made, weights["critic.weight"], weights["critic.bias"], stride=4))
    golden.check("reconstruction", made)
    golden.check("g_loss", adversarial[None])
    for form, factor in (("kl", 0.5), ("vq", 0.75)):
        error = (images - made).abs()
        nll = error.sum() / 2 if form == "kl" else error.mean()
        golden.check(f"nll_{form}", nll[None])
        golden.check(f"adaptive_weight_{form}", factor * adaptive_weight(nll, adversarial, last)[None])


@pytest.mark.parametrize("name", ["kl-f8", "kl-f16", "vq-f4"])
def test_architecture_is_read_off_the_names(name):
    """Names and shapes of the released models give the arguments of the presets."""
    pairs, _ = synth.read_key_list(FOLDER / f"ldm_ae_{name.replace('-', '_')}.keys.json")
    with torch.device("meta"):
        weights = {key: torch.empty(shape) for key, shape in pairs}
        model = from_official(f"ldm-{name[:2]}", weights | PART).model
    wanted = {key: tuple(v) if isinstance(v, list) else v for key, v in PRESETS[name].items()}
    assert {key: model.config[key] for key in wanted} == wanted


# -- an autoencoder from its description ------------------------------------------------------------------------------


class Described:
    """LDM's autoencoder as functions of a table of weights; what is asked for and not there is made."""

    def __init__(self, attention=(1,), middle=True, latent=3, out=6, codes=None, widths=(8, 16)):
        self.weights: dict[str, torch.Tensor] = {}
        self.attention, self.middle, self.latent, self.out, self.widths = attention, middle, latent, out, widths
        self.decode(self.encode(torch.zeros(1, 3, 16, 16))[:, :latent])
        if codes:
            self.weights["quantize.embedding.weight"] = torch.randn(codes, latent)

    def get(self, name, *shape):
        made = torch.randn(shape) / math.prod(shape[1:]) ** 0.5
        made = made + 1 if "norm" in name and name.endswith("weight") else made
        return self.weights.setdefault(name, made)

    def conv(self, name, x, out, side=3, **options):
        weight = self.get(f"{name}.weight", out, x.shape[1], side, side)
        return F.conv2d(x, weight, self.get(f"{name}.bias", out), padding=options.pop("padding", side // 2), **options)

    def norm(self, name, x):
        return F.group_norm(x, 4, *(self.get(f"{name}.{part}", x.shape[1]) for part in ("weight", "bias")), eps=1e-6)

    def block(self, name, x, out):
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), out)
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)), out)
        return h + (x if x.shape[1] == out else self.conv(f"{name}.nin_shortcut", x, out, 1))

    def attend(self, name, x):
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h, x.shape[1], 1).flatten(2) for part in "qkv")  # (b, c, n)
        share = (q.transpose(1, 2) @ k / x.shape[1] ** 0.5).softmax(-1)  # (b, n, n)
        return x + self.conv(f"{name}.proj_out", (v @ share.transpose(1, 2)).view_as(x), x.shape[1], 1)

    def mid(self, half, x):
        x = self.block(f"{half}.mid.block_1", x, x.shape[1])
        x = self.attend(f"{half}.mid.attn_1", x) if self.middle else x
        return self.block(f"{half}.mid.block_2", x, x.shape[1])

    def level(self, name, x, level, blocks):
        for number in range(blocks):
            x = self.block(f"{name}.{level}.block.{number}", x, self.widths[level])
            x = self.attend(f"{name}.{level}.attn.{number}", x) if level in self.attention else x
        return x

    def encode(self, x):
        x = self.conv("encoder.conv_in", x, self.widths[0])
        for level in range(len(self.widths)):
            x = self.level("encoder.down", x, level, 2)
            if level < len(self.widths) - 1:
                name = f"encoder.down.{level}.downsample.conv"
                x = self.conv(name, F.pad(x, (0, 1, 0, 1)), x.shape[1], stride=2, padding=0)
        x = self.conv("encoder.conv_out", F.silu(self.norm("encoder.norm_out", self.mid("encoder", x))), self.out)
        return self.conv("quant_conv", x, self.out, 1)

    def decode(self, z):
        x = self.conv("decoder.conv_in", self.conv("post_quant_conv", z, self.latent, 1), self.widths[-1])
        x = self.mid("decoder", x)
        for level in reversed(range(len(self.widths))):
            x = self.level("decoder.up", x, level, 3)
            if level:
                name = f"decoder.up.{level}.upsample.conv"
                x = self.conv(name, F.interpolate(x, scale_factor=2.0), x.shape[1])
        return self.conv("decoder.conv_out", F.silu(self.norm("decoder.norm_out", x)), 3)


@pytest.fixture
def few_groups(monkeypatch):
    """32 groups, as in all of LDM's models, need wider layers than a test has time for."""
    for cls in (AutoencoderKL, VQModel):
        monkeypatch.setattr(f"latelier.convert.ldm_autoencoder.{cls.__name__}", partial(cls, norm_num_groups=4))


@pytest.mark.parametrize("attention", [(), (1,), (0, 1)])
@pytest.mark.parametrize("middle", [True, False])
@torch.no_grad()
def test_kl_follows_the_description(few_groups, attention, middle):
    described = Described(attention, middle)
    codec = Codec(from_official("ldm-kl", described.weights | PART, resolution=64).model)
    images, z = torch.randn(2, 3, 16, 24), torch.randn(2, 3, 8, 12)
    mean, logvar = described.encode(images).chunk(2, 1)
    posterior = codec.posterior(images)
    torch.testing.assert_close(posterior.mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(posterior.logvar, logvar, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(codec.decode(z), described.decode(z), rtol=1e-4, atol=1e-5)
    assert codec.tokenizer.config["sample_size"] == 64
    assert not codec.tokenizer.training


@pytest.mark.parametrize("middle", [True, False])
@torch.no_grad()
def test_vq_follows_the_description(few_groups, middle):
    described = Described(middle=middle, out=3, codes=16)
    codec = Codec(from_official("ldm-vq", {f"first_stage_model.{k}": v for k, v in described.weights.items()}).model)
    images = torch.randn(2, 3, 16, 24)
    latents = described.encode(images)
    torch.testing.assert_close(codec.encode(images), latents, rtol=1e-4, atol=1e-5)
    codes = quantise(latents, described.weights["quantize.embedding.weight"]).z
    torch.testing.assert_close(codec.decode(latents), described.decode(codes), rtol=1e-4, atol=1e-5)


def test_attention_as_matrices(few_groups):
    described = Described()
    flat = {k: v[:, :, 0, 0] if ".attn" in k and v.ndim == 4 else v for k, v in described.weights.items()}
    a, b = (from_official("ldm-kl", weights).model.state_dict() for weights in (flat, described.weights))
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_what_does_not_fit(few_groups):
    weights, vq, one = Described(out=3, codes=16).weights, partial(from_official, "ldm-vq"), torch.zeros(1)
    refused(r"its kind is ldm-vq", from_official, "ldm-kl", weights)
    refused(r"not a ldm-vq checkpoint: it has no 'quantize.embedding.weight'", vq, Described().weights)
    codes = {"quantize.embedding.weight": torch.zeros(4, 3)}
    refused(r"not a ldm-vq checkpoint: it has no 'encoder.down.0.block.0.conv1", vq, codes)
    placeless = r"'encoder.mid.attn_1.to_qkv.weight' has no place in VQModel; expected are"
    refused(placeless, vq, {**weights, "encoder.mid.attn_1.to_qkv.weight": one})
    less = {k: v for k, v in weights.items() if k != "encoder.norm_out.bias"}
    refused(r"1 missing \(encoder.conv_norm_out.bias\)", vq, less)
    wrong = r"does not fit VQModel: .*size mismatch for encoder.conv_norm_out.bias"
    refused(wrong, vq, {**weights, "encoder.norm_out.bias": torch.zeros(5)})
    odd = {**Described().weights, "quant_conv.weight": torch.zeros(4, 6, 1, 1)}
    refused(r"as many channels before as after quant_conv, 3 here", from_official, "ldm-kl", odd)


def test_a_discriminator_lies_in_the_autoencoders_checkpoint():
    pairs, _ = synth.read_key_list(FOLDER / "ldm_patchgan_n2.keys.json")
    alone = {name: torch.randn(shape) for name, shape in pairs}
    inside = {f"loss.discriminator.{name}": tensor for name, tensor in alone.items()}
    a, b = (from_official("patchgan", w).model.state_dict() for w in (alone, inside | {"encoder.x": torch.zeros(1)}))
    assert all(torch.equal(a[name], b[name]) for name in a)
    read, less = partial(from_official, "patchgan"), {k: v for k, v in alone.items() if k != "main.3.running_var"}
    refused("its last layer is main.9", read, alone | {"main.9.weight": torch.zeros(1)})
    refused(r"1 missing \(body.3.running_var\)", read, less)
    refused(r"1 unknown \(body.3.scale\)", read, alone | {"main.3.scale": torch.zeros(1)})
