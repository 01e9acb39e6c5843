"""SIGKILL before every file operation of a run, and in the middle of every write: the same command goes on, and ends
with the same weights, averages, statistics, cache, samples and numbers, bit for bit.

Operations are those of Python (opening to write, writing, syncing, renaming, removing, making folders), and the writes
of safetensors and torch, which are native code. Each is counted, so that a place has a number.
"""

from __future__ import annotations

import builtins
import io
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from faults import tiny
from faults.harness import Outcome, latelier, spread

BEFORE, HALF = "SIGKILL before a file operation", "SIGKILL after half of a write"
IN_SAMPLE = 10  # kills, spread evenly over all
EVENTS = {"os.rename": "rename", "os.remove": "remove", "os.mkdir": "mkdir", "os.rmdir": "rmdir"}


class Shim:
    """Counts the file operations of a run in its main thread.

    Args:
        run: operations on files below this folder count; it is where the command runs, so relative paths are below it.
        target: kill before this operation, or in its middle if it is a write of which `half` is asked for.
        log: append the kind and the path of each operation to this file instead.
    """

    def __init__(self, run: Path, target: int = -1, half: bool = False, log: Path | None = None):
        self.run, self.target, self.half, self.number = str(run), target, half, -1
        self.log = None if log is None else os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def install(self) -> None:
        """From here on."""
        sys.addaudithook(self._audit)
        self._patch_writers()

    def operation(self, kind: str, path: Any) -> bool:
        """Count one; whether half of its write is asked for. Does not return where the kill is before it."""
        if threading.current_thread() is not threading.main_thread() or not self._counts(path):
            return False
        self.number += 1
        if self.log is not None:
            os.write(self.log, f"{kind} {path}\n".encode())
        if self.number == self.target and not self.half:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.number == self.target

    def _counts(self, path: Any) -> bool:
        name = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
        return bool(name) and (not os.path.isabs(name) or name.startswith(self.run))

    def _audit(self, event: str, args: tuple) -> None:
        if event == "os.mkdir" and os.path.isdir(args[0]):
            return
        if event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self.operation("open", args[0])
        elif event in EVENTS:
            self.operation(EVENTS[event], args[0])

    def _patch_writers(self) -> None:
        import safetensors.torch
        import torch

        open_file, serialize, save, sync = io.open, safetensors.torch.serialize_file, torch.save, os.fsync

        def synced(handle: int) -> None:
            self.operation("sync", os.readlink(f"/proc/self/fd/{handle}"))
            sync(handle)

        def opened(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
            stream = open_file(file, mode, *rest, **options)
            return _Halved(stream, partial(self.operation, "write", file)) if set(mode) & set("wax+") else stream

        def whole(kind: str, write: Callable[[Any], None], path: Any) -> None:
            """Half of the file that a native writer would have written."""
            if not self.operation(kind, path):
                write(path)
                return
            write(elsewhere := os.path.join(tempfile.mkdtemp(), "whole"))
            data = Path(elsewhere).read_bytes()
            with open_file(path, "wb") as file:
                file.write(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

        def saved(thing: Any, path: Any, *rest: Any, **options: Any) -> None:
            if isinstance(path, str | os.PathLike):
                whole("torch", lambda to: save(thing, to, *rest, **options), path)
            else:
                save(thing, path, *rest, **options)

        safetensors.torch.serialize_file = lambda tensors, path, **options: whole(
            "safetensors", lambda to: serialize(tensors, to, **options), path
        )
        torch.save, os.fsync = saved, synced
        io.open = builtins.open = opened


class _Halved:
    """A file opened for writing whose writes are counted."""

    def __init__(self, stream: Any, operation: Callable[[], bool]):
        self._stream, self._operation = stream, operation

    def write(self, data: Any) -> int:
        if self._operation():
            self._stream.write(data[: len(data) // 2])
            self._stream.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return self._stream.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> _Halved:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stream.close()

    def __iter__(self) -> Any:
        return iter(self._stream)


def outcomes(sample: bool) -> list[Outcome]:
    """Kill a run at every place, in the sample at ten, and go on."""
    with tempfile.TemporaryDirectory(prefix="latelier-kills-") as folder:
        root = Path(folder)
        places, whole = _record(root)
        chosen = [(number, False) for number in range(len(places))]
        chosen += [(n, True) for n, place in enumerate(places) if place.split()[0] in ("write", "safetensors", "torch")]
        if sample:
            chosen = chosen[:: -(-len(chosen) // IN_SAMPLE)]
        return spread(partial(_kill, root, places, whole), chosen)


def _record(root: Path) -> tuple[list[str], dict[str, str]]:
    """All operations of an uninterrupted run, and what it ends with."""
    folder = root / "whole"
    tiny.write_recipe(folder)
    done = latelier(["run", "tiny.yaml"], folder, prepare=_prepared(Shim(folder, log=root / "operations")))
    assert done.clean() == "", done.err
    return (root / "operations").read_text().splitlines(), tiny.contents(folder / "runs" / "tiny")


def _kill(root: Path, places: list[str], whole: dict[str, str], case: tuple[int, bool]) -> Outcome:
    number, half = case
    folder = root / f"{number}-{half}"
    tiny.write_recipe(folder)
    killed = latelier(["run", "tiny.yaml"], folder, prepare=_prepared(Shim(folder, number, half)))
    told = f"{number} {places[number]}"
    if killed.code != -signal.SIGKILL:
        return Outcome(HALF if half else BEFORE, told, f"not reached: exit code {killed.code}: {killed.words[-160:]}")
    done = latelier(["run", "tiny.yaml"], folder, prepare=tiny.light)
    failure = done.clean() or tiny.difference(folder / "runs" / "tiny", whole)
    shutil.rmtree(folder)
    return Outcome(HALF if half else BEFORE, told, failure)


def _prepared(shim: Shim) -> Callable[[], None]:
    def prepare() -> None:
        tiny.light()
        shim.install()

    return prepare
