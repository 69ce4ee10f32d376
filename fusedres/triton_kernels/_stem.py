"""Launches of conv_bn's kernels for images (device/conv_bn_stem_fwd.py, conv_bn_stem_wgrad.py): any
kernel and stride, over at most 4 channels of a plain tensor.

Both read a copy of the image with 4 channels and its padding in place, made by torch: what it costs
is two passes over it, and its memory for as long as the call runs.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
from torch import Tensor

from fusedres._conv import Conv, Source
from fusedres.triton_kernels._args import acc, rows, vectors
from fusedres.triton_kernels._gemm import chunks, config_for, empty, precision, splits
from fusedres.triton_kernels._launch import launch
from fusedres.triton_kernels._spatial_dgrad import dgrad
from fusedres.triton_kernels.device.conv_bn_stem_fwd import conv_bn_stem_fwd_kernel
from fusedres.triton_kernels.device.conv_bn_stem_wgrad import conv_bn_stem_wgrad_kernel

__all__ = ["Pool", "dgrad", "fwd", "wgrad"]


class Pool(NamedTuple):
    """What dy is computed from in wgrad's prologue."""

    grad: Tensor  # [N, K, PH, PW], of the pooled map
    winners: Tensor  # of the same shape, bytes
    mean: Tensor  # [K], as are the next two
    scale: Tensor
    rstd: Tensor
    sums: Tensor  # [2, K]
    training: bool
    padding: int  # of the 3x3 window of stride 2
    cells: tuple[int, int]  # of 2x2 pixels that start where windows do


def fwd(
    source: Source,  # x [N, C, H, W], plain
    weight: Tensor,  # [K, C, R, S]
    conv: Conv,
    y: Tensor,  # [N, K, OH, OW], written
    a: Tensor | None,  # None: there is no activation to emit
    stats: bool,
) -> tuple[Tensor | None, int]:
    """Partial moments [chunks, 2, K] of y if stats, and the rows that each of them is of."""
    x, outs, m = source.x, weight.size(0), rows(y)
    config = config_for("fwd", x, weight, conv, m)
    tiles, parts = chunks(m, config, x.device)
    part = vectors(y, parts, 2) if stats else None
    image, filled = _padded(x, weight, conv, y), taps_of(weight.size(3))
    launch(
        conv_bn_stem_fwd_kernel,
        (triton.cdiv(outs, config.BN) * parts,),
        image, filled_weight(weight, filled), y, part, m, outs, image.size(1), image.stride(1),
        *y.shape[2:], tiles, *weight.shape[2:], filled, *conv.stride, stats, tiles > 1,
        y.size(3) >= config.BM, precision(x.dtype), acc(x.dtype), config.BM, config.BN,
        min(4 * filled, 64),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    return part, tiles * config.BM


def wgrad(
    source: Source,  # x [N, C, H, W], plain
    dy: Tensor,  # [N, K, OH, OW]; with a pool y, from which dy follows
    weight: Tensor,  # [K, C, R, S]: its shape
    conv: Conv,
    pool: Pool | None = None,
) -> Tensor:
    """Partial dw [splits, K, R, S, C]."""
    x, (outs, channels, *kernel) = source.x, weight.shape
    cells = dy.shape[2:] if pool is None else pool.cells
    count = dy.size(0) * cells[0] * cells[1]
    config = config_for("wgrad" if pool is None else "stem_wgrad", x, weight, conv, rows(dy))
    image, filled = _padded(x, weight, conv, dy), taps_of(weight.size(3))
    grid = (triton.cdiv(outs, config.BK), triton.cdiv(4 * weight.size(2) * filled, config.BN))
    tiles, parts = splits(count, config, grid[0] * grid[1], x.device)
    part = empty(x, parts, outs, *kernel, channels)
    given = (None,) * 6 if pool is None else pool[:6]
    pooled = (0, 0) if pool is None else pool.grad.shape[2:]
    own = (False, True, 0) if pool is None else (True, pool.training, pool.padding)
    launch(
        conv_bn_stem_wgrad_kernel,
        (*grid, parts),
        image, dy, *given, part, rows(dy), outs, count, image.size(1), image.stride(1),
        *dy.shape[2:], *pooled, *cells, tiles, channels, *kernel, filled, *conv.stride, *own,
        cells[1] >= config.BM, precision(x.dtype), acc(x.dtype), config.BM, config.BN, config.BK,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    return part


def taps_of(width: int) -> int:
    """A window's row in pixels, filled up to a power of two and to 16 elements, a product's least
    depth.
    """
    return max(4, triton.next_power_of_2(width))


def sides_of(size: tuple[int, int], weight: Tensor, conv: Conv, columns: int) -> tuple[int, int]:
    """(HP, WP) of an image's padded copy, for outputs of so many columns: a row of it is a multiple
    of 16 elements, and holds all that a filled-up window reads.
    """
    top, bottom, left, right = conv.padding
    wide = (columns - 1) * conv.stride[1] + taps_of(weight.size(3))
    wide = triton.cdiv(max(wide, left + size[1] + right), 4) * 4
    return top + size[0] + bottom, wide


def _padded(x: Tensor, weight: Tensor, conv: Conv, y: Tensor) -> Tensor:
    """The image as [N, HP, WP, 4], zeros around it."""
    top, _, left, _ = conv.padding
    n, channels, height, width = x.shape
    sides = sides_of((height, width), weight, conv, y.size(3))
    image = x.new_zeros(n, *sides, 4)
    image[:, top : top + height, left : left + width, :channels].copy_(x.permute(0, 2, 3, 1))
    return image


def filled_weight(weight: Tensor, filled: int) -> Tensor:
    """The weight as [K, R, filled, 4], zeros where it has no tap or channel."""
    outs, channels, height, width = weight.shape
    w = weight.new_zeros(outs, height, filled, 4)
    w[:, :, :width, :channels].copy_(weight.permute(0, 2, 3, 1))
    return w
