"""relu(x + residual) and its backward (device/add_relu.py)."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from fusedres.triton_kernels._args import DEVICE, DTYPES, acc, described
from fusedres.triton_kernels._launch import launch
from fusedres.triton_kernels.device.add_relu import add_relu_bwd_kernel, add_relu_fwd_kernel

BLOCK_BYTES = 8192  # of each tensor: 4 accesses of 16 bytes a thread
WARPS = 4


def _run(op: str, kernel: Any, first: Tensor, second: Tensor) -> Tensor:
    """Runs the kernel on two tensors of one device and layout; the result is like the first."""
    alike = (first.shape, first.dtype, first.device) == (second.shape, second.dtype, second.device)
    if not alike or first.dtype not in DTYPES or first.device.type != DEVICE:
        raise ValueError(
            f"{op}: needs two tensors alike on {DEVICE}, got {described(first)} and "
            f"{described(second)}"
        )
    channels_last = torch.channels_last if first.dim() == 4 else torch.contiguous_format
    if not any(
        all(t.is_contiguous(memory_format=order) for t in (first, second))
        for order in (torch.contiguous_format, channels_last)
    ):
        raise ValueError(
            f"{op}: needs two tensors that are dense in one memory format, got {described(first)} "
            f"and {described(second)}"
        )
    result = torch.empty_like(first)
    numel, block = first.numel(), BLOCK_BYTES // first.element_size()
    grid = (triton.cdiv(numel, block),)
    launch(kernel, grid, first, second, result, numel, acc(first.dtype), block, num_warps=WARPS)
    return result


def add_relu_fwd(
    x: Tensor,  # [...]
    residual: Tensor,  # like x
) -> Tensor:
    """relu(x + residual), dense in x's memory format."""
    return _run("add_relu_fwd", add_relu_fwd_kernel, x, residual)


def add_relu_bwd(
    grad: Tensor,  # [...]
    out: Tensor,  # like grad; the result of add_relu_fwd
) -> Tensor:
    """dx, the gradient of x and of the residual alike: 0 where out <= 0, else grad."""
    return _run("add_relu_bwd", add_relu_bwd_kernel, grad, out)
