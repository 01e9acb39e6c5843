"""A study: a comparison as data. Which runs, at which budget, and which table comes out.

Every run is an ordinary recipe: the study's `base`, changed by the run's own keys. A study goes on where it was
stopped, skips what is done, and ends in a page, figures and Markdown. A budget scales all counts of a stage together;
operations are counted on real training steps, with backward pass, loss networks and discriminator.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

from accelerate import PartialState
from pydantic import Field, ValidationError, model_validator

from latelier import run
from latelier.errors import LatelierError
from latelier.preflight import Trial, try_denoiser, try_tokenizer
from latelier.publish import write_whole
from latelier.recipe import Recipe, apply_overrides, as_numbers, build_recipe, read_yaml
from latelier.report.comparison import write_comparison
from latelier.report.figures import MAP
from latelier.report.run import read_log
from latelier.report.tables import Published, RunSummary, read_metrics
from latelier.sections import Name, PositiveCount, Section, TrainedTokenizer, Training, first_problem
from latelier.study.results import STUDY, keep_result, read_result
from latelier.terminal import console
from latelier.training.run_folder import digest

_FOLDERS = (Path(__file__).parents[1] / "studies", Path(__file__).parents[3] / "studies")
PLAN = "plan.json"  # the settings of a run, what was planned from them, and whether it is done
UNITS = ("images", "minutes", "flops")  # of a budget
COUNTS = ("images", "warmup")  # of a stage, which a budget scales
# Overrides of these are the study's own.
OWN = ("name", "folder", "results", "budget", "columns", "baseline", "families", "repeats")


class Spending(Section):
    """What one stage of every run may cost: exactly one of the three."""

    images: PositiveCount | None = Field(None, description="images seen")
    minutes: float | None = Field(None, gt=0, description="of training on this machine, from a few timed steps")
    flops: float | None = Field(None, gt=0, description="operations of training, 2 for a multiply-add")

    @model_validator(mode="after")
    def _one(self) -> Spending:
        if len([name for name in UNITS if getattr(self, name)]) != 1:
            raise ValueError("one of images, minutes or flops")
        return self

    @property
    def unit(self) -> str:
        """Which of the three is given."""
        return next(name for name in UNITS if getattr(self, name))

    def __str__(self) -> str:
        value = getattr(self, self.unit)
        return f"{value:,} images" if self.unit == "images" else f"{value:.3g} {self.unit}"


class Budget(Section):
    """What each stage of every run may cost; a stage without an entry keeps its recipe's length."""

    tokenizer: Spending | None = None
    denoiser: Spending | None = None


class Variant(Section):
    """The same comparison on other data or at another scale: what changes."""

    about: str = ""
    base: dict[str, Any] = Field({}, description="changes of what all runs share")
    runs: dict[str, dict[str, Any]] = Field({}, description="changes of single runs")
    more: dict[str, dict[str, Any]] = Field({}, description="runs that only this variant has")
    budget: Budget | None = None


class Study(Section):
    """A comparison of recipes."""

    name: Name
    title: str
    about: str = ""
    budget: Budget = Budget()
    columns: dict[str, list[str]] = Field(description="tables by title: metrics, by name or the beginning of it: `rfd`")
    base: dict[str, Any] = Field(description="the recipe that all runs share")
    runs: dict[str, dict[str, Any]] = Field(description="by name: what is different in each")
    variants: dict[str, Variant] = Field({}, description="by name: the same on other data or at another scale")
    baseline: str | None = Field(None, description="the run whose end the others' convergence is measured against")
    published: Published | None = Field(None, description="what a paper printed, to be compared by order")
    families: dict[str, list[str]] = Field({}, description="runs that are alike, by a name: analysed within, too")
    repeats: dict[str, str] = Field({}, description="by the name of a run, the run that is its repeat: another seed")
    folder: str = Field("runs", description="in which a folder of the study's name is made")
    results: str | None = Field(
        None, description="folder that keeps the numbers of finished runs, where other machines find them"
    )

    @model_validator(mode="after")
    def _check_baseline(self) -> Study:
        if self.baseline is not None and self.baseline not in self.runs:
            known = ", ".join(self.runs)
            raise LatelierError(f"baseline = {self.baseline!r} is no run of study {self.name}; it has {known}.")
        named = [*(run for family in self.families.values() for run in family), *chain(*self.repeats.items())]
        if unknown := [run for run in named if run not in self.runs]:
            raise LatelierError(f"families or repeats of study {self.name} name {unknown[0]!r}, which is no run of it.")
        return self

    @property
    def root(self) -> Path:
        """The study's own folder, with one run folder for each run."""
        return Path(self.folder) / self.name

    def result(self, run: str) -> Path | None:
        """Where the numbers of a finished run are kept, if the study keeps them."""
        return Path(self.results) / file_name(run) if self.results else None


def load_study(path: str | Path, variant: str | None = None, overrides: list[str] | tuple[str, ...] = ()) -> Study:
    """Read a study file, and apply a variant and `a.b=c` overrides: of the study (`OWN`) or of every run's recipe.

    Raises:
        LatelierError: naming the file, key or value that is wrong.
    """
    path = find_study(path)
    study = _validate(read_yaml(path), path)
    if variant is not None:
        study = _vary(study, variant)
    own = [override for override in overrides if override.partition("=")[0].split(".")[0] in OWN]
    tree = apply_overrides(study.model_dump(), own)
    apply_overrides(tree["base"], [override for override in overrides if override not in own])
    return _validate(tree, path)


def _validate(tree: Any, path: Path) -> Study:
    if not isinstance(tree, dict):
        raise LatelierError(f"{path} must be a YAML mapping with at least `name`, `title`, `base` and `runs`.")
    try:
        return Study.model_validate(as_numbers(tree))
    except ValidationError as error:
        raise LatelierError(f"{path}: {first_problem(error)}") from None


def find_study(name: str | Path) -> Path:
    """A study file from its path or the name of one that comes along."""
    if Path(name).is_file():
        return Path(name)
    known = {path.stem: path for folder in _FOLDERS if folder.is_dir() for path in sorted(folder.glob("*.yaml"))}
    if str(name) in known:
        return known[str(name)]
    near = difflib.get_close_matches(str(name), known, 1, 0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"those that come along: {', '.join(known)}."
    raise LatelierError(f"There is no study {name}; {hint}")


def build_run(study: Study, name: str) -> Recipe:
    """The recipe of one run, before the budget is applied."""
    tree = merge(study.base, study.runs[name])
    try:
        return build_recipe({**tree, "name": file_name(name), "runs": str(study.root)})
    except LatelierError as error:
        raise LatelierError(f"Run {name!r} of study {study.name}: {error}") from None


def run_study(study: Study, only: list[str] | None = None) -> Path:
    """Do what is not done yet of all runs or `only` some, write the comparison of what is done, and return its page.

    A run that fails does not stop the others; it is named at the end.

    Raises:
        LatelierError: for unknown runs and wrong recipes before anything is trained; afterwards for those that failed.
    """
    for name in only or ():
        if name not in study.runs:
            raise LatelierError(f"Study {study.name} has no run {name!r}; it has {', '.join(study.runs)}.")
    recipes = {name: build_run(study, name) for name in study.runs}
    failed: dict[str, str] = {}
    chosen = [name for name in study.runs if not only or name in only]
    for number, name in enumerate(chosen, 1):
        console.rule(f"{study.name}: {name} ({number} of {len(chosen)})")
        try:
            _do(study, name, recipes[name])
        except LatelierError as error:
            failed[name] = str(error)
            console.print(f"[bold red]{name} failed:[/] {error}", highlight=False)
    page = show(study) if PartialState().is_main_process else study.root / "comparison.html"
    PartialState().wait_for_everyone()
    if failed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise LatelierError(f"{len(failed)} of {len(chosen)} runs failed ({reasons}). What is done is in {page}.")
    return page


def _do(study: Study, name: str, recipe: Recipe) -> None:
    """One run, unless its result is there and was made by the same recipe."""
    file = recipe.folder / PLAN
    settings = {"recipe": recipe.model_dump(mode="json"), "budget": study.budget.model_dump(mode="json")}
    if (kept := study.result(name)) and _is_done(kept, settings, file.is_file()):
        return
    if not file.is_file():
        spent, facts = spend(recipe, study.budget)
        _write(file, {"settings": settings, "recipe": spent.model_dump(mode="json"), "facts": facts, "done": False})
    plan = json.loads(file.read_text())  # the main process's, should another have measured other times
    if _digests(plan["settings"])[0] != _digests(settings)[0]:
        advice = "delete it, or give the study another name"
        raise LatelierError(f"{recipe.folder} was made by another recipe or budget; {advice}.")
    if plan["done"] and _digests(plan["settings"]) == _digests(settings):
        console.print(f"{recipe.folder} is done.")
        _keep(study, name, plan)
        return
    planned = {**plan["recipe"], **{key: settings["recipe"][key] for key in ("sample", "evaluate")}}
    plan |= {"settings": settings, "recipe": planned}
    _write(file, {**plan, "done": False})
    run.complete(build_recipe({**planned, "runs": str(recipe.folder.parent)}))
    _write(file, {**plan, "done": True})
    _keep(study, name, plan)


def _is_done(kept: Path, settings: dict[str, Any], begun: bool) -> bool:
    """Whether a run's result makes doing it superfluous; one of another training is refused."""
    if (result := read_result(kept)) is None:
        return False
    before, now = _digests(result[1]), _digests(settings)
    if before[0] != now[0]:
        advice = "delete it, or give the study other `results`"
        raise LatelierError(f"{kept} was made by another recipe or budget; {advice}.")
    again = "evaluated" if begun else "trained, since its weights are not here,"
    words = f"but with other `sample` or `evaluate`, so the run is {again} anew"
    console.print(f"The result is in {kept}, {'so the run is done' if before == now else words}.")
    return before == now


def _keep(study: Study, name: str, plan: dict[str, Any]) -> None:
    """Put a finished run's numbers into the study's `results`, if it has some."""
    if (folder := study.result(name)) and PartialState().is_main_process:
        run = study.root / file_name(name)
        content = {"run": name, "settings": plan["settings"], "facts": _facts(run, plan["facts"])}
        keep_result(folder, run, content, digest(build_recipe(plan["recipe"])), _digests(plan["settings"])[1])
    PartialState().wait_for_everyone()


def _write(path: Path, content: dict[str, Any]) -> None:
    """Write a file on the main process; all go on together."""
    if PartialState().is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2))
    PartialState().wait_for_everyone()


def _digests(settings: dict[str, Any]) -> tuple[str, str]:
    """What tells trainings apart, and what tells numbers apart: images and metrics can be made anew."""
    recipe = build_recipe(settings["recipe"])  # keys younger than the settings have their defaults
    training = f"{digest(recipe)} {json.dumps(settings['budget'], sort_keys=True)}"
    measured = recipe.model_dump_json(include={"sample", "evaluate"})
    return training, hashlib.sha256(f"{training} {measured}".encode()).hexdigest()[:12]


def show(study: Study) -> Path:
    """Write table, figures and page of all runs that have results."""
    shown = []
    for name in study.runs:
        folder = study.root / file_name(name)
        if (folder / PLAN).is_file() and (plan := json.loads((folder / PLAN).read_text()))["done"]:
            files = {"reconstructions": "reconstructions.png", "samples": "samples/grid.png", "latent-map": MAP}
            images = {kind: folder / file for kind, file in files.items()}
            shown.append(RunSummary(name, read_metrics(folder), _facts(folder, plan["facts"]), images))
        elif (kept := study.result(name)) and (result := read_result(kept)):  # its images are on another machine
            shown.append(result[0])
    if not shown:
        raise LatelierError(f"No run of study {study.name} has a result yet.")
    known = dict.fromkeys(name for run in shown for name in run.metrics)
    columns = {title: _found(wanted, known) for title, wanted in study.columns.items()}
    groups = {"families": study.families, "repeats": study.repeats}
    if study.results:
        names = [run.name for run in shown]
        write_whole(Path(study.results) / STUDY, json.dumps({"title": study.title, "runs": names, **groups}, indent=1))
    budget = ", ".join(f"{stage} {amount}" for stage, amount in study.budget if amount is not None)
    about = f"{study.about.strip()} Budget of each run: {budget or 'as its recipe says'}."
    return write_comparison(
        study.root, study.title, about, shown, columns, study.published, baseline=study.baseline, groups=groups
    )


def _found(wanted: list[str], known: Iterable[str]) -> list[str]:
    """Measured names that are wanted, or begin like one that is; `gfd@50` means `gfd-vgg16@50`, `gfd@*` all steps."""

    def means(column: str, name: str) -> bool:
        (begin, _, steps), (whole, _, measured) = column.partition("@"), name.partition("@")
        return f"{whole}-".startswith(f"{begin}-") and (steps == measured or (steps == "*" and measured != ""))

    return list(dict.fromkeys(name for column in wanted for name in known if means(column, name)))


def _facts(folder: Path, planned: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What a run has cost."""
    log = read_log(folder / "log.jsonl")
    facts: dict[str, Any] = {}
    for stage in ("tokenizer", "denoiser"):
        rows = [rows for name, rows in log.items() if (name == "denoiser") == (stage == "denoiser")]  # of each phase
        took = sum(row["seconds"] for phase in rows for row in phase)
        if stage in planned:
            images = sum(phase[-1]["images"] for phase in rows) or planned[stage]["images"]  # it may have ended early
            facts[f"{stage}: images"] = images
            facts[f"{stage}: training GFLOP an image"] = float(f"{planned[stage]['flops_per_image'] / 1e9:.3g}")
            facts[f"{stage}: training minutes"] = round(took / 60, 2)
            if took:
                facts[f"{stage}: training images/s"] = round(images / took, 2)
    return facts


def _vary(study: Study, name: str) -> Study:
    if name not in study.variants:
        raise LatelierError(
            f"Study {study.name} has no variant {name!r}; it has {', '.join(study.variants) or 'none'}."
        )
    variant = study.variants[name]
    if unknown := set(variant.runs) - set(study.runs):
        raise LatelierError(f"Variant {name!r} of study {study.name} names unknown runs: {', '.join(sorted(unknown))}.")
    if known := set(variant.more) & set(study.runs):
        twice = f"that the study has already: {', '.join(sorted(known))}; put them under `runs`"
        raise LatelierError(f"Variant {name!r} of study {study.name} has runs in `more` {twice}.")
    runs = {run: merge(tree, variant.runs.get(run, {})) for run, tree in study.runs.items()} | variant.more
    changes = {"name": f"{study.name}-{name}", "base": merge(study.base, variant.base), "runs": runs}
    about, budget = variant.about or study.about, variant.budget or study.budget
    results = study.results and f"{study.results}-{name}"
    return study.model_copy(update={**changes, "about": about, "budget": budget, "results": results})


def merge(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A tree with changes laid over it, section by section; what is not a section is replaced."""
    merged = dict(tree)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else copy.deepcopy(value)
    return merged


def file_name(run: str) -> str:
    """A run's name as that of a folder: `+ masking` becomes `masking`."""
    return "-".join("".join(c if c.isalnum() or c in "._-" else " " for c in run).split()) or "run"


def spend(recipe: Recipe, budget: Budget) -> tuple[Recipe, dict[str, Any]]:
    """The recipe, lengthened or shortened to the budget, and what each of its stages costs over all phases.

    The facts of a stage are `images`, `flops`, `flops_per_image` and `seconds_per_image`.
    """
    tree, facts = recipe.model_dump(), dict[str, dict[str, Any]]()
    stages = {"tokenizer": (budget.tokenizer, try_tokenizer), "denoiser": (budget.denoiser, try_denoiser)}
    for name, (spending, trials) in stages.items():
        section = getattr(recipe, name)
        if not isinstance(section, Training):
            continue
        rows = list(trials(recipe, count=True))
        if spending is not None:
            _scale(tree[name], section, getattr(spending, spending.unit) / _price(rows, spending.unit))
        images = sum(row.images for row in rows)
        for what in ("flops_per_image", "seconds_per_image"):
            facts.setdefault(name, {})[what] = sum(row.images * getattr(row, what) for row in rows) / images
    spent = build_recipe(tree)
    for name, fact in facts.items():
        fact["images"] = length(getattr(spent, name))
        fact["flops"] = fact["images"] * fact["flops_per_image"]
    return spent, facts


def length(section: Training) -> int:
    """Images seen over all phases."""
    phases = section.phases if isinstance(section, TrainedTokenizer) else []
    return section.images + sum(section.phase(i + 1)[1].images for i in range(len(phases)))  # type: ignore[attr-defined]


def _price(rows: list[Trial], unit: str) -> float:
    """What the recipe's own length costs."""
    prices = ({"images": 1.0, "minutes": row.seconds_per_image / 60, "flops": row.flops_per_image} for row in rows)
    return sum(row.images * price[unit] for row, price in zip(rows, prices))


def _scale(tree: dict[str, Any], section: Training, factor: float) -> None:
    """Scale every count of a stage; cadences are derived anew."""
    for key in ("log_every", "preview_every", "checkpoint_every"):
        tree.pop(key, None)
    parts = [tree]
    for number, phase in enumerate(tree.get("phases", ())):
        whole = section.phase(number + 1)[1].model_dump()  # type: ignore[attr-defined]
        phase.update({key: whole[key] for key in (*COUNTS, "adversarial") if whole.get(key)})
        parts.append(phase)
    for part in parts:
        for key in COUNTS:
            if part.get(key):
                part[key] = max(1, round(part[key] * factor))
        if part.get("adversarial"):
            for key in ("start", "ahead"):
                part["adversarial"] = {**part["adversarial"], key: round(part["adversarial"][key] * factor)}
