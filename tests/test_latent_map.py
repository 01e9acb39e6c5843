"""Maps of latents: where points come to lie, which colours they have, and that a run draws one."""

import json

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from latelier import run
from latelier.analysis import difficulty, latent_map
from latelier.analysis.latent_map import NO_LABEL, class_colours, draw_latent_map, principal_map
from latelier.analysis.sample import collect
from latelier.errors import LatelierError
from latelier.evaluate import same_images, two_sides
from latelier.images import make_grid, save_png
from latelier.opening import open_images
from latelier.recipe import build_recipe
from latelier.report.figures import COLOURS
from latelier.study import inspect as inspection
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.conv import IdentityTokenizer
from tiny import tiny_recipe


@pytest.fixture(autouse=True)
def _without_umap(monkeypatch):
    monkeypatch.setattr(latent_map, "find_spec", lambda name: None)


def two_clouds(count=60):
    """Images around -1 (class 0) and +1 (class 1)."""
    labels = torch.arange(count) % 2
    noise = 0.1 * torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return (labels * 2.0 - 1)[:, None, None, None] + noise, labels


def colours_of(path):
    """Which share of the pixels is near each colour."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"), np.float32) / 255  # (h, w, 3)
    return lambda colour: float((np.abs(pixels - to_rgb(colour)).max(-1) < 0.12).mean())


def width(path):
    with Image.open(path) as image:
        return image.width


def draw(path, labels="given", names=("cats", "dogs"), flat=False):
    images, own = two_clouds()
    batch = {"image": images} | ({"label": own if labels == "given" else labels} if labels is not None else {})
    draw_latent_map(collect(Codec(IdentityTokenizer()), [batch], 60), names).save(path)
    return colours_of(path)


def test_both_classes_are_on_the_map_and_in_the_legend(tmp_path):
    share = draw(tmp_path / "map.png")
    assert min(share(COLOURS[0]), share(COLOURS[1])) > 1e-3
    assert share(COLOURS[2]) == 0
    draw(tmp_path / "again.png")
    assert (tmp_path / "map.png").read_bytes() == (tmp_path / "again.png").read_bytes()


def test_images_without_labels_and_of_many_classes(tmp_path):
    share = draw(tmp_path / "plain.png", labels=None, names=None)
    assert share(COLOURS[0]) > 1e-3
    assert share(COLOURS[1]) == 0
    some = torch.where(torch.arange(60) < 30, -1, 0)
    assert draw(tmp_path / "some.png", labels=some)(NO_LABEL) > 1e-3
    many = class_colours(np.arange(-1, 40))
    assert len(set(many.values())) == len(many) == 40
    assert len(set(class_colours(np.arange(12)).values())) == 12
    draw(tmp_path / "many.png", labels=torch.arange(60) % 20, names=None)
    assert width(tmp_path / "many.png") == 1120


def test_principal_components_keep_distances():
    x = torch.zeros(40, 5).numpy()
    x[:20, 3], x[:, 1] = 8, np.tile([0, 1], 20)
    points = principal_map(x, 0)
    assert np.linalg.norm(points[0] - points[20]) == pytest.approx(8, abs=1e-4)
    assert np.linalg.norm(points[0] - points[1]) == pytest.approx(1, abs=1e-4)
    assert not principal_map(np.ones((4, 3), np.float32), 0).any()
    assert principal_map(np.arange(4, dtype=np.float32)[:, None], 0)[:, 1].tolist() == [0] * 4


def test_umap_stands_beside_them_when_installed(tmp_path, monkeypatch, capsys):
    draw(tmp_path / "alone.png")
    assert "pip install 'latelier[umap]'" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setattr(latent_map, "find_spec", lambda name: object())
    monkeypatch.setattr(latent_map, "neighbour_map", principal_map)
    draw(tmp_path / "both.png")
    assert width(tmp_path / "both.png") > 1.5 * width(tmp_path / "alone.png")
    assert "pip install" not in capsys.readouterr().err


def test_nothing_to_draw():
    pixels_of = Codec(IdentityTokenizer(), torch.zeros(3), torch.ones(3))
    with pytest.raises(LatelierError, match="at least 3 images, not 2"):
        draw_latent_map(collect(pixels_of, [{"image": torch.rand(2, 3, 4, 4)}], 2))
    with pytest.raises(LatelierError, match="not finite"):
        draw_latent_map(collect(pixels_of, [{"image": torch.full((4, 3, 4, 4), torch.nan)}], 4))


# -- in a run ---------------------------------------------------------------------------------------------------------

NEW = ["gmm", "probe", "spectrum", "map", "difficulty"]
NAMES = {"gmm-nll@1", "gmm-nll@2", "gmm-modes", "probe-accuracy", "knn-accuracy", "effective-rank", "diffusion-loss"}


def pixels(folder, evaluate):
    """A recipe whose latents are the pixels."""
    data = {"source": "emoji", "image_size": 8, "length": 200}
    tokenizer = {"kind": "identity"}
    return build_recipe(
        {"name": "tiny", "runs": str(folder), "data": data, "tokenizer": tokenizer, "evaluate": evaluate}
    )


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(difficulty, "STEPS", 3)


def test_a_recipe_asks_for_all_of_them(tmp_path, short):
    evaluate = {"metrics": NEW, "samples": 64, "probe_samples": 96, "modes": [1, 2]}
    recipe = pixels(tmp_path, evaluate)
    run.complete(recipe)
    entries = json.loads((recipe.folder / "metrics.json").read_text())["latent space"]
    assert set(entries) >= NAMES
    about = entries["diffusion-loss"]["receipt"]
    assert (about["n_train"], about["learnt_from"]) == (96, "emoji, training images")
    page = (recipe.folder / "report.html").read_text()
    assert "<h2>Latent space</h2>" in page
    assert "One point for each image (emoji, held out): its latents" in page
    assert "GMM negative log-likelihood over number of modes" in page


@pytest.fixture
def folder_of_images(tmp_path):
    for i in range(80):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        save_png(make_grid((torch.rand(1, 3, 8, 8) - 0.5) + (i % 2)), path)
    return tmp_path / "images"


def test_inspected_images_are_divided(tmp_path, short, folder_of_images):
    recipe = pixels(tmp_path, {"metrics": []})
    run.complete(recipe)
    options = [f"evaluate.metrics=[{','.join(NEW)}]", "evaluate.modes=[1,2]"]
    out = tmp_path / "inspected"
    inspection.inspect(str(recipe.folder), str(folder_of_images), 8, 80, out, options)
    about = json.loads((out / "metrics.json").read_text())["latent space"]["diffusion-loss"]["receipt"]
    assert about["n"] + about["n_train"] == 80
    assert "half of the same images" in about["learnt_from"]
    assert (out / "latent-map.png").is_file()


def test_no_image_is_on_both_sides(tmp_path, folder_of_images):
    source = str(folder_of_images)
    data = {"source": source, "val_source": source, "image_size": 8, "length": 40}
    recipe = tiny_recipe(tmp_path, data=data, evaluate={"samples": 80})
    held_out = open_images(recipe, "val")
    assert same_images(recipe, held_out)  # though of the training images only 40 are used
    codec = Codec(IdentityTokenizer())
    sample = collect(codec, held_out.once(16, limit=20), 20)
    learn, rest, about = two_sides(recipe, codec, held_out, sample)
    assert sorted(torch.cat([learn.index, rest.index]).tolist()) == list(range(80))
    assert 25 <= len(learn) <= 55
    assert len(learn.labels) == len(learn.mean) == sum(learn.sizes) == len(learn)
    again, *_ = two_sides(recipe, codec, held_out, sample[:0])
    assert torch.equal(learn.index, again.index)
    assert torch.equal(learn.mean, again.mean)  # whether or not some were encoded before
    assert "half" in about["learnt_from"]
    parted = tiny_recipe(tmp_path, data={"source": source, "image_size": 8, "val_fraction": 0.25})
    assert not same_images(parted, open_images(parted, "val"))
