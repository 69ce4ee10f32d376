"""Launches of conv_bn's kernels of any size, stride, padding and dilation, one group
(device/conv_bn_spatial_fwd.py, conv_bn_spatial_wgrad.py).
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fusedres._conv import STEM_CHANNELS, Conv, Source
from fusedres.triton_kernels._args import acc, rows, vectors
from fusedres.triton_kernels._configs import Config
from fusedres.triton_kernels._gemm import (
    all_ones,
    chunks,
    config_for,
    empty,
    precision,
    residual_kind,
    splits,
)
from fusedres.triton_kernels._launch import launch
from fusedres.triton_kernels._spatial_dgrad import dgrad
from fusedres.triton_kernels.device.conv_bn_spatial_fwd import conv_bn_spatial_fwd_kernel
from fusedres.triton_kernels.device.conv_bn_spatial_wgrad import conv_bn_spatial_wgrad_kernel

__all__ = ["dgrad", "fwd", "wgrad"]
_WIDE_MAP = 2**15  # a side of a map of which products with a row's place exceed 32 bits


def fwd(
    source: Source,  # x [N, C, H, W]
    weight: Tensor,  # [K, C, R, S]
    conv: Conv,
    y: Tensor,  # [N, K, OH, OW], written
    a: Tensor | None,  # None: an activation that several taps read is not emitted
    stats: bool,
) -> tuple[Tensor | None, int]:
    """Partial moments [chunks, 2, K] of y if stats, and the rows that each of them is of."""
    assert a is None
    x, outs, channels, m = source.x, weight.size(0), source.x.size(1), rows(y)
    norm, residual = source.mean is not None, residual_kind(source)
    config = config_for(_named("fwd", source), x, weight, conv, m, residual)
    tiles, parts = chunks(m, config, x.device)
    part = vectors(y, parts, 2) if stats else None
    launch(
        conv_bn_spatial_fwd_kernel,
        (triton.cdiv(outs, config.BN) * parts,),
        x, source.mean, source.scale, source.bias, source.residual, source.res_mean,
        source.res_scale, source.res_bias, all_ones(x.device) if norm else None, krsc(weight),
        y, part, m, channels, outs,
        x.size(2), x.size(3), y.size(2), y.size(3), tiles, *geometry(weight, conv),
        norm, residual, source.relu, stats, tiles > 1, is_wide(x.shape[1:].numel(), y, config),
        precision(x.dtype), acc(x.dtype), channels % config.BK == 0,
        config.BM, config.BN, config.BK,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    return part, tiles * config.BM


def wgrad(
    source: Source,  # x [N, C, H, W]
    dy: Tensor,  # [N, K, OH, OW]
    weight: Tensor,  # [K, C, R, S]: its shape
    conv: Conv,
) -> Tensor:
    """Partial dw [splits, K, R, S, C]."""
    x, channels, outs, m = source.x, source.x.size(1), weight.size(0), rows(dy)
    norm, residual = source.mean is not None, residual_kind(source)
    config = config_for(_named("wgrad", source), x, weight, conv, m, residual)
    r, s = weight.size(2), weight.size(3)
    programs = triton.cdiv(outs, config.BK) * triton.cdiv(channels, config.BN) * r * s
    tiles, parts = splits(m, config, programs, x.device)
    part = empty(x, parts, outs, r, s, channels)
    launch(
        conv_bn_spatial_wgrad_kernel,
        (programs, parts),
        x, source.mean, source.scale, source.bias, source.residual, source.res_mean,
        source.res_scale, source.res_bias, all_ones(x.device) if norm else None, dy, part,
        m, channels, outs,
        x.size(2), x.size(3), dy.size(2), dy.size(3), tiles, *geometry(weight, conv),
        norm, residual, source.relu, is_wide(x.shape[1:].numel(), dy, config),
        precision(x.dtype), acc(x.dtype), config.BM, config.BN, config.BK,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    return part


def _named(kernel: str, source: Source) -> str:
    """As _configs knows it; with so few channels the plain name is another kernel's, an image's."""
    few = source.x.size(1) <= STEM_CHANNELS
    return f"{kernel}_plain" if source.mean is None or few else kernel


def krsc(weight: Tensor) -> Tensor:
    """The weight [K, C, R, S] with C fastest in memory; strides of sides of 1 mean nothing."""
    return weight.contiguous(memory_format=torch.channels_last)


def geometry(weight: Tensor, conv: Conv) -> tuple[int, ...]:
    """R, S, SH, SW, PT, PL, DH, DW of a kernel."""
    top, _, left, _ = conv.padding
    return (weight.size(2), weight.size(3), *conv.stride, top, left, *conv.dilation)


def is_wide(elements: int, y: Tensor, config: Config) -> bool:
    """Whether BM rows of y read images, of so many elements each, of more than 2^31 in all, or a
    map is too long for the quick division.
    """
    oh, ow = y.size(2), y.size(3)
    images = (config.BM - 2) // (oh * ow) + 2  # that so many rows may touch
    return images * elements >= 2**31 or max(oh, ow) >= _WIDE_MAP
