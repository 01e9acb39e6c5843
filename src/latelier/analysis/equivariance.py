"""Whether a latent moves as its image does: encode a moved image, or move the latent of the image.

Kouzelis et al. 2025 ("EQ-VAE", section 3) train autoencoders so that both are the same under scaling and rotation, and
find their latents easier to learn. The error here is our own, of normalised latents. With a = E(T x) and b = T E(x),
over images and positions,

    error = sum over channels of mean (a - b)²  /  sum over channels of (Var a + Var b) / 2

0 where both are equal; 2 (1 - r) where they have equal means and variances and the correlation r.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from latelier.analysis.sample import PIXELS, LatentSample
from latelier.errors import NotMeasurable
from latelier.evaluation.reconstruction import SETTINGS, psnr
from latelier.evaluation.results import Result, mean_with_interval
from latelier.tokenizers.codec import Codec

MOST_IMAGES = 256  # each is encoded and decoded about eight times


@dataclass(frozen=True)
class Move:
    """The same thing done to an image and to its latents; several moves may share the name of a measure."""

    name: str
    words: str  # what it does, for the receipt
    image: Callable[[Tensor], Tensor]  # of (b, c, h, w)
    latent: Callable[[Tensor], Tensor]  # of (b, k, h / f, w / f)


@torch.no_grad()
def equivariance(sample: LatentSample, codec: Codec) -> dict[str, Result]:
    """How far encoding and moving are from being exchangeable, in latents and in images, of at most 256 images.

    For each of `moves`, `equivariance-<move>`, the error above, and `psnr-after-<move>`: moved latents, decoded,
    against moved images, dB. Nothing for 1-D latents; an error if latents do not vary.
    """
    if sample.mean.ndim != 4:
        return {}
    scaled, grid = sample.scaled(codec), (sample.mean.shape[2], sample.mean.shape[3])
    tallies = {name: Tally(group) for name, group in moves(sample.image_size, grid).items()}
    plain: list[Tensor] = []
    for rows in sample.parts(PIXELS, MOST_IMAGES):
        images, z = sample.pixels(rows), sample.latents(rows).to(sample.device)  # (b, c, h, w), (b, k, i, j)
        plain.append(psnr(scaled.decode(z).clamp(-1, 1), images).cpu())
        for tally in tallies.values():
            tally.add(scaled, images, z)
    values = torch.cat(plain)  # (n,)
    about = {"n": len(values), "latents": "posterior mean, normalised", "latent_scale": sample.scale.origin}
    about["reconstruction_psnr"] = values.mean().item()
    return {key: result for name, tally in tallies.items() for key, result in tally.measure(name, about).items()}


def moves(size: tuple[int, int], grid: tuple[int, int]) -> dict[str, list[Move]]:
    """The moves that images of this size allow, by name.

    `shift`: round by one position downwards, by one to the right, and by half of the grid both ways. `half-shift`: by
    half a position; latents are means of two neighbours. `flip`: left to right. `scale`: to half the size, means of
    2 x 2 pixels or positions. A side of one position cannot be shifted; half positions and half sizes must be whole.
    """
    steps = (size[0] // grid[0], size[1] // grid[1])  # pixels of a position
    found: dict[str, list[Move]] = {}
    if min(grid) > 1:
        shifts = dict.fromkeys([(1, 0), (0, 1), (grid[0] // 2, grid[1] // 2)])
        found["shift"] = [_shift(down, right, steps) for down, right in shifts]
        if not any(step % 2 for step in steps):
            found["half-shift"] = [_half_shift(axis, steps[axis - 2]) for axis in (2, 3)]
    if grid[1] > 1:
        found["flip"] = [Move("flip", "left to right", *[lambda x: x.flip(-1)] * 2)]
    if not any(side % 2 for side in grid):
        found["scale"] = [Move("scale", "to half the size, means of 2 x 2", *[lambda x: F.avg_pool2d(x, 2)] * 2)]
    return found


def _shift(down: int, right: int, steps: tuple[int, int]) -> Move:
    pixels = (down * steps[0], right * steps[1])
    words = f"round by {pixels[0]} pixels down, {pixels[1]} right"
    return Move("shift", words, lambda x: x.roll(pixels, (2, 3)), lambda z: z.roll((down, right), (2, 3)))


def _half_shift(axis: int, step: int) -> Move:
    words = f"round by {step // 2} pixels {'down' if axis == 2 else 'right'}"
    return Move("half-shift", words, lambda x: x.roll(step // 2, axis), lambda z: (z + z.roll(1, axis)) / 2)


class Tally:
    """Errors of the moves of one name, averaged."""

    def __init__(self, group: list[Move]):
        self.group = group
        self.errors: list[Tensor] = []  # of (b, k)
        self.psnr: list[Tensor] = []  # of (b,)
        self.sums: dict[str, Tensor] = {}  # of both sides' values and squares, (3, k): count, sum, sum of squares

    def add(self, codec: Codec, images: Float[Tensor, "b c h w"], z: Float[Tensor, "b k i j"]) -> None:
        """Count a batch in, its latents `z` being known."""
        errors, ratios = [], []
        for move in self.group:
            moved, target = move.latent(z), move.image(images)  # (b, k, i, j), (b, c, h, w)
            ours = codec.encode(target)  # (b, k, i, j)
            errors.append((ours - moved).square().mean((2, 3)).cpu().double())  # (b, k)
            ratios.append(psnr(codec.decode(moved).clamp(-1, 1), target).cpu())  # (b,)
            self._spread("encoded", ours)
            self._spread("moved", moved)
        self.errors.append(torch.stack(errors).mean(0))
        self.psnr.append(torch.stack(ratios).mean(0))

    def measure(self, name: str, about: dict[str, Any]) -> dict[str, Result]:
        """The error, whose interval takes the variances as known, and the PSNR; both are means over images."""
        errors, unit = torch.cat(self.errors), self._unit()  # (n, k), (k,)
        if not unit.sum() > 0:
            raise NotMeasurable(f"The latents of {len(errors)} images are all equal, or not finite: nothing moves.")
        value, interval = mean_with_interval(errors.sum(1) / unit.sum())
        about = {**about, "moves": [move.words for move in self.group]}
        by_channel = (errors.mean(0) / unit.clamp(min=1e-12)).tolist()
        ratio, ratio_interval = mean_with_interval(torch.cat(self.psnr))
        return {
            f"equivariance-{name}": Result(value, interval, {**about, "by_channel": by_channel}),
            f"psnr-after-{name}": Result(ratio, ratio_interval, {**about, "settings": SETTINGS["psnr"]}),
        }

    def _spread(self, side: str, z: Float[Tensor, "b k i j"]) -> None:
        values = z.transpose(0, 1).flatten(1).cpu().double()  # (k, b i j)
        count = torch.full((len(values),), float(values.shape[1]), dtype=torch.float64)
        found = torch.stack([count, values.sum(1), values.square().sum(1)])  # (3, k)
        self.sums[side] = self.sums[side] + found if side in self.sums else found

    def _unit(self) -> Float[Tensor, " k"]:
        """(Var a + Var b) / 2 of each channel."""
        variances = [squares / n - (values / n).square() for n, values, squares in self.sums.values()]
        return torch.stack(variances).mean(0).clamp(min=0)
