"""One check per optimiser step: are all loss terms and gradients finite, and was any process asked to stop?

On a CPU the answer is read at once, before the optimiser steps. On an accelerator, reading it would make the host wait
for the device. There it masks the update on the device (`found_inf` of torch's fused optimisers) and is read one step
later. Either way the weights never see a number that is not finite, and the error names the term.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor


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
