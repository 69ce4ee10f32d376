"""A frozen module: its class, and the engine that runs its Program, bound to weights and shapes.

Anything that could make what is bound wrong (a weight changed, a hook, another backend) is looked
at in every call (watch.py); of a CUDA graph, while its replay runs.
"""

from __future__ import annotations

import threading
import weakref
from abc import ABCMeta
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fusedres import backends
from fusedres.library.conv_act import finite
from fusedres.nn.frames import Normalization, normalized
from fusedres.nn.fuse import rebuilt_by
from fusedres.nn.graphs import Graphs
from fusedres.nn.program import Program, at
from fusedres.nn.runner import Runner, Unfit
from fusedres.nn.tracing import trace
from fusedres.nn.watch import Watch
from fusedres.ops._contract import autocast_on, compute_dtype, exporting

KEPT = 8  # shapes of input


class FrozenModule(nn.Module):
    """What a module's class is joined with by `freeze`."""

    _frozen: Engine | None = None  # None: of a slice of a frozen nn.Sequential
    _functions: dict[str, Callable[..., Any]]  # that its Program calls by name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the class's own; of one tensor alone by bound kernels."""
        engine = self._frozen
        one = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        if engine is None or not one or not engine.belongs_to(self):
            return super().forward(*args, **kwargs)
        x = args[0]
        if torch.compiler.is_compiling() or exporting():
            return super().forward(engine.plain_input(self, x))
        return engine(self, x)

    def forward_plainly(self, x: Tensor) -> Any:
        """The class's own forward, of one tensor."""
        return super().forward(x)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        try:
            with torch.inference_mode(False), torch.no_grad():  # else nobody counts their versions
                return super()._apply(fn, recurse)
        finally:
            if self._frozen is not None:  # behind it, for others may have bound meanwhile
                self._frozen.forget()

    def __init_subclass__(cls, **_: Any) -> None:
        """Not that of the class, which may keep a list of the classes that users write."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return rebuilt_by(_rebuilt, super().__reduce_ex__(protocol), type(self), own_class(self))

    def __getstate__(self) -> Any:
        return {**super().__getstate__(), "_functions": {}}


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before it was frozen."""
    classes = type(module).__mro__
    return classes[classes.index(FrozenModule) + 1]


def _rebuilt(build: Callable[..., nn.Module], *args: Any) -> nn.Module:
    """What copy and pickle begin with: a blank module."""
    module = build(*args)
    cls: Any = type(module)
    module.__class__ = frozen_class(cls)
    return module


@cache
def frozen_class(cls: Any) -> Any:
    """The class of frozen modules of that class."""

    @wraps(cls.forward)  # its signature is read by trainers
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return FrozenModule.forward(self, *args, **kwargs)

    names = {"__module__": cls.__module__, "__qualname__": f"Frozen{cls.__qualname__}"}
    made: Any = ABCMeta(f"Frozen{cls.__name__}", (FrozenModule, cls), names | {"forward": forward})
    return made


def convert(
    module: nn.Module,
    inside: Sequence[str] = (),
    cuda_graph: bool = False,
    normalization: Normalization | None = None,
) -> None:
    """Make it a frozen one; its BatchNorms are folded already.

    Raises:
        TypeError: it is of a class whose objects cannot change theirs.
    """
    cls: Any = type(module)
    module.__class__ = frozen_class(cls)
    module.__dict__["_frozen"] = Engine(tuple(inside), cuda_graph, normalization)
    module.__dict__["_functions"] = {}


def _has(module: nn.Module, path: str) -> bool:
    try:
        return isinstance(at(module, path), nn.Module)
    except AttributeError:
        return False


def thaw(module: nn.Module) -> None:
    """Make it one of its own class again; its BatchNorms stay folded."""
    for name in ("_frozen", "_functions"):
        module.__dict__.pop(name)
    module.__class__ = own_class(module)


class Engine:
    """Binds and runs; one for each frozen module, which it is called with."""

    def __init__(
        self, inside: tuple[str, ...], cuda_graph: bool, normalization: Normalization | None
    ) -> None:
        self._inside, self._cuda_graph, self._normalization = inside, cuda_graph, normalization
        self._lock = threading.RLock()
        self._graphs = Graphs(KEPT)
        self._owner: weakref.ref[FrozenModule] | None = None  # copies find theirs
        self.forget()

    def belongs_to(self, module: FrozenModule) -> bool:
        """Whether it is this module's: a replica, as of nn.DataParallel, has that of another."""
        if self._owner is None or self._owner() is None:
            self._owner = weakref.ref(module)
        return self._owner() is module

    def forget(self) -> None:
        """All that was bound."""
        with self._lock:
            self._program: Program | str = ""
            self._watch: Watch | None = None
            self._bound: OrderedDict[Any, Runner] = OrderedDict()
            self._packs: OrderedDict[Any, dict[Any, Any]] = OrderedDict()
            self._graphs.forget()

    def __reduce__(self) -> Any:
        return Engine, (self._inside, self._cuda_graph, self._normalization)

    def __deepcopy__(self, memo: Any) -> Engine:
        return Engine(self._inside, self._cuda_graph, self._normalization)

    # --- a call

    def __call__(self, owner: FrozenModule, x: Tensor) -> Any:
        watch = self._watch
        key = (
            x.shape, x.dtype, x.device, autocast_on(x), compute_dtype(x),
            backends.requested_backend(), backends.requested_plan(),
        )  # fmt: skip
        graphed = self._cuda_graph and _on_gpu(x) and not torch.cuda.is_current_stream_capturing()
        runner = self._bound.get(key)
        if graphed and runner is not None and watch is not None and not self._plain(owner, x):
            with torch.no_grad():
                out = self._graphs.run(key, runner, x, known=True)
            if out is not None and not watch.changed() and not watch.touched():
                return out  # asked while the GPU was at work
        if not owner.training and (watch is None or watch.changed()):
            watch = self._look(owner)
        if watch is None or watch.touched() or self._plain(owner, x):
            return owner.forward_plainly(self.plain_input(owner, x))
        dtype = self._checked(owner, watch, x)
        with torch.no_grad():
            runner = self._bound.get(key)
            if runner is None:
                runner = self._bind(owner, watch, key, x, dtype)
            if not runner.keeps_nan and (runner.makes_nan or not _clean(x)):
                return owner.forward_plainly(self.plain_input(owner, x))
            try:
                return self._graphs.run(key, runner, x) if graphed else runner(x)
            except Unfit:
                return owner.forward_plainly(self.plain_input(owner, x))

    def _plain(self, owner: nn.Module, x: Tensor) -> bool:
        """Whether a gradient is wanted, or training mode, or x is of a kind that kernels do not
        know.
        """
        if owner.training:
            return True
        if type(x) not in (Tensor, nn.Parameter) or backends.transforming():
            return True
        if forward_ad._current_level >= 0:
            return True
        if not torch.is_grad_enabled():
            return False
        return x.requires_grad or any(p.requires_grad for p in owner.parameters())

    def plain_input(self, owner: nn.Module, x: Tensor) -> Tensor:
        """What the module's own forward takes: images of uint8 normalised."""
        if self._normalization is None or x.dtype != torch.uint8:
            return x
        dtype = next((p.dtype for p in owner.parameters() if p.is_floating_point()), torch.float32)
        self._normalization.check(own_class(owner).__name__, x)
        return normalized(x, self._normalization.vectors(x.device, dtype), dtype)

    # --- what it looks at

    def _look(self, owner: FrozenModule) -> Watch | None:
        """What to watch; None where its forward, changed since, cannot be followed any more."""
        with self._lock:
            if self._watch is not None and not self._watch.changed():
                return self._watch  # by another thread, meanwhile
            if isinstance(self._program, str) and self._program:
                return None
            self.forget()
            inside = [(p, at(owner, p)) for p in self._inside if _has(owner, p)]
            with torch.inference_mode(False), torch.no_grad():  # as when it was frozen
                followed = trace(owner, inside, owner._functions, folds=True)
            program = followed.program
            if isinstance(program, Program) and not any(program.pairs()):
                program = "no convolution is left in it"
            self._program = program
            if isinstance(program, Program):
                self._watch = Watch(owner, program, followed.reads, self._cuda_graph)
            return self._watch

    def program(self, owner: FrozenModule) -> Program | str:
        """What runs, or why nothing can."""
        self._look(owner)
        return self._program

    def _checked(self, owner: nn.Module, watch: Watch, x: Tensor) -> torch.dtype:
        """The dtype to compute in.

        Raises:
            TypeError, ValueError: what no convolution of it would take, in one line.
        """
        name, weight = own_class(owner).__name__, watch.first
        if x.dtype == torch.uint8 and self._normalization is not None:
            self._normalization.check(name, x)
            self._check_device(name, x, weight)
            return compute_dtype(weight)
        dtype = compute_dtype(x) if x.is_floating_point() else x.dtype
        if dtype != weight.dtype and not (x.is_floating_point() and autocast_on(x)):
            more = " or uint8 [N, H, W, C]" if self._normalization is not None else ""
            raise TypeError(
                f"{name}: the input must be {weight.dtype} as the weights{more}, got {x.dtype}"
            )
        if x.dim() != 4:
            raise ValueError(f"{name}: the input must be [N, C, H, W], got {list(x.shape)}")
        if watch.channels is not None and x.size(1) != watch.channels:
            raise ValueError(
                f"{name}: the input must have {watch.channels} channels, got {list(x.shape)}"
            )
        self._check_device(name, x, weight)
        return dtype

    @staticmethod
    def _check_device(name: str, x: Tensor, weight: Tensor) -> None:
        if x.device != weight.device:
            raise ValueError(f"{name}: the input is on {x.device}, the weights on {weight.device}")

    # --- binding

    def _bind(
        self, owner: FrozenModule, watch: Watch, key: Any, x: Tensor, dtype: torch.dtype
    ) -> Runner:
        with self._lock:
            runner = self._bound.get(key)
            if runner is not None:
                return runner
            assert isinstance(self._program, Program)
            size = key[1:] + (x.shape[1:], min(2, x.size(0)))
            packs = self._packs.setdefault(size, {})
            normalization = self._normalization if x.dtype == torch.uint8 else None
            name = own_class(owner).__name__
            runner = Runner(name, owner, self._program, packs, x, dtype, normalization)
            self._bound[key] = runner
            for known in (self._bound, self._packs):
                while len(known) > KEPT:
                    known.popitem(last=False)
            return runner


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _clean(x: Tensor) -> bool:
    return x.dtype == torch.uint8 or finite(x)
