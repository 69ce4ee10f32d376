"""How tensors become arguments of kernels: checks, allocation, and the matrix they are seen as."""

from __future__ import annotations

from functools import partial

import torch
import triton.language as tl
from torch import Tensor

from fusedres import _checks
from fusedres._tensors import INTERPRETED, stat_dtype

DEVICE = "cpu" if INTERPRETED else "cuda"
check = partial(_checks.check, devices=(DEVICE,), memory_format=torch.channels_last)


def rows(y: Tensor) -> int:
    """N*H*W: the rows of y [N, C, H, W] seen as a matrix of C columns."""
    return y.size(0) * y.size(2) * y.size(3)


def acc(dtype: torch.dtype) -> tl.dtype:
    """The ACC of kernels over tensors of `dtype`."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def like(y: Tensor) -> Tensor:
    """An uninitialised tensor of y's shape and dtype in channels_last."""
    return torch.empty_like(y, memory_format=torch.channels_last)


def vectors(y: Tensor, *leading: int) -> Tensor:
    """An uninitialised [*leading, C] tensor in the dtype of y's per-channel vectors."""
    return torch.empty(*leading, y.size(1), dtype=stat_dtype(y.dtype), device=y.device)
