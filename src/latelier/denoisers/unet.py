"""The U-Nets of latent diffusion (Rombach et al. 2022): diffusers' two classes, called as our denoisers are.

`UNet` has self-attention; `CrossAttentionUNet` has transformers that also attend to a condition's tokens (section 3.3).
Weights and config are diffusers' own, so a saved folder opens with plain `UNet2DModel` and `UNet2DConditionModel` (for
the one exception see `UNet`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from diffusers import ModelMixin, UNet2DConditionModel, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from jaxtyping import Float
from torch import Tensor, nn

from latelier.conditioning.condition import Condition
from latelier.denoisers.objective import DenoiserSection
from latelier.errors import LatelierError, first_line
from latelier.prefixes import pad_channels
from latelier.sections import open_init, preset_arguments

TIMESTEPS = 1000  # of the discrete process that LDM's time embedding was made for
WAVES = (0.5, 1, 2)  # of the coordinate channels, over the whole grid
COORD_CHANNELS = 4 * len(WAVES)

# Arguments of `architecture`; `attention` counts in downsampling factors, as in the paper's tables 12 to 15.
# FFHQ and LSUN bedrooms have the U-Net of CelebA-HQ. `token_width` is the released one; a recipe's condition decides.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"widths": (64, 96, 128), "attention": (2, 4), "head_width": 32, "layers": 1},
    "small": {"widths": (64, 128, 192), "attention": (2, 4), "head_width": 32},
    "ldm-celebahq": {"widths": (224, 448, 672, 896), "attention": (2, 4, 8), "head_width": 32},
    "ldm-churches": {
        "widths": (192, 384, 384, 768, 768), "attention": (1, 2, 4, 8), "heads": 8, "scale_shift": True, "updown": True,
    },
    "ldm-cin256": {"widths": (256, 512, 1024), "attention": (1, 2, 4), "head_width": 32, "token_width": 512},
    "ldm-cin256-v2": {"widths": (192, 384, 576, 960), "attention": (2, 4, 8), "heads": 1, "token_width": 512},
    "ldm-text2img256": {"widths": (192, 384, 576, 960), "attention": (2, 4, 8), "head_width": 32, "token_width": 640},
    "ldm-txt2img-1.4b": {"widths": (320, 640, 1280, 1280), "attention": (1, 2, 4), "heads": 8, "token_width": 1280},
    "ldm-layout": {
        "widths": (128, 256, 384, 512), "attention": (2, 4, 8), "head_width": 32, "depth": 3, "token_width": 512,
    },
    "ldm-semantic": {"widths": (128, 512, 1024), "attention": (), "heads": 8},
    "ldm-sr": {"widths": (160, 320, 320, 640), "attention": (8,), "head_width": 32},
    "ldm-inpainting-big": {"widths": (256, 512, 768, 1024), "attention": (2, 4, 8), "heads": 8, "updown": True},
}  # fmt: skip


def architecture(
    widths: Sequence[int],
    attention: Sequence[int],
    heads: int = 0,
    head_width: int = 0,
    layers: int = 2,
    depth: int = 1,
    scale_shift: bool = False,
    updown: bool = False,
    token_width: int = 0,
) -> dict[str, Any]:
    """LDM's hyper-parameters as arguments of diffusers' classes.

    Args:
        widths: channels of each level, the latents' resolution first.
        attention: downsampling factors at which there is attention; the middle always has it.
        heads, head_width: number or width of heads at all levels; give one of them.
        layers: residual blocks of a level.
        depth: transformer blocks of each cross-attention.
        scale_shift: the time embedding scales and shifts (FiLM) instead of being added.
        updown: residual blocks do the down- and upsampling, instead of strided convolution and nearest neighbours.
        token_width: of the tokens attended to; 0 makes arguments of `UNet`, else of `CrossAttentionUNet`.
    """
    if token_width and updown:
        raise LatelierError("A U-Net whose residual blocks resample (`updown`) cannot have cross-attention.")
    attends = [2**level in attention for level in range(len(widths))]

    def block(attend: bool, way: str) -> str:
        if attend:
            return f"{'Cross' if token_width else ''}Attn{way}Block2D"
        return f"Resnet{way}sampleBlock2D" if updown else f"{way}Block2D"

    common = {
        "block_out_channels": tuple(widths),
        "down_block_types": tuple(block(attend, "Down") for attend in attends),
        "up_block_types": tuple(block(attend, "Up") for attend in attends[::-1]),
        "layers_per_block": layers,
        "resnet_time_scale_shift": "scale_shift" if scale_shift else "default",
    }
    if token_width:
        return {
            **common,
            # The number of heads: diffusers keeps a wrong name for old files.
            "attention_head_dim": tuple(heads or max(1, width // head_width) for width in widths),
            "cross_attention_dim": token_width,
            "transformer_layers_per_block": depth,
        }
    attending = {width for width, attend in zip(widths, attends) if attend} | {widths[-1]}
    return {
        **common,
        "attention_head_dim": head_width or math.gcd(*attending) // heads,
        "heads": heads if heads and len(attending) > 1 else None,
        "attn_norm_num_groups": 32 if scale_shift else None,  # else diffusers leaves the middle's out
        "downsample_type": "resnet" if updown else "conv",
        "upsample_type": "resnet" if updown else "conv",
    }


def _extends(parent: type[nn.Module]) -> Callable:
    """Show the parent's arguments in a constructor `(self, own, **others)`: diffusers reads configs by them."""

    def decorate(init: Callable) -> Callable:
        theirs = inspect.signature(parent.__init__).parameters
        own = [p for p in inspect.signature(init).parameters.values() if p.name != "self" and p.kind != p.VAR_KEYWORD]
        init.__signature__ = inspect.Signature([*theirs.values(), *own])  # type: ignore[attr-defined]
        return init

    return decorate


class UNetSection(DenoiserSection):
    """A U-Net; `size` is a preset, and `model` has arguments of diffusers' classes."""

    kind: Literal["unet"]


SECTIONS = (UNetSection,)


class _Denoiser:
    """Shared by both classes."""

    _repeated_blocks = ["ResnetBlock2D"]  # noqa: RUF012

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Compile the whole model: hardly two blocks of a U-Net have the same shapes."""
        self.compile(*args, **kwargs)  # type: ignore[attr-defined]

    def _inputs(self, x_t: Tensor, condition: Condition) -> tuple[Tensor, Tensor | None]:
        """Input of the first convolution `(b, c, h, w)`, and the vector added to the time embedding `(b, 4 width)`."""
        config: dict[str, Any] = self.config  # type: ignore[attr-defined]
        _check_grid(x_t.shape[2:], len(config["block_out_channels"]))
        x_t = pad_channels(x_t, config["out_channels"], config["prefix_channels"])
        x = x_t if condition.spatial is None else torch.cat([x_t, condition.spatial], dim=1)
        if config["coord_channels"]:
            x = torch.cat([x, _coordinates(x)], dim=1)
        if x.shape[1] != config["in_channels"]:
            raise LatelierError(
                f"This U-Net takes {config['in_channels']} channels, latents and condition together, not {x.shape[1]}."
            )
        vector = condition.vector
        if config["class_embed_type"] == "identity":
            return x, x.new_zeros(len(x), _vector_width(config)) if vector is None else vector
        if vector is not None:
            raise LatelierError("This U-Net takes no vector; build it with class_embed_type: identity.")
        return x, None


class UNet(_Denoiser, UNet2DModel):
    """U-Net with self-attention, for no condition, vectors and spatial conditions.

    Args:
        heads: number of attention heads, the same at all levels. diffusers only has heads of one width
            (`attention_head_dim`, where this is None), so a model with `heads` (LDM: churches, inpainting-big) opens
            with plain `UNet2DModel` but has another number of heads there, and so another function.
        prefix_channels: whether `x_t` may have fewer channels, the first ones (DC-AE 1.5's augmented training).
        coord_channels: add channels with the position (CoordConv, Liu et al. 2018), which a U-Net else only sees by its
            padding; it then follows conditions such as a layout sooner.
        others: of `UNet2DModel`. `in_channels` counts the channels of a spatial condition and of coordinates,
            `out_channels` does not; `class_embed_type` is `identity` for a model that takes vectors.
    """

    @register_to_config
    @_extends(UNet2DModel)
    def __init__(
        self, *, heads: int | None = None, prefix_channels: bool = False, coord_channels: bool = False, **others: Any
    ):
        super().__init__(**others)
        for module in self.modules():
            if heads and isinstance(module, Attention):
                if module.inner_dim % heads:
                    raise LatelierError(f"{heads} heads do not divide the {module.inner_dim} channels of an attention.")
                module.heads = module.sliceable_head_dim = heads
                module.scale = (module.inner_dim // heads) ** -0.5

    def forward(  # type: ignore[override]
        self, x_t: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], condition: Condition | None = None
    ) -> Float[Tensor, "b c h w"]:
        """As `DiT.forward`: t in [0, 1], 0 data, 1 noise; diffusers' timestep is 1000 t."""
        condition = condition or Condition()
        if condition.tokens is not None:
            raise LatelierError("This U-Net has no cross-attention, it cannot take a condition's tokens.")
        x, vector = self._inputs(x_t, condition)
        return super().forward(x, TIMESTEPS * t, vector, return_dict=False)[0][:, : x_t.shape[1]].float()


class CrossAttentionUNet(_Denoiser, UNet2DConditionModel):
    """U-Net with transformers that attend to tokens; `others` are arguments of `UNet2DConditionModel`."""

    @register_to_config
    @_extends(UNet2DConditionModel)
    def __init__(self, *, prefix_channels: bool = False, coord_channels: bool = False, **others: Any):
        super().__init__(**others)

    def forward(  # type: ignore[override]
        self, x_t: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], condition: Condition | None = None
    ) -> Float[Tensor, "b c h w"]:
        """As `UNet`; the condition also has `tokens`, attended to where `mask` is true."""
        width = self.config["cross_attention_dim"]
        if condition is None or condition.tokens is None or condition.tokens.shape[2] != width:
            raise LatelierError(f"This U-Net has cross-attention: its condition must have tokens of width {width}.")
        x, vector = self._inputs(x_t, condition)
        mask = {} if condition.mask is None else {"encoder_attention_mask": condition.mask}
        prediction = super().forward(x, TIMESTEPS * t, condition.tokens, vector, return_dict=False, **mask)[0]
        return prediction[:, : x_t.shape[1]].float()


def build(
    section: DenoiserSection, latent_shape: tuple[int, ...], token_width: int, spatial_channels: int, vector: bool
) -> ModelMixin:
    """A U-Net for latents `(c, h, w)`, fresh or from `init`, with cross-attention for tokens; see `build_denoiser`."""
    channels, *grid = latent_shape
    if len(grid) != 2:
        raise LatelierError(
            f"denoiser.kind = unet needs latents on a 2-D grid, but the tokenizer's are 1-D ({grid[0]} positions); "
            "choose a transformer, or another tokenizer."
        )
    cls = CrossAttentionUNet if token_width else UNet
    saved = _saved(section.init) if section.init else section.model
    wanted = {
        "in_channels": channels + spatial_channels + COORD_CHANNELS * bool(saved.get("coord_channels")),
        "out_channels": channels,
        "class_embed_type": "identity" if vector else None,
        **({"cross_attention_dim": token_width} if token_width else {}),
    }
    if section.init:
        crosses = saved.get("cross_attention_dim") is not None
        if crosses != bool(token_width):
            raise LatelierError(
                f"denoiser.init = {section.init} has {'' if crosses else 'no '}cross-attention, but the condition "
                f"makes {'no ' if crosses else ''}tokens."
            )
        _check_grid(grid, len(saved["block_out_channels"]))
        return open_init(cls, section.init, wanted)
    arguments = _arguments(section, token_width)
    _check_grid(grid, len(arguments["block_out_channels"]))
    try:
        model = cls(**{**arguments, **wanted, "sample_size": tuple(grid)})
    except ValueError as error:
        raise LatelierError(f"denoiser.model makes no U-Net: {error}") from None
    _zero_outputs(model)
    return model


def _coordinates(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b p h w"]:
    """Sine and cosine of row and column, with half a wave, one and two waves over the grid."""
    rows, columns = (torch.linspace(-1, 1, side, device=x.device, dtype=x.dtype) for side in x.shape[2:])
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))  # (2, h, w)
    angles = torch.cat([grid * waves * torch.pi for waves in WAVES])  # (6, h, w)
    return torch.cat([angles.sin(), angles.cos()]).expand(len(x), -1, -1, -1)


def vector_width(section: DenoiserSection) -> int:
    """Width of the time embedding, to which a condition's vector is added."""
    return _vector_width(_saved(section.init) if section.init else _arguments(section, 0))


def _vector_width(config: dict[str, Any]) -> int:
    return config.get("time_embedding_dim") or 4 * config["block_out_channels"][0]


def _arguments(section: DenoiserSection, token_width: int) -> dict[str, Any]:
    """Constructor arguments of the recipe's size with its overrides."""
    sizes = dict(SIZES)
    if section.size in sizes:
        sizes[section.size] = architecture(**{**sizes[section.size], "token_width": token_width})
    return preset_arguments(CrossAttentionUNet if token_width else UNet, sizes, section.size, section.model, "denoiser")


def _saved(path: str) -> dict[str, Any]:
    """Configuration of a saved U-Net."""
    try:
        config = UNet2DModel.load_config(path)
    except Exception as error:  # of a file that may hold anything
        raise LatelierError(f"init: {path} has no U-Net ({first_line(error)}).") from None
    if "block_out_channels" not in config or "attention_head_dim" not in config:
        raise LatelierError(f"init: {path} has no U-Net, but a {config.get('_class_name')}.")
    return config  # type: ignore[return-value]


def _check_grid(grid: Sequence[int], levels: int) -> None:
    """Every level but the last halves the grid."""
    multiple = 2 ** (levels - 1)
    if any(side % multiple for side in grid):
        near = " x ".join(str(max(1, round(side / multiple)) * multiple) for side in grid)
        raise LatelierError(
            f"A U-Net of {levels} levels needs latent sides that {multiple} divides, not {' x '.join(map(str, grid))}; "
            f"the nearest are {near}: choose image_size to match, or a size with fewer levels."
        )


def _zero_outputs(model: nn.Module) -> None:
    """Every residual branch, and the prediction, is zero at the start, as in LDM."""
    last = [model.conv_out]
    for module in model.modules():
        if isinstance(module, ResnetBlock2D):
            last.append(module.conv2)
        elif isinstance(module, Transformer2DModel):
            last.append(module.proj_out)
        elif isinstance(module, Attention) and module.residual_connection:
            last.append(module.to_out[0])
    for layer in last:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
