"""Shared by all tests: few threads, no network, nothing left behind."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "golden"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LATELIER_CACHE", str(tmp_path / "latelier-cache"))  # never the home folder


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """A ViT of 16 patches of 6 x 6 pixels and two blocks, as `save_pretrained` leaves it."""
    from transformers import ViTConfig, ViTModel

    folder = tmp_path_factory.mktemp("teacher") / "tiny-vit"
    torch.manual_seed(5)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=24, patch_size=6
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def dinov2(tmp_path_factory):
    """A DINOv2 of two blocks for 16 patches of 7 x 7 pixels, with random norms and biases too."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(2)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = Dinov2Model(Dinov2Config(image_size=28, patch_size=7, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.3 if parameter.ndim > 1 else 1.0))
    folder = tmp_path_factory.mktemp("dinov2")
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def fp32(monkeypatch):
    """Teachers in float32, on every machine."""
    from latelier.losses import teachers

    monkeypatch.setattr(teachers, "fast_bf16", lambda device: False)
