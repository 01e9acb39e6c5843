"""Every recipe that comes along is constructed, shrunken, and run."""

import pytest

from latelier import evaluate
from latelier.analysis import smoothness
from latelier.evaluation import conditions, cost, features
from latelier.recipe import TrainedTokenizer, build_recipe, load_recipe, recipe_files
from latelier.run import run
from latelier.tokenizers.conv import PRESETS
from tiny import DCAE, MAETOK, RAE, VMAE, colour_extractor

SMALL_TRAINING = {"images": 8, "batch": 8, "micro_batch": None, "log_every": 8, "compile": False, "warmup": 0}
MEASURED = ("psnr", "gfd", "convergence")  # all others are tested by themselves
SMALL_GAME = {"layers": 1, "channels": 8, "start": 0, "ahead": 0}


def shrink(recipe, folder, teacher="none"):
    """The same recipe, with sizes of a test; `teacher` is the folder of a small ViT."""
    tree = recipe.model_dump()
    tree["runs"] = str(folder)
    tree["data"] |= {"source": "emoji", "image_size": 32, "length": 24, "streaming": False, "val_source": None}
    tree["data"] |= dict.fromkeys(("label_key", "caption_key", "classes", "backgrounds", "boxes", "maps"))
    tree["data"] |= {"segmentation": None, "segmentation_classes": None}
    if recipe.denoiser and any(c.kind in ("layout", "segmentation", "text", "map") for c in recipe.denoiser.condition):
        tree["data"] |= {"source": "scenes", "val_fraction": 0.5}
    if recipe.tokenizer.kind == "pretrained":
        tree["tokenizer"] = {"kind": "conv", "preset": "kl-f8-small", "perceptual_weight": 0, **SMALL_TRAINING}
    if isinstance(recipe.tokenizer, TrainedTokenizer):
        tree["tokenizer"] |= {"image_size": recipe.tokenizer.image_size and 16, "init": None}
        for section in (tree["tokenizer"], *tree["tokenizer"]["phases"]):
            section["regularise"] = [small_term(term, teacher) for term in section.get("regularise", ())]
        if recipe.tokenizer.adversarial:
            tree["tokenizer"]["adversarial"] |= small_game(tree["tokenizer"]["adversarial"], teacher)
        for phase in tree["tokenizer"]["phases"]:
            phase |= {**SMALL_TRAINING, "image_size": phase.get("image_size") and 32}
            if phase.get("adversarial"):
                phase["adversarial"] |= small_game(phase["adversarial"], teacher)
    if recipe.tokenizer.kind == "vmae":
        tree["tokenizer"] |= {**SMALL_TRAINING, "model": VMAE}
    elif recipe.tokenizer.kind == "maetok":
        tree["data"] |= {"image_size": 64}
        tree["tokenizer"] |= {**SMALL_TRAINING, "model": MAETOK["model"]}
        tree["tokenizer"]["targets"] = [small_target(target, teacher) for target in tree["tokenizer"]["targets"]]
    elif recipe.tokenizer.kind == "rae":
        tree["tokenizer"] |= {**SMALL_TRAINING, "model": RAE, "encoder": teacher}
    elif recipe.tokenizer.kind == "dcae":
        tree["tokenizer"] |= {**SMALL_TRAINING, "model": DCAE}
        tree["tokenizer"]["prefixes"] = tree["tokenizer"]["prefixes"] and {"first": 2, "step": 2}
    elif recipe.tokenizer.kind == "conv":
        levels = len(PRESETS[recipe.tokenizer.preset]["block_out_channels"])
        tree["tokenizer"] |= {**SMALL_TRAINING, "model": {"block_out_channels": [32] * levels, "layers_per_block": 1}}
    if recipe.denoiser:
        tree["denoiser"] |= {**SMALL_TRAINING, "model": {"dim": 32, "depth": 1, "heads": 2}}
        tree["denoiser"]["condition"] = [small_condition(c) for c in tree["denoiser"]["condition"]]
        tree["denoiser"]["prefixes"] = tree["denoiser"]["prefixes"] and {"first": 2, "step": 2}
        if recipe.denoiser.kind == "ddt":
            tree["denoiser"]["model"] |= {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}
        if recipe.denoiser.align:
            tree["denoiser"]["align"] |= {"teacher": teacher, "depth": 1, "width": 8}
        if recipe.sample.guide:
            tree["denoiser"] |= {"images": 16, "snapshots": 2}
            tree["sample"]["guide"] = "snapshots/8"
        if recipe.denoiser.kind in ("uvit", "usit"):
            tree["denoiser"]["model"]["depth"] = 2
        if recipe.denoiser.kind == "unet":
            tree["denoiser"] |= {"size": "tiny", "model": {"block_out_channels": [32, 32, 32]}}
        tree["sample"] |= {"count": 4, "steps": 2}
    tree["evaluate"] |= {"samples": 16, "batch": 16, "features": "vgg16", "noise_levels": [0, 0.3]}
    tree["evaluate"]["prefix_lengths"] = None
    tree["evaluate"]["metrics"] = [name for name in recipe.evaluate.metrics if name in MEASURED]
    return build_recipe(tree)


def small_game(section, teacher):
    """A small discriminator that begins at once."""
    return {"start": 0, "ahead": 0, "teacher": teacher} if section.get("kind") == "dino" else SMALL_GAME


def small_term(term, teacher):
    """The same regulariser, from a small teacher, for images that are no smaller than LPIPS can see."""
    changes = {"align": {"teacher": teacher}, "equivariance": {"least": 0.5}}
    return {**term, **changes.get(term["kind"], {})}


def small_target(section, teacher):
    """The same target, from a small teacher if it has one."""
    small = {"dim": 16, "depth": min(section["depth"], 1), "heads": 2}
    return {**section, **small, "teacher": section["teacher"] and teacher}


def small_condition(section):
    """The same condition, with a small transformer and what the built-in data have."""
    small = {"layers": 1, "dim": 32, "heads": 2, "head_dim": 16}
    changes = {
        "text": {**small, "vocabulary": "data", "vocabulary_size": 300, "length": 12},
        "layout": {**small, "tokens": 1024, "objects": 4},
        "segmentation": {"classes": None},
    }
    return {**section, **changes.get(section["kind"], {})}


@pytest.fixture(autouse=True)
def _light(monkeypatch):
    """No network's features, and no report: both have tests of their own."""
    for module in (features, evaluate, conditions, cost, smoothness):
        monkeypatch.setattr(module, "load_extractor", lambda *_: colour_extractor())
    monkeypatch.setattr(evaluate, "write_report", lambda folder: None)


@pytest.mark.parametrize("path", recipe_files().values(), ids=recipe_files())
def test_recipe_runs(path, tmp_path, teacher):
    recipe = shrink(load_recipe(path), tmp_path, teacher)
    run(recipe)
    assert (recipe.folder / ("tokenizer" if recipe.denoiser is None else "pipeline")).is_dir()
    assert (recipe.folder / "metrics.json").is_file()
