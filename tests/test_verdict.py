"""The verdict: each rule says its sentence on made-up numbers, and is silent on others."""

from dataclasses import replace

import pytest

from latelier.report import diffusability
from latelier.report.diffusability import experience
from latelier.report.measures import KINDS, Measures
from latelier.report.page import render
from latelier.report.verdict import RULES, verdict


def made_up(**sections):
    """Content of metrics.json from `name=value` or `name=(value, receipt)`, with underscores for hyphens."""
    entries = {}
    for name, told in sections.items():
        value, receipt = told if isinstance(told, tuple) else (told, {})
        entries[name.replace("_", "-")] = {"value": value, "interval": None, "receipt": receipt}
    return {"latent space": entries}


def prefixes(whole, half, half_psnr):
    return {
        f"prefix-psnr@{length}": (value, {"prefix": length}) for length, value in ((half, half_psnr), (whole, 30.0))
    }


def mixtures(needed, *likelihoods):
    points = {f"gmm-nll@{k}": (nll, {"modes": k}) for k, nll in likelihoods}
    return {"gmm-modes": needed, **points}


def matches(kind, match, chance, real):
    return {f"{kind}-match": match, f"{kind}-match-chance": chance, f"{kind}-match-real": real}


def letters(*shares):
    return {f"text@{height}": (share, {"height": height}) for height, share in shares}


SAID = [
    ("bad", "rough: 14.0 dB, a root mean square error of 20 %", {"psnr": 14.0}),
    ("fair", "Fine detail is lost: 23.0 dB", {"psnr": 23.0}),
    ("good", "Reconstructions are close", {"psnr": 31.0}),
    ("fair", "would still have a gfd-vgg16 near 253:", {"rfd-vgg16": 253.1}),
    ("bad", "The tokenizer is the bottleneck", {"rfd-vgg16": 253.1, "gfd-vgg16": 281.1}),
    ("fair", "The denoiser is the bottleneck, not the tokenizer", {"rfd-vgg16": 3.0, "gfd-vgg16": 281.1}),
    ("bad", "no better than one image over and over", {"gfd-vgg16": (281.1, {"alike": 12.0, "spread": 253.0})}),
    ("bad", "Samples are not like the training images yet", {"gfd-vgg16": (200.0, {"alike": 12.0, "spread": 253.0})}),
    (
        "fair",
        "is 66, as many other training images have about",
        {"gfd-vgg16": (66.0, {"alike": 43.0, "spread": 124})},
    ),
    ("good", "Samples are like", {"gfd-vgg16": (14.0, {"alike": 12.0, "spread": 253.0})}),
    ("bad", "The layout is not followed: 21 %", matches("layout", 0.21, 0.2, 0.9)),
    ("fair", "The segmentation is followed in part", matches("segmentation", 0.4, 0.2, 0.9)),
    ("good", "The layout is followed: 80 %", matches("layout", 0.8, 0.2, 0.9)),
    ("bad", "Enlarged images are not better than", {"sr-lpips-difference": 0.1}),
    ("good", "Filled holes are better than", {"inpainting-lpips-difference": -0.1}),
    ("fair", "was trained on all of these images", {"ssim": (0.4, {"trained_on": "all of these images"})}),
    ("bad", "costs 7.0 dB", {"smoothness-psnr": (20.0, {"drop": -7.0})}),
    ("fair", "costs 4.0 dB", {"smoothness-psnr": (20.0, {"drop": -4.0})}),
    ("good", "The space is smooth", {"smoothness-psnr": (22.0, {"drop": -1.0, "curve": [[0, 23.0]]})}),
    ("fair", "6.8, where noise has 1: diffusers' scaling_factor should be 0.147", {"latent-std": 6.8}),
    ("fair", "should be 0.2, but is 0.1 here", {"latent-std": (5.0, {"configured_scaling_factor": 0.1})}),
    ("bad", "Channel 7 has 40 times", {"largest-variance-ratio": (40.0, {"channel": 7})}),
    ("fair", "One channel has 5 times", {"largest-variance-ratio": 5.0}),
    ("fair", "Nearly silent next to the others: channels 3 and 5", {"outlier-channels": (2.0, {"small": [3, 5]})}),
    ("fair", "the others: 9 channels", {"outlier-channels": (9.0, {"small": list(range(9))})}),
    ("bad", "Only 25 % of the channels", {"active-channels": 0.25}),
    ("fair", "Only 75 % of the channels", {"active-channels": 0.75}),
    ("fair", "The 16 channels vary in no more than 3.2 directions", {"channel-rank": (3.2, {"dims": 16})}),
    ("bad", "64 % of the latents' variance is the posterior's noise", {"posterior-std": 0.8}),
    ("fair", "The posterior is a point", {"posterior-std": 1e-3}),
    ("good", "the first 8 of 16 lose only 1.0 dB", prefixes(16, 8, 29.0)),
    ("fair", "128 channels without an order: half of them lose 16.0 dB", prefixes(128, 64, 14.0)),
    ("good", "95 % of the codes", {"codebook-usage": 0.95}),
    ("fair", "Only 70 % of the codes", {"codebook-usage": 0.7}),
    ("bad", "Only 3 % of the codes", {"codebook-usage": 0.03}),
    ("bad", "Images that look alike do not lie closer", {"separation-object": -0.01}),
    ("fair", "Latents move with the image", {"equivariance-shift": 0.05, "equivariance-flip": 0.01}),
    ("fair", "(half shift): the error is 1.4", {"equivariance-shift": 0.05, "equivariance-half-shift": 1.4}),
    ("fair", "predicted generation least of all measures. In our own", {"equivariance-shift": 1.4}),
    ("good", "Velocities are hardly ambiguous: within a class no network gets below a loss of 0.50", {"viv": 0.5}),
    ("fair", "Velocities are somewhat ambiguous", {"viv": (1.2, {"images_per_class": [20, 30]})}),
    ("bad", "100 % of that of noise. In the study of 86 tokenizers", {"viv": 1.571}),
    ("fair", "Classes of 6 images make it seem smaller", {"viv": (0.5, {"images_per_class": [6, 30]})}),
    ("good", "60 % of the ten nearest images have the same label", {"neighbours-10": (0.6, {"chance": 0.1})}),
    ("fair", "Classes partly lie together", {"neighbours-10": (0.4, {"chance": 0.1})}),
    ("bad", "Classes do not lie together", {"neighbours-10": (0.12, {"chance": 0.1})}),
    ("bad", "no spatial structure: the similarity of neighbouring positions", {"structure-lds": -0.01}),
    (
        "fair",
        "positions of one object exceeds that of distant ones by 0.30",
        {"structure-srss": 0.3, "structure-lds": 0.0},
    ),
    (
        "good",
        "30 % of their energy is fine detail (noise: 86 %)",
        {"high-frequency": (0.3, {"white_noise": 0.86})},
    ),
    ("fair", "Latents are coarse and fine", {"high-frequency": (0.6, {"white_noise": 0.86})}),
    ("bad", "Latents are as flat as noise", {"high-frequency": (0.86, {"white_noise": 0.86})}),
    ("fair", "are 40 from the originals (Fréchet distance). Over 14", {"interpolation-vgg16": 40.0}),
    ("fair", "a straightness of 0.950. In the study", {"path-straightness": 0.95, "path-efficiency": 0.8}),
    ("fair", "Gini coefficient of 0.40", {"uniformity-gini": 0.4}),
    ("good", "down to the smallest that were tried: at 6 pixels 95 %", letters((6, 0.95), (8, 0.99))),
    ("fair", "from 12 pixels of height on: at 8 pixels 70 % are read", letters((6, 0.95), (8, 0.7), (12, 0.9))),
    ("bad", "Letters are not readable: at 12 pixels 40 %", letters((8, 0.2), (12, 0.4))),
    ("good", "Samples are 1.5 times as far", {"fdr": 1.5, "fdr-vgg16": 20.0}),
    ("fair", "as held-out images are (fdr-vgg16)", {"fdr-vgg16": 5.0}),
    ("bad", "Samples are 12 times as far", {"fdr-vgg16": 12.0}),
    ("good", "nearly one Gaussian", mixtures(1.0, (1, 1.42), (10, 1.41))),
    ("fair", "100 Gaussians, the most that were tried", mixtures(100.0, (1, 1.42), (10, 1.3), (100, 1.0))),
    ("good", "right in 80 % of the images, guessing in 10 %", {"probe-accuracy": (0.8, {"majority": 0.1})}),
    ("bad", "Classes cannot be separated", {"probe-accuracy": (0.12, {"majority": 0.1})}),
    ("good", "a small denoiser is 40 % below", {"diffusion-loss": (0.6, {"independent": 1.0})}),
    ("bad", "Hardly learnt", {"diffusion-loss": (1.0, {"independent": 1.0})}),
    ("fair", "takes 278 hours", {"encode-images-per-second": 1.0}),
    ("fair", "measured on 40 images", {"precision": (0.5, {"n": 40})}),
]
SILENT = {
    "psnr": float("nan"), "rfd-vgg16": (140.0, {"n": 5000}), "gfd-vgg16": 400.0,
    "smoothness-psnr": (15.0, {"drop": -1.0, "curve": [[0, 15.5]]}), "latent-std": 1.1,
    "largest-variance-ratio": (2.0, {"channel": 0}), "outlier-channels": (1.0, {"large": [1], "small": []}),
    "active-channels": 1.0, "channel-rank": (9.0, {"dims": 16}), "posterior-std": 0.2, **prefixes(16, 8, 20.0),
    "separation-object": 0.3, "equivariance-shift": 0.5, **mixtures(20.0, (1, 1.42), (20, 1.3), (100, 1.3)),
    **matches("layout", 0.2, 0.3, 0.3), "sr-psnr-difference": -1.0,
    "probe-accuracy": (0.4, {"majority": 0.1}), "diffusion-loss": (0.9, {"independent": 1.0}),
    "encode-images-per-second": 500.0, "effective-rank": 12.0, "ssim": 0.4, "parameters": 1e9,
}  # fmt: skip


@pytest.mark.parametrize(("kind", "words", "numbers"), SAID, ids=[f"{kind}: {words[:30]}" for kind, words, _ in SAID])
def test_a_rule_says_its_sentence(kind, words, numbers):
    (finding,) = verdict(made_up(**numbers))
    assert finding.kind == kind
    assert words in finding.sentence
    assert finding.sentence.endswith(".")
    assert finding.evidence
    assert set(finding.evidence) & {*numbers, "n"}


def test_every_rule_is_silent_where_numbers_carry_no_judgement():
    assert verdict(made_up(**SILENT)) == []
    for numbers in (m for _, _, m in SAID):
        assert len(verdict(made_up(**{**SILENT, **numbers}))) <= 2  # one measure may stand in two rules
    assert verdict({}) == []
    assert verdict({"reconstruction": None, "cost": {"parameters": 3}}) == []


def test_few_modes_say_nothing():
    assert verdict(made_up(**mixtures(1.0, (1, 1.42), (2, 1.6)))) == []


def test_every_rule_is_tried():
    spoken = {rule.__name__ for rule in RULES for _, _, numbers in SAID if _fires(rule, numbers)}
    assert spoken == {rule.__name__ for rule in RULES}


def _fires(rule, numbers):
    return next(rule(Measures(made_up(**numbers))), None) is not None


def test_bad_news_come_first():
    both = made_up(**{"codebook-usage": 0.95, "psnr": 23.0, "active-channels": 0.2, "latent-std": 9.0})
    kinds = [finding.kind for finding in verdict(both)]
    assert kinds == sorted(kinds, key=KINDS.index) == ["bad", "fair", "fair", "good"]


def test_a_value_on_the_threshold_belongs_to_the_better_side():
    assert verdict(made_up(psnr=26.0))[0].kind == "good"
    assert verdict(made_up(psnr=20.0))[0].kind == "fair"
    assert verdict(made_up(latent_std=2.0)) == []


def test_nothing_is_judged_of_too_few_images():
    few = {"gfd-vgg16": (281.1, {"alike": 12.0, "spread": 253.0, "n": 24}), "active-channels": (0.2, {"n": 24})}
    found = verdict(made_up(**few, **{"codebook-usage": (0.95, {"n": 600}), "psnr": (15.0, {"n": 24})}))
    words = {finding.sentence: finding.kind for finding in found}
    told = "Too few images (24) to judge samples, active channels; measure on 100 or more."
    assert words.pop(told) == "fair"
    assert list(words.values()) == ["bad", "good"]  # PSNR is a mean, which 24 images tell


def test_what_is_within_chance_is_not_followed():
    metrics = made_up(**matches("layout", 0.5, 0.4, 0.9))
    assert verdict(metrics)[0].kind == "fair"
    metrics["latent space"]["layout-match"]["interval"] = (0.35, 0.65)
    assert verdict(metrics)[0].kind == "bad"


def test_experience_tells_what_was_significant():
    rows = [
        {"metric": "rfd-vgg16", "spearman": 0.9, "interval": [0.6, 0.98], "n": 12, "significant": True},
        {"metric": "gmm-nll", "spearman": -0.4, "interval": [-0.8, 0.2], "n": 12, "significant": False},
        {"metric": "probe-accuracy", "spearman": 0.95, "interval": [0.8, 0.99], "n": 12, "significant": True},
    ]
    evidence = {"about": "12 tokenizers on emoji", "predictors": rows}
    words = experience(made_up(**{"rfd-vgg16": 3.0, "gmm-nll@5": 1.4}), evidence)
    assert "12 tokenizers on emoji" in words
    assert "tokenizers with a lower rfd-vgg16 (rank correlation 0.90, between 0.60 and 0.98" in words
    assert "probe" not in words  # not measured here
    assert "gmm-nll" not in words
    assert "none of the numbers here went along" in experience(made_up(**{"gmm-nll@5": 1.4}), evidence)
    assert experience(made_up(psnr=20.0), evidence) == ""


def test_sentences_cite_our_own_experiments(monkeypatch):
    rows = [
        {"metric": "viv", "spearman": 0.9, "interval": [0.6, 0.98], "significant": True},
        {"metric": "neighbours-10", "spearman": -0.2, "interval": [-0.6, 0.3], "significant": False},
    ]
    monkeypatch.setattr(diffusability, "read_evidence", lambda: {"about": "x", "predictors": rows})
    assert diffusability.ours("viv") == "In our own experiments lower was better (rank correlation 0.90)."
    assert "did not predict generation beyond chance (rank correlation -0.20)" in diffusability.ours("neighbours-10")
    assert "was not measured yet" in diffusability.ours("high-frequency")


def test_equivariance_is_no_virtue():
    """The file that comes along: none of its errors went along with better samples."""
    (finding,) = verdict(made_up(**{"equivariance-shift": 0.05}))
    assert finding.kind == "fair"
    assert "did not predict generation beyond chance" in finding.sentence


def test_sentences_are_plain_text_on_the_page():
    hostile = {"about": "<b>x</b>", "predictors": [
        {"metric": "psnr", "spearman": 0.9, "interval": [0.6, 0.98], "n": 12, "significant": True}
    ]}  # fmt: skip
    numbers = made_up(psnr=14.0)
    (finding,) = verdict(numbers)
    told = replace(finding, evidence={"psnr <14>": 14.0})
    parts = {"title": "x", "sentence": "", "tiles": [], "sections": {}, "experience": experience(numbers, hostile)}
    page = render("run.html.j2", findings=[told], **parts)
    assert "<b>x" not in page
    assert "&lt;b&gt;x" in page
    assert "psnr &lt;14&gt; 14<" in page
    assert '<li class="bad"><b>bad</b>' in page
    assert '<section id="verdict">' not in render("run.html.j2", findings=[], **parts)
