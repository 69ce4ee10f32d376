"""The functions behind the registered ops once more, in plain torch: same names, arguments and
results.

fusedres.reference has forward passes, which autograd turns round. A backward op takes its tensors
as they come, an activation that belongs to no y among them, so what it must answer stands here.
Computed in the accumulation dtype and rounded where the contract rounds.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres import _norm
from fusedres._conv import Conv, output_shape
from fusedres._tensors import CHANNEL_DIMS, elements_per_channel, per_channel, stat_dtype
from fusedres.reference.add_relu import add_relu as add_relu_fwd  # noqa: F401
from fusedres.reference.bn_act import bn_act as bn_act_fwd
from fusedres.reference.bn_relu_maxpool import bn_relu_maxpool

Types = tuple[torch.dtype | None, torch.dtype | None]


def add_relu_bwd(grad: Tensor, out: Tensor) -> Tensor:
    """dx."""
    return torch.where(out <= 0, torch.zeros_like(grad), grad)


def conv_act_fwd(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    *rest: Any,
) -> tuple[Tensor]:
    """act(conv(x)*scale + bias [+ residual])."""
    stride, padding, dilation, groups = rest[:4]
    y = _convolved(x, weight, Conv(tuple(stride), tuple(padding), tuple(dilation), groups))
    wide = y.to(stat_dtype(x.dtype))
    wide = wide if scale is None else wide * per_channel(scale.to(wide.dtype))
    wide = wide if bias is None else wide + per_channel(bias.to(wide.dtype))
    wide = wide if residual is None else wide + residual
    return ((wide.relu() if relu else wide).to(x.dtype),)


def gradient(
    grad: Tensor, extra: Tensor | None, a: Tensor | None, y: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor]:
    """bn_act's backward without a residual's part: g, sums."""
    da = grad.to(mean.dtype) + (0 if extra is None else extra.to(mean.dtype))
    g = da.to(grad.dtype)
    g = g if a is None else torch.where(a <= 0, torch.zeros_like(g), g)
    exact = g.to(mean.dtype)
    centered = y.to(mean.dtype) - per_channel(mean)
    return g, torch.stack([exact.sum(CHANNEL_DIMS), (exact * centered).sum(CHANNEL_DIMS)])


def bn_act_bwd(
    grad: Tensor,
    grad_extra: Tensor | None,
    a: Tensor | None,
    y: Tensor,
    mean: Tensor,
    res_y: Tensor | None,
    res_mean: Tensor | None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """g, sums, res_sums."""
    g, sums = gradient(grad, grad_extra, a, y, mean)
    if res_y is None or res_mean is None:
        return g, sums, None
    return g, sums, gradient(g, None, None, res_y, res_mean)[1]


def batch_norm_stats(y: Tensor) -> tuple[Tensor, Tensor]:
    """mean, biased var."""
    if elements_per_channel(y) == 0:
        zeros = torch.zeros(y.size(1), dtype=stat_dtype(y.dtype))
        return zeros, zeros.clone()
    var, mean = torch.var_mean(y.to(stat_dtype(y.dtype)), CHANNEL_DIMS, correction=0)
    return mean, var


def batch_norm_fwd(
    y: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
) -> tuple[Tensor, ...]:
    """mean, biased var, rstd, scale, bias; running statistics move in place."""
    if training:
        mean, var = batch_norm_stats(y)
        if running_mean is not None and running_var is not None:
            count = elements_per_channel(y)
            _norm.update_running(running_mean, running_var, mean, var, momentum, count)
    else:
        assert running_mean is not None and running_var is not None
        dtype = stat_dtype(y.dtype)
        mean, var = running_mean.to(dtype, copy=True), running_var.to(dtype, copy=True)
    return mean, var, *_norm.normalizers(mean, var, bn_weight, bn_bias, eps)


def batch_norm_act_fwd(y: Tensor, *norm_residual_relu: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    """out, batch_norm_fwd's five."""
    *norm, residual, relu = norm_residual_relu
    statistics = mean, _, _, scale, bias = batch_norm_fwd(y, *norm)
    return bn_act_fwd(y, mean, scale, bias, residual, None, None, None, relu), statistics


def batch_norm_bwd(
    g: Tensor,
    y: Tensor,
    mean: Tensor,
    scale: Tensor,
    rstd: Tensor,
    sums: Tensor,
    training: bool,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dy, dweight, dbias."""
    m, s, r, s0, s1 = map(per_channel, (mean, scale, rstd, *sums))
    dy, count = g.to(mean.dtype) * s, max(1, elements_per_channel(y))
    if training:
        dy = dy - s * (s0 + r * r * s1 * (y.to(mean.dtype) - m)) / count
    return dy.to(g.dtype), *_norm.parameter_gradients(sums, rstd, weight_dtype, bias_dtype)


def batch_norm_act_bwd(
    grad: Tensor,
    out: Tensor | None,
    y: Tensor,
    mean: Tensor,
    scale: Tensor,
    bias: Tensor,
    rstd: Tensor,
    residual: bool,
    training: bool,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor | None, ...]:
    """g, dy, dweight, dbias."""
    g, sums = gradient(grad, None, out, y, mean)
    types = (weight_dtype, bias_dtype)
    return g, *batch_norm_bwd(g, y, mean, scale, rstd, sums, training, *types)


def bn_relu_maxpool_fwd(
    y: Tensor,
    mean: Tensor,
    scale: Tensor,
    bias: Tensor,
    kernel_size: int,
    stride: int,
    padding: int,
) -> Tensor:
    """p; of an empty map an empty one, which torch's max pool refuses."""
    sides = ((extent + 2 * padding - kernel_size) // stride + 1 for extent in y.shape[2:])
    shape = (*y.shape[:2], *(max(0, side) for side in sides))
    if 0 in shape:
        return y.new_empty(shape)
    return bn_relu_maxpool(y, mean, scale, bias, kernel_size, stride, padding)


def bn_relu_maxpool_bwd(
    grad: Tensor,
    y: Tensor,
    mean: Tensor,
    scale: Tensor,
    bias: Tensor,
    kernel_size: int,
    stride: int,
    padding: int,
) -> tuple[Tensor, Tensor]:
    """g, sums: torch's own max pool says who won."""
    wide = (y.to(mean.dtype) - per_channel(mean)) * per_channel(scale) + per_channel(bias)
    u = wide.to(y.dtype).detach().requires_grad_()
    with torch.enable_grad():
        p = F.max_pool2d(u.relu(), kernel_size, stride, padding)
    (g,) = torch.autograd.grad(p, u, grad)
    return g, gradient(g, None, None, y, mean)[1]


def batch_norm_relu_maxpool_bwd(
    grad: Tensor,
    winners: Tensor | None,
    y: Tensor,
    mean: Tensor,
    scale: Tensor,
    bias: Tensor,
    rstd: Tensor,
    window: tuple[int, int, int],
    training: bool,
    need_dy: bool,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor | None, ...]:
    """dy, dweight, dbias."""
    g, sums = bn_relu_maxpool_bwd(grad, y, mean, scale, bias, *window)
    types = (weight_dtype, bias_dtype)
    dy, *gradients = batch_norm_bwd(g, y, mean, scale, rstd, sums, training, *types)
    return dy if need_dy else None, *gradients


# --- with a convolution, as torch.ops.fusedres has them -------------------------------------------


def _convolved(a: Tensor, weight: Tensor, conv: Conv) -> Tensor:
    conv = conv.reduced(a.shape, weight.shape)
    if a.size(0) == 0:
        return a.new_empty(output_shape(a.shape, weight.shape, conv)) + 0 * (a.sum() + weight.sum())
    top, bottom, left, right = conv.padding
    if tuple(weight.shape[2:]) == (1, 1):  # as in fusedres.reference.conv_bn
        read = F.pad(a, (left, right, top, bottom))[:, :, :: conv.stride[0], :: conv.stride[1]]
        return F.conv2d(read, weight, None, 1, 0, conv.dilation, conv.groups)
    if conv.gives_a_column(a.shape, weight.shape):  # as there, too
        padded = F.pad(a, (left, right, top, bottom))
        read = padded[..., : conv.dilation[1] * (weight.size(3) - 1) + 1]
        return F.conv2d(read, weight, None, (conv.stride[0], 1), 0, conv.dilation, conv.groups)
    if conv.even_padding() and a.size(3) >= conv.stride[1]:  # as in fusedres.library.conv_bn
        return F.conv2d(a, weight, None, conv.stride, (top, left), conv.dilation, conv.groups)
    padded = F.pad(a, (left, right, top, bottom))
    return F.conv2d(padded, weight, None, conv.stride, 0, conv.dilation, conv.groups)


def _through(a: Tensor, weight: Tensor, conv: Conv, dy: Tensor) -> tuple[Tensor, Tensor]:
    """dgrad and wgrad."""
    leaves = [t.clone(memory_format=torch.preserve_format).detach() for t in (a, weight)]
    leaves = [t.requires_grad_() for t in leaves]
    with torch.enable_grad():
        y = _convolved(*leaves, conv)
    da, dw = torch.autograd.grad(y, leaves, dy)
    return da, dw


def _geometry(args: tuple[Any, ...]) -> tuple[Conv, tuple[Any, ...]]:
    stride, padding, dilation, groups, *rest = args
    return Conv(tuple(stride), tuple(padding), tuple(dilation), groups), tuple(rest)


def _cast(x: Tensor, weight: Tensor, packed: Tensor | None) -> Tensor:
    return weight.to(x.dtype) if packed is None else packed


def _momentum(norm: tuple[Any, ...]) -> tuple[Any, ...]:
    *first, momentum, tensor, eps = norm
    return (*first, momentum if tensor is None else tensor, eps)


def conv_bn_fwd(*args: Any) -> tuple[Tensor | None, ...]:
    """y, mean, var, rstd, scale, bias, the emitted activation, no bits."""
    x, mean, *_ = args
    a = x if mean is None else bn_act_fwd(*args[:9])
    weight = _cast(x, *args[9:11])
    conv, (emit, *rest) = _geometry(args[11:])
    y = _convolved(a, weight, conv)
    norm = _momentum(tuple(rest[:8]))
    return y, *batch_norm_fwd(y, *norm), a if emit else None, None


def conv_bn_bwd(*args: Any) -> tuple[Tensor | None, ...]:
    """g_in, in_sums, res_sums, dw, dweight, dbias."""
    x, mean, scale, bias, residual, res_mean, res_scale, res_bias, relu = args[:9]
    parameter, packed = args[9:11]
    conv, rest = _geometry(args[11:])
    a, _, g, sums, grad_a, y, y_mean, y_scale, y_rstd, _, training, *rest = rest
    need_input, need_weight, *types, _, _ = rest
    if a is None:
        joined = (residual, res_mean, res_scale, res_bias)
        a = x if mean is None else bn_act_fwd(x, mean, scale, bias, *joined, relu)
    dy, *gradients = batch_norm_bwd(g, y, y_mean, y_scale, y_rstd, sums, training, *types)
    da, dw = _through(a, _cast(x, parameter, packed), conv, dy)
    in_sums = res_sums = None
    if mean is None:
        da = da if grad_a is None else da + grad_a
    else:
        res_y = None if res_mean is None else residual
        mask = a if relu else None
        da, in_sums, res_sums = bn_act_bwd(da, grad_a, mask, x, mean, res_y, res_mean)
    inputs = (da, in_sums, res_sums) if need_input else (None, None, None)
    return *inputs, dw.to(parameter.dtype) if need_weight else None, *gradients


def conv_bn_relu_maxpool_fwd(*args: Any) -> tuple[Tensor | None, ...]:
    """p, y, mean, var, rstd, scale, bias; winners are the backend's own."""
    x, weight, packed = args[:3]
    conv, (kernel_size, stride, padding, *rest) = _geometry(args[3:])
    y = _convolved(x, _cast(x, weight, packed), conv)
    statistics = mean, _, _, scale, bias = batch_norm_fwd(y, *_momentum(tuple(rest[:8])))
    p = bn_relu_maxpool_fwd(y, mean, scale, bias, kernel_size, stride, padding)
    return p, y, *statistics


def conv_bn_relu_maxpool_bwd(*args: Any) -> tuple[Tensor | None, ...]:
    """dx, dw, dweight, dbias."""
    x, parameter, packed = args[:3]
    conv, rest = _geometry(args[3:])
    *window, grad, winners, y, mean, scale, bias, rstd, training = rest[:11]
    need_input, need_weight, *types, _, _ = rest[11:]
    dy, *gradients = batch_norm_relu_maxpool_bwd(
        grad, winners, y, mean, scale, bias, rstd, tuple(window), training, True, *types
    )
    assert dy is not None
    dx, dw = _through(x, _cast(x, parameter, packed), conv, dy)
    dw = dw.to(parameter.dtype)
    return dx if need_input else None, dw if need_weight else None, *gradients
