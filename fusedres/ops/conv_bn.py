"""conv_bn: one autograd node for a convolution, the activation in front of it and the statistics
behind it.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusedres import backends
from fusedres._conv import Conv, Source, Upstream, output_shape
from fusedres._norm import parameter_gradients
from fusedres._tensors import memory_format_of
from fusedres.deferred import Deferred
from fusedres.library import conv_bn as split
from fusedres.ops import _contract as contract
from fusedres.ops._contract import library
from fusedres.ops._packed import PackedWeights, packed_weights
from fusedres.ops.batch_norm import (
    dtype_of,
    momentum_arguments,
    normalization,
    present,
    statistics_fake,
    upstream,
)
from fusedres.ops.bn_act import flatten, reference_value, settle
from fusedres.reference.conv_bn import conv_bn as reference_conv_bn

# --- the ops: schema, kernel look-up, fake --------------------------------------------------------

_SOURCE = (
    "Tensor x, Tensor? mean, Tensor? scale, Tensor? bias, Tensor? residual, Tensor? res_mean,"
    " Tensor? res_scale, Tensor? res_bias, bool relu"
)
# `packed` is the weight in the compute dtype, where it was cast together with others already
_CONV = "Tensor weight, Tensor? packed, int[2] stride, int[4] padding, int[2] dilation, int groups"
library.define(
    f"conv_bn_fwd({_SOURCE}, {_CONV}, bool emit, Tensor? bn_weight, Tensor? bn_bias,"
    " Tensor(a!)? running_mean, Tensor(b!)? running_var, bool training, float momentum,"
    " Tensor? momentum_tensor, float eps, str backend, str plan) -> (Tensor y, Tensor y_mean,"
    " Tensor y_var, Tensor y_rstd, Tensor y_scale, Tensor y_bias, Tensor a)"
)
library.define(
    f"conv_bn_bwd({_SOURCE}, {_CONV}, Tensor? a, Tensor g, Tensor sums, Tensor? grad_a, Tensor y,"
    " Tensor y_mean, Tensor y_scale, Tensor y_rstd, bool training, bool need_input,"
    " bool need_weight, ScalarType? bn_weight_dtype, ScalarType? bn_bias_dtype, str backend,"
    " str plan) -> (Tensor g_in, Tensor in_sums, Tensor res_sums, Tensor dw, Tensor dweight,"
    " Tensor dbias)"
)


class _Operands(NamedTuple):
    """What both directions start with."""

    source: Source
    weight: Tensor
    packed: Tensor | None
    conv: Conv

    @classmethod
    def of(cls, args: tuple[Any, ...]) -> tuple[_Operands, tuple[Any, ...]]:
        """An op's arguments, in the order of its schema, and what follows these."""
        source, rest = Source(*args[:9]), args[9:]
        stride, padding, dilation, groups = rest[2:6]
        conv = Conv(tuple(stride), tuple(padding), tuple(dilation), groups)
        return cls(source, rest[0], rest[1], conv), rest[6:]

    def cast_weight(self) -> Tensor:
        """The weight in the compute dtype."""
        return self.weight.to(self.source.x.dtype) if self.packed is None else self.packed


class _Forward(NamedTuple):
    """What the forward op takes beside its operands."""

    emit: bool
    bn_weight: Tensor | None
    bn_bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool
    momentum: float
    momentum_tensor: Tensor | None
    eps: float
    backend: str
    plan: str


class _Backward(NamedTuple):
    """What the backward op takes beside its operands."""

    a: Tensor | None
    g: Tensor
    sums: Tensor
    grad_a: Tensor | None
    y: Tensor
    y_mean: Tensor
    y_scale: Tensor
    y_rstd: Tensor
    training: bool
    need_input: bool
    need_weight: bool
    bn_weight_dtype: torch.dtype | None
    bn_bias_dtype: torch.dtype | None
    backend: str
    plan: str


def _fwd(*args: Any) -> tuple[Tensor, ...]:
    operands, rest = _Operands.of(args)
    source, conv, weight = operands.source, operands.conv, operands.cast_weight()
    o = _Forward(*rest)
    norm = normalization(*o[1:9])
    if o.plan == "fused":
        kernel = backends.kernels(o.backend, "conv_bn").conv_bn_fwd
        y, statistics, a = kernel(source, weight, conv, o.emit, *norm)
    else:
        memory_format = memory_format_of(source.x)
        light = backends.kernels(o.backend, "bn_act")
        a, y = split.conv_bn_fwd(light, source, weight, conv, memory_format)
        statistics = backends.kernels(o.backend, "batch_norm").batch_norm_fwd(y, *norm)
    return y, *statistics, a if o.emit else y.new_empty(0)


def _fwd_fake(*args: Any) -> tuple[Tensor, ...]:
    operands, (emit, *_) = _Operands.of(args)
    x = operands.source.x
    shape = output_shape(x.shape, operands.weight.shape, operands.conv)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))
    return y, *statistics_fake(y), torch.empty_like(x) if emit else x.new_empty(0)


def _bwd(*args: Any) -> tuple[Tensor, ...]:
    operands, rest = _Operands.of(args)
    source, conv, weight = operands.source, operands.conv, operands.cast_weight()
    o = _Backward(*rest)
    out = output_shape(source.x.shape, weight.shape, conv)
    if tuple(o.y.shape) != out:  # the library would believe it
        raise ValueError(f"conv_bn_bwd: y must have shape {list(out)}, got {list(o.y.shape)}")
    own = (o.y, o.y_mean, o.y_scale, o.y_rstd)
    up = Upstream(o.g, o.sums, *own, None, o.training)
    needs = (o.need_input, o.need_weight)
    types = (o.bn_weight_dtype, o.bn_bias_dtype)
    outputs: tuple[Tensor | None, ...]
    if o.plan == "fused":
        kernel = backends.kernels(o.backend, "conv_bn").conv_bn_bwd
        outputs = kernel(
            source, weight, operands.weight, conv, o.a, up, o.grad_a, *needs, *types
        )  # fmt: skip
    else:
        apply = backends.kernels(o.backend, "batch_norm").batch_norm_bwd
        dy, *gradients = apply(o.g, *own, o.sums, o.training, *types)
        light = backends.kernels(o.backend, "bn_act")
        outputs = split.conv_bn_bwd(
            light, dy, o.grad_a, source, o.a, weight, operands.weight, conv, *needs,
            memory_format_of(source.x),
        )  # fmt: skip
        outputs += tuple(gradients)
    return tuple(o.g.new_empty(0) if t is None else t for t in outputs)


def _bwd_fake(*args: Any) -> tuple[Tensor, ...]:
    operands, rest = _Operands.of(args)
    x, mean, res_mean = (getattr(operands.source, name) for name in ("x", "mean", "res_mean"))
    o = _Backward(*rest)
    none = x.new_empty(0)
    g_in = torch.empty_like(x) if o.need_input else none
    sums = none if mean is None or not o.need_input else mean.new_empty(2, mean.size(0))
    res_sums = none if res_mean is None or not o.need_input else torch.empty_like(sums)
    dw = torch.empty_like(operands.weight) if o.need_weight else none
    types = (o.bn_weight_dtype, o.bn_bias_dtype)
    vectors = (none if t is None else o.y_mean.new_empty(o.y.size(1), dtype=t) for t in types)
    return g_in, sums, res_sums, dw, *vectors


library.impl("conv_bn_fwd", _fwd, "CompositeExplicitAutograd")
library.impl("conv_bn_bwd", _bwd, "CompositeExplicitAutograd")
torch.library.register_fake("fusedres::conv_bn_fwd", _fwd_fake)
torch.library.register_fake("fusedres::conv_bn_bwd", _bwd_fake)


# --- autograd -------------------------------------------------------------------------------------


class _Config(NamedTuple):
    """What a node needs beside tensors."""

    relu: bool  # of the input
    emit: bool
    conv: Conv
    training: bool
    momentum: float | Tensor
    eps: float
    backend: str
    plan: str
    packed: PackedWeights | None


class ConvBNFunction(torch.autograd.Function):
    """The ten tensors of the input, weight, BatchNorm's four, config -> y, sums, mean, scale, bias,
    emitted.

    Saved: the input and its vectors; the activation if and only if it was emitted (the residual is
    then not saved); a Deferred residual's y and mean; own y, mean, scale, rstd; the weight as the
    parameter holds it, and its cast only where the casts of a whole model share one buffer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        x_sums: Tensor | None,
        x_mean: Tensor | None,
        x_scale: Tensor | None,
        x_bias: Tensor | None,
        residual: Tensor | None,
        res_sums: Tensor | None,
        res_mean: Tensor | None,
        res_scale: Tensor | None,
        res_bias: Tensor | None,
        weight: Tensor,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        config: _Config,
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        deferred = x_mean is not None
        source = (x, x_mean, x_scale, x_bias, residual, res_mean, res_scale, res_bias)
        packed = None if config.packed is None else config.packed.get(weight, x.dtype)
        y, mean, _, rstd, scale, bias, a = torch.ops.fusedres.conv_bn_fwd(
            *source,
            config.relu,
            weight,
            packed,
            *config.conv,
            config.emit and deferred,
            bn_weight,
            bn_bias,
            running_mean,
            running_var,
            config.training,
            *momentum_arguments(config.momentum),
            config.eps,
            config.backend,
            config.plan,
        )
        emitted = None
        if config.emit:
            # of a plain Tensor an alias: its second reader's gradient joins in our dgrad
            emitted = a if deferred else x.view_as(x)
        saved_a = emitted if deferred else None
        ctx.has_residual = residual is not None
        if saved_a is not None and res_mean is None:
            residual = None
        ctx.save_for_backward(
            x,
            x_mean,
            x_scale,
            x_bias,
            residual,
            res_mean,
            res_scale,
            res_bias,
            weight,
            saved_a,
            y,
            mean,
            scale,
            rstd,
            packed,
        )
        constant = [mean, scale, bias]
        if emitted is not None and not (ctx.needs_input_grad[0] or ctx.needs_input_grad[5]):
            constant.append(emitted)  # nothing in front of it wants the gradient
        ctx.mark_non_differentiable(*constant)
        ctx.config = config._replace(packed=None)  # freed with what is saved, not with the node
        ctx.parameters = dtype_of(bn_weight), dtype_of(bn_bias)
        return y, mean.new_empty(2, mean.size(0)), mean, scale, bias, emitted

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        g: Tensor | None,
        sums: Tensor | None,
        _mean: None,
        _scale: None,
        _bias: None,
        grad_a: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        # as the parameter is stored, whose strides its gradient takes, and the cast beside it
        weight, packed = saved[8], saved[-1]
        *source, a, y, mean, scale, rstd = contract.stored_alike(*saved[:8], *saved[9:-1])
        config: _Config = ctx.config
        x, x_mean, _, _, _, res_mean, _, _ = source
        g, sums = upstream("conv_bn", g, sums, y)
        if grad_a is not None:
            grad_a = contract.dense(grad_a, memory_format_of(x))
        needs = ctx.needs_input_grad
        need_input, need_weight = needs[0] or needs[5], needs[10]
        g_in = in_sums = res_sums = dw = None
        if need_input or need_weight:
            g_in, in_sums, res_sums, dw, *gradients = torch.ops.fusedres.conv_bn_bwd(
                *source,
                config.relu,
                weight,
                packed,
                *config.conv,
                a,
                g,
                sums,
                grad_a,
                y,
                mean,
                scale,
                rstd,
                config.training,
                need_input,
                need_weight,
                *ctx.parameters,
                config.backend,
                config.plan,
            )
            gradients = present(gradients, *ctx.parameters)
        else:
            gradients = list(parameter_gradients(sums, rstd, *ctx.parameters))
        if not need_input or x_mean is None:
            in_sums = None
        if not need_input or res_mean is None:
            res_sums = None
        g_in = g_in if need_input else None
        g_residual = g_in if ctx.has_residual else None
        return (
            *(g_in, in_sums, None, None, None),
            *(g_residual, res_sums, None, None, None),
            dw if need_weight else None,
            *gradients,
            *(None, None, None),
        )


# --- the public function --------------------------------------------------------------------------


def check_conv(
    op: str,
    x: Tensor,
    weight: object,
    stride: object,
    padding: object,
    dilation: object,
    groups: object,
) -> tuple[Tensor, Conv]:
    """The weight and the geometry, against an input of x's shape."""
    w = contract.check_tensor(op, "weight", weight)
    contract.check_same_device(op, "weight", w, x, "the activation")
    count = contract.check_int(op, "groups", groups, 1)
    if x.size(1) != w.size(1) * count:
        raise ValueError(
            f"{op}: weight has {w.size(1)} input channels"
            + (f" in each of {count} groups" if count > 1 else "")
            + f" (shape {list(w.shape)}), the activation has {x.size(1)} (shape {list(x.shape)})"
        )
    if w.size(0) % count:
        raise ValueError(
            f"{op}: groups must divide weight's {w.size(0)} output channels, got {count}"
        )
    if 0 in w.shape:
        raise ValueError(f"{op}: weight must not be empty, got shape {list(w.shape)}")
    if isinstance(padding, tuple | list) and len(padding) == 4:
        top, bottom, left, right = (contract.check_int(op, "padding", p, 0) for p in padding)
    else:
        top, left = contract.check_pair(op, "padding", padding, 0)
        bottom, right = top, left
    conv = Conv(
        contract.check_pair(op, "stride", stride, 1),
        (top, bottom, left, right),
        contract.check_pair(op, "dilation", dilation, 1),
        count,
    )
    shape = output_shape(x.shape, w.shape, conv)
    if shape[2] < 1 or shape[3] < 1:
        raise ValueError(
            f"{op}: weight's kernel {list(w.shape[2:])} does not fit the padded input "
            f"(shape {list(x.shape)}, padding {list(conv.padding)}, dilation {list(conv.dilation)})"
        )
    return w, conv


@overload
def conv_bn(
    input: Tensor | Deferred,
    weight: Tensor,
    bn_weight: Tensor | None = ...,
    bn_bias: Tensor | None = ...,
    running_mean: Tensor | None = ...,
    running_var: Tensor | None = ...,
    *,
    stride: int | tuple[int, int] = ...,
    padding: int | tuple[int, int] | tuple[int, int, int, int] = ...,
    dilation: int | tuple[int, int] = ...,
    groups: int = ...,
    training: bool = ...,
    momentum: float | Tensor = ...,
    eps: float = ...,
    residual: Tensor | Deferred | None = ...,
    relu: bool = ...,
    emit: Literal[False] = ...,
) -> Deferred: ...


@overload
def conv_bn(
    input: Tensor | Deferred,
    weight: Tensor,
    bn_weight: Tensor | None = ...,
    bn_bias: Tensor | None = ...,
    running_mean: Tensor | None = ...,
    running_var: Tensor | None = ...,
    *,
    stride: int | tuple[int, int] = ...,
    padding: int | tuple[int, int] | tuple[int, int, int, int] = ...,
    dilation: int | tuple[int, int] = ...,
    groups: int = ...,
    training: bool = ...,
    momentum: float | Tensor = ...,
    eps: float = ...,
    residual: Tensor | Deferred | None = ...,
    relu: bool = ...,
    emit: Literal[True],
) -> tuple[Deferred, Tensor]: ...


def conv_bn(
    input: Tensor | Deferred,
    weight: Tensor,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | tuple[int, int, int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    training: bool = True,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    residual: Tensor | Deferred | None = None,
    relu: bool = True,
    emit: bool = False,
) -> Deferred | tuple[Deferred, Tensor]:
    """Convolution of an activation and the BatchNorm of its output, deferred.

    The input's own normalisation, residual add and ReLU run on the way in, the statistics of the
    output on the way out (cuDNN calls the parts scale-bias-activation-convolution and genstats);
    what the Deferred stands for is computed by whatever reads it.

    Args:
        input: Tensor [N, C, H, W], or a Deferred of that shape; fp32, fp16, bf16 or fp64. Where
            autocast is on, its dtype is used and weight is cast on the way.
        weight: [K, C / groups, R, S]; without autocast of the input's dtype.
        bn_weight, bn_bias: [K], any floating dtype; None stands for ones and zeros.
        running_mean, running_var: [K], moved in place by `momentum` if training; read if not.
        stride, dilation: int or (height, width).
        padding: int, (height, width), or (top, bottom, left, right); zeros.
        groups: number of groups of channels.
        training: normalise by this batch's mean and biased variance.
        momentum: a number, or a 0-d tensor on the input's device.
        eps: added to the variance.
        residual: what joins before the activation of the result: a Tensor of its shape, or a
            Deferred without ReLU and without a residual of its own.
        relu: whether the activation that the result stands for ends in ReLU.
        emit: also return the input's value, which a shortcut reads; for a Deferred only with a 1x1
            kernel, stride 1 and no padding, where one kernel can write it exactly once.

    Returns:
        Deferred over y [N, K, OH, OW]; with `emit` the pair (Deferred, input's value [N, C, H, W]).
        Both in the input's memory format (channels_last on a GPU).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named; a
            kernel larger than the padded input; one value per channel in training.
        RuntimeError: the backend or plan asked for by name cannot serve these tensors.
    """
    op = "conv_bn"
    if isinstance(input, Deferred):
        contract.check_deferred(op, "input", input)
        x = input.y
    else:
        x = contract.check_tensor(op, "input", input)
    weight, conv = check_conv(op, x, weight, stride, padding, dilation, groups)
    bn = contract.check_batch_norm(
        op,
        x,
        weight.size(0),
        bn_weight,
        bn_bias,
        running_mean,
        running_var,
        training,
        momentum,
        eps,
    )
    contract.check_bool(op, "relu", relu)
    pointwise = (
        tuple(weight.shape[2:]) == (1, 1) and conv.stride == (1, 1) and not any(conv.padding)
    )
    if contract.check_bool(op, "emit", emit) and isinstance(input, Deferred) and not pointwise:
        raise ValueError(
            f"{op}: emit of a Deferred needs a 1x1 kernel, stride 1 and no padding, got kernel "
            f"{list(weight.shape[2:])}, stride {list(conv.stride)}, padding {list(conv.padding)}; "
            "pass input.value() instead"
        )
    shape = output_shape(x.shape, weight.shape, conv)
    contract.check_count(op, shape, training)
    residual = contract.check_join(op, residual, x, shape)
    dtype = contract.compute_dtype(x)
    if weight.dtype != dtype and not contract.autocast_on(x):
        raise TypeError(
            f"{op}: weight must be {dtype} as the input, got {weight.dtype}; or use autocast"
        )
    choice = backends.choose(op, x.device.type, dtype)
    backend = "reference" if contract.exporting() else choice.backend
    if isinstance(input, Deferred):
        input = settle(op, input, backend)
        if input.dtype != dtype:
            input = input.value().to(dtype)
        elif backend == "reference" or input.is_ordinary():
            input = reference_value(input)
    else:
        input = contract.dense(x.to(dtype), memory_format_of(x))

    with contract.without_autocast(x):
        if backend == "reference":
            assert isinstance(input, Tensor)
            y, mean, var, scale, bias = reference_conv_bn(
                input, weight, *conv, bn.weight, bn.bias, bn.running_mean, bn.running_var,
                bn.training, bn.eps,
            )  # fmt: skip
            sums, emitted = None, input
            contract.update_running(bn, mean, var, y)
        else:
            tensors = flatten(input) if isinstance(input, Deferred) else (input, *(None,) * 9)
            backend, plan = backends.way_of(choice, dtype, weight, conv, shape)
            config = _Config(
                isinstance(input, Deferred) and input.relu, emit, conv, bn.training, bn.momentum,
                bn.eps, backend, plan,
                packed_weights(),
            )  # fmt: skip
            y, sums, mean, scale, bias, emitted = ConvBNFunction.apply(
                *tensors, weight, bn.weight, bn.bias, bn.running_mean, bn.running_var, config
            )
    result = Deferred(y, mean, scale, bias, residual, relu, sums)
    return (result, emitted) if emit else result
