"""Several processes in one run: they equal one process, and when one dies, hangs or finds its disk full, all end within
a stated time, each with one sentence, and one process goes on from what is saved.
"""

from __future__ import annotations

import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path

from faults import tiny
from faults.harness import Command, Outcome, latelier
from faults.storage import _mounted

TIMES = 5  # each fault, in the sample once
WAIT = 0.1  # minutes that a process waits for another one here: LATELIER_TIMEOUT
PATIENCE = 10.0  # seconds beside that


def outcomes(sample: bool) -> list[Outcome]:
    """Groups without faults, then with one."""
    chance = random.Random(0)
    with tempfile.TemporaryDirectory(prefix="latelier-processes-") as folder:
        root = Path(folder)
        tiny.write_recipe(root / "one")
        one = latelier(["run", "tiny.yaml"], root / "one", prepare=tiny.light)
        found = [_equal(root, count) for count in ((2,) if sample else (2, 4))]
        killed = partial(_lost, "a process of two is killed", signal.SIGKILL)
        hanging = partial(_lost, "a process of two hangs", signal.SIGSTOP)
        faults = ((killed, "kill"), (hanging, "stop"), (_asked, "SIGTERM"))
        for number in range(1 if sample else TIMES):
            moment = chance.uniform(0.3, 0.9) * one.seconds
            found += [fault(root / f"{name}-{number}", moment) for fault, name in faults]
        return found if sample else [*found, *(_full(root / f"full-{n}", chance) for n in range(TIMES))]


def _group(folder: Path, count: int = 2) -> list[Command]:
    """`latelier run tiny.yaml` as launchers start it, one process for each rank."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": port, "LATELIER_TIMEOUT": str(WAIT)}
    common |= {"ACCELERATE_USE_CPU": "true", "LOCAL_WORLD_SIZE": str(count)}
    ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return [Command(["run", "tiny.yaml"], folder, tiny.light, environment=rank) for rank in ranks]


def _equal(root: Path, count: int) -> Outcome:
    """The weights of one process, up to the rounding of sums in another order."""
    folder = root / f"equal-{count}"
    tiny.write_recipe(folder)
    done = [command.wait(240) for command in _group(folder, count)]
    failure = next(filter(None, (one.clean() for one in done)), "") or _far(root / "one", folder)
    return Outcome(f"{count} processes equal one", "weights of tokenizer and denoiser", failure)


def _far(one: Path, other: Path) -> str:
    from safetensors.numpy import load_file

    for part in ("tokenizer", "pipeline/denoiser"):
        weights = [load_file(f / "runs/tiny" / part / "diffusion_pytorch_model.safetensors") for f in (one, other)]
        for name, expected in weights[0].items():
            if (far := abs(expected - weights[1][name]).max()) > 1e-4:
                return f"{part} {name} differs by {far}"
    return ""


def _lost(row: str, number: signal.Signals, folder: Path, moment: float) -> Outcome:
    """The second process dies or stops; launchers kill what is left of it.

    A fault that comes after the last thing that the first one waits for is none: that one ends with its report.
    """
    tiny.write_recipe(folder)
    commands = _group(folder)
    time.sleep(moment)
    commands[1].signal(number)
    rest = commands[0].wait(60 * WAIT + PATIENCE)
    finished = (folder / "runs" / "tiny" / "report.html").is_file() and rest.clean() == ""
    failure = "" if finished else rest.refused()
    commands[1].wait(0)
    return Outcome(row, f"after {moment:.2f} s", failure or _goes_on(folder))


def _asked(folder: Path, moment: float) -> Outcome:
    """Schedulers ask all processes."""
    tiny.write_recipe(folder)
    commands = _group(folder)
    time.sleep(moment)
    for command in commands:
        command.signal(signal.SIGTERM)
    failure = "; ".join(filter(None, [command.wait(60 * WAIT + PATIENCE).clean() for command in commands]))
    return Outcome("SIGTERM to two processes", f"after {moment:.2f} s", failure or _goes_on(folder))


def _full(folder: Path, chance: random.Random) -> Outcome:
    size = 4096 * chance.randrange(20, 200)
    row, what = "a full disk under two processes", f"{size:,} bytes"
    try:
        with _mounted(folder, size):
            tiny.write_recipe(folder)
            first, second = [command.wait(60 * WAIT + PATIENCE) for command in _group(folder)]
            return Outcome(row, what, first.refused() or second.refused())
    except subprocess.CalledProcessError:
        return Outcome(row, "left out: a tmpfs cannot be mounted here")


def _goes_on(folder: Path) -> str:
    """What is wrong when one process goes on from what two have saved."""
    done = latelier(["run", "tiny.yaml"], folder, prepare=tiny.light)
    shutil.rmtree(folder)
    return done.clean()
