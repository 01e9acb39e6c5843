"""Official U-Nets of latent diffusion: parity, averaged weights, what is read off the shapes, what does not fit."""

from functools import partial

import pytest
import torch

from latelier.conditioning.condition import Condition
from latelier.convert import from_official
from latelier.convert.ldm_unet import _heads as released_heads
from latelier.denoisers.unet import SIZES, CrossAttentionUNet, UNet, architecture
from latelier.errors import LatelierError
from test_goldens import Golden
from tiny import refused

PREFIX, EMA = "model.diffusion_model.", "model_ema.diffusion_model"


@pytest.mark.parametrize("name", ["celeba256", "churches256", "cin256", "inpainting", "text2img256"])
@torch.no_grad()
def test_goldens(name):
    golden = Golden(f"ldm_unet_{name}_small", "ldm-unet")
    model, x = golden.converted.model, golden.normal(golden.inputs["x"])
    t, channels = torch.tensor(golden.inputs["t"]) / 1000, model.config["out_channels"]
    spatial = x[:, channels:] if x.shape[1] > channels else None
    tokens = golden.normal(golden.inputs["context"]) if "context" in golden.inputs else None
    golden.check("eps", model(x[:, :channels], t, Condition(tokens=tokens, spatial=spatial)))
    assert sum(p.numel() for p in model.parameters()) == golden.meta["parameters"]
    assert golden.converted.conditioner is None


def official(token_width=0, updown=False, depth=1, scale_shift=False):
    """A small U-Net of two levels, one block each, under LDM's names: inverse of the converter, written by level."""
    plan = {"widths": (32, 64), "attention": (2,), "layers": 1, "depth": depth, "scale_shift": scale_shift}
    arguments = architecture(**plan, heads=4, updown=updown, token_width=token_width)
    model = (CrossAttentionUNet if token_width else UNet)(**arguments, in_channels=3, out_channels=3).eval()
    places = {
        "time_embedding.linear_1.": "time_embed.0.", "time_embedding.linear_2.": "time_embed.2.",
        "conv_in.": "input_blocks.0.0.", "conv_norm_out.": "out.0.", "conv_out.": "out.2.",
        "down_blocks.0.resnets.0.": "input_blocks.1.0.",
        "down_blocks.0.downsamplers.0.": "input_blocks.2.0.",
        "down_blocks.1.resnets.0.": "input_blocks.3.0.", "down_blocks.1.attentions.0.": "input_blocks.3.1.",
        "mid_block.resnets.0.": "middle_block.0.", "mid_block.attentions.0.": "middle_block.1.",
        "mid_block.resnets.1.": "middle_block.2.",
        "up_blocks.0.resnets.0.": "output_blocks.0.0.", "up_blocks.0.attentions.0.": "output_blocks.0.1.",
        "up_blocks.0.resnets.1.": "output_blocks.1.0.", "up_blocks.0.attentions.1.": "output_blocks.1.1.",
        "up_blocks.0.upsamplers.0.": "output_blocks.1.2.",
        "up_blocks.1.resnets.0.": "output_blocks.2.0.", "up_blocks.1.resnets.1.": "output_blocks.3.0.",
    }  # fmt: skip
    leaves = {
        "norm1.": "in_layers.0.", "conv1.": "in_layers.2.", "time_emb_proj.": "emb_layers.1.",
        "norm2.": "out_layers.0.", "conv2.": "out_layers.3.", "conv_shortcut.": "skip_connection.",
        "group_norm.": "norm.", "to_out.0.": "proj_out.",
    }  # fmt: skip
    weights, qkv = {}, {}
    for name, tensor in model.state_dict().items():
        ours = next(place for place in places if name.startswith(place))
        leaf, theirs = name[len(ours) :], places[ours]
        old = next((old for old in leaves if leaf.startswith(old)), None)
        if ours.endswith("downsamplers.0.") and leaf.startswith("conv."):
            weights[theirs + leaf.replace("conv.", "op.")] = tensor
        elif leaf.startswith(("to_q.", "to_k.", "to_v.")):
            qkv.setdefault(theirs + "qkv." + leaf.rsplit(".", 1)[1], []).append(tensor.unflatten(0, (4, -1)))
        elif leaf.startswith("to_out"):
            weights[theirs + leaves[old] + leaf[len(old) :]] = tensor[..., None] if tensor.ndim == 2 else tensor
        else:
            weights[theirs + (leaf if old is None else leaves[old] + leaf[len(old) :])] = tensor
    for name, parts in qkv.items():  # [head][q, k, v][dim]
        rows = torch.stack(parts, 1).flatten(0, 2)
        weights[name] = rows[..., None] if rows.ndim == 2 else rows
    return model, weights


def said(model):
    x, t = torch.randn(2, 3, 8, 8, generator=torch.manual_seed(5)), torch.tensor([0.1, 0.7])
    width = model.config.get("cross_attention_dim")
    tokens = torch.randn(2, 4, width, generator=torch.manual_seed(6)) if width else None
    with torch.no_grad():
        return model(x, t, Condition(tokens=tokens))


@pytest.mark.parametrize(
    "plan",
    [{}, {"updown": True}, {"scale_shift": True}, {"token_width": 24, "depth": 2}],
    ids=["plain", "updown", "scale-shift", "cross-attention"],
)
@pytest.mark.parametrize("heads", [{"num_heads": 4}, {"num_head_channels": 16, "num_heads": -1}])
def test_plan_is_read_off_names_and_shapes(plan, heads):
    model, weights = official(**plan)
    converted = from_official("ldm-unet", {PREFIX + name: w for name, w in weights.items()}, **heads).model
    assert type(converted) is type(model)
    assert torch.equal(said(converted), said(model))


def test_new_order_of_attention():
    model, weights = official()
    for name, rows in weights.items():
        if "qkv." in name:
            weights[name] = rows.unflatten(0, (4, 3, -1)).transpose(0, 1).flatten(0, 2)
    assert not torch.allclose(said(from_official("ldm-unet", weights, num_heads=4).model), said(model))
    converted = from_official("ldm-unet", weights, num_heads=4, use_new_attention_order=True).model
    assert torch.equal(said(converted), said(model))


def test_whole_checkpoint():
    model, weights = official(token_width=24)
    checkpoint = {PREFIX + name: w + 1 for name, w in weights.items()}
    checkpoint |= {EMA + name.replace(".", ""): w for name, w in weights.items()}
    checkpoint |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    checkpoint |= {"betas": torch.zeros(1000), "first_stage_model.encoder.conv_in.weight": torch.zeros(1)}
    checkpoint["cond_stage_model.embedding.weight"] = table = torch.randn(1001, 24)
    converted = from_official("ldm-unet", checkpoint, num_heads=4)
    assert torch.equal(said(converted.model), said(model))

    label, drop = {"label": torch.tensor([3, 4])}, torch.tensor([False, True])
    told = converted.conditioner(label, drop).tokens
    assert torch.equal(told, table[[3, 1000]][:, None])
    assert converted.conditioner.config["num_classes"] == 1000

    del checkpoint[f"{EMA}out2bias"]
    with pytest.raises(LatelierError, match=r"complete LDM checkpoint: it has no 'model_ema.diffusion_modelout2b"):
        from_official("ldm-unet", checkpoint, num_heads=4)


def test_class_embedding_without_a_null_class():
    _, weights = official(token_width=24)
    embedding = {"cond_stage_model.embedding.weight": torch.randn(1000, 24)}
    assert not from_official("ldm-unet", weights | embedding, num_heads=4).conditioner.config["null"]
    own = {"cond_stage_model.embedding.weight": torch.randn(11, 24)}
    conditioner = from_official("ldm-unet", weights | own, num_heads=4, classes=10).conditioner
    assert conditioner.config["null"]


@pytest.mark.parametrize(("size", "heads"), [("cin256-v2", {"heads": 1}), ("text2img256", {"head_width": 32})])
def test_heads_of_released_models_are_known(size, heads):
    read = {"layers": 2, "depth": 1, "scale_shift": False, "updown": False}
    read |= {key: value for key, value in SIZES[f"ldm-{size}"].items() if key not in heads}
    assert (released_heads(read, {}), released_heads(read, {"num_heads": 8})) == (heads, {"heads": 8})


def test_what_does_not_fit():
    (_, weights), read, one = official(), partial(from_official, "ldm-unet", num_heads=4), torch.zeros(1)
    refused("heads cannot be read off", from_official, "ldm-unet", weights)
    more = {**weights, "label_emb.weight": one}
    refused(r"expected time_embed.\*, .* but it has 'label_emb.weight'", read, more)
    none = {"encoder.conv_in.weight": one}
    refused(r"not a LDM U-Net checkpoint: it has no 'input_blocks.0.0.weight'", read, none)
    refused("5 input_blocks and 4 output_blocks, 2 to a level", read, {**weights, "input_blocks.4.0.op.weight": one})
    bias = "output_blocks.0.0.in_layers.0.bias"
    less = {name: w for name, w in weights.items() if name != bias}
    refused(r"1 missing \(up_blocks.0.resnets.0.norm1.bias\)", read, less)
    refused(r"size mismatch for up_blocks.0.resnets.0.norm1.bias", read, {**weights, bias: torch.zeros(5)})
