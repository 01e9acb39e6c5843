"""The thing to ship: tokenizer, denoiser and conditioner in one `DiffusionPipeline` that saves and loads whole."""

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

from latelier import recipe
from latelier.conditioning import CONDITIONERS
from latelier.conditioning.asking import Asked
from latelier.conditioning.inpainting import compose
from latelier.denoisers import DENOISERS
from latelier.diffusion.guiding import Guide
from latelier.diffusion.process import DDPM, Flow, Scheduler, build_process
from latelier.diffusion.sampling import sample_latents
from latelier.diffusion.windows import windowed
from latelier.errors import LatelierError
from latelier.tokenizers import TOKENIZERS
from latelier.tokenizers.codec import Codec, fast_bf16
from latelier.tokenizers.tiling import decode_within

# diffusers opens a saved pipeline's components only from modules that are imported already.
for _place in (*TOKENIZERS.values(), *DENOISERS.values(), *CONDITIONERS.values(), "latelier.conditioning.composite:"):
    importlib.import_module(_place.split(":")[0])

OUTPUTS = ("pil", "pt", "np", "latent")
Watch: TypeAlias = Callable[[list[int], int, Tensor], None]  # seeds, evaluations done, estimate of the latents


class LatentDiffusionPipeline(DiffusionPipeline):
    """Draws images: noise, denoiser, tokenizer's decoder.

    `LatentDiffusionPipeline.build` makes one from parts, `save_pretrained` and `from_pretrained` keep it whole.

    Args:
        tokenizer: a diffusers-style autoencoder.
        denoiser: `forward(x_t, t, condition) -> prediction`.
        conditioner: makes conditions of what is asked for; None is an unconditional model.
        scheduler: the default sampler, used by `sampler="auto"`; any diffusers scheduler may be put in its place.
        process: the diffusion process, as a recipe's `denoiser.process`.
        statistics: `mean` and `std` of the latents, one number per channel; empty leaves latents as they are.
        height, width: default size of the images, in pixels.
        dropped: what the denoiser was sometimes not told in training, so that guidance can leave it out; by default
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
        process: recipe.Process,
        image_size: tuple[int, int],
        dropped: list[str] | None = None,
    ) -> LatentDiffusionPipeline:
        """A pipeline of trained parts.

        Args:
            codec: the tokenizer with its statistics.
            denoiser, conditioner: trained with `process` on the codec's latents.
            process: the recipe's `denoiser.process`.
            image_size: height and width in pixels that `__call__` draws by default.
            dropped: what was dropped in training, see the class.
        """
        statistics = {}
        if codec.mean is not None and codec.std is not None:
            statistics = {"mean": codec.mean.tolist(), "std": codec.std.tolist()}
        scheduler = build_process(process).scheduler(recipe.Sample())
        height, width = image_size
        about = process.model_dump()
        return cls(codec.tokenizer, denoiser, conditioner, scheduler, about, statistics, height, width, dropped)

    @property
    def codec(self) -> Codec:
        """The tokenizer with its statistics."""
        statistics = self.config["statistics"]
        mean, std = (torch.tensor(statistics[name]) if statistics else None for name in ("mean", "std"))
        return Codec(self.tokenizer, mean, std)

    @property
    def process(self) -> Flow | DDPM:
        """What the denoiser was trained with."""
        return build_process(recipe.Process(**self.config["process"]))

    @torch.no_grad()
    def __call__(
        self,
        classes: list[int | str] | None = None,
        prompts: list[str] | None = None,
        negative_prompts: list[str] | None = None,
        layouts: list[Any] | None = None,
        segmentations: list[Any] | None = None,
        maps: list[Any] | None = None,
        low_resolution: list[Any] | None = None,
        inpainting: list[Any] | None = None,
        records: Mapping[str, Any] | None = None,
        count: int | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int = 50,
        guidance: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_channels: int | None = None,
        channels: int | None = None,
        sampler: str = "auto",
        shift: float = 1.0,
        eta: float = 0.0,
        last_step: float = 0.04,
        seed: int = 0,
        batch: int = 64,
        window: int | None = None,
        stride: int | None = None,
        guide: Guide | None = None,
        precision: Literal["auto", "bf16", "fp32"] = "auto",
        output_type: str = "pil",
        progress: bool = True,
        sample: recipe.Sample | None = None,
        callback: Watch | None = None,
    ) -> ImagePipelineOutput:
        """Draw images. Image i is drawn from `seed + i`, whatever the batch.

        A model draws from what it was told in training. Image i gets entry `i % len` of each list.

        Args:
            classes: names or indices. None goes through all classes in turn.
            prompts: captions.
            negative_prompts: what guidance leads away from, instead of the empty caption.
            layouts: for each image a list of (class, x0, y0, x1, y1), relative to the image.
            segmentations: maps of ids: arrays, images or paths.
            maps: other image-like maps, such as depth.
            low_resolution: images to enlarge.
            inpainting: pairs of an image and its mask, whose holes are white.
            records: entries of records, as batches of training have them, instead of the lists above.
            count: how many images; default the length of the longest list.
            height, width: in pixels; default those of training.
            steps: sampling steps.
            guidance: scale of classifier-free guidance; 1 is none.
            guidance_interval: noise levels at which guidance acts.
            guidance_channels: guide only the first so many latent channels.
            channels: draw and decode only the first so many latent channels, with a denoiser that was trained on
                prefixes of them.
            sampler: `euler`, `heun`, `dpm++`, `unipc` for any process; `ddim`, `ddpm`, `plms` for a ddpm process;
                `sde`, `dopri5` for a flow; or `auto`, which is `self.scheduler`.
            shift: flow: above 1 spends more steps near noise.
            eta: ddim: 0 is deterministic, 1 ancestral.
            last_step: sde: the time from which one step without noise follows.
            seed: of the first image.
            batch: images, or windows of them, per forward pass.
            window: side in latent positions: the denoiser sees overlapping windows, and the decoder tiles, of this
                size, so that their memory does not grow with the image; for images beyond the size of training.
            stride: from one window to the next; by default half a window.
            guide: pulls the images towards a target while they are drawn; see `latelier.diffusion.guiding.Guide`,
                whose target has a row for each image, or one for all.
            precision: `bf16` under autocast, `fp32`, or `auto`, which is what the device is fast at.
            output_type: `pil`; `np`, `(b, h, w, c)` in [0, 1]; `pt`, `(b, c, h, w)` in [-1, 1]; or `latent`, normalised
                latents `(b, c, *grid)`.
            progress: whether to show a bar.
            sample: a recipe's `sample` section, instead of the settings of the same names above.
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
        given = {
            "classes": classes or (sample.classes if sample else None), "prompts": prompts, "layouts": layouts,
            "segmentations": segmentations, "maps": maps, "low_resolution": low_resolution, "inpainting": inpainting,
        }  # fmt: skip
        asked = Asked({k: list(v) for k, v in given.items() if v}, records or {}, negative_prompts)
        settings = sample or _settings(
            classes=classes, count=count if count is not None else len(asked), steps=steps, guidance=guidance,
            guidance_interval=guidance_interval, guidance_channels=guidance_channels, channels=channels,
            sampler=sampler, shift=shift, eta=eta, last_step=last_step, seed=seed, batch=batch, window=window,
            stride=stride,
        )  # fmt: skip
        dropped = self.config["dropped"]
        asked = asked.check(self.conditioner, settings.guidance, dropped)
        codec, process = self.codec, self.process
        codec.precision = precision
        size = (height or self.config["height"], width or self.config["width"])
        shape = codec.latent_shape(*size)
        if settings.channels is not None:
            if settings.channels > shape[0]:
                raise LatelierError(f"channels = {settings.channels} is not a prefix of {shape[0]} latent channels.")
            shape = (settings.channels, *shape[1:])
        device, drawn = self._execution_device, []
        denoiser = windowed(self.denoiser, settings.window, settings.stride, settings.batch)
        batches = range(settings.seed, settings.seed + settings.count, settings.batch)
        with self._bar(progress, len(batches)) as advance:
            for first in batches:
                seeds = list(range(first, min(first + settings.batch, batches.stop)))
                condition, null, record = asked.conditions(
                    self.conditioner, seeds, settings.seed, size, codec, settings.guidance, dropped
                )
                scheduler = self._scheduler(process, settings)
                with self._autocast(precision):
                    latents = sample_latents(
                        denoiser, process, settings, shape, condition, null, seeds, device, advance, scheduler,
                        guide and guide.of([seed - settings.seed for seed in seeds]),
                        callback and partial(callback, seeds),
                    )  # fmt: skip
                finished = latents if output_type == "latent" else _finish(codec, latents, record, settings)
                drawn.append(finished.cpu())
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=_convert(torch.cat(drawn), output_type))

    def _scheduler(self, process: Flow | DDPM, settings: recipe.Sample) -> Scheduler:
        """A scheduler with its timesteps set: a copy of the pipeline's own, or the one that the settings name."""
        named = process.scheduler(settings)  # refuses settings that do not fit, for the pipeline's own too
        if settings.sampler != "auto":
            return named
        own = type(self.scheduler).from_config(self.scheduler.config)
        process.set_timesteps(own, settings)
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


def _finish(
    codec: Codec, latents: Tensor, record: Mapping[str, Any], settings: recipe.Sample
) -> Float[Tensor, "b c h w"]:
    """Images of latents; where a record has holes, everything outside of them is the image that was given."""
    images = decode_within(codec, latents, settings.window, settings.channels).clamp(-1, 1)  # (b, c, h, w)
    return compose(images, record["image"].to(images), record["hole"]) if "hole" in record else images


def _settings(**values: Any) -> recipe.Sample:
    """Checked settings; the first that is wrong becomes one sentence."""
    try:
        return recipe.Sample(**values)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        key = ".".join(map(str, first["loc"]))
        raise LatelierError(f"{key} = {first['input']!r} is not allowed; it should be {message}.") from None


def _convert(images: Float[Tensor, "b c *grid"], output_type: str) -> Any:
    if output_type in ("latent", "pt"):
        return images
    array = ((images + 1) / 2).permute(0, 2, 3, 1).float().numpy()  # (b, h, w, c)
    if output_type == "np":
        return array
    if array.shape[-1] not in (1, 3):
        raise LatelierError(f"Images with {array.shape[-1]} channels are no PIL images; use output_type='np'.")
    return DiffusionPipeline.numpy_to_pil(array)
