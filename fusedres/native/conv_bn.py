"""Convolutions with the BatchNorm behind them, and what their input is computed from (csrc/cpu/
conv_bn_fwd.cpp, conv_bn_bwd.cpp, conv_bn_wgrad.cpp): 1x1 whole, of others the weight gradient. On a
GPU 1x1 forward and dgrad (_tensor_cores).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres._checks import check_dense, check_norm, described
from fusedres._conv import Conv, Source, Upstream, output_shape
from fusedres._plans import Plan
from fusedres._tensors import elements_per_channel, memory_format_of, stored_format
from fusedres.native import _tensor_cores, require
from fusedres.native._args import (
    check,
    head,
    like,
    numbered,
    pointers,
    vectors,
    workspace,
)
from fusedres.native._conv_args import check_source, filters_of
from fusedres.native._tensor_cores import conv_bn_dgrad as conv_bn_dgrad
from fusedres.native.batch_norm import (
    FROZEN,
    Forward,
    GradientVectors,
    Statistics,
    batch_norm_bwd,
    batch_norm_fwd,
)
from fusedres.native.bn_act import bn_act_fwd

CHANNELS_LAST = torch.channels_last
_DTYPES = (torch.float32, torch.bfloat16)
_IN, _OUT = 32, 8  # ConvBnWgradParams::kInBlock and kOutBlock


def outrun(dtype: torch.dtype) -> bool:
    """Whether the machine has instructions that the library uses for this dtype, and we do not."""
    return dtype == torch.bfloat16 and require().cpu_has_tiles()


def multiplies(dtype: torch.dtype) -> bool:
    """Whether the machine has products of this dtype that are not better left to the library."""
    c = require()
    if dtype == torch.bfloat16:
        return c.cpu_level() == "avx512_bf16" and not outrun(dtype)
    return dtype == torch.float32 and c.cpu_level() != "baseline"


def conv_bn_fwd(
    source: Source,  # x [N, C, H, W]
    weight: Tensor,  # [K, C, 1, 1] in x's dtype, or float32
    conv: Conv,
    emit: bool,
    masks: bool,
    bn_weight: Tensor | None,  # [K]
    bn_bias: Tensor | None,  # [K]
    running_mean: Tensor | None,  # [K], moved in place if training, else read
    running_var: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    *,
    product: str = "",  # on a GPU one of _plans.PRODUCTS
) -> tuple[Tensor, Statistics, Tensor | None, None]:
    """y [N, K, OH, OW]; mean, biased var, rstd, scale and bias [K] each; the activation if emit."""
    op = "conv_bn_fwd"
    if masks:
        raise ValueError(f"{op}: keeps no masks in bits")
    if product:
        given = (bn_weight, bn_bias, running_mean, running_var, training, momentum, eps)
        return _tensor_cores.conv_bn_fwd(source, weight, conv, emit, *given, product)
    stored = _check(op, source, weight, conv)
    if emit and source.mean is not None and conv.stride != (1, 1):
        raise ValueError(f"{op}: a stride of {conv.stride} cannot emit what it does not read")
    x, *vectors_of, relu = _sampled(source, conv.stride)
    shape = output_shape(source.x.shape, weight.shape, conv)
    y = torch.empty(shape, dtype=x.dtype, memory_format=CHANNELS_LAST)
    norm = (bn_weight, bn_bias, running_mean, running_var)
    check_norm(op, y, *norm, training, momentum)
    a = like(x) if emit and source.mean is not None else None
    c, args, filters = require(), head(x), weight.size(0)
    work = workspace(c.conv_bn_fwd_workspace(args, filters, training), x)
    f = Forward(y, *norm, momentum, eps, args) if training else None
    numbers, normed, results = FROZEN if f is None else (f.numbers, f.vectors, f.results)
    act = (relu, pointers(x, *vectors_of, a))
    own = (training, *numbers, normed, (y.data_ptr(), *results, work.data_ptr()))
    c.conv_bn_fwd(args, filters, *act, *own, numbered(stored))
    if f is None:
        return y, batch_norm_fwd(y, *norm, training, momentum, eps), a, None
    return y, f.settle(elements_per_channel(y)), a, None


def conv_bn_bwd(
    source: Source,  # x [N, C, H, W]
    weight: Tensor,  # [K, C, 1, 1] in x's dtype, or float32
    parameter: Tensor,  # the weight as it is stored: dw takes its dtype and strides
    conv: Conv,
    a: Tensor | None,  # like x: the activation, if it was emitted
    _bits: None,
    up: Upstream,
    grad_a: Tensor | None,  # of the emitted activation: like x, or of every second row and column
    plan: Plan,
    need_input: bool,
    need_weight: bool,
    weight_dtype: torch.dtype | None,  # of BatchNorm's dweight; None: there is none
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor | None, ...]:
    """g_in like x, its sums [2, C], a Deferred residual's sums [2, C], dw, dweight and dbias.

    If the plan is compact, g_in is [N, C, OH, OW].
    """
    op = "conv_bn_bwd"
    stored = _check(op, source, weight, conv)
    x, y, types = source.x, up.y, (weight_dtype, bias_dtype)
    stride = conv.stride
    strided = stride != (1, 1)
    own = {"mean": up.mean, "scale": up.scale, "rstd": up.rstd, "sums": up.sums}
    check(op, y, {"g": up.g}, own)
    if tuple(y.shape) != output_shape(x.shape, weight.shape, conv) or y.dtype != x.dtype:
        raise ValueError(f"{op}: y does not belong to x {list(x.shape)}, got {described(y)}")
    if parameter.shape != weight.shape or (a is not None and strided):
        raise ValueError(f"{op}: what was emitted, or the weight, does not belong to this call")
    if a is not None:
        check(op, x, {"a": a}, name="x")
    if strided and source.mean is not None:  # what it does not read has no gradient either
        source, conv = _sampled(source, stride), conv._replace(stride=(1, 1))
    if a is None and source.residual is not None:
        a = bn_act_fwd(*source)  # type: ignore[arg-type]
    g_in = sums = res_sums = dw = None
    if not need_input:
        inputs = (up.g, y, up.mean, up.scale, up.rstd, up.sums, up.training)
        dy, *gradients = batch_norm_bwd(*inputs, *types)
    else:
        dy, found = like(y), GradientVectors(y, types)
        joins = None if strided else grad_a
        g_in, sums, res_sums = _dgrad(op, source, stored, a, up, joins, dy, found)
        gradients = list(found.settle(up.sums, up.rstd))
        if strided and not plan.compact:
            g_in = _spread(g_in, stride, x, grad_a)
    if need_weight:
        dw = _wgrad(dy, source if a is None else Source.plain(a), parameter, conv)
    return g_in, sums, res_sums, dw, *gradients


def _dgrad(
    op: str,
    source: Source,
    stored: Tensor,
    a: Tensor | None,
    up: Upstream,
    grad_a: Tensor | None,
    dy: Tensor,
    gradients: GradientVectors,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """g_in, its sums and a Deferred residual's; writes dy, and dweight and dbias."""
    deferred, gated = source.mean is not None, source.mean is not None and source.relu
    n, channels, _, _ = source.x.shape
    height, width = up.y.shape[2:]
    shape = (n, channels, height, width)
    g_in = torch.empty(shape, dtype=up.y.dtype, memory_format=CHANNELS_LAST)
    sampled, step_h, step_w = None, 1, 1
    if grad_a is not None and grad_a.shape != g_in.shape:
        sampled, grad_a = grad_a, None
        step_h, step_w = 1 + (sampled.size(2) < height), 1 + (sampled.size(3) < width)
        shape = (n, channels, -(-height // step_h), -(-width // step_w))
        check_dense(op, "grad_a", sampled, shape, g_in, CHANNELS_LAST)
    if grad_a is not None:
        check(op, g_in, {"grad_a": grad_a}, name="x")
    affine = gated and a is None  # what was emitted may hold a residual, which is not saved then
    sums = vectors(g_in, 2) if deferred else None
    res_sums = vectors(g_in, 2) if source.res_mean is not None else None
    act = pointers(
        g_in,
        grad_a,
        a if gated else None,
        source.x if deferred else None,
        source.mean,
        source.scale if affine else None,
        source.bias if affine else None,
        source.residual if res_sums is not None else None,
        source.res_mean,
        g_in,
        sums,
        res_sums,
        None,
    )
    c, args, filters = require(), head(g_in), stored.size(0)
    work = workspace(c.conv_bn_dgrad_workspace(args, filters, act), g_in)
    own = pointers(up.g, up.y, up.mean, up.scale, up.rstd, up.sums, None, dy, work)
    rest = (numbered(stored), act, *pointers(sampled), (step_h, step_w))
    c.conv_bn_dgrad(args, filters, up.training, own, gradients.vectors, *rest)
    return g_in, sums, res_sums


def _sampled(source: Source, stride: tuple[int, int]) -> Source:
    """Of the pixels that a strided kernel reads."""
    if stride == (1, 1):
        return source
    step_h, step_w = stride
    x, residual = (
        None if t is None else t[:, :, ::step_h, ::step_w].contiguous(memory_format=CHANNELS_LAST)
        for t in (source.x, source.residual)
    )
    assert x is not None
    return source._replace(x=x, residual=residual)


def _spread(g_in: Tensor, stride: tuple[int, int], x: Tensor, grad_a: Tensor | None) -> Tensor:
    """The gradient of all of x, from that of the pixels read and that of what was emitted."""
    full = torch.zeros_like(x) if grad_a is None else grad_a.clone()
    full[:, :, :: stride[0], :: stride[1]] += g_in
    return full


def _check(op: str, source: Source, weight: Tensor, conv: Conv) -> Tensor:
    """Source and weight, which is returned in [K, C] without gaps."""
    check_source(op, source)
    x = source.x
    ranked = isinstance(weight, Tensor) and weight.dim() == 4 and weight.size(1) == x.size(1)
    if (
        not ranked
        or not x.device.type == weight.device.type == "cpu"
        or memory_format_of(x) != CHANNELS_LAST
        or not conv.has_cpu_kernel(weight.shape)
        or weight.dtype not in (x.dtype, torch.float32)
        or not multiplies(x.dtype)
    ):
        raise ValueError(f"{op}: no kernel for x {described(x)} and weight {described(weight)}")
    return filters_of(op, weight)


def serves_wgrad(source: Source, weight: Tensor, conv: Conv) -> bool:
    """Whether conv_bn_wgrad takes it: in NHWC on the CPU, of one group and channels in blocks."""
    x = source.x
    blocks = weight.size(1) % _IN == 0 and weight.size(0) % _OUT == 0
    plain = source.mean is None or source.residual is None
    return (
        blocks
        and plain
        and conv.groups == 1
        and x.dtype in _DTYPES
        and x.device.type == "cpu"
        and stored_format(x) == CHANNELS_LAST
        and require().cpu_level() != "baseline"
    )


def conv_bn_wgrad(
    dy: Tensor,  # [N, K, OH, OW]
    source: Source,  # without a residual
    weight: Tensor,  # [K, C, R, S], as the parameter is stored
    conv: Conv,  # of one group
) -> Tensor:
    """dw, fp32 or of weight's dtype if another, in weight's strides."""
    x, mean, scale, bias = source.x, source.mean, source.scale, source.bias
    per_channel = {} if mean is None else {"mean": mean, "scale": scale, "bias": bias}
    check("conv_bn_wgrad", x, {}, per_channel, name="x")
    ranked = isinstance(weight, Tensor) and weight.dim() == 4 and weight.size(1) == x.size(1)
    if not ranked or not serves_wgrad(source, weight, conv):
        raise ValueError(
            f"conv_bn_wgrad: no kernel for x {described(x)} and weight {described(weight)}"
        )
    out = output_shape(x.shape, weight.shape, conv)
    check_dense("conv_bn_wgrad", "dy", dy, out, x)
    return _wgrad(dy, source, weight, conv)


def _wgrad(dy: Tensor, source: Source, weight: Tensor, conv: Conv) -> Tensor:
    """conv_bn_wgrad of what was checked."""
    if dy.numel() == 0:
        return torch.zeros_like(weight)
    x, mean, scale, bias = source.x, source.mean, source.scale, source.bias
    dw = torch.empty_like(weight, dtype=torch.float32)
    height, width = weight.shape[2:]
    window = (height, width, *conv.stride, conv.padding[0], conv.padding[2], *conv.dilation)
    c, args, out = require(), head(x), tuple(dy.shape)
    work = workspace(c.conv_bn_wgrad_workspace(args, out, window), x)
    tensors = pointers(dy, x, mean, scale, bias, dw, work)
    c.conv_bn_wgrad(args, out, window, source.relu and mean is not None, tensors, dw.stride())
    return dw if weight.dtype == torch.float32 else dw.to(weight.dtype)
