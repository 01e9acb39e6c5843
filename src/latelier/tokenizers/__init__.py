"""Tokenizers: images to latents and back.

A new tokenizer is a file and a line in `TOKENIZERS`. The file has

    SECTIONS       classes of its recipe sections: `TrainedTokenizer` or `Kind`, with `kind: Literal["..."]`
    MODELS         its own `ModelMixin, ConfigMixin` classes, so that saved folders open; diffusers' are known
    build(section, channels, image_size) -> model
    objective(section, tokenizer, perceptual, seed, dataset) -> nn.Module     if it is trained: `forward(batch) ->
                   LossTerms` with a `reconstruction`, and the attribute `tokenizer`

and its class a property `info`, a `TokenizerInfo`, unless its config says the factor as `patch_size`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

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
    "identity": "latelier.tokenizers.conv",
    "pretrained": "latelier.tokenizers.pretrained",
}


@dataclass(frozen=True)
class TokenizerInfo:
    """What is to be known of a tokenizer, besides how it encodes and decodes.

    Attributes:
        factor: pixels along one side of a latent position; image sizes must be multiples of it.
        latent_channels: of the latents.
        image_channels: of the images.
        latent_tokens: length of 1-D latents; None for latents on a grid.
        decoder_size: `(h, w)` of the only images that 1-D latents decode to; None for latents on a grid.
        value_range: of the images.
        decoder_modules: names of the modules that make images of latents; the rest makes latents of images.
        middle: names of the layers on both sides of the latent.
        head: names of the layers next to the pixels of the decoded image.
        last_layer: name of the weight nearest to the pixels, where gradients of loss terms are compared.
        variance_layer: name of the layer whose second half of outputs is the log-variance; None without a posterior.
        channels_last: whether the channels_last memory layout pays (convolutions).
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

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """`(c, *grid)` of the latents of an image."""
        if self.latent_tokens is not None:
            return (self.latent_channels, self.latent_tokens)
        return (self.latent_channels, height // self.factor, width // self.factor)


def tokenizer_info(tokenizer: nn.Module) -> TokenizerInfo:
    """What is to be known of a tokenizer: its class's `info`, or the entry of a class of diffusers.

    Raises:
        LatelierError: for a class without either.
    """
    name, config = type(tokenizer).__name__, getattr(tokenizer, "config", {})
    entries = importlib.import_module(TOKENIZERS["pretrained"]).DIFFUSERS
    if name in entries:
        return entries[name](config)
    if hasattr(type(tokenizer), "info"):
        return tokenizer.info  # type: ignore[return-value]
    if "patch_size" not in config or "latent_channels" not in config:
        raise LatelierError(f"The tokenizer class {name} needs an entry, or a property `info`; see TokenizerInfo.")
    return TokenizerInfo(config["patch_size"], config["latent_channels"], config.get("in_channels", 3))


def model_class(config: dict[str, Any]) -> type[ModelMixin]:
    """The class that a saved config names: one of ours, or diffusers' own.

    Raises:
        LatelierError: for a class that neither has.
    """
    import diffusers

    name = config.get("_class_name", "")
    if hasattr(diffusers, name):
        return getattr(diffusers, name)
    for model in own_classes():
        if model.__name__ == name:
            return model
    raise LatelierError(f"The tokenizer's config names the class {name!r}, which neither diffusers nor latelier has.")


def own_classes() -> Iterator[type[ModelMixin]]:
    """All tokenizer classes of the modules in `TOKENIZERS`."""
    for module in dict.fromkeys(TOKENIZERS.values()):
        yield from importlib.import_module(module).MODELS


def build_tokenizer(section: Kind | TrainedTokenizer, data: Data | tuple[int, tuple[int, int]]) -> ModelMixin:
    """A tokenizer with fresh weights, or those of `init`.

    Args:
        section: the recipe's `tokenizer`.
        data: the recipe's `data`, or channels and `(height, width)` of the images.
    """
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
    """The objective of a recipe's tokenizer section; what `section.train` leaves out is frozen.

    Args:
        section: weights and forms.
        seed: of the objective's random choices.
        tokenizer: the model to train.
        perceptual: LPIPS, see `build_perceptual`.
        dataset: what it is trained on; MAETok's targets learn words from its captions.
    """
    freeze(tokenizer, section.train)
    return _module(section).objective(section, tokenizer, perceptual, seed, dataset)


def _module(section: Kind | TrainedTokenizer) -> ModuleType:
    return importlib.import_module(TOKENIZERS[section.kind])


def remove_spread(tokenizer: nn.Module) -> None:
    """Make a posterior a point: log-variance -30, whatever the image.

    Where nothing trains the log-variance, it would otherwise keep what its random weights say, about 0: noise as large
    as the latents, which everything that samples the posterior would see.
    """
    layer: Any = tokenizer.get_submodule(tokenizer_info(tokenizer).variance_layer or "")
    half = len(layer.weight) // 2
    layer.weight.data[half:] = 0.0
    layer.bias.data[half:] = -30.0


def decoder_parts(tokenizer: nn.Module) -> tuple[str, ...]:
    """Names of the modules that make images of latents; the rest makes latents of images."""
    return tokenizer_info(tokenizer).decoder_modules


def last_layer(tokenizer: nn.Module) -> Tensor:
    """The weight nearest to the pixels, where the gradients of loss terms are compared.

    Raises:
        LatelierError: for a tokenizer that does not say which it is.
    """
    name = tokenizer_info(tokenizer).last_layer
    if name is None:
        raise LatelierError(f"{type(tokenizer).__name__} does not say its last layer; set adversarial.adaptive: false.")
    return tokenizer.get_parameter(name)


def freeze(tokenizer: nn.Module, train: str | list[str]) -> None:
    """Let only some modules learn.

    Args:
        tokenizer: the model.
        train: `all`; `decoder`; `middle`, the layers on both sides of the latent; `head`, those next to the pixels
            (DC-AE's second and third phase; its paper does not list the layers, this is the usual reading); or names of
            modules such as `decoder.conv_out`.

    Raises:
        LatelierError: for a name that no weight's name begins with.
    """
    names = [name for name, _ in tokenizer.named_parameters()]
    if isinstance(train, list):
        wanted = train
        for module in wanted:
            if not any(_belongs(name, module) for name in names):
                known = ", ".join(dict.fromkeys(name.split(".")[0] for name in names))
                raise LatelierError(f"tokenizer.train: no weight belongs to {module!r}; the tokenizer has {known}.")
    else:
        info = tokenizer_info(tokenizer)
        groups = {"all": ("",), "decoder": info.decoder_modules, "middle": info.middle, "head": info.head}
        wanted = list(groups[train])
    for name, parameter in tokenizer.named_parameters():
        parameter.requires_grad_(any(_belongs(name, module) for module in wanted))


def _belongs(name: str, module: str) -> bool:
    return not module or name == module or name.startswith(module + ".")
