"""What auxiliary decoders predict from a MAETok's latents: HOG, features of frozen teachers, words of captions.

A target is a plain object: nothing of it is trained, averaged or saved with the objective. MAETok (ICML 2025, equation
8) writes the squared error for all; its released code takes the cosine for features, and so do the defaults here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from latelier import recipe as recipes
from latelier.data.tables import StreamSource
from latelier.errors import LatelierError
from latelier.losses.hog import hog, hog_width
from latelier.losses.teachers import Teacher, find_pretrained

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from latelier.data.loader import ImageDataset

CACHE_LIMIT = 2_000_000_000  # bytes of features that one target keeps
IGNORED = -100  # an id that no loss counts: padding


class Target:
    """Something to predict.

    Args:
        name: of the term in the log; two targets of a kind are told apart by a number.
        section: of the recipe.
        dim: width of one prediction.

    Attributes:
        masked_only: whether only masked patches count.
    """

    masked_only = True

    def __init__(self, name: str, section: recipes.Target, dim: int):
        self.name, self.section, self.dim = name, section, dim

    def tokens(self, grid: tuple[int, int]) -> tuple[int, int]:
        """The grid that the auxiliary decoder paints, for images of `grid` patches."""
        return grid

    def __call__(self, batch: Mapping[str, Any], grid: tuple[int, int]) -> Tensor:
        """What is right: `(b, n, dim)` float32, or `(b, length)` int64 ids; without gradients.

        Args:
            batch: of the loader, see `ImageDataset.stream`.
            grid: rows and columns of patches.
        """
        raise NotImplementedError

    def error(self, prediction: Float[Tensor, "b n d"], target: Tensor, mask: Bool[Tensor, "b n"]) -> Float[Tensor, ""]:
        """Mean error of the masked patches (section 3.2); 0 where nothing is masked."""
        prediction = prediction.float()
        if self.section.error == "mse":
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

    Args:
        name, section: see `Target`.
        teacher: the model.
        shown: the number of each image that a batch shows, or None where it cannot be told; equal numbers mean equal
            images. None: nothing is kept.

    Attributes:
        kept: features by number, bf16, on the CPU.
        hits: how many images were found there.
    """

    def __init__(
        self,
        name: str,
        section: recipes.Target,
        teacher: Teacher,
        shown: Callable[[Mapping[str, Any]], list[int] | None] | None = None,
    ):
        super().__init__(name, section, teacher.dim)
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
        """Remember as many as there is room for."""
        room = CACHE_LIMIT // (features[0].numel() * features.element_size()) - len(self.kept)
        if room > 0:
            self.kept.update(zip(numbers[:room], features[:room].cpu().unbind()))


class CaptionTarget(Target):
    """Words of the caption, in their order; what is longer than `section.length` is cut.

    The frame of a caption ([CLS], [SEP]), which is always the same, is no part of it, and padding is not counted.

    Args:
        name, section: see `Target`.
        words: the tokenizer.
    """

    masked_only = False

    def __init__(self, name: str, section: recipes.Target, words: Tokenizer):
        from latelier.conditioning.text import vocabulary_size

        super().__init__(name, section, vocabulary_size(words))
        self.words = type(words).from_str(words.to_str())
        self.words.enable_truncation(section.length)
        self.words.no_padding()

    def tokens(self, grid: tuple[int, int]) -> tuple[int, int]:
        """One row of tokens, whatever the image's grid."""
        return 1, self.section.length

    def __call__(self, batch: Mapping[str, Any], grid: tuple[int, int]) -> Int[Tensor, "b length"]:
        if "caption" not in batch:
            raise LatelierError(_NO_CAPTIONS)
        encodings = self.words.encode_batch(list(batch["caption"]), add_special_tokens=False)
        ids = torch.full((len(encodings), self.section.length), IGNORED)  # (b, length)
        for row, encoding in zip(ids, encodings):
            row[: len(encoding.ids)] = torch.tensor(encoding.ids, dtype=torch.int64)
        return ids.to(batch["image"].device)

    def error(
        self, prediction: Float[Tensor, "b n d"], target: Int[Tensor, "b n"], mask: Bool[Tensor, "b m"]
    ) -> Float[Tensor, ""]:
        """Mean cross-entropy of all words; 0 where there are none. Masks have no part in it."""
        logits = prediction.float().flatten(0, 1)  # (b n, d)
        total = F.cross_entropy(logits, target.flatten(), ignore_index=IGNORED, reduction="sum")
        return total / (target != IGNORED).sum().clamp(min=1)


def build_targets(
    recipe: recipes.MAETokRecipe,
    tokenizer_config: Mapping[str, Any],
    dataset: ImageDataset | None = None,
) -> list[Target]:
    """The targets of a recipe's tokenizer section, in its order.

    Args:
        recipe: the section.
        tokenizer_config: of the tokenizer; `patch_size` and `in_channels` are read.
        dataset: the training images: word pieces are learnt from their captions, and features are kept in memory
            where it is known which image a batch shows.

    Raises:
        LatelierError: if a teacher cannot be loaded, cells do not divide patches, or captions are missing.
    """
    seen: Counter[str] = Counter()
    targets: list[Target] = []
    for section in recipe.targets:
        seen[section.kind] += 1
        name = section.kind if seen[section.kind] == 1 else f"{section.kind}-{seen[section.kind]}"
        if section.kind == "hog":
            width = hog_width(tokenizer_config["patch_size"], tokenizer_config["in_channels"])
            targets.append(HogTarget(name, section, width))
        elif section.kind == "caption":
            targets.append(CaptionTarget(name, section, _caption_words(section, dataset)))
        else:
            assert section.teacher is not None  # the section has checked it
            shown = image_numbers(dataset) if section.cache and dataset is not None else None
            targets.append(FeatureTarget(name, section, Teacher(section.teacher), shown))
    return targets


def image_numbers(dataset: ImageDataset) -> Callable[[Mapping[str, Any]], list[int] | None] | None:
    """How to tell which images a batch of `dataset.stream` shows, the mirrored ones apart.

    Returns:
        None where an image looks different each time (random crops or backgrounds, streamed data); else a function
        that gives a number for each image of a batch, or None for a batch without draws, of which mirroring is not
        known.
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


def _caption_words(section: recipes.Target, dataset: ImageDataset | None) -> Tokenizer:
    """The tokenizer that `teacher` names, or word pieces of the training captions."""
    from latelier.conditioning.text import read_tokenizer, train_words

    if dataset is not None and next(dataset.captions(), None) is None:
        raise LatelierError(_NO_CAPTIONS)
    if section.teacher is not None:
        return _read_words(section.teacher, read_tokenizer)
    if dataset is None:
        raise LatelierError(
            "tokenizer.targets: word pieces of captions are learnt from the training data, which are not at hand here; "
            "name a tokenizer as the target's teacher."
        )
    captions = tuple(dataset.captions())
    if not any(caption.strip() for caption in captions):
        raise LatelierError("tokenizer.targets has a caption, but all captions of the data are empty; take it out.")
    return train_words(lambda: iter(captions), section.vocabulary_size)


def _read_words(name: str, read: Callable[[str], Tokenizer]) -> Tokenizer:
    """A tokenizer by its name, its error told in the words of this section."""
    try:
        return read(find_pretrained(name))
    except LatelierError as error:
        reason = str(error).split(";")[0].rstrip(".")
        raise LatelierError(
            f"tokenizer.targets: {reason}; give a name on the Hugging Face Hub when online or a folder, or leave the "
            "caption's teacher out: then word pieces are learnt from the data."
        ) from None
