"""The weight gradient of a convolution whose input is still deferred (csrc/cpu/conv_bn.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres._checks import check_dense, described
from fusedres._conv import Conv, Source, output_shape
from fusedres._tensors import stored_format
from fusedres.native import require
from fusedres.native._args import check, head, pointers, workspace

_DTYPES = (torch.float32, torch.bfloat16)
_IN, _OUT = 32, 8  # ConvBnWgradParams::kInBlock and kOutBlock


def serves_wgrad(source: Source, weight: Tensor, conv: Conv) -> bool:
    """Whether conv_bn_wgrad takes it: in NHWC on the CPU, of one group and channels in blocks."""
    x = source.x
    blocks = weight.size(1) % _IN == 0 and weight.size(0) % _OUT == 0
    plain = source.mean is None or source.residual is None
    return (
        blocks
        and plain
        and conv.groups == 1
        and x.dtype in _DTYPES
        and x.device.type == "cpu"
        and stored_format(x) == torch.channels_last
        and require().cpu_level() != "baseline"
    )


def conv_bn_wgrad(
    dy: Tensor,  # [N, K, OH, OW]
    source: Source,  # without a residual
    weight: Tensor,  # [K, C, R, S], as the parameter is stored
    conv: Conv,  # of one group
) -> Tensor:
    """dw, fp32 or of weight's dtype if another, in weight's strides."""
    x, mean, scale, bias = source.x, source.mean, source.scale, source.bias
    per_channel = {} if mean is None else {"mean": mean, "scale": scale, "bias": bias}
    check("conv_bn_wgrad", x, {}, per_channel, name="x")
    ranked = isinstance(weight, Tensor) and weight.dim() == 4 and weight.size(1) == x.size(1)
    if not ranked or not serves_wgrad(source, weight, conv):
        raise ValueError(
            f"conv_bn_wgrad: no kernel for x {described(x)} and weight {described(weight)}"
        )
    height, width = weight.shape[2:]
    out = output_shape(x.shape, weight.shape, conv)
    check_dense("conv_bn_wgrad", "dy", dy, out, x)
    dw = torch.empty_like(weight, dtype=torch.float32)
    window = (height, width, *conv.stride, conv.padding[0], conv.padding[2], *conv.dilation)
    c, args = require(), head(x)
    work = workspace(c.conv_bn_wgrad_workspace(args, out, window), x)
    tensors = pointers(dy, x, mean, scale, bias, dw, work)
    c.conv_bn_wgrad(args, out, window, source.relu and mean is not None, tensors, dw.stride())
    return dw if weight.dtype == torch.float32 else dw.to(weight.dtype)
