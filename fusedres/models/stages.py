"""The stages of a network: how they are built, and which of their maps are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fusedres.models.variants import Variant, middle_width
from fusedres.nn import BasicBlock, ConvBlock, IdentityBlock, Stage

_DEPTHS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
_PLANES = (64, 128, 256, 512)


def build_stages(
    depth: int,
    channels: int,
    details: Variant,
    dilate: Sequence[bool],
    groups: int,
    width_per_group: int,
) -> Iterator[tuple[Stage, int, int]]:
    """Each stage, behind a stem of `channels` that makes the image 4 times smaller.

    Args:
        dilate: of the second to the fourth, whether it keeps the map's size and dilates its 3x3
            convolutions instead, all but the first, which sees the map of the stage before.

    Returns:
        (stage, channels that leave it, by which factor its map is smaller than the image).
    """
    common: dict[str, Any] = {
        "eps": details.eps,
        "momentum": details.momentum,
        "initializer": details.initializer,
    }
    reduction, dilation = 4, 1
    for i, (planes, blocks) in enumerate(zip(_PLANES, _DEPTHS[depth], strict=True)):
        stride, before = 1 if i == 0 else 2, dilation
        if i > 0 and dilate[i - 1]:
            stride, dilation = 1, 2 * dilation
        reduction *= stride
        if depth < 50:
            basic = [BasicBlock(channels, planes, stride, **common)]
            basic += [BasicBlock(planes, planes, **common) for _ in range(blocks - 1)]
            stage, channels = Stage(*basic), planes
        else:
            width = middle_width(planes, groups, width_per_group)
            filters = (width, width, 4 * planes)
            first = {**common, "groups": groups, "dilation": before}
            rest = {**common, "groups": groups, "dilation": dilation}
            projected = ConvBlock(
                channels, filters, 3, stride, stride_in_1x1=details.stride_in_1x1, **first
            )
            others = [IdentityBlock(4 * planes, filters, **rest) for _ in range(blocks - 1)]
            stage, channels = Stage(projected, *others), 4 * planes
        yield stage, channels, reduction


def maps_taken(indices: object, count: int) -> set[int]:
    """Which of `count` maps, from 0, the argument of forward_intermediates names."""
    accepted = f"accepted: None, an int from 1 to {count}, or ints from {-count} to {count - 1}"
    message = f"forward_intermediates: indices: got {indices!r}; {accepted}"
    if indices is None:
        return set(range(count))
    if isinstance(indices, int) and not isinstance(indices, bool):
        if not 1 <= indices <= count:
            raise ValueError(message)
        return set(range(count - indices, count))
    if not isinstance(indices, Sequence) or isinstance(indices, str):
        raise TypeError(message)
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in indices):
        raise TypeError(message)
    if len(indices) == 0 or not all(-count <= i < count for i in indices):
        raise ValueError(message)
    return {i % count for i in indices}
