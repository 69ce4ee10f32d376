"""From Keras's arrays to a state_dict, each rounded once; whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fusedres.models.keras.files import ROLES, Layer, RefusedError
from fusedres.models.keras.naming import Place, keras_shape, weight_shape
from fusedres.models.weights import listed


def check(
    prefix: str,
    model: nn.Module,
    places: Mapping[str, Place],
    left: Sequence[Layer],
    biased: Mapping[str, bool],
) -> None:
    """That every array has a place and every place its array.

    Args:
        prefix: what an error begins with: the file, and what it was taken for.
        model: whose shapes they must have.
        places, left: of `placed`.
        biased: by Keras's name, whether a convolution has a bias, where that is known.

    Raises:
        RefusedError: missing, unexpected and mismatched arrays, by kind.
    """
    missing: list[str] = []
    unexpected = [f"{x.name}/{role} {_described(a)}" for x in left for role, a in x.arrays.items()]
    mismatched: list[str] = []
    convs = [place.layer for path, place in places.items() if _kind(path) == "conv"]
    any_bias = any("bias" in layer.arrays for layer in convs if layer is not None)
    for path, (name, layer) in places.items():
        kind = _kind(path)
        needed = [*ROLES[kind]]
        if kind == "conv" and not biased.get(layer.name if layer else name, any_bias):
            needed.remove("bias")
        arrays = {} if layer is None else layer.arrays
        missing += [f"{name}/{role}" for role in needed if role not in arrays]
        unexpected += [
            f"{name}/{role} {_described(a)}" for role, a in arrays.items() if role not in needed
        ]
        own = weight_shape(model, path)
        for role in needed:
            wanted = keras_shape(own) if role == "kernel" else own[:1]
            if role in arrays and not _fits(arrays[role], wanted):
                mismatched.append(f"{name}/{role} {_described(arrays[role])} for {list(wanted)}")
    kinds = {"missing": missing, "unexpected": unexpected, "mismatched": mismatched}
    if any(kinds.values()):
        found = "; ".join(listed(kind, names) for kind, names in kinds.items() if names)
        bns = [place.layer for path, place in places.items() if _kind(path) == "bn"]
        bare = all(layer is not None and 0 < len(layer.arrays) < 4 for layer in bns)
        advice = "; BatchNorms need both scale and center" if bare else ""
        raise RefusedError(f"{prefix}: {found}{advice}")


def state_of(
    model: nn.Module, places: Mapping[str, Place], preprocess: str | None
) -> dict[str, Tensor]:
    """The state_dict of that model, in fp32, from arrays that `check` has let through."""
    state: dict[str, Tensor] = {}
    for path, place in places.items():
        assert place.layer is not None
        for key, value in _tensors(path, place.layer, places, preprocess):
            state[key] = value.to(torch.float32, memory_format=torch.contiguous_format)
    counts = (key for key in model.state_dict() if key.endswith("num_batches_tracked"))
    return state | {key: torch.zeros((), dtype=torch.long, device="cpu") for key in counts}


def _tensors(
    path: str, layer: Layer, places: Mapping[str, Place], preprocess: str | None
) -> Iterator[tuple[str, Tensor]]:
    """Of one layer of ours, in fp64."""
    kind = _kind(path)
    if kind == "conv":
        kernel = _read(layer.arrays["kernel"]).permute(3, 2, 0, 1)
        yield f"{path}.weight", _for_pixels(kernel, preprocess) if path == "conv1" else kernel
    elif kind == "dense":
        yield f"{path}.weight", _read(layer.arrays["kernel"]).T
        yield f"{path}.bias", _read(layer.arrays["bias"])
    else:
        gamma, beta, mean, variance = (_read(layer.arrays[role]) for role in ROLES["bn"])
        conv = places[_conv_of(path)].layer
        if conv is not None and "bias" in conv.arrays:
            mean = mean - _read(conv.arrays["bias"])  # the same output, with no bias in front
        yield f"{path}.weight", gamma
        yield f"{path}.bias", beta
        yield f"{path}.running_mean", mean
        yield f"{path}.running_var", variance


def _for_pixels(weight: Tensor, preprocess: str | None) -> Tensor:
    """Of the first convolution, for pixels of values from 0 to 255, red first."""
    if preprocess == "caffe":
        return weight.flip(1)
    return weight / 255 if preprocess == "scale" else weight


def _kind(path: str) -> str:
    """Of a layer of ours, as in ROLES."""
    if path == "fc":
        return "dense"
    last = path.rpartition(".")[2]
    return "conv" if "conv" in last or last == "0" else "bn"


def _conv_of(bn: str) -> str:
    """The path of the convolution that a BatchNorm is behind."""
    owner, dot, last = bn.rpartition(".")
    return owner + dot + ("0" if last == "1" else last.replace("bn", "conv"))


def _fits(array: Any, shape: Sequence[int]) -> bool:
    floats = array.dtype.kind == "f" and array.dtype.itemsize <= 8
    return tuple(array.shape) == tuple(shape) and (floats or _is_bfloat16(array.dtype))


def _is_bfloat16(dtype: Any) -> bool:
    """HDF5 has no such type; Keras writes two bytes of no type."""
    return dtype.kind == "V" and dtype.itemsize == 2 and dtype.names is None


def _described(array: Any) -> str:
    plain = array.dtype.kind == "f" or _is_bfloat16(array.dtype)
    return f"{list(array.shape)}{'' if plain else f' {array.dtype}'}"


def _read(array: Any) -> Tensor:
    """In fp64."""
    values = array[()]
    if _is_bfloat16(array.dtype):
        return torch.from_numpy(values.view(np.int16).copy()).view(torch.bfloat16).double()
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64))
