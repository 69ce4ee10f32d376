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
    sampling,
    splits,
)
from fusedres.triton_kernels._launch import launch, turn
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
    bits: Tensor | None = None,  # [N*H*W, C/8] uint8: receives where `a` lets a gradient through
) -> tuple[Tensor | None, int]:
    """Partial moments [chunks, 2, K] of y if stats, and the rows that each of them is of."""
    x, outs, channels, m = source.x, weight.size(0), source.x.size(1), rows(y)
    residual = residual_kind(source)
    config = config_for("fwd", x, weight, conv, m, residual)
    across = triton.cdiv(outs, config.BN)
    tiles, parts = chunks(m, config, x.device, across)
    part = vectors(y, parts, 2) if stats else None
    launch(
        conv_bn_fwd_kernel,
        (across * parts,),
        x, source.mean, source.scale, source.bias, source.residual, source.res_mean,
        source.res_scale, source.res_bias, weight.contiguous(), y, a, bits, part,
        m, channels, outs, x.size(2), x.size(3), y.size(2), y.size(3), tiles,
        turn(), *conv.stride, source.mean is not None, residual, source.relu, a is not None,
        bits is not None, stats,
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
    grad_a: Tensor | None,  # of the emitted activation: like x, or compact
    weight: Tensor,  # [K, C, 1, 1]
    conv: Conv,
    need_dy: bool,
    bits: Tensor | None = None,  # [N*H*W, C/8] uint8: where the activation lets a gradient through
    compact: bool = False,  # g_in is [N, C, OH, OW], of the pixels that the convolution reads
) -> Dgrad:
    """g_in, its partial sums, and dy."""
    x, y, channels, outs = source.x, up.y, source.x.size(1), weight.size(0)
    m, norm, kind = rows(y), source.mean is not None, residual_kind(source)
    mask = 0 if not (norm and source.relu) else 3 if bits is not None else 2 if a is None else 1
    masked = up.bias is not None
    config = config_for("dgrad", x, weight, conv, m, kind)
    across = triton.cdiv(channels, config.BN)
    tiles, parts = chunks(m, config, x.device, across)
    dy = like(y) if need_dy else None
    if compact:  # as a convolution of stride 1 of those pixels
        x, conv = x[:, :, :: conv.stride[0], :: conv.stride[1]], conv._replace(stride=(1, 1))
    g_in = like(x)
    part = empty(x, parts, 3 if kind == 2 else 2, channels) if norm else None
    launch(
        conv_bn_dgrad_kernel,
        (across * parts,),
        up.g, y if up.training or masked else None, up.mean, up.scale, up.rstd, up.bias, up.sums,
        weight.contiguous(), grad_a, a if mask == 1 else None, bits,
        x if norm else None, source.mean, source.scale, source.bias,
        source.residual, source.res_mean, source.res_scale, source.res_bias,
        g_in, dy, part, m, channels, outs, x.size(2), x.size(3), y.size(2), y.size(3), tiles,
        *conv.stride, up.training, masked, need_dy, grad_a is not None,
        *((1, 1) if grad_a is None else sampling(grad_a, x)), norm, mask, kind, tiles > 1,
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
    _, parts = splits(m, config, grid[0] * grid[1], x.device)
    part = empty(x, parts, outs, channels)
    launch(
        conv_bn_wgrad_kernel,
        (*grid, parts),
        x, source.mean, source.scale, source.bias, source.residual, source.res_mean,
        source.res_scale, source.res_bias, dy, part, m, channels, outs,
        x.size(2), x.size(3), dy.size(2), dy.size(3), *conv.stride,
        source.mean is not None, kind, source.relu, precision(x.dtype), acc(x.dtype),
        config.BM, config.BN, config.BK,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    return part
