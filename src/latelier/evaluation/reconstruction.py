"""How well a tokenizer reconstructs: L1, PSNR, SSIM, MS-SSIM, LPIPS, rFD, and a map of every pixel's error.

Images are compared as they would be saved: clamped to [-1, 1] and rounded to 8 bit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from latelier.errors import LatelierError
from latelier.evaluation.features import load_extractors
from latelier.evaluation.metrics import METRICS
from latelier.evaluation.references import FeatureCollector, FeatureSet, Key, open_sets, store_sets
from latelier.evaluation.results import Measurement, gather_in_order, is_main, mean_with_interval, size_warning
from latelier.images import make_columns, round_to_8_bit, save_png, to_uint8
from latelier.losses.perceptual import LPIPS
from latelier.receipt import make_receipt
from latelier.recipe import Evaluate
from latelier.tokenizers.codec import Codec

PSNR_LIMIT = 100.0  # dB, for images without any error
SSIM_WINDOW, MS_SSIM_SCALES = 11, 5
SETTINGS = {
    "l1": "8-bit levels, units of [-1, 1]",
    "psnr": "8-bit levels, range 255, mean over images of dB",
    "ssim": "8-bit levels, range 255, Gaussian window 11, sigma 1.5",
    "ms-ssim": f"8-bit levels, range 255, Gaussian window 11, sigma 1.5, {MS_SSIM_SCALES} scales",
    "lpips": "LPIPS 0.1, VGG16, 8-bit levels, own size",
}
FRECHET_INTERVAL = "delete-a-group jackknife of 10 groups of images, Student's t"
ImageMetric = Callable[[Tensor, Tensor], Tensor]  # (images, reference), both (b, c, h, w), to (b,)
SHOWN = 8  # images
BRIGHTEST = 64.0  # 8-bit levels: errors from here on have the last colour, so that two maps compare
TICKS = (0, 4, 16, 36, 64)  # levels that the scale names; colours follow the square root, so that these lie evenly
COLOURS = "inferno"  # of matplotlib: black to yellow, readable in grey
BAR, TEXT, PADDING, NARROWEST = 10, 12, 4, 260  # pixels of the scale below the images
PAPER, INK = (255, 255, 255), (29, 31, 35)


@torch.no_grad()
def evaluate_reconstruction(
    codec: Codec, batches: Iterable[Mapping[str, Any]], evaluate: Evaluate, reference: str,
    extra: Mapping[str, Any] | None = None, key: Key | None = None, shared: bool = False,
) -> list[Measurement]:  # fmt: skip
    """Encode (posterior mean), decode, compare: l1, psnr, ssim, ms-ssim, lpips and, for each of the features,
    `rfd-<features>`, as far as `evaluate` names them; nothing on processes that only take part.

    Batches are dicts with `image`, `(b, c, h, w)` in [-1, 1], of which `evaluate.samples` are read at most. Receipts
    say `reference`, the name of the images, and `extra` fields. Features of the images are cached under `key`, see
    `reference_key`. If `shared`, all processes take part, each with its own batches, see `gather_in_order`.
    """
    metrics = image_metrics(evaluate.metrics, codec.device)
    extractors = load_extractors(evaluate.features if "rfd" in evaluate.metrics else (), codec.device)
    collectors = [FeatureCollector(extractor, ("features",)) for extractor in extractors]
    known = open_sets(collectors, key, shared)
    new = [collector for collector in collectors if collector.name not in known]
    ours, theirs = ({collector.name: FeatureSet(collector.kept) for collector in collectors} for _ in range(2))
    values: dict[str, list[Tensor]] = {name: [] for name in metrics}
    vgg16 = (extractor for extractor in extractors if isinstance(extractor.module, LPIPS) and "lpips" in metrics)
    both: Any = next(vgg16, None)  # one pass of the network gives LPIPS and features
    n, size = 0, (0, 0)

    def compare(images: Tensor) -> dict[str, Any]:
        """Of a batch, errors of each image, features of the reconstructions, and of originals that are not known."""
        images = images.to(codec.device)
        reconstruction = codec.decode(codec.encode(images)).clamp(-1, 1)  # (b, c, h, w)
        apart = {name: metric for name, metric in metrics.items() if both is None or name != "lpips"}
        found = {name: metric(reconstruction, images) for name, metric in apart.items()}
        ours: dict[str, Any] = {}
        theirs: dict[str, Any] = {}
        if both is not None:
            found["lpips"], *vectors = both.module.distance_and_vectors(*map(round_to_8_bit, (reconstruction, images)))
            ours[both.name], theirs[both.name] = ({"features": x} for x in vectors)
        return {
            "n": len(images), "size": (images.shape[2], images.shape[3]), "values": found,
            "ours": {c.name: ours.get(c.name) or c.extract(reconstruction) for c in collectors},
            "theirs": {c.name: theirs.get(c.name) or c.extract(images) for c in new},
        }  # fmt: skip

    for batch in gather_in_order(map(compare, read_images(batches, evaluate.samples)), shared):
        n, size = n + batch["n"], batch["size"]
        for name, value in batch["values"].items():
            values[name].append(value.cpu())
        for sets, side in ((ours, "ours"), (theirs, "theirs")):
            for name, found in batch[side].items():
                sets[name].update(found)
    if not is_main(shared):
        return []
    if n == 0:
        raise LatelierError(f"There are no images in {reference} to evaluate reconstruction on.")
    store_sets(new, key, theirs)
    about = {"n": n, "reference": reference, "image_size": size, "latents": "posterior mean"}
    receipt = make_receipt(**about, tokenizer=codec.hash(), **(extra or {}))
    result = [measure_mean(name, torch.cat(each), name, receipt) for name, each in values.items()]
    for extractor in extractors:
        a, b = ours[extractor.name], {**theirs, **known}[extractor.name]
        if a.n != b.n:
            raise LatelierError(
                f"{a.n} images could be read, but features of {b.n} were kept of them; delete the folder that "
                "$LATELIER_CACHE names (by default ~/.cache/latelier) and measure again."
            )
        value, interval = a.sums["features"].distance(b.sums["features"])
        about = {**receipt, **extractor.describe(), "n_reference": b.n, **size_warning(a.n, extractor.dims)}
        result.append(Measurement(f"rfd-{extractor.name}", value, {**about, "interval": FRECHET_INTERVAL}, interval))
    return result


def read_images(batches: Iterable[Mapping[str, Any]], count: int) -> Iterator[Tensor]:
    """The first `count` of the batches' images."""
    for batch in batches:
        if count <= 0:
            return
        yield batch["image"][:count]
        count -= len(batch["image"])


def measure_mean(name: str, values: Tensor, metric: str, receipt: Mapping[str, Any]) -> Measurement:
    """The mean over images of an image metric's values `(n,)`."""
    mean, interval = mean_with_interval(values)
    return Measurement(name, mean, {**receipt, "settings": SETTINGS[metric]}, interval)


def image_metrics(names: Collection[str], device: torch.device | str) -> dict[str, ImageMetric]:
    """Those of the names that are means over images, in a fixed order."""
    known: dict[str, ImageMetric] = {"l1": l1, "psnr": psnr, "ssim": ssim, "ms-ssim": ms_ssim}
    chosen = {name: metric for name, metric in known.items() if name in names}
    if "lpips" in names:
        network = LPIPS("vgg").to(device)
        chosen["lpips"] = lambda x, y: network(round_to_8_bit(x), round_to_8_bit(y))
    return chosen


def l1(images: Float[Tensor, "b c h w"], reference: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Mean absolute error of each image in units of [-1, 1], after rounding to 8 bit."""
    return (_levels(images) - _levels(reference)).abs().mean((1, 2, 3)) / 127.5


def psnr(images: Float[Tensor, "b c h w"], reference: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Peak signal-to-noise ratio of each image in dB: 8-bit levels, range 255; 100 dB when nothing differs."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    x, y = _levels(images), _levels(reference)  # (b, c, h, w)
    return peak_signal_noise_ratio(x, y, data_range=255.0, reduction="none", dim=(1, 2, 3)).clamp(max=PSNR_LIMIT)


def ssim(images: Float[Tensor, "b c h w"], reference: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Structural similarity of each image: 8-bit levels, range 255, Gaussian window 11 x 11 of sigma 1.5."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check_size(images, "ssim")
    x, y = _levels(images), _levels(reference)  # (b, c, h, w)
    how: dict[str, Any] = {"data_range": 255.0, "kernel_size": SSIM_WINDOW, "reduction": "none"}
    return structural_similarity_index_measure(x, y, **how).reshape(-1)  # type: ignore[union-attr]  # (b,)


def ms_ssim(images: Float[Tensor, "b c h w"], reference: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Multi-scale structural similarity of each image: five scales and weights as in Wang et al. 2003, section 3.2;
    negative contrasts count as zero, since they are raised to powers.
    """
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    _check_size(images, "ms-ssim")  # halved four times, a window still fits
    x, y = _levels(images), _levels(reference)  # (b, c, h, w)
    how: dict[str, Any] = {"data_range": 255.0, "kernel_size": SSIM_WINDOW, "reduction": "none", "normalize": "relu"}
    return multiscale_structural_similarity_index_measure(x, y, **how).reshape(-1)  # (b,)


def _check_size(images: Tensor, name: str) -> None:
    if why := METRICS[name].lacks(1, 3, (images.shape[-2], images.shape[-1])):
        raise LatelierError(f"{name} cannot be measured: {why}; take it out of evaluate.metrics.")


def _levels(images: Tensor) -> Tensor:
    return to_uint8(images).float()


@torch.no_grad()
def draw_errors(codec: Codec, batches: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Draw the first few originals, reconstructions and error maps below each other, and the scale, as a PNG."""
    images = next((batch["image"] for batch in batches), torch.zeros(0, 3, 1, 1))[:SHOWN].cpu()  # (b, c, h, w)
    if not len(images):
        raise LatelierError("There are no images to draw errors of.")
    reconstructions = codec.decode(codec.encode(images.to(codec.device))).clamp(-1, 1).cpu()  # (b, c, h, w)
    error = pixel_errors(reconstructions, images)  # (b, h, w)
    grid = make_columns([to_rgb(images), to_rgb(reconstructions), heat(error)], columns=len(images))
    words = f"mean {error.mean():.1f}, largest {error.max():.0f} of 255 levels"
    save_png(_with_scale(grid, words), path)


def pixel_errors(images: Float[Tensor, "b c h w"], reference: Float[Tensor, "b c h w"]) -> Float[Tensor, "b h w"]:
    """Absolute error of each pixel in 8-bit levels, the mean over its channels."""
    return (round_to_8_bit(images) - round_to_8_bit(reference)).abs().mean(1) * 127.5


def heat(error: Float[Tensor, "*b h w"]) -> Float[Tensor, "*b 3 h w"]:
    """Errors in 8-bit levels as colours in [-1, 1]: black for none, the last colour from `BRIGHTEST` on."""
    from matplotlib import colormaps

    position = (error / BRIGHTEST).clamp(0, 1).sqrt()  # the eye should see small errors too
    colours = torch.from_numpy(colormaps[COLOURS](position.numpy())[..., :3])  # (*b, h, w, 3) in [0, 1]
    return (2 * colours - 1).float().movedim(-1, -3)


def to_rgb(images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 h w"]:
    """As `make_grid` shows images: one or two channels as grey, more as their first three."""
    return images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)


def _with_scale(grid: Image.Image, words: str) -> Image.Image:
    """The images, below them a bar of colours with its levels, and words."""
    font, width = ImageFont.load_default(TEXT), max(grid.width, NARROWEST)
    image = Image.new("RGB", (width, grid.height + 5 * PADDING + BAR + 2 * TEXT), PAPER)
    image.paste(grid, (0, 0))
    left, right, top = PADDING, min(width, 2 * NARROWEST) - 6 * PADDING, grid.height + PADDING
    levels = torch.linspace(0, 1, right - left).square() * BRIGHTEST  # (w,): evenly spaced in colour
    bar = (heat(levels.expand(BAR, -1)).movedim(0, -1) + 1) * 127.5  # (h, w, 3)
    image.paste(Image.fromarray(bar.round().to(torch.uint8).numpy()), (left, top))
    draw = ImageDraw.Draw(image)
    for level in TICKS:
        text = f"{level}+" if level == BRIGHTEST else str(level)
        x = left + (level / BRIGHTEST) ** 0.5 * (right - left)
        draw.text((x, top + BAR + 1), text, INK, font, anchor="ma" if level else "la")
    draw.text((left, top + BAR + TEXT + 2 * PADDING), words, INK, font)
    return image
