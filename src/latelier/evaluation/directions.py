"""Whether lower or higher values of a metric are better, by its name."""

from __future__ import annotations

from typing import Literal, cast

from latelier.evaluation.report_metrics import BETTER

Better = Literal["lower", "higher"]

DIRECTIONS: dict[str, str] = {
    **BETTER, "within": "lower", "separation": "higher", "smoothness-psnr": "higher", "smoothness-lpips": "lower",
    "smoothness-rfd": "lower", "prefix-psnr": "higher", "prefix-lpips": "lower", "prefix-rfd": "lower",
    "gflop": "lower", "parameters": "lower", "size-mib": "lower", "memory-gb": "lower",
}  # fmt: skip
SAMPLING_SPEED = "samples-per-second"  # this and gfd-<features> are measured @ numbers of sampling steps
OF_FEATURES = ("rfd", "gfd", "kid", "cmmd", "smoothness-rfd", "prefix-rfd")  # names with an extractor: rfd-vgg16
ARROWS = {"lower": " ↓", "higher": " ↑", None: ""}


def better(name: str) -> Better | None:
    """Whether lower or higher values of a metric are better; None if nothing is known of it."""
    name = name.partition("@")[0]
    if name.endswith(("images-per-second", SAMPLING_SPEED)):
        return "higher"
    parts = name.split("-")
    prefixes = ("-".join(parts[:i]) for i in range(len(parts), 0, -1))  # the longest known one counts
    return cast("Better | None", next((DIRECTIONS[prefix] for prefix in prefixes if prefix in DIRECTIONS), None))


def plain(name: str) -> str:
    """A metric's name without its extractor: `rfd-vgg16` is `rfd`, `gfd-vgg16@50` is `gfd@50`."""
    name, at, steps = name.partition("@")
    return next((prefix for prefix in OF_FEATURES if name.startswith(f"{prefix}-")), name) + at + steps


def heading(name: str) -> str:
    """A metric's name with an arrow in its better direction."""
    return f"{name}{ARROWS[better(name)]}"
