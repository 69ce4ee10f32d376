"""What a forward reads of its modules while it is followed. What was found holds for as long as all
of that is the same.
"""

from __future__ import annotations

import contextlib
import functools
import random
import sys
import threading
import types
from collections import deque
from collections.abc import Hashable, Iterator
from enum import Enum
from typing import Any

import torch
from torch import Tensor, fx, nn

Reads = tuple[tuple[str, tuple[str, ...]], ...]  # paths of modules, names of their attributes

_SIMPLE = {bool, int, float, complex, str, bytes, type(None), type(...)}
_AS_IT_IS = (  # one of them is itself and does not change
    Enum, type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType,
    functools.partial, range, property, torch.dtype, torch.device, torch.layout,
    torch.memory_format, torch._ops.OpOverload, torch._ops.OpOverloadPacket,
)  # fmt: skip
ABSENT = object()
_MOST = 1000  # objects that are looked through


class Unwatchable(Exception):
    """Why it cannot be told whether something is the same later."""


class Recorder:
    """Takes down what one thread reads of the modules below a root, while it is switched on."""

    def __init__(self, root: nn.Module) -> None:
        self._thread = threading.get_ident()
        self._paths = {id(m): path for path, m in root.named_modules()}
        self._names: dict[str, dict[str, None]] = {}
        self._on = False

    def is_here(self) -> bool:
        """Whether this is the thread that is followed."""
        return threading.get_ident() == self._thread

    @contextlib.contextmanager
    def switched(self, on: bool) -> Iterator[None]:
        """On while a forward runs, off while torch.fx does."""
        before, self._on = self._on, on
        try:
            yield
        finally:
            self._on = before

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Every attribute of every module is read through here."""

        def read(module: nn.Module, name: str) -> Any:
            own = self._on and self.is_here() and not name.startswith("__")
            if own and sys._getframe(1).f_globals is not fx._symbolic_trace.__dict__:
                with self.switched(False):
                    self._note(module, name)
            return object.__getattribute__(module, name)

        nn.Module.__getattribute__ = read  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            del nn.Module.__getattribute__

    def note_path(self, path: str) -> None:
        """That of something that is called or taken by its path."""
        owner, _, name = path.rpartition(".")
        if name not in self._names.setdefault(owner, {}):
            self._names[owner][name] = None
            if owner:
                self.note_path(owner)

    def _note(self, module: nn.Module, name: str) -> None:
        path = self._paths.get(id(module))
        if path is None:
            raise Unwatchable(f"it reads {name} of a module that is not below it")
        value = _held(module, name)
        if not isinstance(value, Tensor):
            _kept(value, name, {})
        elif name not in module._parameters and name not in module._buffers:
            raise Unwatchable("it uses a tensor that is no parameter or buffer")
        self.note_path(f"{path}.{name}" if path else name)

    def reads(self) -> Reads:
        """All of it."""
        return tuple((path, tuple(names)) for path, names in self._names.items())


def state(root: nn.Module, reads: Reads) -> tuple[Any, ...]:
    """What is read now, in a form to compare.

    Raises:
        Unwatchable: something is no number, name, container, module or object of such.
    """
    seen: dict[int, int] = {}
    found: list[Any] = [torch.is_grad_enabled()]
    for path, names in reads:
        module: Any = root
        for name in path.split(".") if path else ():
            module = None if module is None else module._modules.get(name)
        if module is None:
            found.append(None)
            continue
        for name in names:
            value = _held(module, name)
            tensor = isinstance(value, Tensor)  # which one is looked up at each call
            found.append(Tensor if tensor else _kept(value, name, seen))
    return tuple(found)


def look(root: nn.Module, reads: Reads, numbers: tuple[float, ...]) -> None:
    """Has torch.compile see what is read: its graph then holds for as long as that is the same."""
    for path, names in reads:
        module: Any = root
        for name in path.split(".") if path else ():
            module = module._modules[name]
        for name in names:
            _look(getattr(module, name, None), numbers)


def _look(value: Any, numbers: tuple[float, ...]) -> None:
    if isinstance(value, nn.Module | Tensor):
        return
    if isinstance(value, int | float):
        for number in numbers:  # one by one: else it might become an input of the graph
            if value == number:
                break
    elif isinstance(value, dict):
        for part in value.values():
            _look(part, numbers)
    elif isinstance(value, tuple | list):
        for part in value:
            _look(part, numbers)
    elif not callable(value) and hasattr(value, "__dict__"):
        for part in vars(value).values():
            _look(part, numbers)


def numbers_in(found: Any) -> Iterator[float]:
    """All numbers in a state."""
    if isinstance(found, tuple):
        for part in found:
            yield from numbers_in(part)
    elif isinstance(found, int | float):
        yield found


def _held(module: nn.Module, name: str) -> Any:
    """An attribute, without running anything of the module's own."""
    place = place_of(module, name)
    return getattr(type(module), name, ABSENT) if place is None else place[name]


def place_of(module: nn.Module, name: str) -> dict[str, Any] | None:
    """Which of a module's dicts holds an attribute; None: its class does, or nobody."""
    own = module.__dict__
    places = (own, own["_modules"], own["_parameters"], own["_buffers"])
    return next((place for place in places if name in place), None)


def is_itself(value: Any) -> bool:
    """Whether a value cannot change but by being replaced, as far as a forward sees it."""
    return type(value) in _SIMPLE or isinstance(value, (nn.Module, *_AS_IT_IS))


def kept(module: nn.Module, name: str, seen: dict[int, int]) -> Any:
    """An attribute in a form to compare; `seen` is that of all that are compared together.

    Raises:
        Unwatchable: as `state` does.
    """
    return _kept(_held(module, name), name, seen)


def _kept(value: Any, name: str, seen: dict[int, int]) -> Any:
    kind: Any = type(value)
    if kind in _SIMPLE:
        return kind, value
    if isinstance(value, _AS_IT_IS) or value is ABSENT:
        return value
    known = id(value) in seen
    number = seen.setdefault(id(value), len(seen))  # tells what is one object twice
    if known or isinstance(value, nn.Module):
        return kind, number
    if number > _MOST:
        raise Unwatchable(f"it reads {name}, in which there is too much to watch")
    if isinstance(value, dict):
        parts = [*value.keys(), *value.values()]
    elif isinstance(value, tuple | list | set | frozenset | deque):
        parts = [*value]
    elif isinstance(value, random.Random | Tensor):
        raise Unwatchable(f"it reads {name}, with {kind.__name__} in it, which may change unseen")
    elif hasattr(value, "__dict__"):
        parts = [*vars(value).keys(), *vars(value).values()]
    elif isinstance(value, Hashable) and kind.__hash__ is not object.__hash__:
        return kind, value  # as a NumPy scalar
    else:
        raise Unwatchable(f"it reads {name}, with {kind.__name__} in it, which may change unseen")
    return kind, number, *(_kept(part, name, seen) for part in parts)


class Before:
    """What modules and the containers in them held, before a forward ran with what is no tensor."""

    def __init__(self, root: nn.Module) -> None:
        self._held: list[tuple[Any, Any]] = []
        taken: set[int] = set()
        waiting: list[Any] = [vars(module) for module in root.modules()]
        while waiting:
            container = waiting.pop()
            if id(container) not in taken:
                taken.add(id(container))
                self._held.append((container, list(_items(container))))
                parts = container.values() if isinstance(container, dict) else container
                waiting += (p for p in parts if isinstance(p, dict | list | set | deque))

    def restore(self) -> bool:
        """Put it back; whether anything had changed."""
        changed = False
        for container, items in self._held:
            now = list(_items(container))
            if len(now) == len(items) and all(map(_alike, now, items)):
                continue
            changed = True
            container.clear()
            (container.update if isinstance(container, dict | set) else container.extend)(items)
        return changed


def _items(container: Any) -> Any:
    return container.items() if isinstance(container, dict) else container


def _alike(a: Any, b: Any) -> bool:
    if type(a) is tuple and type(b) is tuple and len(a) == len(b):
        return all(map(_alike, a, b))
    return a is b or (type(a) is type(b) and type(a) in _SIMPLE and bool(a == b))
