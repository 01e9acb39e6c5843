"""A tokenizer and a denoiser are a file and a line: added at run time, built, trained, saved and opened."""

import sys
from types import ModuleType
from typing import Literal

import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderTiny, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from torch import nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from latelier.denoisers import DENOISERS, build_denoiser, vector_width
from latelier.denoisers.objective import DenoiserSection
from latelier.errors import LatelierError
from latelier.losses.reconstruction import ReconstructionLoss
from latelier.losses.terms import LossTerms
from latelier.recipe import build_recipe, dump, load_recipe
from latelier.sections import Kind, TrainedTokenizer
from latelier.tokenizers import TOKENIZERS, TokenizerInfo, build_tokenizer, freeze, last_layer, tokenizer_info
from latelier.tokenizers.codec import Codec
from latelier.training.tokenizer_loop import train_tokenizer
from tiny import refused, tiny_recipe


class Shuffle(ModelMixin, ConfigMixin):
    """Pixels into channels, mixed by a convolution that may learn."""

    @register_to_config
    def __init__(self, patch: int = 4, channels: int = 3):
        super().__init__()
        self.mix, self.unmix = (nn.Conv2d(channels * patch**2, channels * patch**2, 1) for _ in range(2))

    @property
    def info(self) -> TokenizerInfo:
        patch, channels = self.config["patch"], self.config["channels"]
        return TokenizerInfo(
            patch, channels * patch**2, channels, decoder_modules=("unmix",), last_layer="unmix.weight"
        )

    def encode(self, images):
        return VQEncoderOutput(latents=self.mix(pixel_unshuffle(images, self.config["patch"])))

    def decode(self, z):
        return DecoderOutput(sample=pixel_shuffle(self.unmix(z), self.config["patch"]))


class ShuffleSection(Kind):
    kind: Literal["shuffle"]
    patch: int = 2


class LearnedShuffleSection(TrainedTokenizer):
    kind: Literal["learned-shuffle"]
    preset: str = "none"
    patch: int = 2


class ShuffleObjective(nn.Module):
    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer, self.reconstruction_loss = tokenizer, ReconstructionLoss("l2")

    def forward(self, batch):
        images = batch["image"]
        reconstruction = self.tokenizer.decode(self.tokenizer.encode(images).latents).sample
        losses = self.reconstruction_loss(reconstruction, images, batch["sample_id"])
        return LossTerms(losses, {"l2": 1.0}, reconstruction=reconstruction)


class ScaleSection(DenoiserSection):
    kind: Literal["scale"]
    gain: float = 1.0


class Scale(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, gain: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(gain))

    def forward(self, x_t, t, condition=None):
        return self.weight * x_t


@pytest.fixture(autouse=True)
def _plugins(monkeypatch):
    tokenizers, denoisers = ModuleType("my_tokenizers"), ModuleType("my_denoisers")
    tokenizers.SECTIONS, tokenizers.MODELS = (ShuffleSection, LearnedShuffleSection), (Shuffle,)
    tokenizers.build = lambda section, channels, image_size: Shuffle(section.patch, channels)
    tokenizers.objective = lambda section, tokenizer, perceptual, seed, dataset: ShuffleObjective(tokenizer)
    denoisers.SECTIONS, denoisers.vector_width = (ScaleSection,), lambda section: 7
    denoisers.build = lambda section, latent_shape, token_width, spatial_channels, vector: Scale(section.gain)
    monkeypatch.setitem(sys.modules, "my_tokenizers", tokenizers)
    monkeypatch.setitem(sys.modules, "my_denoisers", denoisers)
    monkeypatch.setitem(TOKENIZERS, "shuffle", "my_tokenizers")
    monkeypatch.setitem(TOKENIZERS, "learned-shuffle", "my_tokenizers")
    monkeypatch.setitem(DENOISERS, "scale", "my_denoisers")


@pytest.mark.parametrize("kind", ["shuffle", "learned-shuffle"])
def test_a_tokenizer_added_at_run_time(tmp_path, kind):
    tree = tiny_recipe(tmp_path, denoiser=None).model_dump()
    tree["tokenizer"] = {"kind": kind, "patch": 4}
    if kind == "learned-shuffle":
        tree["tokenizer"] |= {"images": 16, "batch": 8, "perceptual_weight": 0, "train": "decoder"}
    recipe = build_recipe(tree)
    torch.manual_seed(recipe.seed)
    fresh = build_tokenizer(recipe.tokenizer, recipe.data)
    codec = Codec.from_pretrained(train_tokenizer(recipe))
    assert isinstance(codec.tokenizer, Shuffle)
    assert (codec.factor, codec.latent_shape(32, 32), codec.std.shape) == (4, (48, 8, 8), (48,))
    assert torch.equal(codec.tokenizer.mix.weight, fresh.mix.weight) == (kind == "learned-shuffle")
    assert not torch.equal(codec.tokenizer.unmix.weight, fresh.unmix.weight) or kind == "shuffle"
    path = tmp_path / "again.yaml"
    path.write_text(dump(recipe))
    assert load_recipe(path) == recipe
    with pytest.raises(LatelierError, match=r"Unknown key 'tokenizer\.pach' in the recipe; did you mean 'patch'"):
        build_recipe({**tree, "tokenizer": {"kind": kind, "pach": 4}})


def test_a_denoiser_added_at_run_time(tmp_path):
    tree = tiny_recipe(tmp_path).model_dump()
    section = build_recipe({**tree, "denoiser": {"kind": "scale", "gain": 3}}).denoiser
    assert (vector_width(section), build_denoiser(section, (4, 8, 8)).weight.item()) == (7, 3)
    refused(r"denoiser\.gain = 'x' is not allowed", build_recipe, {**tree, "denoiser": {"kind": "scale", "gain": "x"}})


@pytest.mark.parametrize(
    "model",
    [
        AutoencoderTiny(latent_channels=4),
        AsymmetricAutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 2, down_block_out_channels=[8, 8], norm_num_groups=4,
            up_block_types=["UpDecoderBlock2D"] * 2, up_block_out_channels=[8, 8],
        ),
    ],
    ids=["tiny", "asymmetric"],
)  # fmt: skip
@torch.no_grad()
def test_entries_of_diffusers_classes_are_what_the_models_do(model):
    codec, images = Codec(model.eval()), torch.zeros(1, 3, 32, 32)
    latents = codec.encode(images)
    assert latents.shape[1:] == codec.latent_shape(32, 32)
    assert codec.decode(latents).shape == images.shape
    freeze(model, "decoder")
    learning = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert learning == set(tokenizer_info(model).decoder_modules)


def test_a_class_without_an_entry_is_refused():
    refused(
        "Linear is no image tokenizer that can be opened: it has no property `info`", tokenizer_info, nn.Linear(1, 1)
    )
    refused("AutoencoderTiny does not say its last layer", last_layer, AutoencoderTiny(latent_channels=4))
