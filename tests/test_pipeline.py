"""The pipeline: saved and loaded whole, the same image for the same seed."""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ConfigMixin,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    ModelMixin,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import register_to_config

from latelier import recipe
from latelier.conditioning.condition import ClassConditioner
from latelier.diffusion.process import Flow, build_process
from latelier.diffusion.schedulers import ReverseSDE
from latelier.errors import LatelierError
from latelier.pipeline import LatentDiffusionPipeline
from latelier.tokenizers.codec import Codec


class TinyDenoiser(ModelMixin, ConfigMixin):
    """A convolution of x_t, plus the condition."""

    @register_to_config
    def __init__(self, channels: int = 4):
        super().__init__()
        self.conv = torch.nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_t, t, condition=None):
        out = self.conv(x_t) + t[:, None, None, None]
        return out if condition is None else out + condition.vector[:, :, None, None]


def make(condition=True, kind="flow", statistics=True, channels=3, null=True):
    tokenizer = AutoencoderKL(
        in_channels=channels, out_channels=channels, block_out_channels=[8, 8], norm_num_groups=4, latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    ).eval()  # fmt: skip
    codec = Codec(tokenizer)
    if statistics:
        codec = Codec(tokenizer, torch.tensor([0.1, -0.2, 0.3, 0.0]), torch.tensor([1.0, 2.0, 0.5, 1.5]))
    conditioner = ClassConditioner(3, 4, null, ["cat", "dog", "bird"]) if condition else None
    pipeline = LatentDiffusionPipeline.build(codec, TinyDenoiser(), conditioner, build_process(kind), (16, 24))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, **kwargs):
    return pipeline(**{"steps": 3, "output_type": "pt", "precision": "fp32", "progress": False, **kwargs}).images


def test_statistics_of_elements_are_kept(tmp_path):
    plain = make()
    mean, std = torch.randn(4, 8, 12), torch.rand(4, 8, 12) + 0.5
    codec = Codec(plain.tokenizer, mean, std)
    LatentDiffusionPipeline.build(codec, plain.denoiser, None, build_process("flow"), (16, 24)).save_pretrained(
        tmp_path
    )
    again = LatentDiffusionPipeline.from_pretrained(tmp_path)
    assert torch.equal(again.codec.mean, mean)
    assert torch.equal(again.codec.std, std)
    with pytest.raises(LatelierError, match="of each element of a grid of 8 x 12, not 16 x 24"):
        draw(again, count=1, height=32, width=48)


@pytest.mark.parametrize("condition", [True, False])
@pytest.mark.parametrize("kind", ["flow", "ddpm"])
@pytest.mark.parametrize("statistics", [True, False])
def test_save_and_load_whole(tmp_path, condition, kind, statistics):
    pipeline = make(condition, kind, statistics)
    before = draw(pipeline, count=2)
    pipeline.save_pretrained(tmp_path)
    again = LatentDiffusionPipeline.from_pretrained(tmp_path)
    assert torch.equal(draw(again, count=2), before)
    assert (again.conditioner is None) != condition
    assert isinstance(again.denoiser, TinyDenoiser)
    assert again.process == pipeline.process
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["denoiser"] == ["test_pipeline", "TinyDenoiser"]
    assert index["tokenizer"] == ["diffusers", "AutoencoderKL"]


def test_same_image_whatever_the_batch():
    pipeline = make()
    composite = draw(pipeline, count=5, seed=10, guidance=2.0)
    torch.testing.assert_close(draw(pipeline, count=5, seed=10, guidance=2.0, batch=2), composite)
    torch.testing.assert_close(draw(pipeline, classes=["bird"], seed=12, guidance=2.0), composite[2:3])
    assert not torch.allclose(draw(pipeline, classes=["bird"], seed=13, guidance=2.0), composite[2:3])


def test_classes_by_name_or_index():
    pipeline = make()
    by_name = draw(pipeline, classes=["dog", "cat"], count=3)
    assert torch.equal(draw(pipeline, classes=[1, "0", 1], count=3), by_name)
    assert len(draw(pipeline, classes=["dog", "cat"])) == 2
    with pytest.raises(LatelierError, match="Unknown class 'cow'; this model knows: cat, dog, bird"):
        draw(pipeline, classes=["cow"])


def test_size_and_kinds_of_output():
    pipeline = make()
    images = draw(pipeline, count=2)
    assert images.shape == (2, 3, 16, 24)
    assert images.abs().max() <= 1
    pil = draw(pipeline, count=2, output_type="pil")
    assert pil[0].size == (24, 16)
    array = draw(pipeline, count=2, output_type="np")
    np.testing.assert_allclose(array, (images.permute(0, 2, 3, 1).numpy() + 1) / 2, atol=1e-6)
    assert np.abs(np.asarray(pil[1]) / 255 - array[1]).max() <= 0.5 / 255 + 1e-6
    latents = draw(pipeline, count=2, output_type="latent")
    torch.testing.assert_close(pipeline.codec.decode(latents).clamp(-1, 1), images)
    assert draw(pipeline, height=32, width=8).shape == (1, 3, 32, 8)
    assert draw(make(channels=1), output_type="pil")[0].mode == "L"


def test_settings_of_a_recipe():
    pipeline = make()
    sample = recipe.Sample(steps=3, guidance=2.0, classes=["dog"], count=3, seed=4, batch=2)
    expected = draw(pipeline, classes=["dog"], count=3, guidance=2.0, seed=4)
    torch.testing.assert_close(draw(pipeline, sample=sample), expected)
    assert len(draw(pipeline, sample=sample, count=2)) == 2  # what is given beside it wins


def test_another_scheduler():
    pipeline = make()
    euler = draw(pipeline, steps=8)
    pipeline.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    other = draw(pipeline, steps=8)
    assert not torch.equal(other, euler)
    assert torch.equal(draw(pipeline, steps=8), other)
    assert torch.equal(draw(pipeline, steps=8, sampler="euler"), euler)


@pytest.mark.parametrize("kind", ["flow", "ddpm"])
def test_a_scheduler_of_another_process_is_refused(kind):
    of_flows = [
        FlowMatchEulerDiscreteScheduler(), FlowMatchHeunDiscreteScheduler(shift=3.0), ReverseSDE(),
        DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    ]  # fmt: skip
    of_ddpm = [cls.from_config(make(kind="ddpm").scheduler.config) for cls in (DDIMScheduler, UniPCMultistepScheduler)]
    neither = [DDIMScheduler(), EDMEulerScheduler(), UniPCMultistepScheduler(use_flow_sigmas=True)]
    good, others = (of_flows, of_ddpm) if kind == "flow" else (of_ddpm, of_flows)
    pipeline = make(kind=kind)
    for scheduler in good:
        pipeline.scheduler = scheduler
        assert draw(pipeline, steps=4).isfinite().all()
    for scheduler in [*others, *neither]:
        pipeline.scheduler = scheduler
        with pytest.raises(LatelierError, match=f"this model: {kind}"):
            draw(pipeline, steps=4)
        assert draw(pipeline, steps=4, sampler="euler").isfinite().all()  # by name, the pipeline's own has no part


def test_a_scheduler_for_another_prediction_is_refused():
    pipeline = make(kind="ddpm")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type="v_prediction")
    with pytest.raises(LatelierError, match="a prediction of epsilon"):
        draw(pipeline)


def test_bf16_is_close():
    pipeline = make()
    images, half = draw(pipeline, count=2), draw(pipeline, count=2, precision="bf16")
    assert half.dtype == torch.float32
    assert (half - images).abs().max() < 0.1


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ({}, {"output_type": "gif"}, "output_type = 'gif' is not known; allowed: pil, pt, np, latent"),
        ({}, {"height": 15}, "15 x 24 is not divisible by the tokenizer's factor 2"),
        ({}, {"prompts": ["a cat"]}, "prompts = 'a cat' is no input of this model, which is conditioned on classes"),
        ({}, {"stepps": 3}, "stepps = 3 is neither a list of inputs nor a setting; settings are steps, guidance"),
        ({}, {"steps": 0}, "steps = 0 is not allowed; it should be greater than or equal to 1"),
        ({}, {"sampler": "ddim"}, "'ddim' does not go with a flow process"),
        ({}, {"eta": 0.5}, "eta = 0.5 acts in the ddim sampler only"),
        ({"condition": False}, {"guidance": 2.0}, "guidance = 2.0, but this model is unconditional"),
        (
            {"condition": False},
            {"classes": ["cat"]},
            "classes = 'cat' is no input of this model, which is unconditional",
        ),
        ({"null": False}, {"guidance": 2.0}, "no null class"),
        ({"channels": 4}, {"output_type": "pil"}, "4 channels are no PIL images"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options, settings, message):
    with pytest.raises(LatelierError, match=message):
        draw(make(**options), **settings)


def test_opens_in_a_fresh_process(tmp_path):
    import subprocess
    import sys

    from latelier.conditioning.condition import ClassConditioner
    from latelier.denoisers.dit import DiT
    from latelier.tokenizers.vmae import VMAE

    small = {"dim": 16, "depth": 1, "heads": 2}
    vmae = VMAE((16, 16), 8, latent_channels=4, **small, **{f"decoder_{k}": v for k, v in small.items()})
    parts = (DiT(4, (2, 2), **small), ClassConditioner(2, 16))
    LatentDiffusionPipeline.build(Codec(vmae), *parts, Flow(), (16, 16)).save_pretrained(tmp_path)
    script = f"""if True:
        from latelier import LatentDiffusionPipeline
        pipeline = LatentDiffusionPipeline.from_pretrained({str(tmp_path)!r})
        print(pipeline(classes=[1], steps=1, progress=False).images[0].size)
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(16, 16)", done.stderr
