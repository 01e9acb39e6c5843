"""Training that ends where images are reconstructed well enough, so that tokenizers compare at equal reconstruction."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn

from latelier.data.loader import ImageDataset
from latelier.data.transforms import to_float
from latelier.errors import LatelierError
from latelier.evaluation.reconstruction import psnr
from latelier.evaluation.results import agreed
from latelier.images import to_uint8
from latelier.terminal import say
from latelier.tokenizers.codec import Codec
from latelier.training import checkpoint
from latelier.training.runtime import keep_random, passes

IMAGES = 256  # held-out ones, always the same
SHARE, LEAST = 50, 10 * IMAGES  # a look costs a forward pass of 256 images: every 2 % of training, not oftener


class PsnrGoal:
    """Looks at the averaged weights now and then: mean PSNR of held-out images, nothing masked, posterior mean.

    When it looks depends on the images seen alone, and it draws no random number, so that a resumed training ends where
    an uninterrupted one does.

    Args:
        accelerator: the main process looks, all learn what it saw.
        until: dB at which training ends; None never looks, and needs no images.
        held_out: the images, in the size of the training.
        images: of the whole training; after the last one it looks, too.
        batch: images per step.
        every: images from one look to the next; 0 is 2 % of the training, at least 2,560.
        precision, norm: of `Codec`.

    Attributes:
        psnr: dB at the last look; None before.
        reached: whether that is enough.
    """

    def __init__(
        self, accelerator: Accelerator, until: float | None, held_out: ImageDataset | None, images: int, batch: int,
        every: int = 0, precision: str = "fp32", norm: str | None = None,
    ):  # fmt: skip
        self.accelerator, self.until, self.images, self.batch = accelerator, until, images, batch
        self.every, self.precision, self.norm = every or max(images // SHARE, LEAST), precision, norm
        self.psnr: float | None = None
        self._images = []
        if held_out is not None and accelerator.is_main_process:
            with keep_random(accelerator.device):
                batches = held_out.once(min(IMAGES, batch), limit=IMAGES)
                self._images = [to_uint8(batch["image"]) for batch in batches]  # (b, c, h, w) each
            if not self._images:
                raise LatelierError("tokenizer.until_psnr is measured on held-out images, but there are none.")

    @property
    def reached(self) -> bool:
        """Whether training ends here."""
        return self.until is not None and self.psnr is not None and self.psnr >= self.until

    def check(self, images: int, objective: nn.Module, ema: EMAModel | None) -> dict[str, float]:
        """Look, if it is time to after `images` images; what was measured, for the log."""
        due = images >= self.images or passes(images, self.batch, self.every)
        if self.until is None or not images or not due:
            return {}
        found = self._measure(objective, ema) if self.accelerator.is_main_process else 0.0
        self.psnr = agreed(found, shared=True)
        return {"psnr": self.psnr}

    @torch.no_grad()
    def _measure(self, objective: nn.Module, ema: EMAModel | None) -> float:
        whole = self.accelerator.unwrap_model(objective)
        codec = Codec(whole.tokenizer, precision=self.precision, norm=self.norm)
        found = []
        with checkpoint.averaged(whole, ema, whole.tokenizer):
            for pixels in self._images:
                images = to_float(pixels).to(self.accelerator.device)  # (b, c, h, w)
                found.append(psnr(codec.decode(codec.encode(images)).clamp(-1, 1), images))  # (b,)
        return torch.cat(found).double().mean().item()

    def tell(self, phase: str, images: int) -> None:
        """How the phase ended, in a sentence."""
        if self.psnr is not None and self.accelerator.is_main_process:
            words = "reached" if self.reached else "did not reach"
            at = f"{self.psnr:.2f} dB on {sum(map(len, self._images))} held-out images"
            say(f"{phase} {words} until_psnr = {self.until:g} after {images:,} images: {at}.")
