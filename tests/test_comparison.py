"""Comparisons of runs: what is best, which orders hold, and what the files say."""

import json
import re

import markdown
import pytest
import torch
from PIL import Image

from latelier.images import make_grid, make_pairs, save_png
from latelier.report import tables
from latelier.report.comparison import write_comparison
from latelier.report.figures import _trade_offs, _trained
from latelier.report.page import column_texts
from latelier.report.tables import Published, RunSummary, best, how_to_read, orderings, sampling, verdicts
from tiny import refused


def run(name, images=None, facts=None, **values):
    """A run; a value is a number, or (number, low, high)."""
    metrics = {}
    for metric, value in values.items():
        value, *ends = value if isinstance(value, tuple) else (value,)
        entry = {"value": value, "interval": ends or None, "receipt": {"n": 100, "image_size": [64, 64]}}
        metrics[metric.replace("_", "-")] = entry
    return RunSummary(name, metrics, facts or {}, images or {})


def bold(table):
    """Names of the bold runs, by column."""
    return {head: {table.rows[i][0] for i, k in table.bold if k == j} for j, head in enumerate(table.head) if j}


def verdict(ordering):
    return {f"{pair.better}>{pair.worse}": pair.verdict for pair in ordering.pairs}


def opened(path):
    with Image.open(path) as image:
        return image.convert("RGB")


# -- directions and tables --------------------------------------------------------------------------------------------


def test_best_follows_the_direction():
    assert best([3.0, 1.0, None, 2.0], "lpips") == {1}
    assert best([3.0, 1.0, None, 2.0], "psnr") == {0}
    assert best([3.0, 3.0, 2.0], "psnr") == {0, 1}
    for nothing_to_compare in ([3.0, None], [3.0, 3.0]):
        assert best(nothing_to_compare, "psnr") == best([3.0, 1.0], "beauty") == set()


def test_measured_table():
    shown = [
        run("A", psnr=(30.0, 29.5, 30.5), beauty=1.0),
        run("B", psnr=20.0, lpips=0.2),
        run("C", lpips=float("nan")),
    ]
    table, words = tables.measured(shown, columns := ["psnr", "lpips", "beauty"]), how_to_read(shown, columns)
    assert table.head == ["Run", "psnr ↑", "lpips ↓", "beauty"]
    assert table.rows == [["A", "30.00 ± 0.50", "–", "1.000"], ["B", "20.00", "0.2000", "–"], ["C", "–", "–", "–"]]
    assert bold(table) == {"psnr ↑": {"A"}, "lpips ↓": set(), "beauty": set()}
    assert "95 %" in words
    assert "95 %" not in how_to_read(shown[1:], ["psnr"])


@pytest.mark.parametrize(
    ("values", "texts"),
    [([29.8, 23.123, None], ["29.80", "23.12", "–"]), ([14.8, 0.81], ["14.800", "0.810"]),
     ([83653863.0, 11.2], ["83.65M", "11.2"]), ([0.0, 0.0], ["0", "0"]), ([-0.25, 0.5], ["-0.2500", "0.5000"]),
     ([2e-5, 1e-6], ["2e-05", "1e-06"])],
)  # fmt: skip
def test_numbers_of_a_column_have_equal_decimals(values, texts):
    assert column_texts(values) == texts


def test_published_values_stay_as_printed():
    published = Published("A paper", {"X": {"rfd": 5.9}, "B": {"rfd": 0.89, "psnr": 31.0}})
    words, table = tables.printed([run("A"), run("B")], published)
    assert words == "A paper."
    assert table.rows == [["B", "0.89", "31"], ["X", "5.90", "–"]]
    assert bold(table) == {"rfd ↓": {"B"}, "psnr ↑": set()}


# -- orderings --------------------------------------------------------------------------------------------------------


def test_reproduced_reversed_undecided():
    published = Published("p", {"A": {"psnr": 32.0}, "B": {"psnr": 30.0}, "C": {"psnr": 29.0}})
    shown = [run("A", psnr=(25.0, 24.0, 26.0)), run("B", psnr=(25.5, 24.5, 26.5)), run("C", psnr=(28.0, 27.0, 29.0))]
    (found,) = orderings(shown, published)
    assert (found.paper, found.measured) == ([["A"], ["B"], ["C"]], [["C"], ["B"], ["A"]])
    assert verdict(found) == {"A>B": "undecided", "A>C": "reversed", "B>C": "reversed"}
    assert found.pairs[0].why == "intervals overlap"
    assert (found.tau, found.intervals) == (pytest.approx(-1), "all")
    table, words = verdicts([found], published)
    assert table.rows == [["psnr", "A > B > C", "C > B > A", "0", "2", "1", "-1.00", "A > C, B > C"]]
    assert "Of 3 pairs of runs, 0 reproduced, 2 reversed, 1 undecided." in words
    assert "no interval" not in words
    assert "different features" not in words


def test_lower_is_better_and_no_interval():
    published = Published("p", {"A": {"rfd": 3.0}, "B": {"rfd": 2.0}, "C": {"rfd": 1.0}, "Elsewhere": {"rfd": 0.1}})
    shown = [run("A", rfd_vgg16=30.0), run("B", rfd_vgg16=10.0), run("C", rfd_vgg16=10.1), run("Mine", rfd_vgg16=1.0)]
    (found,) = orderings(shown, published)
    assert (found.metric, found.published) == ("rfd-vgg16", "rfd")
    assert found.paper == [["C"], ["B"], ["A"]]
    assert verdict(found) == {"B>A": "reproduced", "C>A": "reproduced", "C>B": "reversed"}
    assert found.tau == pytest.approx(1 / 3)
    _, words = verdicts([found], published)
    assert "no interval for rfd-vgg16" in words
    assert "compared by order only: rfd there, rfd-vgg16 here" in words


def test_equal_values_are_undecided():
    published = Published("p", {"A": {"ssim": 0.9}, "B": {"ssim": 0.9}, "C": {"ssim": 0.8}, "D": {"ssim": 0.7}})
    (found,) = orderings([run("A", ssim=0.5), run("B", ssim=0.6), run("C", ssim=0.4), run("D", ssim=0.4)], published)
    reasons = {f"{pair.better}{pair.worse}": pair.why for pair in found.of("undecided")}
    assert reasons == {"AB": "equal in the paper", "CD": "equal as measured"}
    assert len(found.of("reproduced")) == 4
    assert (found.paper, found.measured) == ([["A", "B"], ["C"], ["D"]], [["B"], ["A"], ["C", "D"]])
    assert found.tau == pytest.approx(4 / 5)  # tau-b: (4 - 0) / sqrt((6 - 1) (6 - 1))
    assert verdicts([found], published)[0].rows[0][1:3] == ["A = B > C > D", "B > A > C = D"]


def test_a_value_without_interval_is_exact():
    published = Published("p", {"A": {"psnr": 3.0}, "B": {"psnr": 2.0}, "C": {"psnr": 1.0}})
    (found,) = orderings([run("A", psnr=(20, 18, 22)), run("B", psnr=19.0), run("C", psnr=17.0)], published)
    assert verdict(found) == {"A>B": "undecided", "A>C": "reproduced", "B>C": "reproduced"}
    assert found.intervals == "some"
    assert "Not every run has an interval for psnr" in verdicts([found], published)[1]


def test_what_cannot_be_ordered_is_said():
    published = Published("p", {"A": {"psnr": 3.0, "beauty": 1.0, "l1": 0.1}, "B": {"beauty": 2.0, "l1": 0.1}})
    found = orderings([run("A", psnr=20, beauty=1, l1=0.1), run("B", psnr=19, beauty=2, l1=0.2)], published)
    assert [ordering.metric for ordering in found] == ["l1"]
    assert found[0].tau is None  # the paper has no order
    assert verdicts(found, published)[0].rows[0][6] == "–"
    assert "Without an order to compare: psnr, beauty" in verdicts(found, published)[-1]


def test_every_extractor_is_a_row_and_columns_come_first():
    published = Published("p", {"A": {"rfd": 3.0, "psnr": 1.0}, "B": {"rfd": 2.0, "psnr": 2.0}})
    shown = [run(name, psnr=1.0, rfd_vgg16=1.0, rfd_inception=2.0) for name in "AB"]
    assert [o.metric for o in orderings(shown, published, ["rfd-inception"])] == ["rfd-inception", "psnr", "rfd-vgg16"]


# -- receipts ---------------------------------------------------------------------------------------------------------


def test_receipts_tell_equal_from_unequal():
    shown = [run("A", psnr=1, lpips=2), run("B", psnr=1, lpips=2)]
    shown[0].metrics["lpips"]["receipt"]["n"] = 50
    shown[1].metrics["psnr"]["receipt"]["warning"] = "few images"
    equal, unequal, warning = tables.receipts(shown, ["psnr", "lpips"])
    assert equal == "Equal in all runs: n 100 (psnr); image size 64 x 64."
    assert unequal == "Not equal in all runs: n 100 or 50 (lpips)."
    assert warning == "Warning on psnr: few images."


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path):
    images = torch.rand(16, 3, 16, 16) * 2 - 1
    grid = save_png(make_pairs(images, images * 0.5, columns=4), tmp_path / "grid.png")
    shown = [
        run("VMAE", {"reconstructions": grid, "samples": tmp_path / "none.png"}, {"parameters": 11190000}, psnr=29.0,
            rfd_vgg16=0.8),
        run("<i>a|b</i> $x_1$", {"reconstructions": grid}, {"seconds": None}, psnr=(27.0, 26.0, 28.0), rfd_vgg16=1.5),
        run("_third*", psnr=25.0),
    ]  # fmt: skip
    for i, one in enumerate(shown[:2]):
        curve = [[0, 0.1], [0.1, 0.2 + i], [0.3, float("nan")], [1.0, 9.0]]
        one.metrics["smoothness-rfd-vgg16"] = {"value": 0.3, "interval": None, "receipt": {"curve": curve}}
    published = Published("A <paper>", {"VMAE": {"psnr": 31.5}, "_third*": {"psnr": 20.0}})
    return shown, ["psnr", "rfd-vgg16", "beauty"], published


def write(folder, study, title="Five & more"):
    shown, columns, published = study
    return write_comparison(folder, title, "What <this> is.\n\nAnd why.", shown, {"Measured": columns}, published)


def test_files(tmp_path, study):
    page = write(tmp_path / "out", study)
    assert page == tmp_path / "out" / "comparison.html"
    assert {path.name for path in page.parent.iterdir()} == {
        "comparison.html", "comparison.json", "table.md", "overview.svg", "overview.png", "smoothness.svg",
        "smoothness.png", "reconstructions.png",
    }  # fmt: skip
    content = json.loads((page.parent / "comparison.json").read_text())
    assert content["runs"][0]["metrics"]["psnr"]["value"] == 29.0
    assert content["runs"][0]["metrics"]["smoothness-rfd-vgg16"]["receipt"]["curve"][2] == [0.3, None]
    assert content["columns"] == {"psnr": "higher", "rfd-vgg16": "lower", "beauty": None}
    assert content["orderings"][0]["pairs"] == [
        {"better": "VMAE", "worse": "_third*", "verdict": "reproduced", "why": ""}
    ]


def test_page_is_whole_and_escaped(tmp_path, study):
    html = write(tmp_path, study).read_text()
    for name in ("VMAE", "&lt;i&gt;a|b&lt;/i&gt; $x_1$", "_third*", "Five &amp; more", "What &lt;this&gt; is."):
        assert name in html
    assert "<i>" not in html
    assert html.count("data:image/png;base64,") == 3  # overview, smoothness, reconstructions
    assert not re.search(r'(src|href)="(?!data:|#)', html)
    assert re.findall("<h2>(.*?)</h2>", html) == [
        "Measured", "How to read the tables", "Published", "Orderings", "What each run took", "Figures", "Images",
        "Receipt",
    ]  # fmt: skip
    assert "<b>29.00</b>" in html


def test_markdown_is_read_as_meant(tmp_path, study):
    text = (write(tmp_path, study).parent / "table.md").read_text()
    html = markdown.markdown(text, extensions=["tables"])
    found = re.findall("<table>.*?</table>", html, re.DOTALL)
    cells = [re.findall("<td.*?>(.*?)</td>", row) for row in re.findall("<tr>.*?</tr>", found[0], re.DOTALL)]
    assert cells[1] == ["VMAE", "<strong>29.00</strong>", "<strong>0.800</strong>", "–"]
    assert cells[2] == ["&lt;i&gt;a|b&lt;/i&gt; $x_1$", "27.00 ± 1.00", "1.500", "–"]
    assert cells[3] == ["_third*", "25.00", "–", "–"]
    assert len(found) == 4
    assert "<i>" not in html
    assert "<em>" not in html
    for file in re.findall(r"\]\((.*?)\)", text):
        assert (tmp_path / file).is_file()


def test_written_twice_is_the_same(tmp_path, study):
    first, second = (write(tmp_path / name, study).parent for name in ("one", "two"))
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_images_keep_whole_pairs(tmp_path, study):
    write(tmp_path, study)
    image = opened(tmp_path / "reconstructions.png")
    rows, gap, name = 8, 2, 26
    assert image.height == 2 * (2 * (rows * (16 + gap) - gap) + name) + 6  # 142 pixels fit 300 when doubled
    tall = save_png(make_grid(torch.rand(30, 3, 32, 32), columns=5), tmp_path / "tall.png")
    one = run("A", {"samples": tall}, psnr=1.0)
    write_comparison(tmp_path / "tall", "t", "", [one], {"Measured": ["psnr"]}, None)
    shown = opened(tmp_path / "tall" / "samples.png")
    assert shown.size == (2 * (5 * 34 - 2), name + 2 * (4 * 34 - 2))  # four rows of six
    block = shown.crop((0, name, shown.width, shown.height)).resize((168, 134), Image.Resampling.NEAREST)
    assert block.tobytes() == opened(tall).crop((0, 0, 168, 134)).tobytes()


def test_names_lead_to_reports_and_facts_come_first(tmp_path):
    shown = [run("A & b", facts={"factor": 8}, psnr=20.0), run("C", facts={"factor": 4}, psnr=21.0)]
    shown[0].link = "a-b/report.html?x&y"
    page = write_comparison(tmp_path, "t", "", shown, {"Measured": ["psnr"]}, None, facts="What they are")
    html = page.read_text()
    assert html.count('<a href="a-b/report.html?x&amp;y">A &amp; b</a>') == 2  # facts and numbers
    assert html.count("<a href") == 2  # the other one has no report
    assert re.findall("<h2>(.*?)</h2>", html)[:2] == ["What they are", "Measured"]
    assert "| [A &amp; b](a-b/report.html?x&y) | 8 |" in (tmp_path / "table.md").read_text()


def test_one_run_and_nothing_published(tmp_path):
    page = write_comparison(tmp_path, "One", "", [run("Alone", psnr=20.0)], {"Measured": ["psnr"]}, None)
    html = page.read_text()
    assert "Alone" in html
    assert "Orderings" not in html
    assert "<b>" not in html  # best of one is no news
    assert not (tmp_path / "smoothness.png").exists()
    for names in (["A", "A"], []):  # runs need names of their own
        sentence, shown = re.escape(f"different names, not {names}"), [run(name) for name in names]
        refused(sentence, write_comparison, tmp_path, "t", "", shown, {"Measured": ["psnr"]}, None)


# -- sampling ---------------------------------------------------------------------------------------------------------


def sampler(name, points, training=None):
    """A run with (steps, gfd, samples per second)."""
    one = run(name, facts={tables.TRAINING_SPEED: training} if training else {}, psnr=20.0)
    for steps, gfd, speed in points:
        receipt = {"n": 200, "steps": steps, "batch": 50, "threads": 2}
        one.metrics[f"gfd-vgg16@{steps}"] = {"value": gfd, "interval": None, "receipt": {**receipt, "warning": "few"}}
        one.metrics[f"samples-per-second@{steps}"] = {"value": speed, "interval": None, "receipt": receipt}
    return one


SAMPLERS = [
    sampler("LDM-1", [(100, 90.0, 0.5), (20, 120.0, 2.5)], 30.0),
    sampler("LDM-8", [(100, 55.5, 40.0), (20, 60.0, 200.0)], 4000.0),
]


def test_sampling_table():
    table, words, equal, warning = sampling(SAMPLERS)
    assert table.head == ["Run", "gfd-vgg16 @20 ↓", "gfd-vgg16 @100 ↓", "samples/s @20 ↑", "samples/s @100 ↑"]
    assert table.rows == [["LDM-1", "120.0", "90.00", "2.50", "0.500"], ["LDM-8", "60.0", "55.50", "200.00", "40.000"]]
    assert all(winners == {"LDM-8"} for winners in bold(table).values())
    assert "number of sampling steps" in words
    assert equal == "Equal in all runs: n 200; batch 50; threads 2."
    assert warning == "Warning on gfd-vgg16@20, gfd-vgg16@100: few."
    assert sampling([run("A", gfd_vgg16=3.0)]) == []


def test_sampling_on_the_page(tmp_path):
    page = write_comparison(tmp_path, "t", "", SAMPLERS, {"Generation": ["gfd-vgg16@100"]}, None)
    assert re.findall("<h2>(.*?)</h2>", page.read_text())[:2] == ["Generation", "Sampling"]
    assert page.read_text().count("data:image/png;base64,") == 3  # overview, sampling, training
    text = (tmp_path / "table.md").read_text()
    assert "samples/s @20 ↑" in text
    for name in ("sampling", "training"):
        assert f"]({name}.svg)" in text
        assert opened(tmp_path / f"{name}.png").size[0] == 1800
        assert "#0072b2" in (tmp_path / f"{name}.svg").read_text()


def test_figures_of_speed_need_their_numbers(tmp_path):
    write_comparison(tmp_path / "a", "t", "", [sampler("A", [(20, 9.0, 2.0)])], {"All": ["psnr"]}, None)
    assert (tmp_path / "a" / "sampling.png").is_file()
    assert not (tmp_path / "a" / "training.png").exists()
    one = run("B", facts={tables.TRAINING_SPEED: 12.5}, gfd_vgg16=40.0)
    write_comparison(tmp_path / "b", "t", "", [one], {"All": ["gfd-vgg16"]}, None)
    assert not (tmp_path / "b" / "sampling.png").exists()
    assert (tmp_path / "b" / "training.png").is_file()


def test_training_speed_takes_the_recipes_own_steps():
    mixed = sampler("A", [(20, 9.0, 2.0), (100, 8.0, 0.4)], 10.0)
    assert _trained([mixed]) == {"gfd-vgg16@100": {0: [(10.0, 8.0, "A")]}}
    mixed.metrics["gfd-vgg16"] = {"value": 8.5}
    assert _trained([mixed]) == {"gfd-vgg16": {0: [(10.0, 8.5, "A")]}}
    assert _trade_offs([run("none"), mixed]) == {"gfd-vgg16": {1: [(2.0, 9.0, 20), (0.4, 8.0, 100)]}}


def test_mixtures_and_maps_on_the_page(tmp_path):
    shown = [run("VAE"), run("none"), run("AE")]
    for one, values in zip(shown, [{10: 1.2, 1: 1.4}, {}, {10: 1.1, 100: 1.0}]):
        one.metrics |= {f"gmm-nll@{k}": {"value": y, "interval": None, "receipt": {}} for k, y in values.items()}
    found = tables.read_curves(shown, tables.MIXTURE)
    assert found == {tables.MIXTURE: {0: [(1, 1.4), (10, 1.2)], 2: [(10, 1.1), (100, 1.0)]}}
    tall = save_png(Image.new("RGB", (1120, 1000), "#0072b2"), tmp_path / "run" / "latent-map.png")
    shown[0].images["latent-map"] = tall
    page = write_comparison(tmp_path, "t", "", shown, {"Latents": ["gmm-nll@10"]}, None)
    assert page.read_text().count("data:image/png;base64,") == 3  # overview, modes, map
    text = (tmp_path / "table.md").read_text()
    assert "GMM negative log-likelihood of held-out latents against the number of modes](modes.svg)" in text
    assert "Latent map of VAE](latent-map.png)" in text
    assert "nats per principal component" in (tmp_path / "modes.svg").read_text()
    assert opened(tmp_path / "latent-map.png").size == (900, 26 + 804)  # whole, not cut
    assert not (tmp_path / "sampling.png").exists()
