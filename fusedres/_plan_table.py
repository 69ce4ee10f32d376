"""The table of measured plans and kernel configurations: shipped as plan_table.json, and what
`fusedres tune` measured on this machine, in the user's cache, which comes first.

A leaf: backends asks it for plans and for who runs a light pass, triton_kernels for configurations.
An entry names a device (as torch does), a dtype, and one of two things. The shape of a convolution,
maybe `rows`, [least, most] pixels of its output, and its `plan` in training, its plan in
`inference`, its `configs`. Or an op that is a light pass, the size class
of its tensor, `bytes` [least, most], and the backend that is fastest there. Its `source` is
"measured", as is one that does not say, or "model": reasoned from bytes and rates by
bench/plan_model.py, and asked only where nothing was measured. Where no entry fits, the heuristics
of those who ask decide.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from fusedres._plans import is_plan

T = TypeVar("T")
PATH = "plan_table.json"
FORMAT = 1
_DTYPES = {"float32", "float16", "bfloat16", "float64"}
_KERNELS = {"fwd", "dgrad", "wgrad", "bwd", "stem_wgrad"}
_KERNELS |= {"fwd_plain", "wgrad_plain"}  # without a prologue
_KERNELS |= {"act", "act_stem"}  # of inference
_LIGHT_OPS = {"batch_norm", "bn_act", "bn_relu_maxpool", "add_relu"}
_LIGHT_BACKENDS = {"cpp", "cuda", "triton"}
_LIGHT = {"device", "dtype", "op", "bytes", "backend"}
MEASURED, MODELLED = SOURCES = ("measured", "model")
_FIELDS = {"BM", "BN", "BK", "num_warps", "num_stages"}  # and maybe "programs"


_caches: list[Any] = []  # of what was read off the tables


def remembered(function: Callable[..., T]) -> Callable[..., T]:
    """functools.cache for what depends on the tables: `reload` clears it."""
    _caches.append(cache(function))
    found: Callable[..., T] = _caches[-1]
    return found


class Shape(NamedTuple):
    """What a plan may depend on beside dtype and device."""

    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    rows: int | None = None  # N*OH*OW of the output; None: not known yet, taken as large


def user_path() -> Path:
    """Where the user's own table is, or would be."""
    cache_home = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache_home) if cache_home else Path.home() / ".cache") / "fusedres" / PATH


@torch.compiler.assume_constant_result
def entries() -> list[dict[str, Any]]:
    """All entries, checked: what was measured, the user's first, then what was modelled, likewise.
    A table of the user's that cannot be used is passed over, with a warning.

    Raises:
        ValueError: the shipped table is of another format, or an entry is malformed.
    """
    return _read()


@remembered
def _read() -> list[dict[str, Any]]:
    return sorted([*user_entries(), *shipped_entries()], key=is_modelled)


def is_modelled(entry: dict[str, Any]) -> bool:
    """Whether nobody measured what it says."""
    return entry.get("source") == MODELLED


def counts(device: str) -> dict[str, int]:
    """How many entries about a device were measured, and how many modelled."""
    modelled = [is_modelled(entry) for entry in entries() if entry["device"] == device]
    return {MEASURED: modelled.count(False), MODELLED: modelled.count(True)}


def shipped_entries() -> list[dict[str, Any]]:
    """Those that come with the package."""
    return entries_of(resources.files("fusedres").joinpath(PATH).read_text())


def user_entries() -> list[dict[str, Any]]:
    """Those that `fusedres tune` wrote; none where there is no table, or none that can be used."""
    path = user_path()
    try:
        return entries_of(path.read_text()) if path.is_file() else []
    except (OSError, ValueError, KeyError, TypeError) as error:
        logging.getLogger("fusedres").warning(
            "%s cannot be used: %s; `fusedres tune --clear` removes it", path, error
        )
        return []


def text_of(table: Sequence[dict[str, Any]]) -> str:
    """A table as its file holds it, an entry a line.

    Raises:
        ValueError: an entry is malformed.
    """
    for entry in table:
        check(entry)
    lines = ",\n".join(f"  {json.dumps(entry)}" for entry in table)
    body = f"[\n{lines}\n ]" if table else "[]"
    return f'{{\n "format": {FORMAT},\n "entries": {body}\n}}\n'


def reload() -> None:
    """Read the tables anew, after one was written."""
    for function in _caches:
        function.cache_clear()


def entries_of(text: str) -> list[dict[str, Any]]:
    """Those of a table, checked; ValueError where it is malformed."""
    table = json.loads(text)
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        found = table.get("format") if isinstance(table, dict) else type(table).__name__
        raise ValueError(f"{PATH}: format must be {FORMAT}, got {found!r}")
    for entry in table["entries"]:
        check(entry)
    return list(table["entries"])


def check(entry: dict[str, Any]) -> None:
    """Raises ValueError where an entry is malformed."""
    if "op" in entry:
        _check_light(entry)
        return
    required = {"device", "dtype", "in_channels", "out_channels", "kernel", "stride"}
    optional = {"rows", "plan", "inference", "configs", "source"}
    names = set(entry)
    if not required <= names <= required | optional:
        raise ValueError(f"{PATH}: an entry has {sorted(required)}, and maybe {sorted(optional)}")
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"{PATH}: dtype must be one of {sorted(_DTYPES)}, got {entry['dtype']!r}")
    _check_source(entry)
    if "plan" in entry and not is_plan(entry["plan"]):
        raise ValueError(f"{PATH}: plan must be as in _plans, got {entry['plan']!r}")
    if entry.get("inference", "split") not in ("fused", "split"):
        raise ValueError(f"{PATH}: inference must be fused or split, got {entry['inference']!r}")
    configs = entry.get("configs", {})
    values = (c.get(side, 16) for c in configs.values() for side in ("BM", "BN", "BK"))
    if any(not isinstance(v, int) or v < 16 or v & (v - 1) for v in values):
        raise ValueError(f"{PATH}: BM, BN and BK must be powers of two from 16 on, got {configs!r}")
    if not set(configs) <= _KERNELS or any(
        set(c) - {"programs"} != _FIELDS for c in configs.values()
    ):
        raise ValueError(
            f"{PATH}: configs are of {sorted(_KERNELS)} with {sorted(_FIELDS)}, got {configs!r}"
        )
    rows = entry.get("rows", [0, None])
    if len(rows) != 2 or not isinstance(rows[0], int) or not isinstance(rows[1], int | None):
        raise ValueError(f"{PATH}: rows must be [least, most or null], got {rows!r}")


def _check_source(entry: dict[str, Any]) -> None:
    if entry.get("source", MEASURED) not in SOURCES:
        raise ValueError(f"{PATH}: source must be one of {SOURCES}, got {entry['source']!r}")


def _check_light(entry: dict[str, Any]) -> None:
    _check_source(entry)
    if set(entry) - {"source"} != _LIGHT:
        raise ValueError(f"{PATH}: an entry of an op has {sorted(_LIGHT)}, got {sorted(entry)}")
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"{PATH}: dtype must be one of {sorted(_DTYPES)}, got {entry['dtype']!r}")
    if entry["op"] not in _LIGHT_OPS or entry["backend"] not in _LIGHT_BACKENDS:
        raise ValueError(
            f"{PATH}: op must be one of {sorted(_LIGHT_OPS)} and backend one of "
            f"{sorted(_LIGHT_BACKENDS)}, got {entry['op']!r} and {entry['backend']!r}"
        )
    sizes = entry["bytes"]
    if len(sizes) != 2 or not isinstance(sizes[0], int) or not isinstance(sizes[1], int | None):
        raise ValueError(f"{PATH}: bytes must be [least, most or null], got {sizes!r}")


@torch.compiler.assume_constant_result
def light(device: str, op: str, dtype: torch.dtype) -> tuple[tuple[int, int | None, str], ...]:
    """(least bytes, most bytes or None, backend) of the size classes of a light pass."""
    return _light(device, op, dtype)


@remembered
def _light(device: str, op: str, dtype: torch.dtype) -> tuple[tuple[int, int | None, str], ...]:
    wanted = (device, op, str(dtype).removeprefix("torch."))
    return tuple(
        (*entry["bytes"], entry["backend"])
        for entry in entries()
        if "op" in entry and (entry["device"], entry["op"], entry["dtype"]) == wanted
    )


class Planned(NamedTuple):
    """What an entry says of a convolution's plan."""

    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    least: int  # rows
    most: int | None
    plan: str


@torch.compiler.assume_constant_result  # Dynamo can neither trace nor guard the entries
def plans(device: str, dtype: torch.dtype, field: str = "plan") -> tuple[Planned, ...]:
    """All plans for a device and dtype, of which the first that fits is the one: conv_bn's, or
    conv_act's, whose field is "inference".
    """
    return _plans(device, dtype, field)


@remembered
def _plans(device: str, dtype: torch.dtype, field: str) -> tuple[Planned, ...]:
    return tuple(
        Planned(
            entry["in_channels"],
            entry["out_channels"],
            tuple(entry["kernel"]),
            tuple(entry["stride"]),
            entry.get("rows", (0, None))[0],
            entry.get("rows", (0, None))[1],
            entry[field],
        )
        for entry in entries()
        if field in entry
        and (entry["device"], entry["dtype"]) == (device, str(dtype).removeprefix("torch."))
    )


def fits(rows: int | None, least: int, most: int | None) -> bool:
    """Whether so many rows lie within; None: not known yet, taken as large."""
    return most is None if rows is None else least <= rows and (most is None or rows <= most)


def _is_about(entry: dict[str, Any], device: str, dtype: torch.dtype, shape: Shape) -> bool:
    return (
        "op" not in entry
        and (entry["device"], entry["dtype"]) == (device, str(dtype).removeprefix("torch."))
        and (entry["in_channels"], entry["out_channels"]) == shape[:2]
        and (tuple(entry["kernel"]), tuple(entry["stride"])) == shape[2:4]
    )


@remembered
def lookup(device: str, dtype: torch.dtype, shape: Shape) -> dict[str, Any] | None:
    """What the entries say of such a convolution on the device of this name, the first of them
    first: one may hold its plan, another its configurations.
    """
    found: dict[str, Any] = {}
    for entry in entries():
        if _is_about(entry, device, dtype, shape) and fits(
            shape.rows, *entry.get("rows", (0, None))
        ):
            found = entry | found
    return found or None


@torch.compiler.assume_constant_result
def device_name(device: torch.device) -> str:
    """The name under which the table knows a device: "cpu", or the GPU's."""
    return _device_name(device)


@cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
