"""Forks of a process that has imported everything: each runs one `latelier` command in a second instead of nine.

A section of the harness is a module with `outcomes(sample)`: what it injected, and what failed. Nothing here may start
threads or compute with torch, because forks of such a process hang; what a section needs (a trained run) it makes with
a command, too.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
PROCESSES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Outcome:
    """One injection."""

    row: str  # of the table: "SIGKILL before a file operation"
    what: str  # this one: "12 rename tokenizer", a command line, ...
    failure: str = ""  # what went wrong; empty where latelier did as it promises


@dataclass(frozen=True)
class Done:
    """An ended command."""

    code: int | None  # exit code, minus the signal that ended it, or None: it was still running and was killed
    out: str
    err: str
    seconds: float

    @property
    def words(self) -> str:
        """Everything that it said, in one line."""
        return " ".join((self.out + self.err).split())

    def traceback(self) -> str:
        """The end of the first traceback; empty without one."""
        _, found, rest = (self.out + self.err).partition("Traceback (most recent call last)")
        lines = rest.splitlines()
        end = next((i for i, line in enumerate(lines) if i and line and not line.startswith(" ")), len(lines))
        return f"traceback: {' '.join(' '.join(lines[: end + 1]).split())[-300:]}" if found else ""

    def refused(self) -> str:
        """What is wrong with a refusal, which has exit code 2, one sentence that begins with `Error:`, no traceback."""
        if self.code is None:
            return f"still running after {self.seconds:.0f} s"
        if told := self.traceback():
            return told
        if self.code != 2:
            return f"exit code {self.code}: {self.words[-160:]}"
        return "" if "Error" in self.words else f"no sentence: {self.words[-160:]}"

    def clean(self) -> str:
        """What is wrong with a command that should have done its work."""
        if self.code is None:
            return f"still running after {self.seconds:.0f} s"
        if told := self.traceback():
            return told
        return "" if self.code == 0 else f"exit code {self.code}: {self.words[-160:]}"


class Command:
    """A running `latelier` command, in a process group of its own.

    Args:
        words: of the command line, without `latelier`.
        folder: where it runs.
        prepare: called in the fork before the command: here faults are planted.
        environment: variables beside those of this process.
    """

    def __init__(
        self, words: Sequence[Any], folder: Path, prepare: Callable[[], None] | None = None,
        environment: Mapping[str, str] | None = None,
    ):  # fmt: skip
        self.words, self.begin = [str(word) for word in words], time.monotonic()
        self._said = Path(tempfile.mkdtemp(prefix="latelier-faults-"))
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            self._run(folder, prepare, environment or {})
        self._code: int | None = None

    def _run(self, folder: Path, prepare: Callable[[], None] | None, environment: Mapping[str, str]) -> None:
        """In the fork; never returns."""
        code = 1
        try:
            os.setsid()
            os.chdir(folder)
            for number, name, flags in ((0, os.devnull, os.O_RDONLY), (1, "out", os.O_WRONLY), (2, "err", os.O_WRONLY)):
                path = name if number == 0 else self._said / name
                os.dup2(os.open(path, flags | os.O_CREAT), number)
            os.environ.update(environment)
            sys.argv = ["latelier", *self.words]
            if prepare is not None:
                prepare()
            from latelier import cli

            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def running(self) -> bool:
        """Whether it has not ended."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code is None

    def signal(self, number: int, group: bool = False) -> None:
        """Send a signal, if it has not ended."""
        if self.running():
            (os.killpg if group else os.kill)(self.pid, number)

    def wait(self, timeout: float = 120) -> Done:
        """Wait for the end; kill it when it takes longer."""
        end = time.monotonic() + timeout
        while self.running() and time.monotonic() < end:
            time.sleep(0.005)
        code, seconds = self._code, time.monotonic() - self.begin
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # worker processes, too
        if code is None:
            os.waitpid(self.pid, 0)
        said = {name: path.read_text(errors="replace") for path in self._said.iterdir() if (name := path.name)}
        for path in self._said.iterdir():
            path.unlink()
        self._said.rmdir()
        return Done(code, said.get("out", ""), said.get("err", ""), seconds)


def latelier(words: Sequence[Any], folder: Path, timeout: float = 120, **options: Any) -> Done:
    """Run a command to its end; options are those of `Command`."""
    return Command(words, folder, **options).wait(timeout)


def spread(judge: Callable[[T], Outcome], cases: Iterable[T]) -> list[Outcome]:
    """The outcome of each case, in several processes; a case that raises is a failure of its own."""
    listed, pids = list(cases), []
    with tempfile.TemporaryDirectory(prefix="latelier-faults-") as folder:
        for process in range(min(PROCESSES, len(listed))):
            pid = os.fork()
            if not pid:
                code = 1
                with suppress(BaseException), (Path(folder) / str(process)).open("w") as file:
                    for number in range(process, len(listed), PROCESSES):
                        file.write(json.dumps([number, asdict(_judged(judge, listed[number]))]) + "\n")
                        file.flush()
                    code = 0
                os._exit(code)
            pids.append(pid)
        for pid in pids:
            os.waitpid(pid, 0)
        lines = [line for path in Path(folder).iterdir() for line in path.read_text().splitlines()]
        found = {number: Outcome(**fields) for number, fields in map(json.loads, lines)}
    return [found.get(i) or Outcome("the harness", str(case)[:80], "died") for i, case in enumerate(listed)]


def _judged(judge: Callable[[T], Outcome], case: T) -> Outcome:
    try:
        return judge(case)
    except Exception as error:
        return Outcome("the harness", str(case)[:80], f"{type(error).__name__}: {error}")
