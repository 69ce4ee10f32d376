"""How tensors become arguments of fusedres._C."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fusedres import _checks
from fusedres._tensors import stat_dtype, stored_format
from fusedres.native import require

# enum class DType and Layout in csrc/include/fusedres/types.h
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
NHWC, NCHW = 0, 1
DEVICES = ("cpu", "cuda")
check = partial(_checks.check, devices=DEVICES)

# dtype, sizes, layout, device (-1: the CPU), threads or stream: how every kernel's arguments begin
Head = tuple[int, tuple[int, ...], int, int, int]


def pointers(*tensors: Tensor | None) -> tuple[int, ...]:
    """Addresses of the first elements; 0 for None."""
    return tuple([0 if t is None else t.data_ptr() for t in tensors])


def numbered(vector: Tensor | None) -> tuple[int, int]:
    """A vector of a dtype of its own: its dtype's code and its address."""
    return (0, 0) if vector is None else (DTYPES[vector.dtype], vector.data_ptr())


def where(t: Tensor) -> tuple[int, int]:
    """Where a kernel runs on t: -1 and a number of threads, or a GPU's index and a stream."""
    if t.device.type == "cpu":
        return -1, torch.get_num_threads()
    if not require().cuda_built:
        raise RuntimeError(
            "fusedres: got CUDA tensors, but the extension was built without CUDA kernels; "
            "rebuild it with nvcc on PATH, or with FUSEDRES_CUDA=wheel"
        )
    return t.device.index, torch.cuda.current_stream(t.device).cuda_stream


def head(y: Tensor) -> Head:
    """What a kernel must know of y besides its address."""
    layout = NHWC if stored_format(y) == torch.channels_last else NCHW
    return DTYPES[y.dtype], tuple(y.shape), layout, *where(y)


def on_cpu(args: Head) -> bool:
    """Whether CPU kernels run."""
    return args[3] < 0


def like(y: Tensor) -> Tensor:
    """An uninitialised tensor of y's shape and dtype, dense in y's memory format."""
    return torch.empty_like(y, memory_format=stored_format(y))


def vectors(y: Tensor, *leading: int) -> Tensor:
    """An uninitialised [*leading, C] tensor in the dtype of y's per-channel vectors."""
    return torch.empty(*leading, y.size(1), dtype=stat_dtype(y.dtype), device=y.device)


def workspace(size: int, y: Tensor) -> Tensor:
    """Room for the partial results of a reduction, so many bytes."""
    return torch.empty(size, dtype=torch.uint8, device=y.device)
