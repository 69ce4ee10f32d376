"""fuse and unfuse: a model that exists already, its modules made to run on fused ops.

Each module is looked at from the inside out. What torch.fx can follow from one tensor to one
tensor, and where convolutions with BatchNorm are found (or modules that are fused already), gets a
class of its own: a subclass of its class whose forward runs a Program. Modules, parameters and
buffers stay the objects they are, so nothing that holds them notices.

A chain without a residual add (the convolutions within a block, a projection) becomes part of the
module that calls it, where that one can be followed.
"""

from __future__ import annotations

import copy
import functools
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
from fusedres.nn.tracing import Untraceable, trace


def fuse(model: nn.Module, *, inplace: bool = False, memory: str | None = None) -> nn.Module:
    """The model with its convolutions, BatchNorms, ReLUs and residual adds fused where they can be.

    Any module tree will do: ResNets of torchvision, timm and Hugging Face, an nn.Sequential, blocks
    of one's own. What is fused is found by following each module's forward, not by names; what
    cannot be followed or fused is called as it is, and `report` says why. Numbers stay those of
    plain PyTorch up to rounding, in training and evaluation.

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

    The Program is that of the module as it is: where an attribute, a child's class or the mode
    changed since, the forward is followed anew.
    """

    _chains: tuple[str, ...]  # descendants whose forwards are followed too
    _programs: dict[Any, Program | str]  # by the state they were made for; or the reason for none
    _functions: dict[str, Callable[..., Any]]  # that they call

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As the class's own; a slice of a fused nn.Sequential is made so."""
        super().__init__(*args, **kwargs)
        _make_ready(self, _Visit().chains_of(self))

    def forward(self, *args: Any, defer: bool = False, **kwargs: Any) -> Any:
        """As the class's own; one tensor alone runs through fused ops."""
        x = args[0] if len(args) == 1 and not kwargs else None
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
        if not torch.compiler.is_compiling():
            return self._program()
        program = _program_of(self)
        if isinstance(program, Program):
            for path, name, value in program.settings:  # so that the compiler sees them change
                if getattr(at(self, path) if path else self, name) != value:
                    return "it changed while it was compiled"
        return program

    def _program(self) -> Program | str:
        parts = [(path, at(self, path)) for path in self._chains if _has(self, path)]
        state = _state([self, *(m for _, m in parts)])
        found = self._programs.get(state)
        if found is None:
            try:
                found = trace(self, parts, self._functions)
                found = found._replace(settings=tuple(_settings([("", self), *parts])))
                if _state([self, *(m for _, m in parts)]) != state:
                    raise Untraceable("its forward changes attributes")
            except Untraceable as error:
                found = str(error)
            if len(self._programs) >= 16:
                self._programs.clear()
            self._programs[state] = found
        return found

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
        reason = super().plain_reason()
        for step in program.pairs():
            if reason is None and step.pool is not None:
                reason = plain_reason(at(self, step.pool), step.pool, nn.MaxPool2d)
        for path in program.watched:
            if reason is None and not is_untouched(at(self, path)):
                reason = touched(path)
        return reason

    def accepts_deferred(self) -> bool:
        program = self.program()
        return not isinstance(program, str) and program.takes_deferred(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return (_new, (own_class(self),), *reduced[2:])

    def __getstate__(self) -> Any:
        return {**super().__getstate__(), "_programs": {}, "_functions": {}}


@torch.compiler.assume_constant_result
def _program_of(module: FusedByProgram) -> Program | str:
    return module._program()


_SIMPLE = (bool, int, float, str, type(None))
# no forward of a class's own decides by these
_OURS = {("_warned", True), ("memory", "exact"), ("memory", "recompute")}


def _state(modules: list[nn.Module]) -> tuple[Any, ...]:
    """What a forward may decide by: classes, modes, numbers and names, the children's classes."""
    return tuple(
        (
            type(m),
            tuple(i for i in m.__dict__.items() if type(i[1]) in _SIMPLE and i not in _OURS),
            tuple((name, type(child)) for name, child in m._modules.items()),
        )
        for m in modules
    )


def _settings(modules: list[tuple[str, nn.Module]]) -> Iterator[tuple[str, str, Any]]:
    """Their modes, numbers and names: path, attribute, value."""
    for path, module in modules:
        for name, value in module.__dict__.items():
            if type(value) in _SIMPLE and not name.startswith("_"):
                yield path, name, value


def _has(module: nn.Module, path: str) -> bool:
    for name in path.split("."):
        if not isinstance(module, nn.Module) or module._modules.get(name) is None:
            return False
        module = module._modules[name]  # type: ignore[assignment]
    return True


@functools.cache
def fused_class(cls: type[nn.Module]) -> type[FusedByProgram]:
    """The class of fused modules of that class; its forward has the same signature, for those who
    look at it.
    """

    @functools.wraps(cls.forward)
    def forward(self: FusedByProgram, *args: Any, **kwargs: Any) -> Any:
        return FusedByProgram.forward(self, *args, **kwargs)

    names = {
        "__module__": cls.__module__,
        "__qualname__": f"Fused{cls.__qualname__}",
        "forward": forward,
    }
    made: Any = ABCMeta(f"Fused{cls.__name__}", (FusedByProgram, cls), names)
    return made


def _is_fused_class(cls: type[FusedByProgram]) -> bool:
    """Whether no one else, as FSDP2, has put a class of theirs before it."""
    return cls.__mro__[1] is FusedByProgram


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before it was fused."""
    classes = type(module).__mro__
    return classes[classes.index(FusedByProgram) + 2]


def _new(cls: type[nn.Module]) -> nn.Module:
    """What copy and pickle begin with."""
    made = fused_class(cls)  # type: ignore[arg-type]
    return made.__new__(made)


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
    return type(module).forward is nn.Module.forward


def _tried(module: nn.Module, chains: list[str]) -> Program | str:
    """The Program that a module would have, or why it can have none."""
    cls = type(module)
    if cls.__module__.partition(".")[0] == "torch" and cls is not nn.Sequential:
        return f"{cls.__name__} is torch's own"
    if "forward" in module.__dict__:
        return "it has a forward of its own"
    try:
        fused = _convert(module, chains)
    except TypeError as error:  # a class whose objects cannot change theirs
        return str(error)
    try:
        return fused.program()
    finally:
        _restore(fused)


def _follow(module: nn.Module) -> None:
    """Find the Programs of both modes now, for a compiler can find none."""
    assert isinstance(module, FusedByProgram)
    parts = [module, *(at(module, path) for path in module._chains)]
    modes = [m.training for m in parts]
    try:
        for training in (True, False):
            for m in parts:
                m.training = training
            module.program()
    finally:
        for m, training in zip(parts, modes, strict=True):
            m.training = training


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
