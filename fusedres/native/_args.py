"""How tensors become arguments of fusedres._C."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from fusedres._tensors import memory_format_of, stat_dtype

# enum class DType and Layout in csrc/include/fusedres/types.h
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
NHWC, NCHW = 0, 1

# dtype, sizes, layout, threads: how every per-channel kernel's arguments begin
Head = tuple[int, torch.Size, int, int]


def pointer(tensor: Tensor | None) -> int:
    """Address of the first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def check(
    op: str,
    y: Tensor,
    full: Mapping[str, Tensor | None] = MappingProxyType({}),
    per_channel: Mapping[str, Tensor | None] = MappingProxyType({}),
) -> None:
    """What stands between a caller of torch.ops.fusedres and a bare pointer.

    `full` tensors are to be stored exactly as y is, `per_channel` ones [C] or, if sums, [2, C].

    Raises:
        ValueError: one of them is not; nothing has run.
    """
    if y.dim() != 4 or y.device.type != "cpu" or y.dtype not in DTYPES:
        raise ValueError(f"{op}: y must be [N, C, H, W] on the CPU, got {_described(y)}")
    memory_format = memory_format_of(y)
    for name, t in {"y": y, **full}.items():
        if t is not None and not (
            t.shape == y.shape
            and t.dtype == y.dtype
            and t.device == y.device
            and t.is_contiguous(memory_format=memory_format)
        ):
            raise ValueError(
                f"{op}: {name} must be {y.dtype} {list(y.shape)}, dense in {memory_format} on "
                f"{y.device}, got {_described(t)}"
            )
    for name, v in per_channel.items():
        shape = (2, y.size(1)) if "sums" in name else (y.size(1),)
        if v is not None and not (
            tuple(v.shape) == shape
            and v.dtype == stat_dtype(y.dtype)
            and v.device == y.device
            and v.is_contiguous()
        ):
            raise ValueError(
                f"{op}: {name} must be contiguous {stat_dtype(y.dtype)} {list(shape)} on "
                f"{y.device}, got {_described(v)}"
            )


def _described(t: Tensor) -> str:
    return f"{t.dtype} {list(t.shape)} with strides {list(t.stride())} on {t.device}"


def head(y: Tensor) -> Head:
    """What a kernel must know of y besides its address."""
    layout = NHWC if memory_format_of(y) == torch.channels_last else NCHW
    return DTYPES[y.dtype], y.shape, layout, torch.get_num_threads()


def like(y: Tensor) -> Tensor:
    """An uninitialised tensor of y's shape and dtype, dense in y's memory format."""
    return torch.empty_like(y, memory_format=memory_format_of(y))


def vectors(y: Tensor, *leading: int) -> Tensor:
    """An uninitialised [*leading, C] tensor in the dtype of y's per-channel vectors."""
    return torch.empty(*leading, y.size(1), dtype=stat_dtype(y.dtype), device=y.device)


def workspace(rows: int, sums: int, y: Tensor) -> Tensor:
    """Room for the partial results of a reduction, [rows, sums, C]."""
    return torch.empty(rows, sums, y.size(1), dtype=torch.float64, device=y.device)
