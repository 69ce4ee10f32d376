"""fuse and unfuse: a model that exists already, its modules made to run on fused ops.

Each module is looked at from the inside out. What torch.fx can follow from one tensor to one
tensor, and where convolutions with BatchNorm are found (or modules that are fused already), gets a
class of its own: a subclass of its class whose forward runs a Program. Modules, parameters and
buffers stay the objects they are, so nothing that holds them notices.

A chain without a residual add (the convolutions within a block, a projection) becomes part of the
module that calls it, where that one can be followed.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
import warnings
from abc import ABCMeta
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fusedres.deferred import Deferred
from fusedres.nn.blocks import (
    MEMORY,
    FusedModule,
    Stage,
    as_tensor,
    in_format_of,
    packed,
    set_memory,
)
from fusedres.nn.layers import is_untouched, plain_reason, touched
from fusedres.nn.program import Add, Program, at
from fusedres.nn.reads import Reads, Unwatchable, look, numbers_in, state
from fusedres.nn.tracing import Followed, trace
from fusedres.ops._contract import exporting


def fuse(model: nn.Module, *, inplace: bool = False, memory: str | None = None) -> nn.Module:
    """The model with its convolutions, BatchNorms, ReLUs and residual adds fused where they can be.

    Any module tree will do: ResNets of torchvision, timm and Hugging Face, an nn.Sequential, blocks
    of one's own. What is fused is found by following each module's forward, not by names; what
    cannot be followed or fused is called as it is, and `report` says why. Numbers stay those of
    plain PyTorch up to rounding, in training and evaluation. Attributes may change later; what a
    forward takes from globals or closures stays as it was when the forward was first followed.

    Args:
        model: not a fused one: fused modules in it are switched on again where `unfuse` or
            `fused = False` had switched them off.
        inplace: change this model instead of making another.
        memory: "exact", or "recompute": the output of the last convolution of each branch of a
            residual block is not kept for backward, but computed again there. Gradients stay the
            same (in half types up to the rounding of a projection before it is added). None:
            "exact" for what is not fused yet.

    Returns:
        A model of the same state_dict: new module objects, the same Parameter and buffer objects,
        so that an optimizer made before goes on working; the original stays usable. Each module is
        an instance of the class that it was.

    Raises:
        TypeError: model is no nn.Module.
        ValueError: another word for memory.

    Warns:
        UserWarning: nothing in it can be fused; or, once for a block, a hook on a module inside it
            sends it down the plain path.
    """
    if memory not in (None, *MEMORY):
        raise ValueError(f"fuse: memory must be 'exact' or 'recompute', got {memory!r}")
    model = _checked("fuse", model, inplace)
    _Visit().root(model)
    if memory is not None:
        set_memory(model, memory)
    if not any(isinstance(m, FusedModule) for m in model.modules()):
        reasons = {why for _, _, why in unfused(model)}
        because = sorted(reasons)[0] if reasons else "it has no convolution"
        warnings.warn(
            f"fuse: nothing in this {type(model).__name__} can be fused: {because}", stacklevel=2
        )
    return model


def unfuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The model as it was before `fuse`: every module called by its own class's forward.

    Args:
        model: any module; fusedres' own blocks and networks in it call their children one by one
            from then on.
        inplace: change this model instead of making another.

    Returns:
        The model: new module objects, the same Parameter and buffer objects.

    Raises:
        TypeError: model is no nn.Module.
    """
    model = _checked("unfuse", model, inplace)
    for module in model.modules():
        if isinstance(module, FusedByProgram) and _is_fused_class(type(module)):
            _restore(module)
        elif isinstance(module, FusedModule):
            module.fused = False
    return model


def _checked(name: str, model: nn.Module, inplace: bool) -> nn.Module:
    """The model to change: this one, or a copy that shares its tensors."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(inplace, bool):
        raise TypeError(f"{name}: inplace must be a bool, got {inplace!r}")
    if inplace:
        return model
    shared: dict[int, Any] = {}
    for module in model.modules():
        held = (*vars(module).values(), *module._parameters.values(), *module._buffers.values())
        shared |= {id(t): t for t in held if isinstance(t, Tensor)}
    return copy.deepcopy(model, shared)


# --- a module that runs a Program -----------------------------------------------------------------


class FusedByProgram(FusedModule):
    """What a module's class is joined with: its forward runs the Program of the class's own.

    The Program is that of the module as it is: where anything that the forward reads changed since
    (an attribute, a child's class, the mode, whether gradients are wanted), it is followed anew.
    """

    _chains: tuple[str, ...]  # descendants whose forwards are followed too
    _programs: dict[Reads, dict[Any, Followed]]  # by what the forward read
    _functions: dict[str, Callable[..., Any]]  # that they call

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As the class's own; a slice of a fused nn.Sequential is made so."""
        super().__init__(*args, **kwargs)
        _make_ready(self, _Visit().chains_of(self))

    def forward(self, *args: Any, defer: bool = False, **kwargs: Any) -> Any:
        """As the class's own; one tensor alone runs through fused ops."""
        x = args[0] if len(args) == 1 and not kwargs and not exporting() else None
        if isinstance(x, Tensor | Deferred) and torch.compiler.is_compiling():
            look(self, *_read_by(self))
        if not isinstance(x, Tensor | Deferred) or self.runs_plainly():
            return super().forward(*(as_tensor(a) for a in args), **kwargs)
        program = self.program()
        assert isinstance(program, Program)  # else it runs plainly
        with packed(self, x):
            out = program.run(self, x, defer)
        if isinstance(out, Deferred):
            return out if defer else in_format_of(out.value(), x)
        map_to_map = isinstance(out, Tensor) and out.dim() == len(x.shape)
        return in_format_of(out, x) if map_to_map else out

    def forward_plainly(self, x: Tensor) -> Any:
        """The class's own forward, of one tensor."""
        return super().forward(x)

    def program(self) -> Program | str:
        """What runs, or why nothing can."""
        return _program_of(self) if torch.compiler.is_compiling() else self._program()

    def _program(self) -> Program | str:
        return self._followed().program

    def _followed(self) -> Followed:
        for reads, known in list(self._programs.items()):
            with contextlib.suppress(Unwatchable):
                found = known.get(state(self, reads))
                if found is not None:
                    return found
        parts = [(path, at(self, path)) for path in self._chains if _has(self, path)]
        followed = trace(self, parts, self._functions)
        if sum(map(len, self._programs.values())) >= 16:
            self._programs.clear()
        self._programs.setdefault(followed.reads, {})[followed.state] = followed
        return followed

    def units(self) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
        program = self.program()
        for step in () if isinstance(program, str) else program.pairs():
            yield step.conv, at(self, step.conv), step.bn, at(self, step.bn)

    def op_of(self, conv: str) -> str:
        program = self.program()
        pooled = () if isinstance(program, str) else program.pairs()
        stem = any(step.conv == conv and step.pool is not None for step in pooled)
        return "conv_bn_relu_maxpool" if stem else "conv_bn"

    def plain_reason(self) -> str | None:
        if not self.fused:
            return "fused is set to False"
        program = self.program()
        if isinstance(program, str):
            return program
        for step in program.pairs():
            parts = ((step.conv, nn.Conv2d), (step.bn, nn.BatchNorm2d), (step.pool, nn.MaxPool2d))
            for path, kind in parts:
                reason = None if path is None else plain_reason(at(self, path), path, kind)
                if reason is not None:
                    return reason
        for path in program.watched:
            if not is_untouched(at(self, path)):
                return touched(path)
        return None

    def accepts_deferred(self) -> bool:
        program = self.program()
        return not isinstance(program, str) and program.takes_deferred(self)

    def __init_subclass__(cls, **_: Any) -> None:
        """Not that of the class, which may keep a list of the classes that users write."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return rebuilt_by(_rebuilt, super().__reduce_ex__(protocol), type(self), own_class(self))

    def __getstate__(self) -> Any:
        return {**super().__getstate__(), "_programs": {}, "_functions": {}}


@torch.compiler.assume_constant_result
def _program_of(module: FusedByProgram) -> Program | str:
    return module._program()


@torch.compiler.assume_constant_result
def _read_by(module: FusedByProgram) -> tuple[Reads, tuple[float, ...]]:
    followed = module._followed()
    return followed.reads, tuple(numbers_in(followed.state))


def _has(module: nn.Module, path: str) -> bool:
    for name in path.split("."):
        if not isinstance(module, nn.Module) or module._modules.get(name) is None:
            return False
        module = module._modules[name]  # type: ignore[assignment]
    return True


def rebuilt_by(
    rebuild: Callable[..., nn.Module], reduced: Any, made: type, own: type[nn.Module]
) -> Any:
    """What pickle is told of an object of a `made` class, which it cannot find by its name."""
    build, args, *rest = reduced
    return (rebuild, tuple(own if a is made else a for a in (build, *args)), *rest)


@functools.cache
def fused_class(cls: type[nn.Module]) -> type[FusedByProgram]:
    """The class of fused modules of that class."""

    @functools.wraps(cls.forward)  # its signature is read by trainers
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return FusedByProgram.forward(self, *args, **kwargs)

    names = {"__module__": cls.__module__, "__qualname__": f"Fused{cls.__qualname__}"}
    made: Any = ABCMeta(f"Fused{cls.__name__}", (FusedByProgram, cls), names | {"forward": forward})
    return made


@functools.cache
def _names() -> set[str]:
    """Of the attributes and methods that a module gets by being fused."""
    names = {*dir(FusedByProgram), *FusedByProgram.__annotations__} - {*dir(nn.Module)}
    return {name for name in names if not name.startswith(("__", "_abc_"))}


def _is_fused_class(cls: type[FusedByProgram]) -> bool:
    """Whether no one else, as FSDP2, has put a class of theirs before it."""
    return cls.__mro__[1] is FusedByProgram


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before it was fused."""
    classes = type(module).__mro__
    return classes[classes.index(FusedByProgram) + 2]


def _rebuilt(build: Callable[..., nn.Module], *args: Any) -> nn.Module:
    """What copy and pickle begin with: a blank module, or one whose class says how it is made."""
    module = build(*args)
    if "_modules" in vars(module):
        return fuse(module, inplace=True)
    cls: Any = type(module)
    module.__class__ = fused_class(cls)
    return module


def _convert(module: nn.Module, chains: list[str]) -> FusedByProgram:
    module.__class__ = fused_class(type(module))  # type: ignore[arg-type]
    assert isinstance(module, FusedByProgram)
    return _make_ready(module, chains)


def _make_ready(module: FusedByProgram, chains: list[str]) -> FusedByProgram:
    module._chains, module._programs, module._functions = tuple(chains), {}, {}
    return module


def _restore(module: FusedByProgram) -> None:
    for name in ("_chains", "_programs", "_functions", "_warned", "fused", "memory"):
        module.__dict__.pop(name, None)
    module.__class__ = own_class(module)  # type: ignore[assignment]


# --- which modules --------------------------------------------------------------------------------


class _Visit:
    """A walk over a model, children first; what became of each module."""

    def __init__(self) -> None:
        self._kinds: dict[int, str] = {}  # "fused", "chain", "other"

    def root(self, model: nn.Module) -> None:
        """Fuse what can be, in place."""
        if self._visit(model) == "chain":
            _convert(model, list(self._chains_below(model)))
            _follow(model)

    def chains_of(self, module: nn.Module) -> list[str]:
        """What a module may look into."""
        for child in module.children():
            self._visit(child)
        return list(self._chains_below(module))

    def _visit(self, module: nn.Module) -> str:
        if id(module) not in self._kinds:
            self._kinds[id(module)] = "other"
            chains = self.chains_of(module)
            self._kinds[id(module)] = self._kind(module, chains)
        return self._kinds[id(module)]

    def _kind(self, module: nn.Module, chains: list[str]) -> str:
        if isinstance(module, FusedModule | Stage):
            module.__dict__.pop("fused", None)
            return "fused"
        if _has_no_forward(module) or not any(isinstance(m, nn.Conv2d) for m in module.modules()):
            return "other"
        program = _tried(module, chains)
        if isinstance(program, str):
            self._fuse_chains_of(module)
            return "other"
        pairs = list(program.pairs())
        joins = any(step.residual is not None for step in pairs)
        joins |= any(isinstance(step, Add) for step in program.steps)
        calls_fused = program.calls_fused(module)
        if not pairs and not calls_fused:
            return "other"
        if not joins and not calls_fused:
            return "chain"  # maybe part of what calls it
        _convert(module, chains)
        _follow(module)
        return "fused"

    def _chains_below(self, module: nn.Module) -> Iterator[str]:
        """Paths of the chains that a module may call, and of those within them."""
        for name, child in module.named_children():
            chain = self._kinds[id(child)] == "chain"
            if chain:
                yield name
            if chain or _has_no_forward(child):
                yield from (f"{name}.{path}" for path in self._chains_below(child))

    def _fuse_chains_of(self, module: nn.Module) -> None:
        """Each on its own: their caller cannot be followed."""
        for child in module.children():
            if self._kinds[id(child)] == "chain":
                _convert(child, list(self._chains_below(child)))
                _follow(child)
                self._kinds[id(child)] = "fused"
            elif _has_no_forward(child):
                self._fuse_chains_of(child)


def _has_no_forward(module: nn.Module) -> bool:
    """Whether it only holds others, as nn.ModuleList."""
    # static: a ScriptModule's class has no forward to ask for
    return inspect.getattr_static(type(module), "forward") is nn.Module.forward


def _tried(module: nn.Module, chains: list[str]) -> Program | str:
    """The Program that a module would have, or why it can have none."""
    cls = type(module)
    if cls.__module__.partition(".")[0] == "torch" and cls is not nn.Sequential:
        return f"{cls.__name__} is torch's own"
    if "forward" in module.__dict__:
        return "it has a forward of its own"
    own = {*dir(cls), *module.__dict__, *module._modules, *module._parameters, *module._buffers}
    taken = sorted(own & _names())
    if taken:
        return f"it has a {taken[0]} of its own, by a name that fused modules need"
    try:
        if "defer" in inspect.signature(cls.forward).parameters:
            return "its forward takes a defer, by a name that fused modules need"
        fused = _convert(module, chains)
    except (TypeError, ValueError) as error:  # a class whose objects cannot change theirs
        return str(error)
    try:
        return fused.program()
    finally:
        _restore(fused)


def _follow(module: nn.Module) -> None:
    """Find the Programs of all modes now, for a compiler can find none."""
    assert isinstance(module, FusedByProgram)
    parts = list(module.modules())
    modes = [m.training for m in parts]
    try:
        for training, grad in itertools.product((True, False), repeat=2):
            for m in parts:
                m.training = training
            with torch.set_grad_enabled(grad):
                module.program()
    finally:
        for m, mode in zip(parts, modes, strict=True):
            m.training = mode


def unfused(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Convolutions that belong to no fused module: path, module, and why."""
    owned: set[int] = set()
    reasons: dict[str, str] = {}
    for path, module in model.named_modules():
        if not isinstance(module, FusedModule):
            continue
        owned |= {id(conv) for _, conv, _, _ in module.units()}
        program = module.program() if isinstance(module, FusedByProgram) else ""
        if isinstance(program, Program):
            reasons |= {f"{path}.{name}".lstrip("."): why for name, why in program.left}
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and id(module) not in owned:
            yield path, module, reasons.get(path) or _why(model, path)


def _why(model: nn.Module, path: str) -> str:
    """Why nothing took the convolution of that path, by its nearest module with a forward."""
    owner, name = path, ""
    while owner:
        owner, _, last = owner.rpartition(".")
        name = f"{last}.{name}".rstrip(".")
        module = at(model, owner) if owner else model
        if _has_no_forward(module):
            continue
        program = module.program() if isinstance(module, FusedByProgram) else _tried(module, [])
        who = f"{owner} ({type(module).__name__})" if owner else type(module).__name__
        if isinstance(program, str):
            return f"{who}: {program}"
        return dict(program.left).get(name, "fusedres.fuse(model) would fuse it")
    return ""
