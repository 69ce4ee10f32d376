"""relu(x + residual) and its backward (csrc/cpu/add_relu.cpp, csrc/cuda/add_relu.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.native import _args, require
from fusedres.native._args import DTYPES, NCHW, described, pointers


def _launch(name: str, first: Tensor, second: Tensor) -> Tensor:
    """Runs `name` on two tensors of one device and layout; the result is like the first."""
    kinds = [(t.shape, t.dtype, t.device, t.layout) for t in (first, second)]
    served = first.dtype in DTYPES and first.device.type in ("cpu", "cuda")
    if kinds[0] != kinds[1] or not served or first.layout != torch.strided:
        raise ValueError(
            f"{name}: needs two tensors alike, got {described(first)} and {described(second)}"
        )
    channels_last = torch.channels_last if first.dim() == 4 else torch.contiguous_format
    if not any(
        all(t.is_contiguous(memory_format=order) for t in (first, second))
        for order in (torch.contiguous_format, channels_last)
    ):
        raise ValueError(f"{name}: needs two tensors that are dense in one memory format")
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
