"""SIGTERM and SIGINT at any moment of a run, to the process and to its group, with and without worker processes.

The command ends within ten seconds, with exit code 0 and one sentence; the same command goes on, and ends with what an
uninterrupted run has. A second signal ends it at once.
"""

from __future__ import annotations

import random
import shutil
import signal
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

from faults import tiny
from faults.harness import Command, Outcome, latelier, spread

MOMENTS, IN_SAMPLE, PATIENCE, AT_ONCE = 3, 1, 10.0, 2.0
WORKERS = {"data": {"in_memory": False, "workers": 2}}


class Case(NamedTuple):
    number: signal.Signals
    group: bool
    workers: bool
    twice: bool
    share: float  # of the duration of a run


def outcomes(sample: bool) -> list[Outcome]:
    """Signals of both kinds at random moments."""
    chance = random.Random(0)
    kinds = [
        (number, group, workers, twice)
        for number in (signal.SIGTERM, signal.SIGINT)
        for group in (False, True)
        for workers in (False, True)
        for twice in (False, True)
    ]
    if sample:
        kinds = kinds[:1] + kinds[6::5]
    cases = [Case(*kind, chance.random()) for kind in kinds for _ in range(IN_SAMPLE if sample else MOMENTS)]
    with tempfile.TemporaryDirectory(prefix="latelier-signals-") as folder:
        root = Path(folder)
        wholes = {workers: _whole(root, workers) for workers in {case.workers for case in cases}}
        return spread(partial(_interrupt, root, wholes), list(enumerate(cases)))


def _whole(root: Path, workers: bool) -> tuple[dict[str, str], float]:
    folder = root / f"whole-{workers}"
    tiny.write_recipe(folder, **WORKERS if workers else {})
    done = latelier(["run", "tiny.yaml"], folder, prepare=tiny.light)
    assert done.clean() == "", done.err
    return tiny.contents(folder / "runs" / "tiny"), done.seconds


def _interrupt(root: Path, wholes: dict[bool, tuple[dict[str, str], float]], numbered: tuple[int, Case]) -> Outcome:
    case, folder = numbered[1], root / str(numbered[0])
    whole, seconds = wholes[case.workers]
    tiny.write_recipe(folder, **WORKERS if case.workers else {})
    started = folder / "started"
    command = Command(["run", "tiny.yaml"], folder, prepare=lambda: (tiny.light(), started.touch()))
    while not started.exists():
        time.sleep(0.002)
    time.sleep(0.02 + case.share * seconds)
    late, begin = not command.running(), time.monotonic()
    command.signal(case.number, case.group)
    if case.twice:
        time.sleep(0.05)
        command.signal(case.number, case.group)
    done = command.wait(60)
    took = time.monotonic() - begin
    failure = done.clean() or _said(done.err, late or "Report:" in done.out + done.err)
    if not failure and took > (AT_ONCE if case.twice else PATIENCE):
        failure = f"took {took:.1f} s"
    if not failure:
        again = latelier(["run", "tiny.yaml"], folder, prepare=tiny.light)
        failure = again.clean() or tiny.difference(folder / "runs" / "tiny", whole)
    shutil.rmtree(folder, ignore_errors=True)
    to = f"{'the group' if case.group else 'the process'}{', with workers' if case.workers else ''}"
    row = f"{case.number.name} {'twice ' if case.twice else ''}at a random moment of a run"
    return Outcome(row, f"to {to}, after {case.share * seconds:.2f} s", failure)


def _said(words: str, finished: bool) -> str:
    count = " ".join(words.split()).count("Stopped by")
    return "" if count == 1 or (finished and not count) else f"{count} sentences: {words[-200:]}"
