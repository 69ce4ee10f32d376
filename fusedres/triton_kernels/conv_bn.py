"""conv_bn's fused plan: one kernel forward, dgrad, wgrad, and one second stage each way.

Beside the results nothing the size of an activation is allocated but dy, which dgrad hands to
wgrad. The kernels of 1x1 convolutions are launched by _pointwise, all others by _spatial.
"""

from __future__ import annotations

from types import ModuleType

import torch
import triton
from torch import Tensor

from fusedres._checks import described
from fusedres._conv import Conv, Source, Upstream, output_shape
from fusedres.triton_kernels import _pointwise, _spatial
from fusedres.triton_kernels._args import acc, check, like, rows
from fusedres.triton_kernels._gemm import Dgrad, empty, residual_kind
from fusedres.triton_kernels._launch import launch
from fusedres.triton_kernels.batch_norm import (
    batch_norm_bwd,
    batch_norm_fwd,
    finish_statistics,
)
from fusedres.triton_kernels.device.conv_bn_finish import conv_bn_finish_kernel

_FINISH = (32, 16, 512)  # BR, BC, BW of the second stage


def conv_bn_fwd(
    source: Source,  # x [N, C, H, W]
    weight: Tensor,  # [K, C, R, S] in x's dtype
    conv: Conv,
    emit: bool,
    bn_weight: Tensor | None,  # [K]
    bn_bias: Tensor | None,  # [K]
    running_mean: Tensor | None,  # [K], moved in place if training, else read
    running_var: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
    """y [N, K, OH, OW]; mean, biased var, rstd, scale and bias [K] each; the activation if emit."""
    op = "conv_bn_fwd"
    _check(op, source, weight, conv)
    x, out = source.x, output_shape(source.x.shape, weight.shape, conv)
    launches = _launches(weight, conv)
    if emit and (source.mean is None or conv.stride != (1, 1) or launches is not _pointwise):
        raise ValueError(
            f"{op}: emit needs a Deferred, a 1x1 kernel, stride 1 and no padding, got kernel "
            f"{list(weight.shape[2:])} and {conv}"
        )
    y = torch.empty(out, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    a = like(x) if emit else None
    part, rows_per_part = launches.fwd(source, weight, conv, y, a, training and rows(y) > 0)
    norm = (bn_weight, bn_bias, running_mean, running_var)
    if part is None:
        return y, batch_norm_fwd(y, *norm, training, momentum, eps), a
    return y, finish_statistics(part, rows_per_part, y, *norm, momentum, eps), a


def conv_bn_bwd(
    source: Source,  # x [N, C, H, W]
    weight: Tensor,  # [K, C, R, S] in x's dtype
    parameter: Tensor,  # the weight as it is stored: dw takes its dtype and strides
    conv: Conv,
    a: Tensor | None,  # like x: the activation, if it was emitted
    up: Upstream,
    grad_a: Tensor | None,  # like x: the gradient of the emitted activation
    need_input: bool,
    need_weight: bool,
    weight_dtype: torch.dtype | None,  # of BatchNorm's dweight; None: there is none
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor | None, ...]:
    """g_in like x, its sums [2, C], a Deferred residual's sums [2, C], dw, dweight and dbias."""
    op = "conv_bn_bwd"
    _check(op, source, weight, conv)
    x, y, channels, outs = source.x, up.y, source.x.size(1), weight.size(0)
    check(op, x, {"a": a, "grad_a": grad_a}, name="x")
    own = {"y_mean": up.mean, "y_scale": up.scale, "y_rstd": up.rstd, "sums": up.sums}
    check(op, y, {"g": up.g}, own)
    if tuple(y.shape) != output_shape(x.shape, weight.shape, conv) or y.dtype != x.dtype:
        raise ValueError(f"{op}: y does not belong to x {list(x.shape)}, got {described(y)}")
    launches = _launches(weight, conv)
    found = Dgrad(x, None, None)
    in_sums = res_sums = dw_part = dw = None
    kind = residual_kind(source)
    if need_input:
        found = launches.dgrad(up, source, a, grad_a, weight, conv, need_weight)
        if found.part is not None:
            in_sums = empty(x, 2, channels)
            res_sums = empty(x, 2, channels) if kind == 2 else None
    dy = found.dy
    if need_weight and dy is None:
        dy, *_ = batch_norm_bwd(*up[:1], *up[2:6], up.sums, up.training, None, None)
    if dy is not None:
        left = source if a is None else Source(a, *(None,) * 7, False)
        dw_part, dw = launches.wgrad(left, dy, weight, conv), torch.empty_like(parameter)
    dweight = None if weight_dtype is None else empty(x, outs, dtype=weight_dtype)
    dbias = None if bias_dtype is None else empty(x, outs, dtype=bias_dtype)
    br, bc, bw = _FINISH
    taps = weight.size(2) * weight.size(3)
    sums_programs = triton.cdiv(channels, bc) if in_sums is not None else 0
    dw_programs = triton.cdiv(outs * taps * channels, bw) if dw is not None else 0
    own_programs = triton.cdiv(outs, bw) if dweight is not None or dbias is not None else 0
    launch(
        conv_bn_finish_kernel,
        (sums_programs + dw_programs + own_programs,),
        found.part, in_sums, res_sums, dw_part, dw, up.sums, up.rstd, dweight, dbias,
        0 if found.part is None else found.part.size(0), 0 if dw_part is None else dw_part.size(0),
        channels, outs, taps, weight.size(3), *((0,) * 4 if dw is None else dw.stride()),
        sums_programs, dw_programs,
        in_sums is not None, kind, dw is not None, dweight is not None, dbias is not None,
        acc(x.dtype), br, bc, bw,
    )  # fmt: skip
    g_in = found.g_in if need_input else None
    return g_in, in_sums, res_sums, dw, dweight, dbias


def _launches(weight: Tensor, conv: Conv) -> ModuleType:
    """Whose kernels serve the convolution: a module with fwd, dgrad and wgrad."""
    kernel_size = (weight.size(2), weight.size(3))
    return _pointwise if conv.is_pointwise(kernel_size) else _spatial


def _check(op: str, source: Source, weight: Tensor, conv: Conv) -> None:
    x, _, _, _, residual, *_ = source
    own = {"mean": source.mean, "scale": source.scale, "bias": source.bias}
    joined = {n: getattr(source, n) for n in ("res_mean", "res_scale", "res_bias")}
    given = {n: v for n, v in own.items() if v is not None}  # of a Tensor there are none
    check(op, x, {"residual": residual}, given | joined, name="x")
    if len({v is None for v in own.values()}) > 1 or (source.mean is None and residual is not None):
        raise ValueError(f"{op}: mean, scale and bias come together, a residual only with them")
    if len({v is None for v in joined.values()}) > 1:
        raise ValueError(f"{op}: res_mean, res_scale and res_bias come together")
    if weight.dim() != 4 or not conv.has_fused_kernel((weight.size(2), weight.size(3))):
        raise ValueError(f"{op}: no fused plan for weight {list(weight.shape)} and {conv}")
    alike = (weight.dtype, weight.device) == (x.dtype, x.device)
    if not alike or weight.size(1) != x.size(1):
        raise ValueError(
            f"{op}: weight must be {x.dtype} [K, {x.size(1)}, R, S] on {x.device}, got "
            f"{described(weight)}"
        )
    if min(conv.stride) < 1 or min(output_shape(x.shape, weight.shape, conv)[2:]) < 1:
        raise ValueError(
            f"{op}: kernel {list(weight.shape[2:])} does not fit x {list(x.shape)} with {conv}"
        )
