"""Representation autoencoders: frozen encoders, the decoder, noise, training."""

import math

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.nn import functional as F

from latelier.keyed_random import KeyedRandom
from latelier.losses.dino import DinoDiscriminator, tapped
from latelier.losses.discriminator import build_discriminator
from latelier.losses.reconstruction import ReconstructionLoss
from latelier.losses.teachers import IMAGENET, STATISTICS
from latelier.preflight import try_tokenizer
from latelier.recipe import build_recipe
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.conv import IdentityTokenizer
from latelier.tokenizers.maetok import MAETok
from latelier.tokenizers.rae import PRESETS, RAE, RAEObjective, RAESection, build, noise_levels
from latelier.tokenizers.rae_encoder import VGG16
from latelier.tokenizers.vmae import VMAE as VMAEModel
from latelier.training.tokenizer_loop import train_tokenizer
from test_training import assert_same, newest, train_in_two_parts
from tiny import MAETOK, VMAE, needs_lpips, refused, tiny_recipe
from tiny import RAE as RAE_MODEL

VIT = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
SIZES = {**VIT, "intermediate_size": 24, "image_size": 32, "patch_size": 16}
ENCODERS = {  # class, its config, tokens before those of the patches
    "dinov2-registers": ("Dinov2WithRegisters", {**VIT, "mlp_ratio": 2, "image_size": 28, "patch_size": 14}, 5),
    "dinov2": ("Dinov2", {**VIT, "mlp_ratio": 2, "image_size": 28, "patch_size": 14}, 1),
    "dinov3": ("DINOv3ViT", {**SIZES, "num_register_tokens": 3}, 4),
    "mae": ("ViTMAE", SIZES, 1),
    "siglip": ("SiglipVision", SIZES, 0),
    "clip": ("CLIPVision", SIZES, 1),
}


def section(encoder, **changes):
    return RAESection(kind="rae", preset="vit-tiny-p8", encoder=str(encoder), **{"model": RAE_MODEL, **changes})


def images(count=2, size=32):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """`name -> folder` of a small model of each family, with norms that are not the identity."""

    def make(name):
        kind, config, _ = ENCODERS[name]
        torch.manual_seed(7)
        model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**config)).eval()
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.data += 0.3 * torch.randn_like(parameter)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        return folder, model

    return make


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_any_vision_model_is_an_encoder(vision, tmp_path, name):
    """Its patches in raster order, without CLS and registers, as the library itself computes them at that size."""
    folder, model = vision(name)
    first, patch = ENCODERS[name][2], model.config.patch_size
    codec = Codec(build(section(folder), 3, (32, 32)).eval())
    assert codec.latent_shape(32, 32) == (16, 4, 4)
    x = F.interpolate((images() + 1) / 2, (4 * patch, 4 * patch), mode="bicubic")
    mean, std = STATISTICS.get(f"{name}_vision_model", IMAGENET)
    x = (x - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    options = {} if "dino" in name else {"interpolate_pos_encoding": True}
    if name == "mae":
        model.config.mask_ratio, options["noise"] = 0.0, torch.arange(16.0).expand(2, -1)
    states = model(x, output_hidden_states=True, **options).hidden_states
    tokens = [F.layer_norm(state[:, first:], (16,), eps=1e-6) for state in states]  # of no, one, two, three blocks
    z = codec.encode(images())
    torch.testing.assert_close(z, tokens[3].transpose(1, 2).unflatten(2, (4, 4)), rtol=1e-3, atol=1e-3)

    several = build(section(folder, layers=[1, 3], combine="sum", final_norm="affine"), 3, (32, 32)).eval()
    norm = next(getattr(model, key) for key in ("layernorm", "norm", "post_layernorm") if hasattr(model, key))
    total = (norm(states[1]) + norm(states[3]))[:, first:]
    torch.testing.assert_close(several.encode(images()).latent.flatten(2).transpose(1, 2), total, rtol=1e-3, atol=1e-3)

    codec.save_pretrained(tmp_path)  # opens without the encoder's folder
    (folder / "config.json").unlink()
    again = Codec.from_pretrained(tmp_path)
    assert torch.equal(again.encode(images()), z)
    assert torch.equal(again.decode(z), codec.decode(z))


@torch.no_grad()
def test_tokenizers_of_latelier_are_encoders(tmp_path):
    torch.manual_seed(1)
    models = {
        "vmae": VMAEModel((16, 16), 4, **VMAE),
        "maetok": MAETok((32, 32), **{**MAETOK["model"], "patch_size": 8}),
    }
    for name, model in models.items():
        Codec(model.eval()).save_pretrained(tmp_path / name / "tokenizer")
        rae = build(section(tmp_path / name), 3, (32, 32)).eval()
        seen = {}
        hook = model.blocks[-1].register_forward_hook(lambda _, __, output, seen=seen: seen.update(x=output))
        x = images() if name == "maetok" else F.interpolate(images(), (16, 16), mode="bicubic")
        model.moments(x)
        hook.remove()
        tokens = F.layer_norm(seen["x"][:, 1:17] if name == "maetok" else seen["x"], (32,), eps=1e-6)
        z = rae.encode(images()).latent
        torch.testing.assert_close(z.flatten(2).transpose(1, 2), tokens, rtol=1e-4, atol=1e-4)
        Codec(rae).save_pretrained(tmp_path / "rae")
        assert torch.equal(Codec.from_pretrained(tmp_path / "rae").encode(images()), z)


@needs_lpips
@torch.no_grad()
def test_vgg16_is_an_encoder():
    from latelier.losses.perceptual import LPIPS

    z = build(section("vgg16"), 3, (32, 32)).encode(images()).latent
    taps = LPIPS("vgg").features(images())[3]  # relu4_3, (b, 512, 4, 4)
    wanted = F.layer_norm(taps.movedim(1, -1), (512,), eps=1e-6).movedim(-1, 1)
    torch.testing.assert_close(z, wanted, rtol=1e-3, atol=1e-3)


def test_the_decoders_have_the_papers_sizes():
    with torch.device("meta"):
        models = {name: RAE({**VGG16, "dim": 768}, **PRESETS[name]) for name in ("vit-b", "vit-l", "vit-xl")}
    counts = {name: sum(p.numel() for p in model.decoder.parameters()) for name, model in models.items()}
    assert counts == {"vit-b": 86_237_952, "vit-l": 303_887_104, "vit-xl": 415_056_640}


def test_noise_levels_follow_their_law():
    rng = KeyedRandom(0, torch.arange(4000))
    for law, mean, square in (("uniform", 0.4, 0.64 / 3), ("half-normal", 0.8 * math.sqrt(2 / math.pi), 0.64)):
        sigma = noise_levels(rng, 0.8, law)
        assert sigma.min() >= 0
        assert sigma.mean().item() == pytest.approx(mean, rel=0.03)
        assert sigma.square().mean().item() == pytest.approx(square, rel=0.06)
        assert torch.equal(sigma[5:9], noise_levels(KeyedRandom(0, torch.arange(5, 9)), 0.8, law))


def test_noise_is_on_raw_latents_and_only_the_decoder_learns(teacher):
    rae = build(section(teacher), 3, (32, 32)).train()
    assert not rae.encoder.model.training
    seen = []
    rae.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for numbers in (torch.arange(256), torch.arange(254, 256)):
        batch = {"image": images(1).expand(len(numbers), -1, -1, -1), "sample_id": numbers}
        terms = RAEObjective(rae, ReconstructionLoss("l1"), 0, tau=0.5)(batch)
    torch.testing.assert_close(seen[0][254:], seen[1])  # keyed by image
    noise = seen[0] - rae.encode(images(1)).latent  # (b, d, i, j)
    assert noise.flatten(1).std(1).mean().item() == pytest.approx(0.25, rel=0.1)  # tau / 2
    terms.total.backward()
    assert {name.split(".")[0] for name, p in rae.named_parameters() if p.grad is not None} == {"decoder"}
    assert terms.weights["l1"] == 0.5  # the paper's L1 is of images in [0, 1]


def rae_recipe(folder, teacher, **changes):
    game = {"kind": "dino", "teacher": teacher, "start": 24, "ahead": 8, "taps": "last", "class_token": False,
            "crops": False, "round_fakes": True, "norm": "batch", "augment": ["color", "translation"]}  # fmt: skip
    tree = tiny_recipe(folder, denoiser=None).model_dump()
    changes = {"images": 32, "batch": 8, "lr": 1e-3, "ema": 0.9, "precision": "fp32", "perceptual_weight": 0,
               "checkpoint_every": 8, "model": RAE_MODEL, "adversarial": game, **changes}  # fmt: skip
    return build_recipe({**tree, "tokenizer": {"kind": "rae", "preset": "vit-tiny-p8", "encoder": teacher, **changes}})


def test_training_resumes_exactly_and_leaves_the_encoder_alone(tmp_path, teacher, monkeypatch):
    whole, parts, micro = (rae_recipe(tmp_path / name, teacher) for name in ("whole", "parts", "micro"))
    train_tokenizer(whole)
    train_in_two_parts(parts, monkeypatch)
    assert_same(newest(whole.folder, "tokenizer"), newest(parts.folder, "tokenizer"))
    fresh = build(whole.tokenizer, 3, (32, 32))
    codec = Codec.from_pretrained(whole.folder / "tokenizer")
    assert_same([fresh.encoder.state_dict()], [codec.tokenizer.encoder.state_dict()])
    assert not torch.equal(fresh.decoder.head.weight, codec.tokenizer.decoder.head.weight)
    assert codec.mean.shape == codec.std.shape == (16, 4, 4)
    assert not any("vit" in name for name in load_file(whole.folder / "tokenizer/diffusion_pytorch_model.safetensors"))
    by_channel = rae_recipe(tmp_path / "channel", teacher, statistics="channel", images=8, adversarial=None)
    assert Codec.from_pretrained(train_tokenizer(by_channel)).mean.shape == (16,)
    (trial,) = try_tokenizer(micro)
    assert {"l1", "adversarial", "adaptive_weight", "d_loss"} <= trial.terms.keys()


@torch.no_grad()
def test_the_discriminator_is_raes(teacher):
    assert (tapped(12, "last"), tapped(2, "last")) == ([3, 6, 9, 12, 12], [1, 2, 2])
    network = DinoDiscriminator(teacher, taps="last", class_token=False).eval()
    pixels = (F.interpolate(images(), (24, 24), mode="bilinear") + 1) / 2
    features = network.features
    states = features.vit((pixels - features.mean) / features.std, output_hidden_states=True).hidden_states
    wanted = torch.cat([head(states[k][:, 1:].transpose(1, 2)) for head, k in zip(network.heads, (1, 2, 2))], 2)
    torch.testing.assert_close(network(images(), torch.zeros(2, 3), crops=False), wanted)

    game = build_discriminator(3, 0, "dino", teacher=teacher, taps="last", class_token=False, crops=False,
                               round_fakes=True).eval()  # fmt: skip
    fake, numbers = images() * 1.5, torch.arange(2)
    rounded = ((fake.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    found = game(images(), fake, numbers).losses["d_fake"]
    torch.testing.assert_close(found, game.logits(rounded, numbers).mean())
    assert not torch.equal(found, game.logits(fake, numbers).mean())


def test_other_sizes(teacher):
    """A decoder has the positions of each grid; `resized` makes the same model for another size."""
    rae = build(section(teacher), 3, (32, 32)).eval()
    z = rae.encode(images(size=48)).latent
    assert z.shape == (2, 16, 6, 6)
    torch.testing.assert_close(rae.resized((48, 48)).decode(z).sample, rae.decode(z).sample)


def test_gradient_checkpointing_changes_nothing(teacher):
    rae = build(section(teacher), 3, (32, 32)).train()
    gradients = []
    for _ in range(2):
        rae.zero_grad()
        rae(images()).sample.square().mean().backward()
        gradients.append(rae.decoder.embed.weight.grad.clone())
        rae.enable_gradient_checkpointing()
    torch.testing.assert_close(*gradients)


def test_wrong_input_is_one_sentence(tmp_path, teacher):
    resnet = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
    transformers.ResNetModel(resnet).save_pretrained(tmp_path / "resnet")
    Codec(IdentityTokenizer(3, 3)).save_pretrained(tmp_path / "pixels")
    for encoder, sentence in (
        (
            "nobody/none",
            r"^tokenizer.encoder: 'nobody/none' cannot be loaded .*Hub.*save_pretrained.*vmae or maetok.*vgg16",
        ),
        (tmp_path / "resnet", r"^tokenizer.encoder: .* is a resnet, which has no square patches.*maetok run"),
        (tmp_path / "pixels", "is an IdentityTokenizer, which has no tokens of patches"),
    ):
        refused(sentence, build, section(encoder), 3, (32, 32))
    refused("takes images of 3 channels, not 1; change data.channels", build, section(teacher), 1, (32, 32))
    refused("layers = 3, but the encoder .* has 2 blocks", build, section(teacher, layers=3), 3, (32, 32))
    rigid = build(section(teacher), 3, (32, 32))
    rigid.encoder._options = {}  # of one size, as the library's models without interpolation
    refused(
        r"takes no images of 36 x 36 pixels \(ValueError: .*; change data.image_size", rigid.encode, images(size=48)
    )
    refused("Unknown key 'tokenizer.model.layers'; known: patch_size", rae_recipe, tmp_path, teacher,
            model={"layers": 2})  # fmt: skip
    refused("decoder_dim = 18 makes no table", build, section(teacher, model={"decoder_dim": 18}), 3, (32, 32))
    refused("Image size 32 x 32 is not divisible by the tokenizer's factor 24", train_tokenizer,
            rae_recipe(tmp_path, teacher, model={**RAE_MODEL, "patch_size": 24}))  # fmt: skip
    refused("adversarial.taps means nothing to kind 'patch'", rae_recipe, tmp_path, teacher,
            adversarial={"taps": "last"})  # fmt: skip
    refused("tokenizer.train = 'all' is not allowed", rae_recipe, tmp_path, teacher, train="all")
