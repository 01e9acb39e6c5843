"""MAETok's checkpoints under their original names.

Numbers of the original at full size are compared where `LATELIER_GOLDENS` is a folder that has them; a slow tokenizer
written down from its description stands in for the original at test size.
"""

import json
import math
import os
from functools import partial
from pathlib import Path

import pytest
import synth
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from typer.testing import CliRunner

import test_goldens
from latelier.cli import app
from latelier.convert import from_official
from latelier.convert.maetok import convert_auxiliary
from latelier.errors import LatelierError
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.maetok import MAETok
from test_goldens import Golden
from tiny import refused

WHOLE = os.environ.get("LATELIER_GOLDENS")
CHANNELS, DIM, HEADS, DEPTH, LATENTS, PATCH = 4, 32, 2, 2, 5, 4


@pytest.fixture
def whole_goldens(monkeypatch):
    if not WHOLE:
        pytest.skip("LATELIER_GOLDENS names no folder")
    monkeypatch.setattr(test_goldens, "FOLDER", Path(WHOLE))


# -- the original -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_golden(whole_goldens):
    golden = Golden("maetok_b128_256_rope", "maetok")
    codec, images = Codec(golden.converted.model), synth.synthetic_images(2, 256, 30)
    latents = codec.encode(images)  # (b, c, l) here, (b, l, c) there
    golden.check("latent", latents.transpose(1, 2))
    golden.check("image", codec.decode(latents[:1]))
    masked = codec.tokenizer.encode(images, mask=torch.from_numpy(golden.arrays["token_mask"]).bool()).latent
    golden.check("latent_masked", masked.transpose(1, 2))
    golden.check("image_masked", codec.decode(masked[1:]))


@torch.no_grad()
def test_golden_of_the_training_graph(whole_goldens, monkeypatch):
    kept = {}

    def keep(kind, weights, **config):
        kept.update(weights)
        return from_official(kind, weights)

    monkeypatch.setattr(test_goldens, "from_official", keep)
    golden = Golden("maetok_aux_256", "maetok")
    mask = torch.from_numpy(golden.arrays["token_mask"]).bool()
    z = golden.converted.model.moments(synth.synthetic_images(1, 256, 50), mask)
    golden.check("latent", z)
    golden.check("image_pool16", F.avg_pool2d(golden.converted.model.decode_tokens(z), 16))
    auxiliary = convert_auxiliary(kept)
    assert list(auxiliary) == ["hog", "dino", "clip"]
    for name, (body, head) in auxiliary.items():
        predicted = head(body(z))
        thinned = predicted if name == "hog" else predicted[..., ::16]
        stored, atol = golden.arrays[f"aux_{name}"], golden.meta["outputs"][f"aux_{name}"]["suggested_atol"]
        torch.testing.assert_close(thinned, torch.from_numpy(stored), rtol=1e-4, atol=atol)


# -- a tokenizer from its description ---------------------------------------------------------------------------------


def official(image=(16, 16), rope=True, cls=False, aux=()):
    """Random weights under the official names; entries that nothing uses are there too."""
    patches, width = image[0] * image[1] // PATCH**2, DIM // 2
    shapes = {
        "encoder.latent_tokens": (1, LATENTS, DIM), "encoder.mask_token": (1, 1, DIM),
        "encoder.model.cls_token": (1, 1, DIM), "encoder.model.norm.weight": (DIM,), "encoder.model.norm.bias": (DIM,),
        "quant_conv.weight": (CHANNELS, DIM), "quant_conv.bias": (CHANNELS,),
        "decoder.to_pixel.model.weight": (3 * PATCH**2, DIM), "decoder.to_pixel.model.bias": (3 * PATCH**2,),
        "quantize.unused": (1,), "projection.0.weight": (7, 7), "repa_model.blocks.0.x": (1,),
    }  # fmt: skip
    for name in aux:
        shapes |= {f"to_pixel_{name}.weight": (9, width), f"to_pixel_{name}.bias": (9,)}
    for prefix, d in [("encoder", DIM), ("decoder", DIM), *((f"decoder_{name}", width) for name in aux)]:
        shapes |= {f"{prefix}.latent_pos_embed": (1, LATENTS, d), f"{prefix}.model.pos_embed": (1, 1 + patches, d)}
        shapes |= {f"{prefix}.model.patch_embed.proj.weight": (d, 3, PATCH, PATCH)}
        shapes |= {f"{prefix}.model.patch_embed.proj.bias": (d,)}
        if rope:
            shapes |= {f"{prefix}.freqs": (2, DEPTH, d // 2), f"{prefix}.freqs_t_x": (patches,)}
        for block in (f"{prefix}.model.blocks.{i}" for i in range(DEPTH)):
            linears = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (4 * d, d), "mlp.fc2": (d, 4 * d)}
            for part, shape in linears.items():
                shapes |= {f"{block}.{part}.weight": shape, f"{block}.{part}.bias": shape[:1]}
            if prefix == "encoder":
                shapes |= {f"{block}.{n}.{part}": (d,) for n in ("norm1", "norm2") for part in ("weight", "bias")}
                shapes |= {f"{block}.ls1.gamma": (d,), f"{block}.ls2.gamma": (d,)}
            else:
                shapes |= {f"{block}.adaLN_modulation.1.weight": (4 * d, CHANNELS)}
                shapes |= {f"{block}.adaLN_modulation.1.bias": (4 * d,)}
        if prefix != "encoder":
            linear = "post_quant_conv" + prefix[len("decoder") :]
            shapes |= {f"{linear}.weight": (d, CHANNELS), f"{linear}.bias": (d,), f"{prefix}.mask_token": (1, 1, d)}
            shapes |= {f"{prefix}.model.norm.adaLN_modulation.1.weight": (2 * d, CHANNELS)}
            if cls or prefix != "decoder":
                shapes[f"{prefix}.model.cls_token"] = (1, 1, d)
    return {name: synth.synthetic_tensor(name, shape, 1) for name, shape in shapes.items()}


def norm(x):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def attend(w, block, x, first, columns, freqs):
    """Attention of one image, head by head, `(m, d)`; patches begin at `first`, `columns` of them in a row."""
    q, k, v = linear(w, f"{block}.attn.qkv", x).chunk(3, -1)
    side, result = x.shape[1] // HEADS, []
    for head in range(HEADS):
        here = slice(head * side, (head + 1) * side)
        turned = [torch.view_as_complex(y[:, here].reshape(len(x), -1, 2).clone()) for y in (q, k)]
        for i in range(0 if freqs is None else len(x) - LATENTS - first):
            f = freqs[:, head * side // 2 : (head + 1) * side // 2]
            angle = (i % columns) * f[0] + (i // columns) * f[1]
            for y in turned:
                y[first + i] = y[first + i] * torch.exp(1j * angle)
        a, b = (torch.view_as_real(y).flatten(1) for y in turned)
        result.append((a @ b.T / math.sqrt(side)).softmax(-1) @ v[:, here])
    return linear(w, f"{block}.attn.proj", torch.cat(result, -1))


def described_encoder(w, image, mask=None):
    """One image `(3, h, w)` to its latents `(l, c)`, patch by patch."""
    columns, x = image.shape[2] // PATCH, []
    for i in range(image.shape[1] // PATCH * columns):
        top, left = i // columns * PATCH, i % columns * PATCH
        patch = image[:, top : top + PATCH, left : left + PATCH]
        kernel, bias = (w[f"encoder.model.patch_embed.proj.{part}"] for part in ("weight", "bias"))
        hidden = mask is not None and mask[i]
        x.append(w["encoder.mask_token"][0, 0] if hidden else (kernel * patch).sum((1, 2, 3)) + bias)
    x = torch.cat([w["encoder.model.cls_token"][0], torch.stack(x)]) + w["encoder.model.pos_embed"][0]
    x = torch.cat([x, (w["encoder.latent_tokens"] + w["encoder.latent_pos_embed"])[0]])
    for i in range(DEPTH):
        block = f"encoder.model.blocks.{i}"
        freqs = w["encoder.freqs"][:, i] if "encoder.freqs" in w else None
        h = norm(x) * w[f"{block}.norm1.weight"] + w[f"{block}.norm1.bias"]
        x = x + w[f"{block}.ls1.gamma"] * attend(w, block, h, 1, columns, freqs)
        h = norm(x) * w[f"{block}.norm2.weight"] + w[f"{block}.norm2.bias"]
        x = x + w[f"{block}.ls2.gamma"] * linear(w, f"{block}.mlp.fc2", F.gelu(linear(w, f"{block}.mlp.fc1", h)))
    x = norm(x[-LATENTS:]) * w["encoder.model.norm.weight"] + w["encoder.model.norm.bias"]
    return linear(w, "quant_conv", x)


def described_decoder(w, z, grid, name=""):
    """Latents `(l, c)` to patches' features `(n, d)`, with the decoder of that name."""
    prefix, first = f"decoder{name}", int(f"decoder{name}.model.cls_token" in w)
    x = w[f"{prefix}.mask_token"][0].repeat(grid[0] * grid[1], 1)
    x = torch.cat([w[f"{prefix}.model.cls_token"][0], x]) if first else x
    rope = f"{prefix}.freqs" in w
    x = x if rope else x + w[f"{prefix}.model.pos_embed"][0]
    x = torch.cat([x, linear(w, f"post_quant_conv{name}", z) + w[f"{prefix}.latent_pos_embed"][0]])
    for i in range(DEPTH):
        block = f"{prefix}.model.blocks.{i}"
        modulation = linear(w, f"{block}.adaLN_modulation.1", z * z.sigmoid()).chunk(4, -1)
        for part in (0, 1):
            h, (shift, scale) = norm(x), modulation[2 * part : 2 * part + 2]
            h = torch.cat([h[:-LATENTS], h[-LATENTS:] * scale + shift])
            if part == 0:
                x = x + attend(w, block, h, first, grid[1], w[f"{prefix}.freqs"][:, i] if rope else None)
            else:
                x = x + linear(w, f"{block}.mlp.fc2", F.gelu(linear(w, f"{block}.mlp.fc1", h)))
    return norm(x[first:-LATENTS])


def described_image(w, z, grid):
    """Latents `(l, c)` to `(3, h, w)`."""
    patches = linear(w, "decoder.to_pixel.model", described_decoder(w, z, grid))
    image = torch.empty(3, grid[0] * PATCH, grid[1] * PATCH)
    for i, patch in enumerate(patches):
        top, left = i // grid[1] * PATCH, i % grid[1] * PATCH
        image[:, top : top + PATCH, left : left + PATCH] = patch.view(PATCH, PATCH, 3).permute(2, 0, 1)
    return image


@pytest.mark.parametrize(("rope", "cls"), [(True, False), (True, True), (False, True)])
@torch.no_grad()
def test_follows_the_description(rope, cls):
    w = official(rope=rope, cls=cls)
    codec = Codec(from_official("maetok", {f"module.{k}": v for k, v in w.items()}, heads=HEADS).model)
    images, mask = torch.rand(2, 3, 16, 16) * 2 - 1, torch.rand(2, 16) < 0.5
    expected = torch.stack([described_encoder(w, image).T for image in images])
    torch.testing.assert_close(codec.encode(images), expected, rtol=1e-4, atol=1e-5)
    expected = torch.stack([described_encoder(w, *pair) for pair in zip(images, mask)])
    torch.testing.assert_close(codec.tokenizer.moments(images, mask), expected, rtol=1e-4, atol=1e-5)
    z = torch.randn(2, CHANNELS, LATENTS)
    expected = torch.stack([described_image(w, one.T, (4, 4)) for one in z])
    torch.testing.assert_close(codec.decode(z), expected, rtol=1e-4, atol=1e-5)
    assert codec.tokenizer.config["positions"] == ("mixed" if rope else "absolute")


@torch.no_grad()
def test_images_that_are_not_square():
    w = official((8, 16))
    with pytest.raises(LatelierError, match=r"positions for 8 patches of 4 pixels, .* give its size as image=\[h, w\]"):
        from_official("maetok", w, heads=HEADS)
    model = from_official("maetok", w, heads=HEADS, image=[8, 16]).model
    image, z = torch.rand(1, 3, 8, 16), torch.randn(1, LATENTS, CHANNELS)
    torch.testing.assert_close(model.moments(image)[0], described_encoder(w, image[0]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.decode_tokens(z)[0], described_image(w, z[0], (2, 4)), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_auxiliary_decoders():
    w, z = official(aux=("hog", "dino")), torch.randn(1, LATENTS, CHANNELS)
    auxiliary = convert_auxiliary(w, {"aux_heads": HEADS})
    assert list(auxiliary) == ["hog", "dino"]
    for name, (body, head) in auxiliary.items():
        expected = linear(w, f"to_pixel_{name}", described_decoder(w, z[0], (4, 4), f"_{name}"))
        torch.testing.assert_close(head(body(z))[0], expected, rtol=1e-4, atol=1e-5)
    plain, trained = (from_official("maetok", weights, heads=HEADS).model for weights in (official(), w))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), trained.parameters()))


def test_what_may_lack_and_what_does_not_fit():
    w = official()
    model = from_official("maetok", {k: v for k, v in w.items() if k != "encoder.mask_token"}, heads=HEADS).model
    assert torch.equal(model.latent_queries, w["encoder.latent_tokens"])
    assert not model.training
    read, cls = partial(from_official, "maetok", heads=HEADS), torch.zeros(1, 1, 3)
    refused(r"not a MAETok checkpoint: it has no 'post_quant_conv.weight'", read, {})
    refused(r"does not fit MAETok: 1 unknown \(extra\)", read, {**w, "encoder.extra": torch.zeros(1)})
    refused(r"does not fit MAETok: size mismatch for cls_token", read, {**w, "encoder.model.cls_token": cls})
    refused("4 or 8 channels before the decoder, not 5", read, {**w, "quant_conv.weight": torch.zeros(5, DIM)})


def test_variational():
    w = official()
    double = {name: torch.cat([w[name], w[name] - 3]) for name in ("quant_conv.weight", "quant_conv.bias")}
    images = torch.rand(1, 3, 16, 16)
    plain, spread = (Codec(from_official("maetok", weights, heads=HEADS).model) for weights in (w, w | double))
    torch.testing.assert_close(spread.posterior(images).mean, plain.posterior(images).mean)
    assert spread.posterior(images).std.min() > 0


def test_the_command_writes_statistics(tmp_path):
    save_file(official(), tmp_path / "maetok.safetensors")
    options = ["--set", f"heads={HEADS}", "--set", "vq_std=0.07", "--set", "vq_mean=-0.003"]
    result = CliRunner().invoke(
        app, ["convert", "maetok", str(tmp_path / "maetok.safetensors"), str(tmp_path), *options]
    )
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "latent_statistics.json").read_text())["mean"] == pytest.approx([-0.003] * CHANNELS)
    codec, images = Codec.from_pretrained(tmp_path), torch.rand(1, 3, 16, 16)
    assert isinstance(codec.tokenizer, MAETok)
    raw = codec.posterior(images).mean
    torch.testing.assert_close(codec.encode(images), (raw + 0.003) / 0.07)
    assert from_official("maetok", official(), heads=HEADS).codec is None
