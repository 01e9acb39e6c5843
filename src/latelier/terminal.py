"""The terminal: messages, progress and signals.

SIGTERM and SIGINT: a training step is finished and saved first; anywhere else the command ends at once, cleanly.
Everything that is written appears whole (`latelier.publish`), so a command may end between any two lines and the same
command goes on from there. A second signal never waits.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=True)  # where messages and progress go: standard error

Handler = Callable[[int, FrameType | None], None]
PATIENCE = 5.0  # seconds before work that is mostly quick shows a bar
T = TypeVar("T")
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def say(words: str) -> None:
    """One line, however long, as it is."""
    console.print(words, highlight=False, markup=False, soft_wrap=True)


def is_screen() -> bool:
    """Whether bars can move where messages go; files and pipes get `Lines`."""
    return console.is_terminal or console.is_jupyter


class Lines:
    """Progress as plain lines: at once or after `patience` seconds, 10 seconds later, and then every 30."""

    def __init__(self, title: str, total: int, done: int = 0, patience: float = 0.0, unit: str = "images"):
        self.title, self.total, self.done, self.unit = title, total, done, unit
        self._from, self._begin, self._waits = done, time.monotonic(), iter((10.0,))
        self._next = self._begin + patience
        self.update(0)

    def update(self, more: int, words: str = "") -> None:
        """So much more is done; a line is printed if one is due, `words` at its end."""
        self.done, now = self.done + more, time.monotonic()
        if now >= self._next:
            self._next = now + next(self._waits, 30.0)
            speed = (self.done - self._from) / max(now - self._begin, 1e-9)
            parts = [f"{self.title}: {self.done:,} of {self.total:,} {self.unit}"]
            if speed:
                left = timedelta(seconds=round(max(0, self.total - self.done) / speed))
                parts += [f"{speed:,.1f} a second", f"{left} left"]
            say(", ".join([*parts, words] if words else parts))


@contextmanager
def images_bar(title: str, total: int, shown: bool = True, patience: float = 0.0) -> Iterator[Callable[[int], None]]:
    """A bar with speed and time left, or `Lines`, shown when the work takes longer than `patience` seconds.

    Yields a function to be called with how many more images are done.
    """
    if shown and not is_screen():
        yield Lines(title, total, patience=patience).update
        return
    speed = TextColumn("{task.fields[speed]}")
    columns = (TextColumn(f"[bold]{title}"), BarColumn(), MofNCompleteColumn(), speed, TimeRemainingColumn())
    bar = Progress(*columns, console=console, disable=not shown, transient=patience > 0)
    task, begin = bar.add_task(title, total=total, speed=""), time.perf_counter()

    def advance(images: int) -> None:
        bar.update(task, advance=images, speed=f"{bar.tasks[0].speed or 0:,.0f} img/s")
        if not bar.live.is_started and time.perf_counter() - begin >= patience:
            bar.start()

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()


def counted(title: str, batches: Iterable[T], total: int, shown: bool = True) -> Iterator[T]:
    """Batches, images or dicts with `image`, with a bar that appears if they take long."""
    with images_bar(title, total, shown, PATIENCE) as advance:
        for batch in batches:
            yield batch
            advance(len(batch["image"] if isinstance(batch, dict) else batch))  # type: ignore[arg-type]


class Stopped(BaseException):
    """The command was asked to stop; `str` is the signal's name. No `except Exception` on the way holds it up."""


def stop_now(number: int, _frame: FrameType | None = None) -> None:
    """Handler that ends the command where it is."""
    raise Stopped(signal.Signals(number).name)


@contextmanager
def handled_by(handler: Handler) -> Iterator[None]:
    """Signals call this handler meanwhile; in threads, where they cannot be caught, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def ignore_in_worker(_worker: int) -> None:
    """For worker processes: the process that started them hears the signal and ends them."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
