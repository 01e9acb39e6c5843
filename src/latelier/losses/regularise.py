"""Regularisers of a latent space: terms and changes that stand between a tokenizer's encoder and decoder.

A recipe lists them under `tokenizer.regularise`. Whatever its order, a step does the following, with z the latents,
drawn from their posterior if there is one:

    norm          z <- z / rms(z) at each position, in place of a KL (GAE, PAE); at inference too, see `Codec`
    align         + w align(W z, features of a teacher): `alignment`
    noise         z <- z + sigma eps (RAE, GAE) or (1 - tau) z + tau level eps (l-DeTok), in training only
    scale         + w L(x', D(z')) at a half or a quarter of the side: `equivariance`
    equivariance  L(T x, D(T z)) in place of L(x, D(z)): `equivariance`
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from accelerate.utils import reduce
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from latelier.errors import LatelierError
from latelier.keyed_random import KeyedRandom
from latelier.losses.adversarial import adaptive_weight
from latelier.losses.alignment import Alignment
from latelier.losses.equivariance import Equivariance, Shrinking, move
from latelier.losses.teachers import open_teacher
from latelier.losses.terms import LossTerms
from latelier.sections import Count, Kind, TrainedTokenizer, Unit, Weight
from latelier.tokenizers import TokenizerInfo, encoder_layer, tokenizer_info
from latelier.tokenizers.statistics import rms_normalise

ALIGN_LIMIT = 1e8  # of the adaptive weight (VA-VAE's code)
OF_LATENTS = ("kl", "codebook")  # terms that are no reconstruction
STD_DECAY = 0.99  # of the running moments in whose units noise is measured
PERCEPTUAL_LEAST = 16  # pixels that LPIPS needs


class AlignTerm(Kind):
    """Features of a frozen teacher in a linear map of the latents (VA-VAE; the defaults are its last phase's)."""

    kind: Literal["align"]
    teacher: str = Field("facebook/dinov2-large", description="a ViT of `transformers`, vgg16, or a trained tokenizer")
    teacher_normalise: Literal["own", "none"] = Field("own", description="none: it sees images in [-1, 1] (VA-VAE)")
    weight: Weight = 0.1
    adaptive: bool = Field(True, description="scale it by the gradients at the encoder's last layer")
    cosine: Weight = Field(1.0, description="weight of the cosines of positions")
    matrix: Weight = Field(1.0, description="weight of the matrix of cosines within an image")
    cosine_margin: float = Field(0.5, ge=0, le=2, description="what the cosine may lack")
    matrix_margin: float = Field(0.25, ge=0, le=2, description="by how much cosines may differ")
    power: float = Field(1.0, ge=1, description="of the matrix's differences")
    matrix_of: Literal["projection", "latents"] = Field("projection", description="whose cosines the matrix has")
    until: Count | None = Field(None, description="images after which the term is left out")


class EquivarianceTerm(Kind):
    """Moved latents shall decode to moved images (EQ-VAE)."""

    kind: Literal["equivariance"]
    probability: Unit = Field(0.5, description="of a step with smaller, turned latents")
    image_probability: Unit = Field(0.25, description="of a smaller image, in the other steps")
    least: float = Field(0.25, gt=0, le=1, description="smallest scale; 1: turn only")
    rotate: bool = Field(True, description="by 90, 180 or 270 degrees")
    anisotropic: bool = Field(False, description="a scale of its own for each side")


class ScaleTerm(Kind):
    """Smaller latents shall decode to smaller images, a further term (scale equivariance)."""

    kind: Literal["scale"]
    weight: Weight = 0.25
    factors: list[int] = Field([2, 4], min_length=1, description="by which the side is divided; each step draws one")


class NoiseTerm(Kind):
    """Noise on the latents that the decoder sees in training, with a level for each image."""

    kind: Literal["noise"]
    law: Literal["uniform", "half-normal", "interpolate"] = Field(
        "uniform", description="sigma in [0, level]; |N(0, level^2)|; or (1 - tau) z + tau level eps with tau in [0, 1]"
    )
    level: float = Field(0.5, gt=0)
    unit: Literal["std", "raw"] = Field("std", description="of the level: the running deviation of each channel, or 1")


class NormTerm(Kind):
    """Latents of root mean square 1 at each position, in place of a KL."""

    kind: Literal["norm"]
    form: Literal["rms", "rms-both"] = Field("rms", description="rms-both: also before decoding, as of sampled latents")


SECTIONS = (AlignTerm, EquivarianceTerm, ScaleTerm, NoiseTerm, NormTerm)
TERMS = dict.fromkeys(("align", "equivariance", "scale", "noise", "norm"), __name__)


class Noise(nn.Module):
    """Noise on latents, see `NoiseTerm`; drawn for each image by its `sample_id`.

    With `unit` std the level is in units of each channel's running deviation up to the step before, the same for all
    processes and micro-batches; checkpoints hold its sums. The first micro-batch of all has its own deviation.
    """

    moments: Tensor
    step: Tensor
    begun: Tensor

    def __init__(self, seed: int, channels: int, law: str = "uniform", level: float = 0.5, unit: str = "std"):
        super().__init__()
        self.seed, self.law, self.level, self.unit = seed, law, level, unit
        if unit == "std":
            self.register_buffer("moments", torch.zeros(2, channels))  # running mean and mean square
            self.register_buffer("step", torch.zeros(3, channels))  # micro-batches of the step under way, their sums
            self.register_buffer("begun", torch.tensor(-1))  # images seen before it

    def forward(
        self, z: Float[Tensor, "b c *grid"], sample_id: Int[Tensor, " b"], seen: int
    ) -> Float[Tensor, "b c *grid"]:
        """z + sigma s eps, or (1 - tau) z + tau level s eps (l-DeTok), with s = 1 or the channel's deviation."""
        rng, ones = KeyedRandom(self.seed, sample_id, z.device), (1,) * (z.ndim - 1)
        eps = rng.normal("latent noise", *z.shape[1:])  # (b, c, *grid)
        if self.unit == "std":
            eps = eps * self._deviation(z, seen).view(-1, *ones[1:])
        if self.law == "half-normal":
            return z + self.level * rng.normal("latent noise level", *ones).abs() * eps
        u = rng.uniform("latent noise level", *ones)  # (b, 1, ...)
        return (1 - u) * z + u * self.level * eps if self.law == "interpolate" else z + u * self.level * eps

    @torch.no_grad()
    def _deviation(self, z: Float[Tensor, "b c *grid"], seen: int) -> Float[Tensor, " c"]:
        """The running deviation of each channel; this batch is added to what the next step sees."""
        values = z.float().transpose(0, 1).flatten(1)  # (c, n)
        now = reduce(torch.stack([values.mean(1), values.square().mean(1)]), reduction="mean")  # over processes
        if self.begun != seen:
            if self.step[0].any():
                whole = self.step[1:] / self.step[0]
                self.moments.lerp_(whole, 1 - STD_DECAY if self.moments[1].any() else 1.0)
            self.step.zero_()
            self.begun.fill_(seen)
        self.step += torch.cat([torch.ones_like(now[:1]), now])
        mean, square = self.moments if self.moments[1].any() else now
        return (square - mean.square()).clamp(min=1e-12).sqrt()


@dataclass
class Regularised:
    """Latents after the regularisers.

    Attributes:
        z, target: what is decoded, and the image that it shall become.
        plain, image: the same before they were moved.
        losses: of the alignment.
    """

    z: Float[Tensor, "b k *grid"]
    target: Float[Tensor, "b c h w"]
    plain: Float[Tensor, "b k *other"]
    image: Float[Tensor, "b c i j"]
    losses: dict[str, Tensor] = field(default_factory=dict)


class Regularisers(nn.Module):
    """The regularisers of one objective; without any, nothing is computed and nothing changes.

    Args:
        factor: of the tokenizer.
        norm: `rms`, or None.
        align: the alignment, its weight, whether the weight is adaptive, and the images after which it is left out.
        noise, scale, equivariance: or None.
    """

    def __init__(
        self,
        factor: int = 1,
        norm: str | None = None,
        align: tuple[Alignment, float, bool, int | None] | None = None,
        noise: Noise | None = None,
        scale: Shrinking | None = None,
        equivariance: Equivariance | None = None,
    ):
        super().__init__()
        self.factor, self.norm, self.noise, self.scale = factor, norm, noise, scale
        self.align = align[0] if align else None
        self.weight, self.adaptive, self.until = align[1:] if align else (0.0, False, None)
        self.equivariance = equivariance

    def images(self, batch: dict[str, Any]) -> Float[Tensor, "b c h w"]:
        """What is encoded: the batch's images, in some steps smaller (EQ-VAE)."""
        images = batch["image"]
        if self.equivariance is None:
            return images
        what, grid, _ = self.equivariance.draw(batch["seen"], self._grid(images))
        return move(images, self._pixels(grid)) if what == "image" else images

    def forward(
        self,
        z: Float[Tensor, "b d *grid"],
        images: Float[Tensor, "b c h w"],
        batch: dict[str, Any],
        keep: Int[Tensor, "b k"] | None = None,
    ) -> Regularised:
        """Between encoder and decoder; `images` was encoded, `keep` are the visible positions if not all are."""
        losses: dict[str, Tensor] = {}
        if self.norm:
            z = rms_normalise(z)
        if self.align is not None and (self.until is None or batch["seen"] < self.until):
            losses = self.align(z, images, self._grid(images), keep)
        elif self.align is not None:  # DDP waits for a gradient of every weight
            z = z + 0.0 * self.align.project.weight.sum()
        if self.noise is not None and self.training:
            z = self.noise(z, batch["sample_id"], batch["seen"])
        result = Regularised(z, images, z, images, losses)
        if self.equivariance is not None:
            what, grid, turns = self.equivariance.draw(batch["seen"], self._grid(batch["image"]))
            if what == "latents":
                result.z, result.target = move(z, grid, turns), move(images, self._pixels(grid), turns)
        return result

    def add(
        self,
        terms: LossTerms,
        latent: Regularised,
        batch: dict[str, Any],
        tokenizer: nn.Module,
        decode: Callable[[Tensor], Tensor],
        measure: Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]],
    ) -> LossTerms:
        """The objective's terms with those of the regularisers.

        Args:
            terms: of the reconstruction of `latent.z`.
            latent: what `forward` returned.
            batch: of the step.
            tokenizer: which is trained.
            decode: latents on a grid of any size to images.
            measure: unweighted terms of a reconstruction, its original and `sample_id`; `terms` has their weights.
        """
        parts = {k: w * terms.losses[k] for k, w in terms.weights.items() if w and k not in OF_LATENTS}
        if latent.losses:
            weight, loss = self.weight, latent.losses["align"]
            terms.losses |= latent.losses
            if self.adaptive and torch.is_grad_enabled():  # VA-VAE, equation 8, both gradients at the encoder's end
                layer = encoder_layer(tokenizer)
                scale = adaptive_weight(torch.stack([*parts.values()]).sum(), loss, layer, ALIGN_LIMIT)
                terms.losses["align_weight"], weight = scale, weight * scale.item()
            terms.weights["align"] = weight
        if self.scale is not None:
            factor = self.scale.draw(batch["seen"])
            small, image = (move(x, _divided(x, factor)) for x in (latent.plain, latent.image))
            errors = measure(decode(small), image, batch["sample_id"])
            terms.losses["scale"] = torch.stack([terms.weights[k] * v for k, v in errors.items()]).sum()
            terms.weights["scale"] = self.scale.weight
        if self.equivariance is not None:
            terms.target = latent.target
        return terms

    def _grid(self, images: Tensor) -> tuple[int, int]:
        return images.shape[2] // self.factor, images.shape[3] // self.factor

    def _pixels(self, grid: tuple[int, int]) -> tuple[int, int]:
        return grid[0] * self.factor, grid[1] * self.factor


def _divided(x: Tensor, factor: int) -> tuple[int, int]:
    return x.shape[2] // factor, x.shape[3] // factor


def build_regularisers(section: TrainedTokenizer, tokenizer: nn.Module, seed: int, dataset: Any = None) -> Regularisers:
    """The regularisers of a recipe's section.

    Raises:
        LatelierError: for one that does not fit the tokenizer or `dataset`'s images, and an unknown teacher.
    """
    settings = {term.kind: term.model_dump(exclude={"kind"}) for term in section.regularise}
    if not settings:
        return Regularisers()
    info = tokenizer_info(tokenizer)
    _check_grid(section, settings, info)
    align, noise, scale = settings.get("align"), settings.get("noise"), settings.get("scale")
    equivariance = settings.get("equivariance")
    built = Regularisers(
        info.factor,
        section.norm,
        None if align is None else _build_alignment(align, section, tokenizer, info),
        None if noise is None else Noise(seed, info.latent_channels, **noise),
        None if scale is None else Shrinking(seed, **scale),
        None if equivariance is None else Equivariance(seed, **equivariance),
    )
    if dataset is not None:
        _check_sizes(section, built, dataset.shape[1:])
    return built


def _build_alignment(
    settings: dict[str, Any], section: TrainedTokenizer, tokenizer: nn.Module, info: TokenizerInfo
) -> tuple[Alignment, float, bool, int | None]:
    """The alignment and how it is weighted; an error where it has no encoder to train."""
    weight, adaptive, until = (settings.pop(key) for key in ("weight", "adaptive", "until"))
    encoder = [p for name, p in tokenizer.named_parameters() if name.split(".")[0] not in info.decoder_modules]
    if not any(p.requires_grad for p in encoder) or (adaptive and not encoder_layer(tokenizer).requires_grad):
        raise LatelierError(
            f"tokenizer.regularise: align trains the encoder, whose last layer tokenizer.train = {section.train} "
            "freezes; leave it out of `regularise` here, or train that layer too."
        )
    teacher = open_teacher(settings.pop("teacher"), normalise=settings.pop("teacher_normalise"))
    return Alignment(teacher, info.latent_channels, **settings), weight, adaptive, until


def _check_grid(section: TrainedTokenizer, settings: dict[str, Any], info: TokenizerInfo) -> None:
    """Refuse what needs a latent at every position where there is none."""
    for kind in ("align", "equivariance", "scale"):
        if kind in settings and info.latent_tokens is not None:
            raise LatelierError(
                f"tokenizer.regularise: {kind} needs latents on a grid, but kind {section.kind} has 1-D latents; "
                "choose noise or norm, or another kind."
            )
        masked = getattr(section, "mask_ratio", 0.0)
        if kind in settings and kind != "align" and masked:
            raise LatelierError(
                f"tokenizer.regularise: {kind} moves the whole grid, of which mask_ratio = {masked} drops a part; set "
                "mask_ratio: 0, or use it in a phase where it is 0."
            )


def _check_sizes(section: TrainedTokenizer, built: Regularisers, size: tuple[int, ...]) -> None:
    """Refuse factors that do not divide the grid, and images too small for LPIPS or the discriminator."""
    grid = (size[0] // built.factor, size[1] // built.factor)
    smallest: list[tuple[str, int]] = []
    if built.scale is not None:
        for factor in built.scale.factors:
            if factor < 2 or any(side % factor for side in grid):
                raise LatelierError(
                    f"tokenizer.regularise: scale.factors has {factor}, which does not divide latents of "
                    f"{grid[0]} x {grid[1]}; use factors from 2 on that do."
                )
        smallest.append((f"scale.factors = {built.scale.factors}", min(size) // max(built.scale.factors)))
    if built.equivariance is not None:
        least = min(built.equivariance.sizes(grid)[0]) * built.factor
        smallest.append((f"equivariance.least = {built.equivariance.least}", least))
    game = section.adversarial
    for what, side in smallest:
        needs = PERCEPTUAL_LEAST if section.perceptual_weight else 0
        if game is not None and game.kind == "patch" and not what.startswith("scale"):
            needs = max(needs, 2 ** (game.layers + 2))
        if side < needs:
            raise LatelierError(
                f"tokenizer.regularise: {what} makes images of {side} pixels a side, but LPIPS or the discriminator "
                f"needs {needs}; use less shrinking, or larger images."
            )
