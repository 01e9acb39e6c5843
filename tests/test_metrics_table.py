"""The one table of metrics: complete, importable, and the better direction of every result."""

import inspect

import pytest

from latelier.evaluation.metrics import METRICS, better, plain, unit
from latelier.recipe.evaluate import Evaluate

LOWER = """
l1 lpips rfd-vgg16 rfd-clip-tiny gfd-vgg16 gfd-inception@10 fid50k sfid kid-inception cmmd-clip convergence-loss@64
convergence-gfd-dinov2-small@64 sr-lpips sr-lpips-difference bicubic-lpips inpainting-lpips inpainting-lpips-difference
mean-fill-lpips inpainting-fd-vgg16 mean-fill-fd-dinov2-small within-object smoothness-lpips smoothness-rfd-vgg16
prefix-lpips@4 prefix-rfd-vgg16@4 gmm-nll@10 gmm-modes diffusion-loss viv viv-free viv-mixture high-frequency fdr
fdr-vgg16 interpolation-vgg16 continuity-lpips uniformity-cv uniformity-gini equivariance-shift outlier-channels
dead-codes largest-variance-ratio parameters size-mib gflop-encode gflop-decode gflop-paper memory-gb objects-copies
"""
HIGHER = """
psnr ssim ms-ssim inception-score precision recall sr-psnr sr-ssim sr-psnr-difference bicubic-psnr bicubic-ssim
layout-match layout-match-chance layout-match-real segmentation-match segmentation-match-chance clip-score
clip-score-real separation-object smoothness-psnr prefix-psnr@4 psnr-after-shift probe-accuracy knn-accuracy
neighbours-10 structure-lds structure-srss path-efficiency text text@12 uniformity-entropy
active-channels active-numbers codebook-usage codebook-perplexity samples-per-second@10 encode-images-per-second
decode-images-per-second probe-pooled-accuracy objects objects-counts objects-places objects-asked objects-reconstructed
"""
NEITHER = """
effective-rank channel-rank variance-first-quarter channel-sparsity kl-bits-per-pixel posterior-std latent-std
smoothness-colour unheard-of
"""


def test_recipes_may_name_every_entry():
    assert Evaluate(metrics=[*METRICS]).metrics == [*METRICS]


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.function])
def test_functions_take_what_the_table_says(name):
    metric = METRICS[name]
    parameters = [*inspect.signature(metric.load()).parameters]
    assert tuple(parameters[: len(metric.takes)]) == metric.takes
    if metric.group == "latents":  # all that they take is named in the table, and the recipe has every setting
        assert {*parameters} == {*metric.takes, *metric.settings}
    assert {*metric.settings} <= {*Evaluate.model_fields}


@pytest.mark.parametrize(("names", "side"), [(LOWER, "lower"), (HIGHER, "higher"), (NEITHER, None)])
def test_the_better_direction(names, side):
    assert {name: better(name) for name in names.split()} == dict.fromkeys(names.split(), side)


def test_names_without_extractors():
    names = ["rfd-vgg16", "gfd-vgg16@50", "smoothness-rfd-clip-tiny", "prefix-rfd-vgg16@4", "kid-inception", "psnr"]
    assert [plain(name) for name in names] == ["rfd", "gfd@50", "smoothness-rfd", "prefix-rfd@4", "kid", "psnr"]


def test_units_of_results():
    units = {"gmm-nll@10": "nats per principal component", "probe-accuracy": "share of images", "psnr": "dB"}
    assert {name: unit(name) for name in units} == units
    assert unit("lpips") is None
