"""Whole checkpoints of latent diffusion become pipelines; what is trained here opens in plain diffusers."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, VQModel

from latelier.convert import from_official, read_checkpoint
from latelier.denoisers.unet import CrossAttentionUNet
from latelier.errors import LatelierError
from latelier.pipeline import LatentDiffusionPipeline
from latelier.tokenizers.codec import Codec
from latelier.training.denoiser_loop import train_denoiser
from latelier.training.tokenizer_loop import train_tokenizer
from test_ldm_autoencoder import PART, Described, few_groups  # noqa: F401
from test_ldm_unet import PREFIX, official
from tiny import refused, tiny_recipe


def checkpoint(**more):
    """A class-to-image model: VQ autoencoder, U-Net, class embedding, schedule."""
    unet = official(token_width=32)[1]
    first = Described(middle=False, out=3, codes=16).weights
    whole = {f"{PREFIX}{name}": tensor for name, tensor in unet.items()}
    whole |= {f"first_stage_model.{name}": tensor for name, tensor in first.items()}
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
    return {**whole, "cond_stage_model.embedding.weight": torch.randn(4, 32), "betas": betas.float(), **more}


def test_a_pipeline_of_everything(few_groups, tmp_path):  # noqa: F811
    weights = checkpoint(scale_factor=torch.tensor(0.5))
    converted = from_official("ldm", weights, heads=4, classes=3, image_size=8)
    pipeline = converted.pipeline
    assert isinstance(converted.model, CrossAttentionUNet)
    assert pipeline.process.beta_end == pytest.approx(0.0195)
    assert pipeline.codec.std.tolist() == [2.0] * 3  # latents times one half are what the U-Net saw
    pipeline.save_pretrained(tmp_path)
    pipeline = LatentDiffusionPipeline.from_pretrained(tmp_path)
    draw = {"classes": [0, 2], "steps": 2, "progress": False, "output_type": "pt", "precision": "fp32"}
    images = pipeline(**draw).images
    assert images.shape == (2, 3, 16, 16)
    assert torch.equal(images, converted.pipeline(**draw).images)
    assert not torch.equal(images, pipeline(**draw, guidance=3.0).images)


@pytest.mark.parametrize(("channels", "input_name"), [(7, "inpainting"), (6, "low_resolution")])
def test_concatenated_tasks_are_told_by_their_channels(few_groups, channels, input_name):  # noqa: F811
    weights = {k: v for k, v in checkpoint().items() if not k.startswith((PREFIX, "cond_stage_model."))}
    unet = official()[1]
    unet["input_blocks.0.0.weight"] = torch.randn(32, channels, 3, 3) / 10
    weights |= {f"{PREFIX}{name}": tensor for name, tensor in unet.items()}
    pipeline = from_official("ldm", weights, heads=4, image_size=8).pipeline
    image = torch.rand(3, 16, 16) * 2 - 1
    asked = {"inpainting": (image, image[0] > 0), "low_resolution": image[:, :8, :8]}[input_name]
    draw = {"steps": 2, "progress": False, "output_type": "pt", "precision": "fp32"}
    images = pipeline(**{input_name: [asked]}, **draw).images
    assert images.shape == (1, 3, 16, 16)
    unet["input_blocks.0.0.weight"] = torch.randn(32, 9, 3, 3)
    weights |= {f"{PREFIX}{name}": tensor for name, tensor in unet.items()}
    refused("takes 6 channels beside 3 of latents", from_official, "ldm", weights, heads=4, image_size=8)


def test_parts_that_are_missing(few_groups):  # noqa: F811
    weights = checkpoint()
    with pytest.raises(LatelierError, match="no autoencoder"):
        from_official("ldm", {k: v for k, v in weights.items() if not k.startswith("first_stage_model.")}, heads=4)
    refused("'betas'", from_official, "ldm", {k: v for k, v in weights.items() if k != "betas"}, heads=4)
    text = {k: v for k, v in weights.items() if not k.startswith("cond_stage_model.")}
    text["cond_stage_model.transformer.token_emb.weight"] = torch.zeros(9, 32)
    refused("give vocabulary=", from_official, "ldm", text, heads=4)


class Callback:
    """Stands for what PyTorch Lightning leaves in its checkpoints."""

    def __init__(self):
        self.best = {"loss": 0.1}


class Trap:
    """What a hostile checkpoint would run."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return open, (str(self.place), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_lightnings_pickles_are_read_and_nothing_is_run(tmp_path, zipped):
    trap = tmp_path / "sprung"
    tree = {
        "state_dict": {"a": torch.arange(3.0), "b": torch.nn.Parameter(torch.ones(2).half())},
        "callbacks": {Callback: Callback()}, "trap": Trap(trap), "epoch": 3,
    }  # fmt: skip
    torch.save(tree, tmp_path / "model.ckpt", _use_new_zipfile_serialization=zipped)
    weights = read_checkpoint(tmp_path / "model.ckpt")
    assert (weights["a"].tolist(), weights["b"].dtype) == ([0, 1, 2], torch.float16)
    assert not trap.exists()


def test_programs_are_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "model.ckpt"))
    refused("TorchScript", read_checkpoint, tmp_path / "model.ckpt")


@pytest.mark.parametrize("preset", ["kl-f4-small", "vq-f4-small"])
def test_what_is_trained_here_opens_in_plain_diffusers(tmp_path, preset):
    recipe = tiny_recipe(
        tmp_path,
        tokenizer={
            "kind": "conv", "preset": preset, "images": 16, "model": {"block_out_channels": [32, 32, 32]},
            "warmup": 0,
        },
        denoiser={
            "kind": "unet", "size": "tiny", "model": {"block_out_channels": [32, 32, 32]}, "images": 16,
            "condition": {"kind": "class", "dim": 16}, "process": {"kind": "ddpm"},
        },
    )  # fmt: skip
    train_tokenizer(recipe)
    train_denoiser(recipe)
    codec = Codec.from_pretrained(recipe.folder / "tokenizer")
    plain = (AutoencoderKL if preset.startswith("kl") else VQModel).from_pretrained(recipe.folder / "tokenizer")
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        encoded = plain.eval().encode(images)
        raw = encoded.latent_dist.mode() if preset.startswith("kl") else encoded.latents
        torch.testing.assert_close(codec.denormalise(codec.encode(images)), raw, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(codec.decode(codec.encode(images)), plain.decode(raw).sample, rtol=1e-4, atol=1e-4)
        pipeline = LatentDiffusionPipeline.from_pretrained(recipe.folder / "pipeline")
        unet = UNet2DConditionModel.from_pretrained(recipe.folder / "denoiser" / "ema").eval()
        assert json.loads((recipe.folder / "denoiser" / "ema" / "config.json").read_text())["in_channels"] == 3
        x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.9])
        condition = pipeline.conditioner({"label": torch.tensor([0, 1])})
        theirs = unet(x, t * 1000, encoder_hidden_states=condition.tokens).sample
        torch.testing.assert_close(pipeline.denoiser(x, t, condition), theirs, rtol=1e-4, atol=1e-5)
