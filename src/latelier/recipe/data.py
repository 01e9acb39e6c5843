"""The recipe's `data` section: where images come from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from latelier.errors import LatelierError
from latelier.sections import PositiveCount, Section, Size, Unit

BUILT_IN = {"emoji": (1, 3, 4), "scenes": (1, 3)}  # sources, and the channels that their images can have


class Data(Section):
    """Where images come from and how they become tensors."""

    source: str = Field(description="`emoji`, `scenes`, a folder, a parquet/tar file or glob, or a Hub dataset name")
    image_size: Size = (64, 64)
    channels: int = Field(3, ge=1)
    split: str = "train"
    val_split: str | None = Field(None, description="the split that evaluation reads; built-in sources know theirs")
    val_source: str | None = Field(None, description="another source for evaluation, when it is not a split")
    val_fraction: float = Field(0.05, ge=0, lt=1, description="held out when the source has no validation split")
    image_key: str = "image"
    label_key: str | None = Field(None, description="the column of labels; found if named `label`")
    caption_key: str | None = Field(None, description="the column of captions; found if named `caption` or `text`")
    empty_captions: bool = Field(False, description="images without a caption, where others have one, get an empty one")
    classes: list[str] | None = Field(
        None, description="use only these classes, in this order; of `scenes`: categories, or single emoji by name"
    )
    backgrounds: Literal["varied", "plain"] | None = Field(
        None,
        description="of `scenes`: behind the objects, by default varied: gradients, stripes and more; or one colour",
    )
    boxes: str | None = Field(
        None,
        description="boxes of a folder's images: a COCO annotation file ({split} stands for the split's name), or "
        "`yolo`; by default `objects` of its metadata.jsonl, and of datasets the column `objects` or `boxes`",
    )
    box_format: Literal["xywh", "xyxy"] = Field("xywh", description="of `objects.bbox`, in pixels")
    segmentation: str | None = Field(
        None, description="folder of label maps with the images' names, or a dataset's column of them"
    )
    segmentation_classes: Annotated[int, Field(ge=1)] | list[str] | None = Field(
        None, description="how many ids the label maps have, or the classes' names"
    )
    ignore_id: int | None = Field(None, description="id of unlabelled pixels; it becomes one more class, the last")
    maps: str | None = Field(
        None, description="folder of image-like maps (depth, edges) with the images' names, or a dataset's column"
    )
    crop: Literal["center", "random", "resize"] = "center"
    crop_scale: tuple[Unit, Unit] = Field((0.75, 1.0), description="area kept by `crop: random`")
    flip: bool = True
    background: Literal["white", "black", "gray", "random"] = Field("white", description="behind transparent images")
    streaming: bool = False
    in_memory: bool | None = Field(None, description="keep decoded images in memory; by default when they fit 1 GB")
    workers: int | None = Field(None, ge=0, description="loader processes; by default none in memory, else the cores")
    max_skipped: Unit = Field(0.01, description="share of unreadable files that is tolerated")
    length: PositiveCount | None = Field(None, description="how many images a generated source has, or how many to use")

    @model_validator(mode="after")
    def _check_built_in(self) -> Data:
        channels = BUILT_IN.get(self.source)
        if channels and self.channels not in channels:
            wanted = " or ".join(map(str, channels))
            raise LatelierError(f"data.channels = {self.channels}, but images of {self.source} have {wanted}.")
        for key in ("image_key", "label_key", "caption_key") if channels else ():
            if getattr(self, key) != type(self).model_fields[key].default:
                raise LatelierError(f"data.{key} is for folders and datasets; remove it for {self.source}.")
        return self
