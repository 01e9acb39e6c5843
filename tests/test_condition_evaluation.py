"""Conditional tasks are evaluated on pipelines whose drawings are known."""

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image

from latelier.conditioning.condition import CompositeConditioner
from latelier.conditioning.spatial import InpaintingConditioner, LowResolutionConditioner, SegmentationConditioner
from latelier.data.corruptions import SETTINGS, draw_masks
from latelier.diffusion.process import Flow
from latelier.evaluation.conditions import (
    colour,
    condition_grid,
    draw_boxes,
    draw_records,
    enlarge,
    evaluate_conditions,
    fill_with_mean,
)
from latelier.evaluation.features import CLIP_MEAN, CLIP_STD, CLIPScore, to_clip
from latelier.evaluation.regions import Region, Templates, box_regions, map_regions, share_of_hits
from latelier.images import to_uint8
from latelier.pipeline import LatentDiffusionPipeline
from latelier.recipe import Evaluate, Sample
from latelier.tokenizers.codec import Codec
from tiny import autoencoder, needs_lpips, refused

RECEIPT = {"reference": "toy, held out", "tokenizer": "0123", "ema": 0.99}
SAMPLE = Sample(steps=7, seed=40, guidance=1.5)


class Asks(torch.nn.Module):
    """A conditioner that only says what it asks for."""

    def __init__(self, input_name, **config):
        super().__init__()
        self.input_name, self.config = input_name, config


class Fake:
    """A pipeline that draws what a function of the records says, and remembers how it was called."""

    def __init__(self, conditioner, draw=lambda records: records["image"]):
        self.conditioner, self.draw, self.calls = conditioner, draw, []
        self.codec = Codec(torch.nn.Identity())

    def sampling_shift(self, sample):
        return 1.0

    def __call__(self, records, sample, output_type, progress):
        assert output_type == "pt"
        assert progress is False
        self.calls.append((records, sample))
        return type("Drawn", (), {"images": self.draw(records)})


def make_images(count=3, size=32, batches=1):
    """Noise on a coarse pattern, so that bicubic enlargement is neither perfect nor hopeless."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(batches, count, 3, 4, 4, generator=generator) * 2 - 1
    rows = [torch.nn.functional.interpolate(part, size=(size, size)) for part in coarse]
    return [{"image": (x * 0.8 + 0.1 * torch.rand(x.shape, generator=generator)).clamp(-1, 1)} for x in rows]


def measure(pipeline, records, evaluate, training=list):
    return {m.name: m for m in evaluate_conditions(pipeline, records, training, SAMPLE, evaluate, RECEIPT)}


def check_receipt(receipt, n, size):
    """What every number needs to be measured again."""
    assert (receipt["n"], receipt["image_size"]) == (n, size)
    assert (receipt["reference"], receipt["tokenizer"], receipt["ema"]) == ("toy, held out", "0123", 0.99)
    assert (receipt["steps"], receipt["seed"], receipt["guidance"], receipt["sampler"]) == (7, 40, 1.5, "auto")
    assert "torch" in receipt["versions"]
    assert "device" in receipt


@pytest.mark.parametrize("conditioner", [None, Asks("classes"), Asks("maps"), Asks("prompts")])
def test_nothing_to_judge_draws_nothing(conditioner):
    pipeline = Fake(conditioner)
    assert (measure(pipeline, make_images(), Evaluate()), pipeline.calls) == ({}, [])


def test_every_record_is_drawn_once_from_its_own_seed():
    pipeline = Fake(LowResolutionConditioner(4))
    drawn = list(draw_records(pipeline, make_images(batches=4), SAMPLE, 7, 0))
    assert [len(images) for _, images in drawn] == [3, 3, 1]
    assert [(s.seed, s.count) for _, s in pipeline.calls] == [(40, 3), (43, 3), (46, 1)]
    assert [batch["sample_id"].tolist() for batch, _ in drawn] == [[40, 41, 42], [43, 44, 45], [46]]


class Narrow(ModelMixin, ConfigMixin):
    """A convolution of x_t and what is concatenated to it."""

    @register_to_config
    def __init__(self, channels: int):
        super().__init__()
        self.conv = torch.nn.Conv2d(channels, 4, 3, padding=1)

    def forward(self, x_t, t, condition):
        return self.conv(torch.cat([x_t, condition.spatial], 1)) + t[:, None, None, None]


def test_a_real_pipeline_that_is_told_three_things():

    together = CompositeConditioner.of(
        [LowResolutionConditioner(2, latent_factor=2), InpaintingConditioner(), SegmentationConditioner(5, 3, 2)]
    )
    denoiser = Narrow(4 + together.spatial_channels)
    pipeline = LatentDiffusionPipeline.build(Codec(autoencoder(2)), denoiser, together, Flow(), (16, 16))
    settings, record = Sample(steps=2, batch=3, seed=5), scenes(HELD_OUT)
    evaluate = Evaluate(metrics=["psnr"], samples=4)
    measured = evaluate_conditions(pipeline, [record], lambda: [record], settings, evaluate, RECEIPT)
    names = [m.name for m in measured]
    matches = [f"segmentation-match{end}" for end in ("", "-chance", "-real")]
    assert names == ["sr-psnr", "bicubic-psnr", "sr-psnr-difference", *matches]
    ((batch, drawn),) = draw_records(pipeline, [record], settings, 4, 0)
    inside = batch["hole"].bool().expand_as(drawn)
    assert torch.equal(drawn[~inside], record["image"][~inside])
    assert not torch.equal(drawn[inside], record["image"][inside])
    alone = {key: value[2:3] for key, value in batch.items()}
    one = settings.model_copy(update={"seed": 7, "count": 1})
    again = pipeline(records=alone, sample=one, output_type="pt", progress=False).images
    assert torch.allclose(again[0][inside[2]], drawn[2][inside[2]], atol=1e-5)
    image, _ = condition_grid(pipeline, [record], settings)
    assert image.size == (4 * 162 - 2, 5 * 162 - 2)


def test_perfect_enlargement_beats_bicubic():
    pipeline = Fake(LowResolutionConditioner(4, "bsrgan-light", seed=5))
    measured = measure(pipeline, make_images(batches=2), Evaluate(metrics=["psnr", "ssim", "rfd", "l1"]))
    differences = ["sr-psnr-difference", "sr-ssim-difference"]
    assert list(measured) == ["sr-psnr", "sr-ssim", "bicubic-psnr", "bicubic-ssim", *differences]
    assert (measured["sr-psnr"].value, measured["sr-ssim"].value) == (100, pytest.approx(1))
    assert measured["bicubic-psnr"].value < 40
    assert measured["bicubic-ssim"].value < 0.99
    low, high = measured["bicubic-psnr"].interval
    assert low < measured["bicubic-psnr"].value < high
    receipt = measured["bicubic-psnr"].receipt
    check_receipt(receipt, 6, (32, 32))
    assert (receipt["factor"], receipt["degradation"], receipt["degradation_seed"]) == (4, "bsrgan-light", 5)
    assert "8-bit" in receipt["settings"]


def test_bicubic_starts_from_the_image_that_the_model_was_told():
    """A model that is bicubic enlargement itself has exactly bicubic's numbers, random degradation or not."""
    pipeline = Fake(
        LowResolutionConditioner(4, "bsrgan-light"), lambda records: enlarge(records["low"], records["image"])
    )
    measured = measure(pipeline, make_images(), Evaluate(metrics=["psnr"]))
    assert measured["sr-psnr"].value == measured["bicubic-psnr"].value


def test_enlargement_is_that_of_pil():
    small = torch.linspace(-1, 1, 36).view(1, 1, 6, 6)
    image = Image.fromarray(to_uint8(small)[0, 0].numpy()).resize((24, 24), Image.Resampling.BICUBIC)
    theirs = torch.tensor(list(image.tobytes())).view(24, 24)
    assert (to_uint8(enlarge(small, torch.zeros(1, 1, 24, 24)))[0, 0].int() - theirs).abs().max() <= 1


def test_filled_images_are_the_originals_outside_of_the_holes():
    (record,) = make_images()
    pipeline = Fake(InpaintingConditioner(), lambda records: torch.full_like(records["image"], 0.25))
    ((batch, drawn),) = draw_records(pipeline, [record], SAMPLE, 3, 11)
    hole = draw_masks(SETTINGS["thick"], (32, 32), 11, torch.arange(3))
    assert torch.equal(batch["hole"], hole)
    assert torch.equal(pipeline.calls[0][0]["hole"], hole)
    inside = hole.bool().expand_as(drawn)
    assert (drawn[inside] == 0.25).all()
    assert torch.equal(drawn[~inside], record["image"][~inside])


def test_mean_fill():
    constant = torch.tensor([0.3, -0.2, 0.9]).view(1, 3, 1, 1).expand(2, 3, 8, 8)
    hole = torch.zeros(2, 1, 8, 8)
    hole[0, 0, :4] = hole[1, 0, 2, 3] = 1
    assert torch.allclose(fill_with_mean({"hole": hole}, constant), constant)
    image = constant.clone()
    image[0, :, :4] = 7.0  # what is in the hole does not count
    image[0, 0, 4:6], image[0, 0, 6:] = -1.0, 0.0
    assert torch.allclose(fill_with_mean({"hole": hole}, image)[0, :, 0, 0], torch.tensor([-0.5, -0.2, 0.9]))


@needs_lpips
def test_perfect_filling_and_lpips_of_enlargement():
    evaluate = Evaluate(metrics=["lpips", "gfd", "psnr"], seed=3)
    measured = measure(Fake(InpaintingConditioner()), make_images(batches=2), evaluate)
    lpips = ("inpainting-lpips", "mean-fill-lpips", "inpainting-lpips-difference")
    assert list(measured) == [*lpips, "inpainting-fd-vgg16", "mean-fill-fd-vgg16"]
    ours, theirs, difference = (measured[name] for name in lpips)
    assert ours.value == 0 < theirs.value == pytest.approx(-difference.value)
    assert measured["inpainting-fd-vgg16"].value == pytest.approx(0, abs=1e-6)
    assert measured["mean-fill-fd-vgg16"].value > 0.01
    receipt = measured["inpainting-fd-vgg16"].receipt
    check_receipt(receipt, 6, (32, 32))
    assert (receipt["mask_seed"], receipt["n_reference"], receipt["dims"]) == (3, 6, 512)
    hole = draw_masks(SETTINGS["thick"], (32, 32), 3, torch.arange(6))
    assert receipt["masked_share"] == pytest.approx(hole.mean().item())
    assert "below the feature dimension" in receipt["warning"]
    enlarged = measure(Fake(LowResolutionConditioner(4)), make_images(), Evaluate(metrics=["lpips"]))
    assert enlarged["sr-lpips"].value == 0 < enlarged["bicubic-lpips"].value


def look(label):
    """The look of a class, 8 x 8: a bar at another place for each."""
    tile = torch.full((3, 8, 8), -0.5)
    tile[:, label * 2 : label * 2 + 2] = 0.75
    return tile


def scenes(labels):
    """Images of 16 x 16 with an object of each label in a corner."""
    image, boxes, maps = torch.zeros(len(labels), 3, 16, 16), [], torch.zeros(len(labels), 16, 16).long()
    for i, row in enumerate(labels):
        for k, label in enumerate(row):
            y, x = 8 * (k // 2), 8 * (k % 2)
            image[i, :, y : y + 8, x : x + 8] = look(label)
            maps[i, y : y + 8, x : x + 8] = label + 1
        boxes.append(torch.tensor([[k % 2, k // 2, k % 2 + 1, k // 2 + 1] for k in range(len(row))]).view(-1, 4) / 2)
    numbers = [torch.tensor(row, dtype=torch.int64) for row in labels]
    return {"image": image, "boxes": boxes, "box_labels": numbers, "segmentation": maps}


HELD_OUT = [[0, 1], [1, 2], [2, 3], [3, 0]]  # no label is at the place that the next record gives it


def matched(draw=lambda records: records["image"], held_out=HELD_OUT, training=HELD_OUT):
    return measure(Fake(Asks("layouts"), draw), [scenes(held_out)], Evaluate(), lambda: [scenes(training)])


@pytest.mark.parametrize(("input_name", "name"), [("layouts", "layout-match"), ("segmentations", "segmentation-match")])
def test_perfect_drawings_match_and_other_layouts_do_not(input_name, name):
    first, second = scenes(HELD_OUT[:2]), scenes(HELD_OUT[2:])
    measured = measure(Fake(Asks(input_name)), [first, second], Evaluate(), lambda: [scenes(HELD_OUT)])
    assert {k: m.value for k, m in measured.items()} == {name: 1.0, f"{name}-chance": 0.0, f"{name}-real": 1.0}
    receipt = measured[name].receipt
    check_receipt(receipt, 4, (16, 16))
    assert (receipt["regions"], receipt["classes"], receipt["template_images"]) == (8, 4, 4)
    assert receipt["regions_without_template"] == 0
    assert "next record" in measured[f"{name}-chance"].receipt["images"]


def test_drawings_of_other_layouts_do_not_match():
    wrong = scenes([[1, 1], [2, 2], [3, 3], [0, 0]])["image"]
    measured = matched(lambda records: wrong)
    assert measured["layout-match"].value == 0.5  # the second object of each is right
    assert measured["layout-match"].interval == (0.5, 0.5)
    # The next record's objects: [1, 2], [2, 3], ... of which the first is right.
    assert (measured["layout-match-chance"].value, measured["layout-match-real"].value) == (0.5, 1)
    flat = matched(lambda records: torch.full_like(records["image"], 0.3))
    assert flat["layout-match"].value == 0


def test_classes_without_a_template_are_left_out_and_told():
    match = matched(training=[[0, 1], [2]])["layout-match"]
    assert match.value == 1
    receipt = match.receipt
    assert (receipt["regions"], receipt["regions_without_template"], receipt["classes"]) == (6, 2, 3)
    templates = Templates.of([scenes([[0], [0]]), scenes([[0], [1]]), scenes([[2]])], "layouts", most=3)
    assert (templates.images, templates.labels.tolist()) == (3, [0])


def test_nothing_to_judge_with():
    refused("not 1 images", matched, held_out=[[0]])
    refused("none of 2 training images", matched, training=[[], []])
    refused("no 'segmentation'", measure, Fake(Asks("segmentations")), make_images(), Evaluate(), make_images)
    refused("no held-out records", measure, Fake(LowResolutionConditioner(4)), [], Evaluate(metrics=["psnr"]))


def test_regions():
    boxes = torch.tensor([[0.1, 0.25, 0.5, 1.0], [0.99, 0.0, 1.0, 0.001], [3 / 7, 2 / 7, 5 / 7, 6 / 7]])
    found = box_regions(boxes, torch.tensor([3, 1, 0]), (20, 70))
    assert found[:2] == [Region(3, (7, 5, 35, 20)), Region(1, (69, 0, 70, 1))]
    assert found[2].box == (30, 6, 50, 17)
    ids = torch.zeros(5, 6, dtype=torch.int64)
    ids[1, 2] = ids[3, 4] = 9
    ids[0, 0] = 2
    assert map_regions(ids) == [Region(2, (0, 0, 1, 1)), Region(9, (2, 1, 5, 4))]


def test_interval_is_over_images():
    share, interval = share_of_hits([(1, 1), (0, 1), (1, 1), (0, 1), (0, 0)])
    assert share == 0.5
    half = 1.96 * (4 / 3 * 4 * 0.25) ** 0.5 / 4  # the standard error of a mean of four
    assert interval == pytest.approx((max(0, 0.5 - half), min(1, 0.5 + half)))
    assert share_of_hits([(30, 30)]) == (1.0, None)
    share, interval = share_of_hits([(30, 30), (8, 10)])
    assert share == 0.95  # of regions, not the mean of images' shares
    assert interval[0] == pytest.approx(0.95 - 1.96 * (2 * (1.5**2 + 1.5**2)) ** 0.5 / 40)
    assert interval[1] == 1


@pytest.fixture
def clip_folder(tmp_path):
    """A tiny CLIP with random weights and words as tokens."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = ["[PAD]", "[UNK]", "[BOS]", "[EOS]", "red", "apple", "owl"]
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 2), ("[EOS]", 3)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", bos_token="[BOS]", eos_token="[EOS]"
    )
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    marks = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    text = {**sizes, **marks, "vocab_size": 7, "max_position_embeddings": 5}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**sizes, "image_size": 16, "patch_size": 8}, projection_dim=8
    )
    model = transformers.CLIPModel(config)
    for parameter in model.parameters():  # of size 1: images and captions are far apart
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "clip")
    fast.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def test_clip_score_is_the_cosine_of_the_features(clip_folder):
    import transformers

    record = {**make_images(size=32)[0], "caption": ["red apple", "owl", "red red owl apple red"]}
    pipeline = Fake(Asks("prompts"), lambda records: records["image"].flip(3))
    measured = measure(pipeline, [record], Evaluate(clip=str(clip_folder)))
    model = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    tokens = [[2, 4, 5, 3], [2, 6, 3], [2, 4, 4, 6, 3]]  # the last one is cut
    for name, images in (("clip-score", record["image"].flip(3)), ("clip-score-real", record["image"])):
        scores = []
        for image, ids in zip(images, tokens):
            pixels = to_uint8(image[None]).float() / 255
            pixels = torch.nn.functional.interpolate(pixels, size=(16, 16), mode="bicubic", antialias=True).clamp(0, 1)
            pixels = (pixels - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
            with torch.no_grad():
                seen = model.visual_projection(model.vision_model(pixels).pooler_output)[0]
                read = model.text_projection(model.text_model(torch.tensor([ids])).pooler_output)[0]
            scores.append(max(0.0, (seen @ read / seen.norm() / read.norm()).item()) * 100)
        assert sum(score > 1 for score in scores) > 0
        assert measured[name].value == pytest.approx(sum(scores) / 3, abs=1e-3)
    assert measured["clip-score"].value != measured["clip-score-real"].value
    receipt = measured["clip-score"].receipt
    check_receipt(receipt, 3, (32, 32))
    assert (receipt["clip"], len(receipt["weights_sha256"])) == (str(clip_folder), 64)
    assert "CLIP's mean" in receipt["preprocessing"]


def test_clip_needs_captions_and_a_model(clip_folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    refused("no 'caption'", measure, Fake(Asks("prompts")), make_images(), Evaluate(clip=str(clip_folder)))
    refused(r"evaluate.clip = '.*nowhere' cannot be loaded", CLIPScore, str(tmp_path / "nowhere"))
    transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    refused("kind bert; name a CLIP", CLIPScore, str(tmp_path))


def test_clip_sees_the_middle_of_wide_images_and_grey_as_colour():
    wide = torch.cat([torch.full((1, 1, 8, 8), v) for v in (-1.0, 1.0, -1.0)], 3)
    seen = to_clip(wide, 8)
    assert seen.shape == (1, 3, 8, 8)
    assert torch.allclose(seen[0, :, 4, 4], (1 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD))
    refused("not 4", to_clip, torch.zeros(1, 4, 8, 8), 8)


def pixel(image, column, row, x, y, side):
    return image.getpixel((column * (side + 2) + x, row * (side + 2) + y))


def test_grid_shows_layout_above_drawn_above_original():
    record = scenes(HELD_OUT)
    pipeline = Fake(Asks("layouts", names=["a", "b", "c", "d"]), lambda records: -records["image"])
    image, captions = condition_grid(pipeline, [record], SAMPLE)
    assert captions == []
    assert image.size == (4 * 162 - 2, 3 * 162 - 2)  # 16 pixels, ten times larger
    assert (pixel(image, 1, 0, 0, 0, 160), pixel(image, 1, 0, 159, 40, 160)) == (colour(1), colour(2))
    assert pixel(image, 0, 2, 5, 5, 160) == (223, 223, 223)  # the bar of class 0
    assert pixel(image, 0, 1, 5, 5, 160) == (32, 32, 32)


def test_words_stay_whole_at_the_right_edge():
    drawn = draw_boxes([Region(3, (150, 10, 160, 40))], (60, 160), ["", "", "", "mushroom soup"])
    inked = to_uint8(drawn)[0] < 235  # (60, 160)
    assert inked[13:22, 100:145].any()
    assert not inked[:, :60].any()


def test_grid_shows_maps_in_colours():
    image, _ = condition_grid(Fake(Asks("segmentations")), [scenes(HELD_OUT)], SAMPLE)
    assert [pixel(image, 0, 0, x, 40, 160) for x in (0, 159)] == [colour(1), colour(2)]
    assert pixel(image, 0, 0, 0, 159, 160) == (235, 235, 235)


def test_grid_shows_small_images_and_holes():
    (record,) = make_images(size=200)
    image, _ = condition_grid(Fake(LowResolutionConditioner(4)), [record], SAMPLE)
    assert image.size == (3 * 202 - 2, 3 * 202 - 2)
    assert len({pixel(image, 0, 0, x, y, 200) for x in range(4) for y in range(4)}) == 1
    image, _ = condition_grid(Fake(InpaintingConditioner()), [record], SAMPLE, seed=2)
    hole = draw_masks(SETTINGS["thick"], (200, 200), 2, torch.arange(3))
    y, x = hole[2, 0].nonzero()[0].tolist()
    assert pixel(image, 2, 0, x, y, 200) == (128, 128, 128)
    y, x = (1 - hole[2, 0]).nonzero()[0].tolist()
    assert pixel(image, 2, 0, x, y, 200) == tuple(to_uint8(record["image"])[2, :, y, x].tolist())


def test_grid_of_captions_has_eight_columns_at_most():
    records = [{**record, "caption": ["red", "apple", "owl"]} for record in make_images(size=160, batches=4)]
    image, captions = condition_grid(Fake(Asks("prompts")), records, SAMPLE)
    assert captions == ["red", "apple", "owl", "red", "apple", "owl", "red", "apple"]
    assert image.size == (8 * 162 - 2, 2 * 162 - 2)
