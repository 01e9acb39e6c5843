"""What both training loops need around the step: device and precision, learning rate, log, progress, stopping.

Nothing here decides what is learned; that is the objective's business.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from latelier.errors import LatelierError
from latelier.layers import fast_bf16
from latelier.losses.terms import LossTerms
from latelier.opening import best_device
from latelier.recipe import Recipe, Training
from latelier.terminal import Lines, console, handled_by, is_screen, stop_now
from latelier.training import checkpoint
from latelier.training.step import FiniteCheck, NotFinite, clip_gradients, learning_rate


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
        self.measured: dict[str, float] = {}  # of the weights after this step, for the log
        self.reached = False  # whether that ends training sooner than its images
        self.stopping: str | None = None
        self.micro = training.micro_batch or -(-training.batch // accelerator.num_processes)
        self.accumulation, rest = divmod(training.batch, self.micro * accelerator.num_processes)
        if rest:
            raise LatelierError(
                f"{name}.batch = {training.batch} is not a multiple of micro_batch {self.micro} "
                f"x {accelerator.num_processes} processes."
            )
        self.learning_rate = 0.0
        self._finite = FiniteCheck(accelerator)
        self._sums: dict[str, tuple[Tensor | float, float]] = {}
        self._steps = 0
        self._clock = time.monotonic()
        self._seconds, self._loss, self._seen = 0.0, "", ""

    # -- the step -----------------------------------------------------------------------------------------------------

    def micro_batches(self, stream: Iterator[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], bool]]:
        """The micro-batches of one optimiser step, on the device, and whether each is the last."""
        for micro in range(self.accumulation):
            batch = {**next(stream), "seen": self.images}
            yield to_device(batch, self.accelerator.device), micro == self.accumulation - 1

    def set_learning_rate(self, optimizer: torch.optim.Optimizer, lr: float | None = None) -> None:
        """Set the rate of the coming step, on the stage's schedule; `lr` is its full rate, by default the stage's."""
        t = self.training
        rate = learning_rate(self.images, t.images, t.batch, lr or t.lr, t.warmup, t.schedule, t.final_lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        if lr is None:
            self.learning_rate = rate

    def accumulate(self, model: nn.Module, last: bool) -> AbstractContextManager:
        """Around forward and backward: gradients are averaged over processes on the last micro-batch only."""
        return nullcontext() if last else self.accelerator.no_sync(model)

    def backward(self, terms: LossTerms, total: str = "loss") -> None:
        """Add the gradients of one micro-batch; its terms are logged and their finiteness is noted, not read.

        Args:
            terms: of the micro-batch.
            total: the name under which the weighted sum is logged.
        """
        self.accelerator.backward(terms.total / self.accumulation)
        values = {total: terms.total, **terms.losses}
        for name, value in values.items():
            self._count(name, value.detach().float(), 1 / self.accumulation)
        names, losses = list(terms.losses), torch.stack([value.detach().float() for value in terms.losses.values()])
        self._finite.watch((f"the loss term {name} is not finite" for name in names), losses)

    def clip(self, model: nn.Module, name: str = "grad_norm") -> None:
        """Clip gradients to the recipe's norm."""
        norm, names, norms = clip_gradients(model, self.training.clip)
        self._finite.watch((f"the gradient of {parameter} is not finite" for parameter in names), norms)
        self._count(name, norm.detach().float(), 1.0)

    def check(self, batch: dict[str, Any]) -> Tensor | None:
        """One look at all numbers of the step, before the update.

        Returns:
            What `optimizer.step` takes as `skip`: a flag on the device where the answer is not known yet, else None.

        Raises:
            LatelierError: if a loss term or a gradient is not finite; weights were not touched.
        """
        try:
            skip = self._finite.answer(self.stopping is not None, (batch, self.images))
        except NotFinite as error:
            self._refuse(error)
        return skip if self._finite.deferred else None

    def settle(self) -> None:
        """Wait for the answer to the last step's check, before anything is saved."""
        try:
            self._finite.settle()
        except NotFinite as error:
            self._refuse(error)

    def advance(self) -> None:
        """One optimiser step is done: count it, move the bar, write the log when due, or if something was measured."""
        self.images += self.training.batch
        self._steps += 1
        self._bar.update(self._task, completed=self.images)
        for name, value in self.measured.items():
            self._sums[name] = (value, 1.0)
            self._seen = f"  {name} {value:.2f}"
        if self.measured or self.due(self.training.log_every):
            self._log()
        if self._lines is not None:
            self._lines.update(self.training.batch, self._loss + self._seen)

    def _count(self, name: str, value: Tensor, weight: float) -> None:
        """Add to a logged mean."""
        total, weights = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (total + weight * value, weights + weight)

    def due(self, every: int) -> bool:
        """Whether a multiple of `every` images was passed by the last step, or training ended."""
        return self.ended or passes(self.images, self.training.batch, every)

    @property
    def ended(self) -> bool:
        """Whether nothing is left to train."""
        return self.reached or self.images >= self.training.images

    # -- begin and end ------------------------------------------------------------------------------------------------

    @contextmanager
    def running(self) -> Iterator[None]:
        """Progress bar, log files, and signals that finish the step before they stop."""
        self.folder.mkdir(parents=True, exist_ok=True)
        main = self.accelerator.is_main_process
        self._file = (self.folder / "log.jsonl").open("a") if main else None
        self._board = _tensorboard(self.folder / "tensorboard" / self.name) if main else None
        self._bar = Progress(
            SpinnerColumn(), TextColumn("[bold]{task.description}"), BarColumn(), TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(), console=console, disable=not (main and is_screen()), refresh_per_second=2,
        )  # fmt: skip
        self._lines = None if not main or is_screen() else Lines(self.name, self.training.images, self.images)
        self._task = self._bar.add_task(self.name, total=self.training.images, completed=self.images, status="")
        self._clock = time.monotonic()
        try:
            with self._bar, handled_by(self._on_signal):
                yield
        finally:
            for sink in (self._file, self._board):
                if sink is not None:
                    sink.close()

    def should_stop(self) -> bool:
        """Whether any process was asked to stop; the same answer on all of them, which several know one step later."""
        return self._finite.stop if self.accelerator.num_processes > 1 else self.stopping is not None

    def exit_resumable(self) -> None:
        """Tell how to go on, and leave with exit code 0."""
        if self.accelerator.is_main_process:
            console.print(
                f"Stopped by {self.stopping or 'another process'} at {self.images:,} images; everything is saved. "
                "Run the same command again to go on from here."
            )
        self.accelerator.wait_for_everyone()
        sys.exit(0)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Previews and checkpoints do not count as training time."""
        self._seconds += time.monotonic() - self._clock
        yield
        self._clock = time.monotonic()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _log(self) -> None:
        names = sorted(self._sums)
        means = [torch.as_tensor(total / weights) for total, weights in (self._sums[name] for name in names)]
        values = torch.stack([mean.to(self.accelerator.device) for mean in means])
        values = self.accelerator.reduce(values, reduction="mean").tolist()
        now = time.monotonic()
        seconds, steps = max(self._seconds + now - self._clock, 1e-9), self._steps
        self._sums, self._steps, self._seconds, self._clock = {}, 0, 0.0, now
        row = dict(zip(names, values))
        speed = steps * self.training.batch / seconds
        record = {
            "stage": self.name, "images": self.images, **{k: round(v, 6) for k, v in row.items()},
            "lr": self.learning_rate,
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
        self._loss = f"loss {row['loss']:.4f}"
        self._bar.update(self._task, status=f"{self.images:,} images  {self._loss}{self._seen}  {speed:,.0f} img/s")

    def _refuse(self, error: NotFinite) -> NoReturn:
        batch, images = error.step
        path = checkpoint.save_diagnostic(self.folder, self.name, images, batch, self.accelerator.process_index)
        raise LatelierError(
            f"Training stopped before the weights were touched: at {images:,} images {error.what}. "
            f"The batch is in {path}; lower lr of the {self.name}, or set its precision: fp32, and run again with "
            "--accept-changes to go on from the last checkpoint."
        ) from None

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.stopping is not None:  # a second signal does not wait for the step
            stop_now(number, frame)
        self.stopping = signal.Signals(number).name


@contextmanager
def keep_random(device: torch.device) -> Iterator[None]:
    """What is done meanwhile draws from the global generators without moving them for what is trained."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def passes(images: int, batch: int, every: int) -> bool:
    """Whether the step that ends at `images` passes a multiple of `every`."""
    return images // every > (images - batch) // every


def to_device(batch: dict, device: torch.device) -> dict:
    """Tensors of a batch onto the device."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def peak_memory(device: torch.device) -> float:
    """Peak memory in GB: of the accelerator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _tensorboard(folder: Path):
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder, flush_secs=30)
