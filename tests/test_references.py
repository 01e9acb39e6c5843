"""Sets of features and the cache of reference images: kept, found again, and distrusted when damaged."""

import json

import pytest
import torch

from latelier.errors import LatelierError
from latelier.evaluation import references
from latelier.evaluation.reconstruction import evaluate_reconstruction
from latelier.evaluation.references import FeatureCollector, FeatureSet, cache_folder, reference_key, reference_sets
from latelier.opening import open_images
from latelier.recipe import Evaluate
from latelier.tokenizers.codec import Codec
from test_reconstruction import Shifted
from tiny import colour_extractor, refused, tiny_recipe

KEY = {"data": "f00", "shape": [3, 8, 8], "crop": "center", "background": "white", "n": 60}
KEPT = ("features", "vectors")


def make_images(n=60, seed=0):
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def gather(batches, key=KEY, kept=KEPT, **changes):
    extractor = colour_extractor()
    for name, value in changes.items():
        setattr(extractor, name, value)
    return reference_sets([FeatureCollector(extractor, kept)], batches, key, shared=False)["colour"]


def test_a_second_pass_is_not_made():
    first = gather(make_images().split(16))
    second = gather([])  # where there is nothing to read
    assert first.n == second.n == 60
    assert torch.equal(first.vectors, second.vectors)
    assert second.sums["features"].distance(first.sums["features"])[0] == pytest.approx(0, abs=1e-9)
    other = gather(make_images(60, 1).split(16), None)
    assert other.sums["features"].distance(second.sums["features"]) == other.sums["features"].distance(
        first.sums["features"]
    )
    assert sorted(path.suffix for path in cache_folder().iterdir()) == [".json", ".safetensors"]


@pytest.mark.parametrize(
    "change",
    [{"key": {**KEY, "data": "f01"}}, {"key": {**KEY, "n": 61}}, {"key": {**KEY, "background": "black"}},
     {"kept": ("features",)}, {"weights_sha256": "2" * 64}, {"preprocessing": "another"}],
)  # fmt: skip
def test_other_references_are_computed(change):
    gather(make_images().split(16))
    assert gather(make_images(40, 1).split(16), **change).n == 40


@pytest.mark.parametrize("kind", ["cut", "changed", "no facts", "no json"])
def test_damage_is_told_and_mended(kind, capsys):
    gather(make_images().split(16))
    (path,) = cache_folder().glob("*.safetensors")
    content = path.read_bytes()
    if kind == "cut":
        path.write_bytes(content[:-100])
    elif kind == "changed":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif kind == "no facts":
        path.with_suffix(".json").unlink()
    else:
        path.with_suffix(".json").write_text("{")
    capsys.readouterr()
    assert gather(make_images().split(16)).n == 60
    assert "damaged" in " ".join(capsys.readouterr().err.split())
    assert path.read_bytes() == content
    assert json.loads(path.with_suffix(".json").read_text())["data"] == "f00"


def test_a_folder_without_room_is_told(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(references.ENVIRONMENT, str(tmp_path / "file"))
    refused("set \\$LATELIER_CACHE to a folder with room", gather, make_images().split(16))


def test_vectors_are_bounded(monkeypatch):
    monkeypatch.setattr(references, "MOST_VECTORS", 25)
    found = FeatureSet(("vectors", "features"))
    for part in torch.arange(120.0).view(40, 3).split(16):
        found.update({"features": part})
    assert torch.equal(found.vectors, torch.arange(75.0).view(25, 3))
    assert found.n == found.sums["features"].whole().n == 40


def test_the_key_says_what_images_depend_on(tmp_path):
    recipe = tiny_recipe(tmp_path)
    plain = reference_key(open_images(recipe), 16)
    assert plain == reference_key(open_images(recipe), 16)
    assert plain != reference_key(open_images(recipe), 17)
    for change in ({"background": "black"}, {"image_size": 64}, {"length": 40}):
        assert plain != reference_key(open_images(tiny_recipe(tmp_path, data=change)), 16)


def test_originals_are_known_to_the_next_tokenizer(monkeypatch):
    """The second tokenizer's originals are not looked at again; its distance is what it would be anew."""
    from latelier.evaluation import reconstruction

    seen = []
    extractor = colour_extractor()
    compute = extractor.compute
    extractor.compute = lambda levels: seen.append(len(levels)) or compute(levels)
    monkeypatch.setattr(reconstruction, "load_extractors", lambda names, device: [extractor] if names else [])
    batches = [{"image": part} for part in make_images(40).split(16)]
    evaluate = Evaluate(metrics=["rfd"], samples=40)
    values = []
    for key in (KEY, KEY, None):
        (rfd,) = evaluate_reconstruction(Codec(Shifted(0.2)), batches, evaluate, "toy", key=key)
        values.append((rfd.value, rfd.interval, sum(seen)))
        seen.clear()
    assert values[0] == (values[2][0], values[2][1], 80)
    assert values[1] == (values[0][0], values[0][1], 40)
    with pytest.raises(LatelierError, match="24 images could be read, but features of 40"):
        evaluate_reconstruction(Codec(Shifted(0.2)), batches[1:], evaluate, "toy", key=KEY)
