"""mkdocs hook: the tables of recipe keys, made from the pydantic models."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from latelier import recipe
from latelier.denoisers import dit, objective, unet, uvit
from latelier.recipe import condition
from latelier.tokenizers import conv, dcae, maetok, maetok_targets, pretrained, vmae

MARK = "<!-- recipe tables -->"


def names(presets: dict[str, dict]) -> str:
    """Names as one writes them."""
    return ", ".join(f"`{name}`" for name in presets)


# What the keys mean that carry no description of their own in the schema.
MEANINGS: dict[type[BaseModel], dict[str, str]] = {
    recipe.Recipe: {
        "name": "the run folder's name: letters, digits, `_`, `.`, `-`",
        "seed": "of initial weights and of all random choices in training",
        "denoiser": "without it only the tokenizer is trained",
    },
    recipe.Data: {
        "image_size": "one number for a square, or `[height, width]`",
        "channels": "of the images; 1 is grey",
        "split": "the split to train on",
        "image_key": "the column of images",
        "crop": "`center`: scale the shorter side, cut the middle; `random`: a random part; `resize`: squeeze",
        "flip": "mirror half of the images",
        "streaming": "read a Hub dataset without downloading it first",
    },
    recipe.TrainedTokenizer: {
        "method": "a paper's name for a set of values, which lie under those that are given; see the kind's table",
        "phases": "sections that follow, each with `name`, `images` and what changes; see [VMAE](vmae.md#phases)",
    },
    vmae.VMAESection: {
        "preset": "see [VMAE](vmae.md#presets)",
        "method": "`paper`, `released`: the values of the paper's text, and of its released script",
        "mask_ratio": "share of patches that the encoder does not see in training",
        "perceptual_weight": "of LPIPS; 0 needs no LPIPS weights",
        "kl_weight": "of the KL term",
        "kl": "form of the KL, see [VMAE](vmae.md#the-objective)",
    },
    maetok.MAETokSection: {
        "preset": names(maetok.PRESETS),
        "method": "`paper`: targets, weights and discriminator of [MAETok](maetok.md); `ae`, `vae`: neither masks nor "
        "targets",
        "init": "a `MAETok`, folder or Hub name to start from",
        "mask": "see below; all zeros masks nothing",
        "targets": "a list of sections, see below",
        "perceptual_weight": "of LPIPS; 0 needs no LPIPS weights",
    },
    dcae.DCAESection: {
        "preset": names(dcae.PRESETS),
        "method": "`structured`: any prefix of the channels decodes (DC-AE 1.5); `plain`: not",
        "init": "an `AutoencoderDC`, folder or Hub name to start from",
        "reconstruction": "absolute or squared error of pixels",
        "perceptual_weight": "of LPIPS; 0 needs no LPIPS weights",
    },
    maetok_targets.Masking: {"low": "the smallest share", "high": "the largest"},
    maetok_targets.TargetSection: {
        "kind": "what is predicted: `hog`; features of a teacher; the words of the `caption`",
        "weight": "of its error in the loss",
        "heads": "of the auxiliary decoder's attention",
    },
    conv.ConvSection: {
        "preset": names(conv.PRESETS),
        "method": "`kl-reg`, `vq-reg`: those of [LDM](ldm.md); `ae`, `dae`, `vae`, `sd-vae`: the baselines of "
        "[LDMAE](ldmae.md)",
        "init": "an `AutoencoderKL`, or a `VQModel` for presets that begin with `vq`: folder or Hub name to start from",
        "model": "arguments of that class that replace the preset's",
        "reconstruction": "absolute or squared error of pixels",
        "perceptual_weight": "of LPIPS; 0 needs no LPIPS weights",
        "kl_weight": "of the KL, summed over a latent; 0 makes a plain autoencoder, whose latent is the mean",
        "kl": "to N(0, 1), or with the mean left free",
    },
    pretrained.PretrainedSection: {
        "path": "a folder or Hub name",
        "subfolder": "of it, such as `vae`",
    },
    recipe.Training: {
        "images": "length of training, in images seen",
        "lr": "learning rate, never scaled",
        "betas": "of AdamW",
        "weight_decay": "of AdamW, on matrices only",
        "warmup": "images over which the learning rate rises",
        "schedule": "of the learning rate after the warm-up",
        "ema": "decay of the averaged weights per step; 0 switches them off",
        "precision": "`auto`: bf16 autocast where the hardware is fast at it",
        "compile": "torch.compile the model",
        "log_every": "images; 0: a 200th of the training length",
        "preview_every": "images; 0: a tenth of the training length",
        "checkpoint_every": "images; 0: a tenth of the training length",
        "keep_checkpoints": "the newest so many stay",
    },
    objective.DenoiserSection: {
        "kind": "transformers: [DiT, SiT, LightningDiT](dit.md#switches), [U-ViT, USiT](dcae.md#the-denoisers); "
        "`unet`: [LDM](ldm.md)",
        "size": f"transformers: {names(dit.SIZES)}; U-ViTs: {names(uvit.SIZES)}; U-Nets: {names(unet.SIZES)}",
        "patch": "side of a transformer's token in latent positions",
        "init": "a `DiT` or U-Net, folder or Hub name, to start from",
        "condition": "what the denoiser is told: `none`, a kind, a section, or a list of these; see "
        "[conditions](conditions.md)",
    },
    recipe.Process: {
        "kind": "see [concepts](concepts.md#process)",
        "beta_schedule": "ddpm: `scaled_linear` is linear in the root of beta",
        "beta_start": "ddpm",
        "beta_end": "ddpm",
    },
    recipe.Sample: {
        "steps": "sampling steps",
        "guidance": "scale w of classifier-free guidance; 1 is none",
        "sampler": "see [sampling](sampling.md#samplers)",
        "count": "images to draw",
        "batch": "images per forward pass",
        "classes": "names or indices, gone through in turn; null: all classes",
        "seed": "image i is drawn from seed + i",
    },
    condition.TextCondition: {
        "dim": "width of the tokens; this and the next three of `encoder: trained`",
        "layers": "of the transformer",
        "heads": "of its attention",
        "head_dim": "width of a head",
    },
    condition.LayoutCondition: {
        "dim": "width of the tokens",
        "layers": "of the transformer",
        "heads": "of its attention",
        "head_dim": "width of a head",
    },
    condition.LowResolutionCondition: {
        "degradation": "how training makes small images, see [conditions](conditions.md#maps-and-small-images)",
        "dropout": "share of images whose small image is not told",
    },
    condition.InpaintingCondition: {"dropout": "share of images of which everything is a hole"},
    recipe.Evaluate: {
        "metrics": "see [evaluation](evaluation.md#definitions)",
        "features": "network of the Fréchet distances, precision and recall",
        "samples": "images at most, on each side",
        "batch": "images per forward pass",
    },
}  # fmt: skip
YAML = str.maketrans({"(": "[", ")": "]", "'": None})  # Python's tuples and strings as one writes them in YAML
SECTIONS: dict[str, type[BaseModel]] = {
    "(top level)": recipe.Recipe,
    "data": recipe.Data,
    "keys of all tokenizers that are trained": recipe.TrainedTokenizer,
    "tokenizer.adversarial": recipe.Adversarial,
    "tokenizer: {kind: vmae}": vmae.VMAESection,
    "tokenizer: {kind: maetok}": maetok.MAETokSection,
    "tokenizer.mask of maetok": maetok_targets.Masking,
    "tokenizer.targets of maetok": maetok_targets.TargetSection,
    "tokenizer: {kind: conv}": conv.ConvSection,
    "tokenizer: {kind: dcae}": dcae.DCAESection,
    "prefixes of dcae and denoiser": recipe.Prefixes,
    "tokenizer: {kind: identity}": conv.IdentitySection,
    "tokenizer: {kind: pretrained}": pretrained.PretrainedSection,
    "training keys of tokenizer and denoiser": recipe.Training,
    "denoiser": objective.DenoiserSection,
    "denoiser.process": recipe.Process,
    "denoiser.condition: {kind: class}": condition.ClassCondition,
    "denoiser.condition: {kind: text}": condition.TextCondition,
    "denoiser.condition: {kind: layout}": condition.LayoutCondition,
    "denoiser.condition: {kind: segmentation}": condition.SegmentationCondition,
    "denoiser.condition: {kind: low-resolution}": condition.LowResolutionCondition,
    "denoiser.condition: {kind: inpainting}": condition.InpaintingCondition,
    "denoiser.condition: {kind: map}": condition.MapCondition,
    "sample": recipe.Sample,
    "evaluate": recipe.Evaluate,
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the tables where the page asks for them."""
    return markdown.replace(MARK, tables()) if MARK in markdown else markdown


def tables() -> str:
    """One heading and table per section."""
    return "\n\n".join(f"## {title}\n\n{table(model)}" for title, model in SECTIONS.items())


def table(model: type[BaseModel]) -> str:
    """Key, what it takes, default and meaning of a section's own fields; those it shares have a table of their own.

    Of shared ones those are here that have another default, or another meaning in `MEANINGS`.
    """
    shared: dict[str, FieldInfo] = {}
    for base in (recipe.Training, recipe.TrainedTokenizer):
        if issubclass(model, base) and model is not base:
            shared |= base.model_fields
    properties = model.model_json_schema()["properties"]
    rows = ["| key | takes | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if name not in shared or field.default != shared[name].default or name in MEANINGS.get(model, {}):
            cells = (f"`{name}`", takes(properties[name]), default(field), meaning(model, name, field))
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def meaning(model: type[BaseModel], name: str, field: FieldInfo) -> str:
    """From the page's own words or the schema."""
    return MEANINGS.get(model, {}).get(name) or field.description or ""


def takes(schema: dict[str, Any]) -> str:
    """A JSON schema of one value, in words."""
    if str(schema.get("description", "")).startswith("a count"):
        return "count"
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "$ref" in schema or "discriminator" in schema:
        return "a section"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(takes(option) for option in schema["anyOf"]))
    kind = schema.get("type", "anything")
    if kind == "array":
        inner = takes(schema.get("items") or schema.get("prefixItems", [{}])[0])
        return "list of sections" if inner == "a section" else f"list of {inner}"
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = " and ".join(f"{sign} {schema[key]:g}" for key, sign in limits.items() if key in schema)
    return f"{kind} {bounds}".strip()


def default(field: FieldInfo) -> str:
    """A field's default as one writes it in YAML."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined or isinstance(value, BaseModel):
        return ""
    if value is None or isinstance(value, bool):
        return f"`{json.dumps(value)}`"
    return f"`{str(value).translate(YAML)}`"
