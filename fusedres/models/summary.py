"""A model layer by layer, as Keras prints it: output shape, parameters, what feeds it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fusedres.models.layer_names import layer_names
from fusedres.nn import FromPixels, unfuse

# what a traced function, method or module is called in the table
_KINDS = {
    "relu": "ReLU",
    "add": "Add",
    "add_": "Add",
    "pad": "Pad",
    "flatten": "Flatten",
    "MaxPool2d": "MaxPool",
    "AdaptiveAvgPool2d": "AvgPool",
    "BatchNorm2d": "BatchNorm",
}
_COLORS = {"Conv2d": "#cfe2f3", "BatchNorm": "#fff2cc", "Add": "#d9ead3", "Linear": "#f4cccc"}
# what Keras calls a layer without weights: Applications by its place, the assignment by its number
_KERAS = {"relu": "conv1_relu", "maxpool": "pool1_pool", "avgpool": "avg_pool"}
_NUMBERED = {
    "ReLU": "activation",
    "Add": "add",
    "Pad": "zero_padding2d",
    "MaxPool": "max_pooling2d",
    "AvgPool": "avg_pool",
    "Flatten": "flatten",
}


@dataclass(frozen=True)
class Layer:
    """A row of the table.

    Attributes:
        name, kind: what it is called and what it does.
        output: (H, W, C) or (features,).
        parameters: numbers it holds, running statistics of BatchNorm among them, as Keras counts.
        inputs: names of the layers that feed it.
    """

    name: str
    kind: str
    output: tuple[int, ...]
    parameters: int
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Summary:
    """What `summary` returns; printing it gives the table.

    Attributes:
        title: model and input.
        layers: in the order they run, the input first.
        trainable, non_trainable: parameters that require gradients; other parameters and running
            statistics.
        conv_biases: what Keras's model has more: a bias for each convolution's output channel.
    """

    title: str
    layers: tuple[Layer, ...]
    trainable: int
    non_trainable: int
    conv_biases: int

    def __str__(self) -> str:
        header = ("layer (type)", "output shape", "parameters", "connected to")
        table = [header] + [
            (
                f"{layer.name} ({layer.kind})",
                _shape(layer.output),
                f"{layer.parameters:,}",
                ", ".join(layer.inputs),
            )
            for layer in self.layers
        ]
        widths = [max(len(row[i]) for row in table) for i in range(3)]
        lines = [
            f"{name:{widths[0]}}  {shape:{widths[1]}}  {count:>{widths[2]}}  {inputs}".rstrip()
            for name, shape, count, inputs in table
        ]
        rule = "-" * max(map(len, lines))
        totals = _totals(self.trainable, self.non_trainable)
        with_biases = _totals(self.trainable + self.conv_biases, self.non_trainable)
        return "\n".join(
            [
                self.title,
                rule,
                lines[0],
                rule,
                *lines[1:],
                rule,
                f"parameters: {totals}",
                f"as Keras counts, with its convolutions' biases ({self.conv_biases:,}): "
                f"{with_biases}",
            ]
        )

    def to_dot(self) -> str:
        """The network as a graph in Graphviz's language."""
        lines = [
            "digraph {",
            '  node [shape=box, style=filled, fillcolor=white, fontname="Helvetica", fontsize=10];',
            f'  label="{_escaped(self.title)}"; labelloc=t; fontname="Helvetica";',
        ]
        for layer in self.layers:
            text = r"\n".join(map(_escaped, (layer.name, layer.kind, _shape(layer.output))))
            color = _COLORS.get(layer.kind, "white")
            lines.append(f'  "{_escaped(layer.name)}" [label="{text}", fillcolor="{color}"];')
            lines += [
                f'  "{_escaped(source)}" -> "{_escaped(layer.name)}";' for source in layer.inputs
            ]
        return "\n".join([*lines, "}", ""])


def summary(model: nn.Module, input_size: tuple[int, int, int], naming: str = "torch") -> Summary:
    """A ResNet layer by layer, as it computes unfused.

    Args:
        model: a fusedres network; it is only read.
        input_size: (H, W, C) of one picture, H and W from 32 up.
        naming: "torch" for paths within the model, or one that `layer_names` knows.

    Returns:
        A printable table.

    Raises:
        ValueError: naming or input_size do not fit the model.
    """
    height, width, channels = input_size
    expected = model.get_submodule("conv1").in_channels
    if channels != expected or min(height, width) < 32:
        raise ValueError(
            f"summary: input_size: the model takes pictures (H, W, {expected}) from 32x32 up, got "
            f"{tuple(input_size)}"
        )
    names = {} if naming == "torch" else layer_names(model, naming)
    plain: Any = unfuse(copy.deepcopy(model).to("meta")).eval()
    plain.from_pixels = None  # the step in front of a network that takes pixels is no layer of it
    graph = fx.Tracer().trace(plain)
    shapes = _shapes(fx.GraphModule(plain, graph), (1, channels, height, width))
    name_of: dict[fx.Node, str] = {}
    layers = []
    name = _Namer(names, naming)
    for node in graph.nodes:
        if node not in shapes:  # the end of the graph, and arguments that are no tensors
            continue
        module = plain.get_submodule(node.target) if node.op == "call_module" else None
        kind = _kind(node, module)
        name_of[node] = name(node, kind)
        layers.append(
            Layer(
                name_of[node],
                kind,
                shapes[node],
                0 if module is None else sum(t.numel() for t in _numbers(module)),
                tuple(name_of[source] for source in node.all_input_nodes),
            )
        )
    modules = [m for m in model.modules() if not isinstance(m, FromPixels)]
    return Summary(
        f"{type(model).__name__}, input ({height}, {width}, {channels})",
        tuple(layers),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        sum(t.numel() for m in modules for t in _numbers(m) if not t.requires_grad),
        sum(m.out_channels for m in modules if isinstance(m, nn.Conv2d) and m.bias is None),
    )


def _shapes(traced: fx.GraphModule, input_size: tuple[int, ...]) -> dict[fx.Node, tuple[int, ...]]:
    """(H, W, C) or (features,) of every tensor that passes, for one picture [1, C, H, W]."""
    shapes: dict[fx.Node, tuple[int, ...]] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            out = super().run_node(n)
            if isinstance(out, Tensor) and n.op != "output":
                shapes[n] = (*out.shape[2:], out.shape[1])
            return out

    Recorder(traced).run(torch.empty(input_size, device="meta"))
    return shapes


def _numbers(module: nn.Module) -> Iterator[Tensor]:
    """A module's own parameters and running statistics."""
    yield from module.parameters(recurse=False)
    yield from (b for b in module.buffers(recurse=False) if b.is_floating_point())


def _kind(node: fx.Node, module: nn.Module | None) -> str:
    if node.op == "placeholder":
        return "Input"
    if module is not None:
        name = type(module).__name__
    else:
        name = node.target if isinstance(node.target, str) else node.target.__name__
    return _KINDS.get(name, name)


class _Namer:
    """Names the layers, one after the other as they run."""

    def __init__(self, weighted: dict[str, str], naming: str) -> None:
        self.weighted, self.naming = weighted, naming
        self.seen: Counter[str] = Counter()

    def __call__(self, node: fx.Node, kind: str) -> str:
        if kind == "Input":
            return "input" if self.naming == "torch" else "input_1"
        path = str(node.target) if node.op == "call_module" else ""
        if path in self.weighted:
            return self.weighted[path]
        if self.naming == "coursera":
            base = _NUMBERED.get(kind, kind.lower())
            self.seen[base] += 1
            return base if base == "avg_pool" else f"{base}_{self.seen[base]}"
        block = _block(node)
        if self.naming == "keras":
            return _KERAS.get(path) or self._in_keras_block(block, kind)
        return path or self._numbered(f"{block}.{kind.lower()}".lstrip("."))

    def _in_keras_block(self, block: str, kind: str) -> str:
        if not block.startswith("layer"):
            return self._numbered(kind.lower())
        stage, index = block.removeprefix("layer").split(".")
        prefix = f"conv{int(stage) + 1}_block{int(index) + 1}"
        if kind != "ReLU":
            return self._numbered(f"{prefix}_{kind.lower()}")
        self.seen[prefix] += 1
        return f"{prefix}_out" if self.seen[prefix] == 3 else f"{prefix}_{self.seen[prefix]}_relu"

    def _numbered(self, name: str) -> str:
        self.seen[name] += 1
        return name if self.seen[name] == 1 else f"{name}_{self.seen[name]}"


def _block(node: fx.Node) -> str:
    """Path of the innermost module whose forward a traced function stands in."""
    return next(reversed(node.meta.get("nn_module_stack", {"": None})))


def _shape(output: tuple[int, ...]) -> str:
    return str((None, *output))


def _totals(trainable: int, non_trainable: int) -> str:
    return (
        f"total {trainable + non_trainable:,}, trainable {trainable:,}, "
        f"non-trainable {non_trainable:,}"
    )


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
