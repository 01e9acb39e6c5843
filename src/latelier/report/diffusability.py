"""Sentences on measures that are said to predict how well a denoiser generates: what they predict, and who found so.

Published evidence is that of "Diffusing in the Right Space" (2026, arXiv 2606.03578): 86 tokenizers of three families,
whose reconstructions were about equally good, each with several denoisers. Ours is `evidence.json`, which is written by
`python -m studies.analysis.predictors`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from latelier.report.measures import Finding, Findings, Kind, Measures, Rule, near

EVIDENCE = Path(__file__).with_name("evidence.json")
STUDY = "In the study of 86 tokenizers (arXiv 2606.03578)"
EQUIVARIANT, UNRELATED = 0.1, 1.0  # error as a share of the variance; two unrelated images have 2
HALF, AS_NOISE = 0.5, 0.95  # of what latents without any structure have
ENOUGH_OF_CLASS = 20  # images: with 8 the velocity's variance comes out at 86 %, with 20 at 96 % of the truth
TOGETHER, APART = 0.5, 0.1  # of the way from chance to neighbours of one's own class only


def velocity(m: Measures) -> Findings:
    """How much of a denoiser's loss is left to learn from."""
    value, few = m["viv"], m.about("viv", "images_per_class")
    share = value / (math.pi / 2)
    words = f"within a class no network gets below a loss of {value:.2f} per number, {100 * share:.0f} % of that of "
    words += f"noise. {STUDY} lower was better, and nothing predicted generation as well (correlation with FID 0.87 in "
    words += f"one of three families). {ours('viv')}"
    if few and few[0] < ENOUGH_OF_CLASS:
        words += f" Classes of {few[0]} images make it seem smaller: compare at equal images only."
        yield Finding("fair", f"Velocities may be ambiguous: {words}", {"viv": value})
    elif value >= 0:
        kind, told = _beside_noise(share, "hardly ambiguous", "somewhat ambiguous", "as ambiguous as can be")
        yield Finding(kind, f"Velocities are {told}: {words}", {"viv": value})


def neighbourhood(m: Measures) -> Findings:
    """Whether near latents have the same label."""
    value, chance = m["neighbours-10"], m.number("neighbours-10", "chance")
    skill = (value - chance) / (1 - chance) if chance < 1 else math.nan
    if math.isnan(skill):
        return
    kind: Kind = "good" if skill >= TOGETHER else "bad" if skill < APART else "fair"
    told = {"good": "lie together", "fair": "partly lie together", "bad": "do not lie together"}[kind]
    words = f"Classes {told}: {100 * value:.0f} % of the ten nearest images have the same label, by chance "
    words += f"{100 * chance:.0f} %. {STUDY} more was better; with the structure of objects it explained 91 % of the "
    yield Finding(kind, f"{words}variance of FID. {ours('neighbours-10')}", {"neighbours-10": value})


def structure(m: Measures) -> Findings:
    """Whether neighbouring positions of a latent are alike; no value is known to be enough."""
    name = next((name for name in ("structure-srss", "structure-lds") if name in m.values), "structure-lds")
    value, what = m[name], "positions of one object" if name.endswith("srss") else "neighbouring positions"
    words = f"the similarity of {what} exceeds that of distant ones by {value:.2f}. {STUDY} more was better, and "
    words += f"spatial structure was among the three best predictors. {ours(name)}"
    if value <= 0:
        yield Finding("bad", f"Latents have no spatial structure: {words}", {name: value})
    elif value > 0:
        yield Finding("fair", f"Latents have spatial structure: {words}", {name: value})


def frequencies(m: Measures) -> Findings:
    """Whether the energy of latents lies in what diffusion learns last."""
    value, noise = m["high-frequency"], m.number("high-frequency", "white_noise")
    share = value / noise if noise > 0 else math.nan
    if share >= 0:
        kind, told = _beside_noise(share, "mostly coarse", "coarse and fine", "as flat as noise")
        words = f"Latents are {told}: {100 * value:.0f} % of their energy is fine detail (noise: {100 * noise:.0f} %). "
        words += f"{STUDY} less was better, but other measures predicted more. {ours('high-frequency')}"
        yield Finding(kind, words, {"high-frequency": value})


def between(m: Measures) -> Findings:
    """Whether there are images between two latents; no value is known to be enough."""
    for name, value in m.begin("interpolation-").items():
        rfd = name.replace("interpolation", "rfd", 1)
        words = f"Images decoded from half-way between two neighbours are {near(value)} from the originals"
        words += f", reconstructions {near(m[rfd])}" if rfd in m.values else ""
        words += " (Fréchet distance). Over 14 released tokenizers this had nearly the order of generation (rank "
        words += "correlation 0.88, by the table of arXiv 2603.05630); among 86 that reconstruct about equally well it "
        evidence = {k: m[k] for k in (name, rfd) if k in m.values}
        yield Finding("fair", f"{words}was unstable (arXiv 2606.03578). {ours(name)}", evidence)


def paths(m: Measures) -> Findings:
    """How straight the paths of the small denoiser are; no value is known to be enough."""
    evidence = m.begin("path-")
    if "path-straightness" in evidence:
        words = f"Paths from noise to latents have a straightness of {m['path-straightness']:.3f}. {STUDY} straighter "
        words += "paths went along with better samples, but those denoisers were fully trained, and this one is small. "
        yield Finding("fair", f"{words}{ours('path-straightness')}", evidence)


def evenness(m: Measures) -> Findings:
    """How evenly latents are spread, which is not known to predict anything."""
    if "uniformity-gini" in m.values:
        words = f"Latents are spread with a Gini coefficient of {m['uniformity-gini']:.2f} (0 is even). VA-VAE reports "
        words += "more even latents beside better samples, of few tokenizers; t-SNE, on which this rests, is unstable. "
        yield Finding("fair", f"{words}{ours('uniformity-gini')}", {"uniformity-gini": m["uniformity-gini"]})


def equivariance(m: Measures) -> Findings:
    """Whether moved and scaled images have moved and scaled latents (EQ-VAE, Kouzelis et al. 2025)."""
    errors = m.begin("equivariance-")
    name, worst = max(errors.items(), key=lambda item: item[1], default=("", math.nan))
    known = f"{STUDY} this predicted generation least of all measures. {ours(*errors)}"
    if worst <= EQUIVARIANT:
        words = f"Latents move with the image: shifts, flips and scales change little else. {known}"
        yield Finding("fair", words, errors)
    elif worst >= UNRELATED:
        what = name.removeprefix("equivariance-").replace("-", " ")
        words = f"Latents do not follow the image ({what}): the error is {worst:.1f} of their variance, where "
        yield Finding("fair", f"{words}unrelated images have 2. {known}", {name: worst})


RULES: dict[Rule, str] = {  # and what each judges
    velocity: "velocities", neighbourhood: "neighbours", structure: "spatial structure", frequencies: "frequencies",
    between: "interpolation", paths: "paths", evenness: "uniformity", equivariance: "equivariance",
}  # fmt: skip
OF_MEANS = (structure, frequencies, paths, equivariance)


def _beside_noise(share: float, good: str, fair: str, bad: str) -> tuple[Kind, str]:
    """The kind of a share of what noise has, of which less is better, and its words."""
    kind: Kind = "good" if share <= HALF else "bad" if share >= AS_NOISE else "fair"
    return kind, {"good": good, "fair": fair, "bad": bad}[kind]


@cache
def read_evidence() -> dict[str, Any]:
    """What our own experiments found, see `studies.analysis.predictors`."""
    return json.loads(EVIDENCE.read_text(encoding="utf-8"))


def ours(*names: str) -> str:
    """A sentence: whether a measure, or any of several, predicted generation in our own experiments."""
    rows = [row for row in read_evidence()["predictors"] if row["metric"] in names]
    if not rows:
        return "In our own experiments it was not measured yet."
    row = max(rows, key=lambda row: (row["significant"], abs(row["spearman"])))
    side = "lower" if row["spearman"] > 0 else "higher"  # of a distance: the smaller, the better the samples
    told = f"{side} was better" if row["significant"] else "it did not predict generation beyond chance"
    return f"In our own experiments {told} (rank correlation {row['spearman']:.2f})."


def experience(metrics: Mapping[str, Any], evidence: Mapping[str, Any] | None = None) -> str:
    """Which of the measures in metrics.json went along with generation in our own experiments; empty without any.

    `evidence` is what `studies.analysis.predictors` writes; by default what comes along.
    """
    evidence = evidence or read_evidence()
    here = {name.partition("@")[0] for name in Measures(metrics).values}
    rows = [row for row in evidence["predictors"] if row["metric"] in here]
    if not rows:
        return ""
    tried = evidence["about"].partition(";")[0]
    words = f"In our own experiments ({tried}; a denoiser was trained equally long on each), "
    sure = [
        f"a {'lower' if row['spearman'] > 0 else 'higher'} {row['metric']} (rank correlation {row['spearman']:.2f}, "
        f"between {row['interval'][0]:.2f} and {row['interval'][1]:.2f} with 95 % confidence)"
        for row in rows
        if row["significant"]
    ]  # of a distance: the smaller, the better the samples
    if not sure:
        return f"{words}none of the numbers here went along with better samples beyond chance."
    words += f"tokenizers with {'; with '.join(sure)} got better samples. Of the other numbers here no such "
    return f"{words}connection is known."
