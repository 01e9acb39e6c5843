"""What users read when something is wrong: `LatelierError`, and what other exceptions mean that are no bugs of ours."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_STORAGE = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the quota of this disk is used up; free some space",
    errno.EROFS: "the disk is read-only; choose a folder that can be written",
    errno.EACCES: "permission denied; choose a folder of your own",
    errno.EPERM: "this is not permitted; choose a folder of your own",
    errno.EIO: "the disk reports an error; check it",
}
_WRITING = ("pytorchstreamwriter", "no space left", "unexpected pos", "file write failed", "iostream error")
_MEMORY = ("can't allocate memory", "cannot allocate memory", "out of memory")
_PEERS = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "timed out waiting")


class LatelierError(Exception):
    """Bad input: one sentence with the offending value and what to do.

    The command line prints the sentence and exits with code 2; anything else that escapes is a bug and keeps its
    traceback, unless `explain` knows what it means.
    """


class NotMeasurable(LatelierError):
    """A number that these images, or this model, do not allow: it is left out, and everything else is measured."""


def explain(error: BaseException) -> str | None:
    """One sentence for an exception that says something of disk, memory, files or other processes; else None."""
    text, kind = " ".join(str(error).split()), type(error).__name__
    small = text.lower()
    if isinstance(error, MemoryError) or any(words in small for words in _MEMORY) or kind == "OutOfMemoryError":
        return f"There is not enough memory ({text or kind}); make batch, micro_batch or the images smaller."
    if isinstance(error, OSError) and error.errno is not None:
        about = _STORAGE.get(error.errno)
        if about is not None:
            return f"{error.filename or 'A file'} could not be written or read: {about}, and run this command again."
        return f"{error.filename or 'A file'}: {os.strerror(error.errno).lower()}; check the path."
    if failed_to_write(error):
        return f"A file could not be written ({text}); free some space and run the same command again."
    if kind == "SafetensorError":
        return f"A .safetensors file is damaged ({text}); make it again, or download it again."
    if isinstance(error, RuntimeError) and _of_group() and (kind.startswith("Dist") or any(w in small for w in _PEERS)):
        return (
            f"Another process of this run ended or did not answer in time ({text[:200]}). What was finished is saved; "
            "run the same command again to go on from there."
        )
    if isinstance(error, OSError):  # of libraries, which say it in words
        return text.split(". ")[0].rstrip(".") + "." if text else None
    if isinstance(error, UnicodeDecodeError | RecursionError) or kind == "JSONDecodeError":
        return f"A file is not what its name says ({kind}: {text[:200]}); check the files that you named."
    return None


def failed_to_write(error: BaseException) -> bool:
    """Whether a native writer, which raises no `OSError`, found its disk full."""
    return any(words in str(error).lower() for words in _WRITING)


def _of_group() -> bool:
    return "LOCAL_RANK" in os.environ or "RANK" in os.environ


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
