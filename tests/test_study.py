"""Studies: equal budgets, one page from several runs, nothing done twice, nothing mixed up."""

import json

import pytest
import torch
import yaml

from latelier.denoisers import build_denoiser
from latelier.errors import LatelierError
from latelier.evaluation.results import Measurement, write_measurements
from latelier.publish import manifest
from latelier.recipe import build_recipe
from latelier.study import study as studies
from latelier.study.study import Budget, build_run, length, load_study, run_study, spend
from latelier.tokenizers import build_tokenizer
from latelier.tokenizers.codec import Codec
from latelier.training.run_folder import digest
from tiny import CONV, refused, tiny_recipe

PHASES = [{"name": "tuning", "images": 32, "warmup": 8, "train": "decoder", "mask_ratio": 0}]


def write_study(folder, **changes):
    """A study of two tiny runs, on emoji, without features that take long."""
    base = tiny_recipe(folder).model_dump(exclude={"name", "runs"}, exclude_unset=True)
    base["evaluate"] |= {"metrics": ["psnr", "l1"]}
    tree = {
        "name": "pair", "title": "Two of them", "about": "A test.", "folder": str(folder),
        "columns": {"Reconstruction": ["psnr", "l1"]},
        "budget": {"tokenizer": {"images": 32}, "denoiser": {"images": 16}},
        "base": base,
        "runs": {"Plain": {}, "+ masking": {"tokenizer": {"mask_ratio": 0.5}}},
        "variants": {"small": {"base": {"data": {"image_size": 16}}, "runs": {"Plain": {"seed": 3}}}},
        "published": {"source": "nowhere", "values": {"Plain": {"psnr": 20}, "+ masking": {"psnr": 30}}},
    }  # fmt: skip
    path = folder / "pair.yaml"
    path.write_text(yaml.safe_dump({**tree, **changes}, sort_keys=False))
    return path


def test_a_study_compares_and_goes_on(tmp_path, monkeypatch):
    path = write_study(tmp_path)
    trained = []
    from latelier import run

    original = run.complete
    monkeypatch.setattr(run, "complete", lambda recipe: (trained.append(recipe.name), original(recipe))[1])
    run_study(load_study(path), only=["Plain"])
    assert trained == ["Plain"]
    page = run_study(load_study(path))
    assert trained == ["Plain", "masking"]
    root = tmp_path / "pair"
    assert page.is_relative_to(root)
    for part in ("Two of them", "Plain", "+ masking", "nowhere"):
        assert part in page.read_text()
    assert "psnr" in (root / "table.md").read_text()
    assert (root / "Plain" / "reconstructions.png").is_file()
    plan = json.loads((root / "masking" / "plan.json").read_text())
    assert (plan["recipe"]["tokenizer"]["images"], plan["recipe"]["denoiser"]["images"]) == (32, 16)

    run_study(load_study(path, overrides=["evaluate.metrics=[psnr]"]))  # measured anew, not trained anew
    assert trained == ["Plain", "masking", "Plain", "masking"]
    with pytest.raises(LatelierError, match=r"2 of 2 runs failed .*made by another recipe or budget"):
        run_study(load_study(path, overrides=["tokenizer.lr=1"]))


def test_results_outlive_the_machine(tmp_path, monkeypatch, capfd):
    """Numbers of finished runs are kept; where run folders are gone they are done all the same."""
    from latelier import run

    path, trained = write_study(tmp_path, results=str(tmp_path / "kept" / "pair"), budget={}), []

    def complete(recipe):
        trained.append(recipe.name)
        names = [name for name in ("psnr", "l1") if name in recipe.evaluate.metrics]
        found = [Measurement(name, 20.0 + recipe.tokenizer.mask_ratio, {"recipe": digest(recipe)}) for name in names]
        write_measurements(recipe.folder / "metrics.json", found, "reconstruction")

    monkeypatch.setattr(run, "complete", complete)
    monkeypatch.setattr(studies, "spend", lambda recipe, budget: (recipe, {}))
    run_study(load_study(path), only=["Plain"])
    kept, plain = tmp_path / "kept" / "pair", tmp_path / "pair" / "Plain"
    assert (kept / "Plain" / "metrics.json").read_bytes() == (plain / "metrics.json").read_bytes()
    about = manifest(kept / "Plain")
    metrics = json.loads((plain / "metrics.json").read_text())["reconstruction"]
    assert about["recipe"] == metrics["psnr"]["receipt"]["recipe"]
    assert {"settings", "versions", "git", "device"} <= set(about)

    (tmp_path / "pair").rename(tmp_path / "gone")  # another machine
    page = run_study(load_study(path, overrides=["data.workers=0", f"folder={tmp_path / 'elsewhere'}"]))
    assert trained == ["Plain", "masking"]
    shown = {run["name"]: run for run in json.loads((page.parent / "comparison.json").read_text())["runs"]}
    assert shown["Plain"]["metrics"] == metrics
    assert list(shown) == ["Plain", "+ masking"]
    assert sorted(folder.name for folder in kept.iterdir()) == ["Plain", "masking", "study.json"]

    message = r"2 of 2 runs failed .*kept/pair/Plain was made by another recipe or budget; delete it"
    refused(message, run_study, load_study(path, overrides=["tokenizer.lr=1"]))
    assert trained == ["Plain", "masking"]
    capfd.readouterr()
    run_study(load_study(path, overrides=["evaluate.metrics=[psnr]"]), only=["Plain"])
    said = " ".join(capfd.readouterr().err.split())
    assert "with other `sample` or `evaluate`, so the run is trained, since its weights are not here, anew" in said
    assert trained == ["Plain", "masking", "Plain"]
    assert list(json.loads((kept / "Plain" / "metrics.json").read_text())["reconstruction"]) == ["psnr"]

    (kept / "Plain" / "metrics.json").write_text("{}")
    refused(r"The result .*Plain is damaged \(it has 2 of .* delete it", run_study, load_study(path))


def test_variants_have_results_of_their_own(tmp_path):
    assert load_study(write_study(tmp_path, results="kept"), "small").results == "kept-small"
    assert load_study(write_study(tmp_path, results="kept"), overrides=["results=here"]).results == "here"


def test_a_failing_run_does_not_stop_the_others(tmp_path):
    path = write_study(tmp_path, runs={"Broken": {"tokenizer": {"train": ["nothing"]}}, "Plain": {}})
    refused(r"1 of 2 runs failed \(Broken: .*no weight belongs to 'nothing'", run_study, load_study(path))
    assert "Plain" in (tmp_path / "pair" / "comparison.html").read_text()


def test_variants_and_overrides_reach_every_run(tmp_path):
    study = load_study(write_study(tmp_path), "small", ["data.flip=false"])
    assert study.name == "pair-small"
    recipes = [build_run(study, name) for name in study.runs]
    assert [recipe.data.image_size for recipe in recipes] == [(16, 16), (16, 16)]
    assert [recipe.data.flip for recipe in recipes] == [False, False]
    assert [recipe.seed for recipe in recipes] == [3, 0]
    assert [recipe.name for recipe in recipes] == ["Plain", "masking"]


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, {"variant": "big"}, "has no variant 'big'; it has small"),
        ({"collumns": {"A": ["psnr"]}}, {}, "'collumns'.*did you mean 'columns'"),
        ({"budget": {"tokenizer": {"images": 8, "flops": 1e9}}}, {}, "one of images, minutes or flops"),
        ({}, {"overrides": ["budget.tokenizer.images=x"]}, r"budget.tokenizer.images = 'x'"),
    ],
)
def test_wrong_studies_are_one_sentence(tmp_path, changes, arguments, message):
    refused(message, load_study, write_study(tmp_path, **changes), **arguments)


def test_wrong_runs_are_named_before_anything_is_trained(tmp_path):
    path = write_study(tmp_path, runs={"Plain": {}, "Odd": {"tokenizer": {"mask_ration": 0.5}}})
    refused(r"Run 'Odd' of study pair: .*did you mean 'mask_ratio'", run_study, load_study(path))
    assert not (tmp_path / "pair").exists()
    refused("has no run 'Plan'; it has Plain, Odd", run_study, load_study(path), only=["Plan"])


def test_studies_that_come_along_are_whole():
    for folder in studies._FOLDERS:
        for path in folder.glob("*.yaml"):
            for variant in (None, *load_study(path).variants):
                study = load_study(path, variant)
                assert {build_run(study, name).name for name in study.runs}


def test_plans_older_than_a_key_go_on(tmp_path):
    study = load_study(write_study(tmp_path))
    budget = study.budget.model_dump(mode="json")
    settings = {"recipe": build_run(study, "Plain").model_dump(mode="json"), "budget": budget}
    older = json.loads(json.dumps(settings))
    del older["recipe"]["denoiser"]["prefixes"]  # its default is what training did before there was the key
    assert studies._digests(older) == studies._digests(settings)
    older["recipe"]["denoiser"]["batch"] += 1
    assert studies._digests(older)[0] != studies._digests(settings)[0]


def test_a_variant_may_have_runs_of_its_own(tmp_path):
    more = {"Both": {"seed": 5, "tokenizer": {"mask_ratio": 0.25}}}
    study = load_study(write_study(tmp_path, variants={"larger": {"more": more}}), "larger")
    assert list(study.runs) == ["Plain", "+ masking", "Both"]
    assert build_run(study, "Both").seed == 5
    path = write_study(tmp_path, variants={"larger": {"more": {"Plain": {}}}})
    refused("in `more` that the study has already: Plain", load_study, path, "larger")


def test_columns_tell_numbers_of_steps_apart():
    known = ["gfd-vgg16", "gfd-vgg16@10", "gfd-vgg16@100", "samples-per-second@10", "psnr"]
    assert studies._found(["gfd", "psnr"], known) == ["gfd-vgg16", "psnr"]
    assert studies._found(["gfd@10", "samples-per-second@10"], known) == ["gfd-vgg16@10", "samples-per-second@10"]
    assert studies._found(["gfd@1"], known) == []
    assert studies._found(["gfd@*"], known) == ["gfd-vgg16@10", "gfd-vgg16@100"]
    prefixes = ["prefix-psnr@4", "prefix-psnr@8"]
    assert studies._found(["prefix-psnr@*"], [*prefixes, "prefix-lpips@4"]) == prefixes


def test_facts_tell_the_speed_of_training(tmp_path):
    rows = [{"stage": "tokenizer", "images": 32, "seconds": 4.0}, {"stage": "denoiser", "images": 50, "seconds": 1.5},
            {"stage": "denoiser", "images": 100, "seconds": 0.5}]  # fmt: skip
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = studies._facts(tmp_path, {"denoiser": {"images": 100, "flops_per_image": 6.6e6}})
    assert facts == {
        "denoiser: images": 100, "denoiser: training GFLOP an image": 0.0066, "denoiser: training minutes": 0.03,
        "denoiser: training images/s": 50.0,
    }  # fmt: skip


@pytest.mark.parametrize("variant", [None, "photographs", "paper"])
def test_compression_study_has_one_unet_on_all_grids(variant):
    """Equal parameters up to the channels of the latents; a grid that is f times smaller; both sizes of the paper."""
    study = load_study("ldm_compression", variant)
    sizes = []
    for name in study.runs:
        recipe, factor = build_run(study, name), int(name.removeprefix("LDM-"))
        with torch.device("meta"):
            codec = Codec(build_tokenizer(recipe.tokenizer, recipe.data))
            shape = codec.latent_shape(*recipe.data.image_size)
            denoiser = build_denoiser(recipe.denoiser, shape, token_width=512 if variant == "paper" else 0)
        assert codec.factor == factor
        assert recipe.evaluate.sampling_steps == [10, 20, 50, 100, 200]
        assert recipe.denoiser.process.kind == "ddpm"
        sizes.append(sum(p.numel() for p in denoiser.parameters()))
    low, high = (3.9e8, 4.01e8) if variant == "paper" else (7.0e5, 7.15e5)
    assert low < min(sizes) <= max(sizes) < high
    assert len(sizes) == (6 if variant == "paper" else 5)


def test_budget_of_images_keeps_proportions(tmp_path):
    recipe = tiny_recipe(tmp_path, tokenizer={"images": 96, "warmup": 24, "phases": PHASES})
    spent, facts = spend(recipe, Budget(tokenizer={"images": 256}))
    phase = spent.tokenizer.phase(1)[1]
    assert (spent.tokenizer.images, spent.tokenizer.warmup, phase.images, phase.warmup) == (192, 48, 64, 16)
    assert spent.denoiser.images == recipe.denoiser.images
    assert length(spent.tokenizer) == 256 == facts["tokenizer"]["images"]
    assert facts["tokenizer"]["flops"] == 256 * facts["tokenizer"]["flops_per_image"]


def test_budget_of_operations_is_the_same_for_all(tmp_path):
    base = tiny_recipe(tmp_path, denoiser=None)
    game = {**CONV, "images": 4096, "adversarial": {"layers": 1, "channels": 8, "start": 2048}}
    conv = build_recipe({**base.model_dump(), "tokenizer": game})
    spent = [spend(recipe, Budget(tokenizer={"flops": 2e12})) for recipe in (base, conv)]
    for _, facts in spent:
        assert facts["tokenizer"]["flops"] == pytest.approx(2e12, rel=0.02)
    few = spent[1][0].tokenizer
    assert few.adversarial.start == pytest.approx(few.images / 2, rel=0.02)


def test_operations_of_a_step_have_their_closed_form(tmp_path):
    """A VMAE of one linear layer more on each side: 6 operations a weight and token, forward and backward."""
    shallow = tiny_recipe(tmp_path, denoiser=None, tokenizer={"mask_ratio": 0})
    deep = tiny_recipe(tmp_path, denoiser=None, tokenizer={"mask_ratio": 0})
    deep.tokenizer.model["decoder_depth"] = 2
    price = [spend(recipe, Budget())[1]["tokenizer"]["flops_per_image"] for recipe in (shallow, deep)]
    tokens, dim = 16, 32
    linear = 6 * 12 * dim**2 * tokens  # qkv, projection, MLP
    attention = 6 * 2 * tokens**2 * dim
    assert price[1] - price[0] == pytest.approx(linear + attention, rel=0.01)


def test_budget_of_minutes_is_about_the_time(tmp_path):
    recipe = tiny_recipe(tmp_path, denoiser=None)
    spent, facts = spend(recipe, Budget(tokenizer={"minutes": 1}))
    assert facts["tokenizer"]["seconds_per_image"] * length(spent.tokenizer) > 10
