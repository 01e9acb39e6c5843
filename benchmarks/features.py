"""What an evaluation costs beside its networks: features over the bare extractor, and mixtures of many long latents."""

import time

import numpy as np

from benchmarks.timing import default_device, seconds
from latelier.analysis.mixture import fit_mixture, principal_space
from latelier.data.loader import ImageDataset
from latelier.data.sources import open_source
from latelier.evaluation.features import load_extractor
from latelier.evaluation.reconstruction import read_images
from latelier.evaluation.references import FeatureCollector, collect
from latelier.recipe import Data

IMAGES, BATCH, SIZE = 512, 64, 128
LATENTS, DIMS, SPREAD, MODES = 10_000, 4_096, 256, (1, 10, 50)
KEPT = ("features", "vectors")


def passes(count: int = IMAGES, rounds: int = 3) -> list[tuple[str, float]]:
    """A pass that reads images, takes their features and sums them up, over the network alone on ready images.

    Args:
        count: images of a pass.
        rounds: how often each is timed.
    """
    data = Data(source="emoji", image_size=(SIZE, SIZE), length=count)
    dataset, extractor = ImageDataset(open_source(data), data), load_extractor("vgg16", default_device())
    ready = [images.to(extractor.device) for images in read_images(dataset.once(BATCH), count)]

    def whole() -> None:
        found = collect([FeatureCollector(extractor, KEPT)], read_images(dataset.once(BATCH), count), shared=False)
        found["vgg16"].sums["features"].flush()

    def bare() -> None:
        for images in ready:
            extractor(images)

    times = seconds({"whole": whole, "bare": bare}, rounds)
    return [
        ("VGG16 features, evaluation pass, images/s", len(dataset) / times["whole"]),
        ("VGG16 features, evaluation pass / bare network (aim 0.9)", times["bare"] / times["whole"]),
    ]


def mixtures(count: int = LATENTS, modes: tuple[int, ...] = MODES) -> list[tuple[str, float]]:
    """Principal components and mixtures, as `gmm` has them, of latents whose variance decays.

    Args:
        count: latents.
        modes: numbers of Gaussians.
    """
    rng = np.random.default_rng(0)
    factors = rng.normal(size=(count, SPREAD)) / np.sqrt(1 + np.arange(SPREAD))
    x = (factors @ rng.normal(size=(SPREAD, DIMS)) + 0.1 * rng.normal(size=(count, DIMS))).astype(np.float32)
    begin = time.perf_counter()
    space = principal_space(x[: count // 2], x[count // 2 :], seed=0)
    projected = space(x[count // 2 :])
    for k in modes:
        fit_mixture(projected, projected[:1000], k, seed=0)
    return [(f"PCA and mixtures of {count:,} x {DIMS:,}, seconds (aim 60)", time.perf_counter() - begin)]


def run() -> list[tuple[str, float]]:
    """All of this file."""
    return [*passes(), *mixtures()]


if __name__ == "__main__":
    for label, value in run():
        print(f"{label}: {value:.2f}")
