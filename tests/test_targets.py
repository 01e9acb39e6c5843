"""What auxiliary decoders predict: frozen teachers, what is kept of them, captions, errors."""

import math
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from latelier.conditioning.text import train_words, vocabulary_size
from latelier.data.loader import ImageDataset
from latelier.data.sources import open_source
from latelier.errors import LatelierError
from latelier.losses.hog import hog
from latelier.recipe import Data
from latelier.tokenizers import maetok_targets as module
from latelier.tokenizers.maetok_targets import CaptionTarget, FeatureTarget, HogTarget, TargetSection
from tiny import refused

transformers = pytest.importorskip("transformers", reason="teachers need pip install 'latelier[text]'")

# -- errors ---------------------------------------------------------------------------------------------------------


def one(kind="hog", dim=3, **options):
    return HogTarget(kind, dim, loss=TargetSection(kind=kind, **options).error)


def test_error_is_the_mean_over_masked_tokens():
    prediction, target = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    mask = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 0, 1]]).bool()
    squared = one().error(prediction, target, mask)
    torch.testing.assert_close(squared, F.mse_loss(prediction[mask], target[mask]))
    cosine = one("features", teacher="x").error(prediction, target, mask)
    a, b = prediction[mask].double(), target[mask].double()
    expected = -((a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)).mean()
    torch.testing.assert_close(cosine.double(), expected, rtol=1e-5, atol=1e-6)
    assert one("hog", loss="cosine").error(target, 3 * target, mask).item() == pytest.approx(-1)
    low = one().error(prediction.bfloat16(), target, mask)
    assert low.dtype == torch.float32


@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_nothing_masked_is_zero_with_a_gradient(loss):
    prediction = torch.randn(2, 5, 3, requires_grad=True)
    error = one(loss=loss).error(prediction, torch.zeros(2, 5, 3), torch.zeros(2, 5, dtype=torch.bool))
    error.backward()
    assert error.item() == 0
    assert (prediction.grad == 0).all()


# -- from a recipe --------------------------------------------------------------------------------------------------


def build(*sections, dataset=None, patch=8):
    return module.build_targets([TargetSection(**section) for section in sections], patch, 3, dataset)


@pytest.fixture
def folder(tmp_path):
    """Six images with captions; number i has its own pattern."""
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"Number {'odd' if i % 2 else 'even'} {'very ' * i}big")
    return tmp_path


def opened(source, **options):
    data = Data(source=str(source), **{"image_size": (32, 32), "val_fraction": 0, "workers": 0, **options})
    return ImageDataset(open_source(data), data)


def test_targets_in_the_recipe_s_order(dinov2, folder):
    sections = ({"kind": "features", "teacher": dinov2}, {"kind": "hog"}, {"kind": "caption"},
                {"kind": "features", "teacher": dinov2, "loss": "mse"})  # fmt: skip
    built = build(*sections, dataset=opened(folder))
    assert [target.name for target in built] == ["features", "hog", "caption", "features-2"]
    assert [target.dim for target in built[:2]] == [16, 27]
    assert [target.tokens((4, 4)) for target in built] == [(4, 4), (4, 4), (1, 32), (4, 4)]
    batch = next(opened(folder).stream(4))
    for target in built:
        value = target(batch, (4, 4))
        prediction = torch.randn(4, math.prod(target.tokens((4, 4))), target.dim)
        assert not value.requires_grad
        assert target.error(prediction, value, torch.ones(4, 16, dtype=torch.bool)).isfinite()
        assert not isinstance(target, torch.nn.Module)
    assert torch.equal(built[1](batch, (4, 4)), hog(batch["image"], 8))
    assert build({"kind": "hog"}, patch=16)[0].dim == 108
    refused("divisible by 8", build, {"kind": "hog"}, patch=4)


# -- features that are kept -----------------------------------------------------------------------------------------


def counted(target):
    """Make a target's teacher count the images that it looks at."""
    seen, teacher = [], target.teacher

    def look(images, grid):
        seen.extend(range(len(images)))
        return teacher(images, grid)

    target.teacher = look
    return seen


def features(dinov2, dataset, **options):
    target = build({"kind": "features", "teacher": dinov2, **options}, dataset=dataset)[0]
    assert isinstance(target, FeatureTarget)
    return target


@pytest.mark.usefixtures("fp32")
@pytest.mark.parametrize(("flip", "variants"), [(False, 6), (True, 12)])
def test_features_are_computed_once_for_a_image(dinov2, folder, flip, variants):
    dataset = opened(folder, flip=flip)
    target, fresh = features(dinov2, dataset), features(dinov2, dataset, cache=False)
    seen = counted(target)
    for batch in islice(dataset.stream(3), 40):
        value = target(batch, (4, 4))
        assert value.dtype == torch.float32
        assert torch.equal(value, value.bfloat16().float())
        torch.testing.assert_close(value, fresh(batch, (4, 4)), rtol=1e-2, atol=1e-2)
    assert len(target.kept) == len(seen) == variants  # mirrored images are others
    assert target.hits == 120 - variants
    assert not fresh.kept


def test_images_that_change_are_not_kept(dinov2, folder):
    for options in ({"crop": "random"}, {"background": "random"}):
        dataset = opened(folder, **options)
        assert module.image_numbers(dataset) is None
        target = features(dinov2, dataset)
        for batch in islice(dataset.stream(3), 4):
            target(batch, (4, 4))
        assert not target.kept
    assert features(dinov2, None).shown is None
    dataset = opened(folder)
    target = features(dinov2, dataset)
    target(next(dataset.once(3, flip=True)), (4, 4))  # whether it is mirrored is not in the batch
    assert not target.kept


def test_what_there_is_no_room_for_is_computed(dinov2, folder, monkeypatch):
    monkeypatch.setattr(module, "CACHE_LIMIT", 4 * 16 * 16 * 2)  # four images of 16 patches, 16 numbers of 2 bytes
    dataset = opened(folder, flip=False)
    target = features(dinov2, dataset)
    seen = counted(target)
    for batch in islice(dataset.stream(6), 3):
        target(batch, (4, 4))
    assert len(target.kept) == 4
    assert (target.hits, len(seen)) == (8, 6 + 2 + 2)


# -- captions -------------------------------------------------------------------------------------------------------


def test_word_pieces_are_learnt_from_the_data(folder):
    section = {"kind": "caption", "length": 5, "vocabulary_size": 100}
    dataset = opened(folder)
    target = build(section, dataset=dataset)[0]
    assert isinstance(target, CaptionTarget)
    words = train_words(dataset.captions, 100)
    assert target.dim == vocabulary_size(words) <= 100
    batch = {"image": torch.zeros(3, 3, 8, 8), "caption": ["Number odd big", "", "number even very very very big"]}
    ids = target(batch, (4, 4))
    assert ids.dtype == torch.int64
    assert (ids == -100).tolist() == [[False] * 3 + [True] * 2, [True] * 5, [False] * 5]
    assert words.decode(ids[0, :3].tolist()) == "number odd big"
    assert words.decode(ids[2].tolist()) == "number even very very very"


def test_padding_is_not_counted(folder):
    target = build({"kind": "caption", "length": 4}, dataset=opened(folder))[0]
    batch = {"image": torch.zeros(2, 3, 8, 8), "caption": ["odd", "very big"]}
    ids, mask = target(batch, (4, 4)), torch.zeros(2, 16, dtype=torch.bool)
    prediction = torch.zeros(2, 4, target.dim, requires_grad=True)
    error = target.error(prediction, ids, mask)  # captions have no masks
    assert error.item() == pytest.approx(math.log(target.dim), rel=1e-5)
    error.backward()
    assert (prediction.grad.abs().sum(-1) > 0).sum(1).tolist() == [1, 2]
    sure = F.one_hot(ids.clamp(min=0), target.dim) * 50.0
    assert target.error(sure, ids, mask).item() == pytest.approx(0, abs=1e-5)
    none = target.error(prediction, torch.full_like(ids, -100), mask)
    assert none.item() == 0
    none.backward()
    assert prediction.grad.isfinite().all()


def test_a_tokenizer_by_name(folder, tmp_path_factory, monkeypatch):
    words = train_words(lambda: iter(["a red circle", "a blue circle", "a red square"] * 3), 100)
    place = tmp_path_factory.mktemp("weights")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(place / "words")  # fmt: skip
    batch = {"image": torch.zeros(1, 3, 8, 8), "caption": ["A red square"]}
    monkeypatch.setenv("LATELIER_WEIGHTS", str(place))
    for name, dataset in ((str(place / "words"), None), ("somebody/words", opened(folder))):
        section = {"kind": "caption", "teacher": name, "length": 6}
        target = build(section, dataset=dataset)[0]
        assert words.decode(target(batch, (4, 4))[0, :3].tolist()) == "a red square"
    with pytest.raises(LatelierError, match=r"'nobody/nothing'.*leave the caption's teacher out"):
        build({"kind": "caption", "teacher": "nobody/nothing"})


def test_data_without_captions(folder):
    target = build({"kind": "caption"}, dataset=opened(folder))[0]
    refused("caption_key", target, {"image": torch.zeros(1, 3, 8, 8)}, (4, 4))
    refused("not at hand", build, {"kind": "caption"})
    for file in folder.glob("*.txt"):
        file.write_text(" ")
    refused("empty", build, {"kind": "caption"}, dataset=opened(folder))
    for file in folder.glob("*.txt"):
        file.unlink()
    refused("caption_key", build, {"kind": "caption"}, dataset=opened(folder))
