"""Folders, archives and statistics of anybody's images, against each other."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.image import peak_signal_noise_ratio

from latelier import evaluate
from latelier.evaluation import archives, generation, measure
from latelier.evaluation.archives import Archive, write_images
from latelier.evaluation.distributions import FeatureStatistics, frechet_distance
from latelier.images import to_uint8
from latelier.opening import open_images
from latelier.training.denoiser_loop import train_denoiser
from latelier.training.tokenizer_loop import train_tokenizer
from tiny import colour_extractor, refused, tiny_recipe


def levels(n=12, side=16, seed=0, low=0):
    drawn = torch.randint(low, 256, (n, side, side, 3), generator=torch.Generator().manual_seed(seed))
    return drawn.to(torch.uint8)


def folder(path, images, names=None):
    path.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.numpy()).save(path / f"{names[i] if names else i:03}.png")
    return path


@pytest.fixture
def colours(monkeypatch):
    """Features are mean colours, under whatever name."""

    def extractor(name, device="cpu"):
        found = colour_extractor()
        found.name = name
        return found

    monkeypatch.setattr(generation, "load_extractors", lambda names, device: [extractor(name) for name in names])
    monkeypatch.setattr(measure, "load_extractor", extractor)
    return extractor


def values(found):
    return {one.name: one.value for one in found}


def test_a_folder_is_its_archive(tmp_path, colours):
    ours, theirs = levels(), levels(seed=1, low=100)
    with write_images(tmp_path / "a.npz", labels=range(12)) as add:
        add(ours[:5])
        add(ours[5:])
    assert (np.load(tmp_path / "a.npz")["arr_0"] == ours.numpy()).all()
    assert np.load(tmp_path / "a.npz")["arr_1"].tolist() == [*range(12)]
    np.savez_compressed(tmp_path / "b.npz", theirs.numpy())
    a, b = folder(tmp_path / "a", ours), folder(tmp_path / "b", theirs, [*range(20, 32)])
    sets = [(a, b), (tmp_path / "a.npz", b), (a, tmp_path / "b.npz"), (tmp_path / "a.npz", tmp_path / "b.npz")]
    found = [values(measure.measure(*pair, batch=7)) for pair in sets]
    assert set(found[0]) == {"gfd-vgg16", "kid-vgg16", "precision", "recall"}
    assert found[0]["gfd-vgg16"] > 10
    assert all(each == found[0] for each in found)
    sums = [FeatureStatistics(3), FeatureStatistics(3)]
    for each, images in zip(sums, (ours, theirs)):
        each.update(colours("any")(images.permute(0, 3, 1, 2).float() / 127.5 - 1))
    assert found[0]["gfd-vgg16"] == pytest.approx(sums[0].distance(sums[1]))


def test_names_that_pair_up(tmp_path, colours):
    ours, theirs = levels(), levels(seed=1)
    a, b = folder(tmp_path / "a", ours), folder(tmp_path / "b", theirs)
    found = values(measure.measure(a, b, metrics=["gfd", "psnr", "l1"], batch=5))
    x, y = (images.permute(0, 3, 1, 2).float() for images in (ours, theirs))
    expected = peak_signal_noise_ratio(x, y, 255.0, dim=(1, 2, 3), reduction="none").mean().item()
    assert found["psnr"] == pytest.approx(expected, rel=1e-5)
    assert found["l1"] == pytest.approx((x - y).abs().mean().item() / 127.5, rel=1e-5)
    assert set(found) == {"rfd-vgg16", "psnr", "l1"}


def test_the_statistics_of_a_reference(tmp_path, colours, monkeypatch):
    monkeypatch.setattr(archives, "SIZES", {"mu": (3,), "sigma": (3, 3), "mu_s": (2,), "sigma_s": (2, 2)})
    a, covariance = folder(tmp_path / "a", levels()), np.diag([4.0, 1.0, 9.0])
    np.savez(tmp_path / "reference.npz", mu=np.array([1.0, 2, 3]), sigma=covariance, arr_0=levels(seed=2).numpy())
    found = measure.measure(a, tmp_path / "reference.npz", ["inception"])
    statistics = FeatureStatistics(3)
    statistics.update(colours("any")(levels().permute(0, 3, 1, 2).float() / 127.5 - 1))
    mean, sigma = torch.tensor([1.0, 2, 3]), torch.from_numpy(covariance)
    expected = frechet_distance(statistics.mean, statistics.covariance, mean, sigma)
    assert values(found)["gfd-inception"] == pytest.approx(expected)
    assert set(values(found)) == {"gfd-inception", "precision", "recall"}
    assert len(found[0].receipt["reference_sha256"]) == 64
    one = measure.measure(a, tmp_path / "reference.npz", ["inception"], ["recall"])
    assert [found.name for found in one] == ["recall"]
    asked = (a, tmp_path / "reference.npz", ["inception"], ["kid"])
    refused("'kid' cannot be measured .* allowed: gfd, precision, recall", measure.measure, *asked)
    refused("vgg16", measure.measure, a, tmp_path / "reference.npz")
    refused("statistics and no images", measure.measure, _without_images(tmp_path), a)


def _without_images(tmp_path):
    np.savez(tmp_path / "bare.npz", mu=np.zeros(3), sigma=np.eye(3))
    return tmp_path / "bare.npz"


def test_what_does_not_fit_is_one_sentence(tmp_path, colours):
    a, b = folder(tmp_path / "a", levels()), folder(tmp_path / "b", levels(side=8), [*range(20, 32)])
    refused("use --size", measure.measure, a, b)
    refused(r"differ \(000\)", measure.measure, a, b, metrics=["psnr"], size=8)
    refused("adm-imagenet256, adm-imagenet512", measure.measure, a, b, protocol="adm")
    refused("takes 50,000 images", measure.measure, a, b, protocol="adm-imagenet256")
    refused("'psnrr' cannot be measured", measure.measure, a, a, metrics=["psnrr"])
    refused("neither a folder of images nor an .npz", measure.measure, tmp_path / "nowhere", b)
    for name, arrays in {
        "float": {"arr_0": np.zeros((2, 8, 8, 3))},
        "channels": {"arr_0": np.zeros((2, 3, 8, 8), np.uint8)},
        "other": {"x": np.zeros(2)},
        "half": {"mu": np.zeros(2048)},
        "objects": {"arr_0": np.array([{}], dtype=object)},
    }.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        refused(f"{name}.npz", Archive, tmp_path / f"{name}.npz")
    whole = (tmp_path / "float.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    refused("cut.npz", Archive, tmp_path / "cut.npz")
    refused("no images to write", _nothing, tmp_path)


def _nothing(tmp_path):
    with write_images(tmp_path / "none.npz"):
        pass


def test_samples_of_a_run_as_an_archive(tmp_path, colours, monkeypatch):
    monkeypatch.setattr(evaluate, "load_extractor", colours)
    recipe = tiny_recipe(tmp_path, evaluate={"metrics": ["gfd"], "samples": 10, "batch": 4})
    train_tokenizer(recipe)
    train_denoiser(recipe)
    found = values(evaluate.evaluate(recipe, npz=tmp_path / "samples.npz"))
    stored = np.load(tmp_path / "samples.npz")
    assert stored["arr_0"].shape == (10, 32, 32, 3)
    assert stored["arr_1"].tolist()[:5] == [0, 1, 2, 3, 0]
    batch = next(iter(open_images(recipe).once(10, limit=10, whole=True)))["image"]
    folder(tmp_path / "training", [to_uint8(batch)[i].permute(1, 2, 0) for i in range(10)])
    again = values(measure.measure(tmp_path / "samples.npz", tmp_path / "training", metrics=["gfd"]))
    assert again["gfd-vgg16"] == pytest.approx(found["gfd-vgg16"], rel=1e-5)
