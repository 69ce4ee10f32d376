"""The stem's maxpool(relu(bn(y))) and its backward (device/bn_relu_maxpool.py)."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fusedres._checks import check_dense
from fusedres.triton_kernels._args import acc, check, like, rows, vectors
from fusedres.triton_kernels._launch import launch
from fusedres.triton_kernels.bn_act import WARPS, chunks, finish_sums, tile
from fusedres.triton_kernels.device.bn_relu_maxpool import (
    bn_relu_maxpool_bwd_kernel,
    bn_relu_maxpool_fwd_kernel,
)

# accesses of 16 bytes a thread makes at each tap; the taps are what keeps memory busy
LOADS = {"bn_relu_maxpool_fwd": 2, "bn_relu_maxpool_bwd": 1}
UNROLLED = 3  # the largest kernel_size whose taps are


def _pooled(y: Tensor, kernel_size: int, stride: int, padding: int) -> tuple[int, int]:
    """OH and OW."""
    height, width = (
        max(0, (extent + 2 * padding - kernel_size) // stride + 1) for extent in y.shape[2:]
    )
    return height, width


def _check_window(op: str, kernel_size: int, stride: int, padding: int) -> None:
    largest = 2**31 - 1
    if not (1 <= kernel_size <= 15 and 1 <= stride <= largest and 0 <= padding <= kernel_size // 2):
        raise ValueError(
            f"{op}: no window of kernel_size {kernel_size}, stride {stride}, padding {padding}"
        )


def bn_relu_maxpool_fwd(
    y: Tensor,  # [N, C, H, W]
    mean: Tensor,  # [C]
    scale: Tensor,  # [C]
    bias: Tensor,  # [C]
    kernel_size: int,
    stride: int,
    padding: int,
) -> Tensor:
    """p = maxpool(relu((y - mean)*scale + bias)), in channels_last."""
    op = "bn_relu_maxpool_fwd"
    _check_window(op, kernel_size, stride, padding)
    check(op, y, {}, {"mean": mean, "scale": scale, "bias": bias})
    height, width = _pooled(y, kernel_size, stride, padding)
    p = torch.empty(
        (*y.shape[:2], height, width),
        dtype=y.dtype,
        device=y.device,
        memory_format=torch.channels_last,
    )
    count, channels = rows(p), y.size(1)
    block_rows, columns, even = tile(channels, count, y.dtype, LOADS[op])
    launch(
        bn_relu_maxpool_fwd_kernel,
        (triton.cdiv(channels, columns) * triton.cdiv(count, block_rows),),
        *(y, mean, scale, bias, p, count, channels, *y.shape[2:], height, width),
        *(kernel_size, stride, padding, kernel_size if kernel_size <= UNROLLED else 0),
        *(acc(y.dtype), even, block_rows, columns),
        num_warps=WARPS,
    )
    return p


def bn_relu_maxpool_bwd(
    grad: Tensor,  # of p
    y: Tensor,  # [N, C, H, W]
    mean: Tensor,  # [C]
    scale: Tensor,  # [C]
    bias: Tensor,  # [C]
    kernel_size: int,
    stride: int,
    padding: int,
) -> tuple[Tensor, Tensor]:
    """(g, sums [2, C]): the gradient of (y - mean)*scale + bias and its sums."""
    op = "bn_relu_maxpool_bwd"
    _check_window(op, kernel_size, stride, padding)
    check(op, y, {}, {"mean": mean, "scale": scale, "bias": bias})
    height, width = _pooled(y, kernel_size, stride, padding)
    check_dense(op, "grad", grad, (*y.shape[:2], height, width), y, torch.channels_last)
    g = like(y)
    cell = 2 if (kernel_size, stride) == (3, 2) else 1
    # cells of 2 start where windows do, `padding` before the image; those of 1 are its pixels
    cells = [(e + padding + 1) // 2 if cell == 2 else e for e in y.shape[2:]]
    count, channels = y.size(0) * cells[0] * cells[1], y.size(1)
    block_rows, columns, even = tile(channels, count, y.dtype, LOADS[op])
    across = triton.cdiv(channels, columns)
    tiles, parts = chunks(count, block_rows, across)
    part = vectors(y, parts, 2)
    launch(
        bn_relu_maxpool_bwd_kernel,
        (across, parts),
        *(grad, y, mean, scale, bias, g, part, count, channels, *y.shape[2:], height, width),
        *(*cells, tiles, kernel_size, stride, padding),
        *(cell, kernel_size if kernel_size <= UNROLLED else 0),
        *(acc(y.dtype), even, block_rows, columns),
        num_warps=WARPS,
    )
    sums, _ = finish_sums(part, y)
    return g, sums
