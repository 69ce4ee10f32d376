"""act((y - mean) * scale + bias [+ residual]), in plain torch."""

from __future__ import annotations

from torch import Tensor

from fusedres._tensors import per_channel, stat_dtype


def _affine(y: Tensor, mean: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    wide = y.to(stat_dtype(y.dtype))
    return (wide - per_channel(mean)) * per_channel(scale) + per_channel(bias)


def bn_act(
    y: Tensor,  # [N, C, H, W]
    mean: Tensor,  # [C]
    scale: Tensor,  # [C]
    bias: Tensor,  # [C]
    residual: Tensor | None,  # [N, C, H, W]
    res_mean: Tensor | None,  # [C]: given if the residual is itself a normalised convolution
    res_scale: Tensor | None,  # [C]
    res_bias: Tensor | None,  # [C]
    relu: bool,
) -> Tensor:
    """The activation [N, C, H, W] in y's dtype."""
    u = _affine(y, mean, scale, bias)
    if residual is not None and res_mean is not None:
        assert res_scale is not None and res_bias is not None
        u = u + _affine(residual, res_mean, res_scale, res_bias)
    elif residual is not None:
        u = u + residual
    if relu:
        u = u.relu()
    return u.to(y.dtype)
