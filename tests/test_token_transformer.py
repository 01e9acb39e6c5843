"""The transformer over tokens: the original's function, its mask, and conversion of the original's weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import synth
import torch
import torch.nn.functional as F

from latelier.conditioning.text import TokenTransformer
from latelier.convert import from_official
from latelier.convert.ldm import layout_conditioner
from latelier.errors import LatelierError
from tiny import refused

GOLDEN = Path(__file__).parent / "golden"
SIZES = {"vocabulary": 50, "length": 8, "dim": 24, "layers": 2, "heads": 2, "head_dim": 8}


@torch.no_grad()
def test_golden_layout_transformer():
    pairs, _ = synth.read_key_list(GOLDEN / "ldm_bert_layout2img.keys.json")
    arrays = np.load(GOLDEN / "ldm_bert_layout2img.npz")
    meta = json.loads(bytes(arrays["meta"]))
    weights = synth.synthetic_state_dict(pairs, meta["weight_seed"])
    assert synth.checksum(weights) == meta["weights_crc32"]
    model = from_official("ldm-text", weights, **meta["config"]).model
    embedding = model(torch.from_numpy(arrays["tokens"]))  # (2, 92, 512)
    atol = meta["outputs"]["embedding"]["suggested_atol"]
    np.testing.assert_allclose(embedding[..., ::2].numpy(), arrays["embedding"], 1e-4, atol)


def official(vocabulary, length, dim, layers, heads, head_dim):
    """Random weights under the original's names, with an inner width that is not the width."""
    inner, prefix = heads * head_dim, "transformer.attn_layers.layers."
    shapes = {
        "transformer.token_emb.weight": (vocabulary, dim),
        "transformer.pos_emb.emb.weight": (length, dim),
        "transformer.norm.weight": (dim,),
        "transformer.norm.bias": (dim,),
        "transformer.to_logits.weight": (vocabulary, dim),
        "transformer.to_logits.bias": (vocabulary,),
    }
    for i in range(layers):
        for layer in (2 * i, 2 * i + 1):
            shapes |= {f"{prefix}{layer}.0.weight": (dim,), f"{prefix}{layer}.0.bias": (dim,)}
        shapes |= {f"{prefix}{2 * i}.1.to_{x}.weight": (inner, dim) for x in "qkv"}
        shapes |= {f"{prefix}{2 * i}.1.to_out.weight": (dim, inner), f"{prefix}{2 * i}.1.to_out.bias": (dim,)}
        mlp = f"{prefix}{2 * i + 1}.1.net."
        shapes |= {f"{mlp}0.0.weight": (4 * dim, dim), f"{mlp}0.0.bias": (4 * dim,)}
        shapes |= {f"{mlp}2.weight": (dim, 4 * dim), f"{mlp}2.bias": (dim,)}
    return synth.synthetic_state_dict(shapes.items(), 0)


def plainly(w, tokens, heads):
    """The function, one sequence and one head at a time, read off the original's names."""
    x = w["transformer.token_emb.weight"][tokens] + w["transformer.pos_emb.emb.weight"][: len(tokens)]  # (n, d)
    dim = x.shape[1]
    for i in range(4):
        name = f"transformer.attn_layers.layers.{i}."
        y = F.layer_norm(x, (dim,), w[name + "0.weight"], w[name + "0.bias"])
        if i % 2 == 0:
            q, k, v = ((y @ w[f"{name}1.to_{p}.weight"].T).chunk(heads, dim=1) for p in "qkv")
            seen = [(a @ b.T / a.shape[1] ** 0.5).softmax(1) @ c for a, b, c in zip(q, k, v)]
            y = torch.cat(seen, 1) @ w[name + "1.to_out.weight"].T + w[name + "1.to_out.bias"]
        else:
            y = F.gelu(y @ w[name + "1.net.0.0.weight"].T + w[name + "1.net.0.0.bias"])
            y = y @ w[name + "1.net.2.weight"].T + w[name + "1.net.2.bias"]
        x = x + y
    return F.layer_norm(x, (dim,), w["transformer.norm.weight"], w["transformer.norm.bias"])


@torch.no_grad()
def test_inner_width_need_not_be_the_width():
    weights = official(**SIZES)
    model = from_official("ldm-text", weights, heads=2).model
    assert {name: model.config[name] for name in SIZES} == SIZES
    tokens = torch.randint(0, 50, (3, 8))
    torch.testing.assert_close(model(tokens), torch.stack([plainly(weights, row, 2) for row in tokens]))


def test_a_checkpoint_of_another_kind_or_with_too_much_is_refused():
    weights = official(**SIZES)
    refused(r"no 'transformer.token_emb.weight'", from_official, "ldm-text", {"encoder.weight": torch.zeros(2)})
    with pytest.raises(LatelierError, match=r"1 unknown \(transformer.extra\)"):
        from_official("ldm-text", weights | {"transformer.extra": torch.zeros(2)}, heads=2)
    del weights["transformer.attn_layers.layers.2.1.to_k.weight"]
    refused("no 'to_k'", from_official, "ldm-text", weights, heads=2)


@torch.no_grad()
def test_masked_tokens_are_as_if_they_were_not_there():
    model = TokenTransformer(**SIZES).eval()
    tokens = torch.randint(0, 50, (2, 8))
    mask = torch.arange(8) < torch.tensor([[5], [8]])  # (2, 8)
    masked = model(tokens, mask)
    torch.testing.assert_close(masked[0, :5], model(tokens[:1, :5])[0])
    torch.testing.assert_close(masked[1], model(tokens)[1])


def test_gradients_do_not_depend_on_checkpointing():
    model = TokenTransformer(**SIZES)
    tokens, gradients = torch.randint(0, 50, (2, 8)), []
    for on in (False, True):
        if on:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        model(tokens).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(plain, checkpointed)


@torch.no_grad()
def test_layout_conditioner_of_a_whole_checkpoint():
    sizes = {**SIZES, "length": 3 * 4 + 2}
    weights = {f"cond_stage_model.{name}": tensor for name, tensor in official(**sizes).items()}
    weights["model.diffusion_model.out.weight"] = torch.zeros(3)
    conditioner = layout_conditioner(weights, ["cat", "dog"], heads=2)
    assert conditioner.config["objects"] == 4
    assert conditioner.config["crop"]
    tokens = torch.randint(0, 50, (1, 14))
    alone = from_official("ldm-text", official(**sizes), heads=2).model
    assert torch.equal(conditioner({"layout_tokens": tokens}).tokens, alone(tokens))
    with pytest.raises(LatelierError, match="no room for 4 classes"):
        layout_conditioner(weights, ["cat", "dog", "cow", "hen"], heads=2)  # with four flags each
