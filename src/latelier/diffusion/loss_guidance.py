"""Loss guidance: pulls a trained, even unconditional, model towards an image while it samples (LDM, appendix).

An energy E(x_t) = 1/2 |y - T(D(z(x_t)))|^2 says how far the image D(z) of the present estimate z lies from a target
y, after some T, such as downsampling. Adding -E to the log-density moves the score, and with it the epsilon
(Dhariwal & Nichol 2021, algorithm 2; Song et al. 2021, section 5):

    score = -eps / sigma    =>    eps' = eps + sigma s grad E,    s the scale

and since x_t = alpha z + sigma eps stays as it is, z' = z - sigma^2 / alpha s grad E. The targets of all processes are
linear in (z, eps), so any prediction moves by the target of the two shifts:

    epsilon  + sigma s grad E        v         + sigma / alpha s grad E
    z        - sigma^2 / alpha ...   velocity  + t / (1 - t) s grad E        (alpha = 1 - t, sigma = t)
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from latelier.diffusion import Latents, Levels, Predict
from latelier.diffusion.process import DDPM, Flow
from latelier.errors import LatelierError

LEAST_ALPHA = 1e-3  # below, x_t says nothing about the image, and sigma^2 / alpha has no bound


class LossGuidance:
    """Pulls samples towards an image.

    Args:
        decode: normalised latents to images in [-1, 1], differentiable: `codec.decode`.
        target: y, `(b, c, h, w)` in [-1, 1], one for each image, or one for all.
        kind: `l2`, half the squared distance summed over an image, or `lpips`, the perceptual distance.
        factor: T averages blocks of `factor` x `factor` pixels of the decoded image; the target is as much smaller.
        scale: s; 0 does nothing. For `l2`, 1 / variance makes E the log-likelihood of a target with that much noise.
    """

    def __init__(
        self, decode: Callable[[Tensor], Tensor], target: Float[Tensor, "b c h w"],
        kind: Literal["l2", "lpips"] = "l2", factor: int = 1, scale: float = 1.0,
    ):  # fmt: skip
        if kind not in ("l2", "lpips"):
            raise LatelierError(f"loss guidance: kind = {kind!r} is not known; allowed: l2, lpips.")
        if factor < 1 or scale < 0:
            raise LatelierError(
                f"loss guidance: factor = {factor}, scale = {scale} are not allowed; use 1 or more, and 0 or more."
            )
        self.decode, self.target, self.kind, self.factor, self.scale = decode, target, kind, factor, scale
        self._distance = lambda images, target: 0.5 * (images - target).square().flatten(1).sum(1)  # (b,)
        if kind == "lpips":
            from latelier.losses.perceptual import LPIPS

            self._distance = LPIPS("vgg")

    def rows(self, images: list[int]) -> LossGuidance:
        """The guidance of some images, by their rows of the target."""
        chosen = copy(self)
        if len(self.target) > 1:
            chosen.target = self.target[images]
        return chosen

    def energy(self, z: Latents) -> Levels:
        """E of some latents `(b,)`; an error if their images are not of the target's shape."""
        images = self.decode(z)  # (b, c, h, w)
        if self.factor > 1:
            images = F.avg_pool2d(images, self.factor)  # (b, c, h / factor, w / factor)
        target = self.target.to(images)
        if target.shape[1:] != images.shape[1:] or len(target) not in (1, len(images)):
            raise LatelierError(
                f"The target of loss guidance is {tuple(target.shape)}, but the images that are drawn, "
                f"{self.factor} times smaller, are {tuple(images.shape)}; give a target of that shape."
            )
        if isinstance(self._distance, nn.Module):
            self._distance.to(images.device)
        return self._distance(images, target.expand_as(images))

    def guide(self, predict: Predict, process: Flow | DDPM) -> Predict:
        """`predict`, classifier-free guidance included, with its predictions moved; `process` is that of training.

        Gradients flow to x_t only, through denoiser and decoder; weights gather none.
        """

        def guided_predict(x_t: Latents, t: Levels) -> Latents:
            with torch.enable_grad():
                x = x_t.detach().requires_grad_()
                prediction = predict(x, t).float()  # (b, c, *grid)
                energy = self.energy(process.denoised(x, t, prediction))  # (b,)
                (gradient,) = torch.autograd.grad(energy.sum(), x)  # (b, c, *grid)
            alpha, sigma = process.alpha_sigma(t, x_t)  # (b, 1, ...) each
            gradient = torch.where(alpha > LEAST_ALPHA, self.scale * gradient, 0.0)
            z_shift = -(sigma**2) / alpha.clamp(min=LEAST_ALPHA) * gradient
            return prediction.detach() + process.target(z_shift, t, sigma * gradient)

        return guided_predict
