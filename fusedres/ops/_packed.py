"""Weights cast to the compute dtype together, once a step, for all convolutions of a model.

Under autocast every convolution needs its fp32 parameter in a half type, forward and backward. A
model opens `packing` around its forward: all of them are cast into one buffer, on a GPU by one
kernel that also stores them in channels_last, else by one multi-tensor copy. Nodes save their part
of it, so it is freed with the last of them in backward; there is no cache beyond it, and nothing
can go stale under the replay of a CUDA graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

import torch
from torch import Tensor

from fusedres import backends
from fusedres.native._pack import pack


class PackedWeights:
    """Casts of some weights, one after the other in a buffer, each on 16 bytes."""

    def __init__(self, weights: Sequence[Tensor], dtype: torch.dtype) -> None:
        views = pack(weights, dtype) if _kernel_serves(weights, dtype) else _copies(weights, dtype)
        self._casts = {
            w.data_ptr(): (w, _version(w), v) for w, v in zip(weights, views, strict=True)
        }

    def get(self, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The cast of a weight; None where it has none, or changed since."""
        packed = self._casts.get(weight.data_ptr())
        if packed is None:
            return None
        source, version, cast = packed
        same = (source.device, source.shape, source.stride(), source.dtype, version, cast.dtype)
        asked = (
            weight.device,
            weight.shape,
            weight.stride(),
            weight.dtype,
            _version(weight),
            dtype,
        )
        return cast if same == asked else None


def _kernel_serves(weights: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether there is one launch for them all."""
    half = dtype in (torch.float16, torch.bfloat16)
    if not half or any(w.dtype != torch.float32 or w.numel() >= 2**31 for w in weights):
        return False
    return backends.unavailable("cuda", "bn_act", weights[0].device.type, dtype) is None


def _copies(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Casts, each as its parameter is strided."""
    sizes = [-(-w.numel() // 8) * 8 for w in weights]
    buffer = weights[0].new_empty(sum(sizes), dtype=dtype)
    views = [
        chunk[: w.numel()].as_strided(w.shape, w.stride(), chunk.storage_offset())
        for chunk, w in zip(buffer.split(sizes), weights, strict=True)
    ]
    torch._foreach_copy_(views, list(weights))
    return views


_scope: ContextVar[PackedWeights | None] = ContextVar("fusedres_packed", default=None)


@contextlib.contextmanager
def packing(weights: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Casts weights of another dtype than `dtype`, for the convolutions within the block.

    Those that are on another device, or not there yet (sharded), are left to their convolutions.
    """
    others = [
        w.detach() for w in weights if w.dtype != dtype and w.device == device and _is_plain(w)
    ]
    token = _scope.set(PackedWeights(others, dtype) if others else None)
    try:
        yield
    finally:
        _scope.reset(token)


def _is_plain(w: Tensor) -> bool:
    if type(w) not in (Tensor, torch.nn.Parameter):
        return False  # a subclass casts as it sees fit
    if w.untyped_storage().nbytes() < w.nbytes:
        return False
    return w.is_contiguous() or w.is_contiguous(memory_format=torch.channels_last)


def _version(w: Tensor) -> int:
    """Counts changes in place; inference tensors have no counter, nor a backward to mislead."""
    return 0 if w.is_inference() else w._version


def packed_weights() -> PackedWeights | None:
    """The casts in force here."""
    return None if torch.compiler.is_compiling() else _scope.get()
