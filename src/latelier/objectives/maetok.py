"""The MAETok objective: paint all pixels, and predict features of the patches that the encoder did not see.

L = MSE + w_p LPIPS + w_kl KL + sum of w_t L_t over the targets t (ICML 2025, section 3.2), and the adversarial term

Auxiliary decoders predict the targets from the latents alone. They live here and not in the tokenizer: optimiser, EMA
and checkpoints know them, the saved tokenizer does not, and every phase begins with fresh ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from latelier.errors import LatelierError
from latelier.keyed_random import KeyedRandom
from latelier.layers import init_linear
from latelier.losses.kl import gaussian_kl
from latelier.losses.terms import LossTerms, judged
from latelier.objectives.masking import draw_mask, draw_share
from latelier.recipe import MAETokRecipe
from latelier.tokenizers import last_layer
from latelier.tokenizers.latent_decoder import LatentDecoder
from latelier.tokenizers.maetok import MAETok

if TYPE_CHECKING:
    from latelier.objectives.targets import Target


class MAETokObjective(nn.Module):
    """Loss terms of a MAETok on a batch of images.

    Args:
        tokenizer: the model to train.
        recipe: masks and weights.
        seed: of masks and the posterior's noise, which are addressed by the images' numbers.
        perceptual: LPIPS; needed when its weight is not zero.
        adversary: the discriminator's side of the loss, if there is one.
        targets: what auxiliary decoders predict; they are not registered, so their teachers are neither trained nor
            saved.
    """

    def __init__(
        self,
        tokenizer: MAETok,
        recipe: MAETokRecipe,
        seed: int,
        perceptual: nn.Module | None = None,
        adversary: None = None,
        targets: Sequence[Target] = (),
    ):
        super().__init__()
        if recipe.kl_weight and not tokenizer.config["variational"]:
            raise LatelierError(
                f"tokenizer.kl_weight = {recipe.kl_weight} needs an encoder that gives a variance, and this one gives "
                "none; set kl_weight: 0, or begin with a tokenizer that was built for a KL."
            )
        self.tokenizer, self.perceptual, self.recipe, self.seed = tokenizer, perceptual, recipe, seed
        self.adversary, self.targets = adversary, targets
        self.auxiliary = nn.ModuleDict({target.name: auxiliary_decoder(tokenizer, target) for target in targets})
        if not recipe.mask.high:
            tokenizer.mask_token.requires_grad_(False)  # nothing stands in for a missing patch

    def forward(self, batch: dict[str, Any]) -> LossTerms:
        """Terms of `batch["image"]` `(b, c, h, w)`; `draw` addresses the random numbers, `seen` counts images."""
        images = batch["image"]
        grid = patch_grid(self.tokenizer, images.shape[2:])
        draws = KeyedRandom(self.seed, batch["sample_id"], images.device)
        mask, share = None, 0.0
        if self.recipe.mask.high:
            share = draw_share(self.recipe.mask, self.seed, batch["seen"])
            mask = draw_mask(draws.uniform("mask", grid[0] * grid[1]), share)  # (b, n)
        z, losses = self._latents(images, mask, draws)
        reconstruction = self.tokenizer.decode_tokens(z, grid, draws).float()  # (b, c, h, w)

        losses["mse"] = F.mse_loss(reconstruction, images)
        weights = {"mse": 1.0, "lpips": self._perceptual_weight(batch["seen"]), "kl": self.recipe.kl_weight}
        rows = judged(batch, self.recipe)
        if self.perceptual is not None and weights["lpips"] and (rows is None or rows.any()):
            pair = (reconstruction, images) if rows is None else (reconstruction[rows], images[rows])
            losses["lpips"] = self.perceptual(*pair).mean()
        if mask is not None and share:
            losses |= self._predictions(z, batch, grid, mask)
        else:
            losses["mse"] = losses["mse"] + self._idle()
        weights |= {target.name: target.section.weight for target in self.targets}
        terms = LossTerms(losses, {k: weights[k] for k in losses}, reconstruction=reconstruction)
        if self.adversary is not None:
            self.adversary.add(terms, reconstruction, last_layer(self.tokenizer), batch)
        return terms

    def _latents(
        self, images: Float[Tensor, "b c h w"], mask: Bool[Tensor, "b n"] | None, draws: KeyedRandom
    ) -> tuple[Float[Tensor, "b l k"], dict[str, Tensor]]:
        """Latents, drawn from the posterior if there is one, and the KL of that."""
        moments = self.tokenizer.moments(images, mask).float()  # (b, l, c), or (b, l, 2 c)
        if not self.tokenizer.config["variational"]:
            return moments, {}
        mean, logvar = moments.chunk(2, dim=-1)
        logvar = logvar.clamp(-30, 20)
        z = mean + (0.5 * logvar).exp() * draws.normal("posterior", *mean.shape[1:])  # (b, l, c)
        return z, {"kl": gaussian_kl(mean, logvar).sum(-1).mean()}

    def _predictions(
        self, z: Float[Tensor, "b l c"], batch: Mapping[str, Any], grid: tuple[int, int], mask: Bool[Tensor, "b n"]
    ) -> dict[str, Tensor]:
        """The error of each target, by name."""
        errors = {}
        for target in self.targets:
            predicted = self.auxiliary[target.name](z, target.tokens(grid)).float()  # (b, n, d)
            errors[target.name] = target.error(predicted, target(batch, grid), mask)
        return errors

    def _perceptual_weight(self, seen: int | float) -> float:
        """LPIPS's weight, which rises from 0 over `perceptual_warmup` images."""
        warmup = self.recipe.perceptual_warmup
        return self.recipe.perceptual_weight * (min(1.0, seen / warmup) if warmup else 1.0)

    def _idle(self) -> Tensor | float:
        """Zero, through all auxiliary decoders: where nothing is masked, DDP still waits for their gradients."""
        return sum((0.0 * p.sum() for p in self.auxiliary.parameters()), 0.0)


class AuxiliaryDecoder(nn.Module):
    """A shallow decoder with a CLS token, and a linear head as wide as the target."""

    def __init__(self, body: LatentDecoder, dim: int, width: int):
        super().__init__()
        self.body, self.head = body, nn.Linear(dim, width)
        init_linear(self.head)

    def forward(self, z: Float[Tensor, "b l c"], grid: tuple[int, int]) -> Float[Tensor, "b n d"]:
        return self.head(self.body(z, grid))


class LinearReadout(nn.Module):
    """Each patch's prediction is one linear map of all latents: learnt weights mix them, a linear layer widens that.

    The paper's decoder without blocks (table 4d, "linear") does not say how patches reach the latents, which only
    attention mixes; this is the simplest map that tells patches apart. It is made for one grid.
    """

    def __init__(self, latent_tokens: int, latent_channels: int, grid: tuple[int, int], width: int):
        super().__init__()
        self.grid = grid
        self.mix = nn.Linear(latent_tokens, grid[0] * grid[1])
        self.head = nn.Linear(latent_channels, width)
        init_linear(self)

    def forward(self, z: Float[Tensor, "b l c"], grid: tuple[int, int]) -> Float[Tensor, "b n d"]:
        if tuple(grid) != self.grid:
            raise LatelierError(
                f"A target of depth 0 is made for {self.grid} patches, but the image has {tuple(grid)}; "
                "give it a depth."
            )
        return self.head(self.mix(z.transpose(1, 2)).transpose(1, 2))  # (b, n, width)


def auxiliary_decoder(tokenizer: MAETok, target: Target) -> nn.Module:
    """Latents of this tokenizer to predictions of a target."""
    section, config = target.section, tokenizer.config
    grid = target.tokens(patch_grid(tokenizer, config["image_size"]))
    latent = (config["latent_tokens"], config["latent_channels"])
    if not section.depth:
        return LinearReadout(*latent, grid, target.dim)
    body = LatentDecoder(
        *latent, grid, section.dim, section.depth, section.heads, cls_token=True, latent_scale=config["latent_scale"]
    )
    return AuxiliaryDecoder(body, section.dim, target.dim)


def patch_grid(tokenizer: MAETok, size: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of patches in an image of `(h, w)` pixels."""
    p = tokenizer.config["patch_size"]
    return size[0] // p, size[1] // p
