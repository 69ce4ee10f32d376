"""How a convolution with its BatchNorm may run: the plan of one, and dataflows of whole networks.

A leaf beside _tensors.

A plan is written as a word and what is added to it:

- "fused": one kernel with prologue and epilogue forward, dgrad and wgrad likewise.
    "+masks": what emits keeps ReLU's mask in bits, which dgrad reads in place of the activation.
    "+merged": dgrad and wgrad are one kernel where dw fits on the chip.
    "+mma", "+wgmma", each without the two above: a 1x1 convolution forward and its dgrad by CUDA
    C++ of the backend "cuda" rather than by Triton, on tensor cores of compute capability 8.0 and
    later, or by the instructions that 9.0 alone has.
- "epilogue": on a materialised activation; statistics in the epilogue forward, mask and sums in
  that of dgrad; wgrad is the library's.
- "split": light passes around the library's convolutions.
"epilogue" and "split" may have
    "+keep": the materialised activation is kept for wgrad, not made again.
Ops add, where the reader of a gradient takes it so,
    "+compact": dgrad of a strided 1x1 gives the gradient of the pixels it reads and no others;
    "+unmasked": the gradient goes back as the library's dgrad left it, and who reads it masks it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

PRODUCTS = ("mma", "wgmma")  # of the backend "cuda"
_OPTIONS = {
    "fused": ("masks", "merged", *PRODUCTS, "compact"),
    "epilogue": ("keep", "compact"),
    "split": ("keep", "compact", "unmasked"),
}


class Plan(NamedTuple):
    """The plan of one convolution."""

    base: str  # "fused", "epilogue", "split"
    masks: bool = False
    merged: bool = False
    mma: bool = False
    wgmma: bool = False
    keep: bool = False
    compact: bool = False
    unmasked: bool = False

    @classmethod
    def of(cls, text: str) -> Plan:
        """The plan that is written so.

        Raises:
            ValueError: it is none.
        """
        return _parsed(text)

    @property
    def product(self) -> str:
        """Which of PRODUCTS it is of; "" where of none."""
        return next((name for name in PRODUCTS if getattr(self, name)), "")

    def __str__(self) -> str:
        chosen = (name for name in self._fields[1:] if getattr(self, name))
        return "+".join((self.base, *chosen))


@cache
def _parsed(text: str) -> Plan:
    base, *options = text.split("+")
    known = _OPTIONS.get(base, ())
    alone = set(options) & set(PRODUCTS)
    together = bool(alone) and len(set(options) - {"compact"}) > 1
    unknown = not known or len(set(options)) < len(options) or not set(options) <= set(known)
    if unknown or together:
        asked = {
            n: [o for o in options if o not in ("compact", "unmasked")]
            for n, options in _OPTIONS.items()
        }
        plans = "; ".join(f"{name!r} and {', '.join(found)}" for name, found in asked.items())
        raise ValueError(
            f"plan: got {text!r}, accepted: {plans}, joined by '+'; mma and wgmma each without "
            "another"
        )
    return Plan(base, **dict.fromkeys(options, True))


def base_of(plan: str) -> str:
    """The word that a plan begins with."""
    return plan.partition("+")[0]


def has(plan: str, option: str) -> bool:
    """Whether the option was added to the plan."""
    return option in plan.split("+")[1:]


def product_of(plan: str) -> str:
    """Which of PRODUCTS was added to the plan; "" where none was."""
    for name in PRODUCTS:
        if has(plan, name):
            return name
    return ""


def without(plan: str, option: str) -> str:
    """The plan less an option, if it has it."""
    return plan.replace(f"+{option}", "")


def is_plan(text: object) -> bool:
    """Whether a plan is written so that may be asked for, by a person or a table: what becomes of
    gradients is nobody's choice but that of who reads.
    """
    try:
        plan = Plan.of(text) if isinstance(text, str) else None
    except ValueError:
        return False
    return plan is not None and not (plan.compact or plan.unmasked)


@dataclass(frozen=True)
class Dataflow:
    """Plans for all of a network; those that the byte model (bench.roofline) has, by its names."""

    pointwise: str  # 1x1 convolutions
    spatial: str  # those with larger kernels
    stem: str  # the first one with its max pool, "fused" or "split"
    compact: bool = False  # strided shortcuts give no gradient for pixels that they do not read


DATAFLOWS = {
    "fused_1x1": Dataflow("fused", "split+keep", "split"),
    "compact": Dataflow("fused", "split+keep", "split", compact=True),
    "masks": Dataflow("fused+masks", "split+keep", "split", compact=True),
    "merged_1x1": Dataflow("fused+merged", "split+keep", "split"),
    "fused_3x3": Dataflow("fused", "fused", "split"),
    "fused_stem": Dataflow("fused", "fused", "fused"),
    "ideal": Dataflow("fused+masks", "fused", "fused"),
}
