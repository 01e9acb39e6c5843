"""Objects in generated scenes: found as fast as everywhere, told from damage, compared with what was asked for."""

import json

import pytest
import torch
from studies.analysis.objects_check import LEVELS, damage

from latelier.conditioning.condition import ClassConditioner
from latelier.data.builtin import EmojiSource, SceneSource
from latelier.data.sources import open_source
from latelier.evaluate import _asked, evaluate
from latelier.evaluation import objects as measured
from latelier.evaluation.objects import Asked, Recogniser, known_objects, measure_objects, paint, scramble, unexplained
from latelier.evaluation.sprites import Found, Places, SpriteFinder, iou
from latelier.opening import held_out_records
from latelier.pipeline import LatentDiffusionPipeline
from latelier.training.denoiser_loop import train_denoiser
from latelier.training.tokenizer_loop import train_tokenizer
from tiny import refused, tiny_recipe

CLASSES = ["red apple", "banana", "frog face", "rocket"]


def scenes(count, split="val", size=64, backgrounds="plain", **about):
    source = SceneSource((size, size), count, split, CLASSES, backgrounds, **about)
    return source, torch.stack([paint(source, i) for i in range(count)])


@pytest.fixture(scope="module")
def held_out():
    source, images = scenes(20)
    return Recogniser(source), images


@pytest.mark.parametrize("backgrounds", ["plain", "varied"])
def test_coarse_to_fine_finds_what_a_search_everywhere_finds(backgrounds):
    source, images = scenes(2, backgrounds=backgrounds)
    finder = SpriteFinder(CLASSES, (64, 64))
    fits = torch.stack([finder.fits(images, n) for n in range(len(finder.sizes))], 1)  # (b, n, k, h, w)
    best, index = fits.permute(0, 1, 3, 4, 2).flatten(1).topk(200)
    place, label = index // 4, index % 4
    everywhere = finder.found(Places(best, place // 64**2, place // 64 % 64, place % 64, label))
    for i, (fast, slow) in enumerate(zip(finder.find(images), everywhere)):
        clear = [[one for one in rows if one.fit > 0.7] for rows in (fast, slow)]
        assert [one[:2] for one in clear[0]] == [one[:2] for one in clear[1]]
        assert [a.fit for a in clear[0]] == pytest.approx([b.fit for b in clear[1]], abs=1e-4)
        if backgrounds == "plain":
            assert {one[:2] for one in clear[0]} == {one[:2] for one in known_objects(source, i)}


def test_fit_is_1_on_one_colour_and_falls_with_noise():
    source, images = scenes(1, seed=3)
    finder = SpriteFinder(CLASSES, (64, 64))
    clean, noisy = (finder.find(x)[0] for x in (images, images + 0.2 * torch.randn_like(images)))
    assert {one[:2] for one in clean} == {one[:2] for one in known_objects(source, 0)}
    assert min(one.fit for one in clean) > 0.97 > 0.95 > max(one.fit for one in noisy) > 0.5
    mirrored = SpriteFinder(CLASSES, (64, 64), mirrored=True).find(images.flip(3))[0]
    expected = {(a.label, (64 - a.box[2], a.box[1], 64 - a.box[0], a.box[3])) for a in clean}
    assert {one[:2] for one in mirrored} == expected
    assert finder.find(torch.zeros(1, 3, 64, 64)) == [[]]


def test_originals_pass_and_scrambled_ones_fail(held_out):
    about = held_out[0].about
    assert about["originals_pass"] == about["originals_right"] == 1 == about["scrambled_fail"]
    assert about["scrambled_without_objects"] > 0.9
    tiles = scramble(held_out[1][:2], 4)
    assert torch.equal(tiles.flatten(2).sort().values, held_out[1][:2].flatten(2).sort().values)
    assert not torch.equal(tiles, held_out[1][:2])


@pytest.mark.parametrize("kind", ["blur", "halves", "tiles"])
def test_more_damage_is_worse(held_out, kind):
    recogniser, images = held_out
    some, none = (recogniser.see(damage(images[:15], kind, level))[1].mean().item() for level in LEVELS[kind][::2][:2])
    assert 1 >= some > none + 0.1
    assert none < 0.4


def test_what_is_neither_object_nor_background():
    image = torch.linspace(-1, 1, 32).expand(1, 3, 32, 32).clone()  # from black to white
    assert unexplained(image, [[]]).item() == 0
    image[0, :, 8:16, 8:16] = torch.tensor([1.0, -1.0, -1.0])[:, None, None]
    assert 64 <= round(unexplained(image, [[]]).item() * 32**2) <= 12**2
    assert unexplained(image, [[Found(0, (8, 8, 16, 16))]]).item() == 0


def test_distributions_copies_and_what_was_asked_for(held_out):
    recogniser, images = held_out
    asked = [known_objects(recogniser.source, i) for i in range(len(images))]
    training = scenes(20, "train")[0]
    results = measure_objects(images, recogniser, training, Asked("text", asked))
    found = {name: result.value for name, result in results.items()}
    assert found.pop("objects-copies") == 0
    assert found == pytest.approx(dict.fromkeys(found, 1))
    assert [*found] == [f"objects{end}" for end in ("", "-counts", "-classes", "-places", "-asked", "-relations")]
    assert results["objects-asked"].details["n"] == 20
    grey = measure_objects(torch.zeros(3, 3, 64, 64), recogniser, training, Asked("class", asked))
    assert {result.value for result in grey.values()} == {0}
    assert recogniser.reconstructed(lambda x: x).value == 1
    known = [known_objects(training, i) for i in range(20)]
    assert measured._copied(known, known).mean() == 1


@pytest.mark.parametrize(("condition", "right"), [("class", [1, 1, 0]), ("text", [1, 0, 1]), ("layout", [1, 1, 0])])
def test_what_was_asked_for(condition, right):
    """Two objects that were asked for; with one more; the wrong way round."""
    apple, banana, more = Found(0, (0, 0, 20, 20)), Found(1, (30, 2, 40, 12)), Found(1, (0, 30, 10, 40))
    images = [[banana, apple], [apple, banana, more], [Found(1, apple.box), Found(0, banana.box)]]
    shown = measured._follow(images, Asked(condition, [[apple, banana]] * 3), {})["objects-asked"]
    assert shown.value == pytest.approx(sum(right) / 3)
    assert shown.interval[0] < shown.value < shown.interval[1]


def test_relations_are_those_of_the_objects_found():
    apple, banana, other = Found(0, (0, 0, 10, 10)), Found(1, (30, 2, 40, 12)), Found(1, (0, 30, 10, 40))
    asked = [apple, banana, other]  # an apple left of a banana and above a banana
    assert measured._relations([apple, banana], asked) == [1, 0]
    assert measured._relations([apple, banana, other], asked) == [1, 1]
    assert measured._relations([banana], asked) == [0, 0]
    assert measured._relations([Found(0, banana.box), Found(1, apple.box)], asked) == [0, 0]
    assert iou((0, 0, 4, 4), (2, 0, 6, 4)) == pytest.approx(1 / 3)


def test_other_data_are_refused():
    refused("'Activities' is a category", measure_objects, torch.zeros(1, 3, 32, 32), SceneSource((32, 32), 4))
    refused("these are other data", measured.check_scenes, EmojiSource("val"))
    refused("these are 1 channels", measured.check_scenes, scenes(1)[0], 1)


class Told(LatentDiffusionPipeline):
    """A pipeline of which only the conditioner matters."""

    def __init__(self, conditioner):
        self.conditioner = conditioner


@pytest.mark.parametrize(("name", "condition"), [("prompts", "text"), ("layouts", "layout"), ("classes", "class")])
def test_samples_are_asked_for_held_out_scenes_in_turn(tmp_path, name, condition):
    data = {"source": "scenes", "classes": CLASSES, "length": 20, "val_fraction": 0.25, "flip": False, "workers": 0}
    recipe = tiny_recipe(tmp_path, data=data, denoiser=None, evaluate={"samples": 8}, sample={"batch": 3})
    conditioner = ClassConditioner(4, 8)
    conditioner.input_name = name
    pipeline, source = Told(conditioner), open_source(recipe.data, "val")
    asked = _asked(recipe, pipeline, source, 8)
    assert asked.condition == condition
    labels = [rows[0].label for rows in asked.objects]
    if name == "classes":
        assert labels == [0, 1, 2, 0, 1, 2, 0, 1]  # they start again in every batch
    else:
        records = held_out_records(recipe, pipeline)
        given = [label for first in (0, 3, 6) for label in records(first, 3)["label"].tolist()]
        assert labels == given[:8] == [source.objects(i % 5)[0].label for i in range(8)]


def test_a_run_measures_it_on_the_samples_that_gfd_sees(tmp_path, monkeypatch):
    data = {"source": "scenes", "classes": CLASSES[:3], "length": 20, "val_fraction": 0.4, "flip": False}
    short = {"images": 8, "checkpoint_every": 8, "preview_every": 8}
    changes = {"tokenizer": short, "denoiser": {**short, "condition": "class"}}
    recipe = tiny_recipe(tmp_path, data=data, **changes, evaluate={"metrics": ["objects"], "samples": 10, "batch": 4})
    train_tokenizer(recipe)
    train_denoiser(recipe)
    drawn = []
    original = LatentDiffusionPipeline.__call__

    def call(self, *arguments, **options):
        drawn.append(options["sample"].count)
        return original(self, *arguments, **options)

    monkeypatch.setattr(LatentDiffusionPipeline, "__call__", call)
    monkeypatch.setattr("latelier.evaluate._save_nearest", lambda *_: None)
    evaluate(recipe)
    assert sum(drawn) == 10
    numbers = json.loads((recipe.folder / "metrics.json").read_text())
    receipt = numbers["generation"]["objects-asked"]["receipt"]
    assert (receipt["n"], receipt["asked"], receipt["n_originals"], receipt["sampler"]) == (10, "class", 8, "auto")
    assert 0 <= numbers["reconstruction"]["objects-reconstructed"]["value"] <= 1
    wide = recipe.model_copy(update={"data": recipe.data.model_copy(update={"classes": None})})
    evaluate(wide)
    (left,) = (
        e["receipt"]["left out"]
        for e in json.loads((recipe.folder / "metrics.json").read_text())["generation"].values()
        if e["value"] is None
    )
    assert "is a category; name at most 64" in left
