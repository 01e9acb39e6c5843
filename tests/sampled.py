"""What tests of samplers share: latents of a denoiser by the settings of a recipe's `sample`."""

import torch

from latelier.diffusion.cfg import guided
from latelier.diffusion.sampling import sample_latents, watched


def initial_noise(shape, seeds):
    """Standard normal latents of the first draw of each image's seed."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def scheduler(process, sample):
    return process.scheduler(sample.steps, sample.sampler, sample.shift or 1.0, sample.eta, sample.last_step)


def sampled(model, process, sample, shape, seeds, cond=None, uncond=None, loss_guidance=None, watch=None, **options):
    """As the pipeline composes them; `options` are a `scheduler` of the caller and `progress`."""
    predict = guided(model, cond, uncond, sample.guidance, sample.guidance_interval, sample.guidance_channels)
    if loss_guidance is not None:
        predict = loss_guidance.guide(predict, process)
    if watch is not None:
        predict = watched(predict, process, watch)
    own = options.pop("scheduler", None) or scheduler(process, sample)
    return sample_latents(predict, own, shape, list(seeds), eta=sample.eta, **options)
