"""A Program bound to weights and to one shape of input.

Its first run goes through the steps one by one and binds each to what it finds there: kernel,
packed weights, pads. Later ones run what was bound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedres import backends
from fusedres._conv import output_shape
from fusedres._tensors import stat_dtype, stored_format
from fusedres.nn.frames import Normalization, normalized
from fusedres.nn.layers import geometry
from fusedres.nn.program import Add, Call, ConvBN, Program, at
from fusedres.ops.conv_act import bind

Values = list[Any]
Bound = Callable[[Values], None]


class Unfit(Exception):
    """What a call in between gave is of another shape or dtype than what a convolution is bound to:
    it depends on more than the shape of the input.
    """


class Runner:
    """A Program bound to weights and to one shape of input; made by its first run.

    Attributes:
        keeps_nan: whether NaN in the input comes out as it does of plain modules.
        makes_nan: whether a weight is infinite or NaN.
        ways: (path of a convolution, backend, plan).
    """

    def __init__(
        self,
        name: str,
        owner: nn.Module,
        program: Program,
        packs: dict[Any, Any],
        x: Tensor,
        dtype: torch.dtype,
        normalization: Normalization | None,
    ) -> None:
        self.keeps_nan, self.makes_nan = True, False
        self.ways = list[tuple[str, str, str]]()
        self._name, self._owner, self._packs = name, owner, packs
        self._output, self._length = program.output, len(program.steps) + 1
        self._dtype = dtype
        self._vectors = None if normalization is None else normalization.vectors(x.device, dtype)
        self._own = {0} if normalization is not None else set[int]()  # values that are ours alone
        self._of_frames = False  # value 0 is the uint8 image
        self._reads_of_input = sum(step.reads().count(0) for step in program.steps)
        private = _private(program)
        values = self._start(x)
        self._steps: list[Bound] = []
        for step in program.steps:
            if isinstance(step, ConvBN):
                run = self._convolution(step, values, step.residual in private and _ends(step))
                if self._of_frames and step.input == 0:
                    values[0] = x.contiguous()
            else:
                run = self._other(step)
            run(values)
            self._steps.append(run)
        del self._owner

    def __call__(self, x: Tensor) -> Any:
        values = self._start(x)
        for run in self._steps:
            run(values)
        return self._finished(values, x)

    def _start(self, x: Tensor) -> Values:
        values: Values = [None] * self._length
        if self._of_frames:
            values[0] = x.contiguous()
        elif self._vectors is not None:
            values[0] = normalized(x, self._vectors, self._dtype)
        else:
            values[0] = x if x.dtype == self._dtype else x.to(self._dtype)
        return values

    def _finished(self, values: Values, x: Tensor) -> Any:
        out = values[self._output]
        map_to_map = isinstance(out, Tensor) and out.dim() == 4 and self._vectors is None
        return out.contiguous(memory_format=stored_format(x)) if map_to_map else out

    def _other(self, step: Add | Call) -> Bound:
        owner, out, frees = self._owner, step.out, step.frees

        def other(values: Values) -> None:
            values[out] = step.run(owner, values, False)  # type: ignore[arg-type]
            for i in frees:
                values[i] = None

        return other

    def _convolution(self, step: ConvBN, values: Values, into: bool) -> Bound:
        owner, x = self._owner, values[step.input]
        residual = None if step.residual is None else values[step.residual]
        conv = at(owner, step.conv)
        if not _is_image(x, self._dtype, conv.weight) or not _joins(residual, x, conv):
            return _plainly(owner, step)
        _check_size(self._name, owner, step, x)
        x = x.contiguous(memory_format=torch.channels_last)
        relu = step.relu and step.pool is None
        alone = step.input == 0 and self._reads_of_input == 1
        one = bind(
            x, conv.weight, geometry(conv), conv.bias, joined=residual is not None, relu=relu,
            into=into, packs=self._packs, frames=self._vectors if alone else None,
        )  # fmt: skip
        self._of_frames |= one.of_frames
        self.keeps_nan &= one.keeps_nan
        self.makes_nan |= one.makes_nan
        self.ways.append((step.conv, one.backend, one.plan))
        pool = _pool(owner, step, x, conv)
        run, at_x, at_r, out, frees = one.run, step.input, step.residual, step.out, step.frees
        stored = {step.input in self._own, step.residual is None or step.residual in self._own}
        dense = stored == {True}
        self._own.add(out)
        kind, joined = _kind(x), None if residual is None else _kind(residual)

        def convolution(values: Values) -> None:
            x = values[at_x]
            r = None if at_r is None else values[at_r]
            if not dense:
                if _kind(x) != kind or (r is not None and _kind(r) != joined):
                    raise Unfit
                x = x.contiguous(memory_format=torch.channels_last)
                r = None if r is None else r.contiguous(memory_format=torch.channels_last)
            y = run(x, r)
            values[out] = y if pool is None else pool(y)
            for i in frees:
                values[i] = None

        return convolution


def _kind(t: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return t.shape, t.dtype, t.device


def _private(program: Program) -> set[int]:
    """Values that only convolutions and adds read: no call can have kept them, or be a view."""
    made = {step.out for step in program.steps if isinstance(step, ConvBN | Add)}
    shown = {program.output}
    for step in program.steps:
        if isinstance(step, Call):
            shown.update(step.reads())
    return made - shown


def _ends(step: ConvBN) -> bool:
    return step.residual in step.frees and step.residual != step.input


def _is_image(x: object, dtype: torch.dtype, weight: Tensor) -> bool:
    return (
        type(x) is Tensor
        and x.dim() == 4
        and x.dtype == dtype
        and x.device == weight.device
        and x.layout is torch.strided
    )


def _joins(residual: object, x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether there is none, or one that is added without broadcasting or promotion."""
    if residual is None:
        return True
    shape = output_shape(x.shape, conv.weight.shape, geometry(conv))
    alike = _is_image(residual, x.dtype, conv.weight)
    return alike and tuple(residual.shape) == shape  # type: ignore[attr-defined]


def _check_size(name: str, owner: nn.Module, step: ConvBN, x: Tensor) -> None:
    conv = at(owner, step.conv)
    out = output_shape(x.shape, conv.weight.shape, geometry(conv))
    if step.pool is not None and min(out[2:]) > 0:
        pool = at(owner, step.pool)
        shrunk = 2 * pool.padding - pool.kernel_size
        out = (*out[:2], *((s + shrunk) // pool.stride + 1 for s in out[2:]))
    if min(out[2:]) < 1:
        raise ValueError(
            f"{name}: the input is too small: nothing is left of it behind "
            f"{step.pool or step.conv}, where it is {list(x.shape)}"
        )


def _pool(
    owner: nn.Module, step: ConvBN, x: Tensor, conv: nn.Conv2d
) -> Callable[[Tensor], Tensor] | None:
    """The ReLU and the max pool behind a convolution."""
    if step.pool is None:
        return None
    pool = at(owner, step.pool)
    window = pool.kernel_size, pool.stride, pool.padding
    backend = backends.backend_for("bn_relu_maxpool", x)
    if backend == "reference":
        return lambda y: F.max_pool2d(y.relu_(), *window)
    kernel = backends.kernels(backend, "bn_relu_maxpool").bn_relu_maxpool_fwd
    zeros = torch.zeros(conv.out_channels, dtype=stat_dtype(x.dtype), device=x.device)
    ones = torch.ones_like(zeros)

    def pooled(y: Tensor) -> Tensor:
        p: Tensor = kernel(y, zeros, ones, zeros, *window)
        return p

    return pooled


def _plainly(owner: nn.Module, step: ConvBN) -> Bound:
    """The modules of a step one by one, where what comes is nothing that kernels take."""
    modules = [at(owner, path) for path in (step.conv, step.bn) if path]
    pool = None if step.pool is None else at(owner, step.pool)

    def plainly(values: Values) -> None:
        y = values[step.input]
        for module in modules:
            y = module(y)
        y = y if step.residual is None else y + values[step.residual]
        y = F.relu(y) if step.relu else y
        values[step.out] = y if pool is None else pool(y)
        for i in step.frees:
            values[i] = None

    return plainly
