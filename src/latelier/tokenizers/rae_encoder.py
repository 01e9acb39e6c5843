"""Frozen encoders of representation autoencoders: one token for each patch of the image.

A ViT of `transformers`, the encoder of a VMAE or MAETok that was trained here, or VGG16's relu4_3 (stride 8). Each is
described by a dictionary that is saved in the tokenizer's config, so that a saved folder opens without the source:

    name, kind     what the recipe called it; `transformers`, `latelier` or `vgg16`
    patch, dim     pixels along the side of a patch, width of the tokens
    mean, std      for images in [0, 1], one number for each channel
    config         of the model
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from latelier.errors import LatelierError, check_whole, first_line
from latelier.losses.teachers import IMAGENET, Teacher
from latelier.weights import load_lpips

NORMS = ("layernorm", "norm", "post_layernorm")  # names of the norm after a ViT's last block
VGG_CHANNELS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512)  # of VGG16's convolutions up to relu4_3
VGG_POOLED = (2, 4, 7)  # convolutions with a pooling before them
VGG16: dict[str, Any] = {"name": "vgg16", "kind": "vgg16", "patch": 8, "dim": VGG_CHANNELS[-1], "config": {}}
VGG16 |= {"mean": list(IMAGENET[0]), "std": list(IMAGENET[1])}
VGG_LAYERS: dict[str, dict[str, Any]] = {
    "vgg16": VGG16,
    "vgg16-relu3_3": {**VGG16, "patch": 4, "dim": 256, "config": {"convolutions": 7}},
}
UNUSED = ("pooler.", "head.", "vision_model.head.")  # weights that no token needs
LEFT_OUT = ("id2label", "label2id", "transformers_version", "architectures", "torch_dtype", "dtype")
FORBIDDEN = ("auto_map", "attn_implementation", "quantization_config")  # a stranger's could fetch code, or packages
ADVICE = "name a plain vision transformer, such as DINOv2, SigLIP, MAE or CLIP, a vmae or maetok run, or vgg16"


def open_encoder(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and weights of an encoder.

    Args:
        name: `vgg16` (relu4_3) or `vgg16-relu3_3`; the folder of a run or tokenizer of kind vmae or maetok; a folder or
            Hub name of a ViT.

    Raises:
        LatelierError: if there is none, or it has no grid of patches.
    """
    if name in VGG_LAYERS:
        about = {**VGG_LAYERS[name], "name": name}
        arrays, names = load_lpips("vgg"), VGGEncoder(**about["config"]).state_dict()
        return about, {key: torch.from_numpy(arrays[key].copy()) for key in names}
    folder = Path(name).expanduser()
    for place in (folder, folder / "tokenizer"):
        if (place / "config.json").is_file() and "_class_name" in (place / "config.json").read_text(errors="replace"):
            return _open_tokenizer(name, place)
    try:
        vision = Teacher(name)
    except LatelierError as error:
        reason = str(error).removeprefix("The teacher ").rstrip(".")
        raise LatelierError(
            f"tokenizer.encoder: {reason}, or name the folder of a vmae or maetok run, or vgg16."
        ) from None
    config = {k: v for k, v in vision.model.config.to_diff_dict().items() if k not in LEFT_OUT}
    about = {"name": name, "kind": "transformers", "patch": vision.patch, "dim": vision.dim, "config": config}
    about |= {"mean": vision.mean.flatten().tolist(), "std": vision.std.flatten().tolist()}
    weights = vision.model.state_dict().items()
    return about, {f"model.{key}": tensor for key, tensor in weights if not key.startswith(UNUSED)}


def _open_tokenizer(name: str, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The encoder of a tokenizer that was trained here."""
    from latelier.tokenizers.codec import Codec

    model: Any = Codec.from_pretrained(folder).tokenizer
    if not hasattr(model, "moments"):
        raise LatelierError(
            f"tokenizer.encoder = {name} is an {type(model).__name__}, which has no tokens of patches; {ADVICE}."
        )
    config = {k: v for k, v in model.config.items() if k[0] != "_"} | {"_class_name": type(model).__name__}
    middle = [0.5] * config["in_channels"]  # images in [-1, 1]
    about = {"name": name, "kind": "latelier", "patch": config["patch_size"], "dim": config["dim"]}
    weights = {f"model.{key}": tensor for key, tensor in model.state_dict().items()}
    return {**about, "mean": middle, "std": middle, "config": config}, weights


def build_encoder(about: Mapping[str, Any], layers: int | list[int], combine: str, affine: bool) -> nn.Module:
    """The network that a description tells of, with fresh weights; for the other arguments see `ViTEncoder`."""
    if about["kind"] == "vgg16":
        if layers != 1 or affine:
            raise LatelierError("tokenizer.layers and final_norm mean nothing to the encoder vgg16; leave them out.")
        return VGGEncoder(**about["config"])
    config = {key: value for key, value in about["config"].items() if key[0] != "_" and key not in FORBIDDEN}
    if about["kind"] == "latelier":
        from latelier.tokenizers import model_class

        return ViTEncoder(model_class(about["config"])(**config), about, layers, combine, affine)
    transformers = importlib.import_module("transformers")
    settings = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
    settings.mask_ratio, settings.vision_use_head = 0.0, False  # of MAE and SigLIP, others do not read them
    model = transformers.AutoModel.from_config(settings)
    if hasattr(model, "pooler"):
        model.pooler = None
    return ViTEncoder(model, about, layers, combine, affine)


class ViTEncoder(nn.Module):
    """Tokens of a ViT's patches after the final norm, of its last block or of several blocks.

    Args:
        model: a ViT of `transformers`, a VMAE or a MAETok.
        about: see the module.
        layers: k: the last k blocks; or a list of blocks, of which 1 is the first.
        combine: `mean` or `sum` of several blocks, each normalised first (RAEv2).
        affine: keep gains and biases of the final norm (RAEv2); without, each token has mean 0, variance 1 (RAE).
    """

    def __init__(self, model: nn.Module, about: Mapping[str, Any], layers: int | list[int], combine: str, affine: bool):
        super().__init__()
        config: Any = model.config
        self.model, self.name, self.combine, self.affine = model, about["name"], combine, affine
        self.ours = about["kind"] == "latelier"
        depth = config["depth"] if self.ours else config.num_hidden_layers
        blocks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
        inner = getattr(model, "vision_model", model)
        norm = next((getattr(inner, key) for key in NORMS if isinstance(getattr(inner, key, None), nn.LayerNorm)), None)
        if not blocks or norm is None:
            raise LatelierError(f"tokenizer.encoder = {self.name} has no blocks with a norm after them; {ADVICE}.")
        chosen = list(range(depth - layers + 1, depth + 1)) if isinstance(layers, int) else layers
        if not chosen or not all(1 <= number <= depth for number in chosen):
            raise LatelierError(f"tokenizer.layers = {layers}, but the encoder {self.name} has {depth} blocks.")
        names = {id(module): name for name, module in model.named_modules()}
        self.depth = depth
        self.numbers, self._blocks, self._norm = chosen, names[id(blocks[0])], names[id(norm)]
        resizes = self._accepts("interpolate_pos_encoding")
        self._options = {"interpolate_pos_encoding": True} if resizes else {}

    def forward(self, pixels: Float[Tensor, "b c i j"], grid: tuple[int, int]) -> Float[Tensor, "b n d"]:
        """Tokens in raster order of normalised images, whose size is that of the grid times the patch."""
        norm: Any = self.model.get_submodule(self._norm)
        tokens = []
        for states in self._states(pixels, grid[0] * grid[1]):  # each (b, m, d)
            x = self._patches(states, grid[0] * grid[1]).float()  # (b, n, d)
            tokens.append(norm(x) if self.affine else F.layer_norm(x, x.shape[-1:], eps=norm.eps))
        total = torch.stack(tokens).sum(0)  # (b, n, d)
        return total / len(tokens) if self.combine == "mean" else total

    def _states(self, pixels: Tensor, count: int) -> list[Float[Tensor, "b m d"]]:
        """What the chosen blocks put out."""
        seen: dict[int, Tensor] = {}

        def note(number: int) -> Any:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                seen[number] = output[0] if isinstance(output, tuple) else output  # transformers 4 and 5

            return hook

        blocks: Any = self.model.get_submodule(self._blocks)
        hooks = [blocks[number - 1].register_forward_hook(note(number)) for number in self.numbers]
        try:
            if self.ours:
                self.model.moments(pixels)  # type: ignore[operator]
            elif self._accepts("noise"):  # MAE sorts the patches by it, masked or not
                noise = torch.arange(count, device=pixels.device).expand(len(pixels), -1).float()  # (b, n)
                self.model(pixel_values=pixels, noise=noise, **self._options)
            else:
                self.model(pixel_values=pixels, **self._options)
        except ValueError as error:
            raise LatelierError(
                f"tokenizer.encoder = {self.name} takes no images of {pixels.shape[2]} x {pixels.shape[3]} pixels "
                f"({first_line(error)}); change data.image_size or tokenizer.model.patch_size."
            ) from None
        finally:
            for hook in hooks:
                hook.remove()
        return [seen[number] for number in self.numbers]

    def _patches(self, tokens: Tensor, count: int) -> Float[Tensor, "b n d"]:
        """The tokens of the patches: CLS and registers come before them, and MAETok's latents after them."""
        if self.ours and (latents := self.model.config.get("latent_tokens")):  # type: ignore[union-attr, operator]
            tokens = tokens[:, :-latents]
        most = 2 + (getattr(self.model.config, "num_register_tokens", None) or 0)
        if tokens.ndim != 3 or not count <= tokens.shape[1] <= count + most:
            raise LatelierError(
                f"tokenizer.encoder = {self.name} gives {tuple(tokens.shape[1:])} for {count} patches, not one token "
                f"for each; {ADVICE}."
            )
        return tokens[:, -count:]

    def _accepts(self, option: str) -> bool:
        return option in inspect.signature(self.model.forward).parameters


class VGGEncoder(nn.Module):
    """VGG16's features, normalised over channels: one token for 8 x 8 pixels at relu4_3, 4 x 4 at relu3_3."""

    def __init__(self, convolutions: int = len(VGG_CHANNELS)):
        super().__init__()
        check_whole(convolutions=convolutions)
        self.convolutions = min(convolutions, len(VGG_CHANNELS))
        for number, (narrow, wide) in enumerate(zip((3, *VGG_CHANNELS), VGG_CHANNELS[:convolutions])):
            self.add_module(f"conv{number}", nn.Conv2d(narrow, wide, 3, padding=1))

    def forward(self, pixels: Float[Tensor, "b 3 i j"], grid: tuple[int, int]) -> Float[Tensor, "b n d"]:
        """Tokens in raster order of normalised images of 8 or 4 pixels for each cell of the grid."""
        x = pixels
        for number in range(self.convolutions):
            if number in VGG_POOLED:
                x = F.max_pool2d(x, 2)  # (b, k, i / 2, j / 2)
            x = self.get_submodule(f"conv{number}")(x).relu()  # (b, k, i, j)
        x = x.flatten(2).transpose(1, 2).float()  # (b, n, d)
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)
