"""The report of a run folder: whole, partial, and with hostile names."""

import json
import math
import re

import pytest
import torch

from latelier.errors import LatelierError
from latelier.evaluation.results import LEFT_OUT, Measurement, forget_left_out, write_measurements
from latelier.images import make_grid, save_png
from latelier.report.page import average, bar_chart, line_chart, short, subsample
from latelier.report.run import read_log, write_report


def fill(folder):
    (folder / "recipe.yaml").write_text(
        "name: run-1\ndata: {source: '<i>photos</i>', image_size: [64, 48]}\n"
        "tokenizer: {kind: vmae, preset: small}\ndenoiser: {kind: dit, size: S}\n"
    )
    rows = [
        {"stage": stage, "images": 64 * i, "loss": 1 / i, "kl": 3.0, "grad_norm": 1.0, "lr": 1e-4, "seconds": 2.0}
        for stage in ("tokenizer", "denoiser")
        for i in range(1, 41)
    ]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"stage": "deno')
    image = make_grid(torch.zeros(4, 3, 8, 8), 2)
    for name in (
        "previews/tokenizer-000000064000", "previews/tokenizer-000000128000", "previews/denoiser-000000064000",
        "samples/grid", "samples/nearest",
    ):  # fmt: skip
        save_png(image, folder / f"{name}.png")
    receipt = {"n": 100, "reference": "<script>alert(1)</script>", "warning": "n is below", "versions": {"torch": "2"}}
    write_measurements(
        folder / "metrics.json", [Measurement("psnr", 27.123456, receipt, (26.0, 28.0))], "reconstruction"
    )
    (folder / "skipped.jsonl").write_text('{"file": "a<b>.jpg", "reason": "truncated"}\n')


def test_whole_run(tmp_path):
    fill(tmp_path)
    path = write_report(tmp_path)
    page = path.read_text()
    assert path == tmp_path / "report.html"
    assert re.findall("<h2>(.*?)</h2>", page) == [
        "Verdict", "Samples", "Reconstructions", "Metrics", "Training", "Previews", "Skipped files", "Recipe",
    ]  # fmt: skip
    assert "vmae small + dit S on &lt;i&gt;photos&lt;/i&gt; at 64 x 48 px" in page
    assert "27.12" in page
    assert "26.00 to 28.00" in page
    assert "after 128k images" in page
    assert page.count("<svg") == 8  # loss, kl, gradient norm and learning rate of two stages


def test_everything_is_escaped_and_nothing_is_fetched(tmp_path):
    fill(tmp_path)
    page = write_report(tmp_path).read_text()
    assert "<script>alert" not in page
    assert "<i>photos" not in page
    assert "a<b>" not in page
    assert not re.search(r"""(src|href)=["']?(http|//)""", page)
    assert page.count("data:image/png;base64,") == page.count("<img src")


@pytest.mark.parametrize(
    "missing", ["recipe.yaml", "log.jsonl", "previews", "samples", "metrics.json", "skipped.jsonl", "samples/grid.png"]
)
def test_any_part_may_be_missing(tmp_path, missing):
    fill(tmp_path)
    (tmp_path / missing).rename(tmp_path.parent / f"{tmp_path.name}-{missing.replace('/', '-')}")
    assert "</html>" in write_report(tmp_path).read_text()


def test_empty_run(tmp_path):
    page = write_report(tmp_path).read_text()
    assert tmp_path.name in page
    assert "<h2>" not in page


def test_no_run(tmp_path):
    with pytest.raises(LatelierError, match="no run folder"):
        write_report(tmp_path / "none")


def test_samples_have_the_names_of_their_classes(tmp_path):
    for i in (7, 8, 9):
        save_png(make_grid(torch.zeros(1, 3, 8, 8)), tmp_path / "samples" / f"{i:06d}.png")
    (tmp_path / "samples" / "settings.json").write_text('{"seed": 7, "count": 2, "classes": null}')
    config = tmp_path / "pipeline" / "conditioner" / "config.json"
    config.parent.mkdir(parents=True)
    config.write_text('{"_class_name": "ClassConditioner", "num_classes": 3, "names": ["cat", "<b>dog", "owl"]}')
    assert labels(tmp_path) == ["cat", "&lt;b&gt;dog"]
    (tmp_path / "samples" / "settings.json").write_text('{"seed": 7, "count": 3, "classes": ["owl", 0]}')
    assert labels(tmp_path) == ["owl", "cat", "owl"]
    config.write_text('{"_class_name": "LayoutConditioner"}')
    assert labels(tmp_path) == []


def labels(folder):
    return re.findall("<figcaption>(.*?)</figcaption>", write_report(folder).read_text())


def test_one_curve_for_a_loss_of_one_term(tmp_path):
    rows = [{"stage": "denoiser", "images": i, "loss": 1 / i, "mse": 1 / i, "kl": 3.0} for i in (8, 16)]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    page = write_report(tmp_path).read_text()
    assert re.findall("<figcaption><b>(.*?)</b>", page) == ["kl", "mse"]


def test_what_was_left_out_says_why(tmp_path):
    missing = Measurement("gmm", math.nan, {LEFT_OUT: "A mixture needs 10 images for each mode."})
    write_measurements(tmp_path / "metrics.json", [missing], "latent space")
    page = write_report(tmp_path).read_text()
    assert "A mixture needs 10 images for each mode." in page
    assert "nan" not in page.split("</style>")[1]
    forget_left_out(tmp_path / "metrics.json")
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"latent space": {}}


def test_single_samples_stand_in_for_a_grid(tmp_path):
    for i in range(3):
        save_png(make_grid(torch.zeros(1, 3, 8, 8)), tmp_path / "samples" / f"{i:06d}.png")
    assert write_report(tmp_path).read_text().count("<img src") == 3


def test_a_resumed_run_rewrites_its_log(tmp_path):
    rows = [(64, 1.0), (128, 2.0), (192, 3.0), (128, 20.0), (192, 30.0), (256, 40.0)]
    lines = [json.dumps({"stage": "tokenizer", "images": i, "loss": v}) for i, v in rows]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    (stage,) = read_log(tmp_path / "log.jsonl").values()
    assert [(row["images"], row["loss"]) for row in stage] == [(64, 1.0), (128, 20.0), (192, 30.0), (256, 40.0)]


def test_chart_leaves_out_what_is_not_finite():
    assert line_chart("loss", [(1, math.nan)]) is None
    chart = line_chart("a<b", [(1, 1.0), (2, math.inf), (3, 2.0)])
    assert (chart.title, chart.note) == ("a<b", "2")
    assert 'aria-label="a&lt;b over images seen, last value 2"' in chart.svg
    assert "nan" not in chart.svg
    assert "inf" not in chart.svg


def places(svg):
    """x and y of every point of every path, and the size of the drawing."""
    width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', svg).groups())
    paths = " ".join(re.findall(r'<path d="([^"]+)" style="(?:fill: none|fill: var)', svg))
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", paths)], width, height


def test_charts_stay_in_their_frame_and_follow_the_page():
    lines = ([(5, 2.0)], [(1, 3.0), (2, 3.0)], [(i, math.exp(-i)) for i in range(1, 30)], [(1, -4.0), (9, 1e7)])
    bars = ([0.0], [2.0, math.nan, 1e6], [1e-3] * 1000, [1.0, 2.0, 3.0])
    charts = [line_chart("x", points) for points in lines] + [bar_chart("x", values, "channel") for values in bars]
    for chart in charts:
        points, width, height = places(chart.svg)
        assert points
        assert all(0 <= x <= width and 0 <= y <= height for x, y in points)
        assert "var(--accent)" in chart.svg
        assert not re.search("#(?!000000|ffffff)[0-9a-f]{6}", chart.svg)  # no colour that one scheme hides
    for chart, values in zip(charts[len(lines) :], bars):
        assert chart.svg.count("<title>channel ") == sum(map(math.isfinite, values))
    assert charts[2].note.endswith("log")
    assert bar_chart("x", [math.nan], "channel") is None


def test_chart_helpers():
    assert [short(v) for v in (2_000_000, 64_000, 0.0321, 0)] == ["2M", "64k", "0.0321", "0"]
    assert average([3.0] * 50) == [3.0] * 50
    assert average([float(i) for i in range(100)])[50] == 50
    assert subsample([(float(i), 1.0) for i in range(1000)])[-1] == (999.0, 1.0)
    assert len(subsample([(float(i), 1.0) for i in range(1000)])) <= 400


def test_curves_and_held_out_reconstructions(tmp_path):
    fill(tmp_path)
    assert "Noise on latents" not in write_report(tmp_path).read_text()
    curve = Measurement("smoothness-psnr", 20.0, {"n": 8, "curve": [[0, 22.0], [0.3, 18.0]]})
    write_measurements(tmp_path / "metrics.json", [curve], "latent space")
    save_png(make_grid(torch.zeros(4, 3, 8, 8), 2), tmp_path / "reconstructions.png")
    save_png(make_grid(torch.zeros(4, 3, 8, 8), 2), tmp_path / "previews" / "tuning-000000064000.png")
    page = write_report(tmp_path).read_text()
    assert "psnr over noise level, last value 18" in page
    assert "Originals above their reconstructions (&lt;script&gt;alert(1)&lt;/script&gt;)." in page
    assert page.index("tokenizer at 64000") < page.index("tuning at 64000") < page.index("denoiser at 64000")


def test_latent_space(tmp_path):
    fill(tmp_path)
    assert "<h2>Latent space</h2>" not in write_report(tmp_path).read_text()
    found = [Measurement(f"gmm-nll@{k}", 1.5 - k / 100, {"modes": k}) for k in (10, 1, 2)]
    found.append(Measurement("gmm-modes", 2.0, {"curve": [[1, 1.49, 1.4], [2, 1.48, 1.3]]}))  # no curve over noise
    found.append(Measurement("diffusion-loss", 0.9, {"by_time": [[0.2, 0.7], [0.8, 1.1]]}))
    found += [Measurement(f"prefix-psnr@{k}", 20.5 + k, {"prefix": k}) for k in (4, 2)]
    write_measurements(tmp_path / "metrics.json", found, "latent space")
    save_png(make_grid(torch.zeros(1, 3, 8, 8)), tmp_path / "latent-map.png")
    page = write_report(tmp_path).read_text()
    assert "GMM negative log-likelihood over number of modes, last value 1.4" in page
    assert "loss of a small denoiser over time, from data to noise, last value 1.1" in page
    assert "One point for each image (<script>" not in page
    assert "One point for each image (&lt;script&gt;alert(1)&lt;/script&gt;): its latents" in page
    assert "last value 24.5" in page
    assert "psnr of prefixes over channels that are decoded" in page
    assert "lower is better; nats per principal component" in page
    assert "Noise on latents" not in page
    assert "<b>2</b><span>gmm-modes ↓ · Gaussians</span>" in page
    assert "<span>gmm-nll@1" not in page  # a curve, not nine tiles


def test_channels_and_errors(tmp_path):
    fill(tmp_path)
    stds = Measurement("latent-std", 1.5, {"by_channel": [1.0, 1.2, 9.0, 1.1]})
    write_measurements(tmp_path / "metrics.json", [stds], "latent space")
    for name in ("reconstructions", "error-map"):
        save_png(make_grid(torch.zeros(4, 3, 8, 8), 2), tmp_path / f"{name}.png")
    page = write_report(tmp_path).read_text()
    assert "std of raw latents of 4 channels, median 1.15, largest 9" in page
    assert len(re.findall(r"<title>channel \d: ", page)) == 4
    assert page.count("fill: var(--bad)") == 1
    assert "Originals, reconstructions, and where they differ" in page
