"""relu(x + residual) and its backward (csrc/cpu/add_relu.cpp, csrc/cuda/add_relu.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres._checks import check_alike
from fusedres.native import _args, require
from fusedres.native._args import DEVICES, DTYPES, NCHW, pointers


def _launch(name: str, first: Tensor, second: Tensor) -> Tensor:
    """Runs `name` on two tensors of one device and layout; the result is like the first."""
    check_alike(name, first, second, DEVICES)
    result = torch.empty_like(first)
    sizes = (1, 1, 1, first.numel())  # element by element: how they are arranged does not matter
    args = (DTYPES[first.dtype], sizes, NCHW, *_args.where(first))
    getattr(require(), name)(args, pointers(first, second, result))
    return result


def add_relu_fwd(
    x: Tensor,  # [...]
    residual: Tensor,  # like x
) -> Tensor:
    """relu(x + residual), dense in x's memory format."""
    return _launch("add_relu_fwd", x, residual)


def add_relu_bwd(
    grad: Tensor,  # [...]
    out: Tensor,  # like grad; the result of add_relu_fwd
) -> Tensor:
    """dx, the gradient of x and of the residual alike: 0 where out <= 0, else grad."""
    return _launch("add_relu_bwd", grad, out)
