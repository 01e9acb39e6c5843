"""What a tokenizer costs (parameters, bytes, floating-point operations, images per second, memory), and sampling.

Operations are counted on "meta" tensors; one multiply-add is two. Two rules are kept apart: everything, attention's
matrix products included, for one image; and that of LDMAE's table, the encoder's convolutions and linear layers for 64
images. Quality is traded for speed by steps (Rombach et al. 2022, figure 7): denoiser and decoder are timed.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from latelier.errors import LatelierError
from latelier.evaluation.distributions import FeatureStatistics
from latelier.evaluation.features import load_extractor
from latelier.evaluation.generation import batches
from latelier.evaluation.reconstruction import read_images
from latelier.evaluation.results import Measurement, size_warning
from latelier.keyed_random import KeyedRandom
from latelier.opening import held_out_records
from latelier.pipeline import LatentDiffusionPipeline
from latelier.receipt import make_receipt
from latelier.recipe import Recipe, Sample
from latelier.tokenizers import decoder_parts
from latelier.tokenizers.codec import Codec
from latelier.training.runtime import peak_memory

PAPER_BATCH = 64
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass
class Cost:
    """What can be counted without running anything."""

    parameters: int  # of encoder and decoder
    decoder_parameters: int  # of what makes images of latents; the rest makes latents of images
    mib: float  # the weights file in float32, MiB; fixed tables that are stored, such as positions, included
    encode: dict[str, float]  # GFLOP of one image, by operator
    decode: dict[str, float]  # GFLOP of one image's latents, by operator
    gflop_encode: float  # of one image, everything counted
    gflop_decode: float
    gflop_paper: float  # by the rule of LDMAE's table: encoder, 64 images, convolutions and linear layers only


@torch.no_grad()
def count_cost(codec: Codec, height: int, width: int) -> Cost:
    """Count parameters, bytes and operations of images of `height` x `width` pixels, from shapes if they suffice."""
    tokenizer, parts = codec.tokenizer, decoder_parts(codec.tokenizer)
    parameters = {name: p.numel() for name, p in tokenizer.named_parameters()}
    decoder = sum(n for name, n in parameters.items() if name.removeprefix("module.").split(".")[0] in parts)
    tensors = tokenizer.state_dict().values()
    stored = sum(t.numel() * (4 if t.is_floating_point() else t.element_size()) for t in tensors)
    shadow = Codec(tokenizer) if codec.info.needs_numbers else Codec(without_memory(tokenizer).float())
    images = torch.zeros(1, codec.image_channels, height, width, device=shadow.device)
    latents = torch.zeros(1, *codec.latent_shape(height, width), device=shadow.device)
    encode, layers = _count(shadow.tokenizer, lambda: shadow.encode(images))
    decode, _ = _count(shadow.tokenizer, lambda: shadow.decode(latents))
    totals = (float(sum(encode.values())), float(sum(decode.values())), PAPER_BATCH * layers)
    return Cost(sum(parameters.values()), decoder, stored / 2**20, encode, decode, *totals)


@torch.no_grad()
def measure_cost(codec: Codec, height: int, width: int, batch: int = 16, seconds: float = 2.0) -> list[Measurement]:
    """Count, then encode and decode `batch` images at once on the codec's device for some seconds each.

    `parameters`, `size-mib`, `gflop-encode`, `gflop-decode`, `gflop-paper`, `encode-images-per-second`,
    `decode-images-per-second` (medians) and `memory-gb` (peak); an error if the factor does not divide the size.
    """
    cost, device = count_cost(codec, height, width), codec.device
    receipt = make_receipt(image_size=(height, width), tokenizer=codec.hash())
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    images = KeyedRandom(0, torch.arange(batch), device).uniform("cost", codec.image_channels, height, width) * 2 - 1
    latents = codec.encode(images)
    encode, encodings = _speed(lambda: codec.encode(images), batch, seconds, device)
    decode, decodings = _speed(lambda: codec.decode(latents), batch, seconds, device)
    run = {**receipt, "batch": batch, "precision": codec.precision, "seconds": seconds}
    kind = "accelerator, weights included" if device.type == "cuda" else "the whole process since it began"
    rule = {"rule": "one image, 2 FLOP per multiply-add, attention included"}
    layers = f"encoder, {PAPER_BATCH} images, 2 FLOP per multiply-add, convolutions and linear layers only"
    split = {"encoder": cost.parameters - cost.decoder_parameters, "decoder": cost.decoder_parameters}
    return [
        Measurement("parameters", float(cost.parameters), {**receipt, **split}),
        Measurement("size-mib", cost.mib, {**receipt, "stored": "float32, position tables included"}),
        Measurement("gflop-encode", cost.gflop_encode, {**receipt, **rule, "operators": cost.encode}),
        Measurement("gflop-decode", cost.gflop_decode, {**receipt, **rule, "operators": cost.decode}),
        Measurement("gflop-paper", cost.gflop_paper, {**receipt, "rule": layers}),
        Measurement("encode-images-per-second", encode, {**run, "repetitions": encodings}),
        Measurement("decode-images-per-second", decode, {**run, "repetitions": decodings}),
        Measurement("memory-gb", peak_memory(device), {**run, "peak": kind}),
    ]


def without_memory(module: nn.Module) -> nn.Module:
    """A copy whose weights have shapes but no numbers; the original's are never copied."""
    memo: dict[int, Any] = {id(b): torch.empty_like(b, device="meta") for b in module.buffers()}
    for p in module.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
    return copy.deepcopy(module, memo)


def _count(module: nn.Module, action: Callable[[], Any]) -> tuple[dict[str, float], float]:
    """GFLOP of what the action computes by operator, and those of convolutions and linear layers, which cannot be told
    from operators: a linear layer may run as the same batched product as attention.
    """
    counter = FlopCounterMode(display=False)
    marks: dict[int, list[int]] = {-1: [], 1: []}  # totals as layers begin, and as they end
    hooks = []
    for layer in (layer for layer in module.modules() if isinstance(layer, LAYERS)):
        hooks.append(layer.register_forward_pre_hook(lambda *_: marks[-1].append(counter.get_total_flops())))
        hooks.append(layer.register_forward_hook(lambda *_: marks[1].append(counter.get_total_flops())))
    with counter, sdpa_kernel(SDPBackend.MATH):  # fused kernels are not all known to the counter
        action()
    for hook in hooks:
        hook.remove()
    counts = counter.get_flop_counts().get("Global", {})
    layers = (sum(marks[1]) - sum(marks[-1])) / 1e9
    return {str(operator).split(".")[-1]: flops / 1e9 for operator, flops in counts.items()}, layers


def _speed(action: Callable[[], Any], batch: int, seconds: float, device: torch.device) -> tuple[float, int]:
    """Images per second, the median over repetitions, and how many there were; one to warm up is not counted."""

    def wait() -> None:
        if device.type != "cpu":
            torch.get_device_module(device).synchronize(device)

    action()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        wait()
        begin = time.perf_counter()
        action()
        wait()
        times.append(time.perf_counter() - begin)
    return batch / median(times), len(times)


@torch.no_grad()
def measure_sampling(
    pipeline: LatentDiffusionPipeline, references: Iterable[Mapping[str, Any]], recipe: Recipe,
    receipt: Mapping[str, Any],
) -> list[Measurement]:  # fmt: skip
    """Sample the same images with each of `evaluate.sampling_steps`, time it, and compare them with real ones.

    For each number of steps, the fewest first, `gfd-<features>@<steps>` and `samples-per-second@<steps>`, of as many
    images as there are references (dicts with `image`), at most `evaluate.samples`, with the seeds `sample.seed + i`.
    """
    numbers = sorted(set(recipe.evaluate.sampling_steps))
    if not numbers:
        return []
    extractor = load_extractor(recipe.evaluate.features[0], pipeline.device)
    theirs = FeatureStatistics(extractor.dims)
    for images in read_images(references, recipe.evaluate.samples):
        theirs.update(extractor(images))
    if not theirs.n:
        raise LatelierError("There are no reference images to compare samples with at evaluate.sampling_steps.")
    about = {"n": theirs.n, "n_reference": theirs.n, **receipt, **extractor.describe(), "batch": recipe.sample.batch}
    about |= {"threads": torch.get_num_threads(), "drawn_on": str(pipeline.device)}
    records = held_out_records(recipe, pipeline)

    def draw(batch: Sample) -> tuple[Float[Tensor, "b c h w"], float]:
        inputs = records(batch.seed - recipe.sample.seed, batch.count)
        begin = time.perf_counter()
        images = pipeline(sample=batch, records=inputs, output_type="pt", progress=False).images
        return images, time.perf_counter() - begin  # they come back on the CPU, so an accelerator is done with them

    draw(next(batches(recipe.sample.model_copy(update={"steps": numbers[0]}), theirs.n)))  # to warm up
    warning = size_warning(theirs.n, extractor.dims)
    timed = {"timed": "denoiser and decoder, wall clock, after one batch that does not count"}
    result = []
    for steps in numbers:
        ours, seconds = FeatureStatistics(extractor.dims), 0.0
        for batch in batches(recipe.sample.model_copy(update={"steps": steps}), theirs.n):
            images, took = draw(batch)
            ours.update(extractor(images))
            seconds += took
        said = make_receipt(**{**about, "steps": steps})
        result += [
            Measurement(f"gfd-{extractor.name}@{steps}", ours.distance(theirs), {**said, **warning}),
            Measurement(f"samples-per-second@{steps}", ours.n / seconds, {**said, "seconds": seconds, **timed}),
        ]
    return result
