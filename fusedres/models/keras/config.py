"""What the configuration of a saved network says: whether it is a ResNet of ours, and the details
in which ResNets differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from fusedres.models.keras.files import Layer, RefusedError, first_line

_CONVS = ("Conv2D", "Convolution2D")
_IDLE = {  # in inference they hand on what they get, or they only change its shape
    "InputLayer", "Dropout", "SpatialDropout2D", "GaussianNoise", "GaussianDropout", "AlphaDropout",
    "ActivityRegularization", "Flatten", "Reshape", "GlobalAveragePooling2D", "AveragePooling2D",
}  # fmt: skip
_OPS = {"__operators__.add", "math.add", "nn.relu"}  # of TensorFlow, in Keras 2
_KNOWN = {*_CONVS, *_IDLE, "BatchNormalization", "ZeroPadding2D", "Add", "Relu", "Dense"}
_GROUPS = {"Conv2D": "conv2d", "BatchNormalization": "batch_normalization", "Dense": "dense"}


class Node(NamedTuple):
    """A layer of a configuration: its name, class, options, and the names of those it reads."""

    name: str
    kind: str
    options: Mapping[str, Any]
    inputs: tuple[str, ...]

    def get(self, *names: str) -> Any:
        """An option, which Keras 1 has by another name."""
        return next((self.options[name] for name in names if name in self.options), None)

    def pair(self, *names: str) -> tuple[int, int]:
        """An option of two numbers."""
        first, second = self.get(*names)
        return int(first), int(second)


Nodes = dict[str, Node]


def read_nodes(prefix: str, config: Any) -> Nodes:
    """The layers of a configuration, those of models within it too; none where it lists none.

    Raises:
        RefusedError: it is no configuration of Keras's.
    """
    try:
        layers = _listed(config) or []  # a class of one's own lists none
        return {node.name: node for layer in layers for node in _nodes(layer)}
    except (TypeError, KeyError, ValueError, AttributeError, RecursionError) as error:
        raise _unlike(prefix, error) from None


def _unlike(prefix: str, error: Exception) -> RefusedError:
    return RefusedError(
        f"{prefix}: its configuration is not as Keras writes it ({type(error).__name__}: "
        f"{first_line(error)})"
    )


def _listed(config: Any) -> list[Any] | None:
    """The layers of a model, which may be one among those of another."""
    options = config["config"]
    layers = options if isinstance(options, list) else options.get("layers")
    return layers if isinstance(layers, list) else None


def _nodes(config: Any) -> Iterator[Node]:
    layers = _listed(config)
    if layers is None:
        name = config.get("name") or config["config"]["name"]
        inputs = tuple(_names_in(config.get("inbound_nodes", [])))
        yield Node(str(name), str(config["class_name"]), config["config"], inputs)
    for layer in layers or []:
        yield from _nodes(layer)


def _names_in(nodes: Any) -> Iterator[str]:
    """Layers that inbound nodes name: ["conv1", 0, 0, {}], or under keras_history since Keras 3."""
    if isinstance(nodes, dict):
        for key, value in nodes.items():
            if key == "keras_history":
                yield str(value[0])
            else:
                yield from _names_in(value)
    elif isinstance(nodes, list):
        named = len(nodes) >= 3 and isinstance(nodes[0], str) and isinstance(nodes[1], int)
        if named:
            yield nodes[0]
        else:
            for value in nodes:
                yield from _names_in(value)


def renamed(layers: Sequence[Layer], nodes: Nodes) -> list[Layer]:
    """Layers by the names that the configuration has for them, where a file calls groups by the
    class and counts: in the order of the configuration.
    """
    if any(layer.named for layer in layers):
        return list(layers)
    counts: dict[str, int] = {}
    names: dict[str, str] = {}
    for node in nodes.values():
        group = _GROUPS.get(node.kind)
        if group is not None:
            count = counts[group] = counts.get(group, -1) + 1
            names[f"{group}_{count}" if count else group] = node.name
    return [layer._replace(name=names.get(layer.name, layer.name)) for layer in layers]


def check_classes(prefix: str, nodes: Nodes) -> None:
    """Raises RefusedError for layers that no ResNet of ours has."""
    for node in nodes.values():
        reason = _reason(node)
        if reason:
            raise RefusedError(
                f"{prefix} is of a network that fusedres does not have: layer {node.name!r} "
                f"{reason}"
            )


def _reason(node: Node) -> str:
    """What is not ours in a layer by itself, or ""."""
    kind, act = node.kind, node.get("activation")
    if kind == "Activation":
        allowed = ("relu", "linear", "softmax", "sigmoid")
        return "" if act in allowed else f"is the activation {act!r}, not relu"
    if kind == "ReLU":
        odd = [k for k in ("max_value", "negative_slope", "threshold") if node.get(k)]
        return f"is a ReLU with {odd[0]} {node.get(odd[0])!r}" if odd else ""
    if kind in _CONVS:
        return _reason_of_conv(node, act)
    if kind == "BatchNormalization":
        off = [k for k in ("scale", "center") if node.get(k) is False]
        return f"is a BatchNorm with {off[0]}=False" if off else ""
    if kind == "Dense":
        return "" if act in (None, "linear", "softmax", "sigmoid") else f"has activation {act!r}"
    if kind == "MaxPooling2D":
        sizes = node.pair("pool_size"), node.pair("strides")
        return "" if sizes == ((3, 3), (2, 2)) else f"pools {sizes[0]} at stride {sizes[1]}"
    if kind == "TFOpLambda":
        function = node.get("function")
        return "" if function in _OPS else f"is the operation {function!r}"
    if kind == "Rescaling":
        return (
            "rescales the images; save the weights alone, and say by variant and preprocess what "
            "the network is"
        )
    known = kind in _KNOWN or kind.startswith("Random")  # augmentation, in training alone
    known |= kind == "Merge" and node.get("mode") == "sum"
    return "" if known else f"is a {kind}"


def _reason_of_conv(node: Node, act: Any) -> str:
    if act not in (None, "linear"):
        return f"has activation {act!r} before its BatchNorm"
    dilation = node.get("dilation_rate")
    if dilation is not None and node.pair("dilation_rate") != (1, 1):
        return f"is dilated by {dilation}"
    return ""


def biases(nodes: Nodes) -> dict[str, bool]:
    """By name, whether a convolution has a bias."""
    said = {n.name: n.get("use_bias", "bias") for n in nodes.values() if n.kind in _CONVS}
    return {name: bool(value) for name, value in said.items() if value is not None}


def classifiers(nodes: Nodes) -> list[str]:
    """Names of Dense layers."""
    return [node.name for node in nodes.values() if node.kind == "Dense"]


def details(prefix: str, nodes: Nodes, places: Mapping[str, str]) -> dict[str, Any]:
    """stride_in_1x1, eps, momentum (in torch's sense) and stem_pool_padding, of a network whose
    layers' paths are known.

    Args:
        places: {Keras's name: path within the model}.

    Raises:
        RefusedError: strides, padding or connections that no variant has, BatchNorms that differ.
    """
    try:
        named = {places[node.name]: node for node in nodes.values() if node.name in places}
        _check_connections(prefix, nodes, places)
        return {
            "stride_in_1x1": _stride_in_1x1(prefix, named),
            "eps": _agreed(prefix, named, "epsilon"),
            # Keras's is the weight of the old average
            "momentum": round(1 - _agreed(prefix, named, "momentum"), 12),
            "stem_pool_padding": _paddings(prefix, nodes, named),
        }
    except RefusedError:
        raise
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise _unlike(prefix, error) from None


def _agreed(prefix: str, named: Mapping[str, Node], option: str) -> float:
    """An option that all BatchNorms have alike."""
    values = {float(n.get(option)) for n in named.values() if n.kind == "BatchNormalization"}
    if len(values) != 1:
        shown = ", ".join(f"{value:g}" for value in sorted(values))
        raise RefusedError(
            f"{prefix}: its BatchNorms differ in {option} ({shown}); accepted: one for all, or a "
            "variant that says what they have"
        )
    return values.pop()


def _stride_in_1x1(prefix: str, named: Mapping[str, Node]) -> bool:
    """Where the first block of stages 2 to 4 has its stride."""
    strides = {
        path: node.pair("strides", "subsample")
        for path, node in named.items()
        if node.kind in _CONVS
    }
    for in_1x1 in (True, False):
        twos = {"conv1"} | {f"layer{i}.0.downsample.0" for i in (2, 3, 4)}
        twos |= {f"layer{i}.0.conv{1 if in_1x1 else 2}" for i in (2, 3, 4)}
        if all(stride == ((2, 2) if path in twos else (1, 1)) for path, stride in strides.items()):
            return in_1x1
    seen = ", ".join(
        f"{named[path].name} {stride}" for path, stride in strides.items() if stride != (1, 1)
    )
    raise RefusedError(
        f"{prefix} has strides that no variant has ({seen}); accepted: 2 in the first convolution, "
        "and in the first blocks of stages 2 to 4 in the shortcut and the first or second one"
    )


def _paddings(prefix: str, nodes: Nodes, named: Mapping[str, Node]) -> int:
    """That of the max pool; others are looked at."""
    for path, node in named.items():
        wide = node.kind in _CONVS and (path == "conv1" or path.endswith("conv2"))
        if wide:
            size = 3 if path == "conv1" else 1
            same = node.get("padding", "border_mode") == "same"
            strided = node.pair("strides", "subsample") != (1, 1)
            if strided if same else _zeros(nodes, node) != size:
                what = "'same' at a stride" if same else f"{_zeros(nodes, node)} zeros"
                raise RefusedError(
                    f"{prefix}: layer {node.name!r} is padded by {what}; accepted: {size} on every "
                    "side"
                )
    pools = [node for node in nodes.values() if node.kind == "MaxPooling2D"]
    if len(pools) != 1:
        raise RefusedError(f"{prefix} has {len(pools)} max pools; accepted: the stem's")
    (pool,) = pools
    zeros = _zeros(nodes, pool)
    if pool.get("padding", "border_mode") == "same" or zeros not in (0, 1):
        raise RefusedError(
            f"{prefix}: its max pool {pool.name!r} is padded by "
            f"{'same' if zeros == 0 else zeros}; accepted: nothing or 1 on every side"
        )
    return int(zeros)


def _zeros(nodes: Nodes, node: Node) -> Any:
    """How many a ZeroPadding2D in front of a layer puts on every side."""
    before = [nodes[name] for name in node.inputs if name in nodes]
    if len(before) != 1 or before[0].kind != "ZeroPadding2D":
        return 0
    padding = before[0].get("padding")
    flat = [n for side in padding for n in (side if isinstance(side, Sequence) else [side])]
    return flat[0] if len(set(flat)) == 1 else padding


def _check_connections(prefix: str, nodes: Nodes, places: Mapping[str, str]) -> None:
    """Each BatchNorm behind its convolution, each shortcut beside its block's first one."""
    by_path = {path: name for name, path in places.items()}
    for path, name in by_path.items():
        node = nodes.get(name)
        if node is None or not node.inputs:
            continue
        before = node.inputs
        if node.kind == "BatchNormalization":
            conv = path.replace("downsample.1", "downsample.0").replace("bn", "conv")
            before = (by_path[conv],) if conv in by_path else before
        elif path.endswith("downsample.0"):
            first = nodes.get(by_path.get(path.replace("downsample.0", "conv1"), ""))
            before = before if first is None else first.inputs
        if node.inputs != before:
            raise RefusedError(
                f"{prefix}: layer {name!r} reads {', '.join(node.inputs)}, where fusedres has it "
                f"read {', '.join(before)}"
            )
