"""Converters beyond the goldens: wrappers, prefixes, files, and names that do not fit."""

import pytest
import torch
from safetensors.torch import save_file

from latelier.convert import from_official, read_checkpoint
from latelier.convert.vmae import RENAMED
from latelier.tokenizers.vmae import VMAE
from tiny import refused

SMALL = {"dim": 32, "depth": 2, "heads": 2, "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}


@pytest.fixture
def official():
    """A VMAE's weights under the official names."""
    weights = VMAE((32, 32), **SMALL).state_dict()
    back = {"head.": "decoder_pred.linear_pred.", "smoother.": "decoder_pred.conv_smoother."}
    back["patch_embed."] = "patch_embed.proj."
    result = {}
    for name, tensor in weights.items():
        old = next((b for b in back if name.startswith(b)), None)
        result[back[old] + name[len(old) :] if old else name] = tensor
    result["patch_embed.proj.weight"] = result["patch_embed.proj.weight"].view(32, 3, 8, 8)
    assert set(RENAMED) >= set(back.values())
    return result


def test_prefixes_and_training_leftovers(official):
    wrapped = {f"module._orig_mod.{k}": v for k, v in official.items()}
    wrapped["module.perceptual_loss.net.weight"] = torch.zeros(1)
    model = from_official("vmae", wrapped, heads=2, base="ignored").model
    assert torch.equal(model.to_latent.weight, official["to_latent.weight"])
    assert model.config["depth"] == 2
    assert not model.training
    del official["mask_token"]  # tuned checkpoints have none
    assert from_official("vmae", official, heads=2).model.mask_token.shape == (1, 1, 32)


@pytest.mark.parametrize("form", ["safetensors", "pth"])
def test_files(official, tmp_path, form):
    path = tmp_path / f"vmae.{form}"
    official = {k: v.contiguous() for k, v in official.items()}
    if form == "safetensors":
        save_file(official, path)
    else:
        worse = {k: v + 1 for k, v in official.items()}
        torch.save({"model": worse, "ema": official, "epoch": 3}, path)
    weights = read_checkpoint(path)
    assert torch.equal(weights["to_latent.bias"], official["to_latent.bias"])


def test_what_does_not_fit(official):
    refused("Unknown checkpoint kind 'vae'; allowed: vmae", from_official, "vae", official)
    refused(r"not a VMAE checkpoint: it has no 'patch_embed.proj.weight'", from_official, "vmae", {})
    refused(r"1 unknown \(extra.weight\)", from_official, "vmae", {**official, "extra.weight": torch.zeros(1)}, heads=2)
    del official["norm.bias"]
    refused(r"1 missing \(norm.bias\)", from_official, "vmae", official, heads=2)
