"""Which part of a picture is looked at: its middle, or one drawn at random."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

AREA = (0.08, 1.0)  # of the picture
RATIO = (3 / 4, 4 / 3)  # of width to height
TRIES = 10
DRAWS = 2 * TRIES + 3  # numbers from 0 to 1 that a crop is made of


class Box(NamedTuple):
    """A part of a picture, as shares of its width and height, and whether it is mirrored."""

    left: float
    top: float
    right: float
    bottom: float
    mirrored: bool = False


def middle(size: tuple[int, int], wanted: tuple[int, int], share: float = 1.0) -> Box:
    """The largest part around the middle that has the shape of what is wanted, or a share of it.

    Args:
        size, wanted: (H, W).
        share: of its sides, above 0 up to 1.
    """
    (height, width), (wanted_height, wanted_width) = size, wanted
    scale = share * min(height / wanted_height, width / wanted_width)
    return _around(0.5, 0.5, wanted_width * scale / width, wanted_height * scale / height)


def random_box(size: tuple[int, int], draws: Sequence[float]) -> Box:
    """A part of random area, shape and place, mirrored every other time.

    Args:
        size: (H, W).
        draws: DRAWS numbers, evenly distributed from 0 to 1.

    Source: Szegedy et al., "Going Deeper with Convolutions", 2014, with the areas and shapes that
    are in use for ImageNet; where no try fits into the picture, the largest part around its middle
    of a shape that is allowed.
    """
    height, width = size
    x, y, mirror = draws[2 * TRIES :]
    low, high = (math.log(r) for r in RATIO)
    for i in range(TRIES):
        area = (AREA[0] + (AREA[1] - AREA[0]) * draws[2 * i]) * height * width
        ratio = math.exp(low + (high - low) * draws[2 * i + 1])
        w, h = math.sqrt(area * ratio) / width, math.sqrt(area / ratio) / height
        if w <= 1 and h <= 1:
            left, top = x * (1 - w), y * (1 - h)
            return Box(left, top, left + w, top + h, mirror < 0.5)
    ratio = min(max(width / height, RATIO[0]), RATIO[1]) * height / width
    box = _around(0.5, 0.5, min(1.0, ratio), min(1.0, 1 / ratio))
    return box._replace(mirrored=mirror < 0.5)


def _around(x: float, y: float, width: float, height: float) -> Box:
    return Box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)
