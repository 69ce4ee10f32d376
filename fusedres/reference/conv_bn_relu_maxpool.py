"""The stem of a ResNet: convolution, BatchNorm, ReLU and max pooling, in plain torch."""

from __future__ import annotations

from torch import Tensor

from fusedres.reference.bn_relu_maxpool import bn_relu_maxpool
from fusedres.reference.conv_bn import conv_bn


def conv_bn_relu_maxpool(
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [K, C / groups, R, S]
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],  # top, bottom, left, right
    dilation: tuple[int, int],
    groups: int,
    bn_weight: Tensor | None,  # [K]
    bn_bias: Tensor | None,  # [K]
    running_mean: Tensor | None,  # [K]
    running_var: Tensor | None,  # [K]
    training: bool,
    eps: float,
    kernel_size: int,
    pool_stride: int,
    pool_padding: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p [N, K, PH, PW], the convolution's y [N, K, OH, OW], and the mean and biased var of y."""
    y, mean, var, scale, bias = conv_bn(
        x, weight, stride, padding, dilation, groups, bn_weight, bn_bias, running_mean, running_var,
        training, eps,
    )  # fmt: skip
    p = bn_relu_maxpool(y, mean, scale, bias, kernel_size, pool_stride, pool_padding)
    return p, y, mean, var
