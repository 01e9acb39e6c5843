"""Comparisons of tokenizers: names, sizes, what is measured again, fronts, and one page for all kinds of latents."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import VQModel
from PIL import Image

from latelier import cli
from latelier.errors import LatelierError
from latelier.evaluation.metrics import better
from latelier.report.overview import AXES, BITS, NUMBERS, axes_of, dominated, fronts, gflop, overview, scaled, speed
from latelier.report.tables import RunSummary
from latelier.study import compare
from latelier.study.compare import Candidate, check_sizes, describe, divide_words, short_names
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.maetok import MAETok
from latelier.tokenizers.vmae import VMAE
from tiny import VMAE as SMALL
from tiny import autoencoder, refused

METRICS = "evaluate.metrics=[l1,psnr,ms-ssim,spectrum,gmm]"  # 12 images of 32 px are too few and too small


def vq():
    """LDM's kind with 16 codes, factor 4."""
    return VQModel(
        block_out_channels=[8, 8, 8], latent_channels=3, norm_num_groups=4, num_vq_embeddings=16, layers_per_block=1,
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """Images, and tokenizers with a plane, a row and a codebook of latents."""
    folder, noise = tmp_path_factory.mktemp("compare"), np.random.default_rng(0)
    (folder / "photos").mkdir()
    for i in range(12):
        pixels = noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{i:02d}.png")
    torch.manual_seed(0)
    autoencoder().save_pretrained(folder / "grids" / "tokenizer")
    VMAE(**SMALL, latent_channels=4, patch_size=8).save_pretrained(folder / "masked")
    MAETok(**SMALL, latent_channels=4, patch_size=16, latent_tokens=6, image_size=(32, 32)).save_pretrained(
        folder / "rows"
    )
    vq().save_pretrained(folder / "codes")
    return folder


def run(name, facts=None, **values):
    """A tokenizer with these measures."""
    return RunSummary(name, {key.replace("_", "-"): {"value": value} for key, value in values.items()}, facts or {})


def candidate(factor, paints=None):
    return Candidate(Path("out"), "", {}, {}, factor, paints)


def test_names_are_short_and_different(tmp_path):
    (tmp_path / "runs" / "small" / "tokenizer").mkdir(parents=True)
    folder = str(tmp_path / "runs" / "small" / "tokenizer")
    assert short_names([folder, "stabilityai/sd-vae-ft-mse"]) == ["small", "sd-vae-ft-mse"]
    assert short_names(["a/x", "b/x", "c/x", "x-2"]) == ["x", "x-2", "x-3", "x-2-2"]
    assert short_names(["org/model/vae", "other"]) == ["model", "other"]
    assert short_names(["a/x", "b/x"], ["first", "the second"]) == ["first", "the-second"]


@pytest.mark.parametrize(
    ("tokenizers", "names", "words"),
    [(["a"], [], "two tokenizers or more, not 1"), (["a", "b", "a"], [], "a is to be compared with itself"),
     (["a", "b"], ["one"], "once for each of 2"), (["a", "b"], ["one", "one"], "all different")],
)  # fmt: skip
def test_names_that_cannot_be(tokenizers, names, words):
    refused(words, short_names, tokenizers, names)


def test_sizes_must_fit_all():
    some = {"a": candidate(8), "b": candidate(12)}
    check_sizes(some, (48, 24))
    refused(r"64 x 64 px .* \(b multiples of 12\); the nearest .* is 72 x 72 px\.", check_sizes, some, (64, 64))
    refused("is 24 x 24 px", check_sizes, some, (9, 10))
    one = {**some, "c": candidate(16, (96, 96))}
    refused(r"b multiples of 12, c needs 96 x 96 px\); the nearest .* is 96 x 96 px", check_sizes, one, (64, 64))
    refused("no size fits all; leave some out", check_sizes, {**one, "d": candidate(8, (128, 128))}, (96, 96))
    refused("no size fits all", check_sizes, {"a": candidate(24), "c": candidate(16, (64, 64))}, (64, 64))


def test_words_of_the_command_line(tmp_path):
    odd = tmp_path / "a=b"
    odd.mkdir()
    words = ["runs/x", "evaluate.batch=8", str(odd), "org/name", "seed=1"]
    assert divide_words(words) == (["runs/x", str(odd), "org/name"], ["evaluate.batch=8", "seed=1"])


def test_facts_of_a_plane_a_row_and_codes():
    plane = describe(Codec(autoencoder()), (32, 64))
    assert (plane["class"], plane["factor"], plane["latent"]) == ("AutoencoderKL", 4, "4 x 8 x 16")
    assert (plane["numbers in a latent"], plane[NUMBERS], plane["image numbers per latent number"]) == (512, 0.25, 12)
    row = describe(
        Codec(MAETok(**SMALL, latent_channels=4, latent_tokens=6, patch_size=16, image_size=(32, 32))), (32, 32)
    )
    assert (row["latent"], row["numbers in a latent"]) == ("4 x 6", 24)
    assert BITS not in row
    codes = describe(Codec(vq()), (32, 32))
    assert (codes["codes"], codes[BITS]) == (16, 0.25)  # 4 bits for each of 64 positions, 1024 pixels


def test_costs_are_sums_of_both_ways():
    one = run("a", gflop_encode=3.0, gflop_decode=5.0, encode_images_per_second=20.0, decode_images_per_second=5.0)
    assert gflop(one) == 8
    assert speed(one) == pytest.approx(4)  # 1 / (1 / 20 + 1 / 5)
    assert gflop(run("b", gflop_encode=3.0)) is None
    assert speed(run("b", encode_images_per_second=3.0)) is None


def test_dominated_points():
    points = {"cheap": (1.0, 9.0), "good": (5.0, 1.0), "worse": (6.0, 1.0), "twin": (5.0, 1.0), "middle": (2.0, 8.0)}
    assert dominated(points, "lower", "lower") == {"worse": ["good", "twin"]}
    assert dominated(points, "higher", "higher") == {"good": ["worse"], "twin": ["worse"]}
    assert dominated(points, "lower", "higher") == {
        "good": ["cheap", "middle"], "worse": ["cheap", "good", "twin", "middle"], "twin": ["cheap", "middle"],
        "middle": ["cheap"],
    }  # fmt: skip


def test_fronts_of_every_quality_and_cost():
    shown = [
        run("a", {NUMBERS: 0.25, BITS: 0.5}, psnr=30.0, gflop_encode=1.0, gflop_decode=1.0),
        run("b", {NUMBERS: 0.25}, psnr=20.0, gflop_encode=2.0, gflop_decode=1.0, kl_bits_per_pixel=0.1),
        run("c", {NUMBERS: 0.0625}, psnr=10.0),
    ]
    planes = {plane.cost: plane for plane in fronts(shown)}
    assert {words: (plane.front, plane.dominated) for words, plane in planes.items()} == {
        "GFLOP, encode + decode ↓": (["a"], {"b": ["a"]}),
        "latent numbers per pixel ↓": (["a", "c"], {"b": ["a"]}),
        "bits per pixel, codes or KL ↓": (["a", "b"], {}),
    }
    assert fronts(shown[:1]) == []


def test_axes_of_a_radar():
    assert scaled([1.0, 3.0, 2.0], "higher") == [0, 1, 0.5]
    assert scaled([1.0, 3.0, 2.0], "lower") == [1, 0, 0.5]
    shown = [
        run("a", psnr=30.0, ssim=0.5, lpips=0.1, rfd_vgg16=5.0, gflop_encode=1.0, gflop_decode=2.0),
        run("b", psnr=20.0, ssim=0.5, lpips=0.3, rfd_vgg16=1.0, gflop_encode=4.0, gflop_decode=2.0, diffusion_loss=1.0),
    ]
    axes, lacking = axes_of(shown)
    assert [axis.words for axis in axes] == ["psnr ↑", "lpips ↓", "rfd-vgg16 ↓", "gflop ↓"]  # equal ones say nothing
    assert [axis.shares for axis in axes] == [[1, 0], [1, 0], [0, 1], [1, 0]]
    assert lacking == ["diffusion-loss"]


def test_every_axis_has_a_direction():
    assert [name for name in AXES if better(name) is None] == []


def test_overview_draws_what_there_is(tmp_path):
    values = {"psnr": 20.0, "ssim": 0.5, "lpips": 0.2, "gflop_encode": 1.0, "gflop_decode": 2.0}
    shown = [run(f"run {i}", **{key: value * (1 + i) for key, value in values.items()}) for i in range(3)]
    parts = overview(tmp_path, shown)
    assert [getattr(part, "link", None) for part in parts] == ["radar.svg", "pareto.svg", None]
    assert parts[2].rows[0] == [
        "lpips ↓", "GFLOP, encode + decode ↓", "run 0", "run 1, run 2"
    ]  # fmt: skip
    assert overview(tmp_path, shown[:1]) == []
    assert overview(tmp_path, [run("a", psnr=1.0), run("b", psnr=2.0)]) == []  # no cost, too few axes


def test_all_kinds_stand_on_one_page(workshop, tmp_path, monkeypatch):
    tokenizers = [str(workshop / name) for name in ("grids", "masked", "rows", "codes")]
    asked = (tokenizers, str(workshop / "photos"), 32, 12, tmp_path / "out", [METRICS, "data.workers=0"])
    content, page = compare.compare(*asked), tmp_path / "out" / "comparison.html"
    assert content == json.loads((page.parent / "comparison.json").read_text())
    html = page.read_text()
    links = set(re.findall(r'href="([^"#:]+)"', html))
    assert links == {f"{name}/report.html" for name in ("grids", "masked", "rows", "codes")}
    assert all((page.parent / link).is_file() for link in links)
    titles = re.findall("<h2>(.*?)</h2>", html)
    assert titles[:2] == ["What they are", "At a glance"]
    assert {"Reconstruction", "Distribution", "Images"} <= set(titles)
    assert [one["facts"]["latent"] for one in content["runs"]] == ["4 x 8 x 8", "4 x 4 x 4", "4 x 6", "3 x 8 x 8"]
    receipts = [one["metrics"]["psnr"]["receipt"] for one in content["runs"]]
    assert {receipt["n"] for receipt in receipts} == {12}
    assert len({receipt["data"] for receipt in receipts}) == 1
    assert len({receipt["tokenizer"] for receipt in receipts}) == 4
    assert {"reconstructions.png", "error-map.png"} <= {path.name for path in page.parent.iterdir()}
    small = "it needs images of at least 176 pixels a side, not 32 x 32"
    assert f"ms-ssim is left out ({small}) of grids, masked, rows, codes." in html
    assert "gmm is left out (A mixture needs 10 images for each mode" in html
    assert not {"ms-ssim", "gmm"} & {name for one in content["runs"] for name in one["metrics"]}
    assert "(grids/report.html)" in (page.parent / "table.md").read_text()

    again, shown = [], []
    monkeypatch.setattr(compare, "inspect", lambda tokenizer, *rest: again.append(tokenizer))
    monkeypatch.setattr(compare, "show", lambda candidates, *rest: shown.extend(candidates) or page)
    compare.compare(*asked)
    assert (shown, again) == (["grids", "masked", "rows", "codes"], [])  # nothing is measured twice
    (page.parent / "masked" / "report.html").unlink()
    compare.compare(*asked)
    assert again == [tokenizers[1]]
    compare.compare(*asked[:3], 10, *asked[4:])
    assert again[1:] == tokenizers  # other settings


@pytest.mark.parametrize(("peak", "kept"), [("accelerator, weights included", True), ("the whole process", False)])
def test_memory_of_a_process_is_not_a_tokenizers(tmp_path, peak, kept):
    entry = {"value": 1.0, "interval": None, "receipt": {"peak": peak}}
    (tmp_path / "metrics.json").write_text(json.dumps({"cost": {"memory-gb": entry, "parameters": {"value": 2.0}}}))
    shown = compare._shown("a", Candidate(tmp_path, "", {}, {}, 8, None))
    assert ("memory-gb" in shown.metrics) == kept
    assert compare._columns([shown])["Cost"] == ["parameters", *["memory-gb"] * kept]


def test_metrics_stand_in_the_table_of_their_longest_beginning():
    names = ["psnr_after_flip", "smoothness_psnr", "psnr", "gmm_nll@5", "gmm_modes", "beauty", "latent_std", "rfd_clip"]
    columns = compare._columns([run("a", **dict.fromkeys(names, 1.0))])
    assert {title: names for title, names in columns.items() if names} == {
        "Reconstruction": ["psnr", "rfd-clip"], "Smoothness": ["smoothness-psnr"], "Distribution": ["gmm-modes"],
        "Posterior": ["latent-std"], "Equivariance": ["psnr-after-flip"], "Also measured": ["beauty"],
    }  # fmt: skip


def test_one_that_fails_does_not_stop_the_others(workshop, tmp_path, monkeypatch, capsys):
    command = ["compare", str(workshop / "nowhere"), str(workshop / "grids"), str(workshop / "masked"), METRICS]
    options = ["--data", str(workshop / "photos"), "--size", "32", "--samples", "6", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["latelier", *command, "data.workers=0", *options])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "1 of 3 tokenizers failed (nowhere: " in error
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [one["name"] for one in content["runs"]] == ["grids", "masked"]
    assert "nowhere is missing, it failed" in content["about"]


def test_wrong_size_and_wrong_words_come_first(workshop, tmp_path):
    tokenizers, photos = [str(workshop / "grids"), str(workshop / "masked")], str(workshop / "photos")
    with pytest.raises(LatelierError, match=r"masked multiples of 8.* the nearest size that fits all is 24 x 24 px"):
        compare.compare(tokenizers, photos, 20, 4, tmp_path / "out", [METRICS, "data.workers=0"])
    rows = [*tokenizers, str(workshop / "rows")]
    with pytest.raises(LatelierError, match=r"rows needs 32 x 32 px.* the nearest size that fits all is 32 x 32 px"):
        compare.compare(rows, photos, 64, 4, tmp_path / "out", [METRICS, "data.workers=0"])
    refused(r"evaluate\.sample", compare.compare, tokenizers, photos, 32, 4, tmp_path / "out", ["evaluate.sample=3"])
    refused("absent", compare.compare, tokenizers, str(workshop / "absent"), 32, 4, tmp_path / "out", [METRICS])
    assert not (tmp_path / "out" / "grids" / "metrics.json").exists()
