"""conv_bn's split plan: light passes around the library's convolution, under the contract of the
fused kernel.

Forward materialises the activation with one light pass, calls the convolution, and takes statistics
with another. Backward re-materialises the activation where it was neither emitted nor kept (wgrad
reads it), turns g into dy with one pass, calls the library's dgrad and wgrad, and finishes with one
pass that joins the shortcut's gradient, applies ReLU's mask in place and takes the sums of the
gradient protocol; or, where who reads the gradient masks it, takes the sums alone.

Per element of the input 2 reads + 1 write forward; per element of the output 1 read, backward 2
reads + 1 write; convolutions come on top. `light` is any backend's light passes: the split plan is
one for all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres._conv import Conv, Source, output_shape
from fusedres._plans import Plan
from fusedres._tensors import stored_format


def convolution(
    a: Tensor, weight: Tensor, conv: Conv, memory_format: torch.memory_format
) -> Tensor:
    """y [N, K, OH, OW], dense in `memory_format`."""
    if a.size(0) == 0:
        _check_alike(a, weight)
        return a.new_empty(output_shape(a.shape, weight.shape, conv)).to(
            memory_format=memory_format
        )
    padded, padding, stride = pad(a, weight, conv)
    y = torch.ops.aten.convolution(
        padded, weight, None, stride, padding, conv.dilation, False, [0, 0], conv.groups
    )
    return y.contiguous(memory_format=memory_format)


def convolution_backward(
    dy: Tensor,
    a: Tensor,
    weight: Tensor,
    conv: Conv,
    need_da: bool,
    need_dw: bool,
    compact: bool = False,  # da of the pixels alone that a 1x1 kernel reads
) -> tuple[Tensor | None, Tensor | None]:
    """dgrad and wgrad by the library, in the compute dtype; None for what is not needed."""
    whole, steps = a, conv.stride
    if a.size(0) == 0:
        _check_alike(a, weight, dy)
        read = a[:, :, :: steps[0], :: steps[1]] if compact else a
        nothing = (torch.zeros_like(t) for t in (read, weight))
        return tuple(  # type: ignore[return-value]
            t if need else None for t, need in zip(nothing, (need_da, need_dw), strict=True)
        )
    samples = _samples(a, weight, conv)
    if samples:
        top, bottom, left, right = conv.padding
        whole = F.pad(a, (left, right, top, bottom)) if any(conv.padding) else a
        a = whole[:, :, :: steps[0], :: steps[1]].contiguous(memory_format=stored_format(a))
        conv = conv._replace(stride=(1, 1), padding=(0, 0, 0, 0))
    padded, padding, stride = pad(a, weight, conv)
    product = need_dw and _product_pays(dy, padded, weight, conv)
    da, dw, _ = torch.ops.aten.convolution_backward(
        dy,
        padded,
        weight,
        None,
        stride,
        padding,
        conv.dilation,
        False,
        [0, 0],
        conv.groups,
        [need_da, need_dw and not product, False],
    )
    if product:
        rows = (t.permute(0, 2, 3, 1).flatten(0, 2) for t in (dy, a))
        dw = torch.mm(next(rows).t(), next(rows)).view_as(weight)
    if need_da and padded is not a:
        top, _, left, right = conv.padding
        unread = a.size(3) + left + right - padded.size(3)
        da = F.pad(da, (0, unread)) if unread else da
        da = da[:, :, top : top + a.size(2), left : left + a.size(3)]
    if need_da and samples and not compact:
        full = torch.zeros_like(whole)
        full[:, :, :: steps[0], :: steps[1]] = da
        da = full[:, :, top : whole.size(2) - bottom, left : whole.size(3) - right]
    if need_da and compact and not samples:
        da = da[:, :, :: steps[0], :: steps[1]]
    return (da if need_da else None), (dw if need_dw else None)


def _check_alike(a: Tensor, *others: Tensor) -> None:
    """For an empty batch, which the library would not see, what it asks of any other."""
    for t in others:
        if t.dtype != a.dtype:
            raise TypeError(f"convolution: all must be {a.dtype} as the input, got {t.dtype}")


# For few pixels oneDNN's wgrad in bf16 is slower than its matrix product.
_FEW_ROWS = 4096


def _samples(a: Tensor, weight: Tensor, conv: Conv) -> bool:
    """Whether the pixels that a strided 1x1 kernel reads are gathered first: on a CPU, where
    oneDNN's backward of it reads and writes what it does not need, and for some sizes, in fp32,
    where it must not.
    """
    strided = conv.stride != (1, 1) and tuple(weight.shape[2:]) == (1, 1)
    return strided and a.device.type == "cpu"


def _product_pays(dy: Tensor, a: Tensor, weight: Tensor, conv: Conv) -> bool:
    pointwise = conv.stride == (1, 1) and conv.is_pointwise((weight.size(2), weight.size(3)))
    if not pointwise or a.device.type != "cpu" or a.dtype != torch.bfloat16:
        return False
    rows = a.size(0) * a.size(2) * a.size(3)
    dense = all(t.is_contiguous(memory_format=torch.channels_last) for t in (dy, a))
    return dense and rows <= _FEW_ROWS


def pad(a: Tensor, weight: Tensor, conv: Conv) -> tuple[Tensor, tuple[int, int], tuple[int, int]]:
    """The input, padded here where the library cannot or must not, what it is still to pad, and the
    stride.
    """
    top, bottom, left, right = conv.padding
    # oneDNN's bf16 wgrad gives garbage, or crashes, where a padded map is narrower than the stride
    narrow = a.device.type == "cpu" and a.size(3) < conv.stride[1]
    column = a.device.type == "cpu" and conv.gives_a_column(a.shape, weight.shape)
    if conv.even_padding() and not narrow and not column:
        return a, (top, left), conv.stride
    padded = F.pad(a, (left, right, top, bottom))
    if not column:
        return padded, (0, 0), conv.stride
    read = padded[..., : conv.dilation[1] * (weight.size(3) - 1) + 1]
    return read.contiguous(memory_format=stored_format(a)), (0, 0), (conv.stride[0], 1)


def materialise(light: Any, source: Source) -> Tensor:
    """The activation in memory."""
    if source.mean is None:
        return source.x
    return light.bn_act_fwd(*source)


def conv_bn_bwd(
    light: Any,
    wgrad: Callable[[Tensor, Source, Tensor, Conv], Tensor] | None,  # instead of the library's
    dy: Tensor,  # [N, K, OH, OW]
    grad_a: Tensor | None,  # of the emitted activation, or of every second row and column of it
    source: Source,
    a: Tensor | None,  # the activation, if it was emitted or kept
    weight: Tensor,  # [K, C / groups, R, S] in the compute dtype
    parameter: Tensor,  # the weight as it is stored: dw takes its dtype and strides
    conv: Conv,
    from_x: bool,  # the activation follows from x alone
    plan: Plan,  # unmasked: g_in stays as dgrad leaves it; compact: of the pixels read alone
    need_input: bool,
    need_weight: bool,
    memory_format: torch.memory_format,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """g_in [N, C, H, W], its sums [2, C], a Deferred residual's sums [2, C], and dw."""
    own, dw = need_weight and wgrad is not None, None
    if a is None and not (own and from_x):
        a = materialise(light, source)
    if own:
        assert wgrad is not None
        dw = wgrad(dy, source if a is None else Source.plain(a), parameter, conv)
    da = library_dw = None
    if need_input or not own:
        shape = source.x if a is None else a
        da, library_dw = convolution_backward(
            dy, shape, weight, conv, need_input, need_weight and not own, plan.compact
        )
    if library_dw is not None:
        dw = stored_as(library_dw, parameter)
    if da is None:
        return None, None, None, dw
    da = da.contiguous(memory_format=memory_format)
    if grad_a is not None and grad_a.shape != da.shape:
        da, grad_a = add_sampled(da, grad_a), None
    if source.mean is None:
        return (da if grad_a is None else da.add_(grad_a)), None, None, dw
    if plan.unmasked:
        sums = light.masked_sums(da, source.x, source.mean, source.scale, source.bias)
        return da, sums, None, dw
    mask = a if source.relu else None
    res_y = source.residual if source.res_mean is not None else None
    affine = (source.scale, source.bias) if from_x and source.relu else None
    g, sums, res_sums = light.bn_act_bwd(
        da, grad_a, mask, source.x, source.mean, res_y, source.res_mean, out=da, affine=affine
    )
    return g, sums, res_sums, dw


def add_sampled(da: Tensor, sampled: Tensor) -> Tensor:
    """da, where the gradient of every second row or column of its pixels joined."""
    steps = (1 if s == e else 2 for s, e in zip(sampled.shape[2:], da.shape[2:], strict=True))
    step_h, step_w = steps
    da[:, :, ::step_h, ::step_w].add_(sampled)
    return da


def spread(grad: Tensor, x: Tensor) -> Tensor:
    """A gradient of every second row or column of x's pixels, with zeros at the others."""
    full = torch.zeros_like(x)
    step_h, step_w = (1 if g == e else 2 for g, e in zip(grad.shape[2:], x.shape[2:], strict=True))
    full[:, :, ::step_h, ::step_w] = grad
    return full


def stored_as(dw: Tensor, parameter: Tensor) -> Tensor:
    """dw in the dtype and strides of its parameter, which autograd would copy it to else."""
    if dw.dtype == parameter.dtype and dw.stride() == parameter.stride():
        return dw
    return torch.empty_like(parameter).copy_(dw)
