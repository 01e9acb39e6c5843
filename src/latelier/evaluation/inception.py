"""The network of FID: the Inception that TensorFlow released on 2015-12-05, with its numbers ported to PyTorch.

Szegedy et al. 2016 describe the architecture; as in the released graph only, average pools do not count the padding,
the last block has a max pool, and normalisation has no scale. Layers are named as in torchvision's Inception.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

DIMS = {"features": 2048, "spatial": 2023, "logits": 1008}
LAYERS = {"features": "pool3", "logits": "softmax's product without its bias"}
LAYERS["spatial"] = "mixed_6/conv after its ReLU, the first 7 channels of 17 x 17"
SPATIAL_CHANNELS = 7  # 7 x 17 x 17 = 2023 numbers, about as many as pool3 has (Nash et al. 2021)
BLOCKS_5 = {"Mixed_5b": (192, 32), "Mixed_5c": (256, 64), "Mixed_5d": (288, 64)}  # channels in, of the pooled branch
BLOCKS_6 = {"Mixed_6b": 128, "Mixed_6c": 160, "Mixed_6d": 160, "Mixed_6e": 192}  # channels between
Step = tuple[int, tuple[int, int]]  # channels out and kernel of a convolution


class Convolution(nn.Module):
    """Convolution, normalisation by the training set's statistics, ReLU; `same` keeps the size at stride 1."""

    def __init__(self, width: int, out: int, kernel: tuple[int, int] = (1, 1), stride: int = 1, same: bool = True):
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if same else (0, 0)
        self.conv = nn.Conv2d(width, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        return self.bn(self.conv(x)).relu_()


class Mixed(nn.ModuleDict):
    """Branches side by side, chains of layers by name, their maps concatenated; equal beginnings are shared."""

    def __init__(self, *branches: dict[str, nn.Module]):
        super().__init__({name: layer for branch in branches for name, layer in branch.items()})
        self.branches = [tuple(branch) for branch in branches]

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        known: dict[tuple[str, ...], Tensor] = {(): x}
        for branch in self.branches:
            for end in range(1, len(branch) + 1):
                if branch[:end] not in known:
                    known[branch[:end]] = self[branch[end - 1]](known[branch[: end - 1]])
        return torch.cat([known[branch] for branch in self.branches], 1)


class Inception(nn.Module):
    """Images of 299 x 299 to 2048 numbers, and what else is read from the same pass; 1008 classes if `classifier`."""

    def __init__(self, classifier: bool = True):
        super().__init__()
        for name, layer in _layers().items():
            self.add_module(name, layer)
        self.fc = nn.Linear(DIMS["features"], DIMS["logits"]) if classifier else None
        self.requires_grad_(False).eval()

    def forward(self, images: Float[Tensor, "b 3 299 299"]) -> dict[str, Float[Tensor, "b _"]]:
        """One pass over images of about -1 to 1, see `features.to_inception`.

        `features` `(b, 2048)`: pool3; `spatial` `(b, 2023)`, of sFID (Nash et al. 2021): the first 7 channels of
        mixed_6's first branch, Mixed_6d here; `logits` `(b, 1008)` without bias (Salimans et al. 2016).
        """
        x, result = images, {}
        for name, layer in self.named_children():
            x = x if name == "fc" else layer(x)  # (b, c, i, j)
            if name == "Mixed_6d":
                result["spatial"] = x[:, :SPATIAL_CHANNELS].flatten(1)  # (b, 2023)
        result["features"] = x.mean((2, 3))  # (b, 2048)
        if self.fc is not None:
            result["logits"] = result["features"] @ self.fc.weight.T  # (b, 1008)
        return result


def _layers() -> dict[str, nn.Module]:
    """All but the classifier, in order; TensorFlow's mixed to mixed_10 are Mixed_5b to Mixed_7c."""
    return {
        "Conv2d_1a_3x3": Convolution(3, 32, (3, 3), 2, same=False),
        "Conv2d_2a_3x3": Convolution(32, 32, (3, 3), same=False),
        "Conv2d_2b_3x3": Convolution(32, 64, (3, 3)),
        "pool1": nn.MaxPool2d(3, 2),
        "Conv2d_3b_1x1": Convolution(64, 80),
        "Conv2d_4a_3x3": Convolution(80, 192, (3, 3), same=False),
        "pool2": nn.MaxPool2d(3, 2),
        **{name: _block_5(*widths) for name, widths in BLOCKS_5.items()},
        "Mixed_6a": Mixed(  # 35 x 35 to 17 x 17
            {"branch3x3": Convolution(288, 384, (3, 3), 2, same=False)},
            _chain("branch3x3dbl", 288, (64, (1, 1)), (96, (3, 3)), (96, (3, 3)), last=True),
            {"pool": nn.MaxPool2d(3, 2)},
        ),
        **{name: _block_6(768, inner) for name, inner in BLOCKS_6.items()},
        "Mixed_7a": Mixed(  # 17 x 17 to 8 x 8
            _chain("branch3x3", 768, (192, (1, 1)), (320, (3, 3)), last=True),
            _chain("branch7x7x3", 768, (192, (1, 1)), (192, (1, 7)), (192, (7, 1)), (192, (3, 3)), last=True),
            {"pool": nn.MaxPool2d(3, 2)},
        ),
        "Mixed_7b": _block_7(1280, _average_pool()),
        "Mixed_7c": _block_7(2048, nn.MaxPool2d(3, 1, padding=1)),
    }


def _average_pool() -> nn.Module:
    return nn.AvgPool2d(3, 1, padding=1, count_include_pad=False)  # TensorFlow does not count what it pads


def _chain(name: str, width: int, *steps: Step, last: bool = False) -> dict[str, nn.Module]:
    """Convolutions `name_1`, `name_2`, ...; `last` halves the size in the last."""
    layers: dict[str, nn.Module] = {}
    for i, (out, kernel) in enumerate(steps, 1):
        shrink = last and i == len(steps)
        layers[f"{name}_{i}"] = Convolution(width, out, kernel, 2 if shrink else 1, same=not shrink)
        width = out
    return layers


def _block_5(width: int, pooled: int) -> Mixed:
    """35 x 35."""
    return Mixed(
        {"branch1x1": Convolution(width, 64)},
        _chain("branch5x5", width, (48, (1, 1)), (64, (5, 5))),
        _chain("branch3x3dbl", width, (64, (1, 1)), (96, (3, 3)), (96, (3, 3))),
        {"pool": _average_pool(), "branch_pool": Convolution(width, pooled)},
    )


def _block_6(width: int, inner: int) -> Mixed:
    """17 x 17, with kernels of one row and one column."""
    row, column = (1, 7), (7, 1)
    return Mixed(
        {"branch1x1": Convolution(width, 192)},
        _chain("branch7x7", width, (inner, (1, 1)), (inner, row), (192, column)),
        _chain("branch7x7dbl", width, (inner, (1, 1)), (inner, column), (inner, row), (inner, column), (192, row)),
        {"pool": _average_pool(), "branch_pool": Convolution(width, 192)},
    )


def _block_7(width: int, pool: nn.Module) -> Mixed:
    """8 x 8; two branches fork at their ends."""

    def forked(name: str, *steps: Step) -> list[dict[str, nn.Module]]:
        chain, ends = _chain(name, width, *steps), {"a": (1, 3), "b": (3, 1)}
        return [{**chain, f"{name}_{len(steps) + 1}{end}": Convolution(384, 384, ends[end])} for end in ends]

    return Mixed(
        {"branch1x1": Convolution(width, 320)},
        *forked("branch3x3", (384, (1, 1))),
        *forked("branch3x3dbl", (448, (1, 1)), (384, (3, 3))),
        {"pool": pool, "branch_pool": Convolution(width, 192)},
    )
