"""Autoguidance: a weaker model from a run, a pipeline, a denoiser's folder or a snapshot guides a pipeline."""

from functools import partial

import pytest
import torch
from typer.testing import CliRunner

from latelier.cli import app
from latelier.conditioning.condition import ClassConditioner
from latelier.denoisers.ddt import DDT
from latelier.denoisers.dit import DiT
from latelier.diffusion.process import build_process
from latelier.diffusion.sampling import sample_latents
from latelier.opening import open_codec, open_images
from latelier.pipeline import LatentDiffusionPipeline
from latelier.recipe import dump
from latelier.tokenizers.codec import Codec
from latelier.training.denoiser_loop import build_objective, make_pipeline, save_snapshot
from latelier.training.tokenizer_loop import train_tokenizer
from test_ddt import SMALL
from test_dit import randomise
from tiny import autoencoder, refused, tiny_recipe

TOLD = {"classes": [0, 2], "steps": 2, "output_type": "latent", "precision": "fp32", "progress": False}


def model(dim=16, channels=4, classes=True, process=None, seed=0, shift=1.0, codec_seed=1):
    torch.manual_seed(codec_seed)
    codec = Codec(autoencoder(2, channels), torch.zeros(channels), torch.ones(channels))
    torch.manual_seed(seed)
    denoiser = randomise(DiT(channels, (8, 8), dim=dim, depth=1, heads=2))
    conditioner = randomise(ClassConditioner(3, dim)) if classes else None
    process = process or build_process()
    return LatentDiffusionPipeline.build(codec, denoiser, conditioner, process, (16, 16), [], shift)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A strong model's run, with a snapshot, and a weaker one's, which is narrower."""
    folder = tmp_path_factory.mktemp("models")
    strong, weak, early = model(16), model(8, seed=2), model(16, seed=3)
    strong.save_pretrained(folder / "strong" / "pipeline")
    weak.save_pretrained(folder / "weak" / "pipeline")
    early.denoiser.save_pretrained(folder / "strong" / "denoiser" / "snapshots" / "64")
    early.conditioner.save_pretrained(folder / "strong" / "denoiser" / "snapshots" / "64" / "conditioner")
    ddt = randomise(DDT(4, (8, 8), **SMALL))
    ddt.save_pretrained(folder / "plain")  # with no conditioner of its own
    return folder, strong, {"weak": weak, "weak/pipeline": weak, "snapshots/64": early, "plain": ddt}


@pytest.mark.parametrize("name", ["weak", "weak/pipeline", "snapshots/64", "strong/denoiser/snapshots/64", "plain"])
@torch.no_grad()
def test_every_kind_of_folder_guides(models, name):
    folder, strong, guides = models
    pipeline = LatentDiffusionPipeline.from_pretrained(folder / "strong" / "pipeline")
    guide = guides[name.removeprefix("strong/denoiser/")]
    at = name if name.startswith("snapshots") else str(folder / name)
    drawn = pipeline(guide=at, guidance=1.6, guidance_interval=(0.6, 1.0), **TOLD).images

    label = {"label": torch.tensor([0, 2])}
    denoiser, conditioner = (guide, strong.conditioner) if name == "plain" else (guide.denoiser, guide.conditioner)
    at_half = partial(denoiser, condition=conditioner(label))
    cond = strong.conditioner(label)

    def predict(x, t):  # steps at t = 1 and 0.5, of which the interval has the first
        c = strong.denoiser(x, t, cond)
        return c if t[0] < 0.6 else at_half(x, t) + 1.6 * (c - at_half(x, t))

    torch.testing.assert_close(drawn, sample_latents(predict, strong.process.scheduler(2), (4, 8, 8), [0, 1]))
    plain = pipeline(**TOLD).images
    assert not torch.allclose(drawn, plain)
    assert torch.equal(pipeline(guide=at, guidance=1.0, **TOLD).images, plain)


def test_a_guide_must_fit(models, tmp_path):
    folder, strong, _ = models
    others = {
        "channels": (model(channels=8), "has in_channels = 8, but this model has 4"),
        "tokenizer": (model(codec_seed=9), "latents of another tokenizer"),
        "process": (model(process=build_process("ddpm")), "another diffusion process"),
        "unconditional": (model(classes=False), "is conditioned on nothing, but this model on classes"),
    }
    for name, (other, sentence) in others.items():
        other.save_pretrained(tmp_path / name / "pipeline")
        refused(f"sample.guide = .*{name} .*{sentence}", strong, guide=str(tmp_path / name), guidance=2.0, **TOLD)
    randomise(DiT(4, (8, 8), dim=8, depth=1, heads=2)).save_pretrained(tmp_path / "narrow")
    refused("has dim = 8, but this model has 16", strong, guide=tmp_path / "narrow", guidance=2.0, **TOLD)
    randomise(DiT(4, (8,), dim=16, depth=1, heads=2)).save_pretrained(tmp_path / "line")
    refused("for latents of 1 axes", strong, guide=tmp_path / "line", guidance=2.0, **TOLD)
    strong.tokenizer.save_pretrained(tmp_path / "vae")
    refused("AutoencoderKL is not known", strong, guide=tmp_path / "vae", guidance=2.0, **TOLD)
    refused("no trained model in it", strong, guide="nowhere", guidance=2.0, **TOLD)
    both = {"guide": str(folder / "weak"), "guidance": 2.0, "negative_prompts": ["a"]}
    refused("negative_prompts and guide both", strong, **both, **TOLD)


def test_recipe_and_command(tmp_path):
    """A snapshot of the same run guides by `snapshots/<images>`; times are shifted as in training where it is said."""
    process = {"shift": "dimension"}
    recipe = tiny_recipe(
        tmp_path, data={"image_size": 64, "length": 8}, tokenizer={"images": 8, "model": {"latent_channels": 128}},
        denoiser={"snapshots": 2, "process": process, "condition": {"kind": "class", "dropout": 0}},
        sample={"guide": "snapshots/32", "guidance": 2.0},
    )  # fmt: skip
    train_tokenizer(recipe)
    codec, data = open_codec(recipe), open_images(recipe)
    objective = build_objective(recipe, codec, data)
    randomise(objective.denoiser)
    pipeline = make_pipeline(recipe, codec, objective)
    alpha = (128 * 8 * 8 / 4096) ** 0.5
    assert (pipeline.config["shift"], pipeline.process.shift) == (alpha, alpha)
    pipeline.save_pretrained(recipe.folder / "pipeline")
    save_snapshot(recipe.folder, 32, objective, None)
    (recipe.folder / "recipe.yaml").write_text(dump(recipe))
    again = LatentDiffusionPipeline.from_pretrained(recipe.folder / "pipeline")
    given = {"steps": 3, "output_type": "latent", "progress": False, "precision": "fp32"}
    assert torch.equal(again(**given).images, again(**given, shift=alpha).images)
    assert not torch.equal(again(**given).images, again(**given, shift=1.0).images)
    result = CliRunner().invoke(app, ["sample", str(recipe.folder), "--count", "1", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    told = ["sample", str(recipe.folder), "--count", "1", "--guide", "snapshots/9"]
    assert "no trained model in it" in str(CliRunner().invoke(app, told).exception)
    for change, sentence in {"snapshots/33": "keeps weights at 32, 64 images", "other": "cannot be opened"}.items():
        other = recipe.model_copy(update={"sample": recipe.sample.model_copy(update={"guide": change})})
        refused(sentence, build_objective, other, codec, data)
