"""SIGTERM and SIGINT: a training step is finished and saved first; anywhere else the command ends at once, cleanly.

Everything that is written appears whole (`latelier.publish`), so a command may end between any two lines and the same
command goes on from there. A second signal never waits.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], None]
SIGNALS = (signal.SIGTERM, signal.SIGINT)


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
