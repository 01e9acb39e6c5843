"""The codec: any tokenizer, one interface."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from latelier.errors import LatelierError
from latelier.evaluation.cost import count_cost
from latelier.opening import open_pretrained
from latelier.publish import publish
from latelier.tokenizers.codec import Codec, decode_tiled, encode_tiled
from latelier.tokenizers.conv import PRESETS, ConvSection, IdentityTokenizer, build
from latelier.tokenizers.pretrained import PretrainedSection


@pytest.fixture
def tokenizers():
    small = {"block_out_channels": [8, 8], "down_block_types": ["DownEncoderBlock2D"] * 2, "norm_num_groups": 4}
    small |= {"up_block_types": ["UpDecoderBlock2D"] * 2, "latent_channels": 4}
    return {
        "kl": build(ConvSection(kind="conv", preset="kl-f8c16-tiny", model=small), 3).eval(),
        "vq": VQModel(**small, num_vq_embeddings=16, scaling_factor=1.0).eval(),
        "pixels": IdentityTokenizer(3, 3),
    }


@pytest.mark.parametrize("kind", ["kl", "vq", "pixels"])
def test_round_trip_and_folder(tokenizers, kind, tmp_path):
    plain = Codec(tokenizers[kind])
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    raw = plain.encode(images)
    assert raw.shape[1:] == plain.latent_shape(16, 24)
    codec = Codec(tokenizers[kind], raw.mean((0, 2, 3)), raw.std((0, 2, 3)) + 0.1, {"images": 2})
    z = codec.encode(images)
    torch.testing.assert_close(codec.denormalise(z), raw)
    torch.testing.assert_close(codec.decode(z), plain.decode(raw))
    codec.save_pretrained(tmp_path)
    again = Codec.from_pretrained(tmp_path)
    torch.testing.assert_close(again.encode(images), z)
    assert again.hash() == codec.hash() != plain.hash()
    assert again.receipt == {"images": 2}


def test_opens_in_diffusers(tokenizers, tmp_path):
    Codec(tokenizers["kl"]).save_pretrained(tmp_path)
    images = torch.rand(1, 3, 16, 16)
    theirs = AutoencoderKL.from_pretrained(tmp_path).encode(images).latent_dist.mean
    torch.testing.assert_close(theirs, tokenizers["kl"].encode(images).latent_dist.mean)


def test_sampling_follows_the_posterior(tokenizers):
    codec = Codec(tokenizers["kl"])
    images = torch.rand(1, 3, 16, 16)
    posterior = codec.posterior(images)
    draws = torch.cat([codec.encode(images, torch.Generator().manual_seed(i)) for i in range(200)])
    assert (draws.mean(0) - posterior.mean[0]).abs().max() < 6 * posterior.std.max() / 200**0.5
    assert torch.equal(codec.encode(images), posterior.mean)


def test_prefix_decoding_is_zero_padding(tokenizers):
    codec = Codec(tokenizers["kl"])
    z = torch.randn(1, 4, 8, 8)
    padded = torch.cat([z[:, :2], torch.zeros(1, 2, 8, 8)], 1)
    assert torch.equal(codec.decode(z, channels=2), codec.decode(padded))
    with pytest.raises(LatelierError, match="channels = 5"):
        codec.decode(z, channels=5)


def test_size_that_the_factor_does_not_divide(tokenizers):
    with pytest.raises(LatelierError, match="15 x 16 is not divisible by the tokenizer's factor 2; use 16 x 16"):
        Codec(tokenizers["kl"]).latent_shape(15, 16)


def test_parameter_count_of_the_published_shapes():
    with torch.device("meta"):
        counts = {
            name: sum(p.numel() for p in AutoencoderKL(**PRESETS[name]).parameters())
            for name in ("kl-f8c4", "kl-f8c16")
        }
    assert counts == {"kl-f8c4": 83_653_863, "kl-f8c16": 83_819_683}


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("latent_statistics.json", {"std": [1, 1, 0, 1]}, "a std is not above 0"),
        ("latent_statistics.json", {"mean": [float("nan"), 0, 0, 0]}, "not all finite"),
        ("latent_statistics.json", {"mean": [0], "std": [1]}, r"not \(4,\)"),
        ("config.json", {"_class_name": ["os"]}, r"names the class \['os'\]"),
        ("config.json", {"_class_name": "logging"}, "names the class 'logging'"),
        ("config.json", {"layers_per_block": -4}, "layers_per_block = -4"),
        ("config.json", {"layers_per_block": 2}, "its files lack 32 of its weights"),
        ("config.json", {"block_out_channels": [2**20, 2**20]}, "numbers, but its files have"),
    ],
)
def test_what_strangers_changed(tokenizers, tmp_path, file, changes, words):
    Codec(tokenizers["kl"], torch.zeros(4), torch.ones(4)).save_pretrained(tmp_path)
    (tmp_path / file).write_text(json.dumps({**json.loads((tmp_path / file).read_text()), **changes}))
    with pytest.raises(LatelierError, match=words) as error:
        Codec.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_damage_of_a_published_folder_is_named(tokenizers, tmp_path):
    with publish(tmp_path / "t") as folder:
        Codec(tokenizers["vq"]).save_pretrained(folder)
    Codec.from_pretrained(tmp_path / "t")
    weights = tmp_path / "t" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(LatelierError, match=r"has changed bytes in diffusion_pytorch_model.safetensors; copy it again"):
        Codec.from_pretrained(tmp_path / "t")


def test_weights_that_are_not_finite(tokenizers, tmp_path):
    torch.nn.init.constant_(tokenizers["kl"].encoder.conv_in.bias, float("nan"))
    Codec(tokenizers["kl"]).save_pretrained(tmp_path)
    with pytest.raises(LatelierError, match=r"encoder\.conv_in\.bias is not finite"):
        Codec.from_pretrained(tmp_path)


@pytest.fixture
def elements(tokenizers):
    """A codec with statistics of each element of latents on a 8 x 12 grid, and without any."""
    plain = Codec(tokenizers["kl"])
    raw = torch.randn(64, *plain.latent_shape(16, 24)) * torch.rand(4, 8, 12) * 3 + torch.randn(4, 8, 12)
    return Codec(plain.tokenizer, raw.mean(0), raw.std(0), {"images": 64}), plain, raw


def test_statistics_of_elements(elements, tmp_path):
    codec, plain, raw = elements
    z = codec.normalise(raw)
    torch.testing.assert_close(z.mean(0), torch.zeros(4, 8, 12), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std(0), torch.ones(4, 8, 12))
    torch.testing.assert_close(codec.scale(raw), raw / raw.std(0))
    torch.testing.assert_close(codec.decode(z[:2]), plain.decode(raw[:2]))
    padded = torch.cat([raw[:2, :1], torch.zeros(2, 3, 8, 12)], 1)
    torch.testing.assert_close(codec.decode(z[:2, :1], channels=1), plain.decode(padded))
    torch.testing.assert_close(decode_tiled(codec, z[:1], 8, 4), decode_tiled(plain, raw[:1], 8, 4))
    images = torch.rand(1, 3, 16, 24) * 2 - 1
    torch.testing.assert_close(encode_tiled(codec, images, 8, 4), codec.normalise(encode_tiled(plain, images, 8, 4)))
    with pytest.raises(LatelierError, match=r"each element of a grid of 8 x 12, not 8 x 8; take images"):
        codec.encode(images[..., :16])
    Codec(codec.tokenizer, torch.zeros(4), torch.ones(4)).save_pretrained(tmp_path)
    codec.save_pretrained(tmp_path)  # in place of those of channels
    again = Codec.from_pretrained(tmp_path)
    assert torch.equal(torch.stack([again.mean, again.std]), torch.stack([codec.mean, codec.std]))
    assert again.receipt == {"images": 64}
    assert again.hash() == codec.hash() != plain.hash()


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"mean": torch.zeros(4, 8, 12), "std": torch.zeros(4, 8, 12)}, "a std is not above 0"),
        ({"mean": torch.full((4, 8, 12), torch.nan), "std": torch.ones(4, 8, 12)}, "not all finite"),
        ({"mean": torch.zeros(3, 8, 12), "std": torch.ones(3, 8, 12)}, r"\(3, 8, 12\), not \(4,\)"),
        ({"mean": torch.zeros(4, 96), "std": torch.ones(4, 96)}, r"\(4, 96\), not \(4,\)"),
        ({"mean": torch.zeros(4, 8, 12)}, "std"),
        (b"no tensors", "holds no statistics of these latents"),
    ],
)
def test_damaged_statistics_of_elements(elements, tmp_path, tensors, words):
    elements[0].save_pretrained(tmp_path)
    file = tmp_path / "latent_statistics.safetensors"
    file.write_bytes(tensors) if isinstance(tensors, bytes) else save_file(tensors, file)
    with pytest.raises(LatelierError, match=words) as error:
        Codec.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_weights_of_half_precision(tokenizers, kind, dtype, tmp_path):
    full = Codec(tokenizers[kind], torch.zeros(4), torch.full((4,), 0.5))
    full.save_pretrained(tmp_path)
    half = Codec.from_pretrained(tmp_path, torch_dtype=dtype)
    assert half.dtype == dtype
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    z = full.encode(images)
    found, decoded = half.encode(images), half.decode(z)
    assert found.dtype == decoded.dtype == torch.float32
    torch.testing.assert_close(found, z, atol=0.03, rtol=0.02)
    if kind == "kl":  # rounding may choose another code
        torch.testing.assert_close(decoded, full.decode(z), atol=0.03, rtol=0.02)


class Pairs(nn.Module):
    """Anybody's autoencoder: shuffles pixels in [0, 1], after a gain."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0))

    def encode(self, x):
        assert 0 <= x.min() <= x.max() <= 1
        return pixel_unshuffle(x * self.gain, 2)

    def paint(self, z):
        return pixel_shuffle(z / self.gain, 2)


def wrapped(module=None, **options):
    module = module or Pairs()
    return Codec.wrap(module, **{"decode": "paint", "factor": 2, "channels": 12, "value_range": (0, 1), **options})


def test_any_module_is_a_codec():
    module, images = Pairs(), torch.rand(2, 3, 8, 12) * 2 - 1
    named, functions = wrapped(module), wrapped(module, encode=lambda x: module.encode(x), decode=module.paint)
    for codec in (named, functions):
        z = codec.encode(images)
        torch.testing.assert_close(z, pixel_unshuffle((images + 1) / 2 * 2, 2))
        torch.testing.assert_close(codec.decode(z), images)
        torch.testing.assert_close(decode_tiled(codec, encode_tiled(codec, images, 4, 2), 4, 2), images)
        assert count_cost(codec, 8, 8).parameters == 1
    before = named.hash()
    module.gain.data += 1
    assert named.hash() != before
    row = wrapped(
        encode=lambda x: module.encode(x).flatten(2), decode=lambda z: module.paint(z.unflatten(2, (4, 6))),
        latent_tokens=24, decoder_size=(8, 12),
    )  # fmt: skip
    assert row.encode(images).shape == (2, 12, 24)
    torch.testing.assert_close(row.decode(row.encode(images)), images)


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (lambda codec, folder: codec.save_pretrained(folder), "Pairs has no save_pretrained, so its codec cannot be"),
        (lambda codec, _: wrapped(decode="unknown"), "Pairs has no method 'unknown'; name another"),
        (lambda codec, _: wrapped(channels=3).encode(torch.zeros(1, 3, 4, 4)), r"shape \(12, 2, 2\), not \(3, 2, 2\)"),
        (lambda codec, _: wrapped(factor=0), "factor = 0 is not allowed"),
    ],
)
def test_what_a_wrapped_module_cannot(use, words, tmp_path):
    with pytest.raises(LatelierError, match=words):
        use(wrapped(), tmp_path)


def test_a_wrapped_model_of_diffusers_is_saved(tokenizers, tmp_path):
    codec = Codec.wrap(tokenizers["kl"], factor=2, channels=4, mean=torch.ones(4), std=torch.ones(4) * 2)
    codec.save_pretrained(tmp_path)
    images = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(Codec.from_pretrained(tmp_path).encode(images), codec.encode(images))


def test_run_folders_and_subfolders_open(tokenizers, tmp_path):
    tokenizers["kl"].save_pretrained(tmp_path / "run" / "tokenizer")
    tokenizers["vq"].save_pretrained(tmp_path / "run" / "vae")
    for section, kind in (({}, "kl"), ({"subfolder": "vae"}, "vq")):
        recipe = PretrainedSection(kind="pretrained", path=str(tmp_path / "run"), **section)
        for codec in (Codec.from_pretrained(tmp_path / "run", **section), open_pretrained(recipe)):
            assert type(codec.tokenizer) is type(tokenizers[kind])
