"""conv_act by the library: oneDNN's or cuDNN's convolution with bias, residual add and ReLU in its
epilogue, where there is one, else its convolution and passes in place behind it.

Neither library scales in the epilogue: a scale goes into the weight. Weights can be packed once,
for maps of one size: oneDNN's own order of them depends on it, and on whether a batch is one image.

Bytes where fused: reads x, the weight and the residual, writes y.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedres._conv import Conv, output_shape
from fusedres._tensors import per_channel, stat_dtype, stored_format
from fusedres.library.conv_bn import pad

aten, mkldnn = torch.ops.aten, torch.ops.mkldnn


class Packed(NamedTuple):
    """A convolution ready to run, on inputs of one shape (packed: of one height and width, and all
    batch sizes above one alike).
    """

    weight: Tensor  # [K, C / groups, R, S] with the scale in it; as oneDNN wants it if packed
    bias: Tensor | None  # [K] in the weight's dtype
    conv: Conv
    fused: str  # whose epilogue: "onednn", "cudnn", or "" for passes behind the convolution
    finite: bool = True  # no weight of an oneDNN's is infinite or NaN; of others nobody asks


def conv_act(
    x: Tensor,  # [N, C, H, W], dense
    weight: Tensor,  # [K, C / groups, R, S] in x's dtype
    conv: Conv,
    scale: Tensor | None,  # [K]
    bias: Tensor | None,  # [K]
    residual: Tensor | None,  # like the result
    relu: bool,
) -> Tensor:
    """[N, K, OH, OW] in x's dtype and memory format."""
    one = pack(x, weight, conv, scale, bias, reorder=False)
    if relu and one.fused == "onednn" and not finite(x, residual):
        one = one._replace(fused="")  # as where the weight is not finite
    return run(x, one, residual, relu)


def pack(
    x: Tensor,  # [N, C, H, W]: its shape, dtype and device
    weight: Tensor,
    conv: Conv,
    scale: Tensor | None,
    bias: Tensor | None,
    reorder: bool = True,  # the weight for oneDNN, which does it in every call else
) -> Packed:
    """The scale in the weight, rounded once more in half types, and the weight as it is wanted."""
    wide = stat_dtype(x.dtype)
    if scale is not None:
        folded = weight.to(wide) * scale.to(wide).view(-1, 1, 1, 1)
        weight = folded.to(x.dtype)
    if bias is not None:
        bias = _dense(bias.to(x.dtype))
    fused = _fused_by(x, conv)
    if fused == "onednn":
        weight = _dense(weight)
    clean = fused != "onednn" or finite(weight, bias)
    if not clean:
        fused = ""  # oneDNN's ReLU makes zero of NaN
    if fused == "onednn" and reorder and x.numel() > 0:
        one, padding, stride = pad(x[:1], weight, conv)
        geometry = (list(padding), list(stride), list(conv.dilation), conv.groups)
        shape = [min(x.size(0), 2), *one.shape[1:]]
        dense = weight.contiguous().to_mkldnn()
        weight = aten.mkldnn_reorder_conv2d_weight(dense, *geometry, shape)
    elif x.device.type != "cpu":
        weight = weight.contiguous(memory_format=torch.channels_last)
    return Packed(weight, bias, conv, fused, clean)


Run = Callable[[Tensor, Tensor | None], Tensor]  # of x and the residual


def run(
    x: Tensor,
    packed: Packed,
    residual: Tensor | None,
    relu: bool,
    into: bool = False,  # the result may take the residual's memory
) -> Tensor:
    """act(conv(x) + bias [+ residual])."""
    return bound(x, packed, residual is not None, relu, into)(x, residual)


def bound(x: Tensor, packed: Packed, joined: bool, relu: bool, into: bool = False) -> Run:
    """`run` for inputs of x's height, width and memory format, with all that depends on them done;
    for batches of at least one image.
    """
    weight, bias, conv, fused, _ = packed
    if x.size(0) == 0:
        return lambda x, _: x.new_empty(output_shape(x.shape, weight.shape, conv)).to(
            memory_format=stored_format(x)
        )
    fitted, padding, stride = pad(x, weight, conv)
    geometry = (list(padding), list(stride), list(conv.dilation), conv.groups)
    if fused == "onednn":
        inner = _onednn(fitted, weight, bias, geometry, joined, relu, into)
    elif fused == "cudnn" and relu:
        inner = _cudnn(weight, bias, geometry, joined)
    else:
        inner = partial(_in_passes, weight, bias, geometry, relu)
    if fitted is x:
        return inner
    return lambda x, residual: inner(pad(x, weight, conv)[0], residual)


def _dense(t: Tensor) -> Tensor:
    """Without strides of its own and a sign to come, which oneDNN does not see."""
    if t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last):
        return t.resolve_neg()
    return t.contiguous().resolve_neg()


def finite(*tensors: Tensor | None) -> bool:
    """Whether no element is infinite or NaN, found by sums (which overflow at worst: False)."""
    sums = (t.sum(dtype=stat_dtype(t.dtype)) for t in tensors if t is not None)
    return all(s.isfinite().item() for s in sums)


@cache
def _onednn_serves(dtype: torch.dtype) -> bool:
    """Whether oneDNN has the epilogue, and is fast, in a dtype on this CPU."""
    there = hasattr(aten, "mkldnn_reorder_conv2d_weight")
    if not (torch.backends.mkldnn.is_available() and there):
        return False
    try:
        known = "binary" in mkldnn._convolution_pointwise_.overloads()
        half = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
        if half is None:
            return known and dtype == torch.float32
        return known and bool(getattr(mkldnn, f"_is_mkldnn_{half}_supported")())
    except AttributeError:  # of a torch built without it
        return False


def _fused_by(x: Tensor, conv: Conv) -> str:
    """Who has an epilogue for such an input."""
    if x.device.type == "cpu":
        return "onednn" if torch.backends.mkldnn.enabled and _onednn_serves(x.dtype) else ""
    return "cudnn" if cudnn_serves(x, conv) else ""


def cudnn_serves(x: Tensor, conv: Conv) -> bool:
    """Whether cuDNN's convolution has the epilogue for such an input."""
    on_cuda = x.device.type == "cuda" and torch.version.hip is None
    cudnn = torch.backends.cudnn
    there = on_cuda and cudnn.enabled and cudnn.is_available()
    return there and x.dtype != torch.float64 and conv.even_padding()


def _onednn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: tuple[Any, ...],
    joined: bool,
    relu: bool,
    into: bool,
) -> Run:
    plain = partial(mkldnn._convolution_pointwise.default, scalars=[], algorithm="")
    name, arguments = "relu" if relu else "none", (weight, bias, *geometry)
    if not joined:
        return lambda x, _: plain(x, *arguments, name)
    out = output_shape(x.shape, weight.shape, _conv_of(geometry))
    if not (_is_map(x.shape) and _is_map(out)):

        def behind(x: Tensor, residual: Tensor | None) -> Tensor:
            assert residual is not None
            y: Tensor = plain(x, *arguments, "none").add_(residual)
            return y.relu_() if relu else y

        return behind
    binary, last = mkldnn._convolution_pointwise_.binary, "relu" if relu else None
    channels_last = stored_format(x) is torch.channels_last

    def join(x: Tensor, residual: Tensor | None) -> Tensor:
        assert residual is not None
        if not channels_last:  # in which alone it joins a residual
            x, residual = (t.contiguous(memory_format=torch.channels_last) for t in (x, residual))
            y = binary(residual, x, *arguments, "add", 1.0, last, [], None)
            return y.contiguous()
        # in place alone it reads the residual within the convolution
        y = residual if into else residual.clone(memory_format=torch.preserve_format)
        return binary(y, x, *arguments, "add", 1.0, last, [], None)

    return join


def _conv_of(geometry: tuple[Any, ...]) -> Conv:
    (top, left), stride, dilation, groups = geometry
    return Conv(tuple(stride), (top, top, left, left), tuple(dilation), groups)


def _is_map(shape: tuple[int, ...]) -> bool:
    """Whether strides tell channels_last from NCHW: else torch does not fuse the residual."""
    return shape[1] > 1 and shape[2] * shape[3] > 1


def _cudnn(weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...], joined: bool) -> Run:
    padding, stride, dilation, groups = geometry
    options = (stride, padding, dilation, groups)
    if not joined:
        return lambda x, _: aten.cudnn_convolution_relu(x, weight, bias, *options)
    return lambda x, residual: aten.cudnn_convolution_add_relu(
        x, weight, residual, 1.0, bias, *options
    )


def _in_passes(
    weight: Tensor,
    bias: Tensor | None,
    geometry: tuple[Any, ...],
    relu: bool,
    x: Tensor,
    residual: Tensor | None,
) -> Tensor:
    padding, stride, dilation, groups = geometry
    y: Tensor = aten.convolution(x, weight, None, stride, padding, dilation, False, [0, 0], groups)
    y = y.contiguous(memory_format=stored_format(x))
    wide = y.to(stat_dtype(x.dtype))  # in half types rounded once behind it all
    wide = wide if bias is None else wide.add_(per_channel(bias))
    wide = wide if residual is None else wide.add_(residual)
    return (wide.relu_() if relu else wide).to(x.dtype)
