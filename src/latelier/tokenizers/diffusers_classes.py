"""Every autoencoder of diffusers: what a `Codec` must know of its class, and which classes are no image tokenizers.

A class is a function from a config to a `TokenizerInfo` and an entry of `CLASSES`. Video autoencoders take an image as
a clip of one frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from latelier.errors import LatelierError
from latelier.layers import sincos_positions
from latelier.tokenizers import TokenizerInfo
from latelier.tokenizers.posterior import Point, Posterior, read_posterior

Config = Mapping[str, Any]


def encode_image(model: Any, images: Float[Tensor, "b c h w"]) -> Posterior:
    """`encode` of a class that takes images."""
    return read_posterior(model.encode(images))


def decode_image(model: Any, z: Float[Tensor, "b k *grid"]) -> Float[Tensor, "b c h w"]:
    """`decode` of a class that returns images."""
    return _images(model.decode(z))


def _images(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.sample


def _encode_frame(model: Any, images: Tensor) -> Posterior:
    return read_posterior(model.encode(images[:, :, None]), lambda z: z.squeeze(2))


def _decode_frame(model: Any, z: Tensor) -> Tensor:
    return _images(model.decode(z[:, :, None])).squeeze(2)


def _encode_frames_alone(model: Any, images: Tensor) -> Posterior:
    """HunyuanVideo 1.5 in diffusers 0.42 cannot mask the attention of a batch of clips."""
    alone = [model.encode(image[:, :, None]).latent_dist.parameters for image in images.split(1)]
    return read_posterior(DiagonalGaussianDistribution(torch.cat(alone)), lambda z: z.squeeze(2))


def _decode_frames_alone(model: Any, z: Tensor) -> Tensor:
    return torch.cat([_decode_frame(model, row) for row in z.split(1)])


def _encode_still(model: Any, images: Tensor) -> Posterior:
    """VidTok: the frame is repeated until there are enough for one latent frame, as `forward` does."""
    clip = images[:, :, None].repeat_interleave(model.temporal_compression_ratio, 2)  # (b, c, t, h, w)
    return read_posterior(model.encode(clip), lambda z: z.squeeze(2))


def _encode_mean(model: Any, images: Tensor) -> Posterior:
    """KVAE's video encoder gives no variance; diffusers fills in 1."""
    return Point(_encode_frame(model, images).mode())


def _encode_opaque(model: Any, images: Tensor) -> Posterior:
    """Qwen-Image 2.1 has a fourth channel, opacity."""
    return _encode_frame(model, torch.cat([images, torch.ones_like(images[:, :1])], 1))


def _decode_opaque(model: Any, z: Tensor) -> Tensor:
    return _decode_frame(model, z)[:, :3]


def _encode_patches(model: Any, images: Tensor) -> Posterior:
    """FLUX.2: its denoiser's latents are patches of 2 x 2 positions."""
    return read_posterior(model.encode(images), lambda z: pixel_unshuffle(z, model.config["patch_size"][0]))


def _decode_patches(model: Any, z: Tensor) -> Tensor:
    return decode_image(model, pixel_shuffle(z, model.config["patch_size"][0]))


def _decode_first_frames(model: Any, z: Tensor) -> Tensor:
    return _images(model.decode(z, num_frames=1))


def _decode_noise(model: Any, z: Tensor) -> Tensor:
    """The consistency decoder begins with noise: the same for every image, so that a batch changes nothing."""
    return _images(model.decode(z, generator=[torch.Generator().manual_seed(0) for _ in z]))


def _decode_ltx(model: Any, z: Tensor) -> Tensor:
    """LTX: at time 0 where the decoder wants a time; noise in its layers, if any, is the same for every image."""
    noisy, timed = model.config["decoder_inject_noise"], model.config["timestep_conditioning"]
    frames = []
    for part in z[:, :, None].split(1) if noisy is True or (noisy and any(noisy)) else [z[:, :, None]]:
        with torch.random.fork_rng([part.device] if part.is_cuda else []):
            torch.manual_seed(0)
            time = part.new_zeros(len(part)) if timed else None
            frames.append(_images(model.decode(part, time)).squeeze(2))
    return torch.cat(frames)


def configured_statistics(model: Any) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]] | None:
    """`latents_mean` and `latents_std` of a config, or of buffers, as diffusers' pipelines use them.

    None where there are none, or they are 0 and 1. A `scaling_factor` alone is no statistics: it often is the
    class's default, which nobody measured, and it is one number for all channels.
    """
    config, buffers = model.config, dict(model.named_buffers())
    mean, std = (buffers.get(name, config.get(name)) for name in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        return None
    channels = CLASSES[type(model).__name__].info(config).latent_channels
    mean, std = (
        torch.as_tensor(x).float().cpu().reshape(channels, -1)[:, 0] for x in (mean, std)
    )  # of the first frame
    return _unless_trivial(mean, std / (config.get("scaling_factor") or 1.0))


def _batch_norm(model: Any) -> tuple[Tensor, Tensor] | None:
    """FLUX.2: running statistics of a batch normalisation without weights."""
    mean, variance = (x.float().cpu().clone() for x in (model.bn.running_mean, model.bn.running_var))
    return _unless_trivial(mean, (variance + model.config["batch_norm_eps"]).sqrt())


def _unless_trivial(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor] | None:
    return (mean, std) if bool((mean != 0).any() or ((std - 1).abs() > 1e-3).any()) else None


def _kl(config: Config) -> TokenizerInfo:
    before, after = config.get("use_quant_conv", True), config.get("use_post_quant_conv", True)
    return TokenizerInfo(
        factor=2 ** (len(config["block_out_channels"]) - 1),
        latent_channels=config["latent_channels"],
        image_channels=config["in_channels"],
        decoder_modules=("decoder", "post_quant_conv") if after else ("decoder",),
        middle=("encoder.conv_out", "quant_conv", "post_quant_conv", "decoder.conv_in"),
        head=("decoder.conv_norm_out", "decoder.conv_out"),
        last_layer="decoder.conv_out.weight",
        variance_layer="quant_conv" if before else "encoder.conv_out",
        channels_last=True,
    )


def _vq(config: Config) -> TokenizerInfo:
    """Its latents, of `vq_embed_dim` channels, are continuous; its decoder begins with the nearest codes."""
    channels, decoder = config["vq_embed_dim"] or config["latent_channels"], ("quantize", "decoder", "post_quant_conv")
    return replace(_kl(config), latent_channels=channels, decoder_modules=decoder, variance_layer=None)


def _dc(config: Config) -> TokenizerInfo:
    """Without blocks at the finest level its last convolution also shuffles pixels."""
    layers = config["decoder_layers_per_block"]
    shuffles = not (layers if isinstance(layers, int) else layers[0])
    return TokenizerInfo(
        factor=2 ** (len(config["encoder_block_out_channels"]) - 1),
        latent_channels=config["latent_channels"],
        image_channels=config["in_channels"],
        middle=("encoder.conv_out", "decoder.conv_in"),
        head=("decoder.norm_out", "decoder.conv_out"),
        last_layer="decoder.conv_out.conv.weight" if shuffles else "decoder.conv_out.weight",
        channels_last=True,
    )


def _tiny(config: Config) -> TokenizerInfo:
    """No posterior."""
    factor = 2 ** (len(config["encoder_block_out_channels"]) - 1)
    return TokenizerInfo(factor, config["latent_channels"], config["in_channels"], channels_last=True)


def _asymmetric(config: Config) -> TokenizerInfo:
    """An AutoencoderKL with a larger decoder, which could also be shown the image around a hole; here it is not."""
    return _kl({**config, "block_out_channels": config["down_block_out_channels"]})


def _temporal_decoder(config: Config) -> TokenizerInfo:
    return replace(_kl({**config, "use_post_quant_conv": False}), head=(), last_layer=None)


def _flux2(config: Config) -> TokenizerInfo:
    rows, columns = config["patch_size"]
    if rows != columns:
        raise LatelierError(f"patch_size = {[rows, columns]} in its config is not square")
    plain = _kl(config)
    channels = rows * columns * plain.latent_channels
    return replace(plain, factor=rows * plain.factor, latent_channels=channels, variance_layer=None)


def _consistency(config: Config) -> TokenizerInfo:
    return TokenizerInfo(
        factor=2 ** (len(config["encoder_block_out_channels"]) - 1),
        latent_channels=config["latent_channels"],
        image_channels=config["encoder_in_channels"],
        decoder_modules=("decoder_unet",),
        variance_layer="quant_conv",
        channels_last=True,
        needs_numbers=True,
    )


def _ratio(config: Config) -> TokenizerInfo:
    """The config says the factor."""
    return TokenizerInfo(config["spatial_compression_ratio"], config["latent_channels"], config["in_channels"])


def _blocks(config: Config) -> TokenizerInfo:
    """The factor follows from the number of blocks."""
    blocks = config.get("block_out_channels") or config["encoder_block_out_channels"]
    return TokenizerInfo(2 ** (len(blocks) - 1), config["latent_channels"], config["in_channels"])


def _kvae(config: Config) -> TokenizerInfo:
    return TokenizerInfo(2 ** (len(config["ch_mult"]) - 1), config["z_channels"], config["in_channels"])


def _vidtok(config: Config) -> TokenizerInfo:
    if not config["is_causal"]:
        raise LatelierError("AutoencoderVidTok with is_causal = false needs clips of 16 frames, so it takes no image")
    halvings = config["spatial_ds"]
    factor = 2 ** (len(config["ch_mult"]) - 1 if halvings is None else len(halvings))
    return TokenizerInfo(factor, config["z_channels"], config["in_channels"])


def _wan(config: Config) -> TokenizerInfo:
    """In Wan 2.2 patches of pixels are channels."""
    channels = config["in_channels"] // (config["patch_size"] or 1) ** 2
    return TokenizerInfo(config["scale_factor_spatial"], config["z_dim"], min(channels, 3))


def _qwen(config: Config) -> TokenizerInfo:
    return TokenizerInfo(2 ** len(config["temperal_downsample"]), config["z_dim"], config["input_channels"])


def _mochi(config: Config) -> TokenizerInfo:
    """It makes waves of three channels itself."""
    return TokenizerInfo(math.prod(config["spatial_expansions"]), config["latent_channels"], config["out_channels"])


def _ltx(config: Config) -> TokenizerInfo:
    scales = zip(config["spatio_temporal_scaling"], config["downsample_type"])
    halvings = sum(scaled and kind != "temporal" for scaled, kind in scales)
    factor = config["spatial_compression_ratio"] or config["patch_size"] * 2**halvings
    return TokenizerInfo(factor, config["latent_channels"], config["in_channels"])


def _rae(config: Config) -> TokenizerInfo:
    """One size of images, in [0, 1]; the statistics are applied inside."""
    side = config["patch_size"] * (config["encoder_input_size"] // config["encoder_patch_size"])
    return TokenizerInfo(
        factor=config["patch_size"],
        latent_channels=config["encoder_hidden_size"],
        image_channels=config["num_channels"],
        decoder_size=(side, side),
        value_range=(0.0, 1.0),
        last_layer="decoder.decoder_pred.weight",
        statistics="element",
    )


def correct_positions(model: Any) -> Any:
    """Put right AutoencoderRAE's table of positions, which is wrong on every grid but 16 x 16.

    diffusers 0.42 scales the grid to 16 x 16; the decoders were trained with whole numbers. The table is fixed and not
    saved, so this cannot be done once and for all.
    """
    table = model.decoder.decoder_pos_embed  # (1, 1 + n, d), the first row for CLS
    side = math.isqrt(table.shape[1] - 1)
    table[:, 1:] = sincos_positions(table.shape[2], (side, side)).to(table)
    return model


def _decode_rae(model: Any, z: Tensor) -> Tensor:
    return decode_image(correct_positions(model), z)


@dataclass(frozen=True)
class DiffusersClass:
    """How a class is used: one of diffusers, or `PLAIN`, every other.

    Attributes:
        about: for which models it was made, in the documentation.
        info: its sizes and layers, from a config.
        encode: images in the class's range of values to a posterior.
        decode: raw latents to images.
        statistics: mean and standard deviation that a model carries itself; None where it carries none.
    """

    about: str
    info: Callable[[Config], TokenizerInfo]
    encode: Callable[[Any, Tensor], Posterior] = encode_image
    decode: Callable[[Any, Tensor], Tensor] = decode_image
    statistics: Callable[[Any], tuple[Tensor, Tensor] | None] = configured_statistics


def _plain(config: Config) -> TokenizerInfo:
    return TokenizerInfo(config["patch_size"], config["latent_channels"], config.get("in_channels", 3))


PLAIN = DiffusersClass("", _plain, statistics=lambda model: None)


def _video(about: str, info: Callable[[Config], TokenizerInfo], encode=_encode_frame, decode=_decode_frame):
    return DiffusersClass(about, info, encode, decode)


CLASSES: dict[str, DiffusersClass] = {
    "AutoencoderKL": DiffusersClass("Stable Diffusion, SDXL, SD 3, FLUX.1", _kl),
    "VQModel": DiffusersClass("LDM's VQ-reg, VQGAN; quantises in `decode`", _vq),
    "AutoencoderDC": DiffusersClass("DC-AE, SANA", _dc),
    "AutoencoderTiny": DiffusersClass("TAESD", _tiny),
    "AsymmetricAutoencoderKL": DiffusersClass("inpainting with a larger decoder; decodes without a mask", _asymmetric),
    "ConsistencyDecoderVAE": DiffusersClass("DALL-E 3's decoder; the same noise for every image", _consistency,
                                            decode=_decode_noise),
    "AutoencoderRAE": DiffusersClass("representation autoencoders of one image size", _rae, decode=_decode_rae,
                                     statistics=lambda model: None),
    "AutoencoderKLFlux2": DiffusersClass("FLUX.2; latents in 2 x 2 patches", _flux2, _encode_patches, _decode_patches,
                                         _batch_norm),
    "AutoencoderKLTemporalDecoder": DiffusersClass("Stable Video Diffusion; one frame", _temporal_decoder,
                                                   decode=_decode_first_frames),
    "AutoencoderKLHunyuanImage": DiffusersClass("HunyuanImage 2.1", _ratio),
    "AutoencoderKLHunyuanImageRefiner": _video("HunyuanImage 2.1's refiner; one frame", _ratio),
    "AutoencoderKLKVAE": DiffusersClass("KVAE of images", _kvae),
    "AutoencoderKLKVAEVideo": _video("KVAE of videos; one frame, no posterior", _kvae, _encode_mean),
    "AutoencoderKLQwenImage": _video("Qwen-Image; one frame", _qwen),
    "AutoencoderKLQwenImage21": _video("Qwen-Image 2.1; one frame, opaque", _wan, _encode_opaque, _decode_opaque),
    "AutoencoderKLWan": _video("Wan 2.1, Wan 2.2; one frame", _wan),
    "AutoencoderKLHunyuanVideo": _video("HunyuanVideo; one frame", _ratio),
    "AutoencoderKLHunyuanVideo15": _video("HunyuanVideo 1.5; one frame", _ratio, _encode_frames_alone,
                                          _decode_frames_alone),
    "AutoencoderKLLTXVideo": _video("LTX-Video; one frame, decoded at time 0", _ltx, decode=_decode_ltx),
    "AutoencoderKLLTX2Video": _video("LTX-2; one frame, decoded at time 0", _ltx, decode=_decode_ltx),
    "AutoencoderKLCogVideoX": _video("CogVideoX; one frame", _blocks),
    "AutoencoderKLCosmos": _video("Cosmos 1.0; one frame, no posterior", _ratio),
    "AutoencoderKLMagvit": _video("EasyAnimate; one frame", _blocks),
    "AutoencoderKLMochi": _video("Mochi 1; one frame", _mochi),
    "AutoencoderVidTok": _video("VidTok, causal; one frame", _vidtok, _encode_still),
    "Kandinsky6SRVAE": _video("Kandinsky 6's super-resolution; one frame", _blocks),
}  # fmt: skip
SOUND = "it encodes sound"
REFUSED = {
    "AutoencoderKLAllegro": "it encodes clips of 24 frames, in tiles, and no single image",
    "AutoencoderKLMiniMaxH3": "it decodes clips, and no single image",
    "RFD4ProteinaAutoencoder": "it encodes proteins",
    **dict.fromkeys(
        ("AutoencoderKLKVAEAudio", "AutoencoderKLLTX2Audio", "AutoencoderKLMiniMaxH3Audio", "AutoencoderOobleck",
         "AutoencoderSAME", "Cosmos3AVAEAudioTokenizer", "LongCatAudioDiTVae", "MMAudioVAE"), SOUND),
}  # fmt: skip
