"""A run folder belongs to one recipe and one process group at a time.

`claimed` locks the folder, refuses a recipe by which its weights were not made, and writes `recipe.yaml` once nothing
refuses the command any more.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from latelier import publish
from latelier.errors import LatelierError
from latelier.opening import join_processes
from latelier.receipt import device_name, git_state, versions
from latelier.recipe import Recipe, TrainedTokenizer, dump, load_recipe
from latelier.terminal import console
from latelier.training.checkpoint import is_exported

LOCK, RECIPE = ".lock", "recipe.yaml"
# What may change between two commands on a run folder: nothing here reaches the weights, but how long they are trained.
MAY_CHANGE = re.compile(
    r"name|runs|sample\..*|evaluate\..*|data\.(workers|in_memory|max_skipped)"
    r"|(tokenizer(\.phases\.\d+)?|denoiser)\.(images|until_psnr|psnr_every|log_every|preview_every|checkpoint_every"
    r"|keep_checkpoints|micro_batch|compile)|denoiser\.snapshots"
)
LENGTHS = ("images", "until_psnr", "psnr_every")  # keys that say how long
_held: dict[Path, tuple[IO[str], int]] = {}  # folders that this process has locked, and how often


@contextmanager
def claimed(recipe: Recipe, accept_changes: bool = False) -> Iterator[Recipe]:
    """Hold the recipe's run folder, with this recipe in it; a command that is refused leaves the old one there.

    Raises:
        LatelierError: if another process holds it; if a stage that has begun was begun by another recipe (finished ones
            are refused even if changes are accepted).
    """
    path, new = recipe.folder / RECIPE, not recipe.folder.exists()
    main = join_processes().is_main_process
    with locked(recipe.folder, main):
        before, state = None, _weights(recipe.folder)
        if main:
            before = path.read_bytes() if path.is_file() else None
            changes = changed(recipe)
            _refuse(recipe, changes, accept_changes)
            for left in [*recipe.folder.rglob(".*.tmp"), *recipe.folder.rglob(".*.old")]:  # of killed commands
                shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
            _write(recipe, [change for _, change in changes])
        join_processes().wait_for_everyone()
        try:
            yield recipe
        except Exception:
            if before is not None and _weights(recipe.folder) == state:  # refused: the weights are of that recipe
                publish.write_whole(path, before)
            if main and new and {file.name for file in recipe.folder.iterdir()} <= {LOCK, RECIPE}:
                shutil.rmtree(recipe.folder)
                with suppress(OSError):  # other runs are in it
                    recipe.folder.parent.rmdir()
            raise


@contextmanager
def locked(folder: Path, main: bool = True) -> Iterator[None]:
    """Hold a run folder: only one process group writes into it. A holder that dies lets go; locks nest.

    Raises:
        LatelierError: if another process holds it.
    """
    if not main:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    key = folder.resolve()
    file, times = _held.get(key) or (_lock(folder), 0)
    _held[key] = file, times + 1
    try:
        yield
    finally:
        if times:
            _held[key] = file, times
        else:
            del _held[key]
            file.close()


def _lock(folder: Path) -> IO[str]:
    """A lock of the operating system, which ends with the process, and a note on who has it."""
    file = (folder / LOCK).open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise LatelierError(f"{folder} is in use by {holder}; wait until it ends, or stop it.") from None
    except OSError as error:  # file systems without locks
        console.print(f"{folder} cannot be locked ({error.strerror}); take care that nothing else runs in it.")
    file.truncate(0)
    command = " ".join(["latelier", *sys.argv[1:]]) if Path(sys.argv[0]).stem in ("latelier", "__main__") else "Python"
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M')} ({command})")
    file.flush()
    return file


def changed(recipe: Recipe) -> list[tuple[str, str]]:
    """Differences from the folder's recipe that reach weights which training has begun: `(stage, change)`."""
    path = recipe.folder / RECIPE
    stages = [stage for stage in ("tokenizer", "denoiser") if _begun(recipe.folder, stage)]
    if not path.is_file() or not stages:
        return []
    old, new = (_flat(json.loads(one.model_dump_json())) for one in (load_recipe(recipe.folder), recipe))
    found = []
    for key in sorted({**old, **new}):
        stage = "denoiser" if key.startswith("denoiser") else "tokenizer"  # data and seed reach both
        if stage in stages and old.get(key) != new.get(key) and not MAY_CHANGE.fullmatch(key):
            found.append((stage, f"{key} {_word(old.get(key))} -> {_word(new.get(key))}"))
    return found


def digest(recipe: Recipe) -> str:
    """12 hex digits that change with everything that the weights depend on."""
    tree = _flat(json.loads(recipe.model_dump_json()))
    kept = {k: v for k, v in tree.items() if k.rpartition(".")[2] in LENGTHS or not MAY_CHANGE.fullmatch(k)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def _refuse(recipe: Recipe, changes: list[tuple[str, str]], accept: bool) -> None:
    finished = {stage for stage, _ in changes if _finished(recipe, stage)}
    if not changes or (accept and not finished):
        return
    way = "give this recipe another name, or delete that folder"
    if not finished:
        way += "; or add --accept-changes to go on with it from the last checkpoint"
    raise LatelierError(
        f"{recipe.folder} was made by another recipe ({'; '.join(change for _, change in changes)}); {way}."
    )


def _weights(folder: Path) -> list[tuple[str, Any]]:
    """Which checkpoints and exports there are, and of how many images."""
    return [(str(path), publish.manifest(path.parent)) for path in sorted(folder.rglob(publish.MANIFEST))]


def _begun(folder: Path, stage: str) -> bool:
    """Whether weights of a stage exist."""
    if stage == "denoiser":
        return any(folder.glob("checkpoints/denoiser-*")) or (folder / "pipeline").exists()
    stages = [path.name for path in folder.glob("checkpoints/*-*")]
    return any(not name.startswith("denoiser-") for name in stages) or (folder / "tokenizer").exists()


def _finished(recipe: Recipe, stage: str) -> bool:
    if stage == "denoiser":
        return recipe.denoiser is not None and is_exported(recipe.folder / "pipeline", recipe.denoiser.images)
    section = recipe.tokenizer
    last = section.ends_at(len(section.phases)) if isinstance(section, TrainedTokenizer) else (0, None)
    return is_exported(recipe.folder / "tokenizer", *last)


def _write(recipe: Recipe, changes: list[str]) -> None:
    """The resolved recipe, whole, with versions, git state, and changes that were accepted, now and before."""
    path = recipe.folder / RECIPE
    before = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    notes = [line for line in before if line.startswith("# changed ")]
    notes += [f"# changed {time.strftime('%Y-%m-%d %H:%M')}: {change}" for change in changes]
    facts = {
        "recipe": digest(recipe),
        **versions(),
        "device": device_name(),
        **{f"git {k}": v for k, v in (git_state() or {}).items()},
    }
    header = [f"# {key}: {value}" for key, value in facts.items()] + notes
    publish.write_whole(path, "\n".join(header) + "\n" + dump(recipe))


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    """`{a: {b: 1}}` as `{a.b: 1}`; lists of dictionaries too."""
    if isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        tree = {str(number): item for number, item in enumerate(tree)}
    if not isinstance(tree, dict):
        return {path: tree}
    return {k: v for key, value in tree.items() for k, v in _flat(value, f"{path}.{key}" if path else str(key)).items()}


def _word(value: Any) -> str:
    return "none" if value is None else str(value)
