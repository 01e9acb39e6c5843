"""Every autoencoder of the installed diffusers through the codec: as diffusers gives it, or refused in a sentence."""

import importlib.util
import inspect as python
import re
from pathlib import Path

import diffusers
import pytest
import torch
from torch.nn.functional import pixel_unshuffle

import latelier
from latelier.errors import LatelierError
from latelier.evaluation.cost import count_cost
from latelier.tokenizers import tokenizer_info
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.diffusers_classes import CLASSES, REFUSED

ELSEWHERE = {"AutoencoderRAE"}  # has images in [0, 1] and one size: tests/test_rae_checkpoint.py
DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
KL = {
    "block_out_channels": [4, 8], "down_block_types": [DOWN] * 2, "up_block_types": [UP] * 2, "norm_num_groups": 2,
    "latent_channels": 4,
}  # fmt: skip
WAN = {
    "base_dim": 4, "z_dim": 4, "dim_mult": [1] * 4, "num_res_blocks": 1, "latents_mean": [0.1, 0.2, 0.3, 0.4],
    "latents_std": [1.0, 2.0, 3.0, 4.0],
}  # fmt: skip
VIDEO = {"latent_channels": 4, "block_out_channels": [4] * 4, "layers_per_block": 1, "norm_num_groups": 2}
HUNYUAN = {
    "latent_channels": 4, "block_out_channels": [32] * 2, "layers_per_block": 1, "spatial_compression_ratio": 2,
    "temporal_compression_ratio": 1,
}  # fmt: skip
LTX = {"latent_channels": 4, "layers_per_block": [1] * 5, "timestep_conditioning": True}
TINY = {
    "AutoencoderKL": {**KL, "latents_mean": [1.0] * 4, "latents_std": [2.0] * 4, "scaling_factor": 0.5},
    "VQModel": {**KL, "num_vq_embeddings": 8},
    "AutoencoderDC": {
        "latent_channels": 4, "encoder_block_out_channels": [8] * 2, "decoder_block_out_channels": [8] * 2,
        "encoder_layers_per_block": [1] * 2, "decoder_layers_per_block": [1] * 2,
        "encoder_qkv_multiscales": [[]] * 2, "decoder_qkv_multiscales": [[]] * 2,
    },
    "AutoencoderTiny": {
        "encoder_block_out_channels": [4] * 2, "decoder_block_out_channels": [4] * 2, "num_encoder_blocks": [1] * 2,
        "num_decoder_blocks": [1] * 2,
    },
    "AsymmetricAutoencoderKL": {
        "down_block_types": [DOWN] * 2, "down_block_out_channels": [4, 8], "up_block_types": [UP] * 2,
        "up_block_out_channels": [8, 8], "norm_num_groups": 2,
    },
    "ConsistencyDecoderVAE": {
        "encoder_block_out_channels": [4, 8], "encoder_down_block_types": [DOWN] * 2, "encoder_norm_num_groups": 2,
        "decoder_block_out_channels": [4, 8], "decoder_down_block_types": ["ResnetDownsampleBlock2D"] * 2,
        "decoder_up_block_types": ["ResnetUpsampleBlock2D"] * 2, "decoder_layers_per_block": 1,
        "decoder_norm_num_groups": 2,
    },
    "AutoencoderKLFlux2": KL,
    "AutoencoderKLTemporalDecoder": {"block_out_channels": [32], "latent_channels": 4},
    "AutoencoderKLHunyuanImage": {
        "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": [32] * 2,
        "layers_per_block": 1, "spatial_compression_ratio": 2, "sample_size": 16,
    },
    "AutoencoderKLHunyuanImageRefiner": HUNYUAN,
    "AutoencoderKLKVAE": {"channels": 32, "num_enc_blocks": 1, "num_dec_blocks": 1, "z_channels": 4, "ch_mult": [1, 1]},
    "AutoencoderKLKVAEVideo": {"ch": 32, "ch_mult": [1, 1, 1], "num_res_blocks": 1, "z_channels": 4},
    "AutoencoderKLQwenImage": WAN,
    "AutoencoderKLQwenImage21": {**WAN, "decoder_base_dim": 4, "dim_mult": [1] * 5},
    "AutoencoderKLWan": WAN,
    "AutoencoderKLHunyuanVideo": VIDEO,
    "AutoencoderKLHunyuanVideo15": HUNYUAN,
    "AutoencoderKLLTXVideo": {
        **LTX, "block_out_channels": [8] * 4, "decoder_block_out_channels": [8] * 4,
        "decoder_layers_per_block": [1] * 5, "decoder_inject_noise": [True] * 5,
    },
    "AutoencoderKLLTX2Video": {
        **LTX, "block_out_channels": [8, 16, 32, 64], "decoder_block_out_channels": [8, 16, 32],
        "decoder_layers_per_block": [1] * 4, "decoder_spatial_padding_mode": "zeros",
    },
    "AutoencoderKLCogVideoX": VIDEO,
    "AutoencoderKLCosmos": {
        "latent_channels": 2, "encoder_block_out_channels": [4] * 4, "decode_block_out_channels": [4] * 4,
        "num_layers": 1, "attention_resolutions": [8], "resolution": 16, "latents_mean": [0.1, 0.3, 0.2, 0.4],
        "latents_std": [2.0, 3.0, 4.0, 5.0],
    },
    "AutoencoderKLMagvit": VIDEO,
    "AutoencoderKLMochi": {
        "encoder_block_out_channels": [32] * 4, "decoder_block_out_channels": [32] * 4, "latent_channels": 4,
        "layers_per_block": [1] * 5, "latents_mean": [0.1] * 4, "latents_std": [2.0] * 4,
    },
    "AutoencoderVidTok": {"ch": 32, "ch_mult": [1] * 4, "num_res_blocks": 1},
    "Kandinsky6SRVAE": {
        "latent_channels": 4, "encoder_block_out_channels": [4, 8, 8], "decoder_block_out_channels": [4, 8, 8],
        "layers_per_block": 1,
    },
}  # fmt: skip
FRAMES = {name for name in TINY if re.search("Video|Wan|Qwen|Refiner|Cog|Cosmos|Magvit|Mochi|VidTok|SRVAE", name)}
STATISTICS = {  # of a single frame, for those that carry them
    "AutoencoderKL": ([1.0] * 4, [4.0] * 4),
    "AutoencoderKLCosmos": ([0.1, 0.2], [2.0, 4.0]),
    "AutoencoderKLMochi": ([0.1] * 4, [2.0] * 4),
    **dict.fromkeys(
        ("AutoencoderKLWan", "AutoencoderKLQwenImage", "AutoencoderKLQwenImage21"),
        ([0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]),
    ),
    "AutoencoderKLFlux2": ([0.5] * 16, [2.0] * 16),
}


def found_classes():
    """Names of diffusers' autoencoders, as it is installed."""
    pattern = re.compile(r"(\w*Autoencoder|VQ)\w*|\w*(VAE|Vae)\w*|Consistency\w*")
    classes = {name: getattr(diffusers, name) for name in dir(diffusers) if pattern.match(name)}
    models = diffusers.ModelMixin
    return {name for name, one in classes.items() if python.isclass(one) and issubclass(one, models)}


def test_all_autoencoders_are_known():
    missing = found_classes() - {*CLASSES, *REFUSED}
    assert not missing, f"no entry in diffusers_classes.py: {', '.join(sorted(missing))}"
    assert {*TINY, *ELSEWHERE} == set(CLASSES)
    assert {*CLASSES, *REFUSED} <= found_classes()


def test_the_documentation_lists_them():
    root = Path(__file__).parents[1]
    spec = importlib.util.spec_from_file_location("recipe_table", root / "docs" / "recipe_table.py")
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    page = hook.on_page_markdown((root / "docs" / "autoencoders.md").read_text())
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == [*CLASSES, *REFUSED]
    assert (root / "README.md").read_text().count(f"{len(CLASSES)} autoencoder") == 2
    assert f"{len(CLASSES)} autoencoder classes of diffusers" in (root / "CHANGELOG.md").read_text()


def build(name):
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**TINY[name]).eval()
    if name == "AutoencoderKLFlux2":
        model.bn.running_mean.fill_(0.5)
        model.bn.running_var.fill_(4 - 1e-4)
    return model


def directly(name, model, images):
    """Mean of the latents and images as diffusers' own calls give them, without the codec's or its classes' code."""
    if name == "AutoencoderKLQwenImage21":
        images = torch.cat([images, torch.ones(len(images), 1, *images.shape[2:])], 1)
    video = name in FRAMES
    x = images[:, :, None] if video else images
    if name == "AutoencoderVidTok":
        x = x.expand(-1, -1, model.temporal_compression_ratio, -1, -1)
    if name == "AutoencoderKLHunyuanVideo15":  # its masks fit one clip
        model.enable_slicing()
    z = model.encode(x)
    z = z.latent_dist.mode() if hasattr(z, "latent_dist") else getattr(z, "latents", getattr(z, "latent", None))
    given = {}
    if name == "AutoencoderKLTemporalDecoder":
        given = {"num_frames": 1}
    if "LTX" in name:
        given = {"temb": torch.zeros(1)}
    torch.manual_seed(0)
    if name == "ConsistencyDecoderVAE":
        given = {"generator": torch.Generator().manual_seed(0)}
    decoded = model.decode(z[:1], **given)  # the first image alone, whose noise is that of seed 0
    decoded = decoded if isinstance(decoded, torch.Tensor) else decoded.sample
    z, decoded = (z[:, :, 0], decoded[:, :, 0]) if video else (z, decoded)
    return (pixel_unshuffle(z, 2) if name == "AutoencoderKLFlux2" else z), decoded[:, :3]


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(TINY))
def test_codec_gives_what_diffusers_gives(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path)
    codec = Codec.from_pretrained(tmp_path)
    images = torch.rand(2, 3, *(32, 64) if codec.factor > 8 else (16, 24)) * 2 - 1
    raw, decoded = directly(name, model, images)
    assert raw.shape[1:] == codec.latent_shape(*images.shape[2:])
    z = codec.encode(images)
    torch.testing.assert_close(codec.posterior(images).mean, raw)
    torch.testing.assert_close(codec.denormalise(z), raw, atol=1e-5, rtol=1e-4)
    result = codec.decode_raw(raw)
    assert result.shape == images.shape
    torch.testing.assert_close(result[:1], decoded)
    torch.testing.assert_close(codec.decode_raw(raw[1:]), result[1:], atol=1e-5, rtol=1e-4)  # whatever the batch
    assert (codec.mean is not None) == (name in STATISTICS)
    if name in STATISTICS:
        mean, std = map(torch.tensor, STATISTICS[name])
        torch.testing.assert_close(z, (raw - mean[:, None, None]) / std[:, None, None])
    codec.save_pretrained(tmp_path / "again")
    assert torch.equal(Codec.from_pretrained(tmp_path / "again").encode(images), z)


@pytest.mark.parametrize("name", ["AutoencoderKLWan", "ConsistencyDecoderVAE", "AutoencoderKLFlux2"])
def test_they_are_inspected(name, tmp_path):
    build(name).save_pretrained(tmp_path / "model")
    options = ["evaluate.metrics=[psnr,spectrum]"]
    images = torch.rand(6, 3, 16, 16) * 2 - 1
    found = latelier.inspect(tmp_path / "model", images, samples=6, options=options)
    assert found["reconstruction"]["psnr"]["receipt"]["n"] == 6
    assert count_cost(Codec.from_pretrained(tmp_path / "model"), 16, 16).gflop_decode > 0


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_no_image_tokenizer(name, tmp_path):
    (tmp_path / "config.json").write_text(f'{{"_class_name": "{name}"}}')
    with pytest.raises(LatelierError, match=f"{name} is no image tokenizer: {REFUSED[name]}"):
        Codec.from_pretrained(tmp_path)


def test_configs_that_take_no_image():
    with pytest.raises(LatelierError, match="is_causal = false needs clips of 16 frames"):
        tokenizer_info(diffusers.AutoencoderVidTok(**{**TINY["AutoencoderVidTok"], "is_causal": False}))
