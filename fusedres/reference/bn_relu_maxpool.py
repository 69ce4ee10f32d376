"""The stem: BatchNorm's affine map, ReLU and max pooling, in plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fusedres.reference.bn_act import bn_act


def bn_relu_maxpool(
    y: Tensor,  # [N, C, H, W]
    mean: Tensor,  # [C]
    scale: Tensor,  # [C]
    bias: Tensor,  # [C]
    kernel_size: int,
    stride: int,
    padding: int,
) -> Tensor:
    """max_pool2d(relu((y - mean) * scale + bias)): [N, C, OH, OW] in y's dtype."""
    a = bn_act(y, mean, scale, bias, None, None, None, None, True)
    return F.max_pool2d(a, kernel_size, stride, padding)
