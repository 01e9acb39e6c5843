"""One optimiser step: AdamW, learning rate, clipping, an update that can be masked, and one check of all its numbers.

The check asks whether all loss terms and gradients are finite, and whether any process was asked to stop. On a CPU the
answer is read at once, before the update. On an accelerator reading it would make the host wait, so the flag masks the
update on the device (`found_inf` of torch's fused optimisers) and is read one step later. Either way weights never see
a number that is not finite, and the error names the term.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

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


@dataclass
class _Answer:
    """What one step found: `finite` per name, and `(bad, stop)` over all processes."""

    names: list[str]
    finite: Tensor  # (k,) bool, of this process
    state: Tensor  # (2,) float32, above 0 means yes
    step: Any
    ready: torch.cuda.Event | None = None


class NotFinite(Exception):
    """A step had a number that is not finite; `what` names it, `step` is what the caller said of the step."""

    def __init__(self, what: str, step: Any):
        super().__init__(what)
        self.what, self.step = what, step


class FiniteCheck:
    """Collects what one optimiser step computed and answers once.

    Args:
        accelerator: process group and device.
        deferred: read each answer one step late; by default on every device but the CPU.

    Attributes:
        stop: whether some process was asked to stop, as far as answers were read; the same on all processes.
    """

    def __init__(self, accelerator: Accelerator, deferred: bool | None = None):
        self.accelerator = accelerator
        self.deferred = accelerator.device.type != "cpu" if deferred is None else deferred
        self.stop = False
        self._names: list[str] = []
        self._finite: list[Tensor] = []
        self._unread: _Answer | None = None

    def watch(self, names: Iterable[str], values: Tensor) -> None:
        """Numbers of this step `(k,)`, and what each is called in an error."""
        self._names += names
        self._finite.append(torch.isfinite(values.detach()))

    def answer(self, stopping: bool, step: Any) -> Tensor:
        """End a step before its update.

        Args:
            stopping: whether this process was asked to stop.
            step: what `NotFinite` shall carry if this step is bad; kept until the answer is read.

        Returns:
            A scalar on the device: 1 where the update must not reach the weights, else 0.

        Raises:
            NotFinite: for this step, or for the one before if answers are deferred.
        """
        finite = torch.cat(self._finite)  # (k,)
        state = torch.stack([(~finite).any().float(), finite.new_tensor(stopping).float()])  # (2,)
        if self.accelerator.num_processes > 1:
            state = self.accelerator.reduce(state)
        answer = _Answer(self._names, finite, state, step)
        self._names, self._finite = [], []
        if not self.deferred:
            self._read(answer)
            return state[0].clamp(max=1)
        before, self._unread = self._unread, self._send(answer)
        if before is not None:
            self._read(before)
        return state[0].clamp(max=1)

    def settle(self) -> None:
        """Read the answer that is still outstanding: before anything is saved.

        Raises:
            NotFinite: if the last step was bad.
        """
        answer, self._unread = self._unread, None
        if answer is not None:
            self._read(answer)

    def _send(self, answer: _Answer) -> _Answer:
        """Start copying an answer to the host without waiting for it."""
        if answer.state.is_cuda:
            answer.finite, answer.state = (t.to("cpu", non_blocking=True) for t in (answer.finite, answer.state))
            answer.ready = torch.cuda.Event()
            answer.ready.record()
        return answer

    def _read(self, answer: _Answer) -> None:
        if answer.ready is not None:
            answer.ready.synchronize()
        bad, stop = answer.state.tolist()
        self.stop = self.stop or stop > 0
        if bad:
            wrong = [name for name, finite in zip(answer.names, answer.finite.tolist()) if not finite]
            terms = [name for name in wrong if name.startswith("the loss term")]
            what = dict.fromkeys(terms or wrong[:1] or ["a number of another process is not finite"])
            raise NotFinite(" and ".join(what), answer.step)
