"""How anything that must survive a kill reaches the disk: written beside, synced, renamed.

A published folder has a manifest with the size and the hash of every file, written last. What has no manifest was never
finished; what does not fit its manifest is damaged. Facts about what was published (images seen, ...) stand in it, too.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file that is the old one or the new one, never a part of either: write to the path that this yields."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_whole(path: Path, content: str | bytes) -> Path:
    """A file with this content, and its folder; the old one or the new one, never a part of either."""
    with replaced(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@contextmanager
def publish(folder: Path, **facts: Any) -> Iterator[Path]:
    """A folder that appears whole or not at all, in place of the one that may be there.

    Args:
        folder: where it shall be.
        facts: JSON values that the manifest keeps.

    Yields:
        The folder beside it to write into.
    """
    temporary = begin(folder)
    try:
        yield temporary
        finish(temporary, folder, **facts)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def begin(folder: Path) -> Path:
    """An empty folder beside `folder`; `finish` renames it. For several processes, of which one begins and ends."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def finish(temporary: Path, folder: Path, **facts: Any) -> None:
    """Sync the files, write their manifest, and rename the folder."""
    files = {}
    for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
        sync(path)
        files[str(path.relative_to(temporary))] = {"size": path.stat().st_size, "sha256": sha256(path)}
    write_whole(temporary / MANIFEST, json.dumps({**facts, "files": files}, indent=1))
    for path in {p.parent for p in temporary.rglob("*")}:
        sync(path)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():  # killed between the two renames: nothing is published, and it is made again
        folder.rename(old)
    temporary.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def manifest(folder: Path) -> dict[str, Any] | None:
    """The facts and files of a published folder; None where there is none, or none that can be read."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and isinstance(content.get("files"), dict) else None


def damage(folder: Path) -> str | None:
    """What is wrong with a published folder, in words that follow its name; None if every file is as it was written."""
    content = manifest(folder)
    if content is None:
        return f"has no {MANIFEST} that can be read"
    for name, about in content["files"].items():
        path = folder / name
        if not path.is_file():
            return f"lacks {name}"
        if path.stat().st_size != about["size"]:
            return f"has {path.stat().st_size:,} of {about['size']:,} bytes in {name}"
        if sha256(path) != about["sha256"]:
            return f"has changed bytes in {name}"
    return None


def sha256(path: Path) -> str:
    """Hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Ask the disk to keep a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some file systems cannot sync folders
        pass
    finally:
        os.close(handle)
