"""A disk that fills up at any byte, a disk that cannot be written, files of a run that are damaged.

Each answer is one sentence, or the work is done all the same. With space again, the same command ends with what an
uninterrupted run has; after damage it ends with that, or says what is damaged and what to do. Full disks are small
tmpfs mounts, which need root; without it they are left out, and the table says so.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from faults import tiny
from faults.harness import Outcome, latelier, spread

SIZES, IN_SAMPLE = 40, 2
FULL, READ_ONLY, DAMAGED = "a disk that is full at some byte", "a read-only disk", "a damaged file of a run"
COMMANDS = (  # on a run that is finished, on a disk that cannot be written
    "run tiny.yaml", "run runs/tiny", "train tokenizer tiny.yaml", "train denoiser tiny.yaml",
    "encode tiny.yaml --overwrite", "evaluate runs/tiny", "report runs/tiny", "sample runs/tiny --count 2 --steps 1",
    "inspect runs/tiny --data emoji --size 16 --samples 4 --out inspection", "run tiny.yaml name=other",
)  # fmt: skip
HARMS = {
    "truncated": lambda data, chance: data[: chance.randrange(max(1, len(data)))],
    "flipped": lambda data, chance: _flip(data, chance.randrange(8 * max(1, len(data)))),
    "emptied": lambda data, chance: b"",
    "zeroed": lambda data, chance: bytes(len(data)),
    "removed": lambda data, chance: None,
}


def outcomes(sample: bool) -> list[Outcome]:
    """Full and read-only disks, damage of files."""
    with tempfile.TemporaryDirectory(prefix="latelier-storage-") as folder:
        root = Path(folder)
        whole = root / "whole"
        tiny.write_recipe(whole)
        done = latelier(["run", "tiny.yaml"], whole, prepare=tiny.light)
        assert done.clean() == "", done.err
        contents = tiny.contents(whole / "runs" / "tiny")
        found = list(_disks(root, whole, contents, sample))
        files = [path.relative_to(whole) for path in sorted((whole / "runs").rglob("*")) if path.is_file()]
        harms = [(number, str(file), harm) for number, file in enumerate(files) for harm in HARMS]
        chance = random.Random(0)
        harms = chance.sample(harms, 4 if sample else 110)
        return found + spread(partial(_damage, root, whole, contents), harms)


def _disks(root: Path, whole: Path, contents: dict[str, str], sample: bool) -> Iterator[Outcome]:
    try:
        with _mounted(root / "try", 1 << 20):
            pass
    except (OSError, subprocess.CalledProcessError):
        yield Outcome(FULL, "left out: a tmpfs cannot be mounted here")
        return
    needed = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    chance = random.Random(1)
    sizes = [4096 * max(1, int(chance.uniform(0.01, 1) * needed / 4096)) for _ in range(IN_SAMPLE if sample else SIZES)]
    yield from spread(partial(_fill, root, contents, 2 * needed), list(enumerate(sizes)))
    yield from spread(partial(_read_only, root, whole), list(enumerate(COMMANDS[:: 4 if sample else 1])))


@contextmanager
def _mounted(folder: Path, size: int) -> Iterator[Path]:
    folder.mkdir(parents=True)
    _mount("-t", "tmpfs", "-o", f"size={size},nr_inodes=0", "tmpfs", folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def _mount(*words: str | Path) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)


def _fill(root: Path, contents: dict[str, str], enough: int, numbered: tuple[int, int]) -> Outcome:
    number, size = numbered
    with _mounted(root / f"full-{number}", size) as folder:
        tiny.write_recipe(folder)
        done = latelier(["run", "tiny.yaml"], folder, prepare=tiny.light)
        failure = done.refused() if done.code else done.clean()
        if not failure:
            _mount("-o", f"remount,size={4 * enough}", folder)
            again = latelier(["run", "tiny.yaml"], folder, prepare=tiny.light)
            failure = again.clean() or tiny.difference(folder / "runs" / "tiny", contents)
    return Outcome(FULL, f"{size:,} bytes", failure)


def _read_only(root: Path, whole: Path, numbered: tuple[int, str]) -> Outcome:
    number, command = numbered
    with _mounted(root / f"read-only-{number}", 1 << 28) as folder:
        shutil.copytree(whole, folder, dirs_exist_ok=True)
        _mount("-o", "remount,ro", folder)
        done = latelier(command.split(), folder, prepare=tiny.light)
    return Outcome(READ_ONLY, command, done.refused() if done.code else done.clean())


def _damage(root: Path, whole: Path, contents: dict[str, str], case: tuple[int, str, str]) -> Outcome:
    number, name, harm = case
    folder = root / f"damaged-{number}-{harm}"
    shutil.copytree(whole, folder)
    data = HARMS[harm]((folder / name).read_bytes(), random.Random(number))
    if data is None:
        os.unlink(folder / name)
    else:
        (folder / name).write_bytes(data)
    run = folder / "runs" / "tiny"
    if "checkpoints" in name:  # needed only where a stage is not finished
        shutil.rmtree(run / ("pipeline" if "denoiser" in name else "tokenizer"))
    if "latents" in name:  # the same: the second half of training reads them again
        for path in (run / "pipeline", run / "checkpoints" / "denoiser-000000000032"):
            shutil.rmtree(path)
    done = latelier(["run", "tiny.yaml"], folder, prepare=tiny.light)
    file = str(Path(name).relative_to("runs/tiny"))
    unused = file if file.startswith(("checkpoints", "denoiser", "phases")) else ""  # a finished run needs none of them
    failure = done.refused() if done.code else done.clean() or tiny.difference(run, contents, unused)
    shutil.rmtree(folder)
    return Outcome(DAMAGED, f"{name} {harm}", failure)


def _flip(data: bytes, bit: int) -> bytes:
    if not data:
        return data
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)
