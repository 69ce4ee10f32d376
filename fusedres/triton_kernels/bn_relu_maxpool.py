"""The stem's maxpool(relu(bn(y))) and its backward: up to BatchNorm (device/bn_relu_maxpool.py), or
through it (device/maxpool_winners.py).
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fusedres._checks import check_dense, described
from fusedres._norm import parameter_gradients
from fusedres.triton_kernels._args import acc, check, like, rows, vectors
from fusedres.triton_kernels._launch import launch
from fusedres.triton_kernels.bn_act import WARPS, chunks, finish_sums, tile
from fusedres.triton_kernels.device.bn_relu_maxpool import (
    bn_relu_maxpool_bwd_kernel,
    bn_relu_maxpool_fwd_kernel,
)
from fusedres.triton_kernels.device.maxpool_winners import (
    maxpool_winners_bwd_kernel,
    maxpool_winners_kernel,
)

# accesses of 16 bytes a thread makes at each tap; the taps are what keeps memory busy
LOADS = {"bn_relu_maxpool_fwd": 2, "bn_relu_maxpool_bwd": 1}
LOADS |= {"maxpool_winners": 1, "maxpool_winners_bwd": 1}
UNROLLED = 3  # the largest kernel_size whose taps are


Window = tuple[int, int, int]  # kernel_size, stride, padding


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
    cell, cells = cells_of(y, (kernel_size, stride, padding))
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


def bn_relu_maxpool_winners(
    y: Tensor,  # [N, C, H, W]
    mean: Tensor,  # [C]
    scale: Tensor,  # [C]
    bias: Tensor,  # [C]
    window: Window,
) -> tuple[Tensor, Tensor]:
    """bn_relu_maxpool_fwd's p, and which pixel each window took: bytes of p's shape."""
    op = "bn_relu_maxpool_winners"
    _check_window(op, *window)
    check(op, y, {}, {"mean": mean, "scale": scale, "bias": bias})
    height, width = _pooled(y, *window)
    p, winners = (
        torch.empty(
            (*y.shape[:2], height, width),
            dtype=dtype,
            device=y.device,
            memory_format=torch.channels_last,
        )
        for dtype in (y.dtype, torch.uint8)
    )
    count, channels = rows(winners), y.size(1)
    block_rows, columns, even = tile(channels, count, y.dtype, LOADS["maxpool_winners"])
    across = triton.cdiv(channels, columns)
    tiles, parts = chunks(count, block_rows, across)
    launch(
        maxpool_winners_kernel,
        (across, parts),
        *(y, mean, scale, bias, p, winners, count, channels, *y.shape[2:], height, width, tiles),
        *(*window, window[0] <= UNROLLED, block_rows <= width, acc(y.dtype)),
        *(even, block_rows, columns),
        num_warps=WARPS,
    )
    return p, winners


def maxpool_sums(
    grad: Tensor,  # of the pooled map
    winners: Tensor,  # of the same shape, bytes
    y: Tensor,  # [N, C, H, W]
    mean: Tensor,  # [C]
    window: Window,
) -> Tensor:
    """The sums [2, C] that bn_relu_maxpool_bwd gives beside g, without writing g."""
    op = "maxpool_sums"
    _check_pooled(op, grad, winners, y, {"mean": mean}, window)
    part = _launch_bwd(grad, winners, y, (mean, *(None,) * 6), window, False, True)
    assert part is not None
    sums, _ = finish_sums(part, y)
    return sums


def maxpool_dy(
    grad: Tensor,  # of the pooled map
    winners: Tensor,  # of the same shape, bytes
    y: Tensor,  # [N, C, H, W]
    mean: Tensor,  # [C], as are the next two
    scale: Tensor,
    rstd: Tensor,
    sums: Tensor,  # [2, C]
    window: Window,
    training: bool,
    weight_dtype: torch.dtype | None,  # of dweight; None: there is none
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What batch_norm_bwd makes of bn_relu_maxpool_bwd's g, without reading g."""
    op = "maxpool_dy"
    per_channel = {"mean": mean, "scale": scale, "rstd": rstd, "sums": sums}
    _check_pooled(op, grad, winners, y, per_channel, window)
    dy = like(y)
    if dy.numel() == 0:
        return dy, *parameter_gradients(sums, rstd, weight_dtype, bias_dtype)
    dweight, dbias = (
        None if dtype is None else torch.empty(y.size(1), dtype=dtype, device=y.device)
        for dtype in (weight_dtype, bias_dtype)
    )
    given = (mean, scale, rstd, sums, dy, dweight, dbias)
    _launch_bwd(grad, winners, y, given, window, True, training)
    return dy, dweight, dbias


def batch_norm_relu_maxpool_bwd(
    grad: Tensor,  # of the pooled map
    winners: Tensor | None,  # of the same shape, bytes; None: found again
    y: Tensor,  # [N, C, H, W]
    mean: Tensor,  # [C], as are the next three
    scale: Tensor,
    bias: Tensor,
    rstd: Tensor,
    window: Window,
    training: bool,
    need_dy: bool,
    weight_dtype: torch.dtype | None,  # of dweight; None: there is none
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dy, dweight, dbias): bn_relu_maxpool_bwd and batch_norm_bwd, without g between them."""
    if winners is None:
        _, winners = bn_relu_maxpool_winners(y, mean, scale, bias, window)
    sums = maxpool_sums(grad, winners, y, mean, window)
    types = (weight_dtype, bias_dtype)
    if not need_dy:
        return None, *parameter_gradients(sums, rstd, *types)
    return maxpool_dy(grad, winners, y, mean, scale, rstd, sums, window, training, *types)


def _check_pooled(
    op: str,
    grad: Tensor,
    winners: Tensor,
    y: Tensor,
    per_channel: dict[str, Tensor],
    window: Window,
) -> None:
    _check_window(op, *window)
    check(op, y, {}, per_channel)
    pooled = (*y.shape[:2], *_pooled(y, *window))
    check_dense(op, "grad", grad, pooled, y, torch.channels_last)
    same = (winners.shape, winners.dtype, winners.device) == (grad.shape, torch.uint8, y.device)
    if not same or not winners.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"{op}: winners do not belong to grad, got {described(winners)}")


def _launch_bwd(
    grad: Tensor,
    winners: Tensor,
    y: Tensor,
    given: tuple[Tensor | None, ...],  # the kernel's arguments from mean to dbias
    window: Window,
    dy: bool,
    training: bool,
) -> Tensor | None:
    """The partial rows of sums, unless dy."""
    cell, cells = cells_of(y, window)
    count, channels = y.size(0) * cells[0] * cells[1], y.size(1)
    block_rows, columns, even = tile(channels, count, y.dtype, LOADS["maxpool_winners_bwd"])
    across = triton.cdiv(channels, columns)
    tiles, parts = chunks(count, block_rows, across)
    part = None if dy else vectors(y, parts, 2)
    launch(
        maxpool_winners_bwd_kernel,
        (across, parts),
        *(grad, winners, y, *given, part, rows(y), channels, count, *y.shape[2:]),
        *(*grad.shape[2:], *cells, tiles, dy, training, cell, *window, block_rows <= cells[1]),
        *(acc(y.dtype), even, block_rows, columns),
        num_warps=WARPS,
    )
    return part


def cells_of(y: Tensor, window: Window) -> tuple[int, tuple[int, int]]:
    """Side of the cells that a pool's backward takes y's pixels in, and how many down and across.

    Cells of 2 start where windows do, `padding` before the image; those of 1 are its pixels.
    """
    if window[:2] != (3, 2):
        return 1, (y.size(2), y.size(3))
    return 2, ((y.size(2) + window[2] + 1) // 2, (y.size(3) + window[2] + 1) // 2)
