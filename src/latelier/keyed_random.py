"""Random numbers addressed by the image they belong to, not by the moment they were drawn.

Training sees an endless stream of images, numbered 0, 1, 2, ... ("images seen"). Every random choice about image
`n` (its crop, its mask, its noise, its time) is a function of `(seed, purpose, n)` alone. So a resumed run, another
number of workers, processes or micro-batches see exactly the same numbers, and nothing has to be saved.
"""

import zlib

import torch
from jaxtyping import Float, Int
from torch import Tensor


def fold_in(seed: int, purpose: str, number: int) -> int:
    """A 63-bit generator seed for one random choice (splitmix64 finaliser, so that neighbours are unrelated)."""
    x = (seed * 0x9E3779B97F4A7C15 + zlib.crc32(purpose.encode()) * 0xD1B54A32D192ED03 + number) % 2**64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return (x ^ (x >> 31)) >> 1


class KeyedRandom:
    """Random tensors for a batch of stream numbers; row i depends on `(seed, purpose, numbers[i])` only.

    Args:
        seed: the run's seed.
        numbers: `(b,)` stream numbers of the batch's images.
        device: where the result is wanted. Numbers are always drawn on the CPU, so that devices agree.
    """

    def __init__(self, seed: int, numbers: Int[Tensor, " b"], device: torch.device | str = "cpu"):
        self.seed, self.numbers, self.device = seed, numbers.tolist(), torch.device(device)
        self._generator = torch.Generator()

    def normal(self, purpose: str, *shape: int) -> Float[Tensor, "b ..."]:
        """Standard normal numbers, `(b, *shape)`, float32."""
        return self._fill(purpose, shape, "normal_")

    def uniform(self, purpose: str, *shape: int) -> Float[Tensor, "b ..."]:
        """Uniform numbers in [0, 1), `(b, *shape)`, float32."""
        return self._fill(purpose, shape, "uniform_")

    def _fill(self, purpose: str, shape: tuple[int, ...], method: str) -> Tensor:
        out = torch.empty(len(self.numbers), *shape)
        for row, number in zip(out, self.numbers):
            self._generator.manual_seed(fold_in(self.seed, purpose, number))
            getattr(row, method)(generator=self._generator)
        return out.to(self.device, non_blocking=True)
