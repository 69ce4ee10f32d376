"""Calls for the fuzzers: right ones at small sizes, and ways to replace an argument.

A plan is a number, which sets sizes, dtype and layout, and up to three replacements: an argument
and a way. Hypothesis draws no more than that: tensors follow from the plan, the same ones where it
is built twice, a draw costs less than a call, and what fails shrinks to what matters.

Values lie on a coarse grid: convolutions of them are exact in every dtype, so that no two ways of
computing differ by which side of zero a ReLU's input falls on, and max pools have ties.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import hypothesis
import torch
from fuzz_ways import replaced, ways
from hypothesis import HealthCheck, Phase, strategies
from torch import Tensor

from fusedres._conv import Conv, output_shape
from fusedres._tensors import stat_dtype
from fusedres.testing import CHANNELS_LAST, CONTIGUOUS, FLOOR


class Replacement(NamedTuple):
    """Of one argument of a call."""

    argument: str
    way: str


class Plan(NamedTuple):
    """What Hypothesis draws of a call."""

    setting: int
    replaced: tuple[Replacement, ...]

    def replaces(self, *arguments: str) -> bool:
        """Whether one of them is replaced."""
        return any(r.argument in arguments for r in self.replaced)

    def puts(self, *words: str) -> bool:
        """Whether a way with one of these words is taken."""
        return any(word in r.way.lower() for word in words for r in self.replaced)

    def scales_by_inf(self) -> bool:
        """Whether an infinity is put where it multiplies: of 0, or of what is only next to it."""
        activations = ("x", "y", "g", "a", "grad", "residual", "input", "input.y")
        plain = tuple(r for r in self.replaced if r.argument not in activations)
        return Plan(0, plain).puts("inf")


# --- settings -------------------------------------------------------------------------------------

# [N, C, H, W]: one image, one channel, maps of one pixel, an empty batch, vectors with a rest, and
# one that is shared out among threads
SHAPES = [
    (2, 3, 5, 7),
    (1, 1, 2, 2),
    (3, 8, 8, 5),
    (2, 16, 2, 7),
    (1, 16, 8, 7),
    (2, 5, 1, 1),
    (3, 1, 5, 2),
    (0, 3, 5, 5),
    (2, 19, 5, 6),
    (2, 40, 15, 14),
]
# kernel, stride, padding, dilation; "groups": one a channel. Each fits a map of one pixel.
CONVOLUTIONS: list[tuple[tuple[int, int], Any, Any, int]] = [
    ((1, 1), 1, 0, 1),
    ((3, 3), 2, 1, 1),
    ((2, 3), 1, (0, 1, 1, 1), 1),
    ((3, 3), (1, 2), 2, 2),
    ((1, 1), 2, 0, 1),
    ((1, 3), (2, 1), (0, 1), 1),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@dataclass(frozen=True)
class Setting:
    """Sizes and options of a call; makes its tensors."""

    dtype: torch.dtype
    layout: torch.memory_format
    shape: tuple[int, int, int, int]
    kernel: tuple[int, int]
    conv: Conv
    filters: int
    training: bool
    relu: bool
    tracked: bool  # there are running statistics
    mixed: bool  # autocast, where it is looked at; parameters of another dtype
    seed: int

    def generator(self, salt: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 64 + salt)

    def grid(self, shape: Sequence[int], salt: int, dtype: torch.dtype) -> Tensor:
        """Integers from -2 to 2."""
        values = torch.randint(-2, 3, tuple(shape), generator=self.generator(salt))
        return values.to(dtype)

    def full(self, salt: int, shape: Sequence[int] | None = None) -> Tensor:
        """[N, C, H, W] in the dtype and layout."""
        values = self.grid(self.shape if shape is None else shape, salt, self.dtype)
        return values.contiguous(memory_format=self.layout) if values.dim() == 4 else values

    def vector(self, salt: int, low: float = -0.75, count: int | None = None) -> Tensor:
        """[C], from low in steps of a half, none of them 0, in the dtype of statistics."""
        count = self.shape[1] if count is None else count
        steps = torch.randint(0, 4, (count,), generator=self.generator(salt))
        return (steps * 0.5 + low).to(stat_dtype(self.dtype))

    def running(self, salt: int, shape: Sequence[int]) -> list[Tensor | None]:
        """running_mean and running_var of a BatchNorm's input of this shape."""
        if not self.tracked and self.trains_on(shape):
            return [None, None]
        return [self.vector(salt, count=shape[1]), self.vector(salt + 1, 0.5, shape[1])]

    def weight(self, salt: int) -> Tensor:
        """[K, C / groups, R, S] of the convolution."""
        shape = (self.filters, self.shape[1] // self.conv.groups, *self.kernel)
        return self.full(salt, shape)

    @property
    def out(self) -> tuple[int, int, int, int]:
        """[N, K, OH, OW] of the convolution."""
        return output_shape(self.shape, torch.Size((self.filters, 1, *self.kernel)), self.conv)

    def in_blocks(self) -> Setting:
        """A 1x1 convolution of channels in blocks, as the CPU multiplies them."""
        shape = (self.shape[0], 32, *self.shape[2:])
        conv = Conv((1, 1), (0, 0, 0, 0), (1, 1), 1)
        dtype = torch.float32 if self.dtype == torch.float64 else self.dtype
        return replace(
            self, dtype=dtype, layout=CHANNELS_LAST, shape=shape, kernel=(1, 1), conv=conv,
            filters=64,
        )  # fmt: skip

    def in_tiles(self) -> Setting:
        """A 1x1 convolution of channels in tiles, as a GPU's tensor cores multiply them."""
        s = self.in_blocks()
        dtype = torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float16
        return replace(s, dtype=dtype, shape=(s.shape[0], 64, *s.shape[2:]))

    def trains_on(self, shape: Sequence[int]) -> bool:
        """One value per channel cannot."""
        return self.training and shape[0] * shape[2] * shape[3] != 1


def _four(padding: Any) -> tuple[int, int, int, int]:
    if isinstance(padding, int):
        return (padding,) * 4
    return padding if len(padding) == 4 else (*(padding[0],) * 2, *(padding[1],) * 2)


def _two(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def setting(number: int, interpreted: bool = False) -> Setting:
    """The setting of a number below SETTINGS; 0 is the simplest.

    Triton's interpreter is slow, wrong in bf16, and its kernels read channels_last only.
    """
    seed = number
    dtypes, layouts, shapes = DTYPES, [CHANNELS_LAST, CONTIGUOUS], SHAPES
    if interpreted:
        dtypes, layouts, shapes = dtypes[:2], layouts[:1], shapes[:-1]

    def take(count: int) -> int:
        nonlocal number
        number, digit = divmod(number, count)
        return digit

    dtype = dtypes[take(3) % len(dtypes)]
    layout = layouts[take(2) % len(layouts)]
    shape = shapes[take(len(SHAPES)) % len(shapes)]
    kernel, stride, padding, dilation = CONVOLUTIONS[take(len(CONVOLUTIONS))]
    grouped, other, no_relu, untracked, mixed = (take(n) for n in (4, 3, 3, 3, 4))
    groups = shape[1] if grouped == 3 else 1
    conv = Conv(_two(stride), _four(padding), (dilation, dilation), groups)
    filters = 2 * groups if groups > 1 else 5
    return Setting(
        dtype, layout, shape, kernel, conv, filters, other < 2, no_relu < 2, untracked < 2,
        mixed == 3 and not interpreted, seed,
    )  # fmt: skip


SETTINGS = 3 * 2 * len(SHAPES) * len(CONVOLUTIONS) * 4 * 3 * 3 * 3 * 4


# --- calls ----------------------------------------------------------------------------------------


@dataclass
class Call:
    """A function, its arguments by name and their roles."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    roles: dict[str, str]

    def replace(self, replacements: Sequence[Replacement]) -> Call:
        """With some of the arguments replaced."""
        arguments = dict(self.arguments)
        for name, way in replacements:
            if name in arguments:
                arguments[name] = replaced(self.roles[name], way, arguments[name])
        return replace(self, arguments=arguments)

    def tensors(self) -> dict[str, Tensor]:
        """Arguments that are tensors, and can be compared."""
        return {
            name: t
            for name, t in self.arguments.items()
            if isinstance(t, Tensor)
            and (t.layout, t.device.type) == (torch.strided, "cpu")
            and not (t.is_nested or t.is_quantized)
            and (t.untyped_storage().nbytes() > 0 or t.numel() == 0)
        }


def plans(roles: dict[str, str]) -> strategies.SearchStrategy[Plan]:
    """Plans of a call with these arguments."""
    every = [Replacement(name, way) for name, role in roles.items() for way in ways(role)]
    some = strategies.lists(
        strategies.sampled_from(every), max_size=3, unique_by=lambda r: r.argument
    )
    return strategies.builds(Plan, strategies.integers(0, SETTINGS - 1), some.map(tuple))


def run(check: Callable[[Plan], None], roles: dict[str, str], examples: int, seed: int) -> None:
    """check(plan) for so many plans: the same ones each time, and none kept for later."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        print_blob=False,
    )
    @hypothesis.given(plans(roles))
    def example(plan: Plan) -> None:
        check(plan)

    example()


# --- judging --------------------------------------------------------------------------------------


def same(
    name: str,
    ours: Tensor | None,
    theirs: Tensor | None,
    dtype: torch.dtype,
    count: int = 0,
    infinite: bool = False,
    where_finite: bool = False,
) -> None:
    """Two results agree to the floor of the dtype; a gradient that is not there is zero.

    Args:
        count: how many products of grid values a result sums up: its size if nothing cancelled.
        infinite: the arguments hold infinities. Which of Inf - Inf and Inf / Inf comes up on the
            way is up to the order of a sum: NaN and infinities are then one.
        where_finite: compare no other elements. What is multiplied by an infinity, or by a NaN, may
            be a 0 to the one, and to the other next to 0, or not there.

    Raises:
        AssertionError: otherwise. NaN is equal to NaN, an infinity to itself.
    """
    if ours is None or theirs is None:
        there = theirs if ours is None else ours
        assert there is None or not there.detach().any(), f"{name}: there is none of one"
        return
    if ours.is_meta and theirs.is_meta and ours.shape == theirs.shape:
        return
    mine, true = (t.detach().as_subclass(Tensor).to(torch.float64) for t in (ours, theirs))
    assert mine.shape == true.shape, f"{name}: {list(mine.shape)}, expected {list(true.shape)}"
    assert ours.dtype == theirs.dtype, f"{name}: {ours.dtype}, expected {theirs.dtype}"
    if mine.numel() == 0:
        return
    if where_finite:
        both = mine.isfinite() & true.isfinite()
        mine, true = mine[both], true[both]
    finite = true.isfinite()
    odd = finite != mine.isfinite()
    if not infinite:
        odd |= (true.isnan() != mine.isnan()) | (true.isinf() & (mine != true))
    assert not odd.any(), f"{name}: {mine[odd][:3]}, expected {true[odd][:3]}"
    off = (mine - true)[finite].abs().max() if finite.any() else torch.tensor(0.0)
    size = true[finite].abs().max() if finite.any() else torch.tensor(0.0)
    floor = max(FLOOR[dtype], FLOOR.get(ours.dtype, 0.0))
    limit = floor * (float(size) + 1 + 8 * math.sqrt(count))
    assert off <= limit, f"{name}: off by {float(off):.3e}, allowed {limit:.3e}"
