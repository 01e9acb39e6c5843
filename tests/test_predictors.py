"""Which measures predict generation: correlations with known answers, their certainty, the page and the file."""

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats
from studies.analysis import predictors
from studies.analysis.correlation import chance, correlate, holm, interval, needed, partial, pool, reliability, rho
from studies.analysis.inputs import StudyRuns, read_study, sign_of, target_of
from studies.analysis.predictors import (
    certainty,
    predict,
    prediction,
    unequal_budget,
    within_families,
    write_evidence,
    write_predictors,
)

from latelier.denoisers import build_denoiser
from latelier.evaluation.results import NOT_REACHED
from latelier.report.comparison import write_comparison
from latelier.report.diffusability import EVIDENCE
from latelier.report.tables import RunSummary
from latelier.study.results import STUDY, keep_result
from latelier.study.study import build_run, load_study
from latelier.tokenizers import build_tokenizer
from latelier.tokenizers.codec import Codec
from test_study import write_study
from tiny import refused

GFD = [9.0, 7.0, 8.0, 3.0, 5.0, 4.0, 1.0, 2.0]


def entry(value, **receipt):
    return {"value": value, "interval": None, "receipt": receipt}


def runs(images=1000, gflop=2.0, **columns):
    """One run for each of eight distances; a column has a value for each."""
    facts, shown = {"denoiser: images": images, "denoiser: training GFLOP an image": gflop}, []
    for i, gfd in enumerate(GFD):
        told = {name.replace("_", "-"): entry(row[i]) for name, row in columns.items() if row[i] is not None}
        metrics = {"gfd-vgg16": entry(gfd, sampler="euler", n=100, data="ab12"), **told}
        shown.append(RunSummary(f"T{i}", metrics, facts))
    return shown


def columns(seed, correlation, repetitions, n):
    """Pairs of columns of a bivariate normal distribution, `(repetitions, n)` each."""
    drawn = np.random.default_rng(seed).normal(size=(2, repetitions, n))
    return drawn[0], correlation * drawn[0] + math.sqrt(1 - correlation**2) * drawn[1]


# -- correlations -----------------------------------------------------------------------------------------------------


def test_rho_is_scipys_with_and_without_ties():
    for seed in range(5):
        x, y = columns(seed, 0.5, 1, 11)
        for a, b in ((x[0], y[0]), (x[0].round(), y[0].round())):
            assert rho(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)


def test_all_orders_of_few_runs_give_the_exact_chance():
    x = np.arange(5.0)
    assert chance([(x, x)]) == pytest.approx(2 / 120)  # this order and its reverse
    y = np.array([0.0, 1, 2, 4, 3])
    assert chance([(x, y)]) == pytest.approx(2 * (1 + 4) / 120)  # the four swaps of neighbours, too
    x = np.arange(12.0)
    assert chance([(x, x)]) == pytest.approx(1 / 20_000)  # random orders: never 0


def test_random_orders_agree_with_the_known_distribution():
    x, y = (column[0] for column in columns(1, 0.2, 1, 40))
    assert chance([(x, y)]) == pytest.approx(stats.spearmanr(x, y).pvalue, rel=0.1)
    assert chance([(x, y)]) == chance([(x, y)])  # addressed, not drawn from a global state


def test_chance_is_rarely_found_where_there_is_nothing():
    x, y = columns(2, 0.0, 300, 7)
    found = [chance([(a, b)]) < 0.05 for a, b in zip(x, y)]
    assert 0.02 < np.mean(found) <= 0.08
    x, y = columns(3, 0.0, 200, 5)
    p, q = columns(4, 0.0, 200, 7)
    found = [chance([(x[i], y[i]), (p[i], q[i])]) < 0.05 for i in range(200)]
    assert 0.01 < np.mean(found) <= 0.09  # of two studies together


@pytest.mark.parametrize("n", [8, 12, 20])
@pytest.mark.parametrize("r", [0.0, 0.5, 0.8])
def test_intervals_hold_the_truth_as_often_as_they_say(n, r):
    """Rho of a bivariate normal distribution is 6 / pi arcsin(r / 2)."""
    truth = 6 / math.pi * math.asin(r / 2)
    x, y = columns(int(100 * r) + n, r, 1000, n)
    held = [low <= truth <= high for low, high in (interval(rho(a, b), [n]) for a, b in zip(x, y))]
    assert 0.92 < np.mean(held) < 0.99


def test_a_perfect_order_is_not_certain():
    low, high = interval(1.0, [8])
    assert 0.5 < low < 0.97
    assert high == 1.0
    assert interval(-1.0, [8]) == (-1.0, pytest.approx(-low))


def test_two_studies_are_ranked_apart_and_weighed_by_size():
    assert pool([0.5], [9]) == 0.5
    assert pool([0.9, 0.0], [13, 8]) == pytest.approx(math.tanh(10 / 15 * math.atanh(0.9)))
    x = np.array([1.0, 2, 3, 4, 5, 6])
    levels = [(x, x + 100), (x + 100, x)]  # one order in each; against each other the studies are reversed
    found = correlate(levels)
    assert found is not None
    assert found.n == 12
    assert found.value > 0.9
    assert found.p < 1e-3
    assert correlate([(x, x), (x[:3], x[:3])]).n == 6  # three runs have no weight
    assert correlate([(x, np.ones(6))]) is None


def test_partial_correlation_takes_the_third_away():
    x, z = (column[0] for column in columns(5, 0.0, 1, 500))
    y = z + 0.1 * x
    assert abs(rho(x, y)) < 0.2
    assert partial(x, y, z) > 0.6  # what x adds to z
    w = z + 0.3 * columns(6, 0.0, 1, 500)[0][0]
    assert rho(w, z) > 0.9
    assert abs(partial(w, z + 0.3 * x, z)) < 0.15  # w knows nothing but z
    assert partial(x, z, z) is None


def test_holm_closes_one_test_after_the_other():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert (holm([0.9, 0.5]), holm([])) == ([1.0, 1.0], [])


def test_needed_is_where_significance_begins():
    assert needed(5, 0.01) is None  # even one order and its reverse are 2 of 120
    assert needed(6, 0.003) == 1.0
    assert needed(8, 0.05) == pytest.approx(0.738, abs=1e-3)  # tables of critical values
    assert needed(12, 0.05) == pytest.approx(0.587, abs=0.015)
    x = np.arange(7.0)
    y = np.array([0.0, 2, 1, 4, 3, 6, 5])
    assert (rho(x, y) >= needed(7, 0.05)) == (chance([(x, y)]) <= 0.05)


# -- measures and runs ------------------------------------------------------------------------------------------------


def test_measures_are_those_of_the_tokenizer():
    run = RunSummary(
        "A",
        {
            "psnr": entry(20.0), "within-class": entry(0.5), "gmm-nll@1": entry(1.4), "gmm-nll@10": entry(1.2),
            "prefix-psnr@4": entry(9.0), "gfd-vgg16": entry(5.0), "precision": entry(0.5, sampler="euler"),
            "inpainting-lpips": entry(0.1, images_trained=8), "parameters": entry(1e6), "gflop-encode": entry(1.0),
            "encode-images-per-second": entry(9.0), "convergence-loss@100": entry(0.1), "broken": entry(float("nan")),
        },
    )  # fmt: skip
    assert predictors.measures(run) == {"psnr": 20.0, "within-class": 0.5, "gmm-nll": 1.2}


def test_signs_follow_the_better_side():
    shown = runs(
        psnr=[-gfd for gfd in GFD], lpips=GFD, rfd_vgg16=[-gfd for gfd in GFD], effective_rank=GFD,
        diffusion_loss=[3.0] * 8, probe_accuracy=[*[0.1] * 3, *[None] * 5],
    )  # fmt: skip
    found = {one.metric: one for one in predict([shown], "gfd-vgg16")}
    signs = {name: round(one.correlation.value) for name, one in found.items()}
    assert signs == {"psnr": 1, "lpips": 1, "rfd-vgg16": -1, "effective-rank": -1}  # equal and few ones are left out
    assert {one.direction for one in found.values()} == {"higher", "lower", None}
    assert all(one.adjusted == pytest.approx(4 * one.correlation.p) for one in found.values())
    assert found["rfd-vgg16"].beyond is None


def test_beyond_rfd_tells_an_echo_from_knowledge():
    """`psnr` has rfd's order; `lpips` knows the rest of gfd = rfd + lpips."""
    rfd = [1.0, 2, 3, 4, 5, 6, 7, 8]
    rest = [gfd - value for gfd, value in zip(GFD, rfd)]
    found = {one.metric: one for one in predict([runs(rfd_vgg16=rfd, lpips=rest, psnr=[-v for v in rfd])], "gfd-vgg16")}
    assert found["lpips"].beyond == pytest.approx(partial(-np.array(rest), -np.array(GFD), np.array(rfd)))
    assert found["psnr"].correlation.value == pytest.approx(found["rfd-vgg16"].correlation.value)
    assert found["psnr"].beyond is None


def test_target_is_the_recipes_own_sampling():
    shown = [RunSummary("A", {name: entry(1.0) for name in names}) for names in (
        ["gfd-vgg16@50", "gfd-vgg16"], ["gfd-vgg16@50", "gfd-inception", "gfd-vgg16"], ["gfd-vgg16@50"],
    )]  # fmt: skip
    assert target_of(shown) == "gfd-vgg16"
    assert target_of([RunSummary("A", {"gfd-vgg16@50": entry(1.0), "gfd-vgg16@200": entry(1.0)})]) == "gfd-vgg16@200"
    assert target_of([RunSummary("A", {"psnr": entry(1.0)})]) is None


def test_budgets_are_equal_in_images_or_in_compute():
    assert unequal_budget(runs()) == ""
    assert unequal_budget([*runs(images=1000, gflop=2.0), *runs(images=500, gflop=4.01)]) == ""
    assert "500 to 1,000 images" in unequal_budget([*runs(images=1000), *runs(images=500)])
    assert "not known" in unequal_budget([RunSummary("A", {})])


# -- page and file ----------------------------------------------------------------------------------------------------


def test_page_says_what_predicts(tmp_path):
    said, table, words, dots, best = prediction(tmp_path, runs(psnr=[-gfd for gfd in GFD], ssim=[1.0, *[0.5] * 6, 2]))
    assert said == "Of 2 measures over 8 tokenizers, gfd-vgg16 goes with these beyond chance: psnr (ρ = 1.00)."
    assert [row[0] for row in table.rows] == ["psnr ↑", "ssim ↑"]
    assert table.bold == {(0, 1)}
    assert "all 2 measures" in words
    assert dots.png.is_file()
    assert best.png.with_suffix(".svg").is_file()


def test_page_says_plainly_when_nothing_does(tmp_path):
    shown = runs(psnr=[3.0, 1, 4, 2, 5, 8, 6, 0])
    said, table, *_ = prediction(tmp_path, shown)
    assert said.startswith("No measure goes with gfd-vgg16 beyond chance: of 8 tokenizers and 1 measures")
    assert "0.74 or more would have been enough" in said
    assert table.bold == set()
    shown[0].facts = {**shown[0].facts, "denoiser: images": 2000}
    assert "1,000 to 2,000 images" in prediction(tmp_path, shown)[1]


def test_only_studies_with_enough_denoisers_ask(tmp_path):
    shown = runs(psnr=GFD)
    columns = {"Reconstruction": ["psnr"]}
    write_comparison(tmp_path, "Eight", "", shown, columns, None)
    page = predictors.write_predictors(tmp_path)
    assert page == tmp_path / "predictors.html"
    assert "Of 1 measures over 8 tokenizers" in page.read_text()
    assert "### Which measures predict generation?" in (tmp_path / "predictors.md").read_text()
    write_comparison(tmp_path, "Five", "", shown[:5], columns, None)
    refused("at least 6 runs with a distance", predictors.write_predictors, tmp_path)


def test_evidence_is_made_from_measured_files(tmp_path):
    files = []
    for name, shown in (("one", runs(lpips=GFD, psnr=[1.0, 5, 2, 4, 3, 8, 6, 7])), ("two", runs(lpips=GFD)[:4])):
        write_comparison(tmp_path / name, name, "", shown, {"All": ["lpips"]}, None)
        files.append(tmp_path / name / "comparison.json")
    out = write_evidence(files, "made-up images", tmp_path / "evidence.json")
    found = json.loads(out.read_text())
    first, second = found["predictors"]
    assert (first["metric"], first["direction"]) == ("lpips", "lower")
    assert first["n"] == found["n"] == 12
    assert first["spearman"] > 0.9
    assert first["significant"]
    assert first["interval"][0] < first["spearman"] <= first["interval"][1]
    assert (second["metric"], second["n"]) == ("psnr", 8)
    assert found["about"].startswith("12 tokenizers of 2 studies on made-up images; rank correlation with gfd-vgg16")
    assert [study["title"] for study in found["studies"]] == ["one", "two"]
    assert found["studies"][0]["receipt"] == {"n": 100, "data": "ab12"} | {"sampler": "euler"}


def test_evidence_that_comes_along_is_whole():
    """It says what the verdict on a latent space reads."""
    for row in json.loads(EVIDENCE.read_text())["predictors"]:
        assert {"metric", "spearman", "interval", "n", "p_adjusted", "significant"} <= set(row)
        assert row["significant"] == (row["p_adjusted"] < predictors.ALPHA)


def test_what_is_no_evidence_is_refused(tmp_path):
    path, out = tmp_path / "comparison.json", tmp_path / "evidence.json"
    poor = [*runs(psnr=GFD)[:4], *runs(psnr=GFD, images=10)[4:]]
    for shown, sentence in (
        (runs(psnr=GFD)[:3], "has 3 runs with a distance of generation; at least 4"),
        (runs(psnr=GFD)[:5], "at least 6 runs with gfd-vgg16; here are 5"),
        (poor, "no evidence. The denoisers had different budgets"),
        (runs(), "needs a measure that differs"),
    ):
        content = {"title": "A", "runs": [{"name": r.name, "metrics": r.metrics, "facts": r.facts} for r in shown]}
        path.write_text(json.dumps(content))
        refused(sentence, write_evidence, [path], "nothing", out)
    path.write_text("[]")
    refused(r"is not the comparison\.json of a study", write_evidence, [path], "nothing", out)
    refused("not none", write_evidence, [], "nothing", out)
    assert not out.exists()


# -- results, families, repeats ----------------------------------------------------------------------------------------


IMAGES_TO = "images-to-gfd-5"
FAMILIES = {"odd": ["T0", "T2", "T4", "T6"], "even": ["T1", "T3", "T5", "T7"], "few": ["T0", "T1"]}


def kept(folder, shown, **groups):
    """The results of a study."""
    for run in shown:
        (run_folder := folder / "runs" / run.name).mkdir(parents=True)
        (run_folder / "metrics.json").write_text(json.dumps({"all": run.metrics}))
        keep_result(
            folder / "kept" / run.name, run_folder, {"run": run.name, "settings": {}, "facts": run.facts}, "", ""
        )
    about = {"title": "Eight", "runs": [run.name for run in shown], "families": {}, "repeats": {}, **groups}
    (folder / "kept" / STUDY).write_text(json.dumps(about))
    return folder / "kept"


def following():
    """Eight runs: `psnr` goes with gfd, `ssim` with precision and with images to a quality that two never had."""
    rise = [3.0, 1, 4, 2, 5, 8, 6, 7]
    shown = runs(psnr=[-gfd for gfd in GFD], ssim=rise)
    for run, level in zip(shown, rise):
        run.metrics["precision"] = entry(level, sampler="euler")
        missed = {NOT_REACHED: "gfd 5 was not reached"} if run.name in ("T1", "T3") else {}
        run.metrics[IMAGES_TO] = entry(None if missed else 1000 - level, sampler="euler", **missed)
    return shown


def test_results_and_targets(tmp_path):
    folder = kept(tmp_path, following(), families=FAMILIES)
    text = write_predictors(folder, ["precision", "gfd", IMAGES_TO]).with_suffix(".md").read_text()
    first, second, third = text.split("### Which measures predict ")[1:]
    assert first.startswith("precision?")
    assert "precision goes with these beyond chance: ssim (ρ = 1.00)" in first
    assert "gfd-vgg16 goes with these beyond chance: psnr (ρ = 1.00)" in second
    assert "goes with these beyond chance: ssim (ρ = 0.99)" in third  # two share the last rank
    assert f"{IMAGES_TO} was not reached by T1, T3, which share the last rank" in third
    assert "Within the families odd (4), even (4)" in first
    assert "Fewer than 4 runs, so left out: few (2)" in first
    assert (folder / "predictors-precision.svg").is_file()
    refused(r"at least 6 runs with objects and measures that differ", write_predictors, folder, ["objects"])
    refused(r"effective-rank has no better side", sign_of, "effective-rank")


def test_within_families_an_order_between_them_does_not_count():
    """`psnr` has the order of families, and within a family the other way round."""
    shown = runs(psnr=[0.0] * 8)
    for i, run in enumerate(shown):
        run.metrics["gfd-vgg16"]["value"] = float(i)
        run.metrics["psnr"]["value"] = 10.0 * (1 - i // 4) + i
    families = {"a": ["T0", "T1", "T2", "T3"], "b": ["T4", "T5", "T6", "T7"]}
    (across,) = predict([shown], "gfd-vgg16")
    assert across.correlation.value > 0.5
    words, table = within_families(StudyRuns("", shown, families))
    assert table.rows[0][:2] == ["psnr ↑", "−0.90"]  # a perfect order counts as half a step below 1
    assert words.startswith("Within the families a (4), b (4): ")
    assert within_families(StudyRuns("", shown, {"a": ["T0", "T1"]})) == []


def test_repeats_tell_noise_from_differences():
    """Two runs with other seeds, 2 and 4 apart: noise² = (4 + 16) / 4; they are no further tokenizers."""
    shown = runs(psnr=[-gfd for gfd in GFD])
    for i, apart in ((0, 2.0), (3, -4.0)):
        metrics = {**shown[i].metrics, "gfd-vgg16": entry(GFD[i] + apart), "psnr": entry(100.0 * apart)}
        shown.append(RunSummary(f"T{i}, seed 1", metrics, shown[i].facts))
    about = StudyRuns("", shown, {}, {"T0": "T0, seed 1", "T3": "T3, seed 1"})
    assert [run.name for run in about.tokenizers] == [f"T{i}" for i in range(8)]
    sure = reliability(np.array(GFD), [(9.0, 11.0), (3.0, -1.0)])
    assert sure.noise == pytest.approx(math.sqrt(5))
    assert sure.spread == pytest.approx(np.std(GFD, ddof=1))
    assert sure.share == pytest.approx(1 - 5 / np.var(GFD, ddof=1))
    (words,) = certainty(about)
    spread = f"{np.std(GFD, ddof=1):.3g}"
    assert f"has a standard deviation of 2.24 (2 repeated), between tokenizers of {spread}" in words
    assert reliability(np.array(GFD), [(1.0, 9.0)]).share == 0
    assert certainty(StudyRuns("", shown)) == []


def test_groups_of_a_study_reach_its_comparison(tmp_path):
    message = "families or repeats of study pair name 'Plane'"
    for groups in ({"families": {"all": ["Plane"]}}, {"repeats": {"Plain": "Plane"}}):
        refused(message, load_study, write_study(tmp_path, **groups))
    groups = {"families": {"all": ["T0"]}, "repeats": {"T0": "T1"}}
    write_comparison(tmp_path, "Eight", "", runs(psnr=GFD), {"All": ["psnr"]}, None, groups=groups)
    about = read_study(tmp_path)
    assert (about.families, about.repeats, len(about.tokenizers)) == (groups["families"], groups["repeats"], 7)


# -- the study --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [None, "emoji"])
def test_judge_study_has_many_kinds_and_one_denoiser(variant):
    study = load_study("judge", variant)
    shapes, kinds, depths = set(), set(), set()
    for name in study.runs:
        recipe = build_run(study, name)
        with torch.device("meta"):
            codec = Codec(build_tokenizer(recipe.tokenizer, recipe.data))
            shape = codec.latent_shape(*recipe.data.image_size)
            denoiser = build_denoiser(recipe.denoiser, shape, vector=True)
        kinds.add(recipe.tokenizer.kind)
        shapes.add(shape)
        depths.add((len(denoiser.blocks), denoiser.config["dim"]))
    assert kinds == {"vmae", "maetok", "dcae", "conv"}
    assert len(study.runs) >= 10
    assert len(shapes) >= 6
    assert len(depths) == 1  # the same transformer on all
    assert study.budget.denoiser.flops
    assert study.budget.tokenizer.flops
