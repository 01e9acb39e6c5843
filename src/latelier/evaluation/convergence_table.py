"""Quality over images seen, a line for each run, and how much sooner runs are where a baseline ends (DC-AE 1.5).

Read off snapshots: linear between two of them, on the lowest value so far, since a curve may rise again by chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latelier.evaluation.chart import short
from latelier.evaluation.directions import heading
from latelier.evaluation.figures import SOFT, STYLE, ImageFile, legend, make_panels, save_figure, styles
from latelier.evaluation.orderings import MISSING, RunSummary, Table, at_steps, texts, value

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEGIN = "convergence-"  # of the names of what is measured @ images seen
LOSS = f"{BEGIN}loss"
SAME = (
    "latent_shape",
    "architecture",
    "latents",
    "loss",
    "cosine_weight",
    "process",
)  # in receipts of losses to compare

Curve = list[tuple[int, float]]  # (images seen, value), ascending


@dataclass
class Reached:
    """When a curve is where another one ends.

    Attributes:
        images: seen by then.
        at_most: whether the first snapshot was there already, so that it may have been sooner.
    """

    images: float
    at_most: bool = False


def convergence(folder: Path, shown: Sequence[RunSummary], baseline: str | None) -> list[str | Table | ImageFile]:
    """The figure of all curves, and with a baseline the table of who is sooner where it ends.

    Args:
        folder: where the figure is written, as convergence.svg and convergence.png.
        shown: the runs; nothing comes out if none has measured convergence.
        baseline: name of a run; its measures may be missing.
    """
    from matplotlib import rc_context

    curves = comparable(shown, read_curves(shown), baseline)
    if not curves:
        return []
    with rc_context(STYLE):
        words = "Quality of the averaged weights over images seen in the denoiser's training"
        parts: list[str | Table | ImageFile] = [save_figure(folder, "convergence", _figure(shown, curves), words)]
    about = (
        "A loss is that of the denoiser on its own tokenizer's latents, all channels, with the same noise and times at "
        "every snapshot. Losses compare only between runs of equal latent shape, kind of tokenizer and objective; "
    )
    if baseline is None:
        return [*parts, f"{about}gfd compares between all."]
    left_out = [run.name for i, run in enumerate(shown) if _has_loss(run) and i not in curves.get(LOSS, {})]
    about += f"they are left out of {', '.join(left_out)}. " if left_out else "as all are here. "
    about += "Even then, latents of two tokenizers need not be equally hard; gfd compares between all."
    position = next((i for i, run in enumerate(shown) if run.name == baseline), None)
    if position is None or not any(position in runs for runs in curves.values()):
        return [*parts, f"The baseline, {baseline}, has not been measured yet.", about]
    return [*parts, speed_table(shown, curves, position), _how_to_read(baseline), about]


# -- curves -----------------------------------------------------------------------------------------------------------


def read_curves(shown: Sequence[RunSummary]) -> dict[str, dict[int, Curve]]:
    """Curves by metric and the run's position: distances first, then the loss."""
    found: dict[str, dict[int, Curve]] = {}
    for name in sorted(at_steps(shown, BEGIN), key=lambda name: (name.startswith(LOSS), _images(name))):
        for i, run in enumerate(shown):
            if (height := value(run, name)) is not None:
                found.setdefault(name.partition("@")[0], {}).setdefault(i, []).append((_images(name), height))
    return found


def comparable(
    shown: Sequence[RunSummary], curves: Mapping[str, dict[int, Curve]], baseline: str | None
) -> dict[str, dict[int, Curve]]:
    """The same without losses that do not compare with the baseline's, see `SAME`."""
    reference = next((run for run in shown if run.name == baseline and _has_loss(run)), None)
    if LOSS not in curves or reference is None:
        return dict(curves)
    same = {i: curve for i, curve in curves[LOSS].items() if _kind(shown[i]) == _kind(reference)}
    return {**curves, LOSS: same}


def reach(curve: Curve, level: float) -> Reached | None:
    """When the lowest value so far falls to a level, linear between snapshots; None if it never does."""
    images, lowest = [x for x, _ in curve], list(accumulate((y for _, y in curve), min))
    for i, y in enumerate(lowest):
        if y <= level and i == 0:
            return Reached(float(images[0]), at_most=True)
        if y <= level:
            share = (lowest[i - 1] - level) / (lowest[i - 1] - y)
            return Reached(images[i - 1] + share * (images[i] - images[i - 1]))
    return None


def _images(name: str) -> int:
    return int(name.partition("@")[2])


def _has_loss(run: RunSummary) -> bool:
    return any(name.startswith(f"{LOSS}@") for name in run.metrics)


def _kind(run: RunSummary) -> list[Any]:
    """What two runs must share for their losses to compare."""
    receipt = next(entry.get("receipt") or {} for name, entry in run.metrics.items() if name.startswith(f"{LOSS}@"))
    return [receipt.get(key) for key in SAME]


# -- table and figure -------------------------------------------------------------------------------------------------


def speed_table(shown: Sequence[RunSummary], curves: Mapping[str, dict[int, Curve]], baseline: int) -> Table:
    """For each metric the last value, the images seen at the baseline's last value, and how many times fewer they are.

    Args:
        shown: the runs.
        curves: as `comparable` gives them.
        baseline: the position of the run that others are compared with.
    """
    table = Table(["Run"], [[run.name] for run in shown])
    for name, runs in curves.items():
        if baseline not in runs:
            continue
        what, level = name.removeprefix(BEGIN), runs[baseline][-1][1]
        table.head += [f"{heading(name).removeprefix(BEGIN)} at the end", f"images to the baseline's {what}", "sooner"]
        reached = {i: reach(curve, level) for i, curve in runs.items()}
        reference = reached[baseline]
        assert reference is not None  # a curve reaches its own end
        last = texts([runs[i][-1][1] if i in runs else None for i in range(len(shown))])
        for i, (row, end) in enumerate(zip(table.rows, last)):
            here = reached.get(i)
            row += [end, _when(here) if i in runs else MISSING, _factor(here, reference)]
    return table


def _when(reached: Reached | None) -> str:
    if reached is None:
        return "not reached"
    return f"{'at most ' * reached.at_most}{round(reached.images):,}"


def _factor(reached: Reached | None, baseline: Reached) -> str:
    """How many times fewer images; a bound where one of the two is one, nothing where both are."""
    if reached is None or (reached.at_most and baseline.at_most):
        return MISSING
    bound = "at least " if reached.at_most else "at most " if baseline.at_most else ""
    return f"{bound}{baseline.images / reached.images:.2f}x"


def _how_to_read(baseline: str) -> str:
    return (
        f"Images seen until a run is where {baseline} ends, and how many times fewer they are than {baseline} itself "
        "needs: linear between snapshots, on the lowest value so far. At most: the first snapshot is there already. "
        "How sure the values are is not considered: factors near 1 may be chance."
    )


def _figure(shown: Sequence[RunSummary], curves: Mapping[str, dict[int, Curve]]) -> Figure:
    """Chen et al. 2025 (DC-AE 1.5), figure 1: one line for each run, one point for each snapshot."""
    drawn = {name: runs for name, runs in curves.items() if runs}
    figure, panels = make_panels(len(drawn), 2 if len(drawn) > 1 else 1, height=3.2, above=0.6)
    looks = styles(shown)
    for (name, runs), axes in zip(drawn.items(), panels):
        for i, points in runs.items():
            axes.plot(*zip(*points), zorder=3, **looks[i])
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(lambda images, _: short(images))
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axes.set_title(heading(name).removeprefix(BEGIN))
        axes.set_xlabel("images seen")
        axes.grid()
        axes.tick_params(length=0)
        axes.tick_params(axis="y", labelcolor=SOFT)
    legend(figure, shown, [i for i in range(len(shown)) if any(i in runs for runs in drawn.values())], 3)
    return figure
