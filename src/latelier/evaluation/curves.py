"""When a curve over images seen reaches a level."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

Curve = list[tuple[int, float]]  # (images seen, value), ascending


@dataclass
class Reached:
    """When a curve is at a level, in images seen."""

    images: float
    at_most: bool = False  # the first point was there already, so that it may have been sooner


def reach(curve: Curve, level: float, higher: bool = False, logarithmic: bool = False) -> Reached | None:
    """When the best value so far comes to a level; a curve may turn back by chance. None if it never does.

    Args:
        curve: what was measured.
        level: what it is to reach.
        higher: higher values are better.
        logarithmic: linear between points over the logarithm of images, not over images.
    """
    sign = -1 if higher else 1
    level, lowest = sign * level, list(accumulate((sign * y for _, y in curve), min))
    after = next((i for i, y in enumerate(lowest) if y <= level), None)
    if after is None or after == 0:
        return None if after is None else Reached(float(curve[0][0]), at_most=True)
    share = (lowest[after - 1] - level) / (lowest[after - 1] - lowest[after])
    scale, back = _scales(logarithmic)
    a, b = scale(curve[after - 1][0]), scale(curve[after][0])
    return Reached(back(a + share * (b - a)))


def _scales(logarithmic: bool) -> tuple[Callable[[float], float], Callable[[float], float]]:
    return (math.log, math.exp) if logarithmic else (float, float)
