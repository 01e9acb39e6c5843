"""What a denoiser is conditioned on: one model for each kind of condition."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from latelier.sections import ByKind, Section, Unit


class ClassCondition(Section):
    """The image's class."""

    kind: Literal["class"]
    inject: Literal["auto", "vector", "tokens"] = Field(
        "auto",
        description="added to the time embedding, or through cross-attention; auto: what the denoiser has",
    )
    dim: int = Field(512, ge=1, description="width of the token, when it is one")
    dropout: Unit = Field(0.1, description="share of images that are not told, for classifier-free guidance")


class TextCondition(Section):
    """The image's caption: a transformer that is trained along, or a frozen one."""

    kind: Literal["text"]
    encoder: str = Field("trained", description="`trained`, or a text encoder's Hub name or folder, which stays frozen")
    vocabulary: str = Field("data", description="`data`: word pieces of the captions; or a tokenizer's name or folder")
    vocabulary_size: int = Field(8192, ge=300, description="of `vocabulary: data`, at most")
    length: int = Field(77, ge=1, description="tokens")
    dim: int = Field(640, ge=1)
    layers: int = Field(32, ge=1)
    heads: int = Field(8, ge=1)
    head_dim: int = Field(64, ge=1)
    dropout: Unit = Field(0.1, description="share of images whose caption is empty, for classifier-free guidance")


class LayoutCondition(Section):
    """Boxes with classes, as tokens, and drawn on the latents' grid if asked for."""

    kind: Literal["layout"]
    form: Literal["coco", "openimages"] = Field("coco", description="which flags of a box its class token may carry")
    objects: int = Field(30, ge=1, description="that are told at most; more are left out")
    crop: bool = Field(True, description="whether two more tokens tell which part of the image is seen")
    tokens: int = Field(8192, ge=16, description="size of the vocabulary; its root is the grid of corners")
    dim: int = Field(512, ge=1)
    layers: int = Field(16, ge=1)
    heads: int = Field(8, ge=1)
    head_dim: int = Field(64, ge=1)
    layout_map_channels: int = Field(0, ge=0, description="channels of a map of the boxes beside the tokens; 0: none")
    dropout: Unit = Field(0.1, description="share of images whose layout is empty")


class SegmentationCondition(Section):
    """A map of classes, one-hot, rescaled to the latents' grid and projected."""

    kind: Literal["segmentation"]
    classes: int | None = Field(None, ge=2, description="how many ids the maps have; by default what the data say")
    channels: int = Field(3, ge=1, description="after the projection")
    dropout: Unit = Field(0.1, description="share of images whose map is empty")


class LowResolutionCondition(Section):
    """A smaller image: super-resolution."""

    kind: Literal["low-resolution"]
    factor: int = Field(4, ge=2, description="how many times smaller a side is")
    degradation: Literal["bicubic", "bsrgan-light"] = "bicubic"
    dropout: Unit = 0.0


class InpaintingCondition(Section):
    """The image with holes."""

    kind: Literal["inpainting"]
    masks: Literal["train", "thick", "medium"] = Field(
        "train", description="LaMa's settings of strokes and boxes: for training, or of its evaluation sets"
    )
    dropout: Unit = 0.0


class MapCondition(Section):
    """Any other image-like map, such as depth or edges."""

    kind: Literal["map"]
    map_channels: int = Field(1, ge=1, description="of the map")
    channels: int | None = Field(None, ge=1, description="after a learned projection; by default none")
    dropout: Unit = Field(0.1, description="share of images whose map is empty")


SECTIONS = (
    ClassCondition, TextCondition, LayoutCondition, SegmentationCondition, LowResolutionCondition,
    InpaintingCondition, MapCondition,
)  # fmt: skip
CONDITIONS = dict.fromkeys(
    ("class", "text", "layout", "segmentation", "low-resolution", "inpainting", "map"), "latelier.recipe.condition"
)


def parse_conditions(value: Any) -> Any:
    """`none`, a kind, a section, or a list of these, to a list of sections."""
    items = value if isinstance(value, list) else [] if value in (None, "none") else [value]
    return [{"kind": item} if isinstance(item, str) else item for item in items]


if TYPE_CHECKING:
    ConditionSection = ClassCondition | TextCondition | LayoutCondition | SegmentationCondition | LowResolutionCondition
else:
    ConditionSection = Annotated[Section, ByKind("latelier.recipe.condition:CONDITIONS")]
Conditions = Annotated[list[ConditionSection], BeforeValidator(parse_conditions)]
