"""conv_bn's fused plan: one kernel forward, dgrad, wgrad, and one second stage each way.

Beside the results nothing the size of an activation is allocated but dy, which dgrad hands to
wgrad. The kernels of 1x1 convolutions are launched by _pointwise, those for images of few channels
by _stem, all others by _spatial.
"""

from __future__ import annotations

from types import ModuleType

import torch
import triton
from torch import Tensor

from fusedres._checks import check_dense, described
from fusedres._conv import Conv, Source, Upstream, output_shape
from fusedres._plans import Plan
from fusedres.triton_kernels import _merged, _pointwise, _spatial, _stem
from fusedres.triton_kernels._args import acc, check, like, rows
from fusedres.triton_kernels._gemm import Dgrad, empty, residual_kind
from fusedres.triton_kernels._launch import launch
from fusedres.triton_kernels._spatial_dgrad import dy_of
from fusedres.triton_kernels.batch_norm import (
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
    masks: bool,  # keep in bits where what is emitted lets a gradient through, if 8 divides C
    bn_weight: Tensor | None,  # [K]
    bn_bias: Tensor | None,  # [K]
    running_mean: Tensor | None,  # [K], moved in place if training, else read
    running_var: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None, Tensor | None]:
    """y [N, K, OH, OW]; mean, biased var, rstd, scale and bias [K] each; the activation if emit;
    its bits [N*H*W, C/8].
    """
    op = "conv_bn_fwd"
    _check(op, source, weight, conv)
    x, out = source.x, output_shape(source.x.shape, weight.shape, conv)
    launches = _launches(source, weight, conv)
    pointwise = conv.is_pointwise((weight.size(2), weight.size(3)))
    if emit and (source.mean is None or conv.stride != (1, 1) or not pointwise):
        raise ValueError(
            f"{op}: emit needs a Deferred, a 1x1 kernel, stride 1 and no padding, got kernel "
            f"{list(weight.shape[2:])} and {conv}"
        )
    y = torch.empty(out, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    a, bits, channels = like(x) if emit else None, None, x.size(1)
    if emit and masks and channels % 8 == 0:
        bits = torch.empty(rows(x), channels // 8, dtype=torch.uint8, device=x.device)
    more = {} if bits is None else {"bits": bits}
    stats = training and rows(y) > 0
    part, rows_per_part = launches.fwd(source, weight, conv, y, a, stats, **more)
    norm = (bn_weight, bn_bias, running_mean, running_var)
    if part is None:
        return y, batch_norm_fwd(y, *norm, training, momentum, eps), a, bits
    return y, finish_statistics(part, rows_per_part, y, *norm, momentum, eps), a, bits


def conv_bn_bwd(
    source: Source,  # x [N, C, H, W]
    weight: Tensor,  # [K, C, R, S] in x's dtype
    parameter: Tensor,  # the weight as it is stored: dw takes its dtype and strides
    conv: Conv,
    a: Tensor | None,  # like x: the activation, if it was emitted
    bits: Tensor | None,  # [N*H*W, C/8] uint8, of the activation
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
    _check(op, source, weight, conv)
    _check_bwd(op, source, weight, conv, a, bits, up, grad_a, plan.compact)
    launches, found, dw_part = _launches(source, weight, conv), None, None
    whole = grad_a is None or grad_a.shape == source.x.shape
    merged = plan.merged and need_input and need_weight and whole
    if merged and _merged.serves(source.x, weight, conv, source):
        found, dw_part = _merged.bwd(up, source, a, grad_a, weight.contiguous(), conv)
    elif need_input:
        pointwise = conv.is_pointwise((weight.size(2), weight.size(3)))
        more = {"bits": bits, "compact": plan.compact} if pointwise else {}
        found = launches.dgrad(up, source, a, grad_a, weight, conv, need_weight, **more)
    if need_weight and dw_part is None:
        dy = None if found is None else found.dy
        if dy is None:
            dy = dy_of(up)
        dw_part = launches.wgrad(source if a is None else Source.plain(a), dy, weight, conv)
    kind = residual_kind(source)
    own = (up.sums, up.rstd, weight_dtype, bias_dtype)
    in_sums, res_sums, dw, dweight, dbias = finish(
        source.x, found, kind, dw_part, weight, parameter, *own
    )
    return None if found is None else found.g_in, in_sums, res_sums, dw, dweight, dbias


def conv_bn_dgrad(
    source: Source,  # x [N, C, H, W]
    weight: Tensor,  # [K, C, R, S] in x's dtype
    conv: Conv,
    a: Tensor | None,  # like x: the activation, if it was emitted or kept
    up: Upstream,
    dy: Tensor,  # like y
    grad_a: Tensor | None,  # like x: the gradient of the emitted activation
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """g_in like x, its sums [2, C] and a Deferred residual's sums [2, C], of a dy that is there."""
    op = "conv_bn_dgrad"
    _check(op, source, weight, conv)
    _check_bwd(op, source, weight, conv, a, None, up, grad_a, False)
    check(op, up.y, {"dy": dy})
    found = _spatial.dgrad(up, source, a, grad_a, weight, conv, True, dy)
    kind = residual_kind(source)
    own = (up.sums, up.rstd, None, None)
    in_sums, res_sums, *_ = finish(source.x, found, kind, None, weight, None, *own)
    return found.g_in, in_sums, res_sums


def conv_bn_wgrad(
    source: Source,  # x [N, C, H, W]
    dy: Tensor,  # [N, K, OH, OW]
    weight: Tensor,  # [K, C, R, S] in x's dtype
    parameter: Tensor,  # the weight as it is stored: dw takes its dtype and strides
    conv: Conv,
) -> Tensor:
    """dw, of a dy that is there."""
    op = "conv_bn_wgrad"
    _check(op, source, weight, conv)
    if parameter.shape != weight.shape:
        raise ValueError(
            f"{op}: parameter must have shape {list(weight.shape)}, got {described(parameter)}"
        )
    shape = output_shape(source.x.shape, weight.shape, conv)
    check_dense(op, "dy", dy, shape, source.x, torch.channels_last)
    part = _launches(source, weight, conv).wgrad(source, dy, weight, conv)
    unread = (part, part, None, None)  # sums and rstd, of a dweight and dbias that nobody wants
    _, _, dw, *_ = finish(source.x, None, 0, part, weight, parameter, *unread)
    assert dw is not None
    return dw


def finish(
    x: Tensor,  # [N, C, H, W]
    found: Dgrad | None,
    kind: int,  # of the residual
    dw_part: Tensor | None,  # [splits, K, R, S, C]
    weight: Tensor,  # [K, C, R, S]
    parameter: Tensor | None,  # like weight: as it is stored
    sums: Tensor,  # [2, K], upstream
    rstd: Tensor,  # [K]
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor | None, ...]:
    """The second stage: sums [2, C] of the input and of a Deferred residual, dw, dweight, dbias."""
    (outs, channels, _, width), taps = weight.shape, weight.size(2) * weight.size(3)
    part = None if found is None else found.part
    in_sums = None if part is None else empty(x, 2, channels)
    res_sums = empty(x, 2, channels) if part is not None and kind == 2 else None
    dw = None if dw_part is None or parameter is None else torch.empty_like(parameter)
    dweight = None if weight_dtype is None else empty(x, outs, dtype=weight_dtype)
    dbias = None if bias_dtype is None else empty(x, outs, dtype=bias_dtype)
    br, bc, bw = _FINISH
    sums_programs = triton.cdiv(channels, bc) if part is not None else 0
    dw_programs = triton.cdiv(outs * taps * channels, bw) if dw is not None else 0
    own_programs = triton.cdiv(outs, bw) if dweight is not None or dbias is not None else 0
    launch(
        conv_bn_finish_kernel,
        (sums_programs + dw_programs + own_programs,),
        part, in_sums, res_sums, dw_part, dw, sums, rstd, dweight, dbias,
        0 if part is None else part.size(0), 0 if dw_part is None else dw_part.size(0),
        channels, outs, taps, width, *((0,) * 4 if dw is None else dw.stride()),
        sums_programs, dw_programs,
        part is not None, kind, dw is not None, dweight is not None, dbias is not None,
        acc(x.dtype), br, bc, bw,
    )  # fmt: skip
    return in_sums, res_sums, dw, dweight, dbias


def _launches(source: Source, weight: Tensor, conv: Conv) -> ModuleType:
    """Whose kernels serve the convolution: a module with fwd, dgrad and wgrad."""
    if conv.is_pointwise((weight.size(2), weight.size(3))):
        return _pointwise
    return _stem if source.mean is None and conv.has_stem_kernel(weight.size(1)) else _spatial


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


def _check_bwd(
    op: str,
    source: Source,
    weight: Tensor,
    conv: Conv,
    a: Tensor | None,
    bits: Tensor | None,
    up: Upstream,
    grad_a: Tensor | None,
    compact: bool,
) -> None:
    x, y = source.x, up.y
    pointwise = conv.is_pointwise((weight.size(2), weight.size(3)))
    full = {"a": a, "grad_a": grad_a}
    if isinstance(grad_a, Tensor) and grad_a.shape != x.shape:
        full["grad_a"] = None
        shape = (*x.shape[:2], *grad_a.shape[2:])
        halves = ({e, -(-e // 2)} for e in x.shape[2:])
        fits = grad_a.dim() == 4 and all(g in h for g, h in zip(shape[2:], halves, strict=True))
        if not (pointwise and conv.stride == (1, 1) and fits):
            raise ValueError(
                f"{op}: grad_a does not belong to x {list(x.shape)}, got {described(grad_a)}"
            )
        check_dense(op, "grad_a", grad_a, shape, x, torch.channels_last)
    check(op, x, full, name="x")
    own = {"y_mean": up.mean, "y_scale": up.scale, "y_rstd": up.rstd, "y_bias": up.bias}
    check(op, y, {"g": up.g}, own | {"sums": up.sums})
    if tuple(y.shape) != output_shape(x.shape, weight.shape, conv) or y.dtype != x.dtype:
        raise ValueError(f"{op}: y does not belong to x {list(x.shape)}, got {described(y)}")
    if compact and not (pointwise and source.mean is None and grad_a is None):
        raise ValueError(f"{op}: only a plain 1x1 convolution's gradient can be compact")
    wanted = (rows(x), x.size(1) // 8)
    if bits is not None and not (
        isinstance(bits, Tensor)
        and (tuple(bits.shape), bits.dtype, bits.device) == (wanted, torch.uint8, x.device)
        and bits.is_contiguous()
        and x.size(1) % 8 == 0
        and pointwise
    ):
        raise ValueError(f"{op}: bits must be uint8 {list(wanted)}, got {described(bits)}")
