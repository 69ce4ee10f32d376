"""How tensors become arguments of fusedres._C."""

from __future__ import annotations

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
    return torch.empty(rows, sums, y.size(1), dtype=torch.float64)
