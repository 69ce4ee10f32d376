"""relu(x + residual) and its backward (device/add_relu.py)."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from fusedres._checks import check_alike
from fusedres.triton_kernels._args import DEVICE, acc
from fusedres.triton_kernels._launch import launch
from fusedres.triton_kernels.device.add_relu import add_relu_bwd_kernel, add_relu_fwd_kernel

BLOCK_BYTES = 8192  # of each tensor: 4 accesses of 16 bytes a thread
WARPS = 4


def _run(op: str, kernel: Any, first: Tensor, second: Tensor) -> Tensor:
    """Runs the kernel on two tensors of one device and layout; the result is like the first."""
    check_alike(op, first, second, (DEVICE,))
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
