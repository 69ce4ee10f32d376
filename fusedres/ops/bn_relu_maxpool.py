"""bn_relu_maxpool: the stem's normalisation, ReLU and max pooling, without writing the activation
between them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedres import backends
from fusedres._tensors import memory_format_of
from fusedres.deferred import Deferred
from fusedres.ops import _contract as contract
from fusedres.ops._contract import library, register_fake
from fusedres.ops.bn_act import settle
from fusedres.reference.bn_relu_maxpool import bn_relu_maxpool as reference_bn_relu_maxpool

# --- the ops: schema, kernel look-up, fake --------------------------------------------------------

library.define(
    "bn_relu_maxpool_fwd(Tensor y, Tensor mean, Tensor scale, Tensor bias, int kernel_size,"
    " int stride, int padding, str backend) -> Tensor"
)
library.define(
    "bn_relu_maxpool_bwd(Tensor grad, Tensor y, Tensor mean, Tensor scale, Tensor bias,"
    " int kernel_size, int stride, int padding, str backend) -> (Tensor g, Tensor sums)"
)


def _fwd(
    y: Tensor,
    mean: Tensor,
    scale: Tensor,
    bias: Tensor,
    kernel_size: int,
    stride: int,
    padding: int,
    backend: str,
) -> Tensor:
    kernel = backends.kernels(backend, "bn_relu_maxpool").bn_relu_maxpool_fwd
    return kernel(y, mean, scale, bias, kernel_size, stride, padding)


def _bwd(
    grad: Tensor,
    y: Tensor,
    mean: Tensor,
    scale: Tensor,
    bias: Tensor,
    kernel_size: int,
    stride: int,
    padding: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    kernel = backends.kernels(backend, "bn_relu_maxpool").bn_relu_maxpool_bwd
    return kernel(grad, y, mean, scale, bias, kernel_size, stride, padding)


def pooled(size: int, kernel_size: int, stride: int, padding: int) -> int:
    """Windows along an extent."""
    return (size + 2 * padding - kernel_size) // stride + 1


def _fwd_fake(
    y: Tensor,
    mean: Tensor,
    scale: Tensor,
    bias: Tensor,
    kernel_size: int,
    stride: int,
    padding: int,
    backend: str,
) -> Tensor:
    window = (kernel_size, stride, padding)
    shape = (y.size(0), y.size(1), pooled(y.size(2), *window), pooled(y.size(3), *window))
    return torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=memory_format_of(y))


library.impl("bn_relu_maxpool_fwd", _fwd, "CompositeExplicitAutograd")
library.impl("bn_relu_maxpool_bwd", _bwd, "CompositeExplicitAutograd")
register_fake("bn_relu_maxpool_fwd", _fwd_fake)
register_fake(
    "bn_relu_maxpool_bwd",
    lambda grad, y, mean, *_: (torch.empty_like(y), mean.new_empty(2, mean.size(0))),
)


# --- autograd -------------------------------------------------------------------------------------


class BnReluMaxpoolFunction(torch.autograd.Function):
    """y, sums, mean, scale, bias, kernel_size, stride, padding, backend -> p. Saves its inputs, no
    indices.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        sums: Tensor | None,
        mean: Tensor,
        scale: Tensor,
        bias: Tensor,
        kernel_size: int,
        stride: int,
        padding: int,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(y, mean, scale, bias)
        ctx.config = (kernel_size, stride, padding, backend)
        return torch.ops.fusedres.bn_relu_maxpool_fwd(
            y, mean, scale, bias, kernel_size, stride, padding, backend
        )

    @staticmethod
    @contract.differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, mean, scale, bias = contract.stored_alike(*ctx.saved_tensors)
        grad = contract.dense(grad, memory_format_of(y))
        g, sums = torch.ops.fusedres.bn_relu_maxpool_bwd(grad, y, mean, scale, bias, *ctx.config)
        return g, sums, None, None, None, None, None, None, None


# --- the public function --------------------------------------------------------------------------


def check_window(
    op: str,
    shape: tuple[int, ...],
    kernel_size: int,
    stride: int,
    padding: int,
    prefix: str = "",  # of the names of stride and padding
) -> tuple[int, int]:
    """Height and width that the pool leaves of an activation of this shape."""
    contract.check_int(op, "kernel_size", kernel_size, 1)
    contract.check_int(op, f"{prefix}stride", stride, 1)
    contract.check_int(op, f"{prefix}padding", padding, 0)
    if kernel_size > 15:
        raise ValueError(f"{op}: kernel_size must be at most 15, got {kernel_size}")
    if padding > kernel_size // 2:
        raise ValueError(
            f"{op}: {prefix}padding must be at most half of kernel_size {kernel_size}, got "
            f"{padding}"
        )
    height, width = (pooled(extent, kernel_size, stride, padding) for extent in shape[2:])
    if min(height, width) < 1:
        raise ValueError(
            f"{op}: kernel_size {kernel_size} does not fit the padded input (shape {list(shape)}, "
            f"{prefix}padding {padding})"
        )
    return height, width


def bn_relu_maxpool(
    input: Deferred, kernel_size: int = 3, stride: int = 2, padding: int = 1
) -> Tensor:
    """max_pool2d(relu((y - mean) * scale + bias)) of a Deferred, as the stem of a ResNet has it.

    Among equal maxima of a window the first in row-major order takes the gradient, as in torch.

    Args:
        input: a Deferred over y [N, C, H, W] in fp32, fp16, bf16 or fp64, with ReLU, without
            residual.
        kernel_size: side of the window, 1 to 15.
        stride: step of the window, at least 1.
        padding: on every side, at most half of kernel_size; never wins.

    Returns:
        [N, C, OH, OW] in y's dtype and memory format (channels_last on a GPU).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named; a
            window larger than the padded input.
        RuntimeError: the backend asked for by name cannot serve these tensors.
    """
    op = "bn_relu_maxpool"
    if not isinstance(input, Deferred):
        raise TypeError(f"{op}: input must be a Deferred, got {type(input).__name__}")
    contract.check_deferred(op, "input", input)
    contract.check_savable(op, input=input)
    if not input.relu or input.residual is not None:
        got = "one with a residual" if input.residual is not None else "one without ReLU"
        raise ValueError(f"{op}: input must be a Deferred with ReLU and no residual, got {got}")
    check_window(op, tuple(input.shape), kernel_size, stride, padding)
    backend = backends.backend_for(op, input.y)
    if contract.exporting():
        backend = "reference"
    d = settle(op, input, backend)
    tensors = (d.y, d.mean, d.scale, d.bias)
    if backend == "reference" or d.is_ordinary():
        return reference_bn_relu_maxpool(*tensors, kernel_size, stride, padding)
    return BnReluMaxpoolFunction.apply(
        d.y, d.sums, d.mean, d.scale, d.bias, kernel_size, stride, padding, backend
    )
