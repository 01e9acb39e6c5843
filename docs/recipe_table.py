"""mkdocs hook: tables of recipe keys, made from the pydantic models, and of the autoencoders that open."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from latelier import recipe
from latelier.conditioning import condition, layout, spatial, text
from latelier.denoisers import align, ddt, dit, objective, unet, uvit
from latelier.losses import regularise
from latelier.tokenizers import conv, dcae, diffusers_classes, maetok, maetok_targets, pretrained, rae, vmae

MARK, AUTOENCODERS = "<!-- recipe tables -->", "<!-- autoencoders -->"


def names(presets: dict[str, dict]) -> str:
    """Names as one writes them."""
    return ", ".join(f"`{name}`" for name in presets)


# Meanings of keys that have no description in the schema.
MEANINGS: dict[type[BaseModel], dict[str, str]] = {
    recipe.Recipe: {
        "name": "name of the run folder: letters, digits, `_`, `.`, `-`",
        "seed": "seed of initial weights and of all randomness in training",
        "denoiser": "without it only the tokenizer is trained",
    },
    recipe.Data: {
        "image_size": "one number for a square, or `[height, width]`",
        "channels": "of the images; 1 is grayscale",
        "split": "the training split",
        "image_key": "the image column",
        "crop": "`center`: scale, then cut the center; `random`: a random region; `resize`: change the aspect ratio",
        "flip": "random horizontal flips",
        "streaming": "read a Hub dataset without downloading it first",
    },
    recipe.TrainedTokenizer: {
        "method": "a named set of default values, such as a paper's; see the table of the kind",
        "regularise": "see [Regularise a latent space](regularise.md); a kind, a section, or a list",
        "phases": "sections with `name`, `images` and the keys that change; see [phases](vmae.md#training-in-phases)",
    },
    vmae.VMAESection: {
        "preset": "see [VMAE](vmae.md#presets)",
        "method": "`paper`, `released`: values of the paper's text or of its released script",
        "mask_ratio": "share of patches masked in training",
        "perceptual_weight": "weight of LPIPS; 0 disables it",
        "kl_weight": "weight of the KL term",
        "kl": "form of the KL, see [loss](vmae.md#loss)",
    },
    maetok.MAETokSection: {
        "preset": names(maetok.PRESETS),
        "method": "`paper`: the settings of [MAETok](maetok.md); `ae`, `vae`: no masks, no targets",
        "init": "a `MAETok`, folder or Hub name to start from",
        "mask": "see below; zeros disable masking",
        "targets": "list of sections, see below",
        "perceptual_weight": "weight of LPIPS; 0 disables it",
    },
    dcae.DCAESection: {
        "preset": names(dcae.PRESETS),
        "method": "`structured`: any prefix of the channels decodes (DC-AE 1.5); `plain`: it does not",
        "init": "an `AutoencoderDC`, folder or Hub name to start from",
        "reconstruction": "absolute or squared pixel error",
        "perceptual_weight": "weight of LPIPS; 0 disables it",
    },
    rae.RAESection: {
        "preset": names(rae.PRESETS),
        "init": "a `RAE`, folder or Hub name to start from",
        "perceptual_weight": "weight of LPIPS; 0 disables it",
    },
    maetok_targets.Masking: {"low": "smallest mask ratio", "high": "largest mask ratio"},
    maetok_targets.TargetSection: {
        "kind": "what is predicted: `hog`, features of a teacher, or the `caption`",
        "weight": "weight in the loss",
        "heads": "attention heads of the auxiliary decoder",
    },
    conv.ConvSection: {
        "preset": names(conv.PRESETS),
        "method": "`kl-reg`, `vq-reg`: those of [LDM](ldm.md); `ae`, `dae`, `vae`, `sd-vae`: the baselines of "
        "[LDMAE](ldmae.md)",
        "init": "an `AutoencoderKL`, or a `VQModel` for presets that begin with `vq`: folder or Hub name to start from",
        "model": "overrides of the preset's constructor arguments",
        "reconstruction": "absolute or squared pixel error",
        "perceptual_weight": "weight of LPIPS; 0 disables it",
        "kl_weight": "weight of the KL, summed over a latent; 0 is a plain autoencoder",
        "kl": "to N(0, 1), or with a free mean",
    },
    pretrained.PretrainedSection: {
        "path": "a run folder, a tokenizer folder or a Hub name; see [autoencoders](autoencoders.md)",
        "subfolder": "where the tokenizer is inside `path`: `vae` in most diffusers pipelines",
    },
    regularise.AlignTerm: {"weight": "of the term; if adaptive, its gradient's share of the reconstruction's"},
    regularise.ScaleTerm: {"weight": "of the term"},
    regularise.NoiseTerm: {"level": "see `law`"},
    recipe.Training: {
        "images": "training length in images seen",
        "lr": "learning rate; never scaled automatically",
        "betas": "of AdamW",
        "weight_decay": "of AdamW, for matrices only",
        "warmup": "length of the linear warm-up in images",
        "schedule": "of the learning rate after the warm-up",
        "ema": "decay of the EMA weights per step; 0 disables EMA",
        "precision": "`auto`: bf16 autocast on hardware that is fast at it",
        "compile": "torch.compile the model",
        "log_every": "in images; 0: a 200th of the training length",
        "preview_every": "in images; 0: a tenth of the training length",
        "checkpoint_every": "in images; 0: a tenth of the training length",
        "keep_checkpoints": "how many checkpoints are kept",
    },
    objective.DenoiserSection: {
        "kind": "transformers: [DiT, SiT, LightningDiT](dit.md), [DDT](dit.md#ddt-head-dit-dh), "
        "[U-ViT, USiT](dcae.md#u-vit-and-usit-denoisers); `unet`: [LDM](ldm.md#u-net-denoisers)",
        "size": f"transformers: {names(dit.SIZES)}; DDT: {names(ddt.SIZES)}; U-ViTs: {names(uvit.SIZES)}; U-Nets: "
        f"{names(unet.SIZES)}",
        "patch": "side of a transformer's token in latent positions",
        "init": "a `DiT` or U-Net, folder or Hub name, to start from",
        "condition": "what the denoiser is conditioned on: `none`, a kind, a section, or a list of these; see "
        "[conditions](conditions.md)",
    },
    recipe.Process: {
        "kind": "see [concepts](concepts.md#diffusion-process)",
        "beta_schedule": "ddpm: `scaled_linear` is linear in the square root of beta",
        "beta_start": "ddpm",
        "beta_end": "ddpm",
    },
    recipe.Sample: {
        "steps": "sampling steps",
        "guidance": "scale w of classifier-free guidance, or of the weaker model `guide`; 1 is no guidance",
        "sampler": "see [sampling](sampling.md#samplers)",
        "count": "number of images",
        "batch": "images per forward pass",
        "classes": "names or indices, used in turn; null: all classes",
        "seed": "image i is generated from seed + i",
    },
    text.TextCondition: {
        "dim": "token width; this and the next three are for `encoder: trained`",
        "layers": "layers of the transformer",
        "heads": "attention heads",
        "head_dim": "width of a head",
    },
    layout.LayoutCondition: {
        "dim": "token width",
        "layers": "layers of the transformer",
        "heads": "attention heads",
        "head_dim": "width of a head",
    },
    spatial.LowResolutionCondition: {
        "degradation": "how small images are made in training, see "
        "[conditions](conditions.md#semantic-synthesis-maps-and-super-resolution)",
        "dropout": "share of images without a small image",
    },
    spatial.InpaintingCondition: {"dropout": "share of images that are masked completely"},
    recipe.Evaluate: {
        "metrics": "see [evaluation](evaluation.md#metrics)",
        "features": "feature extractors; see [FID and rFID](evaluation.md#compute-fid-and-rfid)",
        "samples": "maximum number of images on each side",
        "batch": "images per forward pass",
    },
}  # fmt: skip
YAML = str.maketrans({"(": "[", ")": "]", "'": None})  # Python's tuples and strings as one writes them in YAML
SECTIONS: dict[str, type[BaseModel]] = {
    "Top level": recipe.Recipe,
    "data": recipe.Data,
    "tokenizer: keys of all trained kinds": recipe.TrainedTokenizer,
    "tokenizer.adversarial": recipe.Adversarial,
    "tokenizer.regularise, kind: align": regularise.AlignTerm,
    "tokenizer.regularise, kind: equivariance": regularise.EquivarianceTerm,
    "tokenizer.regularise, kind: scale": regularise.ScaleTerm,
    "tokenizer.regularise, kind: noise": regularise.NoiseTerm,
    "tokenizer.regularise, kind: norm": regularise.NormTerm,
    "tokenizer, kind: vmae": vmae.VMAESection,
    "tokenizer, kind: maetok": maetok.MAETokSection,
    "tokenizer.mask (maetok)": maetok_targets.Masking,
    "tokenizer.targets (maetok)": maetok_targets.TargetSection,
    "tokenizer, kind: rae": rae.RAESection,
    "tokenizer, kind: conv": conv.ConvSection,
    "tokenizer, kind: dcae": dcae.DCAESection,
    "prefixes (dcae, denoiser)": recipe.Prefixes,
    "tokenizer, kind: identity": conv.IdentitySection,
    "tokenizer, kind: pretrained": pretrained.PretrainedSection,
    "Training keys of tokenizer and denoiser": recipe.Training,
    "denoiser": objective.DenoiserSection,
    "denoiser.process": recipe.Process,
    "denoiser.align": align.Align,
    "denoiser.condition, kind: class": condition.ClassCondition,
    "denoiser.condition, kind: text": text.TextCondition,
    "denoiser.condition, kind: layout": layout.LayoutCondition,
    "denoiser.condition, kind: segmentation": spatial.SegmentationCondition,
    "denoiser.condition, kind: low-resolution": spatial.LowResolutionCondition,
    "denoiser.condition, kind: inpainting": spatial.InpaintingCondition,
    "denoiser.condition, kind: map": spatial.MapCondition,
    "sample": recipe.Sample,
    "evaluate": recipe.Evaluate,
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the tables where the page asks for them."""
    markdown = markdown.replace(AUTOENCODERS, autoencoders()) if AUTOENCODERS in markdown else markdown
    return markdown.replace(MARK, tables()) if MARK in markdown else markdown


def autoencoders() -> str:
    """Classes of diffusers that a codec opens, and those that are refused, with the reason."""
    opened, refused = diffusers_classes.CLASSES, diffusers_classes.REFUSED
    rows = ["| class | of, and how it is used |", "|---|---|"]
    rows += [f"| `{name}` | {one.about} |" for name, one in opened.items()]
    rows += ["", "| refused | because |", "|---|---|", *(f"| `{name}` | {why} |" for name, why in refused.items())]
    return "\n".join(rows)


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
