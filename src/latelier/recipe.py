"""A recipe: one experiment from data to report, as a user writes it.

The models below *are* the schema. Unknown keys, wrong values and impossible combinations become one sentence that
names the key, the value and what is allowed.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from latelier.errors import LatelierError

# Recipes lie in the package when it is installed from a wheel, and at the root of a clone.
_FOLDERS = (Path(__file__).parent / "recipes", Path(__file__).parents[2] / "recipes")
_UNITS = {"": 1, "k": 1_000, "m": 1_000_000, "b": 1_000_000_000}


def parse_count(value: Any) -> Any:
    """`2M`, `64k`, `1.5M`, `1_000` or a number, to an int; anything else is left for pydantic to refuse."""
    match = re.fullmatch(r"\s*(\d[\d_]*(?:\.\d+)?)\s*([kKmMbB]?)\s*", value) if isinstance(value, str) else None
    if match:
        value = float(match[1].replace("_", "")) * _UNITS[match[2].lower()]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def parse_size(value: Any) -> Any:
    """One number is a square."""
    return (value, value) if isinstance(value, int) else value


Count = Annotated[int, BeforeValidator(parse_count), Field(ge=0, description="a count such as 64k, 2M or 1000")]
Size = Annotated[tuple[int, int], BeforeValidator(parse_size), Field(description="height and width, or one number")]
Unit = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
Metric = Literal[
    "psnr", "ssim", "lpips", "l1", "rfd", "gfd", "precision", "recall", "smoothness", "compression", "cost"
]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", validate_default=True)


class Data(Section):
    """Where pictures come from and how they become tensors."""

    source: str = Field(description="`emoji`, `scenes`, a folder, a parquet/tar file or glob, or a Hub dataset name")
    image_size: Size = (64, 64)
    channels: int = Field(3, ge=1)
    split: str = "train"
    val_split: str | None = Field(None, description="the split that evaluation reads; built-in sources know theirs")
    val_source: str | None = Field(None, description="another source for evaluation, when it is not a split")
    val_fraction: float = Field(0.05, ge=0, lt=1, description="held out when the source has no validation split")
    image_key: str = "image"
    label_key: str | None = Field(None, description="the column of labels; found by itself when it is `label`")
    caption_key: str | None = Field(None, description="the column of captions; found when `caption` or `text`")
    classes: list[str] | None = Field(None, description="use only these classes, in this order")
    crop: Literal["center", "random", "resize"] = "center"
    crop_scale: tuple[float, float] = Field((0.75, 1.0), description="area kept by `crop: random`")
    flip: bool = True
    background: Literal["white", "black", "gray", "random"] = Field("white", description="behind transparent pictures")
    streaming: bool = False
    in_memory: bool | None = Field(None, description="keep decoded pictures in memory; by default when they fit 1 GB")
    workers: int | None = Field(None, ge=0, description="loader processes; by default none in memory, else the cores")
    max_skipped: Unit = Field(0.01, description="share of unreadable files that is tolerated")
    length: Count | None = Field(None, description="how many pictures a generated source has, or how many to use")


class Training(Section):
    """What both stages of training share. Progress is counted in images seen."""

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


class Adversarial(Section):
    """A patch discriminator that tells pictures from reconstructions (VQGAN, LDM)."""

    weight: Weight = Field(0.5, description="of the generator's term")
    adaptive: bool = Field(True, description="scale it so that both gradients at the last layer are equally long")
    start: Count = Field(0, description="images seen before the tokenizer feels the discriminator")
    ahead: Count = Field(0, description="images that the discriminator is trained on before that")
    loss: Literal["hinge", "non-saturating"] = "hinge"
    lr: float | None = Field(None, gt=0, description="the discriminator's; by default the tokenizer's")
    betas: tuple[Unit, Unit] = (0.5, 0.9)
    layers: int = Field(3, ge=1, description="strided convolutions: each doubles the patch that is judged")
    channels: int = Field(64, ge=1, description="of the first layer")
    norm: Literal["group", "batch"] = Field("group", description="batch as in LDM; group does not mix pictures")
    lecam: Weight = Field(0.0, description="LeCAM regularisation, for little data")
    augment: list[Literal["color", "translation", "cutout"]] = Field([], description="DiffAugment, for little data")


class TrainedTokenizer(Training):
    """What the sections of all tokenizers that are trained here share.

    `phases` are trained one after another: each takes over the weights, and every key of this section that it does not
    give itself, except how long, how often and for whom (`images`, the cadences, `init`).
    """

    METHODS: ClassVar[dict[str, dict[str, Any]]] = {}
    OWN: ClassVar[tuple[str, ...]] = ("images", "phases", "init", "log_every", "preview_every", "checkpoint_every")

    kind: str
    preset: str
    method: str | None = Field(None, description="a paper's name for a set of values; keys that are given win")
    init: str | None = Field(None, description="start from this folder or Hub name instead of random weights")
    model: dict[str, Any] = Field(default_factory=dict, description="overrides of the preset's architecture")
    image_size: Size | None = Field(None, description="train at this size; by default that of `data`")
    train: Literal["all", "decoder"] | list[str] = Field("all", description="what learns: or the names of modules")
    perceptual_weight: Weight = Field(0.5, description="of LPIPS (VGG16); 0 leaves it out")
    perceptual_every: int = Field(1, ge=1, description="n: LPIPS on every n-th picture only, since it costs most")
    adversarial: Adversarial | None = Field(None, description="a discriminator; none by default")
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
        for number in range(len(self.phases)):
            self.phase(number + 1)
        return self

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
            raise LatelierError(f"In phase {name!r} of tokenizer.phases: {first_problem(error, type(self))}") from None


class VMAERecipe(TrainedTokenizer):
    """Variational masked autoencoder (LDMAE, ICCV 2025)."""

    METHODS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"mask_ratio": 0.6, "kl": "free-mean", "kl_weight": 1e-6, "perceptual_weight": 0.5},
        "released": {"mask_ratio": 0.25, "kl": "fixed-std", "kl_weight": 1e-6, "perceptual_weight": 0.5},
    }

    kind: Literal["vmae"]
    preset: str = "vmae-f8d16"
    mask_ratio: float = Field(0.6, ge=0, lt=1)
    visible_weight: Unit = Field(0.5, description="v in (1 - v) * masked MSE + v * visible MSE")
    kl_weight: Weight = 1e-6
    kl: Literal["free-mean", "standard", "fixed-std"] = "free-mean"
    fixed_std: float = Field(1e-3, gt=0, description="s of `kl: fixed-std`")
    sample_posterior: bool = Field(True, description="decode a draw of the posterior in training; false: its mean")

    @property
    def deterministic(self) -> bool:
        """Whether the posterior's spread is neither used nor trained."""
        return not self.sample_posterior and not self.kl_weight


class ConvRecipe(TrainedTokenizer):
    """Convolutional autoencoder on diffusers' AutoencoderKL: AE, DAE, VAE, SD-VAE."""

    METHODS: ClassVar[dict[str, dict[str, Any]]] = {
        "ae": {"reconstruction": "l2", "perceptual_weight": 0, "kl_weight": 0},
        "dae": {"reconstruction": "l2", "perceptual_weight": 0, "kl_weight": 0, "input_noise": 0.2},
        "vae": {"reconstruction": "l2", "perceptual_weight": 0, "kl_weight": 1e-6},
        "sd-vae": {"reconstruction": "l1", "perceptual_weight": 1.0, "kl_weight": 1e-6, "adversarial": {}},
    }

    kind: Literal["conv"]
    preset: str = "kl-f8c4"
    reconstruction: Literal["l1", "l2"] = "l1"
    perceptual_weight: Weight = 1.0
    kl_weight: Weight = 1e-6
    kl: Literal["standard", "free-mean"] = "standard"
    input_noise: Weight = Field(0.0, description="standard deviation of noise on the encoder's input (DAE)")

    @property
    def deterministic(self) -> bool:
        """Whether the posterior's spread is neither used nor trained."""
        return not self.kl_weight


class IdentityRecipe(Section):
    """No tokenizer: diffusion in pixel space (f = 1)."""

    kind: Literal["identity"]


class PretrainedRecipe(Section):
    """A tokenizer that is trained already: a folder of ours, or any diffusers autoencoder by Hub name."""

    kind: Literal["pretrained"]
    path: str
    subfolder: str | None = None


TokenizerRecipe = Annotated[VMAERecipe | ConvRecipe | IdentityRecipe | PretrainedRecipe, Field(discriminator="kind")]


# The kind of a tokenizer section, as users write it; it is part of the location of pydantic's errors.
_KINDS = {model.model_fields["kind"].annotation.__args__[0]: model for model in get_args(get_args(TokenizerRecipe)[0])}


class Process(Section):
    """The diffusion process and its training target."""

    kind: Literal["flow", "ddpm"] = "flow"
    t_distribution: Literal["uniform", "logit-normal"] = Field("logit-normal", description="flow: density of t")
    shift: float = Field(1.0, gt=0, description="flow: t' = shift t / (1 + (shift - 1) t) in training")
    prediction: Literal["velocity", "epsilon", "v", "sample"] | None = Field(None, description="ddpm: what is learned")
    beta_schedule: Literal["linear", "scaled_linear", "cosine"] = "scaled_linear"
    beta_start: float = Field(0.0015, gt=0, lt=1)
    beta_end: float = Field(0.0195, gt=0, lt=1)


class DenoiserRecipe(Training):
    """A latent diffusion model."""

    kind: Literal["dit", "sit", "lightning-dit"] = "lightning-dit"
    size: str = "B"
    patch: int = Field(1, ge=1)
    model: dict[str, Any] = Field(default_factory=dict, description="overrides of the size's architecture")
    init: str | None = None
    process: Process = Process()
    condition: Literal["none", "class"] = "class"
    condition_dropout: Unit = 0.1
    cosine_weight: Weight = Field(0.0, description="weight of 1 - cos(prediction, target), LightningDiT")
    sample_posterior: bool = Field(True, description="draw z anew each time; false uses the posterior's mean")
    cache: bool = Field(True, description="encode once to disk; false encodes on the fly, with all augmentations")


class Sample(Section):
    """How pictures are drawn."""

    steps: int = Field(50, ge=1)
    guidance: float = Field(1.0, ge=0)
    guidance_interval: tuple[Unit, Unit] = Field((0.0, 1.0), description="noise levels t at which guidance acts")
    guidance_channels: int | None = Field(None, ge=1, description="guide only the first channels (LightningDiT: 3)")
    sampler: Literal["auto", "euler", "heun", "ddpm", "ddim", "plms", "dpm++"] = "auto"
    shift: float = Field(1.0, gt=0, description="flow: spends more steps near noise when above 1")
    eta: Unit = Field(0.0, description="ddim: 0 deterministic, 1 ancestral")
    count: int = Field(64, ge=1)
    batch: int = Field(64, ge=1)
    classes: list[int | str] | None = None
    seed: int = 0


class Evaluate(Section):
    """Which numbers are measured, on how many pictures."""

    metrics: list[Metric] = ["psnr", "ssim", "lpips", "rfd", "gfd"]
    features: Literal["vgg16", "inception"] = "vgg16"
    samples: Count = 5_000
    batch: int = Field(64, ge=1)
    noise_levels: list[Weight] = Field(
        [0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0], description="of smoothness, in standard deviations of each channel"
    )
    clusters: int = Field(64, ge=2, description="of compression, at each granularity")
    seed: int = Field(0, ge=0, description="of the noise and of the clusters")


class Recipe(Section):
    """One experiment, from data to report."""

    name: str = Field(pattern=r"^[\w.-]+$")
    seed: int = Field(0, ge=0)
    runs: str = Field("runs", description="folder in which the run folder is made")
    data: Data
    tokenizer: TokenizerRecipe
    denoiser: DenoiserRecipe | None = None
    sample: Sample = Sample()
    evaluate: Evaluate = Evaluate()

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.runs) / self.name


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe file and apply `a.b=c` overrides.

    Raises:
        LatelierError: naming the file, key or value that is wrong.
    """
    given, path = Path(path), find_recipe(path)
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise LatelierError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise LatelierError(f"{path} must be a YAML mapping with at least `name`, `data` and `tokenizer`.")
    if given.is_dir():  # a run folder, perhaps moved since
        tree |= {"runs": str(given.resolve().parent), "name": given.resolve().name}
    return build_recipe(apply_overrides(tree, overrides))


def recipe_files() -> list[Path]:
    """The recipes that come along."""
    return sorted(path for folder in _FOLDERS if folder.is_dir() for path in folder.rglob("*.yaml"))


def find_recipe(name: str | Path) -> Path:
    """A recipe file from its path, a run folder, or the name of one that comes along."""
    path = Path(name)
    if (path / "recipe.yaml").is_file():
        return path / "recipe.yaml"
    if path.is_file():
        return path
    for candidate in recipe_files():
        if str(name) in (candidate.stem, f"{candidate.parent.name}/{candidate.stem}"):
            return candidate
    near = difflib.get_close_matches(path.stem, [c.stem for c in recipe_files()], 1, 0.6)
    hint = f"did you mean {near[0]!r}?" if near else "`latelier recipe list` shows those that come along."
    raise LatelierError(f"There is no recipe at {path}; {hint}")


def apply_overrides(tree: dict, overrides: list[str] | tuple[str, ...]) -> dict:
    """Set `a.b=c` in a tree of dicts; `c` is read as YAML."""
    for override in overrides:
        keys, equals, value = override.partition("=")
        if not equals or not keys:
            raise LatelierError(f"Override {override!r} is not of the form key=value, such as tokenizer.lr=1e-4.")
        *parents, last = keys.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise LatelierError(f"Override {override!r}: {key!r} is a value, not a section.")
        node[last] = yaml.safe_load(value)
    return tree


def build_recipe(tree: dict) -> Recipe:
    """Validate a tree; the first problem becomes one sentence."""
    try:
        return Recipe.model_validate(as_numbers(tree))
    except ValidationError as error:
        raise LatelierError(first_problem(error)) from None


def schema() -> dict:
    """The JSON schema, for editors."""
    return Recipe.model_json_schema()


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=100)


def as_numbers(node: Any) -> Any:
    """YAML 1.1 reads 1e-4 as a string; numbers that look like numbers become numbers."""
    if isinstance(node, dict):
        return {k: as_numbers(v) for k, v in node.items()}
    if isinstance(node, list):
        return [as_numbers(v) for v in node]
    if isinstance(node, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", node):
        return float(node)
    return node


def first_problem(error: ValidationError, root: type[BaseModel] | None = None) -> str:
    """One sentence for the first problem, unknown keys first, since they often cause the others."""
    problems = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    first = problems[0]
    place = [str(part) for i, part in enumerate(first["loc"]) if not (i == 1 and part in _KINDS)]
    key, value = ".".join(place), first["input"]
    if first["type"] == "extra_forbidden":
        known = _known_keys(first["loc"][:-1], root or Recipe)
        near = difflib.get_close_matches(place[-1], known, 1, 0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}."
        return f"Unknown key {key!r} in the recipe; {hint}"
    if first["type"] == "missing":
        return f"The recipe lacks {key!r}."
    if first["type"].startswith("union_tag"):
        kind = value.get("kind") if isinstance(value, dict) else value
        return f"{key}.kind = {kind!r} is not known; allowed: {', '.join(_KINDS)}."
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return f"{key} = {value!r} is not allowed; it should be {message}."


def _known_keys(location: tuple, root: type[BaseModel]) -> list[str]:
    """Keys of the section at a pydantic error location."""
    sections: dict[str, type[BaseModel]] = {
        "": root, "data": Data, "denoiser": DenoiserRecipe, "sample": Sample, "evaluate": Evaluate,
        "process": Process, "adversarial": Adversarial, **_KINDS,
    }  # fmt: skip
    model = sections.get(str(location[-1]) if location else "", root)
    return list(model.model_fields)
