"""act(conv(x)*scale + bias [+ residual]) in plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fusedres._conv import Conv
from fusedres._tensors import per_channel, stat_dtype


def conv_act(
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [K, C / groups, R, S] in x's dtype
    conv: Conv,
    scale: Tensor | None,  # [K]; None: ones
    bias: Tensor | None,  # [K]; None: zeros
    residual: Tensor | None,  # like the result
    relu: bool,
) -> Tensor:
    """[N, K, OH, OW] in x's dtype; what comes behind the convolution in that of statistics."""
    top, bottom, left, right = conv.padding
    padded, stride = F.pad(x, (left, right, top, bottom)), conv.stride
    if x.device.type == "cpu" and conv.gives_a_column(x.shape, weight.shape):
        # oneDNN's bf16 does not know a stride that leads nowhere
        padded = padded[..., : conv.dilation[1] * (weight.size(3) - 1) + 1]
        stride = stride[0], 1
    y = F.conv2d(padded, weight, None, stride, 0, conv.dilation, conv.groups)
    if scale is not None or bias is not None or residual is not None:
        y = y.to(stat_dtype(x.dtype))
    if scale is not None:
        y = y * per_channel(scale.to(y.dtype))
    if bias is not None:
        y = y + per_channel(bias.to(y.dtype))
    if residual is not None:
        y = y + residual
    return (y.relu() if relu else y).to(x.dtype)
