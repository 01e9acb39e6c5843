"""DC-AE's checkpoints: what is read off names and shapes, and the same images afterwards."""

import os
from pathlib import Path

import pytest
import synth
import torch
from diffusers import AutoencoderDC

import test_goldens
from latelier.convert import from_official
from latelier.tokenizers.codec import Codec
from tiny import refused

GOLDENS = os.environ.get("LATELIER_GOLDENS")
NAMES = {  # of diffusers, and of the original
    "conv1.": "main.conv1.conv.", "conv2.": "main.conv2.conv.", "norm.": "main.conv2.norm.",
    "attn.to_out.": "context_module.main.proj.conv.", "attn.norm_out.": "context_module.main.proj.norm.",
    "attn.to_qkv_multiscale.0.proj_in.": "context_module.main.aggreg.0.0.",
    "attn.to_qkv_multiscale.0.proj_out.": "context_module.main.aggreg.0.1.",
    "conv_out.conv_inverted.": "local_module.main.inverted_conv.conv.",
    "conv_out.conv_depth.": "local_module.main.depth_conv.conv.",
    "conv_out.conv_point.": "local_module.main.point_conv.conv.",
    "conv_out.norm.": "local_module.main.point_conv.norm.",
}  # fmt: skip
FREE = ("scaling_factor", "decoder_conv_act_fn")  # which no weight tells
LEVELS = {"widths": (16, 32, 64), "layers": (0, 1, 1), "blocks": ("ResBlock", "ResBlock", "EfficientViTBlock")}


def small(scales=(), shortcut=True, shuffled=True, first=0, batch=True):
    """A small autoencoder of each layout."""
    both = {"block_out_channels": LEVELS["widths"], "layers_per_block": (first, 1, 1), "block_types": LEVELS["blocks"]}
    torch.manual_seed(0)
    model = AutoencoderDC(
        **{f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in both.items()},
        encoder_qkv_multiscales=((), (), scales), decoder_qkv_multiscales=((), (), scales), latent_channels=8,
        decoder_norm_types=("batch_norm" if batch else "rms_norm",) * 2 + ("rms_norm",),
        decoder_act_fns=("relu" if batch else "silu",) * 2 + ("silu",), encoder_out_shortcut=shortcut,
        decoder_in_shortcut=shortcut, downsample_block_type="pixel_unshuffle" if shuffled else "conv",
        upsample_block_type="pixel_shuffle" if shuffled else "interpolate",
    )  # fmt: skip
    for name, value in model.state_dict().items():
        if "running" in name:
            value.uniform_(0.5, 1.5)
    return model.eval()


def official(model):
    """The weights under the original's names."""
    state, weights = model.state_dict(), {}
    shortcut = model.config["encoder_out_shortcut"]
    ends = {
        "encoder.conv_in.": "encoder.project_in.conv.",
        "encoder.conv_out.": f"encoder.project_out.{'main.' if shortcut else ''}op_list.0.conv.",
        "decoder.conv_in.": f"decoder.project_in.{'main.' if shortcut else ''}conv.",
        "decoder.norm_out.": "decoder.project_out.op_list.0.",
        "decoder.conv_out.": "decoder.project_out.op_list.2.conv.",
    }
    for name, value in state.items():
        end = next((e for e in ends if name.startswith(e)), None)
        if end is not None:
            weights[ends[end] + name[len(end) :]] = value
            continue
        side, _, level, op, rest = name.split(".", 4)
        prefix = f"{side}.stages.{level}.op_list.{op}."
        if rest.startswith(("attn.to_q.", "attn.to_k.", "attn.to_v.")):
            if rest.startswith("attn.to_q."):
                parts = [state[name.replace("to_q", f"to_{x}")] for x in "qkv"]
                weights[prefix + "context_module.main.qkv.conv.weight"] = torch.cat(parts)[:, :, None, None]
            continue
        old = next((n for n in NAMES if rest.startswith(n)), None)
        new = NAMES[old] + rest[len(old) :] if old else f"main.conv.{rest}"  # what is left samples up or down
        weights[prefix + new] = value[:, :, None, None] if new.endswith("proj.conv.weight") else value
    return weights


@pytest.mark.parametrize(
    "layout",
    [{}, {"shortcut": False, "batch": False}, {"scales": (5,), "shuffled": False, "first": 1, "batch": False}],
    ids=["1.0", "1.5", "sana"],
)
@torch.no_grad()
def test_every_layout_gives_the_same_images(layout):
    model = small(**layout)
    weights = official(model)
    converted = from_official("dcae", {f"module.{k}": v for k, v in weights.items()}).model
    ours = {k: v for k, v in converted.config.items() if k[0] != "_" and k not in FREE}
    theirs = {k: model.config[k] for k in ours}
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in ours.items()} == theirs
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    z = model.encode(images).latent
    torch.testing.assert_close(Codec(converted).encode(images), z)
    torch.testing.assert_close(Codec(converted).decode(z), model.decode(z).sample)
    message = r"not a DC-AE checkpoint: it has no 'decoder\.project_out"
    refused(message, from_official, "dcae", {"encoder.weight": torch.zeros(1)})


@pytest.mark.skipif(not GOLDENS, reason="LATELIER_GOLDENS does not name the folder of goldens; half a billion weights")
@pytest.mark.parametrize("name", ["dcae_f32c32_in_1_0", "dcae_f32c128_1_5", "dcae_f64c128_1_5"])
@torch.no_grad()
def test_the_originals_numbers(name, monkeypatch):
    monkeypatch.setattr(test_goldens, "FOLDER", Path(GOLDENS))
    golden = test_goldens.Golden(name, "dcae")
    codec = Codec(golden.converted.model)
    z = codec.encode(synth.synthetic_images(1, 256, 70))
    golden.check("latent", z)
    golden.check("decode", codec.decode(z))
    golden.check("decode_noise", codec.decode(golden.normal(golden.inputs["noise_latent"])))
    for length in (16, 64):
        if f"decode_first{length}" in golden.arrays:
            golden.check(f"latent_first{length}", z[:, :length])
            golden.check(f"decode_first{length}", codec.decode(z, channels=length))
