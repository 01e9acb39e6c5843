"""What both training loops need around the step: device and precision, learning rate, log, progress, stopping.

Nothing here decides what is learned; that is the objective's business.
"""

from __future__ import annotations

import json
import math
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from diffusers.training_utils import EMAModel
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from latelier.errors import LatelierError
from latelier.losses.terms import LossTerms
from latelier.opening import best_device
from latelier.recipe import Recipe, Training
from latelier.terminal import console
from latelier.tokenizers.codec import fast_bf16
from latelier.training import checkpoint


def make_accelerator(training: Training) -> Accelerator:
    """The process group, device and precision; bf16 where the hardware is fast at it."""
    bf16 = training.precision == "bf16" or (training.precision == "auto" and fast_bf16(best_device().type))
    AcceleratorState._reset_state()  # the other stage may have had another precision; the process group stays
    return Accelerator(
        mixed_precision="bf16" if bf16 else "no",
        # Buffers are constants (position tables, LPIPS weights): broadcasting them each step would be waste. What
        # changes, the statistics of batch norms, is averaged after each step.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )


def adamw(model: nn.Module, training: Training) -> torch.optim.AdamW:
    """Fused AdamW; weight decay on matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": training.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda") for p in trained)
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=training.lr, betas=training.betas, fused=fused)


def learning_rate(training: Training, images: int) -> float:
    """The rate for the step that begins at `images` seen; a function of nothing else, so resuming is exact."""
    if images < training.warmup:
        return training.lr * (images + training.batch) / (training.warmup + training.batch)
    if training.schedule == "constant":
        return training.lr
    progress = (images - training.warmup) / max(1, training.images - training.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return training.lr * (training.final_lr + (1 - training.final_lr) * cosine)


@torch.no_grad()
def average_batch_norms(model: nn.Module, accelerator: Accelerator) -> None:
    """Give the batch norms of all processes the same running statistics, the means over processes.

    Gradients are averaged by the process group, running statistics are not. They are linear in those of the batches,
    so their mean is what one process gets that sees all parts: for means exactly that of the whole batch, for
    variances the mean of those within the parts.

    Args:
        model: its batch norms in `eval` mode are frozen and left alone.
        accelerator: the process group; one process has nothing to average.
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


def compile_model(model: nn.Module) -> None:
    """Compile in place, names of weights unchanged: transformers block by block, autoencoders by their two halves."""
    if getattr(model, "_repeated_blocks", None):
        model.compile_repeated_blocks()
        return
    for half in (model.encoder, model.decoder):
        half.compile()


class Stage:
    """Clock and instruments of one stage of training.

    Args:
        name: `tokenizer` or `denoiser`.
        recipe: the experiment.
        training: the stage's section of it.
        accelerator: process group and device.
    """

    def __init__(self, name: str, recipe: Recipe, training: Training, accelerator: Accelerator):
        self.name, self.recipe, self.training, self.accelerator = name, recipe, training, accelerator
        self.folder = recipe.folder
        self.images = 0
        self.stopping: str | None = None
        self.micro = training.micro_batch or -(-training.batch // accelerator.num_processes)
        self.accumulation, rest = divmod(training.batch, self.micro * accelerator.num_processes)
        if rest:
            raise LatelierError(
                f"{name}.batch = {training.batch} is not a multiple of micro_batch {self.micro} "
                f"x {accelerator.num_processes} processes."
            )
        self._sums: dict[str, tuple[Tensor | float, float]] = {}
        self._steps = 0
        self._clock = time.monotonic()
        self._seconds = 0.0

    # -- the step -----------------------------------------------------------------------------------------------------

    def set_learning_rate(self, optimizer: torch.optim.Optimizer, training: Training | None = None) -> None:
        """Set the rate of the coming step."""
        rate = learning_rate(training or self.training, self.images)
        for group in optimizer.param_groups:
            group["lr"] = rate
        if training is None:
            self.lr = rate

    def backward(self, objective: nn.Module, batch: dict[str, Any], last: bool, total: str = "loss") -> LossTerms:
        """Forward and backward of one micro-batch; gradients are averaged over processes on the last one.

        Args:
            objective: what makes the loss terms.
            batch: its input.
            last: whether this is the step's last micro-batch.
            total: the name under which the weighted sum is logged.
        """
        with nullcontext() if last else self.accelerator.no_sync(objective):
            terms: LossTerms = objective(batch)
            bad = terms.non_finite()
            if self._any(bool(bad)):
                self._refuse(f"the loss term {' and '.join(bad) or '(on another process)'} is not finite", batch)
            self.accelerator.backward(terms.total / self.accumulation)
        for key, value in {total: terms.total, **terms.losses}.items():
            self._count(key, value.detach().float(), 1 / self.accumulation)
        return terms

    def step(
        self, objective: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Any], norm: str = "grad_norm"
    ) -> None:
        """Clip gradients to the recipe's norm and step; stop before the weights if the norm is not finite."""
        self._clip(objective, batch, norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average_batch_norms(objective, self.accelerator)

    def _clip(self, objective: nn.Module, batch: dict[str, Any], name: str) -> None:
        trained = [p for p in objective.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained], foreach=True)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # sharded gradients
        if self._any(not torch.isfinite(norm).item()):
            bad = [n for n, p in objective.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
            self._refuse(f"the gradient of {bad[0] if bad else 'a weight'} is not finite", batch)
        if self.training.clip:
            torch.nn.utils.clip_grads_with_norm_(trained, self.training.clip, norm, foreach=True)
        self._count(name, norm.detach().float(), 1.0)

    def _count(self, name: str, value: Tensor, weight: float) -> None:
        """Add to a logged mean."""
        total, weights = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (total + weight * value, weights + weight)

    def update(
        self, objective: nn.Module, optimizer: torch.optim.Optimizer, ema: EMAModel | None, batch: dict[str, Any]
    ) -> None:
        """Clip, step, average the weights, count."""
        self.step(objective, optimizer, batch)
        if ema is not None:
            ema.step(checkpoint.trained(objective))
        self.advance()

    def advance(self) -> None:
        """One optimiser step is done: count it, move the bar, write the log when due."""
        self.images += self.training.batch
        self._steps += 1
        self._bar.update(self._task, completed=self.images)
        if self.due(self.training.log_every):
            self._log()

    def due(self, every: int) -> bool:
        """Whether a multiple of `every` images was passed by the last step, or training ended."""
        return (
            self.images >= self.training.images or self.images // every > (self.images - self.training.batch) // every
        )

    # -- begin and end ------------------------------------------------------------------------------------------------

    @contextmanager
    def running(self) -> Iterator[None]:
        """Progress bar, log files, and signals that finish the step before they stop."""
        self.folder.mkdir(parents=True, exist_ok=True)
        main = self.accelerator.is_main_process
        self._file = (self.folder / "log.jsonl").open("a") if main else None
        self._board = _tensorboard(self.folder / "tensorboard" / self.name) if main else None
        before = {s: signal.signal(s, self._on_signal) for s in _signals()}
        self._bar = Progress(
            SpinnerColumn(), TextColumn("[bold]{task.description}"), BarColumn(), TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(), console=console, disable=not main, refresh_per_second=2,
        )  # fmt: skip
        self._task = self._bar.add_task(self.name, total=self.training.images, completed=self.images, status="")
        self._clock = time.monotonic()
        try:
            with self._bar:
                yield
        finally:
            for which, handler in before.items():
                signal.signal(which, handler)
            for sink in (self._file, self._board):
                if sink is not None:
                    sink.close()

    def should_stop(self) -> bool:
        """Whether any process was asked to stop; the same answer on all of them."""
        return self._any(self.stopping is not None)

    def exit_resumable(self) -> None:
        """Tell how to go on, and leave with exit code 0."""
        if self.accelerator.is_main_process:
            console.print(
                f"Stopped by {self.stopping or 'another process'} at {self.images:,} images; everything is saved. "
                "Run the same command again to go on from here."
            )
        self.accelerator.wait_for_everyone()
        sys.exit(0)

    def pause_clock(self) -> None:
        """Previews and checkpoints do not count as training time."""
        self._seconds += time.monotonic() - self._clock

    def resume_clock(self) -> None:
        """See `pause_clock`."""
        self._clock = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A pause for previews and checkpoints."""
        self.pause_clock()
        yield
        self.resume_clock()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _log(self) -> None:
        names = sorted(self._sums)
        means = [torch.as_tensor(total / weights) for total, weights in (self._sums[name] for name in names)]
        values = torch.stack([mean.to(self.accelerator.device) for mean in means])
        values = self.accelerator.reduce(values, reduction="mean").tolist()
        self.pause_clock()
        seconds, steps = max(self._seconds, 1e-9), self._steps
        self._sums, self._steps, self._seconds = {}, 0, 0.0
        self.resume_clock()
        row = dict(zip(names, values))
        speed = steps * self.training.batch / seconds
        record = {
            "stage": self.name, "images": self.images, **{k: round(v, 6) for k, v in row.items()}, "lr": self.lr,
            "images_per_second": round(speed, 1), "memory_gb": round(peak_memory(self.accelerator.device), 2),
            "seconds": round(seconds, 2),
        }  # fmt: skip
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        if self._board is not None:
            for key, value in record.items():
                if isinstance(value, float):
                    self._board.add_scalar(key, value, self.images)
        status = f"{self.images:,} images  loss {row['loss']:.4f}  {speed:,.0f} img/s"
        self._bar.update(self._task, status=status)

    def _any(self, flag: bool) -> bool:
        """Logical or over processes."""
        if self.accelerator.num_processes == 1:
            return flag
        return self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device)).item() > 0

    def _refuse(self, what: str, batch: dict[str, Any]) -> None:
        path = checkpoint.save_diagnostic(self.folder, self.name, self.images, batch, self.accelerator.process_index)
        raise LatelierError(
            f"Training stopped before the weights were touched: at {self.images:,} images {what}. "
            f"The batch is in {path}; lower lr of the {self.name}, or set its precision: fp32, and run again to go on "
            "from the last checkpoint."
        )

    def _on_signal(self, number: int, _frame: Any) -> None:
        self.stopping = signal.Signals(number).name


def to_device(batch: dict, device: torch.device) -> dict:
    """Tensors of a batch onto the device."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def peak_memory(device: torch.device) -> float:
    """Peak memory in GB: of the accelerator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _signals() -> tuple[signal.Signals, ...]:
    """Signals can be caught in the main thread only."""
    import threading

    in_main = threading.current_thread() is threading.main_thread()
    return (signal.SIGTERM, signal.SIGINT) if in_main else ()


def _tensorboard(folder: Path):
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder, flush_secs=30)
