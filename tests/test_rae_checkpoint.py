"""RAE's released decoders, diffusers' AutoencoderRAE in both directions."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import synth
import torch
from diffusers import AutoencoderRAE
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from latelier.cli import app
from latelier.convert import from_official
from latelier.convert.rae import decoder_weights, to_diffusers
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.rae import RAEDecoder, build
from test_goldens import Golden as _Golden
from test_rae import images, section
from tiny import autoencoder, refused

FILE = Path(__file__).parent / "golden" / "rae_decoder_small"
SIZES = {"encoder_hidden_size": 64, "encoder_num_hidden_layers": 2, "decoder_hidden_size": 32,
         "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 48,
         "patch_size": 4}  # fmt: skip


class Golden(_Golden):
    """The decoder's golden, whose weights have no encoder."""

    def __init__(self):
        pairs, _ = synth.read_key_list(f"{FILE}.keys.json")
        self.arrays = np.load(f"{FILE}.npz")
        self.meta = json.loads(bytes(self.arrays["meta"]))
        self.weights = synth.synthetic_state_dict(pairs, self.meta["weight_seed"])
        assert synth.checksum(self.weights) == self.meta["weights_crc32"]

    def input(self, name):
        shape, seed, tag = re.search(r"normal\((\(.*?\)), (\d+), '(.*?)'\)", self.meta["inputs"][name]).groups()
        return torch.from_numpy(synth.normal(tuple(json.loads(f"[{shape[1:-1]}]")), int(seed), tag))


@pytest.fixture(scope="module")
def golden():
    return Golden()


@torch.no_grad()
def test_the_decoder_is_the_originals(golden):
    decoder = RAEDecoder(48, 3, (4, 4), 16, 64, 3, 4, 160)
    assert not any(decoder.load_state_dict(decoder_weights(golden.weights)))
    golden.check("pixels", decoder(golden.input("z")))
    golden.check("pixels_2x2", decoder(golden.input("z2"), (4, 4)))  # the original keeps its size


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A DINOv2 with registers, 48 wide, and one as diffusers builds it, 64 wide."""
    folder = tmp_path_factory.mktemp("encoders")
    for width, heads, side, ratio in ((48, 3, 56, 2), (64, 1, 518, 4)):
        config = Dinov2WithRegistersConfig(hidden_size=width, num_hidden_layers=2, num_attention_heads=heads,
                                           mlp_ratio=ratio, image_size=side, patch_size=14)  # fmt: skip
        torch.manual_seed(width)
        Dinov2WithRegistersModel(config).save_pretrained(folder / str(width))
    return folder


@torch.no_grad()
def test_an_official_checkpoint_becomes_a_codec(golden, encoder, tmp_path, capsys):
    """With the statistics of stat.pt, by the command, and its images are the original's."""
    table = torch.zeros(1, 17, 64)
    torch.save({**golden.weights, "decoder_pos_embed": table}, tmp_path / "model.pt")
    mean, var = 0.5 * golden.input("mean"), 0.2 + golden.input("var").abs()
    torch.save({"mean": mean, "var": var}, tmp_path / "stat.pt")
    options = [f"encoder={encoder / '48'}", f"stat={tmp_path / 'stat.pt'}", "heads=4"]
    words = ["convert", "rae", str(tmp_path / "model.pt"), str(tmp_path / "out")]
    app([*words, *(word for option in options for word in ("--set", option))], standalone_mode=False)
    assert "RAE" in capsys.readouterr().out
    codec = Codec.from_pretrained(tmp_path / "out")
    assert codec.latent_shape(64, 64) == (48, 4, 4)
    golden.check("image", (codec.decode(golden.input("z")) + 1) / 2)
    torch.testing.assert_close(codec.std, (var + 1e-5).sqrt())

    name = str(encoder / "48")
    refused("holds the decoder only; name its encoder", from_official, "rae", golden.weights)
    refused("width 64 is of no released size", from_official, "rae", golden.weights, encoder=name)
    refused("not a RAE checkpoint: it has no 'decoder_embed.weight'", from_official, "rae", {}, encoder=name)
    torch.save({"mean": mean[:3], "var": var[:3]}, tmp_path / "bad.pt")
    refused(r"bad.pt holds no statistics of these latents", from_official, "rae", golden.weights, encoder=name,
            heads=4, stat=str(tmp_path / "bad.pt"))  # fmt: skip


@torch.no_grad()
def test_we_open_diffusers_folders(tmp_path):
    torch.manual_seed(2)
    mean, std = torch.randn(64, 16, 16), torch.rand(64, 16, 16) + 0.5
    theirs = AutoencoderRAE(**SIZES, encoder_input_size=224, latents_mean=mean, latents_std=std).eval()
    theirs.save_pretrained(tmp_path)
    codec, x = Codec.from_pretrained(tmp_path), images(size=64)
    z = theirs.encode((x + 1) / 2).latent
    torch.testing.assert_close(codec.encode(x), z)
    torch.testing.assert_close(codec.decode(z), 2 * theirs.decode(z).sample - 1)  # 16 x 16: its positions are right
    refused("decodes to 64 x 64 pixels, whatever the size of the image, here 32 x 32", codec.encode, images(size=32))


@pytest.mark.parametrize("grid", [16, 4])
@torch.no_grad()
def test_diffusers_opens_ours(encoder, tmp_path, capsys, grid):
    model = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2, "decoder_hidden": 48, "patch_size": 4}
    side = 4 * grid
    rae = build(section(encoder / "64", model=model), 3, (side, side)).eval()
    mean, std = torch.randn(64, grid, grid), torch.rand(64, grid, grid) + 0.5
    ours, x = Codec(rae, mean, std), images(size=side)
    exported = to_diffusers(ours)
    exported.save_pretrained(tmp_path)
    assert ("wrong positions" in capsys.readouterr().err) is (grid != 16)
    theirs, z = AutoencoderRAE.from_pretrained(tmp_path).eval(), ours.encode(x)
    torch.testing.assert_close(theirs.encode((x + 1) / 2).latent, z, rtol=1e-4, atol=1e-4)
    decoded = ours.decode(z)
    assert torch.allclose(2 * theirs.decode(z).sample - 1, decoded, atol=1e-4) is (grid == 16)
    torch.testing.assert_close(Codec.from_pretrained(tmp_path).decode(z), decoded, rtol=1e-4, atol=1e-4)


def test_what_is_no_autoencoder_rae(encoder, teacher, tmp_path):
    refused("AutoencoderKL is no RAE", to_diffusers, Codec(autoencoder()))
    refused(
        "square images; .*tiny-vit with layers = 1 is another",
        to_diffusers,
        Codec(build(section(teacher), 3, (32, 32))),
    )
    two = Codec(build(section(encoder / "64", layers=2), 3, (32, 32)))
    refused("with layers = 2 is another", to_diffusers, two)
    other = Dinov2WithRegistersConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=4, image_size=518, patch_size=14
    )
    Dinov2WithRegistersModel(other).save_pretrained(tmp_path)
    refused("num_attention_heads = 2, and diffusers' 1", to_diffusers, Codec(build(section(tmp_path), 3, (32, 32))))
