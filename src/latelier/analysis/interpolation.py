"""Images decoded from between two latents, and near one: is the space filled with images?

Interpolated FID (2026, arXiv 2603.05630): each latent is moved half the way to that of a near image, on the sphere, and
the Fréchet distance of the decoded images to the originals is taken. Continuity (PAE, 2026, arXiv 2605.07915): how far,
by LPIPS, a decoded image moves when its latent moves by `rho |z|` along a random direction and against it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from latelier.analysis.sample import PIXELS, LatentSample
from latelier.analysis.smoothness import extractor_of, original_vectors, vgg16
from latelier.errors import NotMeasurable
from latelier.evaluation.distributions import FeatureStatistics
from latelier.evaluation.results import Result, mean_with_interval, size_warning
from latelier.images import round_to_8_bit
from latelier.keyed_random import KeyedRandom
from latelier.tokenizers.codec import Codec

ALPHA = 0.5
RADII = (0.1, 0.5, 1.0, 2.0)  # rho; weighed by 1 / rho
MOST_IMAGES = 64  # for continuity, which decodes each eight times
LEAST_SIDE = 16  # pixels
NEARLY_STRAIGHT = 1e-6  # sine of the angle below which slerp is a line


@torch.no_grad()
def interpolation(sample: LatentSample, codec: Codec, features: list[str], seed: int = 0) -> dict[str, Result]:
    """`interpolation-<extractor>`, the Fréchet distance between originals and images decoded half-way to the nearest
    other latent (cosine, slerp), and `continuity-lpips` of at most 64 images; lower is better for both.

    Grey or coloured images only; no continuity below 16 pixels, which LPIPS needs.
    """
    if sample.images is None or len(sample) < 2:
        raise NotMeasurable(f"interpolation needs at least 2 images, not {len(sample)}.")
    codec = sample.scaled(codec)
    about = {"latents": "posterior mean, normalised", "latent_scale": sample.scale.origin}
    found = _between(sample, codec, features[0], about)
    if min(sample.image_size) >= LEAST_SIDE:
        found |= {"continuity-lpips": _continuity(sample, codec, seed, about)}
    return found


def _between(sample: LatentSample, codec: Codec, features: str, about: dict) -> dict[str, Result]:
    extractor = extractor_of(sample, features)
    partner = nearest(sample.latents().flatten(1))  # (n,)
    ours, theirs = FeatureStatistics(extractor.dims), FeatureStatistics(extractor.dims)
    for rows in sample.parts(PIXELS):
        z = sample.latents(rows).to(sample.device)  # (b, c, *grid)
        other = torch.cat([sample.latents(slice(i, i + 1)) for i in partner[rows].tolist()]).to(z)
        images = round_to_8_bit(codec.decode(slerp(z, other, ALPHA)).clamp(-1, 1))  # (b, c, h, w)
        ours.update(extractor(images))
        theirs.update(original_vectors(sample, extractor, rows))
    details = {**about, "n": len(sample), "alpha": ALPHA, "neighbour": "nearest other image, cosine"}
    details |= {"path": "slerp", "extractor": extractor.name, **size_warning(len(sample), extractor.dims)}
    return {f"interpolation-{extractor.name}": Result(ours.distance(theirs), None, details)}


def nearest(x: Float[Tensor, "n d"]) -> Int[Tensor, " n"]:
    """For each row, the other one of the largest cosine."""
    unit = F.normalize(x.float(), dim=1)
    found = []
    for rows in torch.arange(len(x)).split(1024):
        nearness = unit[rows] @ unit.T  # (b, n)
        nearness[torch.arange(len(rows)), rows] = -torch.inf
        found.append(nearness.argmax(1))
    return torch.cat(found)


def slerp(a: Float[Tensor, "b c *grid"], b: Float[Tensor, "b c *grid"], alpha: float) -> Tensor:
    """sin((1 - alpha) w) / sin w a + sin(alpha w) / sin w b, w the angle between them; a line where it is almost 0."""
    x, y = a.flatten(1).double(), b.flatten(1).double()
    angle = F.cosine_similarity(x, y, dim=1).clamp(-1, 1).acos()[:, None]  # (b, 1)
    sine = angle.sin()
    straight = sine < NEARLY_STRAIGHT
    sine = torch.where(straight, 1.0, sine)
    curved = ((1 - alpha) * angle).sin() / sine * x + (alpha * angle).sin() / sine * y
    return torch.where(straight, (1 - alpha) * x + alpha * y, curved).to(a.dtype).view_as(a)


def _continuity(sample: LatentSample, codec: Codec, seed: int, about: dict) -> Result:
    network = vgg16(sample)
    values: list[Tensor] = []  # of (b, radii)
    for rows in sample.parts(PIXELS, MOST_IMAGES):
        z = sample.latents(rows).to(sample.device)  # (b, c, *grid)
        direction = KeyedRandom(seed, torch.arange(rows.start, rows.start + len(z)), z.device).normal(
            "continuity", *z.shape[1:]
        )
        like = (-1, *[1] * (z.ndim - 1))
        step = direction * (z.flatten(1).norm(dim=1) / direction.flatten(1).norm(dim=1)).view(like)  # |z| long
        plain = network.features(codec.decode(z).clamp(-1, 1))
        moved = [codec.decode(z + side * rho * step).clamp(-1, 1) for rho in RADII for side in (1, -1)]
        distances = torch.stack([network.compare(network.features(x), plain) for x in moved], 1)  # (b, 2 radii)
        values.append(distances.unflatten(1, (-1, 2)).mean(2).cpu())
    curves = torch.cat(values).double()  # (n, radii)
    weights = 1 / torch.tensor(RADII, dtype=torch.float64)
    mean, interval = mean_with_interval(curves @ (weights / weights.sum()))
    curve = [[*point] for point in zip(RADII, curves.mean(0).tolist())]
    return Result(mean, interval, {**about, "n": len(curves), "curve": curve, "seed": seed, "unit": "of |z|"})
