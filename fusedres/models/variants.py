"""What networks of one depth differ in, and the checks of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from fusedres.nn.init import Initializer


@dataclass(frozen=True)
class Variant:
    """The details in which published ResNets differ."""

    stride_in_1x1: bool  # of a stage's first block: in its first 1x1, or in the 3x3
    eps: float
    momentum: float | None  # in torch's sense: the weight of the new batch
    stem_pool_padding: int
    initializer: Initializer


VARIANTS = {
    "torchvision": Variant(False, 1e-5, 0.1, 1, "kaiming_normal"),
    "keras": Variant(True, 1.001e-5, 0.01, 1, "glorot_uniform"),
    "coursera": Variant(True, 1e-3, 0.01, 0, "glorot_uniform"),
}


def details_of(owner: str, basic: bool, variant: str, overrides: dict[str, Any]) -> Variant:
    """The variant with overrides in place, checked."""
    if variant not in VARIANTS:
        accepted = ", ".join(map(repr, VARIANTS))
        raise ValueError(f"{owner}: variant: got {variant!r}, accepted: {accepted}")
    accepted_names = [f.name for f in fields(Variant)]
    for name in overrides:
        if name not in accepted_names:
            raise TypeError(
                f"{owner}: unknown argument {name!r}; overrides are {', '.join(accepted_names)}"
            )
    if basic and overrides.get("stride_in_1x1"):
        raise ValueError(f"{owner}: stride_in_1x1=True, but a basic block has no 1x1 convolution")
    details = replace(VARIANTS[variant], **overrides)
    if details.stem_pool_padding not in (0, 1):
        raise ValueError(
            f"{owner}: stem_pool_padding must be 0 or 1, got {details.stem_pool_padding!r}"
        )
    return details


def check_flags(owner: str, flags: Mapping[str, object]) -> None:
    """Plain bools."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{owner}: {name} must be a bool, got {flag!r}")


def check_counts(owner: str, counts: Mapping[str, object], least: int = 1) -> None:
    """Plain ints of at least 1 (0) that fit 31 bits."""
    kind = "a positive int" if least == 1 else "0 or a positive int"
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
            raise ValueError(f"{owner}: {name} must be {kind} below 2**31, got {value!r}")


def check_middle(
    owner: str, basic: bool, dilate: object, groups: int, width_per_group: int
) -> tuple[bool, bool, bool]:
    """What is said of the middle convolutions, against the blocks that there are; `dilate` as three
    bools.
    """
    check_counts(owner, {"groups": groups, "width_per_group": width_per_group})
    name = "replace_stride_with_dilation"
    accepted = "accepted: None, or three bools for layer2, layer3 and layer4"
    if dilate is None:
        dilate = (False, False, False)
    if not isinstance(dilate, tuple | list) or not all(isinstance(d, bool) for d in dilate):
        raise TypeError(f"{owner}: {name}: got {dilate!r}; {accepted}")
    if len(dilate) != 3:
        raise ValueError(f"{owner}: {name}: got {len(dilate)} of them; {accepted}")
    if basic:
        given = {"groups": (groups, 1), "width_per_group": (width_per_group, 64)}
        for key, (value, only) in given.items():
            if value != only:
                raise ValueError(
                    f"{owner}: {key} must be {only} in a network of basic blocks, got {value}; "
                    "those of bottlenecks, from resnet50 on, take others"
                )
        if any(dilate):
            raise ValueError(
                f"{owner}: {name}: got {dilate!r}, but basic blocks are not dilated; those of "
                "bottlenecks, from resnet50 on, are"
            )
    if middle_width(512, groups, width_per_group) >= 2**31:
        raise ValueError(
            f"{owner}: groups {groups} of width_per_group {width_per_group} make more channels "
            "than 2**31 in layer4; accepted: fewer"
        )
    return dilate[0], dilate[1], dilate[2]


def middle_width(planes: int, groups: int, width_per_group: int) -> int:
    """Channels of a bottleneck's middle convolution; width_per_group is of 64 planes."""
    return planes * width_per_group // 64 * groups
