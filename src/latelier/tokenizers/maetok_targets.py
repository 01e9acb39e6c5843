"""MAETok's masks, and the targets of its auxiliary decoders: HOG, features of frozen teachers, words of captions.

All images of a batch have the same share masked, each its own patches. A target is a plain object: nothing of it is
trained, averaged or saved. MAETok (ICML 2025, equation 8) has the squared error for all targets; its released code
takes the cosine for features, and so do the defaults here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from latelier.conditioning.text import read_tokenizer, train_words, vocabulary_size
from latelier.data.tables import StreamSource
from latelier.errors import LatelierError
from latelier.keyed_random import KeyedRandom
from latelier.losses.hog import hog, hog_width
from latelier.losses.teachers import Features, find_pretrained, open_teacher
from latelier.sections import Count, Section, Unit

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from latelier.data.loader import ImageDataset

CACHE_LIMIT = 2_000_000_000  # bytes of features that one target keeps
IGNORED = -100  # the id of padding, which no loss counts
FAR = 2**62  # stands for an unbounded count of images, with which a check tries the end of training
TEACHERS = {
    "dinov2": "facebook/dinov2-large",
    "siglip": "google/siglip-so400m-patch14-224",
    "clip": "openai/clip-vit-large-patch14",
}


class Masking(Section):
    """The share of patches that is masked: one number for a batch, from a truncated normal distribution."""

    low: Unit = 0.4
    high: Unit = 0.6
    mode: Unit = Field(0.6, description="mean of the normal distribution before it is cut off")
    std: float = Field(0.25, gt=0, description="its standard deviation")
    fade: Count = Field(0, description="images over which the share falls from `high` to 0 instead of being drawn")

    @model_validator(mode="after")
    def _check(self) -> Masking:
        if self.low > self.high:
            raise LatelierError(f"tokenizer.mask: low = {self.low} is above high = {self.high}.")
        if self.high >= 1:
            raise LatelierError("tokenizer.mask.high = 1 would mask every patch; use less, such as 0.75.")
        return self


@dataclass(frozen=True)
class MaskShare:
    """Share of the patches that a step masks, the same for all its processes and micro-batches.

    Normal around `mode`, truncated at `low` and `high` (MAETok: 0.4 to 0.6 around 0.6), or with `fade` falling linearly
    from `high` to 0 over the first `fade` images (MAETok's decoder fine-tuning).
    """

    low: float = 0.4
    high: float = 0.6
    mode: float = 0.6
    std: float = 0.25
    fade: int = 0

    def draw(self, seed: int, seen: int | float) -> float:
        """The share of the step that begins at `seen` images of this phase; it depends on nothing else."""
        if self.fade:
            return self.high * max(0.0, 1 - seen / self.fade)
        if self.low == self.high:
            return self.high
        from scipy.stats import truncnorm

        uniform = KeyedRandom(seed, torch.tensor([int(min(seen, FAR))])).uniform("mask share").item()
        low, high = ((end - self.mode) / self.std for end in (self.low, self.high))
        return float(truncnorm.ppf(uniform, low, high, self.mode, self.std))  # the inverse of the distribution


def draw_mask(order: Float[Tensor, "b n"], share: float) -> Bool[Tensor, "b n"]:
    """Mask the ceil(n share) patches of each image that have the smallest random numbers."""
    count = math.ceil(order.shape[1] * share * (1 - 1e-12))  # 100 x 0.07 is 7.000000000000001 in floating point
    first = order.argsort(dim=1)[:, :count]  # (b, count)
    return torch.zeros_like(order, dtype=torch.bool).scatter(1, first, True)


class TargetSection(Section):
    """What a shallow auxiliary decoder predicts at the masked patches from the latents alone."""

    kind: Literal["hog", "dinov2", "siglip", "clip", "features", "caption"]
    weight: float = Field(1.0, gt=0)
    loss: Literal["mse", "cosine", "cross-entropy"] | None = Field(
        None, description="by default mse for hog, cosine for features, cross-entropy for captions"
    )
    teacher: str | None = Field(
        None, description="a vision model, see `open_teacher`: Hub name, folder, vgg16; of a tokenizer for captions"
    )
    cache: bool = Field(True, description="keep an image's features in memory, where images are not augmented")
    dim: int = Field(192, ge=1, description="width of the auxiliary decoder")
    depth: int = Field(3, ge=0, description="its blocks; 0: a linear layer on the decoder's input")
    heads: int = Field(3, ge=1)
    length: int = Field(32, ge=1, description="caption: tokens that are predicted")
    vocabulary_size: int = Field(4096, ge=64, description="caption: word pieces, when they are learnt from the data")

    @property
    def error(self) -> str:
        """The loss, the default resolved."""
        return self.loss or {"hog": "mse", "caption": "cross-entropy"}.get(self.kind, "cosine")

    @model_validator(mode="after")
    def _check(self) -> TargetSection:
        if (self.error == "cross-entropy") != (self.kind == "caption"):
            raise LatelierError(f"tokenizer.targets: loss {self.error!r} does not go with kind {self.kind!r}.")
        if self.kind == "hog" and self.teacher:
            raise LatelierError("tokenizer.targets: hog is computed from the image and has no teacher; leave it out.")
        if self.teacher is None:
            self.teacher = TEACHERS.get(self.kind)
        if self.kind == "features" and self.teacher is None:
            raise LatelierError("tokenizer.targets: kind 'features' needs `teacher`, a Hub name or a folder.")
        return self


class Target:
    """Something to predict.

    Args:
        name: of the loss term.
        dim: width of one prediction.
        weight: of its error in the loss.
        loss: `mse`, or `cosine`: minus the cosine.
        decoder: width, depth and heads of the auxiliary decoder.
    """

    def __init__(
        self, name: str, dim: int, weight: float = 1.0, loss: str = "mse", decoder: tuple[int, int, int] = (192, 3, 3)
    ):
        self.name, self.dim, self.weight, self.loss, self.decoder = name, dim, weight, loss, decoder

    def tokens(self, grid: tuple[int, int]) -> tuple[int, int]:
        """The grid that the auxiliary decoder predicts, for images of `grid` patches."""
        return grid

    def __call__(self, batch: Mapping[str, Any], grid: tuple[int, int]) -> Tensor:
        """What is to be predicted: `(b, n, dim)` float32, or `(b, length)` int64 ids; without gradients."""
        raise NotImplementedError

    def error(self, prediction: Float[Tensor, "b n d"], target: Tensor, mask: Bool[Tensor, "b n"]) -> Float[Tensor, ""]:
        """Mean error of the masked patches (MAETok, section 3.2); 0 where nothing is masked."""
        prediction = prediction.float()
        if self.loss == "mse":
            errors = (prediction - target).square().mean(-1)  # (b, n)
        else:
            errors = -F.cosine_similarity(prediction, target, dim=-1)  # (b, n)
        return (errors * mask).sum() / mask.sum().clamp(min=1)


class HogTarget(Target):
    """Histograms of oriented gradients of the image itself."""

    def __call__(self, batch: Mapping[str, Any], grid: tuple[int, int]) -> Float[Tensor, "b n d"]:
        return hog(batch["image"], batch["image"].shape[2] // grid[0])


class FeatureTarget(Target):
    """Features of a frozen vision model.

    `shown` gives a number for each image of a batch, equal for equal images, or None where it is not known; with it,
    features are `kept` by number, bf16, on the CPU. `hits` counts images found there. `settings` are those of `Target`.
    """

    def __init__(
        self,
        name: str,
        teacher: Features,
        shown: Callable[[Mapping[str, Any]], list[int] | None] | None = None,
        **settings: Any,
    ):
        super().__init__(name, teacher.dim, **settings)
        self.teacher, self.shown = teacher, shown
        self.kept: dict[int, Float[Tensor, "n d"]] = {}
        self.hits = 0

    def __call__(self, batch: Mapping[str, Any], grid: tuple[int, int]) -> Float[Tensor, "b n d"]:
        numbers = self.shown(batch) if self.shown else None
        if numbers is None:
            return self.teacher(batch["image"], grid)
        images = batch["image"]
        features = torch.empty(len(images), grid[0] * grid[1], self.dim, dtype=torch.bfloat16, device=images.device)
        new = [row for row, number in enumerate(numbers) if number not in self.kept]
        old = [row for row, number in enumerate(numbers) if number in self.kept]
        if old:
            features[old] = torch.stack([self.kept[numbers[row]] for row in old]).to(images.device)
        if new:  # rounded like those that are kept, lest an image's target depend on whether it was seen before
            features[new] = self.teacher(images[new], grid).bfloat16()
            self._keep([numbers[row] for row in new], features[new])
        self.hits += len(old)
        return features.float()

    def _keep(self, numbers: list[int], features: Tensor) -> None:
        """Keep as many as there is room for."""
        room = CACHE_LIMIT // (features[0].numel() * features.element_size()) - len(self.kept)
        if room > 0:
            self.kept.update(zip(numbers[:room], features[:room].cpu().unbind()))


class CaptionTarget(Target):
    """Tokens of the caption in their order, at most `length`, without [CLS], [SEP] and padding.

    `words` is the text tokenizer, `settings` are those of `Target`.
    """

    def __init__(self, name: str, words: Tokenizer, length: int, **settings: Any):
        super().__init__(name, vocabulary_size(words), **settings)
        self.length = length
        self.words = type(words).from_str(words.to_str())
        self.words.enable_truncation(length)
        self.words.no_padding()

    def tokens(self, grid: tuple[int, int]) -> tuple[int, int]:
        """One row of tokens, whatever the image's grid."""
        return 1, self.length

    def __call__(self, batch: Mapping[str, Any], grid: tuple[int, int]) -> Int[Tensor, "b length"]:
        if "caption" not in batch:
            raise LatelierError(_NO_CAPTIONS)
        encodings = self.words.encode_batch(list(batch["caption"]), add_special_tokens=False)
        ids = torch.full((len(encodings), self.length), IGNORED)  # (b, length)
        for row, encoding in zip(ids, encodings):
            row[: len(encoding.ids)] = torch.tensor(encoding.ids, dtype=torch.int64)
        return ids.to(batch["image"].device)

    def error(
        self, prediction: Float[Tensor, "b n d"], target: Int[Tensor, "b n"], mask: Bool[Tensor, "b m"]
    ) -> Float[Tensor, ""]:
        """Mean cross-entropy of all tokens, whatever the mask; 0 where there are none."""
        logits = prediction.float().flatten(0, 1)  # (b n, d)
        total = F.cross_entropy(logits, target.flatten(), ignore_index=IGNORED, reduction="sum")
        return total / (target != IGNORED).sum().clamp(min=1)


def build_targets(
    sections: Sequence[TargetSection], patch_size: int, channels: int, dataset: ImageDataset | None = None
) -> list[Target]:
    """The targets of a recipe's sections, in their order.

    From `dataset`, the training images, word pieces are learned; where it is known which image a batch shows, features
    are kept in memory.

    Raises:
        LatelierError: if a teacher cannot be loaded, cells do not divide patches, or captions are missing.
    """
    seen: Counter[str] = Counter()
    targets: list[Target] = []
    for section in sections:
        seen[section.kind] += 1
        name = section.kind if seen[section.kind] == 1 else f"{section.kind}-{seen[section.kind]}"
        settings: dict[str, Any] = {
            "weight": section.weight, "loss": section.error, "decoder": (section.dim, section.depth, section.heads),
        }  # fmt: skip
        if section.kind == "hog":
            targets.append(HogTarget(name, hog_width(patch_size, channels), **settings))
        elif section.kind == "caption":
            targets.append(CaptionTarget(name, _caption_words(section, dataset), section.length, **settings))
        else:
            assert section.teacher is not None  # the section has checked it
            shown = image_numbers(dataset) if section.cache and dataset is not None else None
            targets.append(FeatureTarget(name, open_teacher(section.teacher), shown, **settings))
    return targets


def image_numbers(dataset: ImageDataset) -> Callable[[Mapping[str, Any]], list[int] | None] | None:
    """A function from a batch of `dataset.stream` to a number for each image; a mirrored image has its own.

    None where an image looks different each time (random crops or backgrounds, streamed data).
    """
    transform = dataset.transform
    if transform.crop == "random" or transform.deep > transform.channels or isinstance(dataset.source, StreamSource):
        return None

    def numbers(batch: Mapping[str, Any]) -> list[int] | None:
        if "sample_id" not in batch:
            return None
        flipped = transform.flipped(batch["sample_id"])
        return [2 * index + mirrored for index, mirrored in zip(batch["index"].tolist(), flipped)]

    return numbers


_NO_CAPTIONS = (
    "tokenizer.targets has a caption, but the data have none; name their column by data.caption_key, or take it out."
)


def _caption_words(section: TargetSection, dataset: ImageDataset | None) -> Tokenizer:
    """The text tokenizer that `teacher` names, or word pieces of the training captions."""
    if dataset is not None and next(dataset.captions(), None) is None:
        raise LatelierError(_NO_CAPTIONS)
    if section.teacher is not None:
        try:
            return read_tokenizer(find_pretrained(section.teacher))
        except LatelierError as error:
            reason = str(error).split(";")[0].rstrip(".")
            raise LatelierError(
                f"tokenizer.targets: {reason}; give a name on the Hugging Face Hub when online or a folder, or leave "
                "the caption's teacher out: then word pieces are learnt from the data."
            ) from None
    if dataset is None:
        raise LatelierError(
            "tokenizer.targets: word pieces of captions are learnt from the training data, which are not at hand here; "
            "name a tokenizer as the target's teacher."
        )
    captions = tuple(dataset.captions())
    if not any(caption.strip() for caption in captions):
        raise LatelierError("tokenizer.targets has a caption, but all captions of the data are empty; take it out.")
    return train_words(lambda: iter(captions), section.vocabulary_size)
