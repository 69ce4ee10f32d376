"""The stem's fused plan: one kernel for the convolution and the statistics of its output, one that
normalises and pools; backward wgrad from the pooled map's gradient, without dy in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedres._checks import described
from fusedres._conv import Conv, Source, output_shape
from fusedres.triton_kernels import _stem
from fusedres.triton_kernels._args import check, rows
from fusedres.triton_kernels.batch_norm import batch_norm_fwd, finish_statistics
from fusedres.triton_kernels.bn_relu_maxpool import (
    Window,
    bn_relu_maxpool_fwd,
    bn_relu_maxpool_winners,
    cells_of,
    maxpool_dy,
    maxpool_sums,
)
from fusedres.triton_kernels.conv_bn import finish


def conv_bn_relu_maxpool_fwd(
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [K, C, R, S] in x's dtype
    conv: Conv,
    bn: tuple[Any, ...],  # BatchNorm's arguments as batch_norm_fwd takes them
    window: Window,
    need_winners: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...], Tensor | None]:
    """p [N, K, PH, PW], y [N, K, OH, OW]; mean, biased var, rstd, scale and bias [K] each; winners,
    bytes of p's shape.
    """
    _check("conv_bn_relu_maxpool_fwd", x, weight, conv)
    out = output_shape(x.shape, weight.shape, conv)
    y = torch.empty(out, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    bn_weight, bn_bias, running_mean, running_var, training, momentum, eps = bn
    part, rows_per_part = _stem.fwd(
        Source.plain(x), weight, conv, y, None, training and rows(y) > 0
    )
    if part is None:
        statistics = batch_norm_fwd(y, *bn)
    else:
        norm = (bn_weight, bn_bias, running_mean, running_var)
        statistics = finish_statistics(part, rows_per_part, y, *norm, momentum, eps)
    mean, _, _, scale, bias = statistics
    if not need_winners:
        return bn_relu_maxpool_fwd(y, mean, scale, bias, *window), y, statistics, None
    p, winners = bn_relu_maxpool_winners(y, mean, scale, bias, window)
    return p, y, statistics, winners


def conv_bn_relu_maxpool_bwd(
    grad: Tensor,  # [N, K, PH, PW], of p
    winners: Tensor | None,  # bytes of p's shape; None: found again
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [K, C, R, S] in x's dtype
    parameter: Tensor,  # the weight as it is stored: dw takes its dtype and strides
    conv: Conv,
    y: Tensor,  # [N, K, OH, OW]
    mean: Tensor,  # [K], as are the next three
    scale: Tensor,
    bias: Tensor,
    rstd: Tensor,
    window: Window,
    training: bool,
    weight_dtype: torch.dtype | None,  # of BatchNorm's dweight; None: there is none
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dw, dweight and dbias."""
    op = "conv_bn_relu_maxpool_bwd"
    _check(op, x, weight, conv)
    if tuple(y.shape) != output_shape(x.shape, weight.shape, conv) or y.dtype != x.dtype:
        raise ValueError(f"{op}: y does not belong to x {list(x.shape)}, got {described(y)}")
    check(op, y, {}, {"mean": mean, "scale": scale, "rstd": rstd})
    if winners is None:
        _, winners = bn_relu_maxpool_winners(y, mean, scale, bias, window)
    sums = maxpool_sums(grad, winners, y, mean, window)
    cell, cells = cells_of(y, window)
    if cell == 2:
        pool = _stem.Pool(grad, winners, mean, scale, rstd, sums, training, window[2], cells)
        part = _stem.wgrad(Source.plain(x), y, weight, conv, pool)
    else:
        given = (grad, winners, y, mean, scale, rstd, sums, window, training)
        dy, *_ = maxpool_dy(*given, None, None)
        part = _stem.wgrad(Source.plain(x), dy, weight, conv)
    types = (weight_dtype, bias_dtype)
    _, _, dw, dweight, dbias = finish(x, None, 0, part, weight, parameter, sums, rstd, *types)
    assert dw is not None
    return dw, dweight, dbias


def _check(op: str, x: Tensor, weight: Tensor, conv: Conv) -> None:
    check(op, x, name="x")
    if weight.dim() != 4 or not conv.has_stem_kernel(weight.size(1)):
        raise ValueError(f"{op}: no fused plan for weight {list(weight.shape)} and {conv}")
    alike = (weight.dtype, weight.device) == (x.dtype, x.device)
    if not alike or weight.size(1) != x.size(1):
        raise ValueError(
            f"{op}: weight must be {x.dtype} [K, {x.size(1)}, R, S] on {x.device}, got "
            f"{described(weight)}"
        )
