"""A convolution and the BatchNorm statistics of its output, in plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fusedres._conv import Conv
from fusedres.reference.batch_norm import batch_norm


def conv_bn(
    a: Tensor,  # [N, C, H, W], the activation's value
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y [N, K, OH, OW] in a's dtype, and batch_norm's mean, var, scale, bias of it."""
    top, bottom, left, right = padding
    conv = Conv(stride, padding, dilation, groups)
    padded = F.pad(a, (left, right, top, bottom))
    if a.device.type == "cpu" and tuple(weight.shape[2:]) == (1, 1):
        # oneDNN's backward of a strided 1x1 writes where it must not, for maps of some sizes
        padded, stride = padded[:, :, :: stride[0], :: stride[1]], (1, 1)
    if a.device.type == "cpu" and conv.gives_a_column(a.shape, weight.shape):
        # nor does its bf16 know a stride that leads nowhere
        padded, stride = padded[..., : dilation[1] * (weight.size(3) - 1) + 1], (stride[0], 1)
    y = F.conv2d(padded, weight.to(a.dtype), None, stride, 0, dilation, groups)
    return y, *batch_norm(y, bn_weight, bn_bias, running_mean, running_var, training, eps)
