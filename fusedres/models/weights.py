"""Weights for a network: from a file, a state_dict or torchvision, read without executing code and
loaded as a whole or not at all.
"""

from __future__ import annotations

import importlib
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

ACCEPTED = (
    "accepted: the path of a .pt, .pth or .safetensors file, a state_dict, or a member of "
    "torchvision's weights enums such as ResNet50_Weights.DEFAULT"
)
# where training scripts keep the model beside the optimizer; "state" is that of `fusedres train`
_NESTED = ("state_dict", "model", "state")
_SHOWN = 3  # keys of a kind that an error lists


class WeightsMember(Protocol):
    """What torchvision's weights enums have in common."""

    def get_state_dict(self, *args: Any, **kwargs: Any) -> Mapping[str, Any]: ...


WeightsLike = str | os.PathLike[str] | Mapping[str, Any] | WeightsMember


class Weights(NamedTuple):
    """Tensors by name, and where they are from, for errors."""

    source: str
    state: dict[str, Tensor]


def read_weights(owner: str, weights: WeightsLike) -> Weights:
    """The tensors of what a caller gave as `weights`, which is only read.

    A mapping under "state_dict" or "model" is unwrapped, "module." in front of every name dropped.

    Args:
        owner: the network, for errors.
        weights: a path, a mapping, or a member of one of torchvision's weights enums, which
            downloads into torch's cache and checks the file's hash.

    Raises:
        TypeError: something else.
        FileNotFoundError, OSError: no such file, or one that cannot be read.
        ValueError: a damaged file; a pickle that wants more than tensors and plain data, of which
            nothing has been executed; no state_dict in it.
        ImportError: a .safetensors file without safetensors.
        RuntimeError: torchvision's file did not come.
    """
    content: Any
    if isinstance(weights, str | os.PathLike):
        path = Path(os.fsdecode(weights))
        source = f"file {str(path)!r}"
        content = _read_file(f"{owner}: weights: {source}", path)
    elif isinstance(weights, Mapping):
        source, content = "the mapping", weights
    elif callable(getattr(weights, "get_state_dict", None)) and not isinstance(weights, type):
        source = str(weights)
        try:
            content = weights.get_state_dict(progress=True, check_hash=True)
        except Exception as error:  # of the network, the disk, the hash
            raise RuntimeError(
                f"{owner}: weights: {source} could not be fetched: {first_line(error)}"
            ) from error
    else:
        kind = f"the class {weights.__name__}" if isinstance(weights, type) else None
        raise TypeError(
            f"{owner}: weights: got {kind or f'a value of type {type(weights).__name__}'}; "
            f"{ACCEPTED}"
        )
    return Weights(source, _state_of(f"{owner}: weights: {source}", content))


def load_weights(owner: str, model: nn.Module, weights: Weights) -> None:
    """Copy the weights into a model whose state_dict has the same names and shapes.

    The counts of batches (num_batches_tracked), which old files lack, may be missing.

    Raises:
        ValueError: names or shapes differ, or the model has no memory; the model is as it was.
    """
    source, state = weights
    expected = model.state_dict()
    if any(t.is_meta for t in expected.values()):
        raise ValueError(
            f"{owner}: weights: {source} has nowhere to go in a network on the meta device; "
            "build it on another one, or without weights"
        )
    missing = [name for name in expected if name not in state and "num_batches_tracked" not in name]
    unexpected = [name for name in state if name not in expected]
    shared = [name for name in expected if name in state]
    other = [name for name in shared if not _fits(state[name], expected[name])]
    mismatched = [
        f"{name} {_described(state[name])} for {_described(expected[name])}" for name in other
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "mismatched": mismatched}
    if any(kinds.values()):
        found = "; ".join(listed(kind, names) for kind, names in kinds.items() if names)
        raise ValueError(
            f"{owner}: weights: {source} does not fit this network: {found}; accepted: the names "
            f"and shapes of its own state_dict, which are torchvision's{_advice(kinds, other)}"
        )
    try:
        # a plain dict: without the metadata that would have old files' missing counts refused
        model.load_state_dict(dict(state), strict=True)
    except RuntimeError as error:
        raise ValueError(f"{owner}: weights: {source}: {first_line(error)}") from error


def _read_file(prefix: str, path: Path) -> Any:
    try:
        if path.suffix.lower() == ".safetensors":
            return _safetensors(prefix).load_file(path, device="cpu")
        return load_plain(path)
    except ImportError:
        raise
    except FileNotFoundError:
        raise FileNotFoundError(f"{prefix} is not there; {ACCEPTED}") from None
    except OSError as error:
        raise OSError(f"{prefix} cannot be read: {error.strerror or first_line(error)}") from None
    except Exception as error:  # whatever a hostile or damaged file makes of the reader
        detail = wanted_by(error) or first_line(error)
        raise ValueError(
            f"{prefix} is refused: not a whole file of tensors and plain data ({detail}); nothing "
            f"in it was executed; {ACCEPTED}"
        ) from None


def _safetensors(prefix: str) -> Any:
    try:
        return importlib.import_module("safetensors.torch")
    except ImportError:
        raise ImportError(
            f"{prefix} needs the package safetensors: pip install safetensors"
        ) from None


class DamagedFileError(ValueError):
    """A file that is not what was written."""


def load_plain(path: Path) -> Any:
    """Tensors and plain data from a file of torch's, onto the CPU; nothing in it is executed.

    Raises:
        DamagedFileError: its checksums, which torch does not look at, are not those of its content.
        Exception: whatever a missing, hostile or damaged file makes of the reader.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            summed = any(entry.CRC for entry in archive.infolist())  # torch can leave them out
            broken = archive.testzip() if summed else None
        if broken is not None:
            raise DamagedFileError(f"damaged: {broken} in it is not what was written")
    return torch.load(path, map_location="cpu", weights_only=True)


def wanted_by(error: Exception) -> str | None:
    """What a pickle wanted beside tensors and plain data, where torch's refusal names it."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    return f"it wants {found[1]}" if found else None


def _state_of(prefix: str, content: Any) -> dict[str, Tensor]:
    """The state_dict within the content of a file."""
    for _ in _NESTED:
        if isinstance(content, Mapping):
            inner = (content[key] for key in _NESTED if isinstance(content.get(key), Mapping))
            content = next(inner, content)
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{prefix} holds a value of type {type(content).__name__}, not a state_dict; {ACCEPTED}"
        )
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{prefix} is no state_dict: its entry {name!r} is of type {type(value).__name__}; "
                "accepted: tensors by name, also under 'state_dict' or 'model'"
            )
    wrapped = all(name.startswith("module.") for name in content)
    return {name.removeprefix("module.") if wrapped else name: t for name, t in content.items()}


def _fits(given: Tensor, own: Tensor) -> bool:
    """Whether it can be copied without a change of shape or a loss of what it is."""
    numbers = given.is_floating_point() or not own.is_floating_point()
    dense = given.layout == torch.strided and not given.is_meta and not given.is_complex()
    return given.shape == own.shape and numbers and dense


def _described(t: Tensor) -> str:
    plain = t.layout == torch.strided and t.is_floating_point() and not t.is_meta
    kind = "" if plain else f" {str(t.dtype).removeprefix('torch.')}"
    where = "" if t.layout == torch.strided else f" {t.layout}"
    return f"{list(t.shape)}{kind}{where}{' on meta' if t.is_meta else ''}"


def listed(kind: str, names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return f"{len(names)} {kind} ({shown}{', ...' if len(names) > _SHOWN else ''})"


def _advice(kinds: Mapping[str, Sequence[str]], mismatched: Sequence[str]) -> str:
    """What to do where only the classes differ."""
    only_classes = set(mismatched) == {"fc.weight", "fc.bias"}
    if not only_classes or kinds["missing"] or kinds["unexpected"]:
        return ""
    return "; for other classes build it with num_classes of the weights, then reset_classifier"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its name."""
    return next(iter(str(error).splitlines()), "").rstrip(":") or type(error).__name__
