"""What the numbers of a latent space mean for someone who is about to train a denoiser on it, in sentences.

Each rule looks at one question and either says something or is silent: where a number alone carries no judgement, none
is made up. Thresholds stand above the rules, each with its reason; `docs/latent-space.md` has them in a table. All is
read from the content of `metrics.json`, so that old numbers can be judged too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from latelier.report.page import number

EVIDENCE = Path(__file__).with_name("evidence.json")  # written by `python -m studies.analysis.predictors`

Kind = Literal["good", "fair", "bad"]
KINDS: tuple[Kind, ...] = ("bad", "fair", "good")  # in the order in which they are told

FEW_IMAGES = 500  # a share of 0.5 is known to 4 % then (95 %)
GOOD_PSNR, BAD_PSNR = 26.0, 20.0  # dB: errors of a twentieth and a tenth of the range from black to white
TOKENIZER_BOUND, DENOISER_BOUND = 0.5, 0.1  # of the samples' Fréchet distance lies in reconstruction
LARGE_SCALE, OFF_SCALE = 2.0, 1.25  # raw standard deviation, or one divided by it; the same with a configured factor
OUTLIER, UNEVEN = 10.0, 4.0  # times the median channel's variance: 3 and 2 times its standard deviation
ACTIVE, FEW_ACTIVE = 0.9, 0.5  # of the channels
REDUNDANT = 0.25  # effective rank of the channels, as a share of them
STRONG_KL, WEAK_KL = 0.5, 1e-4  # of the latents' variance is the posterior's noise
FLAT, STEEP = 3.0, 6.0  # dB lost to noise of 0.3: the error doubles, quadruples
ORDERED = 3.0  # dB lost with half of the channels: the error doubles
MANY_CHANNELS = 64  # DC-AE 1.5 (Chen et al. 2025, section 3): from here on, more channels slow diffusion down
GAUSSIAN = 0.02  # nats per component that the best mixture gains over one Gaussian
ENOUGH_MODES = 10  # must have been tried: with fewer images every mixture loses against one Gaussian
TOLD_APART, NOT_TOLD_APART = 0.5, 0.1  # of the way from guessing the most frequent class to making no error
EQUIVARIANT, UNRELATED = 0.1, 1.0  # error as a share of the variance; two unrelated images have 2
USED, HALF_USED = 0.9, 0.5  # of the codebook
LEARNT, NOT_LEARNT = 0.25, 0.02  # of the loss of independent Gaussians that the small denoiser takes away
SLOW_HOURS = 24.0  # to encode a million images


@dataclass(frozen=True)
class Finding:
    """One sentence about a latent space.

    Attributes:
        kind: `bad` (see to it before training), `fair` (know it) or `good`.
        sentence: for a person.
        evidence: the numbers that it rests on, by the names of their metrics.
    """

    kind: Kind
    sentence: str
    evidence: dict[str, float]


def read_entries(metrics: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Sections of metrics.json and their entries, as far as they are what they should be."""
    return {
        title: {name: entry for name, entry in entries.items() if isinstance(entry, dict)}
        for title, entries in metrics.items()
        if isinstance(entries, dict)
    }


class Measures:
    """Finite numbers and receipts of metrics.json by name, whatever their section.

    Args:
        metrics: section to metric name to `{value, interval, receipt}`.
    """

    def __init__(self, metrics: Mapping[str, Any]):
        every = {name: entry for entries in read_entries(metrics).values() for name, entry in entries.items()}
        found = {name: number(entry.get("value")) for name, entry in every.items()}
        self.values = {name: v for name, v in found.items() if v is not None}
        self.receipts: dict[str, dict[str, Any]] = {name: entry.get("receipt") or {} for name, entry in every.items()}

    def get(self, *names: str) -> tuple[float, ...] | None:
        """The values of these metrics, None if one is missing."""
        found = [self.values[name] for name in names if name in self.values]
        return tuple(found) if len(found) == len(names) else None

    def about(self, name: str, key: str) -> Any:
        """A field of a metric's receipt, None if it is missing."""
        return self.receipts.get(name, {}).get(key)

    def begin(self, start: str) -> dict[str, float]:
        """The metrics whose names begin so."""
        return {name: v for name, v in self.values.items() if name.startswith(start)}


Rule = Callable[[Measures], Finding | None]


def verdict(metrics: Mapping[str, Any]) -> list[Finding]:
    """Judge a latent space by its measures.

    Args:
        metrics: the content of metrics.json: section to metric name to `{value, interval, receipt}`.

    Returns:
        Findings, bad ones first; empty where no measure carries a judgement.
    """
    measures = Measures(metrics)
    found = [finding for rule in RULES if (finding := rule(measures)) is not None]
    return sorted(found, key=lambda finding: KINDS.index(finding.kind))


def _near(value: float) -> str:
    """Three significant digits, which are enough for a sentence."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


# -- reconstruction ---------------------------------------------------------------------------------------------------


def images(m: Measures) -> Finding | None:
    """Whether there were enough images to judge by."""
    counts = [m.about(name, "n") for name in m.values]
    n = max((n for n in counts if isinstance(n, int)), default=FEW_IMAGES)
    if n >= FEW_IMAGES:
        return None
    words = f"All this was measured on {n} images: small differences are chance. Measure on more before choosing."
    return Finding("fair", words, {"n": float(n)})


def detail(m: Measures) -> Finding | None:
    """How exact reconstructions are. 20 dB is an error of 10 % of the range: `10^(-20 / 20)`."""
    if (found := m.get("psnr")) is None:
        return None
    (psnr,) = found
    share = 100 * 10 ** (-psnr / 20)
    error = f"{psnr:.1f} dB, a root mean square error of {share:.0f} % of the range from black to white"
    if psnr >= GOOD_PSNR:
        return Finding("good", f"Reconstructions are close: {error}.", {"psnr": psnr})
    if psnr >= BAD_PSNR:
        return Finding("fair", f"Fine detail is lost: {error}. No denoiser brings it back.", {"psnr": psnr})
    return Finding("bad", f"Reconstructions are rough: {error}. No denoiser brings it back.", {"psnr": psnr})


def limit(m: Measures) -> Finding | None:
    """What reconstruction leaves to samples: their Fréchet distance is hardly below that of reconstructions."""
    for name, rfd in m.begin("rfd-").items():
        samples = name.replace("rfd", "gfd", 1)
        if (found := m.get(samples)) is None:
            words = f"A denoiser that draws latents perfectly would still have a {samples} near {_near(rfd)}: so far "
            return Finding("fair", f"{words}from the originals are their reconstructions.", {name: rfd})
        share, evidence = rfd / max(found[0], 1e-12), {name: rfd, samples: found[0]}
        words = f"reconstructions alone have {_near(rfd)} of the Fréchet distance {_near(found[0])} of samples"
        if share >= TOKENIZER_BOUND:
            return Finding("bad", f"The tokenizer is the bottleneck: {words}. Improve it first.", evidence)
        if share <= DENOISER_BOUND:
            return Finding("good", f"The tokenizer is not the bottleneck: {words}.", evidence)
    return None


# -- scale and channels -----------------------------------------------------------------------------------------------


def scale(m: Measures) -> Finding | None:
    """Whether raw latents have the scale of the noise, and a configured factor is theirs (LDM, section 4.3.2)."""
    if (found := m.get("latent-std")) is None or found[0] <= 0:
        return None
    (std,), configured = found, m.about("latent-std", "configured_scaling_factor")
    words = f"Raw latents have a standard deviation of {_near(std)}, where noise has 1: diffusers' scaling_factor "
    own = ". latelier normalises by itself."
    if isinstance(configured, int | float) and configured > 0:
        if 1 / OFF_SCALE <= configured * std <= OFF_SCALE:
            return None
        words = f"{words}should be {_near(1 / std)}, but is {_near(configured)} here{own}"
        return Finding("fair", words, {"latent-std": std, "scaling_factor": float(configured)})
    if 1 / LARGE_SCALE <= std <= LARGE_SCALE:
        return None
    return Finding("fair", f"{words}should be {_near(1 / std)}{own}", {"latent-std": std})


def outliers(m: Measures) -> Finding | None:
    """Whether a channel is far larger than the others, which one factor for all channels does not mend."""
    name = "largest-variance-ratio"
    if (found := m.get(name)) is None or found[0] < UNEVEN:
        return None
    number = m.about(name, "channel")
    which = "One channel" if number is None else f"Channel {number}"
    words = f"{which} has {found[0]:.0f} times the variance of the median channel: under a single scaling factor noise "
    words += "has covered the others long before it. Normalise each channel, as latelier does."
    return Finding("bad" if found[0] >= OUTLIER else "fair", words, {name: found[0]})


def silent(m: Measures) -> Finding | None:
    """Whether channels are far smaller than the others: normalised, they are as loud as those."""
    small = m.about("outlier-channels", "small")
    if not small or (found := m.get("outlier-channels")) is None:
        return None
    words = f"Nearly silent next to the others: {_channels(small)}. Normalising makes the silent as "
    return Finding(
        "fair",
        f"{words}loud as the rest, and a denoiser learns them as if they mattered.",
        {"outlier-channels": found[0]},
    )


def _channels(numbers: Sequence[int]) -> str:
    """`channel 3`, `channels 3, 5 and 8`, `12 channels`."""
    if len(numbers) > 4:
        return f"{len(numbers)} channels"
    first, last = ", ".join(map(str, numbers[:-1])), str(numbers[-1])
    return f"channels {first} and {last}" if first else f"channel {last}"


def active(m: Measures) -> Finding | None:
    """How many channels carry anything: the posterior's mean varies by more than 0.01 (Burda et al. 2016)."""
    if (found := m.get("active-channels")) is None or found[0] >= ACTIVE:
        return None
    words = f"Only {100 * found[0]:.0f} % of the channels say anything about the image; the denoiser learns noise in "
    words += "the others. Take fewer channels, or less KL."
    return Finding("bad" if found[0] < FEW_ACTIVE else "fair", words, {"active-channels": found[0]})


def redundancy(m: Measures) -> Finding | None:
    """Whether channels repeat each other."""
    channels = m.about("channel-rank", "dims")
    if (found := m.get("channel-rank")) is None or not channels or found[0] >= REDUNDANT * channels:
        return None
    words = (
        f"The {channels} channels vary in no more than {found[0]:.1f} directions: fewer channels would hold as much."
    )
    return Finding("fair", words, {"channel-rank": found[0]})


def noise(m: Measures) -> Finding | None:
    """How much of what the denoiser sees is the posterior's own noise: the square of its share of the deviation."""
    if (found := m.get("posterior-std")) is None:
        return None
    share, evidence = found[0] ** 2, {"posterior-std": found[0]}
    if share >= STRONG_KL:
        words = f"{100 * share:.0f} % of the latents' variance is the posterior's noise: the KL term is too strong."
        return Finding("bad", words, evidence)
    if share <= WEAK_KL:
        words = "The posterior is a point: the KL term does nothing, and nothing but the architecture keeps latents "
        return Finding("fair", f"{words}that are near each other alike. Look at the smoothness.", evidence)
    return None


def order(m: Measures) -> Finding | None:
    """Whether the first channels hold most of the image (DC-AE 1.5, Chen et al. 2025, section 3.2)."""
    lengths = {m.about(name, "prefix"): name for name in m.begin("prefix-psnr@")}
    lengths = {length: name for length, name in lengths.items() if isinstance(length, int)}
    whole = max(lengths, default=0)
    halves = [length for length in lengths if 0.4 * whole <= length <= 0.6 * whole]
    if not halves:
        return None
    half = min(halves, key=lambda length: abs(2 * length - whole))
    evidence = {lengths[length]: m.values[lengths[length]] for length in (half, whole)}
    lost = evidence[lengths[whole]] - evidence[lengths[half]]
    if lost <= ORDERED:
        words = (
            f"Channels are in order: the first {half} of {whole} lose only {max(0, lost):.1f} dB, so a denoiser can "
        )
        return Finding("good", f"{words}begin with few.", evidence)
    if whole < MANY_CHANNELS:
        return None
    words = f"{whole} channels without an order: half of them lose {lost:.1f} dB. Denoisers learn so many slowly; "
    return Finding("fair", f"{words}structured latents (tokenizer.prefixes) learn faster.", evidence)


def codes(m: Measures) -> Finding | None:
    """Whether the codebook is used."""
    if (found := m.get("codebook-usage")) is None:
        return None
    (usage,) = found
    if usage >= USED:
        return Finding("good", f"{100 * usage:.0f} % of the codes are in use.", {"codebook-usage": usage})
    words = f"Only {100 * usage:.0f} % of the codes are in use. Measure on more images; if it stays so, take a smaller "
    words += "codebook, or restart dead codes."
    return Finding("bad" if usage < HALF_USED else "fair", words, {"codebook-usage": usage})


# -- geometry ---------------------------------------------------------------------------------------------------------


def smoothness(m: Measures) -> Finding | None:
    """What small errors of a denoiser will do to images (LDMAE, Lee et al. 2025, figure 6)."""
    drop = m.about("smoothness-psnr", "drop")
    if not isinstance(drop, int | float) or (found := m.get("smoothness-psnr")) is None:
        return None
    clean = found[0] if (curve := m.about("smoothness-psnr", "curve")) is None else curve[0][1]
    evidence = {"smoothness-psnr": found[0], "drop in dB": float(drop)}
    cost = f"noise of 0.3 standard deviations in the latents costs {-drop:.1f} dB"
    if -drop >= STEEP:
        return Finding("bad", f"The space is steep: {cost}, so small errors of a denoiser will be seen.", evidence)
    if -drop > FLAT:
        return Finding(
            "fair", f"The space is not very smooth: {cost}; small errors of a denoiser will be seen.", evidence
        )
    if clean < BAD_PSNR:
        return None  # flat because it decodes badly at any level
    return Finding("good", f"The space is smooth: {cost}.", evidence)


def likeness(m: Measures) -> Finding | None:
    """Whether what looks alike lies together at all (LDMAE's perceptual compression)."""
    name = "separation-object"
    if (found := m.get(name)) is None or found[0] > 0:
        return None
    words = "Images that look alike do not lie closer together than any others: distances in this space mean little."
    return Finding("bad", words, {name: found[0]})


def equivariance(m: Measures) -> Finding | None:
    """Whether moved and scaled images have moved and scaled latents (EQ-VAE, Kouzelis et al. 2025)."""
    if not (errors := m.begin("equivariance-")):
        return None
    name, worst = max(errors.items(), key=lambda item: item[1])
    what = name.removeprefix("equivariance-").replace("-", " ")
    if worst <= EQUIVARIANT:
        return Finding("good", "Latents move with the image: shifts, flips and scales change little else.", errors)
    if worst < UNRELATED:
        return None
    words = f"Latents do not follow the image ({what}): the error is {worst:.1f} of their variance, where unrelated "
    return Finding("fair", f"{words}images have 2. A denoiser must learn every place anew.", {name: worst})


# -- distribution -----------------------------------------------------------------------------------------------------


def modes(m: Measures) -> Finding | None:
    """How far latents are from one Gaussian (MAETok, Chen et al. 2025, section 3: fewer modes are learnt faster)."""
    points = sorted((k, name) for name in m.begin("gmm-nll@") if isinstance(k := m.about(name, "modes"), int))
    found = m.get("gmm-modes")
    if not points or points[0][0] != 1 or points[-1][0] < ENOUGH_MODES or found is None:
        return None
    needed, gain = found[0], m.values[points[0][1]] - min(m.values[name] for _, name in points)
    evidence = {"gmm-modes": needed, points[0][1]: m.values[points[0][1]]}
    if gain <= GAUSSIAN:
        return Finding("good", "Latents are nearly one Gaussian, which is the easiest thing to diffuse from.", evidence)
    if needed < points[-1][0]:
        return None
    words = f"Latents fall into many clusters: {needed:.0f} Gaussians, the most that were tried, still fit better than "
    return Finding("fair", f"{words}fewer. Spaces of few modes are learnt faster.", evidence)


def classes(m: Measures) -> Finding | None:
    """Whether classes can be told from latents (MAETok, section 3: discriminative spaces generate better)."""
    guess = m.about("probe-accuracy", "majority")
    if (found := m.get("probe-accuracy")) is None or not isinstance(guess, int | float) or guess >= 1:
        return None
    skill, evidence = (found[0] - guess) / (1 - guess), {"probe-accuracy": found[0], "by guessing": float(guess)}
    told = f"a linear probe is right in {100 * found[0]:.0f} % of the images, guessing in {100 * guess:.0f} %"
    if skill >= TOLD_APART:
        return Finding("good", f"Classes lie apart: {told}.", evidence)
    if skill < NOT_TOLD_APART:
        return Finding("bad", f"Classes cannot be told apart in this space: {told}.", evidence)
    return None


def difficulty(m: Measures) -> Finding | None:
    """Whether a small denoiser learns soon how numbers of a latent belong together."""
    independent = m.about("diffusion-loss", "independent")
    if (found := m.get("diffusion-loss")) is None or not isinstance(independent, int | float) or independent <= 0:
        return None
    share = 1 - found[0] / independent
    evidence = {"diffusion-loss": found[0], "independent Gaussians": float(independent)}
    if share >= LEARNT:
        words = f"Easily learnt: a small denoiser is {100 * share:.0f} % below the loss of independent Gaussians after "
        return Finding("good", f"{words}a minute.", evidence)
    if share <= NOT_LEARNT:
        words = (
            "Hardly learnt: after its short training a small denoiser knows no more than if all numbers of a latent "
        )
        return Finding("bad", f"{words}were independent.", evidence)
    return None


# -- cost -------------------------------------------------------------------------------------------------------------


def cost(m: Measures) -> Finding | None:
    """Whether encoding a data set is a matter of days."""
    if (found := m.get("encode-images-per-second")) is None or found[0] <= 0:
        return None
    hours = 1e6 / found[0] / 3600
    if hours <= SLOW_HOURS:
        return None
    words = f"Encoding a million images takes {hours:.0f} hours on this device. Encode once, into a latent cache."
    return Finding("fair", words, {"encode-images-per-second": found[0]})


RULES: tuple[Rule, ...] = (
    detail, limit, smoothness, scale, outliers, silent, active, redundancy, noise, order, codes, likeness, equivariance,
    modes, classes, difficulty, cost, images,
)  # fmt: skip


# -- experience -------------------------------------------------------------------------------------------------------


def experience(metrics: Mapping[str, Any], evidence: Mapping[str, Any] | None = None) -> str:
    """Which of the measures on a page went along with generation in our own experiments, in one paragraph.

    Args:
        metrics: the content of metrics.json.
        evidence: as `studies.analysis.predictors` writes it; by default what comes along.

    Returns:
        Plain text; empty where no measure is in both.
    """
    evidence = evidence or json.loads(EVIDENCE.read_text(encoding="utf-8"))
    here = {name.partition("@")[0] for name in Measures(metrics).values}
    rows = [row for row in evidence["predictors"] if row["metric"] in here]
    sure = [row for row in rows if row["significant"]]
    begin = f"Our own experiments: {evidence['about']}. Of the measures here, "
    if not rows:
        return ""
    if not sure:
        return f"{begin}none went along with generation beyond chance."
    words = f"beyond chance went along with generation (below 0: against it): {_correlations(sure)}"
    return f"{begin}{words}. Of the others it is not known."


def _correlations(rows: Iterable[Mapping[str, Any]]) -> str:
    return "; ".join(
        f"{row['metric']} {row['spearman']:.2f} ({row['interval'][0]:.2f} to {row['interval'][1]:.2f}, "
        f"{row['n']} tokenizers)"
        for row in rows
    )
