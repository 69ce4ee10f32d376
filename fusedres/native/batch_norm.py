"""Statistics of a BatchNorm and the gradient of its input (csrc/cpu/batch_norm.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres._norm import normalizers, parameter_gradients, update_running
from fusedres._tensors import elements_per_channel, stat_dtype
from fusedres.native import require
from fusedres.native._args import check, head, like, pointer, vectors, workspace


def batch_norm_stats(
    y: Tensor,  # [N, C, H, W]
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel, [C] each; 0 for an empty y."""
    check("batch_norm_stats", y)
    c = require()
    args = head(y)
    mean, var = vectors(y), vectors(y)
    work = workspace(c.partial_rows(args[1], args[2]), 2, y)
    c.batch_norm_stats(*args, y.data_ptr(), mean.data_ptr(), var.data_ptr(), work.data_ptr())
    return mean, var


def batch_norm_fwd(
    y: Tensor,  # [N, C, H, W]
    bn_weight: Tensor | None,  # [C]
    bn_bias: Tensor | None,  # [C]
    running_mean: Tensor | None,  # [C], moved in place if training, else read
    running_var: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """mean, biased var, rstd, scale and bias: fresh [C] tensors, copies where they are frozen."""
    if training:
        mean, var = batch_norm_stats(y)
        if running_mean is not None and running_var is not None:
            count = elements_per_channel(y)
            update_running(running_mean, running_var, mean, var, momentum, count)
    else:
        assert running_mean is not None and running_var is not None  # the contract's check
        dtype = stat_dtype(y.dtype)
        mean, var = running_mean.to(dtype, copy=True), running_var.to(dtype, copy=True)
    return mean, var, *normalizers(mean, var, bn_weight, bn_bias, eps)


def batch_norm_bwd(
    g: Tensor,  # [N, C, H, W]
    y: Tensor,  # [N, C, H, W]
    mean: Tensor,  # [C]
    scale: Tensor,  # [C]
    rstd: Tensor,  # [C]
    sums: Tensor,  # [2, C]: sum g, sum g*(y - mean)
    training: bool,
    weight_dtype: torch.dtype | None,  # of dweight; None: there is none
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dy = scale*g + c0 + c1*(y - mean) with c0 = c1 = 0 unless training, dweight and dbias."""
    per_channel = {"mean": mean, "scale": scale, "rstd": rstd, "sums": sums}
    check("batch_norm_bwd", y, {"g": g}, per_channel)
    dy = like(y)
    work = vectors(y, 2)
    inputs = (g, y, mean, scale, rstd, sums, dy, work)
    require().batch_norm_bwd(*head(y), training, *map(pointer, inputs))
    return dy, *parameter_gradients(sums, rstd, weight_dtype, bias_dtype)
