"""Do `objects` and the Fréchet distance in VGG16 tell damage? Held-out scenes, damaged on purpose.

    python -m studies.analysis.objects_check --images 400

prints a Markdown table. Distances are to as many other scenes; each kind of damage has its levels in rising order.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from scipy.ndimage import gaussian_filter
from torch import Tensor

from latelier.data.builtin import Backgrounds, SceneSource
from latelier.evaluation.distributions import FeatureStatistics
from latelier.evaluation.features import FeatureExtractor, load_extractor
from latelier.evaluation.objects import Recogniser, measure_objects, paint, scramble

CLASSES = ["red apple", "banana", "mushroom", "sunflower", "frog face", "octopus", "rocket", "bicycle"]
SIZE = (64, 64)
Images = Float[Tensor, "n 3 h w"]
LEVELS: dict[str, tuple[float, ...]] = {  # of each kind of damage, rising
    "blur": (0.5, 1, 2, 4),  # standard deviation in pixels
    "noise": (0.05, 0.1, 0.2, 0.4),  # standard deviation in [-1, 1]
    "colour": (0.1, 0.2, 0.4, 0.8),  # standard deviation of what is added to each channel of an image
    "halves": (1 / 8, 1 / 4, 1 / 2),  # share at the right that comes from the next image
    "tiles": (2, 4, 8),  # along a side, shuffled
}


def damage(images: Images, kind: str, level: float) -> Images:
    """Images in [-1, 1] that are damaged in one way."""
    generator = torch.Generator().manual_seed(0)
    if kind == "blur":
        return torch.from_numpy(gaussian_filter(images.numpy(), (0, 0, level, level), mode="nearest"))
    if kind == "noise":
        return (images + level * torch.randn(images.shape, generator=generator)).clamp(-1, 1)
    if kind == "colour":
        return (images + level * torch.randn(len(images), 3, 1, 1, generator=generator)).clamp(-1, 1)
    if kind == "halves":
        edge = round(images.shape[3] * (1 - level))
        return torch.cat([images[..., :edge], images.roll(-1, 0)[..., edge:]], 3)
    return scramble(images, int(level))


def rows(
    images: Images, others: Images, recogniser: Recogniser, extractor: FeatureExtractor
) -> Iterator[tuple[str, float, dict[str, float]]]:
    """Kind of damage, its level, and what is measured of images that are damaged so; first of the images themselves."""

    def features(side: Images) -> FeatureStatistics:
        statistics = FeatureStatistics(extractor.dims)
        for part in side.split(50):
            statistics.update(extractor(part))
        return statistics

    reference = features(others)

    def measure(damaged: Images) -> dict[str, float]:
        found = {name: result.value for name, result in measure_objects(damaged, recogniser).items()}
        return {**found, "fd-vgg16": features(damaged).distance(reference)}

    yield "none", 0, measure(images)
    for kind, levels in LEVELS.items():
        for level in levels:
            yield kind, level, measure(damage(images, kind, level))


def table(count: int, backgrounds: Backgrounds) -> str:
    """The Markdown table."""
    source = SceneSource(SIZE, 2 * count + 400, "val", CLASSES, backgrounds)
    images, others = torch.stack([paint(source, i) for i in range(400, len(source))]).split(count)
    with torch.no_grad():
        recogniser = Recogniser(source)  # calibrated on the first 400
        found = list(rows(images, others, recogniser, load_extractor("vgg16")))
    shown = ["objects", "objects-counts", "objects-classes", "fd-vgg16"]
    about = ", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in recogniser.about.items())
    head = [f"{backgrounds}: {about}\n", f"| damage | level | {' | '.join(shown)} |", "|---|---|" + "---|" * len(shown)]
    return "\n".join(
        head + [f"| {k} | {np.round(x, 3):g} | {' | '.join(f'{v[n]:.3g}' for n in shown)} |" for k, x, v in found]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--backgrounds", choices=["plain", "varied"], default="plain")
    options = parser.parse_args()
    print(table(options.images, options.backgrounds))
