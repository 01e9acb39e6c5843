"""SIGKILL before every file operation of a run, and in the middle of every write: the same command goes on, and ends
with the same weights, averages, statistics, cache, samples and numbers, bit for bit.

Operations are those of Python (opening to write, writing, syncing, renaming, removing, making folders), and the writes
of safetensors and torch, which are native code. Each is counted, so that a place has a number.

A killed process leaves the folder as it was at that moment, so one run copies its folder at every place, and from every
copy the command goes on; from copies that are equal, once. At every tenth place a run of its own is really killed.
"""

from __future__ import annotations

import builtins
import hashlib
import io
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from faults import tiny
from faults.harness import Outcome, latelier, spread

BEFORE, HALF = "SIGKILL before a file operation", "SIGKILL after half of a write"
IN_SAMPLE = 10  # kills, spread evenly over all
NOT_COUNTING = -2
EVERY = 10  # of all places, one in so many is a real kill
EVENTS = {"os.rename": "rename", "os.remove": "remove", "os.mkdir": "mkdir", "os.rmdir": "rmdir"}


class Shim:
    """Counts the file operations of a run in its main thread.

    Args:
        run: operations on files below this folder count; it is where the command runs, so relative paths are below it.
        target: kill before this operation, or in its middle if it is a write of which `half` is asked for.
        log: append the kind and the path of each operation to this file instead.
        copies: copy the run there at every place instead, into folders as `_name` calls them.
    """

    def __init__(
        self, run: Path, target: int = -1, half: bool = False, log: Path | None = None, copies: Path | None = None
    ):
        self.run, self.target, self.half, self.copies, self.number = str(run), target, half, copies, -1
        self.log = None if log is None else os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def install(self) -> None:
        """From here on."""
        sys.addaudithook(self._audit)
        self._patch_writers()

    def operation(self, kind: str, path: Any) -> bool:
        """Count one; whether to call `halfway` in the middle of its write. Does not return where the kill is before."""
        in_main = threading.current_thread() is threading.main_thread()
        if self.number == NOT_COUNTING or not in_main or not self._counts(path):
            return False
        self.number += 1
        if self.log is not None:
            os.write(self.log, f"{kind} {path}\n".encode())
        if self.copies is not None:
            shutil.copytree(self.run, self.copies / _name(self.number, False))
            return True
        if self.number == self.target and not self.half:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.number == self.target

    def halfway(self) -> None:
        """In the middle of the write that was counted last."""
        if self.copies is None:
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            shutil.copytree(self.run, self.copies / _name(self.number, True))

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
            counted = _Halved(stream, partial(self.operation, "write", file), self.halfway)
            return counted if set(mode) & set("wax+") else stream

        def whole(kind: str, write: Callable[[Any], None], path: Any) -> None:
            """What a native writer writes, where asked for with half of the file on the way."""
            if self.operation(kind, path):
                number, self.number = self.number, NOT_COUNTING
                with tempfile.TemporaryDirectory() as folder:
                    write(elsewhere := os.path.join(folder, "whole"))
                    data = Path(elsewhere).read_bytes()
                with open_file(path, "wb") as file:
                    file.write(data[: len(data) // 2])
                self.number = number
                self.halfway()
            write(path)

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

    def __init__(self, stream: Any, operation: Callable[[], bool], halfway: Callable[[], None]):
        self._stream, self._operation, self._halfway = stream, operation, halfway

    def write(self, data: Any) -> int:
        done = 0
        if self._operation():
            done = self._stream.write(data[: len(data) // 2])
            self._stream.flush()
            self._halfway()
        return done + self._stream.write(data[done:])

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
            return spread(partial(_kill, root, places, whole), chosen[:: -(-len(chosen) // IN_SAMPLE)])
        _copy(root)
        killed = spread(partial(_kill, root, places, whole), chosen[::EVERY])
        alike: dict[str, list[tuple[int, bool]]] = {}  # places between which nothing was written
        for case in (case for i, case in enumerate(chosen) if i % EVERY):
            alike.setdefault(_digest(root / _name(*case)), []).append(case)
        went_on = spread(partial(_go_on, root, places, whole), [cases[0] for cases in alike.values()])
        return killed + [
            replace(outcome, row=_row(half), what=f"{number} {places[number]}")
            for cases, outcome in zip(alike.values(), went_on)
            for number, half in cases
        ]


def _record(root: Path) -> tuple[list[str], dict[str, str]]:
    """All operations of an uninterrupted run, and what it ends with."""
    folder = root / "whole"
    tiny.write_recipe(folder)
    done = latelier(["run", "tiny.yaml"], folder, prepare=_prepared(Shim(folder, log=root / "operations")))
    assert done.clean() == "", done.err
    return (root / "operations").read_text().splitlines(), tiny.contents(folder / "runs" / "tiny")


def _copy(root: Path) -> None:
    """One more run, which copies its folder at every place."""
    folder = root / "copied"
    tiny.write_recipe(folder)
    done = latelier(["run", "tiny.yaml"], folder, prepare=_prepared(Shim(folder, copies=root)), timeout=300)
    assert done.clean() == "", done.err


def _kill(root: Path, places: list[str], whole: dict[str, str], case: tuple[int, bool]) -> Outcome:
    number, half = case
    folder = root / f"killed-{_name(*case)}"
    tiny.write_recipe(folder)
    killed = latelier(["run", "tiny.yaml"], folder, prepare=_prepared(Shim(folder, number, half)))
    if killed.code != -signal.SIGKILL:
        told = f"{number} {places[number]}"
        return Outcome(_row(half), told, f"not reached: exit code {killed.code}: {killed.words[-160:]}")
    return _go_on(root, places, whole, case, folder)


def _go_on(
    root: Path, places: list[str], whole: dict[str, str], case: tuple[int, bool], folder: Path | None = None
) -> Outcome:
    number, half = case
    folder = folder or root / _name(*case)
    done = latelier(["run", "tiny.yaml"], folder, prepare=tiny.light)
    failure = done.clean() or tiny.difference(folder / "runs" / "tiny", whole)
    shutil.rmtree(folder)
    return Outcome(_row(half), f"{number} {places[number]}", failure)


def _digest(folder: Path) -> str:
    """Of all names and contents below a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + (path.read_bytes() if path.is_file() else b"/"))
    return digest.hexdigest()


def _row(half: bool) -> str:
    return HALF if half else BEFORE


def _name(number: int, half: bool) -> str:
    return f"{number}-{'half' if half else 'before'}"


def _prepared(shim: Shim) -> Callable[[], None]:
    def prepare() -> None:
        tiny.light()
        shim.install()

    return prepare
