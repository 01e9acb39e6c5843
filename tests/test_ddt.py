"""DDT, the transformer with a wide head: parity with RAE's DiT-DH, grids, conditions, prefixes, sizes."""

import json
from functools import partial

import pytest
import synth
import torch

from latelier.conditioning.condition import Condition
from latelier.convert import from_official
from latelier.denoisers import build_denoiser
from latelier.denoisers.ddt import DDT, SIZES
from latelier.denoisers.objective import DenoiserSection
from latelier.diffusion.cfg import guided
from test_dit import randomise
from test_goldens import FOLDER, Golden
from tiny import refused

SMALL = {"dim": 16, "depth": 2, "heads": 2, "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}


@torch.no_grad()
def test_golden_of_dit_dh():
    golden = Golden("rae_ddt_small", "dit-dh")
    model, conditioner = golden.converted.model, golden.converted.conditioner
    x, t = golden.normal(golden.inputs["x"]), torch.tensor(golden.inputs["t"])
    label = {"label": torch.tensor(golden.inputs["y"])}
    golden.check("velocity", model(x, t, conditioner(label)))

    keys = [(k["name"], k["shape"]) for k in json.loads((FOLDER / "rae_ddt_small.keys.json").read_text())["weak_keys"]]
    config = golden.meta["config"]["weak"] | {"input_size": 6}
    kept = [(name, shape) for name, shape in keys if name != "pos_embed" and "_rope." not in name]
    weak = from_official("dit-dh", synth.synthetic_state_dict(kept, golden.meta["weight_seed"] + 100), **config)
    golden.check("weak", weak.model(x, t, weak.conditioner(label)))
    guide = partial(weak.model, condition=weak.conditioner(label))
    golden.check("autoguided", guided(model, conditioner(label), None, 1.42, weak=guide)(x, t))

    one = conditioner({"label": torch.tensor([3])})
    for time in (0.9, 0.3):  # classifier-free guidance at 1.5 on [0.5, 1]
        predict = guided(model, one, conditioner.null(1), 1.5, (0.5, 1.0))
        golden.check(f"cfg_t{time}", predict(x[:1], torch.tensor([time])))


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 6, 10), (4, 16)])
def test_grids_conditions_and_prefixes(shape):
    model = randomise(DDT(4, shape[1:], 2, **SMALL, spatial_channels=3, context_dim=5, prefix_channels=True))
    x, t = torch.randn(2, *shape), torch.tensor([0.2, 0.9])
    whole = Condition(torch.randn(2, 16), torch.randn(2, 6, 5), torch.ones(2, 6).bool(), torch.randn(2, 3, *shape[1:]))
    out = model(x, t, whole)
    assert out.shape == x.shape
    for change in ("vector", "tokens", "spatial"):
        other = Condition(**{**vars(whole), change: -getattr(whole, change)})
        assert not torch.allclose(model(x, t, other), out)
    assert not torch.allclose(model(x, 1 - t, whole), out)
    torch.testing.assert_close(
        model(x[:, :2], t, whole), model(x * torch.tensor([1, 1, 0, 0]).view(4, *[1] * (x.ndim - 2)), t, whole)[:, :2]
    )
    fresh = DDT(4, shape[1:], 2, **SMALL)
    assert torch.equal(fresh(x, t), torch.zeros_like(x))
    larger = torch.randn(1, 4, *(2 * side for side in shape[1:]))
    assert randomise(fresh)(larger, t[:1]).shape == larger.shape


def test_saving_keeps_the_frequencies_and_checkpointing_changes_nothing(tmp_path):
    model = randomise(DDT(4, (4, 4), **SMALL)).train()
    model.save_pretrained(tmp_path)
    x, t = torch.randn(2, 4, 4, 4), torch.rand(2)
    assert torch.equal(DDT.from_pretrained(tmp_path)(x, t), model.eval()(x, t))
    gradients = []
    for how in ("disable", "enable"):
        model.zero_grad()
        getattr(model.train(), f"{how}_gradient_checkpointing")()
        model(x, t).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_a_position_is_told_by_the_conditions_alone():
    """The stream of the head has no table: without rotary positions, equal conditions make equal tokens."""
    model = randomise(DDT(4, (4, 4), **SMALL))
    torch.nn.init.zeros_(model.s_project.weight)  # the same condition everywhere
    x = torch.randn(1, 4, 1, 1).expand(1, 4, 4, 4)
    out = model(x, torch.tensor([0.5]))
    torch.testing.assert_close(out, out[..., :1, :1].expand_as(out))


def test_sizes_of_the_paper():
    with torch.device("meta"):
        for size, millions in {"S": 196.46, "B": 294.30, "L": 621.74, "XL": 838.68}.items():
            model = build_denoiser(DenoiserSection(kind="ddt", size=size), (768, 16, 16))
            classes = 1001 * model.config["dim"]  # the table of classes is in the sheet's count
            fixed = sum(b.numel() for b in model.buffers())  # and so are its position table and frequencies
            assert round((sum(p.numel() for p in model.parameters()) + classes + fixed) / 1e6, 2) == millions
    assert set(SIZES) == {"XS", "T", "S", "B", "L", "XL"}
    refused("heads = 3 are 10 wide", DDT, 4, (4, 4), **{**SMALL, "decoder_heads": 3})
