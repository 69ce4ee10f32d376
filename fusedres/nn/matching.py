"""From a graph of torch.fx to a Program: convolutions are found together with the BatchNorm,
residual add, ReLU and max pool behind them, and what each hands to its readers; the rest is called
as it is.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fusedres.nn.layers import kind_reason
from fusedres.nn.program import Add, Call, ConvBN, Program, Ref, Step

_RELUS: tuple[Callable[..., Any], ...] = (F.relu, torch.relu, torch.relu_)
_ADDS: tuple[Callable[..., Any], ...] = (operator.add, operator.iadd, torch.add)
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)

_IDENTITY = nn.Identity()  # what a BatchNorm becomes

_OPERATORS = set(dir(operator))
IN_PLACE = {n for n in _OPERATORS if n[:1] == "i" and {n[1:], f"{n[1:]}_"} & _OPERATORS}


class Untraceable(Exception):
    """Why a forward cannot be followed."""


def program_of(
    root: nn.Module,
    graph: fx.Graph,
    inlined: list[str],
    functions: dict[str, Callable[..., Any]],
    folds: bool = False,
    read: Collection[tuple[str, str]] = (),
) -> Program:
    """The Program of a graph with one input.

    Args:
        root: the module whose forward the graph is of.
        inlined: paths of the modules that the graph looked into.
        functions: takes what the Program calls by name.
        folds: BatchNorms are to go into their convolutions, which may have a bias, and need none.
        read: (path, attribute) of what the forward reads of modules without calling them.

    Raises:
        Untraceable: with the reason.
    """
    return _Reading(root, graph, inlined, functions, folds, read).program()


class _Reading:
    """One graph, read."""

    def __init__(
        self,
        root: nn.Module,
        graph: fx.Graph,
        inlined: list[str],
        functions: dict[str, Callable[..., Any]],
        folds: bool,
        read: Collection[tuple[str, str]],
    ) -> None:
        self._functions, self._folds, self._read = functions, folds, read
        self._modules = dict(root.named_modules(remove_duplicate=False))
        self._watched: list[str] = list(inlined)
        self._drop_identities(graph)
        self._nodes = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
        (self._x,) = (n for n in graph.nodes if n.op == "placeholder")
        (output,) = (n for n in graph.nodes if n.op == "output")
        if not isinstance(output.args[0], fx.Node):
            raise Untraceable("it returns more than one tensor")
        self._output: fx.Node = output.args[0]
        self._calls = Counter(id(self._called(n)) for n in self._nodes if n.op == "call_module")
        self._left: list[tuple[str, str]] = []
        self._value: dict[fx.Node, int] = {self._x: 0}  # numbers of values
        self._absorbed: set[fx.Node] = set()  # nodes that are part of another's step

    def program(self) -> Program:
        """The steps."""
        self._refuse_shared_changes()
        anchored: dict[fx.Node, Callable[[], Step]] = {}  # by the node at whose place it runs
        for node in self._nodes:
            if node in self._absorbed:
                continue
            if node.op == "call_module" and isinstance(self._called(node), nn.Conv2d):
                self._find_convolution(node, anchored)
        for node in self._nodes:
            if node not in self._absorbed and self._adds(node) and len(node.users) == 1:
                (user,) = node.users
                if self._is_relu(user) and user not in self._absorbed:
                    self._join(node, user, anchored)
        steps: list[Step] = []
        for node in self._nodes:
            if node in anchored:
                steps.append(anchored[node]())
            elif node not in self._absorbed:
                steps.append(self._call(node))
        output = self._of(self._output)
        return Program(
            tuple(_connected(steps, output)), output, tuple(self._watched), tuple(self._left)
        )

    def _drop_identities(self, graph: fx.Graph) -> None:
        for node in list(graph.nodes):
            if node.op == "call_module" and self._module(node, nn.Identity) is not None:
                self._watched.append(str(node.target))
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)

    # --- what a node is

    def _module(self, node: fx.Node, kind: type[nn.Module]) -> nn.Module | None:
        """The module that a node calls with one value, where it is of that very type."""
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            return None
        module = self._called(node)
        return module if type(module) is kind and isinstance(node.args[0], fx.Node) else None

    def _called(self, node: fx.Node) -> nn.Module:
        return self._modules[str(node.target)]

    def _is_relu(self, node: fx.Node) -> bool:
        if node.op == "call_function":
            return node.target in _RELUS and set(node.kwargs) <= {"inplace"}
        if node.op == "call_method":
            return node.target in ("relu", "relu_")
        return self._module(node, nn.ReLU) is not None

    def _adds(self, node: fx.Node) -> bool:
        """Whether a node adds two values, and changes none that somebody else may hold."""
        first = node.args[0] if _is_add(node) else None
        if not isinstance(first, fx.Node) or not self._changes(node):
            return first is not None
        return first.op == "call_module" or self._is_relu(first)

    def _joins(self, conv: fx.Node, add: fx.Node) -> bool:
        """Whether an add can take a convolution in, which then runs in its place: not where what is
        called before may change the convolution's input.
        """
        if not self._adds(add):
            return False
        between = self._nodes[self._nodes.index(conv) + 1 : self._nodes.index(add)]
        readers = [n for n in between if conv.args[0] in n.all_input_nodes]
        return all(
            n.op == "call_module" and isinstance(self._called(n), nn.Conv2d) for n in readers
        )

    def _only_user(self, node: fx.Node) -> fx.Node | None:
        return next(iter(node.users)) if len(node.users) == 1 else None

    # --- what belongs together

    def _find_convolution(self, node: fx.Node, anchored: dict[fx.Node, Callable[[], Step]]) -> None:
        """The step of a convolution, or the reason why it is called as it is."""
        name, norm = str(node.target), self._norm_of(node)
        reason = self._reason(node, norm)
        if self._folds and norm is not None and reason is not None:
            norm, reason = None, self._reason(node, None)
        if reason is not None:
            self._left.append((name, reason))
            return
        nodes = [node] if norm is None else [node, norm]
        residual, add, relu, pool = None, None, None, None
        behind = self._only_user(nodes[-1])
        if behind is not None and behind not in self._absorbed and self._joins(node, behind):
            residual = next(a for a in behind.args if a is not nodes[-1])
            add = behind
            nodes.append(behind)
        relu = self._only_user(nodes[-1])
        if relu is not None and self._is_relu(relu):
            nodes.append(relu)
            pool = self._only_user(relu)
            if residual is None and pool is not None and self._pools(pool):
                nodes.append(pool)
            else:
                pool = None
        else:
            relu = None
        self._absorbed.update(nodes)
        self._watched += [
            str(n.target) for n in nodes if n.op == "call_module" and n not in (node, norm, pool)
        ]
        out = self._number(nodes)

        def step() -> Step:
            return ConvBN(
                out,
                (),
                self._of(node.args[0]),
                name,
                "" if norm is None else str(norm.target),
                None if residual is None else self._of(residual),
                relu is not None,
                None if pool is None else str(pool.target),
                False,
                None,
                False,
                False,
            )

        anchored[node if add is None else add] = step

    def _norm_of(self, conv: fx.Node) -> fx.Node | None:
        """The BatchNorm that alone reads a convolution."""
        norm = self._only_user(conv)
        if norm is None or norm.op != "call_module":
            return None
        return norm if isinstance(self._called(norm), nn.modules.batchnorm._BatchNorm) else None

    def _reason(self, conv: fx.Node, norm: fx.Node | None) -> str | None:
        """Why a convolution, and the BatchNorm that follows, are called as they are."""
        name, module = str(conv.target), self._called(conv)
        if norm is None and not self._folds:
            return f"no BatchNorm follows {name}"
        reason = kind_reason(module, name, nn.Conv2d, biased=self._folds)
        return reason or self._pair_reason(conv, norm)

    def _pair_reason(self, conv: fx.Node, norm: fx.Node | None) -> str | None:
        """The same, where it is not what the convolution is."""
        parameters = self._called(conv)._parameters
        if self._folds and not {"weight", "bias"} <= parameters.keys():
            return f"{conv.target} computes its weight, as weight_norm or pruning has it"
        if norm is None:
            if self._module(conv, type(self._called(conv))) is None:
                return f"{conv.target} is called with more than its input"
            once = self._calls[id(self._called(conv))] == 1
            return None if once else f"{conv.target} is called more than once"
        bn: Any = self._called(norm)
        if type(bn) not in _NORMS:
            return f"{norm.target} is a {type(bn).__name__}"
        if self._folds and bn.running_mean is None:
            return f"{norm.target} tracks no statistics"
        for path, name in self._read if self._folds else ():
            if (path == norm.target and not hasattr(_IDENTITY, name)) or (
                path == conv.target and name in ("weight", "bias")
            ):
                return f"{path}.{name} is read beside"
        if any(self._module(n, type(self._called(n))) is None for n in (conv, norm)):
            return f"{conv.target} or {norm.target} is called with more than its input"
        if any(self._calls[id(self._called(n))] > 1 for n in (conv, norm)):
            return f"{conv.target} or {norm.target} is called more than once"
        return None

    def _pools(self, node: fx.Node) -> bool:
        pool = self._module(node, nn.MaxPool2d)
        return pool is not None and kind_reason(pool, "", nn.MaxPool2d) is None

    def _join(
        self, add: fx.Node, relu: fx.Node, anchored: dict[fx.Node, Callable[[], Step]]
    ) -> None:
        self._absorbed |= {add, relu}
        if relu.op == "call_module":
            self._watched.append(str(relu.target))
        out = self._number([add, relu])
        a, b = add.args
        anchored[add] = lambda: Add(out, (), self._of(a), self._of(b))

    def _call(self, node: fx.Node) -> Step:
        kind = node.op.removeprefix("call_").replace("get_attr", "attribute")
        args = self._argument(tuple(node.args))
        kwargs = self._argument(tuple(node.kwargs.items()))
        target = str(node.target)
        if kind == "function":
            function: Any = node.target
            target = f"{function.__module__}.{function.__name__}"
            if self._functions.setdefault(target, function) is not function:
                raise Untraceable(f"it calls two functions by the name of {target}")
        return Call(self._number([node]), (), kind, target, args, kwargs, "no")

    def _argument(self, a: Any) -> Any:
        """An argument with what stands for values in place of nodes."""
        if isinstance(a, fx.Node):
            return Ref(self._of(a))
        if isinstance(a, tuple | list):
            return (tuple if isinstance(a, tuple) else list)(map(self._argument, a))
        if isinstance(a, dict):
            return {key: self._argument(value) for key, value in a.items()}
        if isinstance(a, slice):
            return slice(*(self._argument(part) for part in (a.start, a.stop, a.step)))
        return a

    # --- values

    def _number(self, nodes: list[fx.Node]) -> int:
        number = 1 + max(self._value.values())
        self._value.update(dict.fromkeys(nodes, number))
        return number

    def _of(self, node: Any) -> int:
        return self._value[node]

    def _refuse_shared_changes(self) -> None:
        for node in self._nodes:
            changed = node.args[0] if node.args and self._changes(node) else None
            if isinstance(changed, fx.Node) and len(changed.users) > 1:
                raise Untraceable(f"{node.target} changes in place what others read")

    def _changes(self, node: fx.Node) -> bool:
        """Whether a node changes its first argument."""
        if node.op == "call_module":
            return bool(getattr(self._called(node), "inplace", False))
        name = str(getattr(node.target, "__name__", node.target))
        in_place = name.endswith("_") and not name.endswith("__")
        if node.op == "call_function" and not in_place:
            in_place = getattr(operator, name, None) is node.target and name in IN_PLACE
            in_place |= bool(node.kwargs.get("inplace")) or any(a is True for a in node.args[1:])
        return in_place


def _is_add(node: fx.Node) -> bool:
    """Whether a node adds two different values."""
    if node.op == "call_function":
        known = node.target in _ADDS
    else:
        known = node.op == "call_method" and node.target in ("add", "add_")
    if not known or node.kwargs or len(node.args) != 2:
        return False
    a, b = node.args
    return isinstance(a, fx.Node) and isinstance(b, fx.Node) and a is not b


def _connected(steps: list[Step], output: int) -> Iterable[Step]:
    """The steps, with what each has to know of the others."""
    readers: dict[int, list[int]] = {}
    for i, step in enumerate(steps):
        for value in step.reads():
            readers.setdefault(value, []).append(i)
    readers.setdefault(output, []).append(len(steps))
    for i, step in enumerate(steps):
        frees = tuple(v for v in {*step.reads(), step.out} if readers.get(v, [i])[-1] == i)
        step = step._replace(frees=frees)
        if isinstance(step, ConvBN):
            later = [j for j in readers[step.input] if j > i]
            step = step._replace(
                shared=bool(later),
                reader=_only_convolution(steps, later, step.input),
                ends=step.residual is not None
                or _only_added(steps, readers.get(step.out, []), step.out),
                settles=_called_later(steps, readers, step.residual, i),
            )
        elif isinstance(step, Call) and step.kind == "module" and step.is_plain():
            changes = _called_later(steps, readers, step.args[0].value, i)
            handed = "no" if changes else _hand_over(steps, readers.get(step.out, []), step.out)
            step = step._replace(hands_over=handed)
        yield step


def _called_later(
    steps: list[Step], readers: dict[int, list[int]], value: int | None, i: int
) -> bool:
    """Whether a value is given to something that is called later, and may change it in place."""
    later = [] if value is None else [j for j in readers[value] if i < j < len(steps)]
    return any(isinstance(steps[j], Call) for j in later)


def _only_added(steps: list[Step], readers: list[int], value: int) -> bool:
    """Whether a value is read by a residual add and nothing else."""
    reader = steps[readers[0]] if len(readers) == 1 and readers[0] < len(steps) else None
    return isinstance(reader, Add) or (isinstance(reader, ConvBN) and reader.residual == value)


def _only_convolution(steps: list[Step], later: list[int], value: int) -> str | None:
    """The convolution that alone reads a value later."""
    if len(later) != 1 or later[0] == len(steps):
        return None
    step = steps[later[0]]
    if isinstance(step, ConvBN) and step.input == value and step.pool is None:
        return step.conv
    return None


def _hand_over(steps: list[Step], readers: list[int], value: int) -> str:
    """Whether the readers of a called module's result can take a Deferred."""
    if not readers:
        return "no"
    first = readers[0]
    if first == len(steps):
        return "asked"
    step = steps[first]
    if isinstance(step, ConvBN):
        return "yes" if step.input == value and step.residual != value else "no"
    takes = isinstance(step, Call) and step.kind == "module" and step.is_plain()
    return "yes" if takes and len(readers) == 1 else "no"
