"""What a traced module computes, as steps over numbered values, and how they run on deferred
activations.

Values are numbered, the input is 0. A step that reads a value for the last time frees it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedres._conv import output_shape
from fusedres.deferred import Deferred, Sampled
from fusedres.nn.blocks import call, takes_deferred
from fusedres.nn.layers import apply_conv_bn, apply_stem, geometry, is_pointwise, sampling
from fusedres.ops import add_relu
from fusedres.ops._contract import compute_dtype


class Ref(NamedTuple):
    """Stands for a value among the arguments of a call."""

    value: int


Values = dict[int, Any]


class ConvBN(NamedTuple):
    """A convolution, its BatchNorm, and what joins behind them."""

    out: int
    frees: tuple[int, ...]
    input: int
    conv: str
    bn: str  # "" for none, in inference
    residual: int | None
    relu: bool
    pool: str | None  # a max pool behind the ReLU
    shared: bool  # others read the input later
    reader: str | None  # the convolution that alone does so
    ends: bool  # a branch of a residual block: the output need not be kept, where memory is short
    settles: bool  # the residual may change later: the sum is computed at once

    def reads(self) -> list[int]:
        """The values it reads."""
        return [self.input] if self.residual is None else [self.input, self.residual]

    def run(self, owner: nn.Module, values: Values, _: bool) -> Any:
        """A Deferred, or a Tensor behind a max pool; leaves the input for its other readers."""
        conv: Any = at(owner, self.conv)
        bn: Any = at(owner, self.bn)
        source = values[self.input]
        if self.pool is not None:
            pool: Any = at(owner, self.pool)
            if self.shared:
                source = tensor(values, self.input)
            return apply_stem(source, conv, bn, pool)
        residual = None if self.residual is None else self._residual(values)
        if self.residual == self.input:
            source = residual
        if residual is not None and not _alike(residual, source, conv):
            h = self._apply(owner, values, source, conv, bn, None, False)
            parts = (t.value() if isinstance(t, Deferred) else t for t in (h, residual))
            h = next(parts) + next(parts)
            return F.relu(h) if self.relu else h
        h = self._apply(owner, values, source, conv, bn, residual, self.relu)
        return h.value() if self.settles and isinstance(h, Deferred) else h

    def _residual(self, values: Values) -> Any:
        residual = values[self.residual]  # type: ignore[index]
        affine = isinstance(residual, Deferred) and not residual.relu and residual.residual is None
        if affine and self.residual in self.frees and self.residual != self.input:
            return residual
        return tensor(values, self.residual)  # type: ignore[arg-type]

    def _apply(
        self,
        owner: nn.Module,
        values: Values,
        source: Any,
        conv: Any,
        bn: Any,
        residual: Any,
        relu: bool,
    ) -> Any:
        if not self.shared:
            recompute = self.ends and owner.memory == "recompute"
            return apply_conv_bn(
                source, conv, bn, relu=relu, residual=residual, recompute=recompute
            )
        if isinstance(source, Deferred) and not is_pointwise(conv):
            source = source.value()
        steps = None if self.reader is None else sampling(source, at(owner, self.reader))
        emit: Any = steps or True
        h, values[self.input] = apply_conv_bn(
            source, conv, bn, relu=relu, residual=residual, emit=emit
        )
        return h


class Add(NamedTuple):
    """relu(a + b), where neither is of a convolution that could take the other in."""

    out: int
    frees: tuple[int, ...]
    a: int
    b: int

    def reads(self) -> list[int]:
        """The values it reads."""
        return [self.a, self.b]

    def run(self, owner: nn.Module, values: Values, _: bool) -> Tensor:
        """By one kernel where both are alike, else as torch does it."""
        a, b = tensor(values, self.a), tensor(values, self.b)
        alike = a.shape == b.shape and a.dtype == b.dtype == compute_dtype(a)
        if alike and a.is_floating_point() and a.device == b.device:
            return add_relu(a, b)
        return F.relu(a + b)


class Call(NamedTuple):
    """Anything else, called as it is."""

    out: int
    frees: tuple[int, ...]
    kind: str  # "module", "function", "method", "attribute"
    target: str  # a path, or what is called; functions are held by their owner
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    hands_over: str  # whether the result may be a Deferred: "yes", "no", "asked": if the caller is

    def run(self, owner: nn.Module, values: Values, asked: bool) -> Any:
        """A module of ours may take and give a Deferred."""
        if self.kind == "attribute":
            return at(owner, self.target)
        if self.kind == "module" and self.is_plain():
            module, ref = at(owner, self.target), self.args[0].value
            taken = takes_deferred(module) and ref in self.frees
            x = values[ref] if taken else tensor(values, ref)
            defer = self.hands_over == "yes" or (self.hands_over == "asked" and asked)
            return call(module, x, defer=defer)
        args = _filled(self.args, values)
        kwargs = {name: _filled(value, values) for name, value in self.kwargs}
        if self.kind == "method":
            return getattr(args[0], self.target)(*args[1:], **kwargs)
        functions: Any = owner._functions
        called = at(owner, self.target) if self.kind == "module" else functions[self.target]
        return called(*args, **kwargs)

    def reads(self) -> list[int]:
        """The values it reads, each as often as it does."""
        leaves = torch.utils._pytree.tree_leaves(
            (self.args, self.kwargs), is_leaf=lambda a: isinstance(a, Ref | slice)
        )
        sliced = ((a.start, a.stop, a.step) if isinstance(a, slice) else (a,) for a in leaves)
        return [part.value for parts in sliced for part in parts if isinstance(part, Ref)]

    def is_plain(self) -> bool:
        """Whether it takes one value and nothing else."""
        return len(self.args) == 1 and not self.kwargs and isinstance(self.args[0], Ref)


Step = ConvBN | Add | Call


class Program(NamedTuple):
    """The steps of a module.

    Attributes:
        steps: in the order they run.
        output: the value that is returned.
        watched: paths of modules that no step calls, which a hook or a forward of its own on them
            would want.
        left: (path, reason) of convolutions that are called as they are.
    """

    steps: tuple[Step, ...]
    output: int
    watched: tuple[str, ...]
    left: tuple[tuple[str, str], ...]

    def run(self, owner: nn.Module, x: Tensor | Deferred, defer: bool) -> Any:
        """The output; a Deferred only where the last step gives one."""
        values: Values = {0: x}
        for step in self.steps:
            values[step.out] = step.run(owner, values, defer)
            for index in step.frees:
                del values[index]
        return values[self.output]

    def pairs(self) -> Iterator[ConvBN]:
        """The steps that are fused convolutions."""
        return (step for step in self.steps if isinstance(step, ConvBN))

    def calls_fused(self, owner: nn.Module) -> bool:
        """Whether it calls modules that may take or give a Deferred."""
        calls = (s for s in self.steps if isinstance(s, Call) and s.kind == "module")
        return any(call.is_plain() and takes_deferred(at(owner, call.target)) for call in calls)

    def takes_deferred(self, owner: nn.Module) -> bool:
        """Whether a Deferred as input stays one until a convolution reads it."""
        for step in self.steps:
            if isinstance(step, ConvBN):
                return step.input == 0 and step.pool is None
            if isinstance(step, Call) and step.kind == "module" and step.is_plain():
                return step.args[0].value == 0 and takes_deferred(at(owner, step.target))
            return False
        return False


def at(owner: nn.Module, path: str) -> Any:
    """The module, parameter or buffer of that path."""
    found: Any = owner
    for name in path.split("."):
        found = getattr(found, name)
    return found


def tensor(values: Values, index: int) -> Any:
    """A value that is wanted as a Tensor; a Deferred is computed once for all its readers."""
    value = values[index]
    if isinstance(value, Deferred):
        value = values[index] = value.value()
    return value


def _filled(arguments: Any, values: Values) -> Any:
    """Arguments with values in place of what stands for them."""
    if isinstance(arguments, Ref):
        return tensor(values, arguments.value)
    if isinstance(arguments, tuple):
        return tuple(_filled(a, values) for a in arguments)
    if isinstance(arguments, list):
        return [_filled(a, values) for a in arguments]
    if isinstance(arguments, dict):
        return {key: _filled(a, values) for key, a in arguments.items()}
    if isinstance(arguments, slice):
        parts = (arguments.start, arguments.stop, arguments.step)
        return slice(*(_filled(a, values) for a in parts))
    return arguments


def _alike(
    residual: Tensor | Deferred, source: Tensor | Deferred | Sampled, conv: nn.Conv2d
) -> bool:
    """Whether a residual is added without broadcasting or promotion of dtypes."""
    x, r = _stored(source), _stored(residual)
    if not isinstance(r, Tensor) or x.dim() != 4:
        return isinstance(r, Tensor)  # conv_bn says what is wrong with x
    shape = output_shape(x.shape, conv.weight.shape, geometry(conv))
    return tuple(r.shape) == tuple(shape) and compute_dtype(r) == compute_dtype(x)


def _stored(value: Any) -> Any:
    """The tensor that is in memory."""
    if isinstance(value, Sampled):
        return value.value
    return value.y if isinstance(value, Deferred) else value
