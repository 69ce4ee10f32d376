"""BatchNorm's statistics and affine map, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres._tensors import CHANNEL_DIMS, elements_per_channel, per_channel, stat_dtype


def batch_norm(
    y: Tensor,  # [N, C, H, W]
    bn_weight: Tensor | None,  # [C]
    bn_bias: Tensor | None,  # [C]
    running_mean: Tensor | None,  # [C], read if not training
    running_var: Tensor | None,  # [C], read if not training
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean, biased var, scale = weight / sqrt(var + eps), bias: each [C], fp32 (fp64 for fp64)."""
    dtype = stat_dtype(y.dtype)
    if training and elements_per_channel(y) == 0:  # torch leaves an empty batch without statistics
        mean = y.to(dtype).sum(CHANNEL_DIMS)  # zeros that lead back to y, as those of a batch do
        var = mean.square()
    elif training:
        wide = y.to(dtype)
        mean = wide.mean(CHANNEL_DIMS)
        var = (wide - per_channel(mean)).square().mean(CHANNEL_DIMS)
    else:
        assert running_mean is not None and running_var is not None  # the contract's check
        mean = running_mean.to(dtype, copy=True)
        var = running_var.to(dtype, copy=True)
    return mean, var, *affine_map(mean, var, bn_weight, bn_bias, eps)


def affine_map(
    mean: Tensor,  # [C]
    var: Tensor,  # [C], biased
    bn_weight: Tensor | None,  # [C]
    bn_bias: Tensor | None,  # [C]
    eps: float,
) -> tuple[Tensor, Tensor]:
    """scale = weight / sqrt(var + eps) and bias, in mean's dtype; None: ones and zeros."""
    scale = torch.rsqrt(var + eps)
    if bn_weight is not None:
        scale = scale * bn_weight.to(mean.dtype)
    bias = torch.zeros_like(mean) if bn_bias is None else bn_bias.to(mean.dtype)
    return scale, bias
