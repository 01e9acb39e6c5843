"""The recipe's settings of structured latents: which prefixes of the channels are trained (DC-AE 1.5)."""

from __future__ import annotations

from pydantic import Field, model_validator

from latelier.errors import LatelierError
from latelier.recipe.base import Section


class Prefixes(Section):
    """How many of the first latent channels a training step uses: drawn anew for each step, uniform over a list."""

    first: int = Field(16, ge=1, description="the shortest prefix")
    step: int = Field(4, ge=1, description="from one length to the next; all channels are always in the list")
    lengths: list[int] | None = Field(None, description="the list itself, instead of `first` and `step`")
    draws: int = Field(1, ge=1, description="lengths drawn in a step; their losses are averaged")
    always_full: bool = Field(False, description="all channels in every step, besides those that are drawn")
    full_share: float = Field(
        0.0, ge=0, lt=1, description="of the draws, what share takes all channels before the list is asked"
    )
    per_process: bool = Field(False, description="each process draws its own lengths; false: all draw the same")

    @model_validator(mode="after")
    def _check(self) -> Prefixes:
        if self.lengths is not None and (not self.lengths or min(self.lengths) < 1):
            raise LatelierError(f"prefixes.lengths = {self.lengths}: give numbers of channels, such as [4, 8, 16].")
        return self

    def of(self, channels: int) -> list[int]:
        """The list for so many channels, ascending; the last is all of them.

        Raises:
            LatelierError: if a length is longer than there are channels, or all channels are the only length.
        """
        if self.lengths is None and self.first >= channels:
            raise LatelierError(f"prefixes.first = {self.first} leaves no prefix of {channels} channels; set it lower.")
        lengths = self.lengths or range(self.first, channels, self.step)
        if max(lengths, default=0) > channels:
            raise LatelierError(f"prefixes.lengths has {max(lengths)}, but the latents have only {channels} channels.")
        return sorted({*lengths, channels})
