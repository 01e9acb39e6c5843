"""Trained tokenizers: our own folders, and diffusers' autoencoders."""

from __future__ import annotations

from typing import Literal

from latelier.sections import Kind


class PretrainedSection(Kind):
    """A trained tokenizer: one of our folders, or any diffusers autoencoder by Hub name."""

    kind: Literal["pretrained"]
    path: str
    subfolder: str | None = None


SECTIONS, MODELS = (PretrainedSection,), ()
