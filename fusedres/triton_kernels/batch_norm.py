"""BatchNorm's statistics with all that follows from them per channel, and the gradient of its input
(device/batch_norm.py).
"""

from __future__ import annotations

import ctypes
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres._checks import check_norm, described
from fusedres._norm import parameter_gradients
from fusedres.triton_kernels._args import acc, check, like, rows, vectors
from fusedres.triton_kernels._launch import launch
from fusedres.triton_kernels.bn_act import (
    WARPS,
    bn_act_bwd,
    bn_act_fwd,
    chunks,
    masked_sums,
    second_stage,
    tile,
)
from fusedres.triton_kernels.device.batch_norm import (
    batch_norm_bwd_kernel,
    batch_norm_finish_kernel,
    batch_norm_stats_kernel,
)

# accesses of 16 bytes a thread makes to each tensor of a tile
LOADS = {"batch_norm_stats": 2, "batch_norm_bwd": 4}

# mean, biased var, rstd, scale, bias: [C] each
Statistics = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def batch_norm_fwd(
    y: Tensor,  # [N, C, H, W]
    bn_weight: Tensor | None,  # [C], of any floating dtype, as are the next three
    bn_bias: Tensor | None,
    running_mean: Tensor | None,  # moved in place if training, read if not
    running_var: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
) -> Statistics:
    """mean, biased var, rstd, scale = weight*rstd and bias, all fresh; copies where frozen.

    An empty y has mean and var 0, and moves nothing.
    """
    norm = (bn_weight, bn_bias, running_mean, running_var)
    if not training:
        check("batch_norm_fwd", y)
        return _finish("batch_norm_fwd", None, 1, y, *norm, 0.0, eps)
    part, rows_per_part = _partial_moments(y)
    return _finish("batch_norm_fwd", part, rows_per_part, y, *norm, momentum, eps)


def batch_norm_act_fwd(
    y: Tensor,  # [N, C, H, W]
    bn_weight: Tensor | None,  # [C], of any floating dtype, as are the next three
    bn_bias: Tensor | None,
    running_mean: Tensor | None,  # moved in place if training, read if not
    running_var: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    residual: Tensor | None,  # [N, C, H, W]
    relu: bool,
) -> tuple[Tensor, Statistics]:
    """batch_norm_fwd and bn_act_fwd."""
    norm = (bn_weight, bn_bias, running_mean, running_var)
    check("batch_norm_act_fwd", y, {"residual": residual})
    statistics = batch_norm_fwd(y, *norm, training, momentum, eps)
    mean, _, _, scale, bias = statistics
    return bn_act_fwd(y, mean, scale, bias, residual, None, None, None, relu), statistics


def finish_statistics(
    part: Tensor,  # [R, 2, C] in the dtype of y's statistics
    rows_per_part: int,
    y: Tensor,  # [N, C, H, W]: whose statistics they are; it is not read
    bn_weight: Tensor | None,  # [C], of any floating dtype, as are the next three
    bn_bias: Tensor | None,
    running_mean: Tensor | None,  # moved in place
    running_var: Tensor | None,
    momentum: float | Tensor,
    eps: float,
) -> Statistics:
    """batch_norm_fwd in training, where a kernel that wrote y has left partial moments.

    Row r of part has the mean and the sum of squared deviations from it (M2) of y's rows
    [r*rows_per_part, min(M, (r + 1)*rows_per_part)), of M = N*H*W.
    """
    norm = (bn_weight, bn_bias, running_mean, running_var)
    return _finish("finish_statistics", part, rows_per_part, y, *norm, momentum, eps)


def _partial_moments(y: Tensor) -> tuple[Tensor, int]:
    """What finish_statistics takes as part and rows_per_part."""
    check("batch_norm_fwd", y)
    count, channels = rows(y), y.size(1)
    block_rows, columns, even = tile(channels, count, y.dtype, LOADS["batch_norm_stats"])
    across = triton.cdiv(channels, columns)
    tiles, parts = chunks(count, block_rows, across)
    part = vectors(y, parts, 2)
    launch(
        batch_norm_stats_kernel,
        (across, parts),
        *(y, part, count, channels, tiles, acc(y.dtype), even, block_rows, columns),
        num_warps=WARPS,
    )
    return part, tiles * block_rows


def _finish(
    op: str,
    part: Tensor | None,  # None: the running statistics, frozen
    rows_per_part: int,
    y: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | Tensor,
    eps: float,
) -> Statistics:
    count, channels = rows(y), y.size(1)
    parts = 0 if part is None else part.size(0)
    training = part is not None
    check_norm(op, y, bn_weight, bn_bias, running_mean, running_var, training, momentum)
    norm = {"bn_weight": bn_weight, "bn_bias": bn_bias}
    norm |= {"running_mean": running_mean, "running_var": running_var}
    if part is not None and not (
        part.shape == (parts, 2, channels)
        and part.dtype == vectors(y, 0).dtype
        and part.device == y.device
        and part.is_contiguous()
        and parts == triton.cdiv(count, rows_per_part)
    ):
        raise ValueError(
            f"{op}: {described(part)} is no partial rows of {rows_per_part} of y's {count} rows"
        )
    outputs = tuple(vectors(y) for _ in range(5))
    move = training and running_mean is not None and count > 0
    stored = {name: None if v is None else v.contiguous() for name, v in norm.items()}
    amount = momentum.detach() if isinstance(momentum, Tensor) else None
    halves = (0.0, 0.0) if isinstance(momentum, Tensor) else _halves(momentum)
    wide = {acc(y.dtype)} | {acc(v.dtype) for v in (running_mean, running_var) if v is not None}
    block_rows, columns, warps = second_stage(parts)
    launch(
        batch_norm_finish_kernel,
        (triton.cdiv(channels, columns),),
        *(part, *stored.values(), amount, *halves, *_halves(eps)),
        *(*outputs, parts, rows_per_part, count, channels, training, move, acc(y.dtype)),
        *(tl.float64 if tl.float64 in wide else tl.float32, block_rows, columns),
        num_warps=warps,
    )
    for name in ("running_mean", "running_var"):
        running, result = norm[name], stored[name]
        if move and running is not None and result is not None and result is not running:
            running.copy_(result)
    mean, var, rstd, scale, bias = outputs
    return mean, var, rstd, scale, bias


def _halves(value: float) -> tuple[float, float]:
    """Two fp32 numbers whose sum is value to 48 bits: all that reaches a kernel of a float."""
    high = ctypes.c_float(value).value
    return high, value - high if math.isfinite(high) else 0.0


def batch_norm_bwd(
    g: Tensor,  # [N, C, H, W]
    y: Tensor,  # [N, C, H, W]
    mean: Tensor,  # [C]
    scale: Tensor,  # [C]
    rstd: Tensor,  # [C]
    sums: Tensor,  # [2, C]: sum g, sum g*(y - mean)
    training: bool,
    weight_dtype: torch.dtype | None,  # of the gradients of weight and bias; None: it has none
    bias_dtype: torch.dtype | None,
    mask_bias: Tensor | None = None,  # [C]: g is yet to be masked by relu, bias included
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dy, dweight, dbias): dy = scale*g + c0 + c1*(y - mean), with c0 = c1 = 0 unless training."""
    per_channel: dict[str, Tensor | None] = {"mean": mean, "scale": scale, "rstd": rstd}
    per_channel |= {"sums": sums, "mask_bias": mask_bias}
    check("batch_norm_bwd", y, {"g": g}, per_channel)
    dy = like(y)
    count, channels = rows(y), y.size(1)
    if count == 0:
        return dy, *parameter_gradients(sums, rstd, weight_dtype, bias_dtype)
    dweight, dbias = (
        None if dtype is None else torch.empty(channels, dtype=dtype, device=y.device)
        for dtype in (weight_dtype, bias_dtype)
    )
    block_rows, columns, even = tile(channels, count, y.dtype, LOADS["batch_norm_bwd"])
    launch(
        batch_norm_bwd_kernel,
        (triton.cdiv(channels, columns) * triton.cdiv(count, block_rows),),
        *(g, y, mean, scale, rstd, mask_bias, sums, dy, dweight, dbias, count, channels),
        *(training, mask_bias is not None, acc(y.dtype), even, block_rows, columns),
        num_warps=WARPS,
    )
    return dy, dweight, dbias


def batch_norm_act_bwd(
    grad: Tensor,  # [N, C, H, W]
    out: Tensor | None,  # [N, C, H, W], the activation; None: no ReLU
    y: Tensor,  # [N, C, H, W]
    mean: Tensor,  # [C], as are the next three
    scale: Tensor,
    bias: Tensor,
    rstd: Tensor,
    residual: bool,  # whether one joined, whose gradient g is
    training: bool,
    weight_dtype: torch.dtype | None,  # of dweight; None: there is none
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """(g or None, dy, dweight, dbias): bn_act_bwd and batch_norm_bwd.

    Without a residual both passes take the mask from y, and g is never written.
    """
    rest = (training, weight_dtype, bias_dtype)
    if out is not None and not residual:
        sums = masked_sums(grad, y, mean, scale, bias)
        return None, *batch_norm_bwd(grad, y, mean, scale, rstd, sums, *rest, mask_bias=bias)
    g, sums, _ = bn_act_bwd(grad, None, out, y, mean, None, None)
    return g, *batch_norm_bwd(g, y, mean, scale, rstd, sums, *rest)
