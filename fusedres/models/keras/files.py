"""Keras's weight files: the layers with arrays in one, and the network's configuration where there
is one. Three forms, told apart by content: HDF5 as Keras 1 and 2 write it (legacy), `.weights.h5`
of Keras 3, and `.keras`, an archive with such a file in it.

Files are read only: nothing in them is executed, unpickled or unpacked, and links and arrays that
lead to other files are not followed.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fusedres.models.weights import first_line

ACCEPTED = (
    "accepted: what Keras saves, as .keras, .weights.h5 or legacy .h5, of the whole model or its "
    "weights alone"
)
ROLES = {
    "conv": ("kernel", "bias"),
    "dense": ("kernel", "bias"),
    "bn": ("gamma", "beta", "moving_mean", "moving_variance"),
}
_WEIGHTS = "model.weights.h5"  # within a .keras archive
_CONFIG = "config.json"
_LARGEST = {  # bytes of either: a ResNet-152 in fp64 with Adam's state has 1.5e9
    _WEIGHTS: 2**32,
    _CONFIG: 2**26,
}
_NOT_THE_MODELS = ("optimizer", "optimizer_weights", "metrics", "compile_metrics")
_KERAS_1 = {  # running_std is a variance, its name notwithstanding
    "W": "kernel", "b": "bias", "running_mean": "moving_mean", "running_std": "moving_variance",
}  # fmt: skip
_OF_CLASS = {"conv2d": "conv", "batch_normalization": "bn", "dense": "dense"}


class Layer(NamedTuple):
    """A layer that has arrays.

    Attributes:
        name: Keras's name for it, or that of its group in the file.
        kind: "conv", "bn", "dense" or "other".
        arrays: h5py's datasets by role, as in ROLES; what has no role by its own name.
        named: whether `name` is Keras's and not of a group.
    """

    name: str
    kind: str
    arrays: dict[str, Any]
    named: bool


class KerasFile(NamedTuple):
    """What a file has: its form in words, its layers, the JSON of its configuration or None."""

    form: str
    layers: list[Layer]
    config: Any


class RefusedError(ValueError):
    """What is wrong with a file, in one line that names it."""


@contextmanager
def opened(prefix: str, path: Path) -> Iterator[KerasFile]:
    """The file, whose arrays can be read while it is open.

    Raises:
        FileNotFoundError, OSError: there is none, or it cannot be read.
        ImportError: without h5py.
        RefusedError: it is damaged or of another kind; also for what the reader makes of it later.
    """
    try:
        with path.open("rb") as file:
            begin = file.read(8)
    except FileNotFoundError:
        raise FileNotFoundError(f"{prefix} is not there; {ACCEPTED}") from None
    except OSError as error:
        raise OSError(f"{prefix} cannot be read: {error.strerror or first_line(error)}") from None
    try:
        h5py = importlib.import_module("h5py")
    except ImportError:
        raise ImportError(
            f'{prefix} needs h5py; install with: pip install "fusedres[keras]"'
        ) from None
    try:
        if begin.startswith(b"PK"):
            with _unpacked(prefix, path) as (inner, config), h5py.File(inner, "r") as file:
                yield _content(prefix, h5py, file, config)
        elif h5py.is_hdf5(path):
            with h5py.File(path, "r") as file:
                yield _content(prefix, h5py, file, None)
        else:
            what = f"it begins with {begin!r}" if begin else "it is empty"
            raise RefusedError(f"{prefix} is neither HDF5 nor a .keras archive: {what}; {ACCEPTED}")
    except (RefusedError, MemoryError):
        raise
    except Exception as error:  # whatever a damaged file makes of the reader
        raise RefusedError(
            f"{prefix} is damaged or not Keras's: {first_line(error)}; {ACCEPTED}"
        ) from None


@contextmanager
def _unpacked(prefix: str, path: Path) -> Iterator[tuple[Any, Any]]:
    """The HDF5 file within an archive, as a nameless temporary one, and the configuration."""
    with zipfile.ZipFile(path) as archive, tempfile.TemporaryFile() as inner:
        names = set(archive.namelist())
        if _WEIGHTS not in names:
            raise RefusedError(f"{prefix} is an archive without {_WEIGHTS} in it; {ACCEPTED}")
        for name in names & _LARGEST.keys():
            size = archive.getinfo(name).file_size
            if size > _LARGEST[name]:
                raise RefusedError(
                    f"{prefix}: {name} in it has {size} bytes; accepted: up to {_LARGEST[name]}"
                )
        with archive.open(_WEIGHTS) as packed:
            shutil.copyfileobj(packed, inner)  # which compares checksums
        config = json.loads(archive.read(_CONFIG)) if _CONFIG in names else None
        yield inner, config


def _content(prefix: str, h5py: Any, file: Any, config: Any) -> KerasFile:
    groups, datasets = _found(h5py, file)
    root = "model_weights" if "model_weights" in groups else ""
    if any(key.startswith("layer_names") for key in groups[root].attrs):
        form = f"legacy HDF5, {'the whole model' if root else 'weights alone'}"
        layers = list(_legacy(groups, datasets, root))
        if "model_config" in file.attrs:
            config = json.loads(_text(file.attrs["model_config"]))
    else:
        form = ".weights.h5" if config is None else ".keras"
        layers = list(_by_number(groups, datasets))
    if not layers:
        raise RefusedError(f"{prefix} has no weights of Keras's layers in it; {ACCEPTED}")
    return KerasFile(form, layers, config)


def _found(h5py: Any, file: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model's groups and arrays by path, "" for the file; only what lies in this file."""
    groups, datasets = {"": file}, dict[str, Any]()

    def visit(path: str, item: Any) -> None:  # h5py visits an object once, and follows no link
        if isinstance(item, h5py.Group):
            groups[path] = item
        elif isinstance(item, h5py.Dataset) and not item.is_virtual and not item.external:
            datasets[path] = item

    for key in file:
        link = file.get(key, getlink=True)
        if key not in _NOT_THE_MODELS and isinstance(link, h5py.HardLink):
            item = file[key]
            visit(key, item)
            if isinstance(item, h5py.Group):
                item.visititems(lambda path, inside, key=key: visit(f"{key}/{path}", inside))
    return groups, datasets


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _is_random(path: str) -> bool:
    """Whether it is the state of a generator of random numbers, which dropout may have."""
    return "seed_generator" in path or "random_generator" in path or "StateVar" in path


# --- Keras 3: numbered arrays in a group named vars -----------------------------------------------


def _by_number(groups: Mapping[str, Any], datasets: Mapping[str, Any]) -> Iterator[Layer]:
    by_group: dict[str, dict[int, Any]] = {}
    for path in groups:  # one that should have arrays counts without them, too
        owner, _, last = path.rpartition("/")
        if last == "vars" and _class_of(os.path.basename(owner)) is not None:
            by_group[path] = {}
    for path, dataset in datasets.items():
        group, _, number = path.rpartition("/")
        if number.isdecimal() and os.path.basename(group) == "vars" and not _is_random(path):
            by_group.setdefault(group, {})[int(number)] = dataset
    for group, arrays in by_group.items():
        own = os.path.basename(os.path.dirname(group)) or "model"
        kind = _kind_of_numbered(own, arrays)
        roles = ROLES.get(kind, ())
        found = {(roles[i] if i < len(roles) else str(i)): a for i, a in sorted(arrays.items())}
        named = "name" in groups[group].attrs
        name = _text(groups[group].attrs["name"]) if named else own
        yield Layer(name, kind, found, named)


def _class_of(group: str) -> str | None:
    return _OF_CLASS.get(re.sub(r"_\d+$", "", group))


def _kind_of_numbered(group: str, arrays: Mapping[int, Any]) -> str:
    """By its group, which is called by the layer's class, else by the arrays' dimensions."""
    known = _class_of(group)
    if known is not None:
        return known
    ranks = {len(a.shape) for a in arrays.values()}
    first = len(arrays[min(arrays)].shape)
    if first in (2, 4):
        return "dense" if first == 2 else "conv"
    return "bn" if ranks == {1} and len(arrays) > 1 else "other"


# --- Keras 1 and 2: arrays by name in a group for each layer --------------------------------------


def _legacy(groups: Mapping[str, Any], datasets: Mapping[str, Any], root: str) -> Iterator[Layer]:
    for own in [*_listed_in(groups[root], "layer_names"), "top_level_model_weights"]:
        path = f"{root}/{own}".lstrip("/")
        by_layer: dict[str, dict[str, Any]] = {}
        for weight in _listed_in(groups[path], "weight_names") if path in groups else ():
            if not _is_random(weight):
                layer, role = _split(weight, own)
                by_layer.setdefault(layer, {})[role] = datasets.get(f"{path}/{weight}")
        nested = len(by_layer) > 1  # a model as a layer
        if not by_layer and _kind_of_named(own, {}) == "dense":
            by_layer[own] = {}  # one that should have arrays
        for layer, arrays in by_layer.items():
            name = layer if nested else own
            found = {role: array for role, array in arrays.items() if array is not None}
            yield Layer(name, _kind_of_named(name, arrays), found, named=True)


def _listed_in(group: Any, name: str) -> list[str]:
    """A list among a group's attributes; a long one is in several."""
    attrs = group.attrs
    parts = [name] if name in attrs else []
    while name not in attrs and f"{name}{len(parts)}" in attrs:
        parts.append(f"{name}{len(parts)}")
    return [_text(value) for part in parts for value in attrs[part]]


def _split(weight: str, group: str) -> tuple[str, str]:
    """Layer and role: of conv1/kernel:0, conv1/kernel_1:0, conv1/kernel, conv1_W:0, conv1_W_1:0."""
    *before, last = weight.removesuffix(":0").split("/")
    last = re.sub(r"_\d+$", "", last)
    if before and last in {role for roles in ROLES.values() for role in roles}:
        return before[-1], last
    old = re.fullmatch(r"(.+)_(W|b|gamma|beta|running_mean|running_std)", last)
    if old is not None:
        return old[1], _KERAS_1.get(old[2], old[2])
    return (before[-1] if before else group), last


def _kind_of_named(layer: str, arrays: Mapping[str, Any]) -> str:
    if arrays.keys() & set(ROLES["bn"]):
        return "bn"
    if arrays and "kernel" not in arrays:
        return "other"
    kernel = arrays.get("kernel")
    if kernel is None:  # it should be there
        return "dense" if re.match("fc|predictions|dense", layer) else "conv"
    return {2: "dense", 4: "conv"}.get(len(kernel.shape), "other")
