"""Inspections: of what is in files and in memory, and where they may write."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

import latelier
from latelier.errors import LatelierError
from latelier.evaluation.reconstruction import psnr
from latelier.images import make_grid, round_to_8_bit, save_png
from latelier.study.inspect import inspect
from latelier.tokenizers.codec import Codec

KL = {
    "block_out_channels": [4, 8], "down_block_types": ["DownEncoderBlock2D"] * 2, "norm_num_groups": 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2, "latent_channels": 4,
}  # fmt: skip


@pytest.fixture
def weights(tmp_path):
    """`model/tokenizer`, without a recipe beside it."""
    folder = tmp_path / "model" / "tokenizer"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("out", [".", "tokenizer", "tokenizer/inspection", ".."])
@pytest.mark.parametrize("given", ["model", "model/tokenizer"])
def test_the_inspected_tokenizer_is_left_alone(weights, tmp_path, given, out):
    with pytest.raises(LatelierError, match=r"would overwrite .*, which is to be inspected; choose another one"):
        inspect(str(tmp_path / given), "emoji", 8, 4, weights.parent / out, [])
    assert (weights / "config.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["tokenizer/config.json", "metrics.json", "report.html"])
def test_files_of_somebody_else_are_left_alone(weights, tmp_path, name):
    file = tmp_path / "mine" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(LatelierError, match=rf"has files that no inspection wrote \({name.partition('/')[0]}\)"):
        inspect(str(weights), "emoji", 8, 4, tmp_path / "mine", [])
    assert file.read_text() == "mine"


@pytest.fixture(scope="module")
def toy():
    """A codec that was never in a file, in training mode, and images that are no levels of 8 bits."""
    torch.manual_seed(0)
    return Codec.wrap(AutoencoderKL(**KL), factor=2, channels=4), torch.rand(12, 3, 16, 16) * 2 - 1


def test_codecs_and_tensors_are_inspected(toy, tmp_path):
    codec, images = toy
    codec.tokenizer.train()
    options = ["evaluate.metrics=[psnr,spectrum,posterior,channels]"]
    found = latelier.inspect(codec, images, samples=12, out=tmp_path / "kept", options=options)
    assert all(module.training for module in codec.tokenizer.modules())
    receipt = found["reconstruction"]["psnr"]["receipt"]
    assert (receipt["n"], receipt["reference"]) == (12, "images in memory")
    codec.tokenizer.eval()
    with torch.no_grad():
        pairs = codec.decode(codec.encode(images)).clamp(-1, 1), images
    assert found["reconstruction"]["psnr"]["value"] == pytest.approx(psnr(*pairs).mean().item(), abs=0.02)
    assert found == json.loads((tmp_path / "kept" / "metrics.json").read_text())
    assert {"report.html", "verdict.json", "recipe.yaml"} <= {file.name for file in (tmp_path / "kept").iterdir()}
    assert not (tmp_path / "kept" / "tokenizer").exists()


def test_label_maps_and_spectra_of_scenes(toy, tmp_path):
    codec, _ = toy
    options = ["evaluate.metrics=[structure,neighbours,frequency,text]", "data.length=48", "data.val_fraction=0.5"]
    found = latelier.inspect(codec, "scenes", 32, 24, tmp_path / "kept", options)["latent space"]
    assert {"structure-srss", "structure-lds", "neighbours-10", "high-frequency", "text@6", "text"} <= set(found)
    assert 0 < found["structure-srss"]["receipt"]["n"] <= 24
    assert "label map" in found["neighbours-10"]["receipt"]["positions"]
    assert found["text"]["receipt"]["reference"] == "rendered letters and digits"
    assert (tmp_path / "kept" / "spectrum.png").is_file()
    assert "Latents beside images of the same size" in (tmp_path / "kept" / "report.html").read_text()


def test_memory_and_files_give_the_same_numbers(toy, tmp_path):
    codec, images = toy
    codec.tokenizer.eval()
    codec.save_pretrained(tmp_path / "run" / "tokenizer")
    for i, image in enumerate(images):
        save_png(make_grid(image[None], columns=1, padding=0), tmp_path / "images" / f"{i:02d}.png")
    asked = {"samples": 12, "options": ["evaluate.metrics=[psnr,spectrum]", "data.workers=0"]}
    one = latelier.inspect(codec, tmp_path / "images", 16, **asked)
    two = latelier.inspect(tmp_path / "run", round_to_8_bit(images), **asked)
    for section, name in (("reconstruction", "psnr"), ("latent space", "effective-rank")):
        assert one[section][name]["value"] == pytest.approx(two[section][name]["value"], rel=1e-4)


def test_the_documentation_runs():
    page = (Path(__file__).parents[1] / "docs" / "autoencoders.md").read_text()
    namespace = {}
    for code in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[1:]:  # the first needs the Hub
        exec(compile(code, "docs/autoencoders.md", "exec"), namespace)
    assert [run["name"] for run in namespace["both"]["runs"]] == ["mine", "wider"]
    psnrs = [run["metrics"]["psnr"]["value"] for run in namespace["both"]["runs"]]
    assert psnrs[0] == pytest.approx(namespace["metrics"]["reconstruction"]["psnr"]["value"])
    assert psnrs[0] != psnrs[1]  # another range of values


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(3, 8, 8), r"shape \(3, 8, 8\) and float32; give floats \(n, c, h, w\)"),
        (torch.full((1, 3, 8, 8), 2.0), r"values from 2 to 2; give them in \[-1, 1\]"),
        (torch.full((1, 3, 8, 8), torch.nan), r"values from nan to nan"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "and uint8; give floats"),
        (torch.zeros(2, 1, 8, 8), "The images have 1 channels, but the tokenizer takes 3"),
        (torch.zeros(2, 3, 8, 9), "8 x 9 is not divisible by the tokenizer's factor 2"),
        ("no/such/images", "no/such/images"),
    ],
)
def test_images_that_cannot_be_inspected(toy, images, words):
    with pytest.raises(LatelierError, match=words) as error:
        latelier.inspect(toy[0], images, 8)
    assert "\n" not in str(error.value)
