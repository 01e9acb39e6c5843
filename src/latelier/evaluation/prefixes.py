"""How much of the image the first channels hold: quality against the length of the prefix (DC-AE 1.5, figure 3).

For any codec. Where latents are structured, quality falls slowly with the length; where they are not, at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from latelier.errors import LatelierError
from latelier.evaluation.latent_space import PIXELS, Judge, read
from latelier.evaluation.reconstruction import SETTINGS
from latelier.evaluation.results import Measurement, mean_with_interval, size_warning
from latelier.receipt import make_receipt
from latelier.recipe import Evaluate
from latelier.tokenizers.codec import Codec

PARTS = 4  # lengths by default: quarters of the channels


@torch.no_grad()
def measure_prefixes(
    codec: Codec,
    batches: Iterable[Mapping[str, Any]],
    evaluate: Evaluate,
    reference: str,
    extra: Mapping[str, Any] | None = None,
) -> list[Measurement]:
    """PSNR, LPIPS and Fréchet distance of images decoded from the first channels alone.

    Args:
        codec: the tokenizer.
        batches: dicts with `image`, `(b, c, h, w)` in [-1, 1]; at most `evaluate.samples` images are read.
        evaluate: `prefix_lengths`; of `metrics`, psnr, lpips and rfd count.
        reference: the name of the images, for the receipts.
        extra: fields for the receipts beyond those gathered here.

    Returns:
        `prefix-<metric>@<length>` for every length.

    Raises:
        LatelierError: if there are no images, or a length is longer than there are channels.
    """
    lengths = prefix_lengths(evaluate.prefix_lengths, codec.channels)
    if not {"psnr", "lpips", "rfd"} & set(evaluate.metrics):
        return []
    judge = Judge(evaluate, codec.device, len(lengths))
    n, size = 0, (0, 0)
    for images, _ in read(batches, evaluate.samples):
        size = (images.shape[2], images.shape[3])
        for part in images.to(codec.device).split(max(1, PIXELS // (size[0] * size[1]))):
            judge.compare(part, decode_prefixes(codec, part, lengths))
            n += len(part)
    if n == 0:
        raise LatelierError(f"There are no images in {reference} to measure prefixes on.")
    receipt = make_receipt(
        n=n, reference=reference, image_size=size, latents="posterior mean, first channels; the others are zero",
        channels=codec.channels, tokenizer=codec.hash(), **(extra or {}),
    )  # fmt: skip
    result = []
    for name, parts in judge.curves.items():
        values = torch.cat(parts)  # (n, lengths)
        for i, length in enumerate(lengths):
            mean, interval = mean_with_interval(values[:, i].double())
            about = {**receipt, "prefix": length, "settings": SETTINGS[name]}
            result.append(Measurement(f"prefix-{name}@{length}", mean, about, interval))
    if judge.extractor is not None:
        about = {**receipt, **judge.extractor.describe(), "n_reference": n, **size_warning(n, judge.extractor.dims)}
        result += [
            Measurement(
                f"prefix-rfd-{judge.extractor.name}@{length}", ours.distance(judge.theirs), {**about, "prefix": length}
            )
            for length, ours in zip(lengths, judge.ours)
        ]
    return result


def prefix_lengths(wanted: list[int] | None, channels: int) -> list[int]:
    """Ascending lengths: those that are asked for, or quarters of the channels; the last is always all of them."""
    lengths = {max(1, channels * i // PARTS) for i in range(1, PARTS + 1)} if wanted is None else {*wanted, channels}
    if max(lengths) > channels:
        raise LatelierError(
            f"evaluate.prefix_lengths has {max(lengths)}, but the latents have only {channels} channels."
        )
    return sorted(lengths)


def decode_prefixes(
    codec: Codec, images: Float[Tensor, "b c h w"], lengths: list[int]
) -> Iterator[Float[Tensor, "b c h w"]]:
    """The images that each prefix of their latents decodes to, clamped."""
    z = codec.encode(images)  # (b, k, *grid)
    for length in lengths:
        yield codec.decode(z, length).clamp(-1, 1)
