"""The optimiser's side of a step: AdamW, learning rate, gradient norms, a step that can be masked, batch norms."""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn


def adamw(
    model: nn.Module, lr: float, betas: tuple[float, float] = (0.9, 0.95), weight_decay: float = 0.0
) -> torch.optim.AdamW:
    """Fused AdamW; weight decay on matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda") for p in trained)
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, fused=fused)


def learning_rate(
    images: int, total: int, batch: int, lr: float, warmup: int = 0, schedule: str = "constant", final_lr: float = 0.0
) -> float:
    """The rate for the step that begins at `images` seen; a function of nothing else, so resuming is exact.

    Args:
        images: seen before the step.
        total: images of the whole stage, where `cosine` ends.
        batch: images per step.
        lr: the full rate.
        warmup: images over which the rate rises linearly.
        schedule: `constant` or `cosine`.
        final_lr: where `cosine` ends, as a share of `lr`.
    """
    if images < warmup:
        return lr * (images + batch) / (warmup + batch)
    if schedule == "constant":
        return lr
    progress = (images - warmup) / max(1, total - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return lr * (final_lr + (1 - final_lr) * cosine)


def clip_gradients(model: nn.Module, limit: float | None) -> tuple[Tensor, list[str], Float[Tensor, " k"]]:
    """Scale gradients to a largest total norm, without a look at the numbers.

    Returns:
        The total norm before clipping; names and norms of the parameters with a gradient.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.grad is not None]
    norms = torch.stack(torch._foreach_norm([p.grad for _, p in trained]))  # (k,)
    total = torch.linalg.vector_norm(norms)
    if hasattr(total, "full_tensor"):  # sharded gradients
        norms, total = norms.full_tensor(), total.full_tensor()  # type: ignore[operator]
    if limit:
        torch.nn.utils.clip_grads_with_norm_([p for _, p in trained], limit, total, foreach=True)
    return total, [name for name, _ in trained], norms


def step(optimizer: torch.optim.Optimizer, skip: Float[Tensor, ""] | None = None) -> None:
    """Step and clear the gradients; where `skip` is 1, weights and moments stay as they are (on the device).

    The mask is the one that GradScaler uses: fused optimisers read `found_inf`.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps optimisers
    inner.found_inf = skip
    optimizer.step()
    inner.found_inf = None
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def average_batch_norms(model: nn.Module, accelerator: Accelerator) -> None:
    """Give the batch norms of all processes the same running statistics, the means over processes.

    Gradients are averaged by the process group, running statistics are not. They are linear in those of the batches,
    so their mean is what one process gets that sees all images: for means exactly that of the whole batch, for
    variances the mean of those within the processes. Batch norms in `eval` mode are frozen and left alone.
    """
    if accelerator.num_processes == 1:
        return
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    statistics = [t for m in norms for t in (m.running_mean, m.running_var) if t is not None]
    if not statistics:
        return
    mean = accelerator.reduce(torch.cat(statistics), reduction="mean")  # in one message
    for tensor, part in zip(statistics, mean.split([len(t) for t in statistics])):
        tensor.copy_(part)
