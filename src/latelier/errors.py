"""The one error that a user is meant to read."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class LatelierError(Exception):
    """Bad input: one sentence with the offending value and what to do.

    The command line prints the sentence and exits with code 2; anything else that escapes is a bug and keeps its
    traceback.
    """


@contextmanager
def reading(what: str, advice: str) -> Iterator[None]:
    """Where what a stranger's file makes libraries raise becomes a sentence: what has gone wrong, and what to do."""
    try:
        yield
    except Exception as error:  # a damaged or hostile file can make its reader raise anything
        raise LatelierError(f"{what} ({first_line(error)}); {advice}.") from None


def first_line(error: BaseException) -> str:
    """An error in a few words."""
    line = (str(error).strip().splitlines() or [""])[0].rstrip(".")[:200]
    return line if isinstance(error, LatelierError | OSError) else f"{type(error).__name__}: {line}"


def check_whole(least: int = 1, **sizes: Any) -> None:
    """Refuse sizes of a network that are no whole numbers, `least` or more."""
    for name, value in sizes.items():
        if type(value) is not int or value < least:
            raise LatelierError(f"{name} = {value!r} is not allowed; it should be a whole number, {least} or more.")
