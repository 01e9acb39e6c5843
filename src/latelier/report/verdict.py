"""What the numbers of a latent space mean for someone who is about to train a denoiser on it, in sentences.

Each rule answers one question from the content of `metrics.json`, or is silent where the numbers do not decide it.
Thresholds stand above the rules, each with its reason; `docs/latent-space.md` has them in a table. Rules on what is
known to predict generation, or not to, are in `diffusability`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from latelier.report import diffusability
from latelier.report.measures import KINDS, Finding, Findings, Kind, Measures, Rule, near
from latelier.report.page import number

FEW_IMAGES = 500  # a share of 0.5 is known to 4 % then (95 %)
LEAST_IMAGES, LEAST_FOR_MEANS = 100, 10  # fewer say nothing of a distribution, or of a mean over images
ALIKE, FAR = 0.1, 0.5  # of the way from other training images (0) to copies of a single image (1)
FOLLOWED, AT_CHANCE = 0.5, 0.1  # of the way from the conditions of other images (0) to the originals (1)
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
READABLE = 0.9  # of the glyphs: a word of six letters then survives in every second case
NEAR_REAL, FAR_REAL = 2.0, 10.0  # FDr; published models of ImageNet have 2.2 to 8.4 (2026)
USED, HALF_USED = 0.9, 0.5  # of the codebook
LEARNT, NOT_LEARNT = 0.25, 0.02  # of the loss of independent Gaussians that the small denoiser takes away
SLOW_HOURS = 24.0  # to encode a million images


def verdict(metrics: Mapping[str, Any]) -> list[Finding]:
    """What the content of a metrics.json says of a latent space; bad findings first."""
    m, found = Measures(metrics), list[Finding]()
    unsure: dict[str, int] = {}  # what too few images were there to judge, and how many
    for rule, question in RULES.items():
        if (finding := next(rule(m), None)) is None or (rule is images and unsure):
            continue
        n = min((n for name in finding.evidence if isinstance(n := m.about(name, "n"), int)), default=LEAST_IMAGES)
        if question and n < (LEAST_FOR_MEANS if rule in OF_MEANS else LEAST_IMAGES):
            unsure[question] = n
        else:
            found.append(finding)
    if unsure:
        words = f"Too few images ({min(unsure.values())}) to judge {', '.join(unsure)}; measure on {LEAST_IMAGES} or "
        found.append(Finding("fair", f"{words}more.", {"n": float(min(unsure.values()))}))
    return sorted(found, key=lambda finding: KINDS.index(finding.kind))


def images(m: Measures) -> Findings:
    """Whether there were enough images."""
    n = max((n for name in m.values if isinstance(n := m.about(name, "n"), int)), default=FEW_IMAGES)
    if n < FEW_IMAGES:
        words = f"All this was measured on {n} images: small differences are chance. Measure on more before choosing."
        yield Finding("fair", words, {"n": float(n)})


def seen(m: Measures) -> Findings:
    """Whether what was measured are training images."""
    for name in m.values:
        if trained_on := m.about(name, "trained_on"):
            words = f"The run was trained on {trained_on}: their numbers say little about images that it has not seen."
            yield Finding("fair", words, {name: m[name]})


def samples(m: Measures) -> Findings:
    """Whether samples are like training images, between what could not be better and what is hardly worse."""
    for name, gfd in m.begin("gfd-").items():
        alike, spread = m.number(name, "alike"), m.number(name, "spread")
        place = (gfd - alike) / (spread - alike) if spread > alike else math.nan
        evidence = {name: gfd, "other training images": alike, "copies of one image": spread}
        words = f"their Fréchet distance is {near(gfd)}, as many other training images have about {near(alike)}, and "
        words += f"copies of a single image {near(spread)} or more"
        if place > ALIKE:
            told = "no better than one image over and over" if place >= 1 else "not like the training images yet"
            yield Finding("bad" if place >= FAR else "fair", f"Samples are {told}: {words}.", evidence)
        elif place <= ALIKE:
            yield Finding("good", f"Samples are like the training images: {words}.", evidence)


def followed(m: Measures) -> Findings:
    """Whether layouts and label maps are followed, between the regions of other images and the originals."""
    for kind in ("layout", "segmentation"):
        match, chance, real = (m[f"{kind}-match{end}"] for end in ("", "-chance", "-real"))
        share = (match - chance) / (real - chance) if real > chance else math.nan  # else not even originals show it
        least, _ = m.intervals.get(f"{kind}-match") or (match, match)
        words = f"{100 * match:.0f} % of the regions show their class, with the {kind} of another image "
        words += f"{100 * chance:.0f} % would, and in the originals {100 * real:.0f} %"
        evidence = {f"{kind}-match": match, f"{kind}-match-chance": chance, f"{kind}-match-real": real}
        if share < AT_CHANCE or (least <= chance < real):
            yield Finding("bad", f"The {kind} is not followed: {words}.", evidence)
        elif share < FOLLOWED:
            yield Finding("fair", f"The {kind} is followed in part: {words}.", evidence)
        elif share >= FOLLOWED:
            yield Finding("good", f"The {kind} is followed: {words}.", evidence)


def tasks(m: Measures) -> Findings:
    """Whether enlarging and inpainting beat what needs no model, in LPIPS, which sees what people do."""
    for task, what in {"sr": "Enlarged images are", "inpainting": "Filled holes are"}.items():
        if (name := f"{task}-lpips-difference") in m.values:
            _, most = m.intervals.get(name) or (0.0, m[name])
            words = f"{what}{' not' * (most >= 0)} better than without a model: LPIPS differs by {near(m[name])} from "
            words += f"{'bicubic enlargement' if task == 'sr' else 'one colour'}, and below 0 is better."
            yield Finding("bad" if most >= 0 else "good", words, {name: m[name]})


def detail(m: Measures) -> Findings:
    """How exact reconstructions are. 20 dB is an error of 10 % of the range: `10^(-20 / 20)`."""
    share = 100 * 10 ** (-(psnr := m["psnr"]) / 20)
    error = f"{psnr:.1f} dB, a root mean square error of {share:.0f} % of the range from black to white"
    if psnr >= GOOD_PSNR:
        yield Finding("good", f"Reconstructions are close: {error}.", {"psnr": psnr})
    elif psnr >= BAD_PSNR:
        yield Finding("fair", f"Fine detail is lost: {error}. No denoiser brings it back.", {"psnr": psnr})
    elif psnr < BAD_PSNR:
        yield Finding("bad", f"Reconstructions are rough: {error}. No denoiser brings it back.", {"psnr": psnr})


def text(m: Measures) -> Findings:
    """From which height on letters survive (TokBench, 2025: FID and PSNR do not tell)."""
    shares = {height: m[name] for name in m.begin("text@") if isinstance(height := m.about(name, "height"), int)}
    lost = sorted(height for height, share in shares.items() if share < READABLE)
    kept = sorted(height for height, share in shares.items() if share >= READABLE and height > max(lost, default=0))
    if not shares:
        return
    worst = lost[-1] if lost else min(shares)
    evidence, told = {f"text@{worst}": shares[worst]}, f"at {worst} pixels {100 * shares[worst]:.0f} % are read right"
    if not lost:
        yield Finding("good", f"Letters stay readable down to the smallest that were tried: {told}.", evidence)
    elif kept:
        yield Finding("fair", f"Letters stay readable from {kept[0]} pixels of height on: {told}.", evidence)
    else:
        yield Finding("bad", f"Letters are not readable: {told}. Samples cannot show text either.", evidence)


def relative(m: Measures) -> Findings:
    """How far samples are, where held-out images have 1, in several feature spaces (FDr, 2026, arXiv 2604.28190)."""
    for name, value in (m.begin("fdr") if "fdr" not in m.values else {"fdr": m["fdr"]}).items():
        words = f"Samples are {near(value)} times as far from the training images as held-out images are"
        kind: Kind = "good" if value <= NEAR_REAL else "bad" if value >= FAR_REAL else "fair"
        yield Finding(kind, f"{words} ({name}).", {name: value})


def limit(m: Measures) -> Findings:
    """What reconstruction leaves to samples: their Fréchet distance is hardly below that of reconstructions."""
    for name, rfd in m.begin("rfd-").items():
        samples = name.replace("rfd", "gfd", 1)
        if (gfd := m.values.get(samples)) is None:
            words = f"A denoiser that generates latents perfectly would still have a {samples} near {near(rfd)}: so "
            yield Finding("fair", f"{words}far from the originals are their reconstructions.", {name: rfd})
            return
        share, evidence = rfd / max(gfd, 1e-12), {name: rfd, samples: gfd}
        words = f"reconstructions alone have {near(rfd)} of the Fréchet distance {near(gfd)} of samples"
        if share >= TOKENIZER_BOUND:
            yield Finding("bad", f"The tokenizer is the bottleneck: {words}. Improve it first.", evidence)
        elif share <= DENOISER_BOUND:
            yield Finding("fair", f"The denoiser is the bottleneck, not the tokenizer: {words}.", evidence)


def scale(m: Measures) -> Findings:
    """Whether raw latents have the scale of the noise, and a configured factor is theirs (LDM, section 4.3.2)."""
    std, configured = m["latent-std"], number(m.about("latent-std", "configured_scaling_factor")) or 0.0
    least, found, most = 1 / LARGE_SCALE, std, LARGE_SCALE
    if configured > 0:
        least, found, most = 1 / OFF_SCALE, configured * std, OFF_SCALE
    if std > 0 and not least <= found <= most:
        words = f"Raw latents have a standard deviation of {near(std)}, where noise has 1: diffusers' scaling_factor "
        words += f"should be {near(1 / std)}{f', but is {near(configured)} here' if configured > 0 else ''}"
        evidence = {"latent-std": std} | ({"scaling_factor": configured} if configured > 0 else {})
        yield Finding("fair", f"{words}. latelier normalises by itself.", evidence)


def outliers(m: Measures) -> Findings:
    """Whether a channel is far larger than the others, which one factor for all channels does not mend."""
    name = "largest-variance-ratio"
    ratio, channel = m[name], m.about(name, "channel")
    if ratio >= UNEVEN:
        words = f"{'One channel' if channel is None else f'Channel {channel}'} has {ratio:.0f} times the variance of "
        words += "the median channel: under a single scaling factor noise has covered the others long before it. "
        words += "Normalise each channel, as latelier does."
        yield Finding("bad" if ratio >= OUTLIER else "fair", words, {name: ratio})


def silent(m: Measures) -> Findings:
    """Whether channels are far smaller than the others: normalised, they are as loud as those."""
    count, small = m["outlier-channels"], m.about("outlier-channels", "small")
    if small and count > 0:
        *first, last = map(str, small)
        few = f"channels {', '.join(first)} and {last}" if first else f"channel {last}"
        words = f"Nearly silent next to the others: {few if len(small) <= 4 else f'{len(small)} channels'}. "
        words += "Normalising makes the silent as loud as the rest, and a denoiser learns them as if they mattered."
        yield Finding("fair", words, {"outlier-channels": count})


def active(m: Measures) -> Findings:
    """How many channels carry anything: the posterior's mean varies by more than 0.01 (Burda et al. 2016)."""
    if (share := m["active-channels"]) < ACTIVE:
        words = f"Only {100 * share:.0f} % of the channels say anything about the image; the denoiser learns noise in "
        words += "the others. Take fewer channels, or less KL."
        yield Finding("bad" if share < FEW_ACTIVE else "fair", words, {"active-channels": share})


def redundancy(m: Measures) -> Findings:
    """Whether channels repeat each other."""
    rank, channels = m["channel-rank"], m.number("channel-rank", "dims")
    if rank < REDUNDANT * channels:
        words = f"The {channels:.0f} channels vary in no more than {rank:.1f} directions: fewer channels would hold as "
        yield Finding("fair", f"{words}much.", {"channel-rank": rank})


def noise(m: Measures) -> Findings:
    """How much of what the denoiser sees is the posterior's own noise: the square of its share of the deviation."""
    share, evidence = m["posterior-std"] ** 2, {"posterior-std": m["posterior-std"]}
    if share >= STRONG_KL:
        words = f"{100 * share:.0f} % of the latents' variance is the posterior's noise: the KL term is too strong."
        yield Finding("bad", words, evidence)
    elif share <= WEAK_KL:
        words = "The posterior is a point: the KL term does nothing, and nothing but the architecture keeps latents "
        yield Finding("fair", f"{words}that are near each other alike. Look at the smoothness.", evidence)


def order(m: Measures) -> Findings:
    """Whether the first channels hold most of the image (DC-AE 1.5, Chen et al. 2025, section 3.2)."""
    names = {length: name for name in m.begin("prefix-psnr@") if isinstance(length := m.about(name, "prefix"), int)}
    whole = max(names, default=0)
    halves = [length for length in names if 0.4 * whole <= length <= 0.6 * whole]
    if not halves:
        return
    half = min(halves, key=lambda length: abs(2 * length - whole))
    evidence = {names[length]: m[names[length]] for length in (half, whole)}
    lost = m[names[whole]] - m[names[half]]
    if lost <= ORDERED:
        words = f"Channels are in order: the first {half} of {whole} lose only {max(0, lost):.1f} dB, so a denoiser "
        yield Finding("good", f"{words}can begin with few.", evidence)
    elif whole >= MANY_CHANNELS:
        words = f"{whole} channels without an order: half of them lose {lost:.1f} dB. Denoisers learn that many "
        yield Finding("fair", f"{words}slowly; structured latents (tokenizer.prefixes) learn faster.", evidence)


def codes(m: Measures) -> Findings:
    """Whether the codebook is used."""
    usage, evidence = m["codebook-usage"], {"codebook-usage": m["codebook-usage"]}
    if usage >= USED:
        yield Finding("good", f"{100 * usage:.0f} % of the codes are in use.", evidence)
    elif usage < USED:
        words = f"Only {100 * usage:.0f} % of the codes are in use. Measure on more images; if it stays so, take a "
        words += "smaller codebook, or restart dead codes."
        yield Finding("bad" if usage < HALF_USED else "fair", words, evidence)


def smoothness(m: Measures) -> Findings:
    """What small errors of a denoiser will do to images (LDMAE, Lee et al. 2025, figure 6)."""
    psnr, lost = m["smoothness-psnr"], -m.number("smoothness-psnr", "drop")
    clean = psnr if (curve := m.about("smoothness-psnr", "curve")) is None else curve[0][1]
    evidence = {"smoothness-psnr": psnr, "drop in dB": -lost}
    cost = f"noise of 0.3 standard deviations in the latents costs {lost:.1f} dB"
    if lost >= STEEP:
        yield Finding("bad", f"The space is steep: {cost}, so small errors of a denoiser will be seen.", evidence)
    elif lost > FLAT:
        words = f"The space is not very smooth: {cost}; small errors of a denoiser will be seen."
        yield Finding("fair", words, evidence)
    elif lost <= FLAT and clean >= BAD_PSNR:  # else it is flat because it decodes badly at any level
        yield Finding("good", f"The space is smooth: {cost}.", evidence)


def likeness(m: Measures) -> Findings:
    """Whether what looks alike lies together at all (LDMAE's perceptual compression)."""
    if (separation := m["separation-object"]) <= 0:
        words = "Images that look alike do not lie closer together than any others: distances in this space mean "
        yield Finding("bad", f"{words}little.", {"separation-object": separation})


def modes(m: Measures) -> Findings:
    """How far latents are from one Gaussian (MAETok, Chen et al. 2025, section 3: fewer modes are learnt faster)."""
    points = sorted((k, name) for name in m.begin("gmm-nll@") if isinstance(k := m.about(name, "modes"), int))
    needed = m["gmm-modes"]
    if not points or points[0][0] != 1 or points[-1][0] < ENOUGH_MODES or math.isnan(needed):
        return
    single = m[points[0][1]]
    evidence = {"gmm-modes": needed, points[0][1]: single}
    if single - min(m[name] for _, name in points) <= GAUSSIAN:
        words = "Latents are nearly one Gaussian, which is the easiest thing to diffuse from."
        yield Finding("good", words, evidence)
    elif needed >= points[-1][0]:
        words = f"Latents fall into many clusters: {needed:.0f} Gaussians, the most that were tried, still fit better "
        yield Finding("fair", f"{words}than fewer. Spaces of few modes are learnt faster.", evidence)


def classes(m: Measures) -> Findings:
    """Whether classes can be predicted from latents (MAETok, section 3: discriminative spaces generate better)."""
    right, guess = m["probe-accuracy"], m.number("probe-accuracy", "majority")
    skill = (right - guess) / (1 - guess) if guess < 1 else math.nan
    evidence = {"probe-accuracy": right, "by guessing": guess}
    numbers = f"a linear probe is right in {100 * right:.0f} % of the images, guessing in {100 * guess:.0f} %"
    if skill >= TOLD_APART:
        yield Finding("good", f"Classes lie apart: {numbers}.", evidence)
    elif skill < NOT_TOLD_APART:
        yield Finding("bad", f"Classes cannot be separated in this space: {numbers}.", evidence)


def difficulty(m: Measures) -> Findings:
    """Whether a small denoiser learns soon how numbers of a latent belong together."""
    loss, independent = m["diffusion-loss"], m.number("diffusion-loss", "independent")
    share = 1 - loss / independent if independent > 0 else math.nan
    evidence = {"diffusion-loss": loss, "independent Gaussians": independent}
    if share >= LEARNT:
        words = f"Easily learnt: a small denoiser is {100 * share:.0f} % below the loss of independent Gaussians after "
        yield Finding("good", f"{words}a minute.", evidence)
    elif share <= NOT_LEARNT:
        words = "Hardly learnt: after its short training a small denoiser knows no more than if all numbers of a latent"
        yield Finding("bad", f"{words} were independent.", evidence)


def cost(m: Measures) -> Findings:
    """Whether encoding a data set is a matter of days."""
    speed = m["encode-images-per-second"]
    if speed > 0 and (hours := 1e6 / speed / 3600) > SLOW_HOURS:
        words = f"Encoding a million images takes {hours:.0f} hours on this device. Encode once, into a latent cache."
        yield Finding("fair", words, {"encode-images-per-second": speed})


RULES: dict[Rule, str] = {  # and what each judges
    seen: "", samples: "samples", relative: "relative distances", followed: "conditions",
    tasks: "enlarging and inpainting", detail: "reconstructions", text: "text",
    limit: "what limits samples", smoothness: "smoothness", scale: "the scale of latents", outliers: "large channels",
    silent: "silent channels", active: "active channels", redundancy: "redundancy", noise: "the posterior's noise",
    order: "the order of channels", codes: "the codebook", likeness: "likeness", modes: "modes", classes: "classes",
    difficulty: "difficulty", **diffusability.RULES, cost: "speed", images: "",
}  # fmt: skip
OF_MEANS = (tasks, detail, text, smoothness, noise, order, *diffusability.OF_MEANS)  # which few images tell
