"""Ways to replace an argument of a call: wrong ones, and odd ones that have to be served."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedres.deferred import Deferred
from fusedres.testing import CHANNELS_LAST, CONTIGUOUS

# --- ways to replace a tensor ---------------------------------------------------------------------


class Plain(torch.Tensor):
    """A subclass with nothing of its own."""


def _offset(t: Tensor) -> Tensor:
    flat = t.new_full((t.numel() + 1,), math.nan)[1:]
    dense = torch.empty_like(t)
    return flat.as_strided(dense.shape, dense.stride(), 1).copy_(t)


def _crop(t: Tensor) -> Tensor:
    big = t.new_full([s + 2 for s in t.shape], math.nan)
    if t.dim() == 4 and t.stride(1) == 1:
        big = big.contiguous(memory_format=CHANNELS_LAST)
    for d, s in enumerate(t.shape):
        big = big.narrow(d, 1, s)
    return big.copy_(t)


def _every_second(t: Tensor) -> Tensor:
    return t.new_full([*t.shape, 2], math.nan)[..., 0].copy_(t)


def _expanded(t: Tensor) -> Tensor:
    dim = 0 if t.size(0) > 1 or t.dim() == 1 else -1
    return t.narrow(dim, 0, min(1, t.size(dim))).clone().expand(t.shape)


def _odd_strides(t: Tensor) -> Tensor:
    """Dimensions of size 1 have strides that mean nothing."""
    strides = [77 if size == 1 else step for size, step in zip(t.shape, t.stride(), strict=True)]
    return t.clone(memory_format=torch.preserve_format).as_strided(t.shape, strides)


def _negated(t: Tensor) -> Tensor:
    """A view of memory that holds the opposite of its values, as conj().imag is one."""
    if t.dtype == torch.bfloat16:
        return torch._neg_view(-t)
    return torch.complex(torch.zeros_like(t), -t).conj().imag


def _with(value: float) -> Callable[[Tensor], Tensor]:
    def change(t: Tensor) -> Tensor:
        t = t.clone(memory_format=torch.preserve_format)
        if t.numel() > 0:  # in the middle of a kernel, which no padding multiplies by 0
            t[tuple(size // 2 for size in t.shape)] = value
        return t

    return change


def _other_layout(t: Tensor) -> Tensor:
    if t.dim() != 4:
        return t.clone()
    channels_last = t.is_contiguous(memory_format=CHANNELS_LAST)
    return t.contiguous(memory_format=CONTIGUOUS if channels_last else CHANNELS_LAST)


def _inference(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone(memory_format=torch.preserve_format)


def _freed(t: Tensor) -> Tensor:
    t = t.clone(memory_format=torch.preserve_format)
    t.untyped_storage().resize_(0)
    return t


def _between_addresses(t: Tensor) -> Tensor:
    """At an address that is no multiple of its element's size."""
    memory = bytearray(t.numel() * t.element_size() + 1)
    flat = torch.frombuffer(memory, dtype=t.dtype, offset=1)
    return flat.as_strided(t.shape, torch.empty_like(t).stride()).copy_(t)


def _resized(t: Tensor, *sizes: int) -> Tensor:
    """Of other sizes, in the same layout."""
    generator = torch.Generator().manual_seed(sum(sizes))
    values = torch.randint(-2, 3, sizes, generator=generator).to(t.dtype)
    return values.contiguous(memory_format=CHANNELS_LAST) if len(sizes) == 4 else values


def _more(dim: int, by: int) -> Callable[[Tensor], Tensor]:
    def change(t: Tensor) -> Tensor:
        sizes = list(t.shape)
        sizes[dim % t.dim()] = max(0, sizes[dim % t.dim()] + by)
        return _resized(t, *sizes)

    return change


def _quantized(t: Tensor) -> Tensor:
    return torch.quantize_per_tensor(t.float(), 0.5, 3, torch.quint8)


# The same values or wild ones, stored or owned otherwise: a public function serves these
LEGAL: dict[str, Callable[[Tensor], Any]] = {
    "at an offset": _offset,
    "a crop": _crop,
    "every second element": _every_second,
    "transposed in memory": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "in the other layout": _other_layout,
    "odd strides": _odd_strides,
    "a Parameter": lambda t: torch.nn.Parameter(t, requires_grad=t.requires_grad),
    "a subclass": lambda t: t.as_subclass(Plain),
    "a NaN": _with(math.nan),
    "an Inf": _with(math.inf),
    "a -Inf": _with(-math.inf),
    "zeros": lambda t: torch.zeros_like(t),
}
# and of these, what is not moved in place
READ_ONLY: dict[str, Callable[[Tensor], Any]] = {
    "expanded": _expanded,
    "negated memory": _negated,
    "requires grad": lambda t: t.clone(memory_format=torch.preserve_format).requires_grad_(),
    "not a leaf": lambda t: t.requires_grad_().clone(memory_format=torch.preserve_format),
    "requires no grad": lambda t: t.detach(),
}
OTHER_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
OTHER_TYPES += (torch.int32, torch.int64, torch.bool, torch.complex64)
WRONG: dict[str, Callable[[Tensor], Any]] = {
    **{f"as {d}".replace("torch.", ""): partial(Tensor.to, dtype=d) for d in OTHER_TYPES},
    "quantized": _quantized,
    "on meta": lambda t: torch.empty_like(t, device="meta"),
    "sparse": lambda t: t.to_sparse(),
    "sparse rows": lambda t: t.flatten(1).to_sparse_csr() if t.dim() > 1 else t.to_sparse(),
    "mkldnn": lambda t: t.float().to_mkldnn(),
    "nested": lambda t: torch.nested.as_nested_tensor(list(t.clone())),
    "without memory": _freed,
    "a zero tensor": lambda t: torch._efficientzerotensor(tuple(t.shape), dtype=t.dtype),
    "between addresses": _between_addresses,
    "made in inference mode": _inference,
    "overlapping": lambda t: (
        torch.arange(t.numel() + 9).to(t.dtype).as_strided(t.shape, [1] * t.dim())
    ),
    "one element": lambda t: t.new_zeros(()),
    "flat": lambda t: t.flatten(),
    "a dimension more": lambda t: t.unsqueeze(0),
    "a dimension more at the end": lambda t: t.unsqueeze(-1),
    "a dimension less": lambda t: t.flatten(0, 1) if t.dim() > 1 else t.sum(),
    "transposed": lambda t: t.transpose(0, -1),
    "channels and rows swapped": lambda t: t.transpose(1, -1) if t.dim() > 1 else t.flip(0),
    "nothing of the last": lambda t: t[..., :0],
    "nothing of the first": lambda t: t[:0],
    "no channels": _more(1, -99),
    "a channel more": _more(1, 1),
    "a channel less": _more(1, -1),
    "channels more": _more(1, 7),
    "more first": _more(0, 1),
    "less first": _more(0, -1),
    "more last": _more(-1, 1),
    "less last": _more(-1, -1),
    "wider": _more(-1, 7),
    "an array": lambda t: np.ones(tuple(t.shape), np.float32)[..., ::-1],
    "a list": lambda t: [0.0] * t.size(0),
    "a Deferred": lambda t: Deferred(t, *(t.new_zeros(t.size(min(1, t.dim() - 1))),) * 3),
}
NO_TENSORS: dict[str, Any] = {
    "None": None,
    "0": 0,
    "''": "",
    "[]": [],
    "True": True,
    "2.5": 2.5,
    "a class": torch.Tensor,
}


# --- ways to replace what is no tensor ------------------------------------------------------------


def _named(*values: Any) -> dict[str, Any]:
    return {getattr(v, "__name__", f"{v!r}"): v for v in values}


INTS = _named(-1, 0, 1, 2, 16, 255, 2**31 - 1, 2**31, 2**63, 2**100, -(2**63), 1.5, True)
INTS |= _named(None, "3", (1,)) | {"array 2": np.int64(2), "tensor 2": torch.tensor(2)}
# conv's own: 255 of padding would take seconds
STEPS = {k: v for k, v in INTS.items() if k != "255"} | _named(
    (), (1, 1), [1, 2], (2, 1), (0, 1), (1, 2, 3), (1, "x"), (1.5, 1), (True, 1), (2**31, 1),
    (1, 2**63), (-1, -1), (1, 0, 1, 0), (1, 2, 3, 4, 5), (1, 1, 1, None),
)  # fmt: skip
BOOLS = _named(None, 1, 0, "yes", "", 2.5, True, False, [])
BOOLS |= {"tensor": torch.tensor(True), "tensors": torch.tensor([True, False])}
NUMBERS = _named(
    None, "x", "", math.nan, math.inf, -math.inf, -1.0, 0, 1, 0.5, True, 1j, [], 10**400
)
NUMBERS |= {
    "tensor": torch.tensor(0.5),
    "tensor [1]": torch.tensor([0.5]),
    "tensor []": torch.tensor([]),
    "integer tensor": torch.tensor(1),
    "complex tensor": torch.tensor(0.5 + 0.5j),
    "meta tensor": torch.tensor(0.5, device="meta"),
    "sparse tensor": torch.tensor(0.5).to_sparse(),
    "NaN tensor": torch.tensor(math.nan),
    "bf16 tensor": torch.tensor(0.5, dtype=torch.bfloat16),
    "tensor that requires grad": torch.tensor(0.5, requires_grad=True),
}
TYPES = _named(None, torch.int8, torch.complex64, torch.quint8, 7, "float32", torch.float64)
TYPES |= _named(torch.bfloat16, torch.float16)
BACKENDS = _named("reference", "nope", "", "auto", "cpp", "triton", "cuda", None, 3)
PLANS = _named("split", "fused", "epilogue", "split+keep", "split+unmasked", "", "nope", None, 3)
# of a module: no more than memory holds
COUNTS = _named(-1, 0, 1, 2, 3, 8, 2**63, 1.5, True, None, "3", (1,), [2, 3])
FILTERS = _named((), (4,), (4, 4), (4, 4, 4), (4, 4, 8, 8), (0, 4, 8), (4, -1, 8), (4, 1.5, 8))
FILTERS |= _named((2**63, 4, 8), (True, 4, 8), "488", None, 8, [4, 4, 8])
INITIALIZERS = _named("zeros", "ones", "glorot_uniform", "nope", "", None, 3, torch.nn.init.zeros_)
VARIANTS = _named("keras", "coursera", "nope", "", None, 3, ())
EMITS = BOOLS | _named((2, 2), (1, 1), (3, 1), (), (2,), (2, "x"), (0, 2), (2, 2, 2))
# of an op's schema: int[n]
LISTS: dict[str, Callable[[Any], Any]] = {
    f"{name}": (lambda v, f=f: f(len(v)))
    for name, f in {
        "[]": lambda n: [],
        "[1]": lambda n: [1],
        "zeros": lambda n: [0] * n,
        "-1": lambda n: [-1] * n,
        "2": lambda n: [2] * n,
        "3": lambda n: [3] * n,
        "64": lambda n: [64] * n,
        "2**31": lambda n: [2**31] * n,
        "2**62": lambda n: [2**62] * n,
        "2**63": lambda n: [2**63] * n,
        "-2**63": lambda n: [-(2**63)] * n,
        "one more": lambda n: [1] * (n + 1),
        "fractions": lambda n: [1.5] * n,
        "None": lambda n: None,
        "text": lambda n: "x",
    }.items()
}

VALUES = {
    "int": INTS,
    "steps": STEPS,
    "bool": BOOLS,
    "number": NUMBERS,
    "type": TYPES,
    "backend": BACKENDS,
    "plan": PLANS,
    "emit": EMITS,
    "count": COUNTS,
    "filters": FILTERS,
    "initializer": INITIALIZERS,
    "variant": VARIANTS,
}
# the role of an argument, by which it is replaced
TENSORS = ("tensor", "field", "running")


def ways(role: str) -> list[str]:
    """Names of the ways to replace an argument of this role."""
    if role in TENSORS:
        return [*LEGAL, *READ_ONLY, *WRONG, *NO_TENSORS]
    return list(LISTS if role == "list" else VALUES[role])


def replaced(role: str, way: str, value: Any) -> Any:
    """The argument, replaced; as it is where there is no such thing.

    What may be None is given a tensor of three elements first.
    """
    if role == "list":
        return LISTS[way](value)
    if role not in TENSORS:
        return VALUES[role][way]
    if way in NO_TENSORS:
        return NO_TENSORS[way]
    t = torch.ones(3) if value is None else value
    if not isinstance(t, Tensor):
        return t
    change = (LEGAL | READ_ONLY | WRONG)[way]
    try:
        new = change(t.detach())
    except (RuntimeError, IndexError, ValueError, NotImplementedError, TypeError):
        return value
    differentiable = isinstance(new, Tensor) and new.is_floating_point()
    if way not in READ_ONLY and differentiable and t.requires_grad and not new.is_inference():
        new.requires_grad_()
    return new


def is_legal(role: str, way: str) -> bool:
    """Whether a public function has to serve it."""
    return (role in ("tensor", "running") and way in LEGAL) or (
        role == "tensor" and way in READ_ONLY
    )
