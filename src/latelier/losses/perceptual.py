"""LPIPS: perceptual distance of two images, by a network trained on human judgements.

Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", equation 1.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from latelier.errors import LatelierError
from latelier.weights import load_lpips

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet statistics, for images in [-1, 1]
EPSILON = 1e-10
CHANNELS = 64  # of the finest feature maps, in both networks
PIECE = {False: 6 * 2**20, True: 2**29}  # numbers in one feature map: on the CPU (cache, allocator), on a GPU (memory)

# One entry per convolution: (stride, padding); "pool" stands before a convolution; "tap" after a tapped one.
_LAYERS: dict[str, tuple] = {
    "vgg": tuple(
        step
        for block, depth in enumerate((2, 2, 3, 3, 3))
        for step in ([("pool", 2)] if block else []) + [("conv", 1, 1)] * depth + [("tap",)]
    ),
    "alex": (
        ("conv", 4, 2), ("tap",), ("pool", 3), ("conv", 1, 2), ("tap",), ("pool", 3), ("conv", 1, 1), ("tap",),
        ("conv", 1, 1), ("tap",), ("conv", 1, 1), ("tap",),
    ),
}  # fmt: skip
_SMALLEST = {"vgg": 16, "alex": 31}  # below, pooling leaves nothing


class LPIPS(nn.Module):
    """Perceptual distance, differentiable in its first argument.

    The weights are buffers that are not saved, so that neither optimisers, checkpoints nor DDP see the module.
    Convolutions follow autocast; unit-normalisation and heads are float32.

    Args:
        net: `vgg` (the loss of LDM and its successors) or `alex` (the authors' choice as a metric).

    Differs from the reference: no dropout (it acts in the heads' training only); the distance's gradient is written
    out in closed form, and is zero where all channels of a feature vector are zero.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, net: Literal["vgg", "alex"] = "vgg"):
        super().__init__()
        if net not in _LAYERS:
            raise LatelierError(f"LPIPS has no network {net!r}; use 'vgg' or 'alex'.")
        self.net = net
        for name, array in load_lpips(net).items():
            tensor = torch.from_numpy(array.copy())
            if tensor.ndim == 4:
                tensor = tensor.contiguous(memory_format=torch.channels_last)
            self.register_buffer(name.replace(".", "_"), tensor, persistent=False)
        self.register_buffer("shift", torch.tensor(SHIFT).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(3, 1, 1), persistent=False)

    def forward(self, images: Float[Tensor, "b c h w"], reference: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
        """Distance of each image in [-1, 1], of 1 or 3 channels, from its reference; gradients only in `images`."""
        self._check(images)
        return _Pieces.apply(images, reference.detach(), self._distance, self._pieces(images))

    def features(self, images: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b k i j"]]:
        """The five tapped feature maps, after their ReLU, finest first (VGG16: relu1_2 ... relu5_3)."""
        x = (self._check(images).float() - self.shift) / self.scale  # (b, 3, h, w)
        x = x.contiguous(memory_format=torch.channels_last)
        taps, number = [], 0
        for kind, *numbers in _LAYERS[self.net]:
            if kind == "pool":
                x = _max_pool(x, numbers[0])  # (b, k, i, j)
            elif kind == "tap":
                taps.append(x)
            else:
                weight, bias = getattr(self, f"conv{number}_weight"), getattr(self, f"conv{number}_bias")
                x = F.conv2d(x, weight, bias, stride=numbers[0], padding=numbers[1]).relu_()  # (b, k, i, j)
                number += 1
        return taps

    def compare(self, ours: list[Tensor], theirs: list[Tensor]) -> Float[Tensor, " b"]:
        """Distance of images whose `features` are known already."""
        distances = [_Distance.apply(x, y, getattr(self, f"head{i}")) for i, (x, y) in enumerate(zip(ours, theirs))]
        return torch.stack(distances).sum(0)  # (b,)

    @torch.no_grad()
    def distance_and_vectors(
        self, images: Float[Tensor, "b c h w"], reference: Float[Tensor, "b c h w"]
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, "b k"], Float[Tensor, "b k"]]:
        """The distance, and of both sides spatial means of the last feature maps, by one pass over each."""
        pieces, found = self._pieces(images), list[tuple[Tensor, Tensor, Tensor]]()
        for x, y in zip(images.tensor_split(pieces), reference.tensor_split(pieces)):
            ours, theirs = self.features(x), self.features(y)
            found.append((self.compare(ours, theirs), ours[-1].mean((2, 3)), theirs[-1].mean((2, 3))))
        distances, vectors, others = map(torch.cat, zip(*found))
        return distances, vectors, others

    def _pieces(self, images: Tensor) -> int:
        """How many pieces of a batch fit the caches."""
        pieces = -(-images.numel() // images.shape[1] * CHANNELS // PIECE[images.device.type == "cuda"])
        return max(1, min(len(images), pieces))

    def _distance(self, images: Float[Tensor, "b c h w"], reference: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
        """The definition, for one piece of a batch."""
        with torch.no_grad():
            theirs = self.features(reference)
        return self.compare(self.features(images), theirs)

    def _check(self, images: Tensor) -> Tensor:
        channels, height, width = images.shape[1:]
        smallest = _SMALLEST[self.net]
        if min(height, width) < smallest:
            raise LatelierError(
                f"LPIPS ({self.net}) needs images of at least {smallest} pixels a side, not {height} x {width}; "
                "use larger images or set perceptual_weight: 0."
            )
        if channels not in (1, 3):
            raise LatelierError(
                f"LPIPS is defined for 1 or 3 channels, not {channels}; set perceptual_weight: 0 and take lpips out "
                "of evaluate.metrics."
            )
        return images.expand(-1, 3, -1, -1)


def _max_pool(x: Float[Tensor, "b c h w"], size: int) -> Float[Tensor, "b c i j"]:
    """Max pooling with stride 2; without gradients no indices are written, which is most of its cost on a CPU."""
    if torch.is_grad_enabled() or size != 2:
        return F.max_pool2d(x, size, 2)
    height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    even, odd = x[:, :, 0:height:2], x[:, :, 1:height:2]
    rows = torch.maximum(even, odd)  # (b, c, i, w)
    return torch.maximum(rows[..., 0:width:2], rows[..., 1:width:2])


class _Pieces(torch.autograd.Function):
    """A batch in pieces, each with its gradient in the images, which is no larger than they are.

    So the activations, some hundred times larger, live for one piece only, which fits the CPU's caches.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, reference: Tensor, distance: Any, pieces: int) -> Tensor:
        values: list[Tensor] = []
        gradients: list[Tensor] = []
        for x, y in zip(images.detach().tensor_split(pieces), reference.tensor_split(pieces)):
            if not ctx.needs_input_grad[0]:
                values.append(distance(x, y))
                continue
            with torch.enable_grad():
                x.requires_grad_()
                value = distance(x, y)
                gradients += torch.autograd.grad(value.sum(), x)
            values.append(value.detach())
        ctx.save_for_backward(*gradients)
        return torch.cat(values)  # (b,)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, None, None, None]:
        return torch.cat(ctx.saved_tensors) * outer.view(-1, 1, 1, 1), None, None, None


class _Distance(torch.autograd.Function):
    """Mean over positions of sum_c w_c (x_c / |x| - y_c / |y|)^2, float32 inside, one image at a time on the CPU.

    One image's features stay in the cache, and only the gradient is kept: for u = x / (|x| + e), g = 2 w (u - v),

        dx = (g - u (g . u) (|x| + e) / |x|) / (|x| + e)
    """

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "b c h w"], y: Float[Tensor, "b c h w"], head: Float[Tensor, " c"]
    ) -> Float[Tensor, " b"]:
        batch, channels = x.shape[:2]
        xs, ys = (z.permute(0, 2, 3, 1).reshape(batch, -1, channels) for z in (x, y))  # (b, hw, c), views
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(xs) if wanted else None  # (b, hw, c)
        values, chunk = [], batch if x.is_cuda else 1
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, batch, chunk):
                rows = slice(start, start + chunk)
                value, dx = _distance(xs[rows].float(), ys[rows].float(), head.float(), wanted)
                values.append(value)
                if gradient is not None and dx is not None:
                    gradient[rows] = dx
        ctx.shape = x.shape
        ctx.save_for_backward(gradient)
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Float[Tensor, " b"]) -> tuple[Tensor | None, None, None]:
        (gradient,) = ctx.saved_tensors
        batch, channels, height, width = ctx.shape
        product = gradient * outer.to(gradient.dtype).view(batch, 1, 1)  # (b, hw, c)
        return product.view(batch, height, width, channels).permute(0, 3, 1, 2), None, None


def _distance(
    x: Float[Tensor, "b p c"], y: Float[Tensor, "b p c"], head: Float[Tensor, " c"], gradient: bool
) -> tuple[Float[Tensor, " b"], Float[Tensor, "b p c"] | None]:
    """Distance of feature vectors averaged over positions, and its gradient in `x`."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # (b, p, 1)
    u = x / (norm + EPSILON)
    difference = u - y / (torch.linalg.vector_norm(y, dim=-1, keepdim=True) + EPSILON)  # (b, p, c)
    weighted = difference * head  # (b, p, c)
    value = (weighted * difference).sum(-1).mean(-1)  # (b,)
    if not gradient:
        return value, None
    along = (weighted * u).sum(-1, keepdim=True)  # (b, p, 1)
    inverse = torch.where(norm > 0, 2 / (x.shape[1] * norm), 0.0)  # (b, p, 1)
    dx = weighted.mul_(norm / (norm + EPSILON)).sub_(u.mul_(along)).mul_(inverse)
    return value, dx
