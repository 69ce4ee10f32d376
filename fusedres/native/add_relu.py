"""relu(x + residual) and its backward (csrc/cpu/add_relu.cpp, csrc/cuda/add_relu.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.native import require
from fusedres.native._args import DTYPES


def _launch(name: str, first: Tensor, second: Tensor) -> Tensor:
    """Runs `name` on two tensors of one device and layout; the result is like the first."""
    result = torch.empty_like(first)
    pointers = (first.data_ptr(), second.data_ptr(), result.data_ptr())
    c, dtype, device = require(), DTYPES[first.dtype], first.device
    if device.type == "cpu":
        getattr(c, name)(dtype, first.numel(), torch.get_num_threads(), *pointers)
        return result
    if not c.cuda_built:
        raise RuntimeError(
            f"fusedres: {name} got CUDA tensors, but the extension was built without CUDA kernels; "
            "rebuild it with nvcc on PATH, or with FUSEDRES_CUDA=wheel"
        )
    stream = torch.cuda.current_stream(device).cuda_stream
    getattr(c, f"{name}_cuda")(dtype, first.numel(), device.index, stream, *pointers)
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
