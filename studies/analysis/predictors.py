"""Which measures of a tokenizer order tokenizers as the images generated with them do?

A latent space is judged so that nobody has to train a denoiser on it to learn whether that is worth while. Here
the denoisers are trained, at equal budget, and each measure is correlated with the Fréchet distance of generation:

    latelier study judge data.source=photos
    python -m studies.analysis.predictors runs/judge
    python -m studies.analysis.predictors results/judge --target objects --target gfd --target images-to-gfd-200
    python -m studies.analysis.predictors runs/judge --evidence "Imagenette, ten classes of photographs"

The second line writes `predictors.html`, `predictors.md` and figures into the study's folder; the third asks
the same of other targets and of a study's `results`; the fourth also writes the file that the verdict of
`latelier inspect` cites.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from latelier.errors import LatelierError
from latelier.evaluation.metrics import Better, better, heading
from latelier.publish import write_whole
from latelier.report.comparison import Section, write_sections
from latelier.report.diffusability import EVIDENCE
from latelier.report.figures import COLOURS, STYLE, ImageFile, legend, make_panels, quiet, save_figure, styles
from latelier.report.page import MISSING, SOFT, number
from latelier.report.tables import MIXTURE, RunSummary, Table, value

from .correlation import FEWEST as STUDY_FEWEST
from .correlation import Correlation, Pair, correlate, holm, needed, partial, pool, reliability
from .inputs import GENERATED, NEVER, StudyRuns, outcome, read_study, sign_of, target_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEWEST = 6  # runs; of five, even two equal orders are chance once in 60
ALPHA = 0.05
EQUAL = 0.02  # budgets that differ less are equal
COSTS = ("parameters", "size-mib", "memory-gb", "gflop", "encode-", "decode-")  # not of the latent space
DRAWN = ("sampler", "images_trained")  # receipts with these are of what a denoiser draws
IMAGES, GFLOP = "denoiser: images", "denoiser: training GFLOP an image"  # facts of a run
RECEIPT = ("n", "n_reference", "data", "extractor", "weights_sha256", "sampler", "steps", "guidance", "versions", "git")
BEYOND = "rfd"  # what a measure should know more than


@dataclass
class Predictor:
    """One measure, and how its order goes with that of generation.

    Attributes:
        metric: its name.
        direction: its better side, where one is known.
        correlation: above 0 where the better side goes with better generation; for a measure without a better side,
            where larger values do.
        adjusted: the p-value after Holm's correction for all measures.
        beyond: what is left of the correlation between tokenizers of equal `rfd`; None where that is not defined.
    """

    metric: str
    direction: Better | None
    correlation: Correlation
    adjusted: float
    beyond: float | None

    @property
    def significant(self) -> bool:
        """Whether it is more than chance, all measures counted."""
        return self.adjusted < ALPHA


# -- from runs to correlations ----------------------------------------------------------------------------------------


def predict(studies: Sequence[Sequence[RunSummary]], target: str) -> list[Predictor]:
    """Correlate every measure of the tokenizers with the quality of generation.

    Args:
        studies: the runs of each, or of each family; ranks are taken within one.
        target: such as `gfd-vgg16`, with a better side.

    Returns:
        The largest correlation first, whatever its sign; without measures that fewer than six runs have, or that do
        not differ.
    """
    tables = [(run, measures(run)) for runs in studies for run in runs]
    names = dict.fromkeys(name for _, found in tables for name in found)
    known = {name: found for name in names if (found := correlate(_columns(studies, name, target)))}
    known = {name: found for name, found in known.items() if found.n >= FEWEST}
    adjusted = holm([found.p for found in known.values()])
    predictors = [
        Predictor(name, better(name), found, p, _beyond(studies, name, target))
        for (name, found), p in zip(known.items(), adjusted)
    ]
    return sorted(predictors, key=lambda predictor: -abs(predictor.correlation.value))


def measures(run: RunSummary) -> dict[str, float]:
    """What is known of a tokenizer without a denoiser, by name.

    Costs are left out, and what was measured at a setting of its own, such as `prefix-psnr@8`: as many tests as there
    are settings would drown the others. Of the mixtures the lowest `gmm-nll@<modes>` counts, as `gmm-nll`.
    """
    found, mixtures = {}, []
    for name, entry in run.metrics.items():
        drawn = any(key in (entry.get("receipt") or {}) for key in DRAWN)
        single = number(entry.get("value"))
        generated = any(f"{name}-".startswith(f"{begin}-") for begin in GENERATED)
        if drawn or single is None or generated or name.startswith(COSTS):
            continue
        if name.startswith(f"{MIXTURE}@"):
            mixtures.append(single)
        elif "@" not in name:
            found[name] = single
    return {**found, MIXTURE: min(mixtures)} if mixtures else found


def unequal_budget(shown: Sequence[RunSummary]) -> str:
    """A sentence if the runs' denoisers did not see equally many images, nor cost equally much; else empty."""
    images = [number(run.facts.get(IMAGES)) for run in shown]
    gflop = [number(run.facts.get(GFLOP)) for run in shown]
    if None in images:
        return "How long each denoiser was trained is not known, so that budgets may differ."
    seen = [float(n or 0) for n in images]
    spent = [n * (cost or 0) for n, cost in zip(seen, gflop)]
    if any(amounts and max(amounts) <= (1 + EQUAL) * min(amounts) and min(amounts) > 0 for amounts in (seen, spent)):
        return ""
    return (
        f"The denoisers had different budgets ({min(seen):,.0f} to {max(seen):,.0f} images, at different cost), "
        "which orders them besides their latents."
    )


def _columns(studies: Sequence[Sequence[RunSummary]], name: str, target: str) -> list[Pair]:
    """A measure and the target of each study's runs that have both; of both, larger is better."""
    columns = []
    for runs in studies:
        pairs = [(measures(run).get(name), outcome(run, target)) for run in runs]
        both = np.array([(x, y) for x, y in pairs if x is not None and y is not None], dtype=float).reshape(-1, 2)
        sign = -1 if better(name) == "lower" else 1
        columns.append((sign * both[:, 0], sign_of(target) * both[:, 1]))
    return columns


def _beyond(studies: Sequence[Sequence[RunSummary]], name: str, target: str) -> float | None:
    """The partial correlation given `rfd`, over all studies; None for `rfd` itself, or where it says all there is."""
    given = next((key for runs in studies for run in runs for key in measures(run) if key.startswith(BEYOND)), None)
    found, numbers = [], []
    if given is None or name.startswith(BEYOND):
        return None
    for runs, (x, y) in zip(studies, _columns(studies, name, target)):
        kept = [run for run in runs if name in measures(run) and outcome(run, target) is not None]
        third = np.array([measures(run)[given] for run in kept if given in measures(run)], dtype=float)
        varies = len(third) == len(x) >= STUDY_FEWEST and all(np.ptp(column) > 0 for column in (x, y, third))
        if varies and (left := partial(x, y, third)) is not None:
            found.append(left)
            numbers.append(len(x))
    return pool(found, numbers) if found else None


# -- the page -------------------------------------------------------------------------------------------------------


def write_predictors(study: Path, targets: Sequence[str] = ()) -> Path:
    """Write `predictors.html`, `predictors.md` and figures into the folder of a study or of its results.

    Args:
        study: the folder.
        targets: what is to be predicted, see `target_of`; by default the distance of generation.

    Raises:
        LatelierError: for fewer than six runs with a target, or no measure that differs.
    """
    about, sections = read_study(study), []
    for wanted in targets or ("",):
        parts = prediction(study, about.tokenizers, wanted)
        if not parts:
            what = wanted or "a distance of generation"
            raise LatelierError(f"{study} needs at least {FEWEST} runs with {what} and measures that differ.")
        parts += [*within_families(about, wanted), *certainty(about, wanted)]
        sections.append(Section(f"Which measures predict {wanted or 'generation'}?", parts))
    return write_sections(study / "predictors.html", study / "predictors.md", about.title, "", sections)


def prediction(folder: Path, shown: Sequence[RunSummary], wanted: str = "") -> list[str | Table | ImageFile]:
    """A verdict, a table and figures; nothing for fewer than six runs with the target.

    Args:
        folder: where figures are written.
        shown: the runs.
        wanted: the target, see `target_of`.
    """
    target = target_of(list(shown), wanted)
    runs = [run for run in shown if target and outcome(run, target) is not None]
    if target is None or len(runs) < FEWEST or not (predictors := predict([runs], target)):
        return []
    words = f"ρ is above 0 where the better side of a measure goes with a better {target}; for a measure without an "
    words += "arrow, where larger values do. p is the chance of a correlation as large, on either side, if orders had "
    words += (
        f"nothing to do with each other; then for all {len(predictors)} measures together (Holm), bold below 0.05. "
    )
    words += f"“ρ beyond {BEYOND}” is what is left between tokenizers of equal {BEYOND}, without a test."
    if never := [run.name for run in runs if outcome(run, target) == NEVER]:
        words += f" {target} was not reached by {', '.join(never)}, which share the last rank."
    said = [verdict(predictors, target, len(runs)), *filter(None, [unequal_budget(runs)])]
    return [*said, _table(predictors), words, *_figures(folder, runs, predictors, target, f"-{wanted}" * bool(wanted))]


def within_families(about: StudyRuns, wanted: str = "") -> list[str | Table]:
    """The same within families, pooled as several studies are; nothing without families of enough runs."""
    target = target_of(about.tokenizers, wanted)
    known = [run for run in about.tokenizers if target and outcome(run, target) is not None]
    measured = {name: [run for run in known if run.name in runs] for name, runs in about.families.items()}
    kept = {name: runs for name, runs in measured.items() if len(runs) >= STUDY_FEWEST}
    if target is None or not kept or not (predictors := predict(list(kept.values()), target)):
        return []
    said = ", ".join(f"{name} ({len(runs)})" for name, runs in kept.items())
    words = f"Within the families {said}: ranks are taken within each, correlations averaged over them. "
    if few := [f"{name} ({len(runs)})" for name, runs in measured.items() if name not in kept]:
        words += f"Fewer than {STUDY_FEWEST} runs, so left out: {', '.join(few)}. "
    return [words + verdict(predictors, target, sum(map(len, kept.values())), families=len(kept)), _table(predictors)]


def certainty(about: StudyRuns, wanted: str = "") -> list[str]:
    """How much of the differences between tokenizers is more than the seed's doing; nothing without repeats."""
    target, runs = target_of(about.tokenizers, wanted), {run.name: run for run in about.runs}
    both = [(runs[a], runs[b]) for a, b in about.repeats.items() if a in runs and b in runs]
    found = [(outcome(a, target or ""), outcome(b, target or "")) for a, b in both]
    pairs = [(a, b) for a, b in found if a is not None and b is not None and max(a, b) < NEVER]
    values = [v for run in about.tokenizers if (v := outcome(run, target or "")) is not None and v < NEVER]
    if not pairs or len(values) < 2:
        return []
    sure = reliability(np.array(values), pairs)
    return [
        f"Between seeds {target} has a standard deviation of {sure.noise:.3g} ({sure.pairs} repeated), between "
        f"tokenizers of {sure.spread:.3g}: {sure.share:.0%} of the variance is more than noise, and correlations "
        f"above {sure.share**0.5:.2f} cannot be expected."
    ]


def _table(predictors: Sequence[Predictor]) -> Table:
    head = ["Measure", "Spearman's ρ", "95 % interval", "Runs", "p", "p, all counted", f"ρ beyond {BEYOND}"]
    table = Table(head, [_row(predictor) for predictor in predictors])
    table.bold = {(i, 1) for i, predictor in enumerate(predictors) if predictor.significant}
    return table


def verdict(predictors: Sequence[Predictor], target: str, n: int, families: int = 1) -> str:
    """What the correlations of n runs, of so many families, allow to say, in words."""
    sure = [predictor for predictor in predictors if predictor.significant]
    if sure:
        found = "; ".join(f"{one.metric} (ρ = {_signed(one.correlation.value)})" for one in sure)
        return f"Of {len(predictors)} measures over {n} tokenizers, {target} goes with these beyond chance: {found}."
    largest = f"No measure goes with {target} beyond chance: of {n} tokenizers and {len(predictors)} measures, the "
    largest += f"largest correlation is {_signed(predictors[0].correlation.value)} ({predictors[0].metric})"
    if families > 1:
        return f"{largest}."
    least = needed(n, ALPHA / len(predictors))
    reach = f"only one of {least:.2f} or more would have been" if least else "not even equal orders would have been"
    return f"{largest}, and {reach} enough."


def _row(predictor: Predictor) -> list[str]:
    found = predictor.correlation
    low, high = map(_signed, found.interval)
    beyond = MISSING if predictor.beyond is None else _signed(predictor.beyond)
    chances = (f"{p:.3f}" if p >= 0.001 else f"{p:.1g}" for p in (found.p, predictor.adjusted))
    return [heading(predictor.metric), _signed(found.value), f"{low} to {high}", str(found.n), *chances, beyond]


def _signed(correlation: float) -> str:
    return f"{correlation:.2f}".replace("-", "−")


def _figures(
    folder: Path, shown: Sequence[RunSummary], predictors: Sequence[Predictor], target: str, end: str = ""
) -> list[ImageFile]:
    from matplotlib import rc_context

    with rc_context(STYLE):
        words = (
            f"Rank correlation of each measure with {target}, and its 95 % interval; filled points are beyond chance"
        )
        dots = save_figure(folder, f"predictors{end}", _dots(predictors, target), words)
        words = f"The two measures that {target} goes with, or against, the most; one point for each tokenizer"
        best = save_figure(folder, f"best-predictors{end}", _scatter(shown, predictors[:2], target), words)
    return [dots, best]


def _dots(predictors: Sequence[Predictor], target: str) -> Figure:
    """One line for each measure, the most positive correlation on top."""
    ordered = sorted(predictors, key=lambda predictor: predictor.correlation.value)
    figure, (axes,) = make_panels(1, 1, height=0.7 + 0.2 * len(ordered))
    for i, predictor in enumerate(ordered):
        found, colour = predictor.correlation, COLOURS[0] if predictor.direction else COLOURS[6]
        axes.plot(found.interval, (i, i), color=colour, linewidth=1.4, solid_capstyle="butt")
        face = colour if predictor.significant else "white"
        axes.plot([found.value], [i], "o", color=colour, markerfacecolor=face, markersize=5)
    axes.set_yticks(range(len(ordered)), [heading(predictor.metric) for predictor in ordered])
    axes.set_ylim(-0.7, len(ordered) - 0.3)
    axes.set_xlim(-1.03, 1.03)
    axes.axvline(0, color=SOFT, linewidth=0.8)
    axes.set_xlabel(f"Spearman's ρ with {target}; to the right: better here, better generation; grey: larger here")
    axes.grid(axis="x")
    axes.tick_params(length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    return figure


def _scatter(shown: Sequence[RunSummary], predictors: Sequence[Predictor], target: str) -> Figure:
    """One panel for each measure, one point for each run."""
    figure, panels = make_panels(len(predictors), 2, height=3.2, above=0.6)
    for predictor, axes in zip(predictors, panels):
        for run, look in zip(shown, styles(shown)):
            x, y = measures(run).get(predictor.metric), value(run, target)
            if x is not None and y is not None:
                axes.plot([x], [y], zorder=3, **look)
        axes.set_title(f"ρ = {_signed(predictor.correlation.value)}")
        axes.set_xlabel(heading(predictor.metric))
        axes.set_ylabel(heading(target))
        quiet(axes)
    legend(figure, shown, range(len(shown)), 4)
    return figure


# -- as a file --------------------------------------------------------------------------------------------------------


def write_evidence(comparisons: Sequence[str | Path], data: str, out: str | Path = EVIDENCE) -> Path:
    """Write what measures predicted generation in some studies, as the verdict on a latent space cites it.

    Args:
        comparisons: `comparison.json` of one study or of several; ranks are taken within each.
        data: the images, in words: `Imagenette, ten classes of photographs`.
        out: the file; by default the package's own.

    Returns:
        Its path. It holds `about` in words, `target`, `n`, `date`, `studies` and `predictors`, the largest correlation
        first.

    Raises:
        LatelierError: for a file that is no comparison, studies of different distances or with fewer than four runs,
            denoisers of different budgets, or fewer than six runs in all.
    """
    studies = [_read(Path(path)) for path in comparisons]
    targets = dict.fromkeys(target for _, target, _ in studies)
    if len(targets) != 1:
        raise LatelierError(f"Evidence needs studies that measured one distance, not {', '.join(targets) or 'none'}.")
    (target,) = targets
    runs = [shown for _, _, shown in studies]
    n = sum(map(len, runs))
    predictors = predict(runs, target)
    if n < FEWEST or not predictors:
        raise LatelierError(
            f"Evidence needs a measure that differs in at least {FEWEST} runs with {target}; here are {n}."
        )
    many = "study" if len(studies) == 1 else "studies"
    about = f"{n} tokenizers of {len(studies)} {many} on {data}; rank correlation with {target} at equal training of "
    about += "the denoiser"
    content = {
        "about": about,
        "target": target,
        "n": n,
        "date": date.today().isoformat(),
        "studies": [_study(title, shown, target) for title, _, shown in studies],
        "predictors": [_entry(predictor) for predictor in predictors],
    }
    return write_whole(Path(out), json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _read(path: Path) -> tuple[str, str, list[RunSummary]]:
    """Title, distance and runs of a study that is evidence."""
    about = read_study(path)
    title, shown = about.title, about.tokenizers
    target = target_of(shown)
    shown = [run for run in shown if target and value(run, target) is not None]
    if target is None or len(shown) < STUDY_FEWEST:
        raise LatelierError(
            f"{path} has {len(shown)} runs with a distance of generation; at least {STUDY_FEWEST} are needed."
        )
    if problem := unequal_budget(shown):
        raise LatelierError(f"{path} is no evidence. {problem}")
    return title, target, shown


def _study(title: str, shown: Sequence[RunSummary], target: str) -> dict[str, Any]:
    """What is to be known of a study; receipts agree within one, so those of its first run are given."""
    receipt = shown[0].metrics[target].get("receipt") or {}
    budgets = {fact: sorted({run.facts.get(fact, 0) for run in shown}) for fact in (IMAGES, GFLOP)}
    return {
        "title": title,
        "runs": [run.name for run in shown],
        **{fact: amounts[0] if len(amounts) == 1 else [amounts[0], amounts[-1]] for fact, amounts in budgets.items()},
        "receipt": {key: receipt[key] for key in RECEIPT if key in receipt},
    }


def _entry(predictor: Predictor) -> dict[str, Any]:
    found = predictor.correlation
    return {
        "metric": predictor.metric,
        "direction": predictor.direction,
        "spearman": round(found.value, 4),
        "interval": [round(end, 4) for end in found.interval],
        "n": found.n,
        "p": round(found.p, 6),
        "p_adjusted": round(predictor.adjusted, 6),
        "significant": predictor.significant,
        f"beyond_{BEYOND}": None if predictor.beyond is None else round(predictor.beyond, 4),
    }


def main(
    studies: Annotated[list[Path], typer.Argument(help="Folders of studies, or of their results.")],
    target: Annotated[
        list[str] | None, typer.Option(help="objects, gfd, images-to-gfd-200, ...; repeat for several. Default: gfd.")
    ] = None,
    evidence: Annotated[str, typer.Option(help="The images, in words: also write the file that verdicts cite.")] = "",
) -> None:
    """Correlate every measure of a study's tokenizers with generation."""
    try:
        for study in studies:
            print(write_predictors(study, target or ()))
        if evidence:
            print(write_evidence(studies, evidence))
    except LatelierError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    typer.run(main)
