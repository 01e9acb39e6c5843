"""Base classes, value types and error messages of recipe sections, and the settings that several sections share.

A section is a pydantic model beside the code that it configures. This module imports nothing heavy, so the sections
of models that a recipe does not name are never imported.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError, core_schema

from latelier.errors import LatelierError, reading

_UNITS = {"": 1, "k": 1_000, "m": 1_000_000, "b": 1_000_000_000}
MOST_LAYERS, MOST = 1_000, 2**24  # no network has more: beyond, a number in a config is a mistake, or malice
# Old names of keys, for the hint in the error message.
RENAMED = {
    "places": "coord_channels", "grounds": "backgrounds", "painted": "layout_map_channels", "window": "tile",
    "stride": "tile_stride",
}  # fmt: skip


def parse_count(value: Any) -> Any:
    """`2M`, `64k`, `1.5M`, `1_000` or a number, to an int; anything else is left for pydantic to refuse."""
    match = re.fullmatch(r"\s*(\d[\d_]*(?:\.\d+)?)\s*([kKmMbB]?)\s*", value) if isinstance(value, str) else None
    if match:
        value = float(match[1].replace("_", "")) * _UNITS[match[2].lower()]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def parse_size(value: Any) -> Any:
    """One number is a square."""
    if not isinstance(value, int | list | tuple) or (isinstance(value, list | tuple) and len(value) != 2):
        raise ValueError("height and width, or one number")
    return (value, value) if isinstance(value, int) else value


def parse_shift(value: Any) -> Any:
    """A number above 0, or `dimension`."""
    if value != "dimension" and (not isinstance(value, int | float) or not 0 < value < math.inf):
        raise ValueError("a number above 0, or dimension")
    return value


Count = Annotated[int, BeforeValidator(parse_count), Field(ge=0, description="a count such as 64k, 2M or 1000")]
PositiveCount = Annotated[int, BeforeValidator(parse_count), Field(ge=1, description="a count such as 64k, 2M or 1000")]
Side = Annotated[int, Field(ge=1, le=2**16)]
Size = Annotated[tuple[Side, Side], BeforeValidator(parse_size), Field(description="height and width, or one number")]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Name = Annotated[str, Field(pattern=r"^\.*[\w-][\w.-]*$", max_length=200)]  # of a folder: neither `.` nor `..`
Unit = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
Model = TypeVar("Model")


class Section(BaseModel):
    """Base of all sections: unknown keys are errors that name the nearest known one."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, values: Any) -> Any:
        for key in values if isinstance(values, dict) else ():
            if key not in cls.model_fields:
                context = {"key": str(key), "hint": hint(str(key), list(cls.model_fields), "known here")}
                raise PydanticCustomError("unknown_key", "Unknown key '{key}'; {hint}", context)
        return values


class Kind(Section):
    """A section whose class depends on its `kind`."""

    kind: str


class ByKind:
    """Annotates a section whose class is found by its `kind`, in a module that is imported only when it is named.

    Args:
        table: `module:NAME` of a dictionary from kinds to modules (`module` or `module:function`), which list the
            classes of their sections in `SECTIONS`.
        default: the kind of a section that does not say it.
    """

    def __init__(self, table: str, default: str | None = None):
        self.table, self.default = table, default

    @property
    def modules(self) -> Mapping[str, str]:
        """Modules by kind."""
        module, name = self.table.split(":")
        return getattr(importlib.import_module(module), name)

    def section(self, kind: str) -> type[BaseModel]:
        """The class of a kind."""
        module = importlib.import_module(self.modules[kind].split(":")[0])
        return next(section for section in module.SECTIONS if kind in _kinds(section))

    def validate(self, value: Any) -> Any:
        """The section of a mapping; a section stays as it is."""
        if isinstance(value, Section):
            return value
        kind = value.get("kind", self.default) if isinstance(value, dict) else value
        if not isinstance(kind, str) or kind not in self.modules:
            context = {"kind": repr(kind), "allowed": ", ".join(self.modules)}
            raise PydanticCustomError("unknown_kind", "{kind} is not known; allowed: {allowed}", context)
        return self.section(kind).model_validate(value)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self.validate)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        sections = dict.fromkeys(self.section(kind) for kind in self.modules)
        options = [handler(section.__pydantic_core_schema__) for section in sections]
        return {"discriminator": {"propertyName": "kind"}, "oneOf": options}


def _kinds(section: type[BaseModel]) -> tuple[str, ...]:
    field = section.model_fields.get("kind")
    return get_args(field.annotation) if field else ()


def hint(key: str, known: list[str], words: str = "known") -> str:
    """What to write instead of an unknown key: its new name, the nearest known key, or all known keys."""
    new = RENAMED.get(key)
    near = [new] if new in known else difflib.get_close_matches(key, known, 1, 0.5)
    return f"did you mean {near[0]!r}?" if near else f"{words}: {', '.join(known)}."


def first_problem(error: ValidationError) -> str:
    """One sentence for the first problem, unknown keys first, since they often cause the others."""
    first = min(error.errors(), key=lambda e: e["type"] != "unknown_key")
    parts = [str(part) for part in first["loc"] if "[" not in str(part)]  # brackets are pydantic's names of types
    key, value, context = ".".join(parts), first["input"], first.get("ctx", {})
    if first["type"] == "unknown_key":
        return f"Unknown key {'.'.join(filter(None, (key, context['key'])))!r} in the recipe; {context['hint']}"
    if first["type"] == "missing":
        return f"The recipe lacks {key!r}."
    if first["type"] == "unknown_kind":
        return f"{key}.kind = {context['kind']} is not known; allowed: {context['allowed']}."
    if first["type"] == "unknown_name":
        return f"{key} = {value!r} is not known; {context['hint']}"
    if first["type"] in ("string_pattern_mismatch", "string_too_long"):
        message = "be letters, digits, `_`, `-` and `.`, at most 200, and not dots alone"
    else:
        message = re.sub(r"^\w+ should ", "", first["msg"].replace("Value error, ", "Value should be "))
    return f"{key or 'This'} = {value!r} is not allowed; it should {message}."


class Training(Section):
    """Settings that both stages of training share. Progress is counted in images seen."""

    images: Count = 1_000_000
    batch: int = Field(256, ge=1, description="images per optimiser step over all processes")
    micro_batch: int | None = Field(None, ge=1, description="images per forward pass of one process; default: all")
    lr: float = Field(1e-4, gt=0)
    betas: tuple[Unit, Unit] = (0.9, 0.95)
    weight_decay: Weight = 0.0
    warmup: Count = 0
    schedule: Literal["constant", "cosine"] = "constant"
    final_lr: Weight = Field(0.0, description="where `schedule: cosine` ends, as a share of lr")
    clip: float | None = Field(1.0, gt=0, description="largest gradient norm; null switches clipping off")
    ema: float = Field(0.9999, ge=0, lt=1)
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: bool = False
    log_every: Count = 0
    preview_every: Count = 0
    checkpoint_every: Count = 0
    keep_checkpoints: int = Field(2, ge=1)

    @model_validator(mode="after")
    def _derive(self) -> Training:
        if self.images % self.batch:
            self.images += self.batch - self.images % self.batch  # whole steps
        for name, parts in (("log_every", 200), ("preview_every", 10), ("checkpoint_every", 10)):
            if not getattr(self, name):
                object.__setattr__(self, name, max(self.batch, self.images // parts))
        return self


class Process(Section):
    """The diffusion process and its training target."""

    kind: Literal["flow", "ddpm"] = "flow"
    t_distribution: Literal["uniform", "logit-normal"] = Field("logit-normal", description="flow: density of t")
    shift: Annotated[float | Literal["dimension"], BeforeValidator(parse_shift)] = Field(
        1.0,
        description="flow: t' = shift t / (1 + (shift - 1) t) in training; `dimension`: sqrt(m / 4096) for latents of "
        "m numbers, at least 1, in training and sampling",
    )
    prediction: Literal["velocity", "epsilon", "v", "sample"] | None = Field(None, description="ddpm: what is learned")
    beta_schedule: Literal["linear", "scaled_linear", "cosine"] = "scaled_linear"
    beta_start: float = Field(0.0015, gt=0, lt=1)
    beta_end: float = Field(0.0195, gt=0, lt=1)


class Prefixes(Section):
    """How many of the first latent channels a training step uses, drawn for each step, uniform over a list."""

    first: int = Field(16, ge=1, description="the shortest prefix")
    step: int = Field(4, ge=1, description="from one length to the next; all channels are always in the list")
    lengths: list[int] | None = Field(None, description="the list itself, instead of `first` and `step`")
    draws: int = Field(1, ge=1, description="lengths drawn in a step; their losses are averaged")
    always_full: bool = Field(False, description="all channels in every step, besides those that are drawn")
    full_share: float = Field(0.0, ge=0, lt=1, description="probability that a draw takes all channels")
    per_process: bool = Field(False, description="each process draws its own lengths; false: all draw the same")

    @model_validator(mode="after")
    def _check(self) -> Prefixes:
        if self.lengths is not None and (not self.lengths or min(self.lengths) < 1):
            raise LatelierError(f"prefixes.lengths = {self.lengths}: give numbers of channels, such as [4, 8, 16].")
        return self

    def of(self, channels: int) -> list[int]:
        """The list for `channels` latent channels, ascending; the last is all of them.

        Raises:
            LatelierError: if a length is longer than there are channels, or all channels are the only length.
        """
        if self.lengths is None and self.first >= channels:
            raise LatelierError(f"prefixes.first = {self.first} leaves no prefix of {channels} channels; set it lower.")
        lengths = self.lengths or range(self.first, channels, self.step)
        if max(lengths, default=0) > channels:
            raise LatelierError(f"prefixes.lengths has {max(lengths)}, but the latents have only {channels} channels.")
        return sorted({*lengths, channels})


class Adversarial(Section):
    """A discriminator that tells images from reconstructions: of patches (LDM), or on DINO's features (MAETok)."""

    kind: Literal["patch", "dino"] = Field("patch", description="PatchGAN, or heads on the features of a frozen ViT")
    weight: Weight = Field(0.5, description="of the generator's term")
    adaptive: bool = Field(True, description="scale it so that both gradients at the last layer are equally long")
    start: Count = Field(0, description="images seen before the tokenizer feels the discriminator")
    ahead: Count = Field(0, description="images that the discriminator is trained on before that")
    loss: Literal["hinge", "non-saturating"] = "hinge"
    lr: float | None = Field(None, gt=0, description="the discriminator's; by default the tokenizer's")
    betas: tuple[Unit, Unit] = (0.5, 0.9)
    layers: int = Field(3, ge=1, description="strided convolutions: each doubles the patch that a logit sees")
    channels: int = Field(64, ge=1, description="of the first layer")
    norm: Literal["group", "batch"] = Field("group", description="batch as in LDM; group does not mix images")
    lecam: Weight = Field(0.0, description="LeCAM regularisation, for little data")
    lecam_decay: float = Field(0.99, ge=0, lt=1, description="of the running means of the logits")
    augment: list[Literal["color", "translation", "cutout"]] = Field([], description="DiffAugment, for little data")
    augment_share: Unit = Field(1.0, description="probability of each change, drawn for each image")
    consistency: Weight = Field(0.0, description="of the squared change of the logits when images are augmented")
    teacher: str = Field("facebook/dino-vits16", description="dino: Hub name or folder of a ViT of `transformers`")
    taps: Literal["first", "last"] = Field("first", description="dino: the fifth tap; first is MAETok's, last RAE's")
    class_token: bool = Field(True, description="dino: add the CLS token to each patch (MAETok); RAE does not")
    crops: bool = Field(True, description="dino: crop half of the larger images (MAETok); RAE resizes all of them")
    round_fakes: bool = Field(False, description="it learns from reconstructions rounded to 8 bit (RAE)")

    @model_validator(mode="after")
    def _check(self) -> Adversarial:
        for key in {"patch": ("teacher", "taps", "class_token", "crops"), "dino": ("layers", "channels")}[self.kind]:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise LatelierError(f"tokenizer.adversarial.{key} means nothing to kind {self.kind!r}; leave it out.")
        return self


def parse_kinds(value: Any) -> Any:
    """`none`, a kind, a section, or a list of these, to a list of sections."""
    items = value if isinstance(value, list) else [] if value in (None, "none") else [value]
    return [{"kind": item} if isinstance(item, str) else item for item in items]


class TrainedTokenizer(Training):
    """Settings that all tokenizers trained here share.

    `phases` are trained one after another: each takes over the weights, and every key of this section that it does not
    give itself, except those in `OWN`.
    """

    METHODS: ClassVar[dict[str, dict[str, Any]]] = {}
    OWN: ClassVar[tuple[str, ...]] = ("images", "phases", "init", "log_every", "preview_every", "checkpoint_every")

    kind: str
    preset: str
    method: str | None = Field(None, description="a paper's name for a set of values; keys that are given win")
    init: str | None = Field(None, description="start from this folder or Hub name instead of random weights")
    model: dict[str, Any] = Field(default_factory=dict, description="overrides of the preset's architecture")
    until_psnr: float | None = Field(None, gt=0, description="dB on held-out images at which the last phase ends")
    psnr_every: Count = Field(0, description="images between two looks at it; default 2 % of `images`, at least 2,560")
    image_size: Size | None = Field(None, description="train at this size; by default that of `data`")
    train: Literal["all", "decoder", "middle", "head"] | list[str] = Field(
        "all", description="what learns: all, the decoder, the layers around the latent, those next to the pixels"
    )
    perceptual_weight: Weight = Field(0.5, description="of LPIPS (VGG16); 0 leaves it out")
    perceptual_every: int = Field(1, ge=1, description="n: LPIPS on every n-th image only, since it costs most")
    adversarial: Adversarial | None = Field(None, description="a discriminator; none by default")
    regularise: Annotated[
        list[Annotated[Kind, ByKind("latelier.losses.regularise:TERMS")]], BeforeValidator(parse_kinds)
    ] = Field([], description="regularisers of the latent space: a kind, a section, or a list")
    phases: list[dict[str, Any]] = Field([], description="what follows: `name`, `images`, and any key that changes")

    @model_validator(mode="before")
    @classmethod
    def _method(cls, values: Any) -> Any:
        """The method's values, under those that are given."""
        method = values.get("method") if isinstance(values, dict) else None
        if method is None:
            return values
        if method not in cls.METHODS:
            raise LatelierError(f"tokenizer.method = {method!r} is not known; allowed: {', '.join(cls.METHODS)}.")
        return {**cls.METHODS[method], **values}

    @model_validator(mode="after")
    def _check_phases(self) -> TrainedTokenizer:
        kinds = [term.kind for term in self.regularise]
        if len(set(kinds)) < len(kinds):
            raise LatelierError(f"tokenizer.regularise names a kind twice: {', '.join(kinds)}.")
        for key, value in (("kl_weight", "0"), ("sample_posterior", "false")):
            if self.norm and getattr(self, key, None):
                raise LatelierError(f"tokenizer.regularise: norm stands in place of a posterior; set {key}: {value}.")
        for number in range(len(self.phases)):
            name, phase = self.phase(number + 1)
            if number + 1 < len(self.phases) and "until_psnr" in self.phases[number]:
                raise LatelierError(f"tokenizer.phases: {name!r} has until_psnr, but only the last may end early.")
            if phase.norm != self.norm:
                raise LatelierError(f"tokenizer.regularise: phase {name!r} must have the same norm as the others.")
        return self

    @property
    def norm(self) -> str | None:
        """How latents are normalised at each position, see `Codec`."""
        return next((term.form for term in self.regularise if term.kind == "norm"), None)  # type: ignore[attr-defined]

    def ends_at(self, number: int) -> tuple[int, float | None]:
        """The most images of a phase, and the PSNR in dB at which it ends sooner: the last phase only."""
        phase = self.phase(number)[1]
        return phase.images, phase.until_psnr if number == len(self.phases) else None

    def phase(self, number: int) -> tuple[str, TrainedTokenizer]:
        """Name and resolved section of a phase; 0 is this section itself.

        Raises:
            LatelierError: if a phase has no name or length, or a key that it cannot have.
        """
        if number == 0:
            return "tokenizer", self
        given = dict(self.phases[number - 1])
        name = str(given.pop("name", ""))
        taken = ["tokenizer", "denoiser", *(str(phase.get("name")) for phase in self.phases[: number - 1])]
        if not re.fullmatch(r"[\w.]+", name) or name in taken:
            raise LatelierError(f"tokenizer.phases: phase {number} needs a `name` of its own, in letters and digits.")
        for key in ("kind", "preset", "model", "method", "init", "phases"):
            if key in given:
                raise LatelierError(f"tokenizer.phases: phase {name!r} cannot change {key!r}.")
        if "images" not in given:
            raise LatelierError(f"tokenizer.phases: phase {name!r} lacks `images`, how long it is trained.")
        inherited = {key: getattr(self, key) for key in type(self).model_fields if key not in self.OWN}
        try:
            return name, type(self).model_validate({**inherited, **given})
        except ValidationError as error:
            raise LatelierError(f"In phase {name!r} of tokenizer.phases: {first_problem(error)}") from None


def preset_arguments(
    cls: type, presets: dict[str, dict], name: str, overrides: dict[str, Any], section: str = "tokenizer"
) -> dict[str, Any]:
    """A preset's constructor arguments with the recipe's overrides.

    Raises:
        LatelierError: for an unknown preset, or an override that the constructor does not have.
    """
    if name not in presets:
        key = "size" if section == "denoiser" else "preset"
        raise LatelierError(f"{section}.{key} = {name!r} is not known; allowed: {', '.join(presets)}.")
    parameters = inspect.signature(cls).parameters
    known = [p for p in parameters if p != "self"]
    for key, value in overrides.items():
        if key not in known:
            raise LatelierError(f"Unknown key '{section}.model.{key}'; {hint(str(key), known)}")
        default = presets[name].get(key, parameters[key].default)
        least = int("channels" in key)
        wrong = isinstance(value, str) or (isinstance(value, int | float) and not least <= value < math.inf)
        if wrong and type(default) in (int, float) and default >= least:
            wanted = f"a number from {least} on, such as {default}"
            raise LatelierError(f"{section}.model.{key} = {value!r} is not allowed; it should be {wanted}.")
    return {**presets[name], **overrides}


def open_model(cls: type[Model], path: str | Path, **options: Any) -> Model:
    """A model of a class of diffusers' kind, from a folder or the Hub, whose config and weights fit each other.

    Call it under `reading`. The config is judged on the meta device first, where an absurd size costs nothing.
    """
    import torch

    config = cls.load_config(str(path), **options)  # type: ignore[attr-defined]
    check_config(config)
    with torch.device("meta"):
        planned = cls.from_config(config)  # type: ignore[attr-defined]
    needed = sum(t.numel() for t in (*planned.parameters(), *planned.buffers()))
    folder = Path(path, options.get("subfolder") or "")
    there = sum(file.stat().st_size for file in folder.glob("*.*")) if folder.is_dir() else math.inf
    if needed > there + 16 * MOST:  # a byte for each number at least, and tables that are not stored
        raise LatelierError(f"its config describes {needed:,} numbers, but its files have {there:,} bytes")
    model, report = cls.from_pretrained(str(path), output_loading_info=True, **options)  # type: ignore[attr-defined]
    for kind, what in (("missing_keys", "files lack"), ("unexpected_keys", "config has no place for")):
        if names := sorted(report.get(kind, ())):
            raise LatelierError(f"its {what} {len(names)} of its weights, such as {names[0]}")
    check_weights(model)
    return model


def check_weights(model: Any) -> None:
    """Refuse a model with weights that no file had, or that are not finite."""
    for name, tensor in model.state_dict().items():
        if tensor.is_meta or (tensor.is_floating_point() and not bool(tensor.isfinite().all())):
            raise LatelierError(f"its weight {name} is {'missing' if tensor.is_meta else 'not finite'}")


def check_config(config: Any, key: str = "") -> None:
    """Refuse numbers in a stranger's config with which a constructor would only fill the memory or never end."""
    if isinstance(config, Mapping | list | tuple):
        for name, value in config.items() if isinstance(config, Mapping) else ((key, value) for value in config):
            check_config(value, str(name))
    elif isinstance(config, int) and key != "seed":
        least, most = (0, MOST_LAYERS) if "depth" in key or "layers" in key else (-MOST, MOST)
        if not least <= config <= most:
            raise LatelierError(f"{key} = {config} in its config makes no model")


def open_init(cls: type[Model], path: str, wanted: Mapping[str, Any] | None = None) -> Model:
    """The model of a folder or Hub name that a recipe starts from; `wanted` is what a denoiser's config must say.

    Raises:
        LatelierError: if it cannot be opened, or its config differs.
    """
    with reading(f"init: {path} has no {cls.__name__} that can be opened", "give a folder or Hub name that has one"):
        model: Any = open_model(cls, path)
    for key, value in (wanted or {}).items():
        if (have := model.config[key]) != value:
            raise LatelierError(
                f"denoiser.init = {path} has {key} = {have}, but the tokenizer and the condition need {value}."
            )
    return model
