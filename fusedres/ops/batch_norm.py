"""batch_norm: the statistics of a tensor that is already in memory, as a Deferred; conv_bn without
the convolution. batch_norm_act: its value at once, for those who want nothing deferred.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedres import backends
from fusedres._norm import parameter_gradients
from fusedres._tensors import memory_format_of, stat_dtype
from fusedres.deferred import Deferred
from fusedres.ops import _contract as contract
from fusedres.ops._contract import library, register_fake
from fusedres.reference.batch_norm import batch_norm as reference_batch_norm

# --- the ops: schema, kernel look-up, fake --------------------------------------------------------

library.define(
    "batch_norm_fwd(Tensor y, Tensor? bn_weight, Tensor? bn_bias, Tensor(a!)? running_mean,"
    " Tensor(b!)? running_var, bool training, float momentum, Tensor? momentum_tensor, float eps,"
    " str backend) -> (Tensor mean, Tensor var, Tensor rstd, Tensor scale, Tensor bias)"
)
library.define(
    "batch_norm_bwd(Tensor g, Tensor y, Tensor mean, Tensor scale, Tensor rstd, Tensor sums,"
    " bool training, ScalarType? weight_dtype, ScalarType? bias_dtype, str backend)"
    " -> (Tensor dy, Tensor dweight, Tensor dbias)"
)
library.define(
    "batch_norm_act_fwd(Tensor y, Tensor? bn_weight, Tensor? bn_bias, Tensor(a!)? running_mean,"
    " Tensor(b!)? running_var, bool training, float momentum, Tensor? momentum_tensor, float eps,"
    " Tensor? residual, bool relu, str backend) -> (Tensor out, Tensor mean, Tensor rstd,"
    " Tensor scale, Tensor bias)"
)
library.define(
    "batch_norm_act_bwd(Tensor grad, Tensor? out, Tensor y, Tensor mean, Tensor scale, Tensor bias,"
    " Tensor rstd, bool residual, bool training, ScalarType? weight_dtype, ScalarType? bias_dtype,"
    " str backend) -> (Tensor g, Tensor dy, Tensor dweight, Tensor dbias)"
)


def _fwd(y: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *norm, backend = args
    kernel = backends.kernels(backend, "batch_norm").batch_norm_fwd
    return kernel(y, *normalization(*norm))


def _act_fwd(y: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *norm, residual, relu, backend = args
    kernel = backends.kernels(backend, "batch_norm").batch_norm_act_fwd
    out, (mean, _, rstd, scale, bias) = kernel(y, *normalization(*norm), residual, relu)
    return out, mean, rstd, scale, bias


def _act_fwd_fake(y: Tensor, *_: object) -> tuple[Tensor, ...]:
    return torch.empty_like(y), *statistics_fake(y)[:4]


def _act_bwd(
    grad: Tensor,
    out: Tensor | None,
    y: Tensor,
    mean: Tensor,
    scale: Tensor,
    bias: Tensor,
    rstd: Tensor,
    residual: bool,
    training: bool,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, ...]:
    kernel = backends.kernels(backend, "batch_norm").batch_norm_act_bwd
    types = (weight_dtype, bias_dtype)
    g, dy, *gradients = kernel(grad, out, y, mean, scale, bias, rstd, residual, training, *types)
    if out is None or not residual:
        g = y.new_empty(0)  # grad itself, which an op may not return, or of no use
    return g, dy, *(mean.new_empty(0) if t is None else t for t in gradients)


def _act_bwd_fake(
    grad: Tensor,
    out: Tensor | None,
    y: Tensor,
    mean: Tensor,
    scale: Tensor,
    bias: Tensor,
    rstd: Tensor,
    residual: bool,
    training: bool,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, ...]:
    g = torch.empty_like(y) if residual and out is not None else y.new_empty(0)
    types = (weight_dtype, bias_dtype)
    vectors = (mean.new_empty(0 if t is None else mean.size(0), dtype=t) for t in types)
    return g, torch.empty_like(y), *vectors


def _bwd(
    g: Tensor,
    y: Tensor,
    mean: Tensor,
    scale: Tensor,
    rstd: Tensor,
    sums: Tensor,
    training: bool,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, ...]:
    kernel = backends.kernels(backend, "batch_norm").batch_norm_bwd
    outputs = kernel(g, y, mean, scale, rstd, sums, training, weight_dtype, bias_dtype)
    return tuple(mean.new_empty(0) if t is None else t for t in outputs)


def _bwd_fake(
    g: Tensor,
    y: Tensor,
    mean: Tensor,
    scale: Tensor,
    rstd: Tensor,
    sums: Tensor,
    training: bool,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, ...]:
    types = (weight_dtype, bias_dtype)
    vectors = (mean.new_empty(0 if t is None else mean.size(0), dtype=t) for t in types)
    return torch.empty_like(y), *vectors


def statistics_fake(y: Tensor, *_: object) -> tuple[Tensor, ...]:
    """Five [C] vectors."""
    return tuple(y.new_empty(y.size(1), dtype=stat_dtype(y.dtype)) for _ in range(5))


def momentum_arguments(momentum: float | Tensor) -> tuple[float, Tensor | None]:
    """A momentum as schemas have it: a number, and a tensor that counts instead where given."""
    return (0.0, momentum) if isinstance(momentum, Tensor) else (float(momentum), None)


def normalization(
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    momentum_tensor: Tensor | None,
    eps: float,
) -> tuple[Any, ...]:
    """BatchNorm's arguments of a schema as rooms take them: momentum is one argument. Tells
    autograd that a kernel is about to move the running statistics in place.
    """
    if training:
        running = (t for t in (running_mean, running_var) if t is not None)
        torch.autograd.graph.increment_version(list(running))
    amount = momentum if momentum_tensor is None else momentum_tensor
    return bn_weight, bn_bias, running_mean, running_var, training, amount, eps


def present(gradients: Sequence[Tensor], *types: torch.dtype | None) -> list[Tensor | None]:
    """An op's gradients, None where it has an empty tensor for want of a parameter."""
    return [None if t is None else g for g, t in zip(gradients, types, strict=True)]


library.impl("batch_norm_fwd", _fwd, "CompositeExplicitAutograd")
library.impl("batch_norm_bwd", _bwd, "CompositeExplicitAutograd")
library.impl("batch_norm_act_fwd", _act_fwd, "CompositeExplicitAutograd")
library.impl("batch_norm_act_bwd", _act_bwd, "CompositeExplicitAutograd")
register_fake("batch_norm_fwd", statistics_fake)
register_fake("batch_norm_act_fwd", _act_fwd_fake)
register_fake("batch_norm_act_bwd", _act_bwd_fake)
register_fake("batch_norm_bwd", _bwd_fake)


# --- autograd -------------------------------------------------------------------------------------


def upstream(
    op: str,
    g: Tensor | None,
    sums: Tensor | None,
    y: Tensor,
    memory_format: torch.memory_format | None = None,  # y's, where y cannot tell
) -> tuple[Tensor, Tensor]:
    """The gradient pair that reached a Deferred, dense as y; zeros where only the emitted
    activation was used.

    Raises:
        RuntimeError: one of the two is missing, so y was read by something other than fusedres'
            ops.
    """
    if g is None and sums is None:
        g = torch.zeros_like(y)
        return g, y.new_zeros(2, y.size(1), dtype=stat_dtype(y.dtype))
    if g is None or sums is None:
        raise RuntimeError(
            f"{op}: a gradient reached Deferred.y without its sums, so y was used directly; its "
            "gradient is not dL/dy: read a Deferred through .value() or another fusedres op"
        )
    return contract.dense(g, memory_format or memory_format_of(y)), sums.contiguous()


def dtype_of(parameter: Tensor | None) -> torch.dtype | None:
    """All that backward needs of BatchNorm's weight and bias: what dtype their gradients have."""
    return None if parameter is None else parameter.dtype


class BatchNormFunction(torch.autograd.Function):
    """y, weight, bias, running_mean, running_var, training, momentum, eps, backend -> y, sums,
    mean, scale, bias.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float | Tensor,
        eps: float,
        backend: str,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        amount = momentum_arguments(momentum)
        mean, _, rstd, scale, shift = torch.ops.fusedres.batch_norm_fwd(
            y, weight, bias, running_mean, running_var, training, *amount, eps, backend
        )
        ctx.mark_non_differentiable(mean, scale, shift)
        ctx.save_for_backward(y, mean, rstd, scale)
        ctx.parameters = dtype_of(weight), dtype_of(bias)
        ctx.training, ctx.backend = training, backend
        return y.view_as(y), mean.new_empty(2, mean.size(0)), mean, scale, shift

    @staticmethod
    @contract.differentiable_once
    def backward(
        ctx: Any, g: Tensor | None, sums: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        y, mean, rstd, scale = contract.stored_alike(*ctx.saved_tensors)
        g, sums = upstream("batch_norm", g, sums, y)
        dy = None
        if ctx.needs_input_grad[0]:
            dy, *gradients = torch.ops.fusedres.batch_norm_bwd(
                g, y, mean, scale, rstd, sums, ctx.training, *ctx.parameters, ctx.backend
            )
            gradients = present(gradients, *ctx.parameters)
        else:
            gradients = list(parameter_gradients(sums, rstd, *ctx.parameters))
        return dy, *gradients, None, None, None, None, None, None


class BatchNormActFunction(torch.autograd.Function):
    """y, weight, bias, running_mean, running_var, residual, training, momentum, eps, relu, backend
    -> out. Saves y, mean, rstd, scale, bias, and the output where ReLU is on.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        residual: Tensor | None,
        training: bool,
        momentum: float | Tensor,
        eps: float,
        relu: bool,
        backend: str,
    ) -> Tensor:
        amount = momentum_arguments(momentum)
        out, mean, rstd, scale, shift = torch.ops.fusedres.batch_norm_act_fwd(
            y, weight, bias, running_mean, running_var, training, *amount, eps, residual, relu,
            backend,
        )  # fmt: skip
        ctx.save_for_backward(y, mean, rstd, scale, shift, out if relu else None)
        ctx.parameters = dtype_of(weight), dtype_of(bias)
        ctx.training, ctx.backend = training, backend
        ctx.has_residual = residual is not None
        return out

    @staticmethod
    @contract.differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, mean, rstd, scale, bias, out = contract.stored_alike(*ctx.saved_tensors)
        grad = contract.dense(grad, memory_format_of(y))
        dy = None
        if ctx.needs_input_grad[0]:
            g, dy, *gradients = torch.ops.fusedres.batch_norm_act_bwd(
                grad, out, y, mean, scale, bias, rstd, ctx.has_residual, ctx.training,
                *ctx.parameters, ctx.backend,
            )  # fmt: skip
            gradients = present(gradients, *ctx.parameters)
        else:
            g, sums, _ = torch.ops.fusedres.bn_act_bwd(grad, out, y, mean, None, None, ctx.backend)
            gradients = list(parameter_gradients(sums, rstd, *ctx.parameters))
        if out is None:
            g = grad
        g_residual = g if ctx.has_residual else None
        return dy, *gradients, None, None, g_residual, None, None, None, None, None


# --- the public functions -------------------------------------------------------------------------


def _checked(
    y: object,
    bn_weight: object,
    bn_bias: object,
    running_mean: object,
    running_var: object,
    training: object,
    momentum: object,
    eps: object,
    residual: object,
    relu: object,
) -> tuple[Tensor, contract.BatchNorm, Tensor | Deferred | None, str]:
    """y dense in the compute dtype, BatchNorm's arguments, the residual, and the backend."""
    op = "batch_norm"
    y = contract.check_tensor(op, "y", y)
    bn = contract.check_batch_norm(
        op, y, y.size(1), bn_weight, bn_bias, running_mean, running_var, training, momentum, eps
    )
    contract.check_bool(op, "relu", relu)
    contract.check_count(op, tuple(y.shape), bn.training)
    residual = contract.check_join(op, residual, y, tuple(y.shape))
    contract.check_savable(op, y=y, bn_weight=bn.weight, bn_bias=bn.bias, residual=residual)
    y = contract.dense(y.to(contract.compute_dtype(y)), memory_format_of(y))
    backend = backends.backend_for(op, y)
    return y, bn, residual, "reference" if contract.exporting() else backend


def _reference(
    y: Tensor, bn: contract.BatchNorm, residual: Tensor | Deferred | None, relu: bool
) -> Deferred:
    """By plain torch under ordinary autograd."""
    mean, var, scale, bias = reference_batch_norm(
        y, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.training, bn.eps
    )
    contract.update_running(bn, mean, var, y)
    return Deferred(y, mean, scale, bias, residual, relu)


def batch_norm(
    y: Tensor,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    training: bool = True,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    residual: Tensor | Deferred | None = None,
    relu: bool = True,
) -> Deferred:
    """BatchNorm of a Tensor, deferred: takes the statistics, leaves the rest to what reads the
    Deferred.

    Args:
        y: [N, C, H, W] in fp32, fp16, bf16 or fp64; autocast's dtype is used where autocast is on.
        bn_weight, bn_bias: [C], any floating dtype; None stands for ones and zeros.
        running_mean, running_var: [C], moved in place by `momentum` if training; read if not.
        training: normalise by this batch's mean and biased variance.
        momentum: a number, or a 0-d tensor on y's device.
        eps: added to the variance.
        residual: what joins before the activation of the result: a Tensor of its shape, or a
            Deferred without ReLU and without a residual of its own.
        relu: whether the activation ends in ReLU.

    Returns:
        Deferred over y, in channels_last or NCHW as y is (channels_last on a GPU).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named; one
            value per channel in training.
        RuntimeError: the backend asked for by name cannot serve these tensors.
    """
    y, bn, residual, backend = _checked(
        y, bn_weight, bn_bias, running_mean, running_var, training, momentum, eps, residual, relu
    )
    if backend == "reference":
        return _reference(y, bn, residual, relu)
    y, sums, mean, scale, bias = BatchNormFunction.apply(
        y, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.training, bn.momentum, bn.eps,
        backend,
    )  # fmt: skip
    return Deferred(y, mean, scale, bias, residual, relu, sums)


def batch_norm_act(
    y: Tensor,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    training: bool = True,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = True,
) -> Tensor:
    """`batch_norm(...).value()` as one node, on a GPU in one kernel where y fits on the chip.

    Args and Raises: those of `batch_norm`, but residual is no Deferred.

    Returns:
        [N, C, H, W] in the compute dtype, in y's memory format (channels_last on a GPU).
    """
    if isinstance(residual, Deferred):
        raise TypeError("batch_norm: residual must be a Tensor or None here, got Deferred")
    y, bn, joined, backend = _checked(
        y, bn_weight, bn_bias, running_mean, running_var, training, momentum, eps, residual, relu
    )
    if backend == "reference":
        return _reference(y, bn, joined, relu).value()
    if isinstance(joined, Tensor):
        joined = contract.dense(joined, memory_format_of(y))
    return BatchNormActFunction.apply(
        y, bn.weight, bn.bias, bn.running_mean, bn.running_var, joined, bn.training, bn.momentum,
        bn.eps, relu, backend,
    )  # fmt: skip
