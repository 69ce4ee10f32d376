"""From a module's forward to a Program: torch.fx follows one tensor through it, and matching.py
finds in its graph what can be one step.

What torch.fx would lose without a word is refused here: parts that run without gradients, under
autocast or activation checkpointing, random numbers drawn from Python, tensors made on the way,
values changed in place that others read, attributes that a forward changes, and what it reads that
may change unseen. What globals and closures hold is taken as it is.
"""

from __future__ import annotations

import functools
import operator
import random
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from fusedres.nn.matching import IN_PLACE, Untraceable, program_of
from fusedres.nn.program import Program
from fusedres.nn.reads import Before, Reads, Recorder, Unwatchable, state

TRACED = "forward_plainly"  # the method of fused and frozen classes that is followed


class _Value(fx.Proxy):
    """A value on its way. torch.fx's own takes `a += b` for `a = a + b`, whoever else has a."""


def _changing(function: Callable[..., Any]) -> Callable[..., Any]:
    def change(self: _Value, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return change


for _name in IN_PLACE:
    setattr(_Value, f"__{_name}__", _changing(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    """Follows a module's own forward and those of the modules it is told to look into."""

    traced_func_name = TRACED
    proxy_buffer_attributes = True  # else what a forward does to a buffer happens here and now

    def __init__(self, root: nn.Module, inlined: Iterable[nn.Module]) -> None:
        super().__init__()
        self._inlined = {id(m) for m in inlined}
        self._ambient = _ambient()
        self._root, self.recorder = root, Recorder(root)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) not in self._inlined

    def create_args_for_root(self, root_fn: Any, *args: Any, **kwargs: Any) -> Any:
        fn, placeholders = super().create_args_for_root(root_fn, *args, **kwargs)
        return self._followed(fn), placeholders

    def _followed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def followed(*args: Any, **kwargs: Any) -> Any:
            with self.recorder.switched(True):
                return forward(*args, **kwargs)

        return followed

    # torch.fx has every thread's modules call these two

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if not self.recorder.is_here():
            return forward(*args, **kwargs)
        with self.recorder.switched(False):  # and no hook sees a Proxy
            return super().call_module(m, self._followed(m.forward), args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if not self.recorder.is_here():
            return attr_val
        with self.recorder.switched(False):
            return super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def create_proxy(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Proxy:
        with self.recorder.switched(False):
            if kind in ("call_module", "get_attr"):
                self.recorder.note_path(target)
            return super().create_proxy(kind, target, *args, **kwargs)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _ambient() != self._ambient:
            raise Untraceable("parts of it run under autocast, no_grad or checkpointing")
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            own = (*self.root.parameters(), *self.root.buffers())
            if all(a is not t for t in own):
                raise Untraceable("it uses a tensor that is no parameter or buffer")
        if isinstance(a, nn.Module):
            raise Untraceable("it passes a module to a function")
        return super().create_arg(a)

    def followed_graph(self) -> fx.Graph:
        """What the forward of the root does.

        Raises:
            Untraceable: with the reason.
        """
        try:
            with self.recorder.listening():
                graph = self.trace(self._root)
        except Untraceable:
            raise
        except Unwatchable as error:
            raise Untraceable(str(error)) from None
        except Exception as error:  # of a user's forward, which had a Proxy in its hands
            first = str(error).strip().partition("\n")[0] or type(error).__name__
            raise Untraceable(f"its forward cannot be followed: {first}") from None
        return graph


def _ambient() -> tuple[Any, ...]:
    """What surrounds an operation and is not part of it."""
    kinds = ("cpu", "cuda")
    autocasts = [(torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds]
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    return (*modes, *autocasts, id(hooks) if hooks is None else tuple(map(id, hooks)))


class Followed(NamedTuple):
    """What came of following a forward: a Program, or why there is none, and what it read."""

    program: Program | str
    reads: Reads
    state: tuple[Any, ...]


_ONE_AT_A_TIME = threading.RLock()  # torch.fx changes nn.Module while it follows


def trace(
    root: nn.Module,
    inlined: Iterable[tuple[str, nn.Module]],
    functions: dict[str, Callable[..., Any]],
    folds: bool = False,
) -> Followed:
    """The Program of a module of a fused or frozen class, whose forward takes and gives one tensor.

    Args:
        inlined: (path, module) of descendants whose forwards are followed too; the others are
            called as they are.
        functions: takes what the Program calls by name.
        folds: see `program_of`.
    """
    inside = list(inlined)
    with _ONE_AT_A_TIME:
        before = Before(root)
        program, graph, tracer = _graph(root, [m for _, m in inside])
        if before.restore():
            program = "its forward changes attributes"
        reads = tracer.recorder.reads()
        read = [(path, name) for path, names in reads for name in names]
        try:
            if not program:
                assert graph is not None
                program = program_of(root, graph, [p for p, _ in inside], functions, folds, read)
        except Untraceable as error:
            program = str(error)
        try:
            found = state(root, reads)
        except Unwatchable as error:
            program, reads, found = str(error), (), state(root, ())
    return Followed(program, reads, found)


_PATIENCE = 5.0  # seconds, where other threads may draw


def _graph(
    root: nn.Module, inside: list[nn.Module]
) -> tuple[Program | str, fx.Graph | None, _Tracer]:
    """Why there is no graph, "" where there is one, and the graph.

    Other threads may draw random numbers meanwhile: what moves them each time is the forward.
    """
    drawn, deadline = _drawn(), time.monotonic()
    deadline += _PATIENCE if threading.active_count() > 1 else 0.0
    while True:
        now, tracer = _drawn(), _Tracer(root, inside)
        reason, graph = "", None
        try:
            graph = tracer.followed_graph()
        except Untraceable as error:
            reason = str(error)
        if not any(_moved(now)):
            return reason, graph, tracer
        if time.monotonic() >= deadline:
            break
        time.sleep(0.01)
    _put_back(drawn)
    return "its forward draws random numbers itself", None, tracer


def _moved(drawn: list[tuple[Any, Any, Any]]) -> Iterator[bool]:
    """Whether each generator has moved."""
    return (not _same(ask(), was) for ask, _, was in drawn)


def _put_back(drawn: list[tuple[Any, Any, Any]]) -> None:
    """Set the generators that have moved back."""
    for (_, set_back, was), moved in zip(drawn, list(_moved(drawn)), strict=True):
        if moved:
            set_back(was)


def _drawn() -> list[tuple[Any, Any, Any]]:
    """Of each generator of random numbers: what asks for its state, what sets it, and its state."""
    asked: list[tuple[Any, Any]] = [
        (random.getstate, random.setstate),
        (torch.random.get_rng_state, torch.random.set_rng_state),
    ]
    if torch.cuda.is_initialized():
        asked.append((torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all))
    if "numpy" in sys.modules:
        numpy: Any = sys.modules["numpy"]
        asked.append((numpy.random.get_state, numpy.random.set_state))
    return [(ask, set_back, ask()) for ask, set_back in asked]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    same = a == b
    return same if isinstance(same, bool) else bool(same.all())
