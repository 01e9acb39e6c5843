"""What stays of a study's runs when the machine is gone: numbers, facts and receipts, small enough for a repository.

`<results>/<run>/` appears whole (`latelier.publish`). Its manifest names the recipe, the settings, the code and the
machine; a run whose result is there counts as done on every machine.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from latelier.errors import LatelierError
from latelier.publish import damage, publish
from latelier.receipt import make_receipt
from latelier.report.tables import RunSummary, read_metrics

METRICS, RESULT = "metrics.json", "result.json"
STUDY = "study.json"  # beside the runs: title, order, families and repeats


def keep_result(folder: Path, run: Path, content: dict[str, Any], recipe: str, settings: str) -> None:
    """Publish a finished run's metrics.json and what is to be known of it.

    Args:
        folder: `<results>/<run>`.
        run: the run folder.
        content: the `run`'s name, its `settings` and `facts`, as JSON.
        recipe, settings: their digests, for the manifest.
    """
    with publish(folder, **make_receipt(run=content["run"], recipe=recipe, settings=settings)) as temporary:
        shutil.copyfile(run / METRICS, temporary / METRICS)
        (temporary / RESULT).write_text(json.dumps(content, indent=1))


def read_result(folder: Path) -> tuple[RunSummary, dict[str, Any]] | None:
    """The run in a folder, without images, and its settings; None where there is none.

    Raises:
        LatelierError: if a file is not as it was published.
    """
    if not folder.is_dir():
        return None
    if wrong := damage(folder):
        raise LatelierError(f"The result {folder} is damaged (it {wrong}); put back a copy, or delete it.")
    content = json.loads((folder / RESULT).read_text())
    return RunSummary(content["run"], read_metrics(folder), content["facts"]), content["settings"]
