"""batch_norm: the statistics of a tensor that is already in memory, as a Deferred; conv_bn without
the convolution.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusedres import backends
from fusedres._tensors import memory_format_of, stat_dtype
from fusedres.deferred import Deferred
from fusedres.ops import _contract as contract
from fusedres.ops._contract import library
from fusedres.reference.batch_norm import batch_norm as reference_batch_norm

# --- the ops: schema, kernel look-up, fake --------------------------------------------------------

library.define(
    "batch_norm_fwd(Tensor y, Tensor? bn_weight, Tensor? running_mean, Tensor? running_var,"
    " bool training, float eps, str backend)"
    " -> (Tensor mean, Tensor var, Tensor rstd, Tensor scale)"
)
library.define(
    "batch_norm_bwd(Tensor g, Tensor y, Tensor mean, Tensor scale, Tensor rstd, Tensor sums,"
    " bool training, str backend) -> Tensor"
)


def statistics(
    y: Tensor,
    bn_weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean, biased var, rstd and scale of y: fresh [C] tensors, copies where the statistics are
    frozen.
    """
    dtype = stat_dtype(y.dtype)
    if training:
        mean, var = backends.kernels(backend, "batch_norm").batch_norm_stats(y)
    else:
        assert running_mean is not None and running_var is not None  # the contract's check
        mean, var = running_mean.to(dtype, copy=True), running_var.to(dtype, copy=True)
    rstd = torch.rsqrt(var + eps)
    scale = rstd.clone() if bn_weight is None else rstd * bn_weight.to(dtype)
    return mean, var, rstd, scale


def _bwd(
    g: Tensor,
    y: Tensor,
    mean: Tensor,
    scale: Tensor,
    rstd: Tensor,
    sums: Tensor,
    training: bool,
    backend: str,
) -> Tensor:
    kernel = backends.kernels(backend, "batch_norm").batch_norm_bwd
    return kernel(g, y, mean, scale, rstd, sums, training)


def statistics_fake(y: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four [C] vectors."""
    vectors = [y.new_empty(y.size(1), dtype=stat_dtype(y.dtype)) for _ in range(4)]
    return vectors[0], vectors[1], vectors[2], vectors[3]


library.impl("batch_norm_fwd", statistics, "CompositeExplicitAutograd")
library.impl("batch_norm_bwd", _bwd, "CompositeExplicitAutograd")
torch.library.register_fake("fusedres::batch_norm_fwd", statistics_fake)
torch.library.register_fake("fusedres::batch_norm_bwd", lambda g, y, *_: torch.empty_like(y))


# --- autograd -------------------------------------------------------------------------------------


def upstream(op: str, g: Tensor | None, sums: Tensor | None, y: Tensor) -> tuple[Tensor, Tensor]:
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
    return contract.dense(g, memory_format_of(y)), sums.contiguous()


def dtype_of(parameter: Tensor | None) -> torch.dtype | None:
    """All that backward needs of BatchNorm's weight and bias: what dtype their gradients have."""
    return None if parameter is None else parameter.dtype


def parameter_gradients(
    sums: Tensor, rstd: Tensor, weight: torch.dtype | None, bias: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None]:
    """BatchNorm's dweight and dbias, from the sums alone: no pass over memory."""
    dweight = None if weight is None else (sums[1] * rstd).to(weight)
    dbias = None if bias is None else sums[0].to(bias, copy=True)
    return dweight, dbias


class BatchNormFunction(torch.autograd.Function):
    """y, weight, bias, running_mean, running_var, training, eps, backend -> y, sums, mean, var,
    scale.
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
        eps: float,
        backend: str,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        mean, var, rstd, scale = torch.ops.fusedres.batch_norm_fwd(
            y, weight, running_mean, running_var, training, eps, backend
        )
        ctx.mark_non_differentiable(mean, var, scale)
        ctx.save_for_backward(y, mean, rstd, scale)
        ctx.parameters = dtype_of(weight), dtype_of(bias)
        ctx.training, ctx.backend = training, backend
        return y.view_as(y), mean.new_zeros(2, mean.size(0)), mean, var, scale

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, g: Tensor | None, sums: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        y, mean, rstd, scale = contract.stored_alike(*ctx.saved_tensors)
        g, sums = upstream("batch_norm", g, sums, y)
        dy = None
        if ctx.needs_input_grad[0]:
            dy = torch.ops.fusedres.batch_norm_bwd(
                g, y, mean, scale, rstd, sums, ctx.training, ctx.backend
            )
        return dy, *parameter_gradients(sums, rstd, *ctx.parameters), None, None, None, None, None


# --- the public function --------------------------------------------------------------------------


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
    op = "batch_norm"
    y = contract.check_tensor(op, "y", y)
    bn = contract.check_batch_norm(
        op, y, y.size(1), bn_weight, bn_bias, running_mean, running_var, training, momentum, eps
    )
    contract.check_bool(op, "relu", relu)
    contract.check_count(op, tuple(y.shape), training)
    residual = contract.check_join(op, residual, y, tuple(y.shape))
    y = contract.dense(y.to(contract.compute_dtype(y)), memory_format_of(y))
    backend = backends.choose(op, y.device.type, y.dtype).backend
    sums: Tensor | None = None
    if backend == "reference" or contract.exporting():
        mean, var, scale, bias = reference_batch_norm(
            y, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.training, bn.eps
        )
    else:
        y, sums, mean, var, scale = BatchNormFunction.apply(
            y, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.training, bn.eps, backend
        )
        bias = affine_bias(bn, mean)
    contract.update_running(bn, mean, var, y)
    return Deferred(y, mean, scale, bias, residual, relu, sums)


def affine_bias(bn: contract.BatchNorm, mean: Tensor) -> Tensor:
    """BatchNorm's bias as a Deferred carries it: outside autograd, its gradient comes from the
    sums.
    """
    return torch.zeros_like(mean) if bn.bias is None else bn.bias.detach().to(mean.dtype, copy=True)
