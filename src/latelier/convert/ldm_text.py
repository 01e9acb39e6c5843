"""Official text and layout transformers of latent diffusion (`BERTEmbedder`) to ours.

In whole checkpoints they are `cond_stage_model.*`. Their vocabulary is not in there: captions were read with
bert-base-uncased, layouts with the classes of their data set.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from latelier.conditioning.layout import LayoutConditioner
from latelier.conditioning.text import TextConditioner, TokenTransformer, read_tokenizer
from latelier.convert import Converted, below, count_blocks, load_exactly, need, rename
from latelier.errors import LatelierError

KIND = "LDM text or layout transformer"
STAGE = "cond_stage_model."
LAYERS = "transformer.attn_layers.layers."
RENAMED = {
    "transformer.token_emb.": "token_embed.",
    "transformer.pos_emb.emb.": "pos_embed.",
    "transformer.norm.": "norm.",
}
# Even layers are attention, odd ones MLPs; each is a pair (norm, block).
ATTENTION = {"0.": "norm1.", "1.to_out.": "attn.out."}
MLP = {"0.": "norm2.", "1.net.0.0.": "mlp.fc1.", "1.net.2.": "mlp.fc2."}
SHAPE = ("dim", "layers", "heads", "head_dim")  # what conditioners take from the transformer's configuration
UNUSED = "transformer.to_logits."  # a head for language modelling that nothing reads


def convert(weights: dict[str, Tensor], config: dict[str, Any]) -> Converted:
    """Build and fill a `TokenTransformer`, from the embedder's weights or a whole checkpoint's, with `heads` or 8."""
    weights = below(weights, STAGE) or weights
    tokens, positions = (need(weights, f"transformer.{name}.weight", KIND) for name in ("token_emb", "pos_emb.emb"))
    inner = need(weights, f"{LAYERS}0.1.to_q.weight", KIND).shape[0]
    heads = config.get("heads", 8)
    model = TokenTransformer(
        vocabulary=tokens.shape[0],
        length=positions.shape[0],
        dim=tokens.shape[1],
        layers=count_blocks(weights, LAYERS) // 2,
        heads=heads,
        head_dim=inner // heads,
    )
    load_exactly(model, _renamed(weights))
    return Converted(model)


def text_conditioner(weights: Mapping[str, Tensor], tokenizer: str, heads: int = 8) -> TextConditioner:
    """The trained text conditioner of a whole checkpoint.

    `tokenizer` is the Hub name or folder of the one that it was trained with, bert-base-uncased in all releases.
    """
    model = convert(dict(weights), {"heads": heads}).model
    words = read_tokenizer(tokenizer)
    if words.get_vocab_size() != model.config["vocabulary"]:
        raise LatelierError(
            f"The tokenizer {tokenizer} has {words.get_vocab_size()} tokens, but the checkpoint's transformer "
            f"{model.config['vocabulary']}; give the one that it was trained with (bert-base-uncased)."
        )
    conditioner = TextConditioner.trained(words, **{name: model.config[name] for name in ("length", *SHAPE)})
    load_exactly(conditioner.transformer, model.state_dict())
    return conditioner.eval()


def layout_conditioner(
    weights: Mapping[str, Tensor], names: list[str], form: str = "openimages", heads: int = 8
) -> LayoutConditioner:
    """The layout conditioner of a whole checkpoint; `form` is `openimages` or `coco`.

    `names` are the classes, in the order of the category numbers that it was trained with.
    """
    model = convert(dict(weights), {"heads": heads}).model
    objects, left = divmod(model.config["length"], 3)  # three tokens for an object, two for the crop
    conditioner = LayoutConditioner(
        names=names,
        form=form,
        objects=objects,
        crop=left == 2,
        tokens=model.config["vocabulary"],
        **{name: model.config[name] for name in SHAPE},
    )
    load_exactly(conditioner.transformer, model.state_dict())
    return conditioner.eval()


def _renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Ours: names, and queries, keys and values in one matrix."""
    ours: dict[str, Tensor] = {}
    packed: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        if name.startswith(UNUSED):
            continue
        if name.endswith(("to_q.weight", "to_k.weight", "to_v.weight")):
            layer, matrix, _ = name.rsplit(".", 2)
            packed.setdefault(layer, {})[matrix] = tensor
        else:
            ours[_rename(name)] = tensor
    for layer, matrices in packed.items():
        index = int(layer[len(LAYERS) :].split(".")[0]) // 2
        rows = [need(matrices, matrix, KIND) for matrix in ("to_q", "to_k", "to_v")]
        ours[f"blocks.{index}.attn.qkv.weight"] = torch.cat(rows)  # (3 inner, dim)
    return ours


def _rename(name: str) -> str:
    if name.startswith(LAYERS):
        number, rest = name[len(LAYERS) :].split(".", 1)
        index, kind = divmod(int(number), 2)
        return f"blocks.{index}.{rename(rest, MLP if kind else ATTENTION)}"
    return rename(name, RENAMED)
