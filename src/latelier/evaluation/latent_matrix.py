"""The latents of many images in one array: what the analyses of their distribution have in common."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from latelier.evaluation.latent_space import Images, with_statistics
from latelier.keyed_random import KeyedRandom
from latelier.tokenizers.codec import Codec

MOST_NUMBERS = 2**28  # latent numbers held at once, 1 GiB
MOST_DIMS = 512  # principal components that a mixture or a probe sees


@dataclass(frozen=True)
class Latents:
    """Normalised latents of n images.

    Attributes:
        values: posterior means; of 2-D latents the l positions are in raster order.
        labels: -1 for none.
        codec: what encoded them, with statistics, so that other images are put on the same scale.
        scale: where the statistics are from, for receipts.
        image_size: height and width of the images.
        cut: whether images were left out for want of memory.
    """

    values: Float[Tensor, "n c l"]
    labels: Int[Tensor, " n"]
    codec: Codec
    scale: str
    image_size: tuple[int, int]
    cut: bool = False

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, chosen: Tensor) -> Latents:
        """Some of the images, by index or mask."""
        return replace(self, values=self.values[chosen], labels=self.labels[chosen])

    def flat(self) -> np.ndarray:
        """All numbers of an image in one row, `(n, c l)`, float32."""
        return self.values.flatten(1).numpy()

    def about(self) -> dict[str, Any]:
        """Fields for the receipt."""
        _, channels, positions = self.values.shape
        about = {
            "image_size": self.image_size, "latents": "posterior mean, normalised", "latent_scale": self.scale,
            "latent_channels": channels, "latent_positions": positions,
        }  # fmt: skip
        if self.cut:
            about["note"] = f"more than {len(self)} images of {channels * positions} numbers do not fit into memory"
        return about


@torch.no_grad()
def collect(codec: Codec, image_batches: Images, most: int = MOST_NUMBERS) -> Latents | None:
    """Encode all the images.

    Args:
        codec: with or without statistics; those that are missing are measured on the first images.
        images: images `(b, c, h, w)` in [-1, 1] and labels, such as `latent_space.read` gives; of one size.
        most: so many latent numbers are kept; later images are not read.

    Returns:
        The latents, None where there are no images.
    """
    scaled, image_batches, scale = with_statistics(codec, image_batches)
    values: list[Tensor] = []
    labels: list[Tensor] = []
    n, room, size, cut = 0, 1, (0, 0), False
    for images, own in image_batches:
        if n >= room:
            cut = True
            break
        z = scaled.encode(images.to(codec.device)).flatten(2).cpu()  # (b, c, l)
        room, size = max(1, most // z[0].numel()), (images.shape[2], images.shape[3])
        values.append(z[: room - n])
        labels.append(own[: room - n].cpu().long())
        n, cut = n + len(values[-1]), len(values[-1]) < len(z)
    if n == 0:
        return None
    return Latents(torch.cat(values), torch.cat(labels), scaled, scale, size, cut)


def labelled(image_batches: Images) -> Iterator[tuple[Tensor, Tensor]]:
    """Only the images that have a label."""
    for images, labels in image_batches:
        known = labels >= 0  # (b,)
        if known.any():
            yield images[known], labels[known]


def random_share(n: int, share: float, seed: int, purpose: str) -> Tensor:
    """A mask `(n,)` of `share` of n images, rounded up; whether image i is in it hangs on its random number."""
    order = KeyedRandom(seed, torch.arange(n)).uniform(purpose).argsort(stable=True)  # (n,)
    chosen = torch.zeros(n, dtype=torch.bool)
    chosen[order[: math.ceil(n * share)]] = True
    return chosen
