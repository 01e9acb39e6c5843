"""Every number of a run says what is needed to measure it again."""

import json

import pytest

from latelier import evaluate, run
from latelier.analysis import smoothness
from latelier.evaluation import generation, reconstruction
from tiny import colour_extractor, tiny_recipe

METRICS = ["l1", "psnr", "ssim", "rfd", "gfd", "kid", "precision", "recall", "smoothness", "spectrum", "prefixes",
           "channels", "posterior", "equivariance", "codebook", "cost", "gmm"]  # fmt: skip
ANYWHERE = {"recipe", "versions", "git", "device"}
OF_IMAGES = {"n", "reference", "data", "tokenizer"}
OF_FEATURES = {"extractor", "weights_sha256", "preprocessing", "layer", "dims"}
OF_SAMPLES = {"sampler", "steps", "guidance", "seed", "ema", "images_trained", "n_reference"}


@pytest.fixture(scope="module")
def sections(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("receipts")
        patch.setenv("LATELIER_CACHE", str(folder / "cache"))
        for module in (generation, reconstruction):
            patch.setattr(module, "load_extractors", lambda names, device: [colour_extractor()] if names else [])
        patch.setattr(evaluate, "load_extractor", lambda name: colour_extractor())
        patch.setattr(smoothness, "load_extractor", lambda name, device: colour_extractor())
        section = {"metrics": METRICS, "samples": 40, "batch": 16, "modes": [1, 2], "probe_samples": 48}
        run.complete(tiny_recipe(folder, evaluate=section))
        return json.loads((folder / "tiny" / "metrics.json").read_text())


def test_receipts_are_complete(sections):
    assert {"reconstruction", "generation", "latent space", "cost"} <= set(sections)
    for section, entries in sections.items():
        for name, entry in entries.items():
            wanted = ANYWHERE | (set() if section == "cost" else OF_IMAGES)
            wanted |= OF_FEATURES if any(part in name for part in ("rfd", "gfd", "kid", "precision")) else set()
            wanted |= OF_SAMPLES if section == "generation" else set()
            assert not wanted - set(entry["receipt"]), f"{section}, {name}"


def test_distances_say_how_sure_they_are(sections):
    for section, name in (("reconstruction", "rfd-colour"), ("generation", "gfd-colour"), ("generation", "kid-colour")):
        low, high = sections[section][name]["interval"]
        assert low <= sections[section][name]["value"] <= high
