"""Normalise, add a residual, apply ReLU, and its backward (device/bn_act.py).

What all light passes over [M, C] share stands here too: the tile of a kernel, the chunks of a first
stage and the second stage of sums.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fusedres._tensors import INTERPRETED
from fusedres.triton_kernels._args import acc, check, like, rows, vectors
from fusedres.triton_kernels._configs import MOST_PARTIALS
from fusedres.triton_kernels._launch import launch
from fusedres.triton_kernels.device.bn_act import bn_act_bwd_kernel, bn_act_fwd_kernel
from fusedres.triton_kernels.device.reduction import sum_rows_kernel

WARPS = 4
# accesses of 16 bytes a thread makes to each tensor of a tile
LOADS = {"bn_act_fwd": 4, "bn_act_bwd": 2}
MOST_COLUMNS = 64  # of a tile: a row of it is whole cache lines
PROGRAMS = 2048  # of a first stage: some waves of a large GPU


def tile(channels: int, count: int, dtype: torch.dtype, loads: int) -> tuple[int, int, bool]:
    """BM, BC and whether BC divides C, for a kernel of WARPS over [count, channels].

    BC divides C wherever a power of two of some size does. Where 16 does not divide C, accesses are
    of single elements, each with an address in registers, and a thread has 2 of them.
    """
    per_thread = 2 if channels % 16 else loads * 16 // dtype.itemsize
    columns = min(channels & -channels, MOST_COLUMNS)
    if columns < 16:
        columns = min(triton.next_power_of_2(max(1, channels)), MOST_COLUMNS)
    block_rows = max(1, WARPS * 32 * per_thread // columns)
    if INTERPRETED:  # time goes by operations there, whatever their size; some tiles are to be left
        block_rows = max(block_rows, triton.next_power_of_2(triton.cdiv(count, 5)))
        if channels > 4 * columns and channels % columns == 0:
            columns = channels & -channels
    return block_rows, columns, channels % columns == 0


def chunks(count: int, block_rows: int, across: int) -> tuple[int, int]:
    """Tiles of block_rows that a program of a first stage takes, and the partial rows there are."""
    most = 3 if INTERPRETED else max(1, min(MOST_PARTIALS, PROGRAMS // max(1, across)))
    row_tiles = triton.cdiv(count, block_rows)
    tiles = max(1, triton.cdiv(row_tiles, most))
    return tiles, triton.cdiv(row_tiles, tiles)


def second_stage(parts: int) -> tuple[int, int, int]:
    """BR, BC and warps of a second stage over `parts` rows.

    Columns are few, so that there are programs enough, yet fill sectors of 32 bytes; rows are many,
    so that a program waits for memory once or twice.
    """
    if INTERPRETED:
        return 2, 1024, 1  # more than one step
    return (64, 16, 4) if parts <= 64 else (256, 8, 4) if parts <= 256 else (512, 8, 8)


def finish_sums(
    part: Tensor,  # [R, 2, C], or [R, 3, C] for a third sum
    y: Tensor,  # [N, C, H, W]: whose sums they are
) -> tuple[Tensor, Tensor | None]:
    """(sums 0 and 1, sums 0 and 2 or None), [2, C] each: the rows of `part` added in order."""
    parts, count, channels = part.shape
    sums = vectors(y, 2)
    res_sums = vectors(y, 2) if count == 3 else None
    block_rows, columns, warps = second_stage(parts)
    grid = (triton.cdiv(channels, columns), count)
    arguments = (part, sums, res_sums, parts, channels, count, acc(y.dtype), block_rows, columns)
    launch(sum_rows_kernel, grid, *arguments, num_warps=warps)
    return sums, res_sums


def bn_act_fwd(
    y: Tensor,  # [N, C, H, W]
    mean: Tensor,  # [C]
    scale: Tensor,  # [C]
    bias: Tensor,  # [C]
    residual: Tensor | None,  # [N, C, H, W]
    res_mean: Tensor | None,  # [C], as are the next two; None: the residual is added as it is
    res_scale: Tensor | None,
    res_bias: Tensor | None,
    relu: bool,
) -> Tensor:
    """a = act((y - mean)*scale + bias + residual), [N, C, H, W] in channels_last."""
    joined = (residual is not None, *(v is not None for v in (res_mean, res_scale, res_bias)))
    if joined not in ((False,) * 4, (True, False, False, False), (True,) * 4):
        raise ValueError("bn_act_fwd: res_mean, res_scale, res_bias come together, with residual")
    own = {"mean": mean, "scale": scale, "bias": bias}
    per_channel = {**own, "res_mean": res_mean, "res_scale": res_scale, "res_bias": res_bias}
    check("bn_act_fwd", y, {"residual": residual}, per_channel)
    a = like(y)
    count, channels = rows(y), y.size(1)
    block_rows, columns, even = tile(channels, count, y.dtype, LOADS["bn_act_fwd"])
    kind = 0 if residual is None else 1 if res_mean is None else 2
    launch(
        bn_act_fwd_kernel,
        (triton.cdiv(channels, columns) * triton.cdiv(count, block_rows),),
        *(y, mean, scale, bias, residual, res_mean, res_scale, res_bias, a),
        *(count, channels, kind, relu, acc(y.dtype), even, block_rows, columns),
        num_warps=WARPS,
    )
    return a


def bn_act_bwd(
    grad: Tensor,  # [N, C, H, W]
    grad_extra: Tensor | None,  # [N, C, H, W], added to grad
    a: Tensor | None,  # [N, C, H, W], the activation; None: no ReLU
    y: Tensor,  # [N, C, H, W]
    mean: Tensor,  # [C]
    res_y: Tensor | None,  # [N, C, H, W], of a residual that is normalised too
    res_mean: Tensor | None,  # [C]
    out: Tensor | None = None,  # receives g; may be grad
    affine: tuple[Tensor, Tensor] | None = None,  # scale, bias: `a` is their round(relu(...)) of y
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(g, sums [2, C], res_sums [2, C] or None).

    g is grad itself where there is nothing to change (neither `a` nor `grad_extra`) and no `out`.
    An activation that follows from y alone is not read, but computed anew.
    """
    if (res_y is None) != (res_mean is None):
        raise ValueError("bn_act_bwd: res_y and res_mean come together")
    full = {"grad": grad, "grad_extra": grad_extra, "a": a, "res_y": res_y, "out": out}
    scale, bias = affine or (None, None)
    per_channel = {"mean": mean, "res_mean": res_mean, "own_scale": scale, "own_bias": bias}
    check("bn_act_bwd", y, full, per_channel)
    if a is not None or grad_extra is not None:
        g = like(y) if out is None else out
    elif out is None or out is grad:
        g = grad
    else:
        grad = g = out.copy_(grad)
    mask = 0 if a is None else 1 if affine is None else 2
    masks = (a if mask == 1 else None, *((scale, bias) if mask == 2 else (None, None)))
    part = _bwd_part(grad, grad_extra, mask, masks, y, mean, res_y, res_mean, g)
    return g, *finish_sums(part, y)


def masked_sums(
    grad: Tensor,  # [N, C, H, W]
    y: Tensor,  # [N, C, H, W]
    mean: Tensor,  # [C]
    scale: Tensor,  # [C]
    bias: Tensor,  # [C]
) -> Tensor:
    """bn_act_bwd's sums [2, C] for a = round(relu((y - mean)*scale + bias)), without g."""
    check("masked_sums", y, {"grad": grad}, {"mean": mean, "scale": scale, "bias": bias})
    part = _bwd_part(grad, None, 2, (None, scale, bias), y, mean, None, None, None)
    return finish_sums(part, y)[0]


def _bwd_part(
    grad: Tensor,
    grad_extra: Tensor | None,
    mask: int,
    masks: tuple[Tensor | None, Tensor | None, Tensor | None],  # a; scale, bias
    y: Tensor,
    mean: Tensor,
    res_y: Tensor | None,
    res_mean: Tensor | None,
    g: Tensor | None,  # written, unless it is grad and there is nothing to change; None: not wanted
) -> Tensor:
    """Partial rows of the sums, after g has been written."""
    count, channels = rows(y), y.size(1)
    block_rows, columns, even = tile(channels, count, y.dtype, LOADS["bn_act_bwd"])
    across = triton.cdiv(channels, columns)
    tiles, parts = chunks(count, block_rows, across)
    part = vectors(y, parts, 2 if res_y is None else 3)
    a, scale, bias = masks
    write = g is not None and (mask > 0 or grad_extra is not None)
    launch(
        bn_act_bwd_kernel,
        (across, parts),
        *(grad, grad_extra, a, y, mean, scale, bias, res_y, res_mean, g if write else None, part),
        *(count, channels, tiles, grad_extra is not None, mask, write, res_y is not None),
        *(acc(y.dtype), even, block_rows, columns),
        num_warps=WARPS,
    )
    return part
