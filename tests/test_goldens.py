"""Parity with the original implementations on synthetic weights."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import synth
import torch

from latelier.convert import from_official
from latelier.diffusion.cfg import guided
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.vmae import VMAEObjective

FOLDER = Path(__file__).parent / "golden"


class Golden:
    """One golden: weights, stored outputs, and how to compare with them."""

    def __init__(self, name: str, kind: str):
        pairs, _ = synth.read_key_list(FOLDER / f"{name}.keys.json")
        self.arrays = np.load(FOLDER / f"{name}.npz")
        self.meta = json.loads(bytes(self.arrays["meta"]))
        weights = synth.synthetic_state_dict(pairs, self.meta["weight_seed"])
        assert synth.checksum(weights) == self.meta["weights_crc32"]
        self.converted = from_official(kind, weights, **self.meta["config"])
        self.inputs = self.meta["inputs"]

    def normal(self, text: str) -> torch.Tensor:
        shape, seed, tag = re.match(r"normal\((\(.*?\)), (\d+), '(.*?)'\)", text).groups()
        return torch.from_numpy(synth.normal(tuple(json.loads(f"[{shape[1:-1]}]")), int(seed), tag))

    def check(self, name: str, value: torch.Tensor) -> None:
        about, value = self.meta["outputs"][name], value.detach().numpy()
        if f"{name}_pool16" in self.arrays:
            pooled = torch.nn.functional.avg_pool2d(torch.from_numpy(value), 16).numpy()
            np.testing.assert_allclose(pooled, self.arrays[f"{name}_pool16"], 1e-4, about["suggested_atol"])
        if "::3, ::3" in about["stored"]:
            value = value[..., ::3, ::3]
        elif "::4" in about["stored"]:
            value = value[..., ::4]
        np.testing.assert_allclose(
            value.reshape(self.arrays[name].shape), self.arrays[name], 1e-4, about["suggested_atol"]
        )


@torch.no_grad()
def test_vmae_tuned():
    golden = Golden("vmae_f8d16_256", "vmae")
    codec = Codec(golden.converted.model)
    posterior = codec.posterior(synth.synthetic_images(1, 256, 10))
    golden.check("moments", torch.cat([posterior.mean, posterior.logvar], 1))
    golden.check("kl", 0.5 * (posterior.logvar.exp() - 1 - posterior.logvar).sum()[None])
    golden.check("decode_mean", codec.decode(posterior.mean))
    golden.check("decode_noise", codec.decode(golden.normal("normal((1, 16, 32, 32), 10, 'vmae/latent')")))
    assert sum(p.numel() for p in codec.tokenizer.parameters()) == 10_798_388


@torch.no_grad()
def test_vmae_stage1_losses():
    golden = Golden("vmae_stage1_128", "vmae")
    model, images = golden.converted.model, synth.synthetic_images(2, 128, 20)
    keep = torch.from_numpy(golden.arrays["ids_shuffle"])[:, :192].long()
    noise = torch.from_numpy(golden.arrays["posterior_noise"]).transpose(1, 2)
    golden.check("visible_moments", model.moments(images, keep))

    def objective(kl, v):
        return VMAEObjective(model, 0, mask_ratio=0.25, visible_weight=v, kl=kl).terms(images, keep, noise)

    free, fixed = objective("free-mean", 0.5), objective("fixed-std", 0.5)
    golden.check("reconstruction", free.reconstruction.detach())
    golden.check("mse_visible", free.losses["mse_visible"][None])
    golden.check("mse_masked", free.losses["mse_masked"][None])
    golden.check("kl_free", free.losses["kl"][None])
    golden.check("kl_fixed", fixed.losses["kl"][None])
    golden.check("loss_free", free.total[None])
    golden.check("loss_fixed", fixed.total[None])
    golden.check("loss_free_visible_ratio_0.75", objective("free-mean", 0.75).total[None])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lightningdit_b1_imagenet", "lightning-dit"),
        ("lightningdit_b1_celebahq", "lightning-dit"),
        ("sit_s2_32", "sit"),
        ("maetok_sit_b1_128x32", "maetok-sit"),
    ],
)
@torch.no_grad()
def test_transformers(name, kind):
    golden = Golden(name, kind)
    model, conditioner = golden.converted.model, golden.converted.conditioner
    x, t = golden.normal(golden.inputs["x"]), torch.tensor(golden.inputs["t"])
    condition = conditioner({"label": torch.tensor(golden.inputs["y"])})
    if kind == "maetok-sit":  # (b, l, c) there, and our direction of time already
        golden.check("velocity", model(x.transpose(1, 2), t, condition).transpose(1, 2))
        return
    golden.check("velocity", -model(x, 1 - t, condition))
    if "guided_t0.5" in golden.meta["outputs"]:
        one = conditioner({"label": torch.tensor([7])})
        for theirs in (0.05, 0.5):  # guided on three channels, switched off for t < 0.10 of theirs
            ours = torch.tensor([1 - theirs])
            guidance = guided(model, one, conditioner.null(1), 10.0, (0.0, 0.9), channels=3)(x[:1], ours)
            golden.check(f"guided_t{theirs}", -guidance)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("dcae_uvit_s_f32c32", "uvit"), ("dcae15_usit_small_f64c128", "usit"), ("dcae_sit_small_f32c32", "dcae-sit")],
)
@torch.no_grad()
def test_denoisers_of_dcae(name, kind):
    golden = Golden(name, kind)
    model, x, t = golden.converted.model, golden.normal(golden.inputs["x"]), torch.tensor(golden.inputs["t"])
    told = golden.converted.conditioner({"label": torch.tensor(golden.inputs["y"])})

    def output(x):
        return model(x, t / 1000, told) if kind == "uvit" else -model(x, 1 - t, told)

    golden.check("output", output(x))
    for length in (16, 64):
        if f"output_first{length}" in golden.arrays:
            golden.check(f"output_first{length}", output(x[:, :length]))
