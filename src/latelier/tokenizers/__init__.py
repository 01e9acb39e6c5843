"""Tokenizers: images to latents and back.

A new tokenizer is a file and a line in `TOKENIZERS`. The file has

    SECTIONS       classes of its recipe sections: `TrainedTokenizer` or `Kind`, with `kind: Literal["..."]`
    MODELS         its own `ModelMixin, ConfigMixin` classes, so that saved folders open; diffusers' are known
    build(section, channels, image_size) -> model     also on the meta device, on which a recipe's `model` is tried
    objective(section, tokenizer, perceptual, seed, dataset) -> nn.Module     if it is trained: `forward(batch) ->
                   LossTerms` with a `reconstruction`, and the attribute `tokenizer`

Its class has a property `info`, a `TokenizerInfo`, unless the factor is the `patch_size` of its config.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from latelier.errors import LatelierError

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from torch import Tensor, nn

    from latelier.data.loader import ImageDataset
    from latelier.recipe import Data
    from latelier.sections import Kind, TrainedTokenizer

TOKENIZERS = {
    "vmae": "latelier.tokenizers.vmae",
    "maetok": "latelier.tokenizers.maetok",
    "dcae": "latelier.tokenizers.dcae",
    "conv": "latelier.tokenizers.conv",
    "rae": "latelier.tokenizers.rae",
    "identity": "latelier.tokenizers.conv",
    "pretrained": "latelier.tokenizers.pretrained",
}


@dataclass(frozen=True)
class TokenizerInfo:
    """Sizes and layer names of a tokenizer.

    Attributes:
        factor: pixels along one side of a latent position; image sizes must be multiples of it.
        latent_tokens: length of 1-D latents; None for latents on a grid.
        decoder_size: `(h, w)` of the only images that 1-D latents decode to; None for latents on a grid.
        value_range: what the class calls black and white; outside of the codec that is always -1 and 1.
        decoder_modules: the modules that turn latents into images; all others belong to the encoder.
        middle: the layers on both sides of the latent, the encoder's last one first.
        head: the layers next to the pixels of the decoded image.
        last_layer: the weight nearest to the pixels, where gradients of loss terms are compared.
        variance_layer: the layer whose second half of outputs is the log-variance; None without a posterior.
        channels_last: whether the channels_last memory layout is faster (convolutions).
        needs_numbers: whether it cannot run on the meta device, on which operations are counted.
        statistics: what normalised latents have mean 0 and variance 1 of: each channel, or each element `(c, *grid)`.
    """

    factor: int
    latent_channels: int
    image_channels: int = 3
    latent_tokens: int | None = None
    decoder_size: tuple[int, int] | None = None
    value_range: tuple[float, float] = (-1.0, 1.0)
    decoder_modules: tuple[str, ...] = ("decoder",)
    middle: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    last_layer: str | None = None
    variance_layer: str | None = None
    channels_last: bool = False
    needs_numbers: bool = False
    statistics: Literal["channel", "element"] = "channel"

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """`(c, *grid)` of the latents of an image."""
        if self.latent_tokens is not None:
            return (self.latent_channels, self.latent_tokens)
        return (self.latent_channels, height // self.factor, width // self.factor)


def tokenizer_info(tokenizer: nn.Module) -> TokenizerInfo:
    """The `info` of a tokenizer's class, or the entry of a class of diffusers; an error for a class without either."""
    name, config = type(tokenizer).__name__, getattr(tokenizer, "config", {})
    known = importlib.import_module("latelier.tokenizers.diffusers_classes")
    if name in known.CLASSES:
        return known.CLASSES[name].info(config)
    if hasattr(type(tokenizer), "info"):
        return tokenizer.info  # type: ignore[return-value]
    if "patch_size" not in config or "latent_channels" not in config:
        why = (
            f"{known.REFUSED[name]}; name another"
            if name in known.REFUSED
            else "it has no property `info`, see TokenizerInfo"
        )
        raise LatelierError(f"{name} is no image tokenizer that can be opened: {why}.")
    return known.PLAIN.info(config)


def model_class(config: dict[str, Any]) -> type[ModelMixin]:
    """The class that a saved config names: one of ours or of diffusers; an error for any other."""
    import diffusers

    name = config.get("_class_name", "")
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    refused = importlib.import_module("latelier.tokenizers.diffusers_classes").REFUSED
    if isinstance(name, str) and name in refused:
        raise LatelierError(f"{name} is no image tokenizer: {refused[name]}")
    if isinstance(found, type) and issubclass(found, diffusers.ModelMixin):
        return found
    for model in own_classes():
        if model.__name__ == name:
            return model
    raise LatelierError(f"The tokenizer's config names the class {name!r}, which neither diffusers nor latelier has.")


def own_classes() -> Iterator[type[ModelMixin]]:
    """All tokenizer classes of the modules in `TOKENIZERS`."""
    for module in dict.fromkeys(TOKENIZERS.values()):
        yield from importlib.import_module(module).MODELS


def build_tokenizer(section: Kind | TrainedTokenizer, data: Data | tuple[int, tuple[int, int]]) -> ModelMixin:
    """A tokenizer with fresh weights or those of `init`; `data` may also be `(channels, (height, width))`."""
    channels, image_size = data if isinstance(data, tuple) else (data.channels, data.image_size)
    tokenizer = _module(section).build(section, channels, image_size)
    if getattr(section, "deterministic", False) and not getattr(section, "init", None):
        remove_spread(tokenizer)
    return tokenizer


def build_perceptual(section: TrainedTokenizer) -> nn.Module | None:
    """LPIPS, if the section gives it a weight."""
    if not section.perceptual_weight:
        return None
    from latelier.losses.perceptual import LPIPS

    return LPIPS("vgg")


def build_objective(
    section: TrainedTokenizer,
    seed: int,
    tokenizer: nn.Module,
    perceptual: nn.Module | None = None,
    dataset: ImageDataset | None = None,
) -> nn.Module:
    """The training objective of a tokenizer; layers that `section.train` does not name are frozen.

    Args:
        section: weights and forms of the loss.
        seed: of the objective's random choices.
        tokenizer: the model to train.
        perceptual: LPIPS, see `build_perceptual`.
        dataset: the training images; MAETok's targets learn words from their captions.
    """
    freeze(tokenizer, section.train)
    objective = _module(section).objective(section, tokenizer, perceptual, seed, dataset)
    if section.regularise and not hasattr(objective, "regularise"):
        raise LatelierError(f"tokenizer.kind = {section.kind} takes no `regularise`; leave it out.")
    return objective


def _module(section: Kind | TrainedTokenizer) -> ModuleType:
    return importlib.import_module(TOKENIZERS[section.kind])


def remove_spread(tokenizer: nn.Module) -> None:
    """Make a posterior a point: log-variance -30, whatever the image.

    Where nothing trains the log-variance it would stay about 0, which is noise as large as the latents.
    """
    layer: Any = tokenizer.get_submodule(tokenizer_info(tokenizer).variance_layer or "")
    half = len(layer.weight) // 2
    layer.weight.data[half:] = 0.0
    layer.bias.data[half:] = -30.0


def decoder_parts(tokenizer: nn.Module) -> tuple[str, ...]:
    """Names of the modules that turn latents into images; all others belong to the encoder."""
    return tokenizer_info(tokenizer).decoder_modules


def last_layer(tokenizer: nn.Module) -> Tensor:
    """The weight nearest to the pixels, where gradients of loss terms are compared; an error if it is not known."""
    name = tokenizer_info(tokenizer).last_layer
    if name is None:
        raise LatelierError(f"{type(tokenizer).__name__} does not say its last layer; set adversarial.adaptive: false.")
    return tokenizer.get_parameter(name)


def encoder_layer(tokenizer: nn.Module) -> Tensor:
    """The encoder's last weight, where gradients of what acts on latents are compared; an error if it is not known."""
    names = tokenizer_info(tokenizer).middle
    if not names:
        raise LatelierError(f"{type(tokenizer).__name__} does not say its encoder's last layer; set adaptive: false.")
    return tokenizer.get_parameter(f"{names[0]}.weight")


def freeze(tokenizer: nn.Module, train: str | list[str]) -> None:
    """Train only some modules.

    `train` is `all`; `decoder`; `middle`, the layers on both sides of the latent; `head`, those next to the pixels
    (DC-AE's second and third phase; its paper does not list the layers, this is the usual reading); or a list of
    modules such as `decoder.conv_out`.

    Raises:
        LatelierError: for a module without weights.
    """
    info, names = tokenizer_info(tokenizer), [name for name, _ in tokenizer.named_parameters()]
    groups = {"all": ("",), "decoder": info.decoder_modules, "middle": info.middle, "head": info.head}
    wanted = train if isinstance(train, list) else groups[train]
    for module in wanted if isinstance(train, list) else ():
        if not any(_belongs(name, module) for name in names):
            known = ", ".join(dict.fromkeys(name.split(".")[0] for name in names))
            raise LatelierError(f"tokenizer.train: no weight belongs to {module!r}; the tokenizer has {known}.")
    for name, parameter in tokenizer.named_parameters():
        parameter.requires_grad_(any(_belongs(name, module) for module in wanted))


def _belongs(name: str, module: str) -> bool:
    return not module or name == module or name.startswith(module + ".")
