"""conv_bn_relu_maxpool: the stem of a ResNet as one autograd node, so that the gradient of the
pooled map goes straight into BatchNorm's backward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fusedres import backends
from fusedres._checks import check_packed, check_reach
from fusedres._conv import Conv, output_shape
from fusedres._plans import DATAFLOWS, base_of
from fusedres._tensors import memory_format_of
from fusedres.library import conv_bn_relu_maxpool as split
from fusedres.ops import _contract as contract
from fusedres.ops import _sync
from fusedres.ops._contract import library, register_fake
from fusedres.ops._packed import PackedWeights, packed_weights
from fusedres.ops.batch_norm import (
    dtype_of,
    momentum_arguments,
    normalization,
    present,
    statistics_fake,
)
from fusedres.ops.bn_relu_maxpool import bn_relu_maxpool, check_window, pooled
from fusedres.ops.conv_bn import check_conv, conv_bn
from fusedres.reference.conv_bn_relu_maxpool import conv_bn_relu_maxpool as reference

if TYPE_CHECKING:  # not there in every build of torch
    from torch.distributed import ProcessGroup

OP = "conv_bn_relu_maxpool"

# --- the ops: schema, kernel look-up, fake --------------------------------------------------------

# `packed` is the weight in the compute dtype, where it was cast together with others already
_OPERANDS = (
    "Tensor x, Tensor weight, Tensor? packed, int[2] stride, int[4] padding, int[2] dilation,"
    " int groups, int kernel_size, int pool_stride, int pool_padding"
)
library.define(
    f"conv_bn_relu_maxpool_fwd({_OPERANDS}, Tensor? bn_weight, Tensor? bn_bias,"
    " Tensor(a!)? running_mean, Tensor(b!)? running_var, bool training, float momentum,"
    " Tensor? momentum_tensor, float eps, bool need_winners, str backend, str plan) -> (Tensor p,"
    " Tensor y, Tensor mean, Tensor var, Tensor rstd, Tensor scale, Tensor bias, Tensor winners)"
)
library.define(
    f"conv_bn_relu_maxpool_bwd({_OPERANDS}, Tensor grad, Tensor? winners, Tensor y, Tensor mean,"
    " Tensor scale, Tensor bias, Tensor rstd, bool training, bool need_input, bool need_weight,"
    " ScalarType? bn_weight_dtype, ScalarType? bn_bias_dtype, str backend, str plan)"
    " -> (Tensor dx, Tensor dw, Tensor dweight, Tensor dbias)"
)


class _Operands(NamedTuple):
    """What both directions start with."""

    x: Tensor
    parameter: Tensor  # the weight as it is stored
    weight: Tensor  # in the compute dtype
    conv: Conv
    window: tuple[int, int, int]

    @classmethod
    def of(cls, args: tuple[Any, ...]) -> tuple[_Operands, tuple[Any, ...]]:
        """An op's arguments, in the order of its schema, and what follows these."""
        x, weight, packed, stride, padding, dilation, groups = args[:7]
        conv = Conv(tuple(stride), tuple(padding), tuple(dilation), groups)
        conv = conv.reduced(x.shape, weight.shape)
        cast = weight.to(x.dtype) if packed is None else packed
        return cls(x, weight, cast, conv, args[7:10]), args[10:]


class _Backward(NamedTuple):
    """What the backward op takes beside its operands."""

    grad: Tensor
    winners: Tensor | None  # of the pool's windows, as the forward op gave them
    y: Tensor
    mean: Tensor
    scale: Tensor
    bias: Tensor
    rstd: Tensor
    training: bool
    need_input: bool
    need_weight: bool
    bn_weight_dtype: torch.dtype | None
    bn_bias_dtype: torch.dtype | None
    backend: str
    plan: str


def _checked(op: str, args: tuple[Any, ...]) -> tuple[_Operands, tuple[Any, ...]]:
    """The operands, and what follows them, where nothing else checks what the library reads."""
    x, weight, packed = args[:3]
    check_reach(op, x=x, weight=weight, packed=packed)
    check_packed(op, weight, packed)
    operands, rest = _Operands.of(args)
    operands.conv.check(op)
    return operands, rest


def _fwd(*args: Any) -> tuple[Tensor, ...]:
    operands, (*norm, need_winners, backend, plan) = _checked(f"{OP}_fwd", args)
    x, _, weight, conv, window = operands
    # the pool comes last: what it cannot serve must not have moved the running statistics
    check_window(f"{OP}_fwd", output_shape(x.shape, weight.shape, conv), *window, "pool_")
    bn = normalization(*norm)
    if plan == "fused":
        kernel = backends.kernels(backend, OP).conv_bn_relu_maxpool_fwd
        p, y, statistics, winners = kernel(x, weight, conv, bn, window, need_winners)
    else:
        pool, batch_norm = (backends.kernels(backend, n) for n in ("bn_relu_maxpool", "batch_norm"))
        p, y, statistics, winners = split.conv_bn_relu_maxpool_fwd(
            pool, batch_norm, x, weight, conv, memory_format_of(x), bn, window, need_winners
        )
    return p, y, *statistics, x.new_empty(0, dtype=torch.uint8) if winners is None else winners


def _fwd_fake(*args: Any) -> tuple[Tensor, ...]:
    (x, parameter, _, conv, window), (*_, need_winners, backend, _) = _Operands.of(args)
    n, k, oh, ow = output_shape(x.shape, parameter.shape, conv)
    shapes = ((n, k, pooled(oh, *window), pooled(ow, *window)), (n, k, oh, ow))
    p, y = (
        torch.empty(s, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))
        for s in shapes
    )
    winners = x.new_empty(0, dtype=torch.uint8)
    if need_winners and backend == "triton":
        winners = torch.empty_like(p, dtype=torch.uint8)
    return p, y, *statistics_fake(y), winners


def _bwd(*args: Any) -> tuple[Tensor, ...]:
    (x, parameter, weight, conv, window), rest = _checked(f"{OP}_bwd", args)
    o = _Backward(*rest)
    out = output_shape(x.shape, weight.shape, conv)
    if tuple(o.y.shape) != out:  # the library would believe it
        raise ValueError(f"{OP}_bwd: y must have shape {list(out)}, got {list(o.y.shape)}")
    types = (o.bn_weight_dtype, o.bn_bias_dtype)
    own = (o.y, o.mean, o.scale, o.bias, o.rstd)
    common = (o.grad, o.winners, x, weight, parameter, conv, *own, window, o.training)
    fused = o.plan == "fused" and o.need_weight
    gradients: tuple[Tensor | None, ...] = ()
    if fused:
        kernel = backends.kernels(o.backend, OP).conv_bn_relu_maxpool_bwd
        gradients = (None, *kernel(*common, *types))
    if not fused or o.need_input:  # the library's dgrad: training wants none of the image
        pool = backends.kernels(o.backend, "bn_relu_maxpool")
        needs = (o.need_input, o.need_weight and not fused)
        dx, *others = split.conv_bn_relu_maxpool_bwd(
            pool, *common, *needs, *types, memory_format_of(x)
        )
        gradients = (dx, *(gradients[1:] or others))
    return tuple(o.mean.new_empty(0) if t is None else t for t in gradients)


def _bwd_fake(*args: Any) -> tuple[Tensor, ...]:
    (x, parameter, *_), rest = _Operands.of(args)
    o = _Backward(*rest)
    dx = torch.empty_like(x) if o.need_input else o.mean.new_empty(0)
    dw = torch.empty_like(parameter) if o.need_weight else o.mean.new_empty(0)
    types = (o.bn_weight_dtype, o.bn_bias_dtype)
    vectors = (o.mean.new_empty(0 if t is None else o.y.size(1), dtype=t) for t in types)
    return dx, dw, *vectors


library.impl(f"{OP}_fwd", _fwd, "CompositeExplicitAutograd")
library.impl(f"{OP}_bwd", _bwd, "CompositeExplicitAutograd")
register_fake(f"{OP}_fwd", _fwd_fake)
register_fake(f"{OP}_bwd", _bwd_fake)


# --- autograd -------------------------------------------------------------------------------------


class _Config(NamedTuple):
    """What a node needs beside tensors."""

    conv: Conv
    window: tuple[int, int, int]
    training: bool
    momentum: float | Tensor
    eps: float
    backend: str
    plan: str
    backward: bool  # whether there may be one
    packed: PackedWeights | None


class ConvBNReluMaxpoolFunction(torch.autograd.Function):
    """x, weight, BatchNorm's four, config -> p.

    Saved: x, y and y's vectors; the weight as the parameter holds it, and its cast only where the
    casts of a whole model share one buffer; on triton the pool's winners, a byte a window. The
    activation is not.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        config: _Config,
    ) -> Tensor:
        packed = None if config.packed is None else config.packed.get(weight, x.dtype)
        p, y, mean, _, rstd, scale, bias, winners = torch.ops.fusedres.conv_bn_relu_maxpool_fwd(
            x,
            weight,
            packed,
            *config.conv,
            *config.window,
            bn_weight,
            bn_bias,
            running_mean,
            running_var,
            config.training,
            *momentum_arguments(config.momentum),
            config.eps,
            config.backward and any(ctx.needs_input_grad),
            config.backend,
            config.plan,
        )
        kept = winners if winners.numel() > 0 else None
        ctx.save_for_backward(x, kept, y, mean, scale, bias, rstd, weight, packed)
        ctx.config = config._replace(packed=None)  # freed with what is saved, not with the node
        ctx.parameters = dtype_of(bn_weight), dtype_of(bn_bias)
        return p

    @staticmethod
    @contract.differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # the weight as the parameter is stored, whose strides its gradient takes
        *saved, weight, packed = ctx.saved_tensors
        x, *own = contract.stored_alike(*saved)
        config: _Config = ctx.config
        need_input, need_weight, *_ = ctx.needs_input_grad
        dx, dw, *gradients = torch.ops.fusedres.conv_bn_relu_maxpool_bwd(
            x,
            weight,
            packed,
            *config.conv,
            *config.window,
            contract.dense(grad, memory_format_of(x)),
            *own,
            config.training,
            need_input,
            need_weight,
            *ctx.parameters,
            config.backend,
            config.plan,
        )
        return (
            dx if need_input else None,
            dw if need_weight else None,
            *present(gradients, *ctx.parameters),
            *(None, None, None),
        )


# --- the public function --------------------------------------------------------------------------


def stem_plan(choice: backends.Choice, weight: Tensor, conv: Conv) -> str:
    """How the stem runs: "fused" where it is asked for and the backend has kernels for so few
    channels, else "split". Neither has been measured against the other yet.
    """
    flow = DATAFLOWS.get(choice.plan)
    wanted = base_of(choice.plan) if flow is None else flow.stem
    kernels = OP in backends.BACKENDS[choice.backend].fuses
    fusable = kernels and conv.has_stem_kernel(weight.size(1))
    return "fused" if wanted == "fused" and fusable else "split"


def stem_way(
    choice: backends.Choice, dtype: torch.dtype, weight: Tensor, conv: Conv, size: int | None = None
) -> tuple[str, str]:
    """Backend and plan; `size` is y's in bytes, None where it is not known yet."""
    plan = stem_plan(choice, weight, conv)
    if plan == "fused":
        return choice.backend, plan
    light = backends.light_backend(choice, "bn_relu_maxpool", weight.device, dtype, size)
    return light, plan


def conv_bn_relu_maxpool(
    x: Tensor,
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
    kernel_size: int = 3,
    pool_stride: int = 2,
    pool_padding: int = 1,
    sync: ProcessGroup | None = None,
) -> Tensor:
    """max_pool2d(relu(batch_norm(conv2d(x, weight)))), as the stem of a ResNet has it.

    Among equal maxima of a window the first in row-major order takes the gradient, as in torch.

    Args:
        x: [N, C, H, W] in fp32, fp16, bf16 or fp64. Where autocast is on, its dtype is used and
            weight is cast on the way.
        weight: [K, C / groups, R, S]; without autocast of x's dtype.
        bn_weight, bn_bias: [K], any floating dtype; None stands for ones and zeros.
        running_mean, running_var: [K], moved in place by `momentum` if training; read if not.
        stride, dilation: int or (height, width), of the convolution.
        padding: int, (height, width), or (top, bottom, left, right); zeros.
        groups: number of groups of channels.
        training: normalise by this batch's mean and biased variance.
        momentum: a number, or a 0-d tensor on x's device.
        eps: added to the variance.
        kernel_size: side of the pool's window, 1 to 15.
        pool_stride: step of the window, at least 1.
        pool_padding: on every side, at most half of kernel_size; never wins.
        sync: as conv_bn takes it; over several processes this runs as conv_bn and bn_relu_maxpool.

    Returns:
        [N, K, PH, PW] in the compute dtype, in x's memory format (channels_last on a GPU).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named; a
            kernel or window larger than what it slides over; one value per channel in training
            without `sync`.
        RuntimeError: the backend asked for by name cannot serve these tensors; with `sync` also as
            conv_bn.
    """
    x = contract.check_tensor(OP, "x", x)
    weight, conv = check_conv(OP, x, weight, stride, padding, dilation, groups)
    bn = contract.check_batch_norm(
        OP, x, weight.size(0), bn_weight, bn_bias, running_mean, running_var, training, momentum,
        eps,
    )  # fmt: skip
    shape = output_shape(x.shape, weight.shape, conv)
    sync = _sync.check_sync(OP, sync, bn.training)
    contract.check_count(OP, shape, training and sync is None)
    check_window(OP, shape, kernel_size, pool_stride, pool_padding, "pool_")
    contract.check_savable(OP, x=x, weight=weight, bn_weight=bn.weight, bn_bias=bn.bias)
    window = (kernel_size, pool_stride, pool_padding)
    dtype = contract.compute_dtype(x)
    if weight.dtype != dtype and not contract.autocast_on(x):
        raise TypeError(f"{OP}: weight must be {dtype} as x, got {weight.dtype}; or use autocast")
    if sync is not None:
        options = conv._asdict() | {"momentum": bn.momentum, "eps": bn.eps, "sync": sync}
        normalised: Any = conv_bn(x, weight, *bn[:4], **options)
        return bn_relu_maxpool(normalised, *window)
    choice = backends.choose(OP, x.device.type, dtype)
    own = contract.dense(x.to(dtype), memory_format_of(x))
    with contract.without_autocast(x):
        if choice.backend == "reference" or contract.exporting():
            p, y, mean, var = reference(
                own, weight, *conv, bn.weight, bn.bias, bn.running_mean, bn.running_var,
                bn.training, bn.eps, *window,
            )  # fmt: skip
            contract.update_running(bn, mean, var, y)
            return p
        size = shape[0] * shape[1] * shape[2] * shape[3] * dtype.itemsize
        way = stem_way(choice, dtype, weight, conv, size)
        config = _Config(
            conv,
            window,
            bn.training,
            bn.momentum,
            bn.eps,
            *way,
            torch.is_grad_enabled(),
            packed_weights(),
        )
        return ConvBNReluMaxpoolFunction.apply(
            own, weight, bn.weight, bn.bias, bn.running_mean, bn.running_var, config
        )
