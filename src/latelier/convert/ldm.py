"""A whole official latent diffusion checkpoint (`model.ckpt`) to a pipeline that samples.

first_stage_model.*             the autoencoder, KL or VQ by what it has
model.diffusion_model.*         the U-Net; its averages `model_ema.*` are taken where there are any
cond_stage_model.*              class embedding, text or layout transformer, rescaler of label maps
betas, scale_factor             the noise schedule, and what latents were multiplied by

The vocabulary of its transformers (`BERTEmbedder`) is not in there: captions were read with bert-base-uncased, layouts
with the classes of their data set.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from latelier.conditioning.layout import LayoutConditioner
from latelier.conditioning.spatial import InpaintingConditioner, LowResolutionConditioner, SegmentationConditioner
from latelier.conditioning.text import TextConditioner, TokenTransformer, read_tokenizer
from latelier.convert import Converted, below, count_blocks, load_exactly, need, rename
from latelier.convert.ldm_autoencoder import convert_kl, convert_vq
from latelier.convert.ldm_unet import convert as convert_unet
from latelier.diffusion.process import DDPM
from latelier.errors import LatelierError
from latelier.pipeline import LatentDiffusionPipeline
from latelier.tokenizers.codec import Codec

FIRST, STAGE = "first_stage_model.", "cond_stage_model."
KIND = "LDM text or layout transformer"
LAYERS = "transformer.attn_layers.layers."
RENAMED = {
    "transformer.token_emb.": "token_embed.", "transformer.pos_emb.emb.": "pos_embed.", "transformer.norm.": "norm.",
}  # fmt: skip
ATTENTION = {"0.": "norm1.", "1.to_out.": "attn.out."}  # even layers, pairs (norm, block)
MLP = {"0.": "norm2.", "1.net.0.0.": "mlp.fc1.", "1.net.2.": "mlp.fc2."}  # odd layers
SHAPE = ("dim", "layers", "heads", "head_dim")  # what conditioners take from the transformer's configuration
UNUSED = "transformer.to_logits."  # a head for language modelling that nothing reads


def convert(weights: dict[str, Tensor], config: dict[str, Any]) -> Converted:
    """Build the pipeline.

    `config` may have `heads` or `num_head_channels` of the U-Net, `image_size` of the latents; `vocabulary`, the folder
    or Hub name of the text tokenizer; `box_names`, the classes of layouts; `betas`, a pair of the schedule's ends, and
    `scale_factor`, if the checkpoint lacks them.
    """
    unet = convert_unet(weights, config)
    first = below(weights, FIRST)
    if not first:
        raise LatelierError(
            "This checkpoint has a U-Net but no autoencoder (keys that begin with first_stage_model.); "
            "convert it as ldm-unet, and the autoencoder's own checkpoint as ldm-kl or ldm-vq."
        )
    tokenizer = (convert_vq if "quantize.embedding.weight" in first else convert_kl)(first, config).model
    conditioner = unet.conditioner or _conditioner(weights, config, Codec(tokenizer).factor)
    conditioner = _concatenated(unet.model, tokenizer) if conditioner is None else conditioner
    if "betas" in config:
        start, end = map(float, config["betas"])
    else:
        start, end = (round(float(need(weights, "betas", "latent diffusion")[i]), 6) for i in (0, -1))
    process = DDPM("scaled_linear", start, end)
    codec = _codec(tokenizer, weights, config)
    size = (config.get("image_size", 64) * codec.factor,) * 2
    pipeline = LatentDiffusionPipeline.build(codec, unet.model, conditioner, process, size, _dropped(conditioner))
    return Converted(unet.model, conditioner, pipeline)


def _codec(tokenizer: ModelMixin, weights: dict[str, Tensor], config: dict[str, Any]) -> Codec:
    """z times `scale_factor` is what the U-Net saw: a standard deviation of its inverse, and a mean of zero."""
    stored = weights.get("scale_factor")
    factor = float(stored) if stored is not None else config.get("scale_factor", 1.0)
    channels = tokenizer.config["latent_channels"]  # type: ignore[index]
    return Codec(tokenizer, torch.zeros(channels), torch.full((channels,), 1 / factor))


def _conditioner(weights: dict[str, Tensor], config: dict[str, Any], factor: int) -> ModelMixin | None:
    """What is under `cond_stage_model.`, without the class embedding."""
    if f"{STAGE}transformer.token_emb.weight" in weights:
        if "box_names" in config:
            return layout_conditioner(weights, config["box_names"])
        if "vocabulary" in config:
            return text_conditioner(weights, config["vocabulary"])
        raise LatelierError(
            "The checkpoint's transformer reads tokens whose meaning it does not hold: give vocabulary=<folder or Hub "
            "name of bert-base-uncased> for a text model, or box_names=[...] for a layout model."
        )
    if (kernel := weights.get(f"{STAGE}channel_mapper.weight")) is None:  # (channels, classes, 1, 1)
        return None
    conditioner = SegmentationConditioner(kernel.shape[1], kernel.shape[0], factor)
    load_exactly(conditioner, {"projection.weight": kernel})
    return conditioner


def _concatenated(unet: ModelMixin, tokenizer: ModelMixin) -> ModelMixin | None:
    """Inpainting and super-resolution learn nothing beside the U-Net, whose further channels tell which it is."""
    channels = unet.config["in_channels"] - unet.config["out_channels"]  # type: ignore[index]
    latent, image = (tokenizer.config[key] for key in ("latent_channels", "in_channels"))  # type: ignore[index]
    if channels == latent + 1:  # masked latents and mask
        return InpaintingConditioner("thick", latent, image)
    if channels == image:  # a small image at the size of the latents
        factor = Codec(tokenizer).factor
        return LowResolutionConditioner(factor, "bsrgan-light", image, factor)
    if channels:
        raise LatelierError(
            f"The U-Net takes {channels} channels beside {latent} of latents, which is neither a small image "
            f"({image}) nor masked latents and mask ({latent + 1}); convert it as ldm-unet."
        )
    return None


def _dropped(conditioner: ModelMixin | None) -> list[str]:
    """Class and text models of latent diffusion can be guided: they know the null class or the empty caption."""
    input_name = getattr(conditioner, "input_name", None)
    if input_name == "classes":
        return ["classes"] if conditioner.config["null"] else []  # type: ignore[union-attr, index]
    return ["prompts"] if input_name == "prompts" else []


def convert_text(weights: dict[str, Tensor], config: dict[str, Any]) -> Converted:
    """Build and fill a `TokenTransformer`, from the embedder's weights or a whole checkpoint's, with `heads` or 8."""
    weights = below(weights, STAGE) or weights
    tokens, positions = (need(weights, f"transformer.{name}.weight", KIND) for name in ("token_emb", "pos_emb.emb"))
    inner = need(weights, f"{LAYERS}0.1.to_q.weight", KIND).shape[0]
    heads = config.get("heads", 8)
    model = TokenTransformer(
        vocabulary=tokens.shape[0], length=positions.shape[0], dim=tokens.shape[1],
        layers=count_blocks(weights, LAYERS) // 2, heads=heads, head_dim=inner // heads,
    )  # fmt: skip
    load_exactly(model, _renamed(weights))
    return Converted(model)


def text_conditioner(weights: Mapping[str, Tensor], tokenizer: str, heads: int = 8) -> TextConditioner:
    """The trained text conditioner of a whole checkpoint; `tokenizer` is a Hub name or folder."""
    model = convert_text(dict(weights), {"heads": heads}).model
    words, vocabulary = read_tokenizer(tokenizer), model.config["vocabulary"]
    if (found := words.get_vocab_size()) != vocabulary:
        raise LatelierError(
            f"The tokenizer {tokenizer} has {found} tokens, but the checkpoint's transformer {vocabulary}; give the "
            "one that it was trained with (bert-base-uncased)."
        )
    conditioner = TextConditioner.trained(words, **{name: model.config[name] for name in ("length", *SHAPE)})
    load_exactly(conditioner.transformer, model.state_dict())
    return conditioner.eval()


def layout_conditioner(
    weights: Mapping[str, Tensor], names: list[str], form: str = "openimages", heads: int = 8
) -> LayoutConditioner:
    """The layout conditioner of a whole checkpoint; `names` are in the order of its category numbers.

    `form` is `openimages` or `coco`.
    """
    model = convert_text(dict(weights), {"heads": heads}).model
    objects, left = divmod(model.config["length"], 3)  # three tokens for an object, two for the crop
    conditioner = LayoutConditioner(
        names=names, form=form, objects=objects, crop=left == 2, tokens=model.config["vocabulary"],
        **{name: model.config[name] for name in SHAPE},
    )  # fmt: skip
    load_exactly(conditioner.transformer, model.state_dict())
    return conditioner.eval()


def _renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names, and queries, keys and values in one matrix."""
    ours: dict[str, Tensor] = {}
    packed: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        if name.endswith(("to_q.weight", "to_k.weight", "to_v.weight")):
            layer, matrix, _ = name.rsplit(".", 2)
            packed.setdefault(layer, {})[matrix] = tensor
        elif not name.startswith(UNUSED):
            ours[_rename(name)] = tensor
    for layer, matrices in packed.items():
        index = int(layer[len(LAYERS) :].split(".")[0]) // 2
        rows = [need(matrices, matrix, KIND) for matrix in ("to_q", "to_k", "to_v")]
        ours[f"blocks.{index}.attn.qkv.weight"] = torch.cat(rows)  # (3 inner, dim)
    return ours


def _rename(name: str) -> str:
    if not name.startswith(LAYERS):
        return rename(name, RENAMED)
    number, rest = name[len(LAYERS) :].split(".", 1)
    index, kind = divmod(int(number), 2)
    return f"blocks.{index}.{rename(rest, MLP if kind else ATTENTION)}"
