"""The latents of many pictures in one array: what the analyses of their distribution have in common."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from latelier.draws import Draws
from latelier.evaluation.latent_space import Pictures, with_statistics
from latelier.tokenizers.codec import Codec

MOST_NUMBERS = 2**28  # latent numbers held at once, 1 GiB
MOST_DIMS = 512  # principal components that a mixture or a probe sees


@dataclass(frozen=True)
class Latents:
    """Normalised latents of n pictures.

    Attributes:
        values: posterior means; of 2-D latents the l positions are in raster order.
        labels: -1 for none.
        codec: what encoded them, with statistics, so that other pictures are put on the same scale.
        scale: where the statistics are from, for receipts.
        image_size: height and width of the pictures.
        cut: whether pictures were left out for want of memory.
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
        """Some of the pictures, by index or mask."""
        return replace(self, values=self.values[chosen], labels=self.labels[chosen])

    def flat(self) -> np.ndarray:
        """All numbers of a picture in one row, `(n, c l)`, float32."""
        return self.values.flatten(1).numpy()

    def about(self) -> dict[str, Any]:
        """Fields for the receipt."""
        _, channels, positions = self.values.shape
        about = {
            "image_size": self.image_size, "latents": "posterior mean, normalised", "latent_scale": self.scale,
            "latent_channels": channels, "latent_positions": positions,
        }  # fmt: skip
        if self.cut:
            about["note"] = f"more than {len(self)} pictures of {channels * positions} numbers do not fit into memory"
        return about


@torch.no_grad()
def collect(codec: Codec, pictures: Pictures, most: int = MOST_NUMBERS) -> Latents | None:
    """Encode all the pictures.

    Args:
        codec: with or without statistics; those that are missing are measured on the first pictures.
        pictures: images `(b, c, h, w)` in [-1, 1] and labels, such as `latent_space.read` gives; of one size.
        most: so many latent numbers are kept; later pictures are not read.

    Returns:
        The latents, None where there are no pictures.
    """
    scaled, pictures, scale = with_statistics(codec, pictures)
    values: list[Tensor] = []
    labels: list[Tensor] = []
    n, room, size, cut = 0, 1, (0, 0), False
    for images, own in pictures:
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


def labelled(pictures: Pictures) -> Iterator[tuple[Tensor, Tensor]]:
    """Only the pictures that have a label."""
    for images, labels in pictures:
        known = labels >= 0  # (b,)
        if known.any():
            yield images[known], labels[known]


def random_share(n: int, share: float, seed: int, purpose: str) -> Tensor:
    """A mask `(n,)` of `share` of n pictures, rounded up; whether picture i is in it hangs on its random number."""
    order = Draws(seed, torch.arange(n)).uniform(purpose).argsort(stable=True)  # (n,)
    chosen = torch.zeros(n, dtype=torch.bool)
    chosen[order[: math.ceil(n * share)]] = True
    return chosen
