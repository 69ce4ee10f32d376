"""Files as Keras 1, 2 and 3 write them, of ResNets, by h5py alone."""

from __future__ import annotations

import io
import json
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch
from torch import nn

from fusedres.models import layer_names

VERSION = "3.15.1"
ROLES = {
    "Conv2D": ("kernel", "bias"),
    "Dense": ("kernel", "bias"),
    "BatchNormalization": ("gamma", "beta", "moving_mean", "moving_variance"),
}
KERAS_1 = {"kernel": "W", "bias": "b", "moving_mean": "running_mean"}
KERAS_1 |= {"moving_variance": "running_std"}
SNAKE = {  # classes, as groups and automatic names have them
    "Conv2D": "conv2d",
    "BatchNormalization": "batch_normalization",
    "Dense": "dense",
    "Activation": "activation",
    "Add": "add",
    "InputLayer": "input_layer",
    "ZeroPadding2D": "zero_padding2d",
    "MaxPooling2D": "max_pooling2d",
    "GlobalAveragePooling2D": "global_average_pooling2d",
    "AveragePooling2D": "average_pooling2d",
    "Flatten": "flatten",
}

Arrays = dict[str, np.ndarray]


class Item(NamedTuple):
    """A layer of Keras's: class, name, options, what it reads, and the path of ours, if any."""

    cls: str
    name: str
    options: dict[str, Any]
    inputs: tuple[str, ...]
    path: str


class Names:
    """Names of a network's layers, given or automatic."""

    def __init__(self, model: nn.Module, naming: str, start: int = 0, step: int = 1) -> None:
        self._given = {} if naming == "automatic" else layer_names(model, naming)
        self._counts: Counter[str] = Counter()
        self._start, self._step = start, step

    def __call__(self, cls: str, path: str = "", given: str = "") -> str:
        name = given or self._given.get(path, "")
        if name:
            return name
        count = self._start + self._step * self._counts[cls]
        self._counts[cls] += 1
        return f"{SNAKE[cls]}_{count}" if count else SNAKE[cls]


def network(
    model: Any, naming: str, *, order: str = "abcs", start: int = 0, step: int = 1
) -> list[Item]:
    """The layers of a ResNet of ours in the order of Keras's model.layers, by their depth.

    Args:
        order: in which a block's convolutions are made, s being the shortcut.
        start, step: of automatic numbers.
    """
    names = Names(model, naming, start, step)
    app = naming == "keras"
    items: list[Item] = []

    def add(cls: str, inputs: Sequence[str], path: str = "", given: str = "", **more: Any) -> Any:
        name = names(cls, path, given)
        items.append(Item(cls, name, more, tuple(inputs), path))
        return name

    def norm(path: str, source: str) -> str:
        bn = model.get_submodule(path)
        details = {"epsilon": bn.eps, "momentum": round(1 - bn.momentum, 12)}
        return add("BatchNormalization", [source], path, axis=3, **details)

    def conv(path: str, source: str, padding: str = "valid") -> str:
        own = model.get_submodule(path)
        options = {"strides": list(own.stride), "padding": padding, "use_bias": True}
        return add("Conv2D", [source], path, activation="linear", **options)

    def relu(source: str, given: str = "") -> str:
        return add("Activation", [source], given=given if app else "", activation="relu")

    def zeros(source: str, count: int, given: str) -> str:
        return add("ZeroPadding2D", [source], given=given if app else "", padding=[[count] * 2] * 2)

    shape = [None, None, None, model.conv1.in_channels]
    h = add("InputLayer", [], batch_shape=shape)
    h = norm("bn1", conv("conv1", zeros(h, 3, "conv1_pad")))
    h = relu(h, "conv1_relu")
    if model.maxpool.padding:
        h = zeros(h, 1, "pool1_pad")
    pool = {"pool_size": [3, 3], "strides": [2, 2], "padding": "valid"}
    h = add("MaxPooling2D", [h], given="pool1_pool" if app else "", **pool)
    for stage in range(1, 5):
        for b, block in enumerate(getattr(model, f"layer{stage}")):
            at, begin = f"layer{stage}.{b}", len(items)
            source, first = h, f"conv{stage + 1}_block{b + 1}"
            ends: dict[str, str] = {}
            for part in order if block.downsample is not None else order.replace("s", ""):
                if part == "s":
                    ends[part] = norm(f"{at}.downsample.1", conv(f"{at}.downsample.0", source))
                    continue
                k = "abc".index(part) + 1
                h = conv(f"{at}.conv{k}", h, "same" if k == 2 else "valid")
                h = ends[part] = norm(f"{at}.bn{k}", h)
                h = h if k == 3 else relu(h, f"{first}_{k}_relu")
            both = [ends["c"], ends.get("s", source)]
            items[begin:] = _by_depth(items[begin:], at, "sc" if app else "cs")
            h = add("Add", both[::-1] if app else both, given=f"{first}_add" if app else "")
            h = relu(h, f"{first}_out")
    if model.num_classes:
        h = add("GlobalAveragePooling2D", [h], given="avg_pool")
        add("Dense", [h], "fc", activation="softmax", use_bias=True)
    return items


def _by_depth(items: list[Item], at: str, last: str) -> list[Item]:
    """A block's layers: the shortcut beside the last convolution."""
    tails = {"c": (f"{at}.conv3", f"{at}.bn3"), "s": (f"{at}.downsample.0", f"{at}.downsample.1")}
    by_path = {item.path: item for item in items}
    ends = [tails[part][i] for i in (0, 1) for part in last]
    rest = [item for item in items if item.path not in ends]
    return rest + [by_path[path] for path in ends if path in by_path]


def arrays_of(
    model: nn.Module, items: Sequence[Item], dtype: Any = np.float32, bias: bool = True
) -> dict[str, Arrays]:
    """Arrays by layer, for which a network computes what the model does; convolutions have biases,
    which BatchNorms take away again.
    """
    state = {key: value.double().numpy() for key, value in model.state_dict().items()}
    rng = np.random.default_rng(0)
    biases = {item.path: rng.integers(-8, 9, w) / 16 for item, w in _widths(items, state) if bias}
    found: dict[str, Arrays] = {}
    for item in items:
        path = item.path
        if item.cls == "Conv2D":
            arrays = {"kernel": state[f"{path}.weight"].transpose(2, 3, 1, 0)}
            arrays |= {"bias": biases[path]} if bias else {}
        elif item.cls == "Dense":
            arrays = {"kernel": state[f"{path}.weight"].T, "bias": state[f"{path}.bias"]}
        elif item.cls == "BatchNormalization":
            conv = path.replace("bn", "conv").replace("downsample.1", "downsample.0")
            keys = ("weight", "bias", "running_mean", "running_var")
            arrays = {
                role: state[f"{path}.{key}"]
                for role, key in zip(ROLES[item.cls], keys, strict=True)
            }
            arrays["moving_mean"] = arrays["moving_mean"] + biases.get(conv, 0)
        else:
            continue
        found[item.name] = {role: a.astype(dtype) for role, a in arrays.items()}
    return found


def _widths(items: Sequence[Item], state: Mapping[str, Any]) -> Iterator[tuple[Item, int]]:
    for item in items:
        if item.cls == "Conv2D":
            yield item, state[f"{item.path}.weight"].shape[0]


# --- configurations -------------------------------------------------------------------------------


def config_of(items: Sequence[Item], keras: int = 3) -> dict[str, Any]:
    """A functional model's, with what is of interest in it."""
    layers = [_entry(item, keras) for item in items]
    return {"class_name": "Functional", "config": {"name": "functional", "layers": layers}}


def _entry(item: Item, keras: int) -> dict[str, Any]:
    inbound: list[Any] = []
    if item.inputs and keras == 3:
        tensors = [
            {"class_name": "__keras_tensor__", "config": {"keras_history": [name, 0, 0]}}
            for name in item.inputs
        ]
        inbound = [{"args": tensors if len(tensors) == 1 else [tensors], "kwargs": {}}]
    elif item.inputs:
        inbound = [[[name, 0, 0, {}] for name in item.inputs]]
    config = {"name": item.name, "trainable": True, **item.options}
    return {"class_name": item.cls, "config": config, "name": item.name, "inbound_nodes": inbound}


def nested(items: Sequence[Item], keras: int = 3) -> dict[str, Any]:
    """Of a model with such a one as a layer, and a Dense behind it."""
    inner = config_of(items, keras)
    inner["inbound_nodes"] = _entry(_of("x", ["input"]), keras)["inbound_nodes"]
    inner["name"] = "functional"
    layers = [_entry(_of("input", [], "InputLayer"), keras), inner]
    layers.append(_entry(_of("head", ["functional"], "Dense"), keras))
    return {"class_name": "Functional", "config": {"name": "outer", "layers": layers}}


def _of(name: str, inputs: Sequence[str], cls: str = "Activation") -> Item:
    return Item(cls, name, {"activation": "linear"}, tuple(inputs), "")


# --- files ----------------------------------------------------------------------------------------


def write_legacy(
    path: Path,
    items: Sequence[Item],
    arrays: Mapping[str, Arrays],
    *,
    keras: int = 3,
    whole: bool = True,
    config: Any = None,
    suffix: str = "",
    inside: str = "",
    optimizer: bool = True,
) -> Path:
    """HDF5 as model.save and, in Keras 1 and 2, save_weights write it.

    Args:
        keras: whose names arrays have.
        whole: or weights alone.
        config: for model_config; None for none.
        suffix: what Keras 1 and TensorFlow add to an array's name that they have already.
        inside: the layer, of a model as a layer, that the items are in; a Dense is outside.
        optimizer: with an optimizer's state.
    """
    with h5py.File(path, "w") as file:
        group = file.create_group("model_weights") if whole else file
        if config is not None:
            file.attrs["model_config"] = json.dumps(config).encode()
            file.attrs["backend"], file.attrs["keras_version"] = "torch", VERSION
        layers: dict[str, list[Item]] = {}
        for item in items:
            outside = not inside or item.cls == "Dense"
            layers.setdefault(item.name if outside else inside, []).append(item)
        group.attrs["layer_names"] = [name.encode() for name in layers]
        group.attrs["backend"], group.attrs["keras_version"] = "torch", VERSION
        for layer, of in layers.items():
            one = group.create_group(layer)
            names = []
            for item in of:
                for role, array in arrays.get(item.name, {}).items():
                    names.append(_name(item.name, role, keras, suffix))
                    one[names[-1]] = array
            one.attrs["weight_names"] = [name.encode() for name in names]
        if keras > 1:
            group.create_group("top_level_model_weights").attrs["weight_names"] = []
        if whole and optimizer:
            state = file.create_group("optimizer_weights")
            state.attrs["weight_names"] = [b"adam/m"]
            state["adam/m"] = np.zeros(3)
    return path


def _name(layer: str, role: str, keras: int, suffix: str) -> str:
    if keras == 1:
        return f"{layer}_{KERAS_1.get(role, role)}{suffix}:0"
    return f"{layer}/{role}{suffix}:0" if keras == 2 else f"{layer}/{role}"


def write_weights(
    path: Path | io.BytesIO,
    items: Sequence[Item],
    arrays: Mapping[str, Arrays],
    *,
    named: bool = True,
    inside: str = "",
    optimizer: bool = False,
) -> Any:
    """HDF5 as save_weights of Keras 3 writes it.

    Args:
        named: groups have the layers' names; those of older Keras 3 have not.
        inside: the group, of a model as a layer, that the items are in; a Dense is outside.
        optimizer: with an optimizer's state and that of a generator of random numbers.
    """
    with h5py.File(path, "w") as file:
        counts: Counter[tuple[str, str]] = Counter()
        for item in items:
            root = f"layers/{inside}/" if inside and item.cls != "Dense" else ""
            snake, count = SNAKE[item.cls], counts[root, item.cls]
            counts[root, item.cls] += 1
            one = file.create_group(f"{root}layers/{snake}{f'_{count}' if count else ''}/vars")
            if named:
                one.attrs["name"] = item.name
            for i, array in enumerate(arrays.get(item.name, {}).values()):
                one[str(i)] = array
                if array.dtype.kind == "V":
                    one[str(i)].attrs["dtype"] = "bfloat16"
        if named:
            file.create_group("vars").attrs["name"] = "functional"
        if optimizer:
            state = file.create_group("optimizer/vars")
            state["0"], state["1"] = np.zeros((), np.int32), np.zeros((7, 7, 3, 64), np.float32)
            file["layers/random_flip/seed_generator/vars/0"] = np.zeros(2, np.uint32)
    return path


def write_keras(
    path: Path, items: Sequence[Item], arrays: Mapping[str, Arrays], config: Any, **options: Any
) -> Path:
    """A .keras archive; options as write_weights'."""
    inner = write_weights(io.BytesIO(), items, arrays, **options)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", json.dumps({"keras_version": VERSION}))
        archive.writestr("config.json", json.dumps(config))
        archive.writestr("model.weights.h5", inner.getvalue())
    return path


def bfloat16(arrays: Mapping[str, Arrays]) -> dict[str, Arrays]:
    """As HDF5 holds them: two bytes of no type."""
    return {
        layer: {
            role: torch.from_numpy(a.copy()).bfloat16().view(torch.int16).numpy().view("V2")
            for role, a in of.items()
        }
        for layer, of in arrays.items()
    }
