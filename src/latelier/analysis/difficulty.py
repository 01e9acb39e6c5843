"""How hard a latent space is to learn: what a small, fixed denoiser makes of it in a short, fixed training.

Every codec gets the same network, steps, learning rate and times. The network adds to the best guess from mean 0 and
variance 1 of each number (see `predict`): whatever structure a short training finds makes the loss smaller.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from latelier.analysis.sample import LatentSample
from latelier.data.records import permuted_index
from latelier.denoisers.dit import DiT
from latelier.diffusion.process import Flow
from latelier.errors import NotMeasurable
from latelier.evaluation.results import Result, mean_with_interval
from latelier.keyed_random import KeyedRandom, fold_in
from latelier.tokenizers.codec import Codec

NETWORK: dict[str, Any] = {"dim": 128, "depth": 2, "heads": 4, "norm": "layer", "mlp": "gelu"}
NETWORK |= {"rope": False, "qk_norm": False}
MOST_TOKENS = 64
STEPS, BATCH, LEARNING_RATE, WARMUP = 300, 32, 1e-3, 30
TIMES = 8  # at which the loss is measured
HELD_OUT = 512  # images on which it is measured, at most
BYTES = 2**29  # of latents that are held at once
FLOW = Flow("logit-normal")
PATHS, SEGMENTS = 64, 50  # sampled with Euler's method, as in "Diffusing in the Right Space" (2026)


def diffusion_difficulty(train: LatentSample, sample: LatentSample, codec: Codec, seed: int = 0) -> dict[str, Result]:
    """Train the small denoiser on some latents (9,600, or half a GiB, at most), and measure it on at most 512 others.

    `diffusion-loss`: mean squared error of the velocity for each number of a latent, lower is easier, with a 95 %
    interval over images. Details have `constant` and `independent`, to read it against, and `by_time`.
    `path-straightness` and `path-efficiency` are of 64 samples that the denoiser draws, see `path_shape`. The codec
    says where and how precisely the denoiser runs. An error if there are no images on one of the sides.
    """
    if not len(train) or not len(sample):
        there = f"there are {len(train)} to learn from and {len(sample)} to measure on"
        raise NotMeasurable(f"difficulty learns from some images and is measured on others, but {there}.")
    room = max(1, BYTES // (4 * train.mean[0].numel()))
    z = train.latents(slice(0, min(STEPS * BATCH, room)))  # (m, c, *grid)
    held_out = sample.on_scale_of(train).latents(slice(0, min(HELD_OUT, room)))  # (n, c, *grid)
    model = build_denoiser(tuple(z.shape[1:]), seed).to(codec.device)
    train_denoiser(model, z, seed, codec)
    losses, constant = flow_losses(model, held_out, z.mean(0), seed, codec)  # (n, t), (n, t)
    mean, interval = mean_with_interval(losses.mean(1))
    details = {
        "n": len(held_out), "n_train": len(z), "latents": "posterior mean, normalised",
        "latent_scale": train.scale.origin, "dims": z[0].numel(), "tokens": math.prod(model.grid),
        "patch": model.config["patch_size"], "parameters": sum(p.numel() for p in model.parameters()),
        "network": NETWORK, "steps": STEPS, "batch": BATCH, "lr": LEARNING_RATE, "seed": seed,
        "precision": codec.precision, "constant": constant.mean().item(), "independent": independent_loss(z),
        "by_time": [[t, y] for t, y in zip(times().tolist(), losses.mean(0).tolist())],
    }  # fmt: skip
    shapes = path_shape(sample_paths(model, tuple(z.shape[1:]), seed, codec))
    about = {"n": PATHS, "segments": SEGMENTS, "sampler": "euler", "denoiser": "that of diffusion-loss", "seed": seed}
    paths = {f"path-{name}": Result(*mean_with_interval(values), about) for name, values in shapes.items()}
    return {"diffusion-loss": Result(mean, interval, details), **paths}


@torch.no_grad()
def sample_paths(model: DiT, shape: tuple[int, ...], seed: int, codec: Codec) -> Float[Tensor, "m n d"]:
    """Noise, the states between, and latents: `SEGMENTS` + 1 states of each sample, from t = 1 to 0."""
    x = KeyedRandom(seed, torch.arange(PATHS), codec.device).normal("difficulty path", *shape)  # (n, c, *grid)
    states = [x.flatten(1).cpu()]
    for step in range(SEGMENTS):
        t = torch.full((PATHS,), 1 - step / SEGMENTS).to(x)
        with codec._autocast():
            velocity = predict(model, x, t)
        x = x - velocity / SEGMENTS
        states.append(x.flatten(1).cpu())
    return torch.stack(states)


def path_shape(states: Float[Tensor, "m n d"]) -> dict[str, Float[Tensor, " n"]]:
    """Of paths x_0 ... x_M with steps D_i = x_(i+1) - x_i ("Diffusing in the Right Space", equations 10 and 11):

    straightness   mean of cos(D_i, D_(i+1)), 1 for lines
    efficiency     |x_M - x_0| / sum_i |D_i|, 1 for lines

    Both depend on mean and scale of the latents, not on their simplicity alone: N(0, I) has the efficiency 0.
    """
    steps = states.double().diff(dim=0)  # (m - 1, n, d)
    straightness = torch.cosine_similarity(steps[:-1], steps[1:], dim=2).mean(0)  # (n,)
    length = steps.norm(dim=2).sum(0)  # (n,)
    return {"straightness": straightness, "efficiency": (states[-1] - states[0]).double().norm(dim=1) / length}


def build_denoiser(shape: tuple[int, ...], seed: int) -> DiT:
    """The denoiser of latents `(c, *grid)`, whose weights depend on the seed alone; random state stays as it is."""
    channels, *grid = shape
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(fold_in(seed, "difficulty weights", 0))
        return DiT(in_channels=channels, grid=tuple(grid), patch_size=choose_patch(grid), **NETWORK)


def choose_patch(grid: list[int]) -> int:
    """The smallest patch that divides all sides and leaves at most 64 tokens; else the largest that divides them."""
    fitting = [p for p in range(1, min(grid) + 1) if all(side % p == 0 for side in grid)]
    small = (p for p in fitting if math.prod(side // p for side in grid) <= MOST_TOKENS)
    return next(small, fitting[-1])


def predict(model: DiT, x_t: Float[Tensor, "b c *grid"], t: Float[Tensor, " b"]) -> Float[Tensor, "b c *grid"]:
    """The velocity: what independent numbers of mean 0 and variance 1 would have, and what the network adds.

    For such z, `E[eps - z | x_t] = (t - (1 - t)) / (t^2 + (1 - t)^2) x_t`: the two are jointly Gaussian. The idea is
    that of preconditioning (Karras et al. 2022, section 5): a narrow network need not carry the noise through.
    """
    share = (2 * t - 1) / (t.square() + (1 - t).square())  # (b,)
    return model(x_t, t).float() + share.view(-1, *[1] * (x_t.ndim - 1)) * x_t


@torch.enable_grad()
def train_denoiser(model: DiT, z: Float[Tensor, "n c *grid"], seed: int, codec: Codec) -> None:
    """The flow objective with a cosine schedule; order, noise and times belong to the draw's number."""
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    model.train()
    for step in range(STEPS):
        done = (step + 1) / STEPS  # the rate: linear over the warm-up, then half a cosine down to 0
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min((step + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * done)))
        numbers = torch.arange(step * BATCH, (step + 1) * BATCH)  # (b,)
        rng = KeyedRandom(seed, numbers, codec.device)
        clean = z[permuted_index(numbers, len(z), seed)].to(codec.device)  # (b, c, *grid)
        eps, t = rng.normal("difficulty noise", *z.shape[1:]), FLOW.sample_t(rng.uniform("difficulty time"))
        with codec._autocast():
            prediction = predict(model, FLOW.noise(clean, t, eps), t)
        loss = (prediction - FLOW.target(clean, t, eps)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()


def times() -> Float[Tensor, " t"]:
    """Fixed times: the middles of equal shares of the training times' distribution."""
    return FLOW.sample_t((torch.arange(TIMES) + 0.5) / TIMES)


@torch.no_grad()
def flow_losses(
    model: DiT, z: Float[Tensor, "n c *grid"], mean: Float[Tensor, " c *grid"], seed: int, codec: Codec
) -> tuple[Float[Tensor, "n t"], Float[Tensor, "n t"]]:
    """Squared error of the velocity at each of `times()`, mean over a latent's numbers: the denoiser's, and that of
    the constant prediction, minus the training latents' mean, which is the best that does not look at its input. The
    noise of latent i at the k-th time is the same for every codec of equal latent shape.
    """
    rows, constants = [], []
    for number in torch.arange(len(z)).split(BATCH):
        clean, rng = z[number].to(codec.device), KeyedRandom(seed, number, codec.device)
        here, blind = [], []
        for k, at in enumerate(times().tolist()):
            eps, t = rng.normal(f"difficulty held out {k}", *z.shape[1:]), torch.full((len(clean),), at).to(clean)
            target = FLOW.target(clean, t, eps)
            with codec._autocast():
                prediction = predict(model, FLOW.noise(clean, t, eps), t)
            here.append((prediction - target).square().flatten(1).mean(1).cpu())  # (b,)
            blind.append((target + mean.to(target)).square().flatten(1).mean(1).cpu())  # (b,)
        rows.append(torch.stack(here, 1))
        constants.append(torch.stack(blind, 1))
    return torch.cat(rows), torch.cat(constants)


def independent_loss(z: Float[Tensor, "n c *grid"]) -> float:
    """What a latent's numbers cost at the least if they were independent Gaussians, each of its own variance `v`: that
    of `eps - z` when `x_t = (1 - t) z + t eps` is known, `v / (t^2 + (1 - t)^2 v)`, mean over `times()`.
    """
    variance = z.double().flatten(1).var(0, correction=0)[:, None]  # (d, 1)
    t = times().double()
    return (variance / (t.square() + (1 - t).square() * variance)).mean().item()
