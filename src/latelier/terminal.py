"""The terminal: where progress and messages go, standard error."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=True)


@contextmanager
def images_bar(title: str, total: int, shown: bool = True, patience: float = 0.0) -> Iterator[Callable[[int], None]]:
    """A bar with images per second and the time that is left; it appears when the work takes longer than `patience`.

    Yields:
        A function to be called with how many more images are done.
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
