"""How much of the image the first channels hold: quality against the length of the prefix (DC-AE 1.5, figure 3).

For any codec. Where latents are structured, quality falls slowly with the length; where they are not, at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from latelier.analysis.quality import METRICS, Quality
from latelier.analysis.sample import PIXELS, LatentSample
from latelier.errors import LatelierError
from latelier.evaluation.reconstruction import SETTINGS
from latelier.evaluation.results import Result, mean_with_interval
from latelier.tokenizers.codec import Codec

QUARTERS = 4  # lengths by default: quarters of the channels


@torch.no_grad()
def prefix_quality(
    sample: LatentSample,
    codec: Codec,
    prefix_lengths: Sequence[int] | None,
    metrics: Sequence[str],
    features: Sequence[str],
) -> dict[str, Result]:
    """PSNR, LPIPS and Fréchet distance of images decoded from the first channels alone.

    Returns:
        `prefix-<metric>@<length>` for every length, see `lengths_of`.

    Raises:
        LatelierError: if a length is longer than there are channels.
    """
    lengths = lengths_of(prefix_lengths, codec.channels)
    if not {*METRICS} & {*metrics}:
        return {}
    quality, scaled = Quality(sample, metrics, features, len(lengths)), sample.scaled(codec)
    for rows in sample.parts(PIXELS):
        z = (sample.latents(rows) if scaled is codec else sample.mean[rows]).to(sample.device)  # (b, c, *grid)
        versions = [lambda z=z, k=length: codec.decode(z, k).clamp(-1, 1) for length in lengths]
        quality.add(rows, versions, plain=len(lengths) - 1 if scaled is codec else None)
    about = {"latents": "posterior mean, first channels; the others are zero", "channels": codec.channels}
    result = {}
    for name, values in quality.values.items():
        of_name = torch.cat(values).double()  # (n, lengths)
        for i, length in enumerate(lengths):
            details = {**about, "prefix": length, "settings": SETTINGS[name]}
            result[f"prefix-{name}@{length}"] = Result(*mean_with_interval(of_name[:, i]), details)
    if quality.extractor is not None:
        about |= quality.about()
        for length, ours in zip(lengths, quality.ours):
            name = f"prefix-rfd-{quality.extractor.name}@{length}"
            result[name] = Result(ours.distance(quality.theirs), details={**about, "prefix": length})
    return result


def lengths_of(wanted: Sequence[int] | None, channels: int) -> list[int]:
    """Ascending lengths: those that are asked for, or quarters of the channels; the last is always all of them."""
    quarters = {max(1, channels * i // QUARTERS) for i in range(1, QUARTERS + 1)}
    lengths = quarters if wanted is None else {*wanted, channels}
    if max(lengths) > channels:
        raise LatelierError(
            f"evaluate.prefix_lengths has {max(lengths)}, but the latents have only {channels} channels."
        )
    return sorted(lengths)
