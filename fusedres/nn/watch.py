"""What a frozen module's Program was bound to, and whether it is still so.

Asked in every call, of some hundred things, so all of it is in lists that are compared without a
line of Python for each.
"""

from __future__ import annotations

from itertools import repeat
from operator import attrgetter, is_
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fusedres.nn.program import Program, at
from fusedres.nn.reads import ABSENT, Reads, Unwatchable, is_itself, kept, place_of

_OF_CONV = ("stride", "padding", "dilation", "groups", "padding_mode")
_OF_POOL = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_VERSION = attrgetter("_version")


class Watch:
    """As it is when it is made.

    Args:
        owner: the module.
        program: what it runs.
        reads: what its forward read.
        everything: whether to look at all of its tensors, not at those of convolutions alone.

    Attributes:
        first: a weight, whose dtype and device are those of the model.
        channels: of the input; None where no convolution reads it.
    """

    def __init__(self, owner: nn.Module, program: Program, reads: Reads, everything: bool) -> None:
        self._places: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}
        self._tensors: list[Tensor] = []
        self._parts: list[tuple[nn.Module, str]] = []  # what has parts, which may change
        self._children: list[dict[str, Any]] = []
        self.channels: int | None = None
        modules = self._see_modules(owner, program)
        for module in owner.modules() if everything else ():
            for held in (module._parameters, module._buffers):
                self._see_tensors(held, tuple(held))
        for path, names in reads:
            module = at(owner, path) if path else owner
            for name in names if isinstance(module, nn.Module) else ():
                self._see_read(module, name)
        self.first = self._tensors[0]
        self._hooks = [
            hooks
            for m in modules
            for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)
        ]
        self._counted = [t for t in self._tensors if not t.is_inference()]
        # the memory stays, so that what comes in its place has another address
        self._memory = [t.detach() for t in self._tensors]
        self._own = [m.__dict__ for m in modules]
        places = self._places.values()
        self._where, self._names, self._what = ([p[i] for p in places] for i in range(3))
        self._seen = self._now()

    def changed(self) -> bool:
        """Whether a module, a tensor or what was read is another, or a tensor was written to."""
        get: Any = dict.get
        found = map(get, self._where, self._names, repeat(ABSENT))
        return not all(map(is_, found, self._what)) or self._now() != self._seen

    def touched(self) -> bool:
        """Whether a hook, or a forward of its own, sits on a module that no step calls."""
        everywhere = torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
        return bool(everywhere or any(self._hooks) or any("forward" in own for own in self._own))

    def _now(self) -> list[Any]:
        """What is compared by value."""
        seen: dict[int, int] = {}
        try:
            parts = [kept(module, name, seen) for module, name in self._parts]
        except Unwatchable:
            parts = [object()]  # equal to nothing
        return [
            [*map(_VERSION, self._counted)],
            [*map(Tensor.data_ptr, self._tensors)],
            [[*held.items()] for held in self._children],
            parts,
        ]

    def _see(self, where: dict[str, Any], name: str) -> None:
        self._places[id(where), name] = (where, name, where.get(name, ABSENT))

    def _see_tensors(self, held: dict[str, Any], names: tuple[str, ...]) -> None:
        for name in names:
            if held.get(name) is not None and (id(held), name) not in self._places:
                self._tensors.append(held[name])
            self._see(held, name)

    def _see_modules(self, owner: nn.Module, program: Program) -> list[nn.Module]:
        """What is bound, and modules that no step calls."""
        paths = list(program.watched)
        for step in program.pairs():
            paths += [path for path in (step.conv, step.bn, step.pool) if path]
            conv = at(owner, step.conv)
            self._see_tensors(conv._parameters, ("weight", "bias"))
            for name in _OF_CONV:
                self._see(vars(conv), name)
            for name in _OF_POOL if step.pool else ():
                self._see(vars(at(owner, str(step.pool))), name)
            if step.input == 0 and self.channels is None:
                self.channels = conv.in_channels
        for path in paths:
            parent, _, name = path.rpartition(".")
            self._see((at(owner, parent) if parent else owner)._modules, name)
        return [at(owner, path) for path in paths]

    def _see_read(self, module: nn.Module, name: str) -> None:
        place = place_of(module, name)
        if name == "_modules":
            self._children.append(module._modules)
        elif place is None:
            self._see(vars(module), name)
        elif is_itself(place[name]):
            self._see(place, name)
        elif not isinstance(place[name], Tensor):  # which one is looked up at each call
            self._parts.append((module, name))
