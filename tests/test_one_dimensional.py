"""1-D latents, `(b, c, l)`, through everything: tokenizer, cache, transformers, pipeline, ODE and SDE."""

import math

import pytest
import torch
from torch import nn

from latelier.conditioning.condition import ClassConditioner, build_conditioner
from latelier.conditioning.layout import LayoutConditioner
from latelier.data.latents import LatentCache, latent_statistics
from latelier.denoisers import build_denoiser
from latelier.denoisers.dit import SWITCHES, DiT
from latelier.denoisers.objective import DenoiserSection, DenoisingObjective
from latelier.diffusion.loss_guidance import LossGuidance
from latelier.diffusion.process import Flow
from latelier.errors import LatelierError
from latelier.layers import rope_table, rotate, sincos_positions
from latelier.opening import open_images
from latelier.pipeline import LatentDiffusionPipeline
from latelier.recipe import Sample
from latelier.tokenizers.codec import Codec, decode_tiled
from latelier.tokenizers.maetok import MAETok
from latelier.training.denoiser_loop import train_denoiser
from tiny import data_spec, refused, tiny_recipe

CHANNELS, LENGTH = 4, 12
SMALL = {"dim": 32, "depth": 1, "heads": 2}
SIZES = {"patch_size": 8, "latent_tokens": LENGTH, "latent_channels": CHANNELS}


def make_codec(statistics=True, **options):
    decoder = {f"decoder_{key}": value for key, value in SMALL.items()}
    tokenizer = randomise(MAETok((32, 32), **SIZES, **SMALL, **decoder, **options))
    if not statistics:
        return Codec(tokenizer)
    return Codec(tokenizer, torch.tensor([0.1, -0.2, 0.3, 0.0]), torch.tensor([1.0, 2.0, 0.5, 1.5]))


def randomise(model):
    """Fresh transformers predict zero; these do not."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.15, generator=generator)
    return model.eval()


def transformer(kind, **options):
    return randomise(DiT(CHANNELS, (LENGTH,), **SMALL, **SWITCHES[kind], **options))


def draw(pipeline, **settings):
    return pipeline(**{"steps": 3, "output_type": "pt", "precision": "fp32", "progress": False, **settings}).images


# -- transformers ------------------------------------------------------------------------------------------------------


def test_rotary_table_of_one_axis():
    """Token n turns its pair i by n 10000^(-2 i / d): all pairs of a head belong to the one axis."""
    x, d = torch.randn(2, 5, 3, 8), 8  # (b, n, heads, d)
    expected = torch.empty_like(x)
    for n in range(5):
        for i in range(d // 2):
            angle = n * 10000 ** (-2 * i / d)
            turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
            expected[:, n, :, 2 * i : 2 * i + 2] = x[:, n, :, 2 * i : 2 * i + 2] @ turn.T
    torch.testing.assert_close(rotate(x, rope_table(d, (5,), (5,))), expected, atol=1e-5, rtol=1e-5)
    longer = rope_table(d, (10,), (5,))  # a longer row is squeezed into the trained one
    torch.testing.assert_close(longer[::2], rope_table(d, (5,), (5,)))


def test_position_table_of_one_axis():
    table = sincos_positions(8, (5,))[0]
    for n in range(5):
        for i in range(4):
            angle = n * 10000 ** (-2 * i / 8)
            assert table[n, 2 * i : 2 * i + 2].tolist() == pytest.approx([math.sin(angle), math.cos(angle)], abs=1e-6)


@pytest.mark.parametrize(("kind", "table", "equivariant"), [
    ("sit", True, False), ("sit", False, True), ("lightning-dit", True, False), ("lightning-dit", False, False),
])  # fmt: skip
def test_the_order_of_latents_counts(kind, table, equivariant):
    """Without its fixed table a SiT cannot tell latents apart; LightningDiT's rotary positions still can."""
    model = transformer(kind)
    if not table:
        model.pos_embed.zero_()
    x, t, order = torch.randn(1, CHANNELS, LENGTH), torch.tensor([0.5]), torch.randperm(LENGTH)
    assert torch.allclose(model(x[..., order], t), model(x, t)[..., order], atol=1e-5) == equivariant
    longer = torch.randn(2, CHANNELS, 20)  # for which positions are interpolated
    assert model(longer, torch.rand(2)).shape == longer.shape


@pytest.mark.parametrize("patch", [1, 3])
def test_patches_of_a_row(patch):
    section = DenoiserSection(kind="sit", size="XS", patch=patch, model=SMALL)
    model = build_denoiser(section, (CHANNELS, LENGTH), vector=True)
    x = torch.randn(2, CHANNELS, LENGTH)
    assert randomise(model)(x, torch.rand(2)).shape == x.shape
    assert model.pos_embed.shape == (1, LENGTH // patch, SMALL["dim"])
    with pytest.raises(LatelierError, match=r"denoiser.patch = 5 does not divide the latent grid 12;"):
        build_denoiser(DenoiserSection(kind="sit", size="XS", patch=5, model=SMALL), (CHANNELS, LENGTH))


def test_cosine_term_is_along_channels():
    seen = {}

    class Spy(nn.Module):
        def forward(self, x_t, t, condition):
            seen.update(x=x_t, t=t.view(-1, 1, 1))
            return torch.sin(x_t)

    z = torch.randn(3, CHANNELS, LENGTH)
    objective = DenoisingObjective(Spy(), None, Flow(), seed=0, cosine_weight=0.5, sample_posterior=False)
    terms = objective({"mean": z, "std": torch.zeros_like(z), "sample_id": torch.arange(3)})
    target = (seen["x"] - (1 - seen["t"]) * z) / seen["t"] - z  # eps - z
    rows = zip(*(v.transpose(1, 2).reshape(-1, CHANNELS) for v in (torch.sin(seen["x"]), target)))
    cosines = [(a @ b / a.norm() / b.norm()).item() for a, b in rows]  # one for each of 3 x 12 latents
    assert terms.losses["cosine"].item() == pytest.approx(1 - sum(cosines) / len(cosines), abs=1e-4)
    assert terms.total.item() == pytest.approx((terms.losses["mse"] + 0.5 * terms.losses["cosine"]).item())


# -- tokenizer, cache, training, pipeline ------------------------------------------------------------------------------


@pytest.mark.parametrize("variational", [False, True])
def test_statistics_and_cache(tmp_path, variational):
    plain, dataset = make_codec(statistics=False, variational=variational), open_images(tiny_recipe(tmp_path))
    mean, std = latent_statistics(plain, dataset, 48, seed=0)
    codec = Codec(plain.tokenizer, mean, std)
    key = {"tokenizer": codec.hash(), "data": dataset.fingerprint, "transform": "none"}
    cache = LatentCache.write(tmp_path / "latents", codec, dataset, key, True, 16, dtype=torch.float32)
    assert (mean.shape, cache.latent_shape, len(cache)) == ((CHANNELS,), (CHANNELS, LENGTH), 48)
    batch = next(dataset.once(48))
    record, mirrored = (cache.gather(batch["index"], torch.full((48,), side)) for side in (False, True))
    with torch.no_grad():
        torch.testing.assert_close(record["mean"], codec.encode(batch["image"]), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(mirrored["mean"], codec.encode(batch["image"].flip(-1)), atol=1e-5, rtol=1e-4)
    assert (record["std"].abs().max() > 0) == variational
    spread = (record["mean"].var((0, 2)) + record["std"].square().mean((0, 2))).sqrt()  # (c,)
    torch.testing.assert_close(spread, torch.ones(CHANNELS), atol=0.1, rtol=0)


@pytest.mark.parametrize(("kind", "condition"), [("sit", "class"), ("lightning-dit", "class"), ("sit", "none")])
def test_train_save_and_draw(tmp_path, kind, condition):
    """A denoiser on a run's tokenizer: cache, cosine term, pipeline, ODE and SDE, guidance in an interval."""
    guidance = 1.9 if condition == "class" else 1.0
    run = tiny_recipe(
        tmp_path,
        denoiser={"kind": kind, "model": SMALL, "condition": condition, "cosine_weight": 1.0, "images": 16,
                  "preview_every": 16, "lr": 0.05},
        sample={"steps": 3, "sampler": "sde", "guidance": guidance, "guidance_interval": [0.0, 0.75]},
    )  # fmt: skip
    make_codec().save_pretrained(run.folder / "tokenizer")
    pipeline = LatentDiffusionPipeline.from_pretrained(train_denoiser(run))
    cache = LatentCache.open(run.folder / "latents")
    assert cache.latent_shape == (CHANNELS, LENGTH) == pipeline.codec.latent_shape(32, 32)
    assert (run.folder / "previews" / "denoiser-000000000016.png").is_file()
    assert isinstance(pipeline.tokenizer, MAETok)
    sampled = {}
    for sampler in ("sde", "euler", "heun"):
        settings = Sample(steps=4, sampler=sampler, guidance=guidance, guidance_interval=(0.0, 0.75), count=3)
        latents = draw(pipeline, sample=settings, output_type="latent")
        images = sampled[sampler] = draw(pipeline, sample=settings)
        assert (latents.shape, images.shape) == ((3, CHANNELS, LENGTH), (3, 3, 32, 32))
        with torch.no_grad():
            torch.testing.assert_close(pipeline.codec.decode(latents).clamp(-1, 1), images)
        again = draw(pipeline, sample=settings.model_copy(update={"batch": 2}))
        torch.testing.assert_close(again, images, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(sampled["sde"], sampled["euler"], atol=1e-3)


def test_guidance_interval():
    pipeline = LatentDiffusionPipeline.build(
        make_codec(), transformer("sit"), ClassConditioner(3, SMALL["dim"]), Flow(), (32, 32)
    )
    randomise(pipeline.conditioner)
    settings = {"classes": [1, 2], "sampler": "sde", "steps": 8, "output_type": "latent"}
    plain, whole = draw(pipeline, **settings), draw(pipeline, guidance=1.9, **settings)
    part = draw(pipeline, guidance=1.9, guidance_interval=(0.0, 0.75), **settings)
    assert not torch.allclose(part, whole, atol=1e-4)
    assert not torch.allclose(part, plain, atol=1e-4)
    # Nothing visited lies below the last step, 0.04, so guidance there is none.
    assert torch.equal(draw(pipeline, guidance=1.9, guidance_interval=(0.0, 0.03), **settings), plain)


def test_a_guide_reaches_latents_in_a_row():
    pipeline = LatentDiffusionPipeline.build(make_codec(), transformer("sit"), None, Flow(), (32, 32))
    target, far = torch.zeros(1, 3, 32, 32), []
    for scale in (0.0, 0.01):
        images = draw(
            pipeline, count=2, steps=6, loss_guidance=LossGuidance(pipeline.codec.decode, target, scale=scale)
        )
        far.append((images - target).square().mean().item())
    assert far[1] < far[0]


# -- conditions --------------------------------------------------------------------------------------------------------


def spec(**changes):
    known = {"class_names": ["cat", "dog"], "box_names": ["cat", "dog"], "segmentation_classes": 4, "factor": 8}
    captions = {"captions": lambda: iter(["a cat", "a dog", "two cats"] * 20)}
    return data_spec(**{**known, **captions, "latent_shape": (CHANNELS, LENGTH), "prefers_tokens": False, **changes})


@pytest.mark.parametrize("kind", ["segmentation", "low-resolution", "inpainting", "map"])
def test_what_needs_a_plane_is_refused(kind):
    sections = DenoiserSection(condition=[kind]).condition
    with pytest.raises(LatelierError, match=f"'{kind}' is concatenated to latents on a 2-D grid, .* 12 1-D latents"):
        build_conditioner(sections, spec())
    with pytest.raises(LatelierError, match=f"'{kind}' is concatenated"):
        build_conditioner([*DenoiserSection(condition="class").condition, *sections], spec())
    assert build_conditioner(sections, spec(latent_shape=(CHANNELS, 4, 4))).spatial_channels


@pytest.mark.parametrize("size", ["T", "S"])
def test_unets_are_refused(size):
    section = DenoiserSection(kind="unet", size=size)
    with pytest.raises(LatelierError, match=r"kind = unet needs latents on a 2-D grid, .* are 1-D \(12 positions\)"):
        build_denoiser(section, (CHANNELS, LENGTH))


@pytest.mark.parametrize("kind", ["sit", "lightning-dit"])
@pytest.mark.parametrize("told", ["text", "layout"])
def test_tokens_are_told(tmp_path, kind, told):
    if told == "text":
        pytest.importorskip("tokenizers", reason="captions need pip install 'latelier[text]'")
        section = {"kind": "text", "length": 8, "dim": 16, "layers": 1, "heads": 2, "head_dim": 4}
        asked, other = {"prompts": ["a cat"]}, {"prompts": ["two dogs"]}
    else:
        section = {"kind": "layout", "tokens": 101, "objects": 3, "dim": 16, "layers": 1, "heads": 2, "head_dim": 4}
        asked, other = ({"layouts": [[(name, 0.1, 0.1, 0.9, 0.9)]]} for name in ("cat", "dog"))
    denoiser = DenoiserSection(kind=kind, size="XS", model=SMALL, condition=[section])
    conditioner = build_conditioner(denoiser.condition, spec())
    assert isinstance(conditioner, LayoutConditioner) == (told == "layout")
    model = randomise(build_denoiser(denoiser, (CHANNELS, LENGTH), token_width=conditioner.token_width))
    dropped = [conditioner.input_name]
    pipeline = LatentDiffusionPipeline.build(make_codec(), model, conditioner.eval(), Flow(), (32, 32), dropped)
    pipeline.save_pretrained(tmp_path)
    again, settings = LatentDiffusionPipeline.from_pretrained(tmp_path), {"sampler": "sde", "guidance": 2.0}
    images = draw(pipeline, **asked, **settings)
    assert images.shape == (1, 3, 32, 32)
    torch.testing.assert_close(draw(again, **asked, **settings), images)
    assert not torch.allclose(draw(pipeline, **other, **settings), images, atol=1e-4)


# -- what a row has not ------------------------------------------------------------------------------------------------


def test_windows_tiles_and_another_size_are_refused():
    """1-D latents do not lie on a plane, nor tell the image's size, so none but the tokenizer's can be drawn."""
    pipeline = LatentDiffusionPipeline.build(make_codec(), transformer("sit"), None, Flow(), (32, 32))
    refused(r"sample.tile = 4 cuts latents that lie on a plane", draw, pipeline, tile=4)
    refused("do not lie on a plane", decode_tiled, pipeline.codec, torch.randn(1, CHANNELS, LENGTH), 4, 2)
    refused("32 x 32", draw, pipeline, height=64, width=64)
    refused("32 x 32", pipeline.codec.encode, torch.zeros(1, 3, 64, 64))
