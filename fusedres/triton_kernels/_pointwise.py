"""Launches of conv_bn's 1x1 kernels (device/conv_bn_fwd.py, conv_bn_dgrad.py, conv_bn_wgrad.py)."""

from __future__ import annotations

import triton
from torch import Tensor

from fusedres._conv import Conv, Source, Upstream
from fusedres.triton_kernels._args import acc, like, rows, vectors
from fusedres.triton_kernels._gemm import (
    Dgrad,
    chunks,
    config_for,
    empty,
    precision,
    residual_kind,
    splits,
)
from fusedres.triton_kernels._launch import launch
from fusedres.triton_kernels.device.conv_bn_dgrad import conv_bn_dgrad_kernel
from fusedres.triton_kernels.device.conv_bn_fwd import conv_bn_fwd_kernel
from fusedres.triton_kernels.device.conv_bn_wgrad import conv_bn_wgrad_kernel


def fwd(
    source: Source,  # x [N, C, H, W]
    weight: Tensor,  # [K, C, 1, 1]
    conv: Conv,
    y: Tensor,  # [N, K, OH, OW], written
    a: Tensor | None,  # like x: receives the activation
    stats: bool,
) -> tuple[Tensor | None, int]:
    """Partial moments [chunks, 2, K] of y if stats, and the rows that each of them is of."""
    x, outs, channels, m = source.x, weight.size(0), source.x.size(1), rows(y)
    residual = residual_kind(source)
    config = config_for("fwd", x, weight, conv, m, residual)
    tiles, parts = chunks(m, config, x.device)
    part = vectors(y, parts, 2) if stats else None
    launch(
        conv_bn_fwd_kernel,
        (triton.cdiv(outs, config.BN) * parts,),
        x, source.mean, source.scale, source.bias, source.residual, source.res_mean,
        source.res_scale, source.res_bias, weight.contiguous(), y, a, part,
        m, channels, outs, x.size(2), x.size(3), y.size(2), y.size(3), tiles,
        *conv.stride, source.mean is not None, residual, source.relu, a is not None, stats,
        tiles > 1, precision(x.dtype), acc(x.dtype), channels % config.BK == 0,
        config.BM, config.BN, config.BK,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    return part, tiles * config.BM


def dgrad(
    up: Upstream,
    source: Source,  # x [N, C, H, W]
    a: Tensor | None,  # like x: the activation, if it was emitted
    grad_a: Tensor | None,  # like x: the gradient of the emitted activation
    weight: Tensor,  # [K, C, 1, 1]
    conv: Conv,
    need_dy: bool,
) -> Dgrad:
    """g_in, its partial sums, and dy."""
    x, y, channels, outs = source.x, up.y, source.x.size(1), weight.size(0)
    m, norm, kind = rows(y), source.mean is not None, residual_kind(source)
    mask = 0 if not (norm and source.relu) else 2 if a is None else 1
    config = config_for("dgrad", x, weight, conv, m, kind)
    tiles, parts = chunks(m, config, x.device)
    g_in, dy = like(x), like(y) if need_dy else None
    part = empty(x, parts, 3 if kind == 2 else 2, channels) if norm else None
    launch(
        conv_bn_dgrad_kernel,
        (triton.cdiv(channels, config.BN) * parts,),
        up.g, y if up.training else None, up.mean, up.scale, up.rstd, up.sums, weight.contiguous(),
        grad_a, a, x if norm else None, source.mean, source.scale,
        source.bias, source.residual, source.res_mean, source.res_scale, source.res_bias,
        g_in, dy, part, m, channels, outs, x.size(2), x.size(3), y.size(2), y.size(3), tiles,
        *conv.stride, up.training, need_dy, grad_a is not None, norm, mask, kind, tiles > 1,
        precision(x.dtype), acc(x.dtype), outs % config.BK == 0, config.BM, config.BN, config.BK,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    return Dgrad(g_in, part, dy)


def wgrad(
    source: Source,  # x [N, C, H, W]
    dy: Tensor,  # [N, K, OH, OW]
    weight: Tensor,  # [K, C, 1, 1]: its shape
    conv: Conv,
) -> Tensor:
    """Partial dw [splits, K, C]."""
    x, channels, outs, m = source.x, source.x.size(1), weight.size(0), rows(dy)
    kind = residual_kind(source)
    config = config_for("wgrad", x, weight, conv, m, kind)
    grid = (triton.cdiv(outs, config.BK), triton.cdiv(channels, config.BN))
    tiles, parts = splits(m, config, grid[0] * grid[1], x.device)
    part = empty(x, parts, outs, channels)
    launch(
        conv_bn_wgrad_kernel,
        (*grid, parts),
        x, source.mean, source.scale, source.bias, source.residual, source.res_mean,
        source.res_scale, source.res_bias, dy, part, m, channels, outs,
        x.size(2), x.size(3), dy.size(2), dy.size(3), tiles, *conv.stride,
        source.mean is not None, kind, source.relu, precision(x.dtype), acc(x.dtype),
        config.BM, config.BN, config.BK,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    return part
