"""add_relu: relu(x + residual) in one pass, for use on its own; within a network conv_bn absorbs
it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedres import backends
from fusedres._tensors import memory_format_of
from fusedres.ops import _contract as contract
from fusedres.ops._contract import library, register_fake
from fusedres.reference.add_relu import add_relu as reference_add_relu

# --- the ops: schema, kernel look-up, fake --------------------------------------------------------

library.define("add_relu_fwd(Tensor x, Tensor residual, str backend) -> Tensor")
library.define("add_relu_bwd(Tensor grad, Tensor out, str backend) -> Tensor")


def _fwd(x: Tensor, residual: Tensor, backend: str) -> Tensor:
    return backends.kernels(backend, "add_relu").add_relu_fwd(x, residual)


def _bwd(grad: Tensor, out: Tensor, backend: str) -> Tensor:
    return backends.kernels(backend, "add_relu").add_relu_bwd(grad, out)


library.impl("add_relu_fwd", _fwd, "CompositeExplicitAutograd")
library.impl("add_relu_bwd", _bwd, "CompositeExplicitAutograd")
register_fake("add_relu_fwd", lambda x, *_: torch.empty_like(x))
register_fake("add_relu_bwd", lambda grad, out, *_: torch.empty_like(out))


# --- autograd -------------------------------------------------------------------------------------


class AddReluFunction(torch.autograd.Function):
    """x, residual, backend -> out. Saves the output; one gradient serves both inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, backend: str) -> Tensor:
        out = torch.ops.fusedres.add_relu_fwd(x, residual, backend)
        ctx.save_for_backward(out)
        ctx.backend = backend
        return out

    @staticmethod
    @contract.differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (out,) = ctx.saved_tensors
        out = as_stored(out, out)
        dx = torch.ops.fusedres.add_relu_bwd(as_stored(grad, out), out, ctx.backend)
        return dx, dx, None


def as_stored(t: Tensor, like: Tensor) -> Tensor:
    """t with its elements in memory in the order of `like`, which is dense."""
    if like.dim() == 4:
        return contract.dense(t, memory_format_of(like))
    return t.contiguous()


# --- the public function --------------------------------------------------------------------------


def add_relu(x: Tensor, residual: Tensor) -> Tensor:
    """relu(x + residual), the join of a residual block; NaN stays NaN.

    Args:
        x: a tensor of any shape in fp32, fp16, bf16 or fp64; autocast's dtype is used where
            autocast is on.
        residual: the same shape, dtype (autocast aside) and device.

    Returns:
        The shape of x; for 4-d x in channels_last or NCHW as x is (channels_last on a GPU), else
        contiguous.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named.
        RuntimeError: the backend asked for by name cannot serve these tensors.
    """
    op = "add_relu"
    x = contract.check_tensor(op, "x", x, ndim=None)
    residual = contract.check_tensor(op, "residual", residual, ndim=None)
    contract.check_savable(op, x=x, residual=residual)
    if contract.autocast_on(x):
        residual = residual.to(contract.compute_dtype(residual))
        x = x.to(contract.compute_dtype(x))
    contract.check_residual(op, "residual", residual, x, tuple(x.shape), x.dtype)
    backend = backends.backend_for(op, x)
    x = contract.dense(x, memory_format_of(x)) if x.dim() == 4 else x.contiguous()
    if backend == "reference" or contract.exporting():
        return reference_add_relu(x, residual)
    return AddReluFunction.apply(x, as_stored(residual, x), backend)
