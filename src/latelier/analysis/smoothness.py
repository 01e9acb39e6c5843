"""Whether a latent space is smooth: how much of the image is left when noise is added to its latents.

The first of the three properties that "Latent Diffusion Models with Masked AutoEncoders" (ICCV 2025) asks of a latent
space (its figure 6); the second is in `clustering.py`, the third is reconstruction. See `docs/latent-space.md`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from latelier.analysis.quality import METRICS, Quality
from latelier.analysis.sample import PIXELS, LatentSample
from latelier.errors import LatelierError
from latelier.evaluation.reconstruction import SETTINGS
from latelier.evaluation.results import Result, mean_with_interval
from latelier.keyed_random import KeyedRandom
from latelier.tokenizers.codec import Codec

AREA_END = 0.3  # the paper's largest noise level


@torch.no_grad()
def smoothness(
    sample: LatentSample,
    codec: Codec,
    noise_levels: Sequence[float],
    metrics: Sequence[str],
    features: Sequence[str],
    seed: int = 0,
) -> dict[str, Result]:
    """PSNR, LPIPS and Fréchet distance of images decoded from noisy latents.

    Args:
        sample: images and latents.
        codec: what decodes.
        noise_levels: in standard deviations of each channel; 0 is always measured.
        metrics: of these psnr, lpips and rfd count.
        features: extractors; the first is rfd's.
        seed: of the noise: image i has the same at every level and in every codec of equal latent shape.

    Returns:
        `smoothness-<metric>`: the metric's mean over the noise levels from 0 to 0.3 (area under the curve by the
        trapezoidal rule over the range), in the metric's unit; the curve is in the details.

    Raises:
        LatelierError: if there is no noise, or a metric is not defined for the images.
    """
    levels = sorted({0.0, *noise_levels})
    if len(levels) < 2:
        raise LatelierError("evaluate.noise_levels has no level above 0; smoothness needs one, such as 0.3.")
    if not {*METRICS} & {*metrics}:
        return {}
    quality, scaled = Quality(sample, metrics, features, len(levels)), sample.scaled(codec)
    for rows in sample.parts(PIXELS):
        noisy = noisy_latents(sample.latents(rows).to(sample.device), levels, seed, rows.start)
        versions = [lambda z=z: scaled.decode(z).clamp(-1, 1) for z in noisy]
        quality.add(rows, versions, plain=0 if scaled is codec else None)
    about = {
        "latents": "posterior mean", "latent_scale": sample.scale.origin, "seed": seed,
        "noise": "z + level * standard deviation of the channel * normal noise",
    }  # fmt: skip
    result = {
        f"smoothness-{name}": _area(levels, torch.cat(values), {**about, "settings": SETTINGS[name]})
        for name, values in quality.values.items()
    }
    if quality.extractor is not None:
        distances = [ours.distance(quality.theirs) for ours in quality.ours]
        curve = torch.tensor([distances], dtype=torch.float64)  # (1, levels)
        result[f"smoothness-rfd-{quality.extractor.name}"] = _area(levels, curve, {**about, **quality.about()})
    return result


def noisy_latents(
    z: Float[Tensor, "b k *grid"], levels: Sequence[float], seed: int, first: int
) -> Iterator[Float[Tensor, "b k *grid"]]:
    """Normalised latents of the images `first`, ... with more and more noise, which belongs to the image's number."""
    rng = KeyedRandom(seed, torch.arange(first, first + len(z)), z.device)
    noise = rng.normal("smoothness", *z.shape[1:])  # (b, k, *grid)
    for level in levels:
        yield z + level * noise


def area_weights(levels: list[float], end: float = AREA_END) -> Float[Tensor, " l"]:
    """Weights whose product with a curve is its mean over [first level, end], piecewise linear between levels.

    Args:
        levels: ascending, at least two.
        end: upper end, interpolated where it is no level; the last level where that is smaller.
    """
    from scipy.integrate import trapezoid

    end = min(end, levels[-1])
    grid = np.array([*(level for level in levels if level < end), end])
    areas = [trapezoid(np.interp(grid, levels, basis), grid) for basis in np.eye(len(levels))]
    return torch.tensor(areas, dtype=torch.float64) / (end - levels[0])


def _area(levels: list[float], curves: Float[Tensor, "n l"], details: dict[str, Any]) -> Result:
    """The mean curve's area, with an interval from the areas of single images where there are several."""
    curves, end = curves.double(), min(AREA_END, levels[-1])
    mean, interval = mean_with_interval(curves @ area_weights(levels))
    curve = curves.mean(0).tolist()  # (l,)
    about = {
        "curve": [[level, value] for level, value in zip(levels, curve)],
        "drop": float(np.interp(end, levels, curve)) - curve[0],
        "range": [0.0, end],
    }
    if end < AREA_END:
        short = f"integrated to the last noise level {end:g}, not to {AREA_END:g}"
        about["warning"] = "; ".join(filter(None, [details.get("warning"), short]))
    return Result(mean, interval, {**details, **about})
