"""Where a number comes from: versions, code and machine, each found out once per process."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve()


@cache
def versions() -> dict[str, str | None]:
    """Versions of latelier and of the libraries that compute; None for one that is not installed as a package."""
    return {name: _version(name) for name in ("latelier", "torch", "diffusers", "numpy")}


@cache
def git_state() -> dict[str, Any] | None:
    """`{commit, dirty}` of latelier's own working tree; None if it was installed from a package."""
    if _git("ls-files", "--error-unmatch", _HERE.name) is None:  # a file of some other repository's environment
        return None
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "dirty": bool(_git("status", "--porcelain", "--untracked-files=no"))}


@cache
def device_name() -> str:
    """The accelerator's name, or the processor's."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if torch.backends.mps.is_available():
        return "Apple GPU"
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
    return f"CPU, {model or platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def make_receipt(**fields: Any) -> dict[str, Any]:
    """The fields given, then versions, git state and device."""
    return {**fields, "versions": versions(), "git": git_state(), "device": device_name()}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(_HERE.parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
