"""The stem's split plan: the library's convolution, BatchNorm's statistics and one pass that
normalises, applies ReLU and pools; backward one call of the light room from the pooled map's
gradient to dy, then the library's wgrad, and its dgrad where the image wants a gradient.

Per element of y 2 reads forward and a quarter write at stride 2; backward what the light room says.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedres._conv import Conv
from fusedres.library import conv_bn as convolutions


def conv_bn_relu_maxpool_fwd(
    light: Any,  # has bn_relu_maxpool_fwd and bn_relu_maxpool_winners
    norm: Any,  # has batch_norm_fwd
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [K, C / groups, R, S] in the compute dtype
    conv: Conv,
    memory_format: torch.memory_format,
    bn: tuple[Any, ...],  # BatchNorm's arguments as rooms take them
    window: tuple[int, int, int],  # kernel_size, stride, padding
    need_winners: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...], Tensor | None]:
    """p [N, K, PH, PW], y [N, K, OH, OW]; mean, biased var, rstd, scale and bias [K] each; winners,
    bytes of p's shape, where the light room has them.
    """
    y = convolutions.convolution(x, weight, conv, memory_format)
    statistics = norm.batch_norm_fwd(y, *bn)
    mean, _, _, scale, bias = statistics
    if not need_winners:
        return light.bn_relu_maxpool_fwd(y, mean, scale, bias, *window), y, statistics, None
    p, winners = light.bn_relu_maxpool_winners(y, mean, scale, bias, window)
    return p, y, statistics, winners


def conv_bn_relu_maxpool_bwd(
    light: Any,  # has batch_norm_relu_maxpool_bwd
    grad: Tensor,  # [N, K, PH, PW], of p
    winners: Tensor | None,
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [K, C / groups, R, S] in the compute dtype
    parameter: Tensor,  # the weight as it is stored: dw takes its dtype and strides
    conv: Conv,
    y: Tensor,  # [N, K, OH, OW]
    mean: Tensor,  # [K], as are the next three
    scale: Tensor,
    bias: Tensor,
    rstd: Tensor,
    window: tuple[int, int, int],
    training: bool,
    need_input: bool,
    need_weight: bool,
    weight_dtype: torch.dtype | None,  # of BatchNorm's dweight; None: there is none
    bias_dtype: torch.dtype | None,
    memory_format: torch.memory_format,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dw, dweight, dbias."""
    dy, dweight, dbias = light.batch_norm_relu_maxpool_bwd(
        grad, winners, y, mean, scale, bias, rstd, window, training, need_input or need_weight,
        weight_dtype, bias_dtype,
    )  # fmt: skip
    if dy is None:
        return None, None, dweight, dbias
    dx, dw = convolutions.convolution_backward(dy, x, weight, conv, need_input, need_weight)
    if dx is not None:
        dx = dx.contiguous(memory_format=memory_format)
    return dx, None if dw is None else convolutions.stored_as(dw, parameter), dweight, dbias
