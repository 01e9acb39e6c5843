"""Tokenizer, denoiser and conditioner in one `DiffusionPipeline`, which draws images and saves and loads whole.

From noise to a PNG one reads this file, `diffusion/sampling.py`, `cfg.py`, `process.py` and `schedulers.py`, a file of
`denoisers/`, `tokenizers/codec.py` and `images.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from jaxtyping import Float
from pydantic import ValidationError
from torch import Tensor

from latelier.conditioning import CONDITIONERS
from latelier.conditioning.inputs import Inputs
from latelier.conditioning.spatial import compose
from latelier.denoisers import DENOISERS
from latelier.diffusion.cfg import guided
from latelier.diffusion.loss_guidance import LossGuidance
from latelier.diffusion.process import DDPM, Flow, Scheduler, build_process, describe_process
from latelier.diffusion.sampling import sample_latents, watched
from latelier.diffusion.tiled import tiled
from latelier.errors import LatelierError
from latelier.layers import fast_bf16
from latelier.recipe import Sample, first_problem
from latelier.tokenizers import TOKENIZERS
from latelier.tokenizers.codec import Codec, decode_within

# diffusers opens a saved pipeline's components only from modules that are imported already.
for _place in (*TOKENIZERS.values(), *DENOISERS.values(), *CONDITIONERS.values()):
    importlib.import_module(_place.split(":")[0])

OUTPUTS = ("pil", "pt", "np", "latent")
Watch: TypeAlias = Callable[[list[int], int, Tensor], None]  # seeds, evaluations done, estimate of the latents


class LatentDiffusionPipeline(DiffusionPipeline):
    """Draws images: noise, denoiser, tokenizer's decoder.

    `build` makes one from trained components, `save_pretrained` and `from_pretrained` keep it whole.

    Args:
        tokenizer: a diffusers-style autoencoder.
        denoiser: `forward(x_t, t, condition) -> prediction`.
        conditioner: makes conditions of a user's inputs; None is an unconditional model.
        scheduler: the default sampler, used by `sampler="auto"`; any diffusers scheduler may be put in its place.
        process: the diffusion process, arguments of `build_process`.
        statistics: `mean` and `std` of the latents, one number per channel; empty leaves latents as they are.
        height, width: default size of the images, in pixels.
        dropped: inputs that were dropped at times in training, so that guidance can leave them out; by default
            `classes`.
    """

    _optional_components = ["conditioner"]  # noqa: RUF012
    model_cpu_offload_seq = "conditioner->denoiser->tokenizer"

    def __init__(
        self,
        tokenizer: ModelMixin,
        denoiser: ModelMixin,
        conditioner: ModelMixin | None,
        scheduler: Scheduler,
        process: dict[str, Any] | None = None,
        statistics: dict[str, list[float]] | None = None,
        height: int = 64,
        width: int = 64,
        dropped: list[str] | None = None,
    ):
        super().__init__()
        self.register_modules(tokenizer=tokenizer, denoiser=denoiser, conditioner=conditioner, scheduler=scheduler)
        self.register_to_config(
            process=process or {},
            statistics=statistics or {},
            height=height,
            width=width,
            dropped=["classes"] if dropped is None else dropped,
        )

    @classmethod
    def build(
        cls,
        codec: Codec,
        denoiser: ModelMixin,
        conditioner: ModelMixin | None,
        process: Flow | DDPM,
        image_size: tuple[int, int],
        dropped: list[str] | None = None,
    ) -> LatentDiffusionPipeline:
        """A pipeline of trained components.

        Args:
            codec: the tokenizer with its statistics.
            denoiser, conditioner: trained with `process` on the codec's latents.
            process: the diffusion process.
            image_size: height and width in pixels that `__call__` draws by default.
            dropped: what was dropped in training, see the class.
        """
        statistics = {}
        if codec.mean is not None and codec.std is not None:
            statistics = {"mean": codec.mean.tolist(), "std": codec.std.tolist()}
        about = describe_process(process)
        return cls(codec.tokenizer, denoiser, conditioner, process.scheduler(), about, statistics, *image_size, dropped)

    @property
    def codec(self) -> Codec:
        """The tokenizer with its statistics."""
        statistics = self.config["statistics"]
        mean, std = (torch.tensor(statistics[name]) if statistics else None for name in ("mean", "std"))
        return Codec(self.tokenizer, mean, std)

    @property
    def process(self) -> Flow | DDPM:
        """The diffusion process that the denoiser was trained with."""
        return build_process(**self.config["process"])

    @torch.no_grad()
    def __call__(
        self,
        *,
        negative_prompts: list[str] | None = None,
        records: Mapping[str, Any] | None = None,
        height: int | None = None,
        width: int | None = None,
        loss_guidance: LossGuidance | None = None,
        precision: Literal["auto", "bf16", "fp32"] = "auto",
        output_type: str = "pil",
        progress: bool = True,
        sample: Sample | None = None,
        callback: Watch | None = None,
        **inputs_and_settings: Any,
    ) -> ImagePipelineOutput:
        """Draw images. Image i is drawn from `seed + i`, whatever the batch.

        Inputs are those that the model was conditioned on in training; image i gets entry `i % len` of each list:

            classes: names or indices. None goes through all classes in turn.
            prompts: captions.
            layouts: for each image a list of (class, x0, y0, x1, y1), relative to the image.
            segmentations: maps of ids: arrays, images or paths.
            maps: other image-like maps, such as depth.
            low_resolution: images to enlarge.
            inpainting: pairs of an image and its mask, whose holes are white.

        Settings are those of a recipe's `sample`:

            count: how many images; default the length of the longest list.
            steps: sampling steps, default 50.
            guidance: scale of classifier-free guidance; 1, the default, is none.
            guidance_interval: noise levels at which guidance acts.
            guidance_channels: guide only the first k latent channels.
            channels: draw and decode only the first k latent channels, with a denoiser trained on prefixes of them.
            sampler: `euler`, `heun`, `dpm++`, `unipc` for any process; `ddim`, `ddpm`, `plms` for a ddpm process;
                `sde`, `dopri5` for a flow; or `auto`, which is `self.scheduler`.
            shift: flow: above 1 spends more steps near noise.
            eta: ddim: 0 is deterministic, 1 ancestral.
            last_step: sde: the time from which one step without noise follows.
            seed: of the first image.
            batch: images, or tiles of them, per forward pass.
            tile: side in latent positions: denoiser and decoder see overlapping tiles of this size, so that their
                memory does not grow with the image; for images beyond the size of training.
            tile_stride: from one tile to the next; by default half a tile.

        Args:
            negative_prompts: what guidance leads away from, instead of the empty caption.
            records: entries of records, as batches of training have them, instead of inputs.
            height, width: in pixels; default those of training.
            loss_guidance: pulls the images towards a target, which has a row for each image, or one for all.
            precision: `bf16` under autocast, `fp32`, or `auto`, which is what the device is fast at.
            output_type: `pil`; `np`, `(b, h, w, c)` in [0, 1]; `pt`, `(b, c, h, w)` in [-1, 1]; or `latent`, normalised
                latents `(b, c, *grid)`.
            progress: whether to show a bar.
            sample: a recipe's `sample` section; settings that are given beside it win.
            callback: called after each evaluation of the denoiser, as diffusers' `callback_on_step_end`, with the seeds
                of the images that are being drawn, how many evaluations they have seen, and the present estimate of
                their normalised latents `(b, c, *grid)`; see `latelier.previews.Previews`.

        Returns:
            The images, as `images`.

        Raises:
            LatelierError: for an unknown class, a size that the tokenizer's factor does not divide, or settings that
                this model cannot follow.
        """
        if output_type not in OUTPUTS:
            raise LatelierError(f"output_type = {output_type!r} is not known; allowed: {', '.join(OUTPUTS)}.")
        settings, inputs = _divide(inputs_and_settings, sample, records or {}, negative_prompts)
        dropped = self.config["dropped"]
        inputs = inputs.check(self.conditioner, settings.guidance, dropped)
        codec, process = self.codec, self.process
        codec.precision = precision
        size = (height or self.config["height"], width or self.config["width"])
        shape = codec.latent_shape(*size)
        if settings.channels is not None:
            if settings.channels > shape[0]:
                raise LatelierError(f"channels = {settings.channels} is not a prefix of {shape[0]} latent channels.")
            shape = (settings.channels, *shape[1:])
        device, drawn = self._execution_device, []
        denoiser = tiled(self.denoiser, settings.tile, settings.tile_stride, settings.batch)
        batches = range(settings.seed, settings.seed + settings.count, settings.batch)
        with self._bar(progress, len(batches)) as advance:
            for first in batches:
                seeds = list(range(first, min(first + settings.batch, batches.stop)))
                cond, uncond, record = inputs.conditions(
                    self.conditioner, seeds, settings.seed, size, codec, None if settings.guidance == 1 else dropped
                )
                predict = guided(
                    denoiser, cond, uncond, settings.guidance, settings.guidance_interval, settings.guidance_channels
                )
                if loss_guidance is not None:
                    predict = loss_guidance.rows([seed - settings.seed for seed in seeds]).guide(predict, process)
                if callback is not None:
                    predict = watched(predict, process, partial(callback, seeds))
                scheduler = self._scheduler(process, settings)
                with self._autocast(precision):
                    latents = sample_latents(predict, scheduler, shape, seeds, device, settings.eta, advance)
                finished = latents if output_type == "latent" else _decode(codec, latents, record, settings)
                drawn.append(finished.cpu())
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=_convert(torch.cat(drawn), output_type))

    def _scheduler(self, process: Flow | DDPM, settings: Sample) -> Scheduler:
        """A scheduler with its timesteps set: a copy of the pipeline's own, or the one that the settings name."""
        wanted = (settings.steps, settings.sampler, settings.shift, settings.eta, settings.last_step)
        named = process.scheduler(*wanted)  # refuses settings that do not fit, for the pipeline's own too
        if settings.sampler != "auto":
            return named
        own = type(self.scheduler).from_config(self.scheduler.config)
        process.set_timesteps(own, settings.steps, settings.shift)
        return own

    def _autocast(self, precision: str) -> AbstractContextManager:
        device = self._execution_device.type
        if precision == "bf16" or (precision == "auto" and fast_bf16(device)):
            return torch.autocast(device, torch.bfloat16)
        return nullcontext()

    @contextmanager
    def _bar(self, shown: bool, batches: int) -> Iterator[Callable[[int, int], None] | None]:
        """A bar over the denoiser's evaluations in all batches."""
        if not shown:
            yield None
            return
        with self.progress_bar(total=1) as bar:

            def advance(_: int, evaluations: int) -> None:
                bar.total = evaluations * batches
                bar.update(1)

            yield advance


def choose_settings(sample: Sample | None, settings: Mapping[str, Any]) -> Sample:
    """`sample`, or the defaults, under the settings that are not None; the first that is wrong becomes one sentence."""
    given = {name: value for name, value in settings.items() if value is not None}
    try:
        return Sample.model_validate({**(sample.model_dump() if sample else {}), **given})
    except ValidationError as error:
        raise LatelierError(first_problem(error)) from None


def _divide(
    options: Mapping[str, Any], sample: Sample | None, records: Mapping[str, Any], negative_prompts: list[str] | None
) -> tuple[Sample, Inputs]:
    """Checked settings of sampling, under those of `sample`, and the inputs; `classes` are both."""
    given = {name: value for name, value in options.items() if value is not None}
    settings = {name: value for name, value in given.items() if name in Sample.model_fields}
    chosen = choose_settings(sample, settings)
    wanted = {name: value for name, value in given.items() if name not in Sample.model_fields}
    for name, value in wanted.items():
        if not isinstance(value, list | tuple):
            raise LatelierError(
                f"{name} = {value!r} is neither a list of inputs nor a setting; settings are "
                f"{', '.join(Sample.model_fields)}."
            )
    if chosen.classes:
        wanted = {"classes": chosen.classes, **wanted}
    inputs = Inputs({name: list(value) for name, value in wanted.items() if value}, records, negative_prompts)
    if sample is None and "count" not in settings:
        chosen = chosen.model_copy(update={"count": len(inputs)})
    return chosen, inputs


def _decode(codec: Codec, latents: Tensor, record: Mapping[str, Any], settings: Sample) -> Float[Tensor, "b c h w"]:
    """Images of latents; where a record has holes, everything outside of them is the image that was given."""
    images = decode_within(codec, latents, settings.tile, settings.channels).clamp(-1, 1)  # (b, c, h, w)
    return compose(images, record["image"].to(images), record["hole"]) if "hole" in record else images


def _convert(images: Float[Tensor, "b c *grid"], output_type: str) -> Any:
    if output_type in ("latent", "pt"):
        return images
    array = ((images + 1) / 2).permute(0, 2, 3, 1).float().numpy()  # (b, h, w, c)
    if output_type == "np":
        return array
    if array.shape[-1] not in (1, 3):
        raise LatelierError(f"Images with {array.shape[-1]} channels are no PIL images; use output_type='np'.")
    return DiffusionPipeline.numpy_to_pil(array)
