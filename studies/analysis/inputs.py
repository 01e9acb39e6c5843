"""The runs of a study that are analysed: from its comparison.json, or from its `results`, which need no run folders."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from latelier.errors import LatelierError
from latelier.evaluation.metrics import METRICS, better, plain
from latelier.evaluation.results import NOT_REACHED
from latelier.report.tables import RunSummary, at_steps, value
from latelier.study.results import STUDY, read_result

GENERATED = (*(name for name, metric in METRICS.items() if metric.group == "generation"), "images-to")
NEVER = float("inf")  # images to a quality that was not reached: behind all others, equal among each other


@dataclass
class StudyRuns:
    """What is analysed.

    Attributes:
        title: of the study.
        runs: all of them.
        families: names of runs that are alike, by the family's name.
        repeats: by the name of a run, that of the run which differs in its seed alone.
    """

    title: str
    runs: list[RunSummary]
    families: dict[str, list[str]] = field(default_factory=dict)
    repeats: dict[str, str] = field(default_factory=dict)

    @property
    def tokenizers(self) -> list[RunSummary]:
        """The runs without repeats, which are no further tokenizers."""
        return [run for run in self.runs if run.name not in self.repeats.values()]


def read_study(path: Path) -> StudyRuns:
    """A study's folder, its comparison.json, or the folder of its `results`.

    Raises:
        LatelierError: if it is none of these.
    """
    if (path / STUDY).is_file():
        content = json.loads((path / STUDY).read_text())
        kept = [result for folder in sorted(path.iterdir()) if (result := read_result(folder))]
        order = {name: i for i, name in enumerate(content["runs"])}
        runs = sorted((run for run, _ in kept if run.name in order), key=lambda run: order[run.name])
        return StudyRuns(content["title"], runs, content["families"], content["repeats"])
    path = path / "comparison.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text())
        shown = [RunSummary(run["name"], run["metrics"], run["facts"]) for run in content["runs"]]
        return StudyRuns(str(content["title"]), shown, content.get("families", {}), content.get("repeats", {}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LatelierError(f"{path} is not the comparison.json of a study ({error!r}).") from None


def target_of(shown: list[RunSummary], wanted: str = "") -> str | None:
    """The result that measures are to predict, as most runs have it.

    Args:
        shown: the runs.
        wanted: `objects`, `gfd`, `images-to-gfd-200`, with or without features; by default the distance of generation
            of the recipe's own sampling, else that of the most steps.
    """
    every = [name for run in shown for name in run.metrics if outcome(run, name) is not None]
    if wanted:
        return max((name for name in every if wanted in (name, plain(name))), key=every.count, default=None)
    names = [name for name in every if name.startswith("gfd")]
    own = [name for name in dict.fromkeys(names) if "@" not in name]
    return max(own or at_steps(shown, "gfd")[::-1], key=names.count, default=None)


def outcome(run: RunSummary, target: str) -> float | None:
    """A run's value of the target; None if it was not measured."""
    missed = NOT_REACHED in (run.metrics.get(target, {}).get("receipt") or {})
    return NEVER if missed else value(run, target)


def sign_of(target: str) -> int:
    """1 where larger values of the target are better, -1 where smaller are.

    Raises:
        LatelierError: if neither is.
    """
    side = better(target)
    if side is None:
        raise LatelierError(f"{target} has no better side, so that nothing can predict it; choose another target.")
    return 1 if side == "higher" else -1
