"""Tokenizer, denoiser and conditioner in one `DiffusionPipeline` that draws images; previews while they are drawn.

From noise to a PNG one reads this file, `diffusion/sampling.py`, `cfg.py`, `process.py` and `schedulers.py`, a file of
`denoisers/`, `tokenizers/codec.py` and `images.py`.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from jaxtyping import Float
from pydantic import Field, ValidationError
from torch import Tensor

from latelier.conditioning import CONDITIONERS
from latelier.conditioning.inputs import Inputs
from latelier.denoisers import DENOISERS
from latelier.diffusion.autoguidance import Guide, open_guide
from latelier.diffusion.cfg import guided
from latelier.diffusion.loss_guidance import LossGuidance
from latelier.diffusion.process import DDPM, Flow, build_process, describe_process
from latelier.diffusion.sampling import sample_latents, watched
from latelier.diffusion.schedulers import ADAPTIVE, ReverseSDE, Scheduler
from latelier.diffusion.tiled import tiled
from latelier.errors import LatelierError, reading
from latelier.images import make_grid, save_png
from latelier.layers import fast_bf16
from latelier.recipe import Prefixes, Process, Recipe, Sample, Section, first_problem
from latelier.sections import Side, check_config, check_weights, open_model
from latelier.terminal import PATIENCE, Lines, is_screen
from latelier.tokenizers import TOKENIZERS
from latelier.tokenizers.codec import Codec, decode_within, refuse_damage
from latelier.tokenizers.statistics import read_statistics

# diffusers opens a saved pipeline's components only from modules that are imported already.
for _module in (*TOKENIZERS.values(), *DENOISERS.values(), *CONDITIONERS.values()):
    importlib.import_module(_module.split(":")[0])

COMPONENTS = ("tokenizer", "denoiser", "conditioner", "scheduler")
OUTPUTS = ("pil", "pt", "np", "latent")
SHOWN = 8  # images in a strip of previews: decoding is what they cost
LEAST = 4  # channels of a short prefix
Watch: TypeAlias = Callable[[list[int], int, Tensor], None]  # seeds, evaluations done, estimate of the latents


class _Settings(Section):
    """What a saved pipeline says beside its components."""

    process: Process
    statistics: dict[str, list[Any]]
    height: Side
    width: Side
    dropped: list[str]
    shift: Annotated[float, Field(gt=0)]
    norm: Literal["rms", "rms-both"] | None


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
        dropped: inputs that training dropped at times, so that guidance can leave them out; by default `classes`.
        shift: of the times that a flow's samplers visit, where a call does not say it.
    """

    _optional_components = ["conditioner"]  # noqa: RUF012
    model_cpu_offload_seq = "conditioner->denoiser->tokenizer"

    def __init__(
        self, tokenizer: ModelMixin, denoiser: ModelMixin, conditioner: ModelMixin | None, scheduler: Scheduler,
        process: dict[str, Any] | None = None, statistics: dict[str, list[Any]] | None = None, height: int = 64,
        width: int = 64, dropped: list[str] | None = None, norm: str | None = None, shift: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        self.register_modules(tokenizer=tokenizer, denoiser=denoiser, conditioner=conditioner, scheduler=scheduler)
        dropped = ["classes"] if dropped is None else dropped
        about = {"process": process or {}, "statistics": statistics or {}, "dropped": dropped, "norm": norm}
        self.register_to_config(**about, height=height, width=width, shift=shift)
        self._guide: tuple[str, Guide] | None = None  # the last one, by its folder

    @classmethod
    def build(
        cls, codec: Codec, denoiser: ModelMixin, conditioner: ModelMixin | None, process: Flow | DDPM,
        image_size: tuple[int, int], dropped: list[str] | None = None, shift: float = 1.0,
    ) -> LatentDiffusionPipeline:  # fmt: skip
        """A pipeline of a codec, with its statistics, and what was trained with `process` on its latents.

        `image_size` is the height and width in pixels that `__call__` draws by default, `shift` that of its samplers.
        """
        mean, std, about = codec.mean, codec.std, describe_process(process)
        statistics = {} if mean is None or std is None else {"mean": mean.tolist(), "std": std.tolist()}
        scheduler, rest = process.scheduler(), (*image_size, dropped, codec.norm, shift)
        return cls(codec.tokenizer, denoiser, conditioner, scheduler, about, statistics, *rest)

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> LatentDiffusionPipeline:  # type: ignore[override]
        """Open a saved pipeline; `options` are those of diffusers. Whatever is wrong with it is a `LatelierError`.

        Nothing of the folder is run: components are models and schedulers of modules that are imported already.
        """
        refuse_damage(Path(path))
        advice = "take a folder that `latelier run` or `save_pretrained` has written, or write it anew"
        with reading(f"No pipeline can be opened at {path}", advice):
            folder = Path(path) if Path(path).is_dir() else Path(cls.download(str(path), **options))
            index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
            check_config(index)
            if not isinstance(index["_class_name"], str):  # a list would name a file of code
                raise LatelierError("its model_index.json names no class")
            opened: dict[str, Any] = {}
            for name in (name for name in COMPONENTS if name not in options and index[name] != [None, None]):
                module, class_name = index[name]
                component = getattr(sys.modules[module], class_name)
                if not issubclass(component, ModelMixin | SchedulerMixin):
                    raise LatelierError(f"its {name} is a {module}.{class_name}, which is no model")
                check_config(component.load_config(folder / name))
                if name in COMPONENTS[:2] and not options:  # conditioners may have frozen networks, not stored
                    opened[name] = open_model(component, folder / name)
            pipeline = super().from_pretrained(str(folder), **opened, **options)
            pipeline._check()
        return pipeline

    def _check(self) -> None:
        """Refuse settings with which nothing could be drawn."""
        try:
            settings = _Settings.model_validate({name: self.config[name] for name in _Settings.model_fields})
        except ValidationError as error:
            raise LatelierError(first_problem(error).rstrip(".")) from None
        build_process(**settings.process.model_dump())
        codec = Codec(self.tokenizer)
        shape = codec.latent_shape(settings.height, settings.width)
        if settings.statistics:
            read_statistics(settings.statistics, shape)
        if self.conditioner is not None:
            check_weights(self.conditioner)

    @property
    def codec(self) -> Codec:
        """The tokenizer with its statistics."""
        statistics = self.config["statistics"]
        mean, std = (torch.tensor(statistics[name]) if statistics else None for name in ("mean", "std"))
        return Codec(self.tokenizer, mean, std, norm=self.config["norm"])

    @property
    def process(self) -> Flow | DDPM:
        """The diffusion process that the denoiser was trained with."""
        return build_process(**self.config["process"])

    @torch.no_grad()
    def __call__(
        self, *, negative_prompts: list[str] | None = None, records: Mapping[str, Any] | None = None,
        height: int | None = None, width: int | None = None, loss_guidance: LossGuidance | None = None,
        precision: Literal["auto", "bf16", "fp32"] = "auto", output_type: str = "pil", progress: bool = True,
        sample: Sample | None = None, callback: Watch | None = None, **inputs_and_settings: Any,
    ) -> ImagePipelineOutput:  # fmt: skip
        """Draw images. Image i is drawn from `seed + i`, whatever the batch.

        Inputs are those that the model was conditioned on in training; image i gets entry `i % len` of each list:

            classes: names or indices. None goes through all classes in turn.
            prompts: captions.
            layouts: for each image a list of (class, x0, y0, x1, y1), relative to the image.
            segmentations: maps of ids: arrays, images or paths.
            maps: other image-like maps, such as depth.
            low_resolution: images to enlarge.
            inpainting: pairs of an image and its mask, whose holes are white.

        Settings are those of a recipe's `sample`: `steps` (50), `guidance` (1 is none), `guidance_interval`,
        `guidance_channels`, `guide`, `channels`, `shift`, `eta`, `last_step`, `seed`, `tile_stride`, see
        `recipe.Sample`, and

            count: how many images; default the length of the longest list.
            sampler: `euler`, `heun`, `dpm++`, `unipc` for any process; `ddim`, `ddpm`, `plms` for a ddpm process;
                `sde`, `dopri5` for a flow; or `auto`, which is `self.scheduler`.
            batch: images, or tiles of them, per forward pass.
            tile: side in latent positions: denoiser and decoder see overlapping tiles of this size, so that their
                memory does not grow with the image; for images beyond the size of training.

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
                their normalised latents `(b, c, *grid)`; see `latelier.pipeline.Previews`.
        """
        if output_type not in OUTPUTS:
            raise LatelierError(f"output_type = {output_type!r} is not known; allowed: {', '.join(OUTPUTS)}.")
        settings, inputs = _divide(inputs_and_settings, sample, records or {}, negative_prompts)
        dropped = self.config["dropped"]
        guide = None if settings.guide is None or settings.guidance == 1 else self._open_guide(settings.guide)
        if guide is not None and negative_prompts:
            raise LatelierError("negative_prompts and guide both say what guidance leads away from; leave one out.")
        inputs = inputs.check(self.conditioner, 1.0 if guide else settings.guidance, dropped)
        codec, process = self.codec, self.process
        codec.precision = precision
        size = (self.config["height"] if height is None else height, self.config["width"] if width is None else width)
        shape = codec.latent_shape(*size)
        if settings.channels is not None:
            if settings.channels > shape[0]:
                raise LatelierError(f"channels = {settings.channels} is not a prefix of {shape[0]} latent channels.")
            shape = (settings.channels, *shape[1:])
        device, drawn = self._execution_device, []
        tiles = (settings.tile, settings.tile_stride, settings.batch)
        denoiser = tiled(self.denoiser, *tiles)
        batches = range(settings.seed, settings.seed + settings.count, settings.batch)
        with self._bar(progress, len(batches)) as advance:
            for first in batches:
                seeds = list(range(first, min(first + settings.batch, batches.stop)))
                asked = (seeds, settings.seed, size, codec)
                leaves_out = None if guide or settings.guidance == 1 else dropped
                cond, uncond, record = inputs.conditions(self.conditioner, *asked, leaves_out)
                weak = None
                if guide is not None:
                    told, _, _ = inputs.conditions(guide.conditioner, *asked, None)
                    weak = partial(tiled(guide.denoiser, *tiles), condition=told)
                how = (settings.guidance, settings.guidance_interval, settings.guidance_channels)
                predict = guided(denoiser, cond, uncond, *how, weak)
                if loss_guidance is not None:
                    predict = loss_guidance.rows([seed - settings.seed for seed in seeds]).guide(predict, process)
                if callback is not None:
                    predict = watched(predict, process, partial(callback, seeds))
                scheduler = self._scheduler(process, settings)
                with self._autocast(precision):
                    latents = sample_latents(predict, scheduler, shape, seeds, device, settings.eta, advance)
                if not bool(latents.isfinite().all()):
                    raise LatelierError("The images came out as numbers that are not finite; the model is damaged.")
                finished = latents if output_type == "latent" else _decode(codec, latents, record, settings)
                drawn.append(finished.cpu())
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=_convert(torch.cat(drawn), output_type))

    def _scheduler(self, process: Flow | DDPM, settings: Sample) -> Scheduler:
        """A scheduler with its timesteps set: a copy of the pipeline's own, or the one that the settings name."""
        shift = self.sampling_shift(settings)
        wanted = (settings.steps, settings.sampler, shift, settings.eta, settings.last_step)
        named = process.scheduler(*wanted)  # refuses settings that do not fit, for the pipeline's own too
        if settings.sampler != "auto":
            return named
        _check_scheduler(self.scheduler, process)
        own = type(self.scheduler).from_config(self.scheduler.config)
        process.set_timesteps(own, settings.steps, shift)
        return own

    def sampling_shift(self, settings: Sample) -> float:
        """The shift of the times that samplers visit: that of the settings, or else the pipeline's."""
        return self.config["shift"] if settings.shift is None else settings.shift

    def _open_guide(self, name: str) -> Guide:
        """The weaker model of a folder, opened once."""
        if self._guide is None or self._guide[0] != name:
            self._guide = name, open_guide(name, self)
        return self._guide[1]

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
        how = ("sampling", 1, 0, PATIENCE, "evaluations")
        with self.progress_bar(total=1) if is_screen() else nullcontext(Lines(*how)) as bar:

            def advance(_: int, evaluations: int) -> None:
                bar.total = evaluations * batches
                bar.update(1)

            yield advance


def _check_scheduler(scheduler: Scheduler, process: Flow | DDPM) -> None:
    """Refuse a scheduler, put in place by a user, of another process: it would draw, but no images."""
    name, config, flow = type(scheduler).__name__, scheduler.config, isinstance(process, Flow)
    for_flows = name.startswith("FlowMatch") or isinstance(scheduler, ReverseSDE) or config.get("use_flow_sigmas")
    predicts = "flow_prediction" if flow else process.scheduler().config["prediction_type"]
    fits = bool(for_flows) == flow and config.get("prediction_type", predicts) == predicts
    if isinstance(process, DDPM):
        levels, own = getattr(scheduler, "alphas_cumprod", torch.zeros(0)), process.alphas_cumprod
        fits &= len(levels) == len(own) and torch.allclose(levels.cpu(), own)
    if not fits:
        kind = "flow" if flow else f"ddpm, with its own noise levels and a prediction of {predicts}"
        advice = "FlowMatchEulerDiscreteScheduler()" if flow else "DDIMScheduler.from_config(pipeline.scheduler.config)"
        raise LatelierError(f"pipeline.scheduler = {name} is of another process than this model: {kind}; use {advice}.")


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
    return torch.where(record["hole"] > 0.5, images, record["image"].to(images)) if "hole" in record else images


def _convert(images: Float[Tensor, "b c *grid"], output_type: str) -> Any:
    if output_type in ("latent", "pt"):
        return images
    array = ((images + 1) / 2).permute(0, 2, 3, 1).float().numpy()  # (b, h, w, c)
    if output_type == "np":
        return array
    if array.shape[-1] not in (1, 3):
        raise LatelierError(f"Images with {array.shape[-1]} channels are no PIL images; use output_type='np'.")
    return DiffusionPipeline.numpy_to_pil(array)


class Previews:
    """The `callback` of a pipeline that writes strips of images while they are drawn.

    After each evaluation a prediction means an estimate of z, such as x_t - t v for a flow's velocity v. Of the first
    images of the first batch, `step-005.png` shows what five evaluations of the denoiser say they will be. Where
    latents are structured (DC-AE 1.5) the first channels hold the large shapes, which are settled first, and any
    prefix of the channels decodes; so a preview takes a short one.

    Args:
        codec: of the pipeline.
        folder: where the strips go; strips of earlier calls there are removed.
        every: evaluations from one strip to the next.
        channels: decode only the first k latent channels, or all.
        tile: decode in tiles of this side, in latent positions, see `decode_within`.
    """

    def __init__(self, codec: Codec, folder: Path, every: int, channels: int | None = None, tile: int | None = None):
        self.codec, self.folder, self.every, self.channels, self.tile = codec, folder, every, channels, tile
        self._seeds: list[int] | None = None
        self._strips: list[Tensor] = []
        for old in (*folder.glob("step-*.png"), folder / "strip.png"):
            old.unlink(missing_ok=True)

    def __call__(self, seeds: list[int], done: int, estimate: Float[Tensor, "b c *grid"]) -> None:
        """Write a strip if it is due."""
        self._seeds = self._seeds or seeds
        if seeds != self._seeds or done % self.every:
            return
        length = min(self.channels or estimate.shape[1], estimate.shape[1])
        shown = None if length == self.codec.channels else length  # None decodes all
        images = decode_within(self.codec, estimate[:SHOWN], self.tile, shown).clamp(-1, 1)
        self._strips.append(images.cpu())  # (b, c, h, w)
        save_png(make_grid(images, columns=SHOWN), self.folder / f"step-{done:03d}.png")

    def save_strips(self) -> Path:
        """All strips below each other, the earliest on top, as `strip.png`; an error if the sampler ended before."""
        if not self._strips:
            raise LatelierError(f"There is no preview: the images took fewer than {self.every} evaluations.")
        return save_png(make_grid(torch.cat(self._strips), len(self._strips[0])), self.folder / "strip.png")


def short_prefix(prefixes: Prefixes, channels: int) -> int:
    """How many channels a preview of structured latents decodes: a quarter, at least four, and no untrained prefix."""
    return min(channels, max(LEAST, channels // 4, prefixes.of(channels)[0]))


def shown_lengths(prefixes: Prefixes, channels: int) -> list[int]:
    """Lengths that are shown while a denoiser learns prefixes: the shortest, a quarter, a half and all channels."""
    shortest = prefixes.of(channels)[0]
    return sorted({max(shortest, length) for length in (shortest, channels // 4, channels // 2, channels)})


def make_previews(
    pipeline: LatentDiffusionPipeline, recipe: Recipe | None, sample: Sample, folder: Path, every: int,
    channels: int | None = None,
) -> Previews:  # fmt: skip
    """Previews for one call of a run's pipeline; for the arguments see `Previews`.

    `recipe`, of the run, says whether the tokenizer was trained on prefixes of its channels: of such latents,
    `short_prefix` is decoded by default, all channels of others.
    """
    if every < 1 or (every > sample.steps and sample.sampler != ADAPTIVE):
        raise LatelierError(
            f"A preview every {every} steps does not go with {sample.steps} steps; choose 1 to {sample.steps}."
        )
    codec, prefixes = pipeline.codec, getattr(recipe and recipe.tokenizer, "prefixes", None)
    if channels is not None and not 0 < channels <= codec.channels:
        raise LatelierError(f"Previews of {channels} channels: choose 1 to {codec.channels}, which the latents have.")
    if channels is None and prefixes is not None:
        channels = short_prefix(prefixes, codec.channels)
    return Previews(codec, folder, every, channels, sample.tile)
