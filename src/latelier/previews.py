"""Previews while images are drawn: the present estimate of the clean latents, decoded now and then.

After each evaluation a prediction means an estimate of z, such as x_t - t v for a flow's velocity v. Where latents are
structured (DC-AE 1.5) the first channels hold the large shapes, which are settled first, and any prefix of the channels
decodes; so a preview takes a short one.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from latelier.diffusion.schedulers import ADAPTIVE
from latelier.errors import LatelierError
from latelier.images import make_grid, save_png
from latelier.pipeline import LatentDiffusionPipeline
from latelier.recipe import Prefixes, Recipe, Sample
from latelier.tokenizers.codec import Codec, decode_within

SHOWN = 8  # images in a strip: decoding is what a preview costs
LEAST = 4  # channels of a short prefix


class Previews:
    """The `callback` of a pipeline that writes strips of images as they come about.

    Of the first batch, its first images: `step-005.png` is what five evaluations of the denoiser say they will be.

    Args:
        codec: of the pipeline.
        folder: where the strips go; strips of earlier calls there are removed.
        every: evaluations from one strip to the next.
        channels: decode only the first k latent channels, or all.
        tile: decode in tiles of this side, in latent positions, see `decode_within`.
    """

    def __init__(self, codec: Codec, folder: Path, every: int, channels: int | None = None, tile: int | None = None):
        self.codec, self.folder, self.every, self.channels, self.tile = codec, folder, every, channels, tile
        self._seeds: list[int] | None = None
        self._strips: list[Tensor] = []
        for old in (*folder.glob("step-*.png"), folder / "strip.png"):
            old.unlink(missing_ok=True)

    def __call__(self, seeds: list[int], done: int, estimate: Float[Tensor, "b c *grid"]) -> None:
        """Write a strip if it is due."""
        self._seeds = self._seeds or seeds
        if seeds != self._seeds or done % self.every:
            return
        images = decode_within(self.codec, estimate[:SHOWN], self.tile, self._length(estimate)).clamp(-1, 1)
        self._strips.append(images.cpu())  # (b, c, h, w)
        save_png(make_grid(images, columns=SHOWN), self.folder / f"step-{done:03d}.png")

    def save_strips(self) -> Path:
        """All strips below each other, the earliest on top, as `strip.png`.

        Raises:
            LatelierError: if there are none, because an adaptive sampler was done before.
        """
        if not self._strips:
            raise LatelierError(f"There is no preview: the images took fewer than {self.every} evaluations.")
        columns = len(self._strips[0])
        return save_png(make_grid(torch.cat(self._strips), columns), self.folder / "strip.png")

    def _length(self, estimate: Tensor) -> int | None:
        """Length of the decoded prefix, at most the channels that are drawn; None decodes all of the latents'."""
        have = estimate.shape[1]
        length = min(self.channels or have, have)
        return None if length == self.codec.channels else length


def short_prefix(prefixes: Prefixes, channels: int) -> int:
    """How many channels a preview of structured latents decodes: a quarter, at least four, and no untrained prefix."""
    return min(channels, max(LEAST, channels // 4, prefixes.of(channels)[0]))


def shown_lengths(prefixes: Prefixes, channels: int) -> list[int]:
    """Lengths that are shown while a denoiser learns prefixes: the shortest, a quarter, a half and all channels."""
    shortest = prefixes.of(channels)[0]
    return sorted({max(shortest, length) for length in (shortest, channels // 4, channels // 2, channels)})


def make_previews(
    pipeline: LatentDiffusionPipeline,
    recipe: Recipe | None,
    sample: Sample,
    folder: Path,
    every: int,
    channels: int | None = None,
) -> Previews:
    """Previews for one call of a run's pipeline; for the arguments see `Previews`.

    `recipe`, of the run, says whether the tokenizer was trained on prefixes of its channels: of such latents,
    `short_prefix` is decoded by default, all channels of others.

    Raises:
        LatelierError: if no strip would ever be due, or the latents have fewer channels.
    """
    if every < 1 or (every > sample.steps and sample.sampler != ADAPTIVE):
        raise LatelierError(
            f"A preview every {every} steps does not go with {sample.steps} steps; choose 1 to {sample.steps}."
        )
    codec, prefixes = pipeline.codec, getattr(recipe and recipe.tokenizer, "prefixes", None)
    if channels is not None and not 0 < channels <= codec.channels:
        raise LatelierError(f"Previews of {channels} channels: choose 1 to {codec.channels}, which the latents have.")
    if channels is None and prefixes is not None:
        channels = short_prefix(prefixes, codec.channels)
    return Previews(codec, folder, every, channels, sample.tile)
