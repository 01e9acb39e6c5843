"""The terminal: messages, progress and signals.

SIGTERM and SIGINT: a training step is finished and saved first; anywhere else the command ends at once, cleanly.
Everything that is written appears whole (`latelier.publish`), so a command may end between any two lines and the same
command goes on from there. A second signal never waits.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=True)  # where messages and progress go: standard error

Handler = Callable[[int, FrameType | None], None]
SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def images_bar(title: str, total: int, shown: bool = True, patience: float = 0.0) -> Iterator[Callable[[int], None]]:
    """A bar with speed and time left, shown when the work takes longer than `patience` seconds.

    Yields a function to be called with how many more images are done.
    """
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
