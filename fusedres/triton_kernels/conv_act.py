"""conv_act, of inference: one kernel a convolution, or with its reduction divided two; an image of
few channels is copied first, by one launch, from a camera's bytes too.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fusedres._checks import DTYPES, check_dense, described, out_of_reach
from fusedres._conv import STEM_CHANNELS, Conv, output_shape
from fusedres._tensors import stat_dtype
from fusedres.triton_kernels._args import DEVICE, acc, check, rows
from fusedres.triton_kernels._gemm import config_for, divided, empty, precision
from fusedres.triton_kernels._launch import launch, turn
from fusedres.triton_kernels._spatial import geometry, is_wide, krsc
from fusedres.triton_kernels._stem import filled_weight, sides_of, taps_of
from fusedres.triton_kernels.device.conv_act import (
    conv_act_image_kernel,
    conv_act_kernel,
    conv_act_sum_kernel,
)

_SUM = (512, 128, 8)  # elements of a tile, at most so many columns, and BS of the second stage
_LINE = 1024  # elements of an image's row to a program


def conv_act(
    x: Tensor,  # [N, C, H, W] in weight's dtype; or uint8 [N, H, W, C], C at most 4
    weight: Tensor,  # [K, C, R, S]
    conv: Conv,
    scale: Tensor | None,  # [K], as the next; None: ones
    bias: Tensor | None,  # None: zeros
    residual: Tensor | None,  # like y
    relu: bool,
    *,
    packed: Tensor | None = None,  # what `pack` made of the weight; None: made now
    normalize: tuple[Tensor, Tensor] | None = None,  # [C] each: of uint8, x*scale + shift
) -> Tensor:
    """y [N, K, OH, OW] = act(conv(x, weight)*scale + bias [+ residual]) in weight's dtype."""
    shape = _check(x, weight, conv, packed, normalize)
    y = torch.empty(
        shape, dtype=weight.dtype, device=weight.device, memory_format=torch.channels_last
    )
    vectors = {n: v for n, v in (("scale", scale), ("bias", bias)) if v is not None}
    check("conv_act", y, {"residual": residual}, vectors)
    if y.numel() == 0:
        return y
    of_image = reads_image(weight, conv)
    if packed is None:
        packed = pack(weight, conv)
    if of_image:
        x, conv = image(x, weight, conv, normalize), conv._replace(padding=(0, 0, 0, 0))
    outs, m = weight.size(0), rows(y)
    config = config_for(
        "act_stem" if of_image else "act", weight, weight, conv, m, int(residual is not None)
    )  # fmt: skip
    if of_image:
        (height, width), row_stride = x.shape[1:3], x.stride(1)
        depth = 4 * taps_of(weight.size(3))
        block, even = min(depth, 64), depth == 4 * weight.size(3)
        steps = weight.size(2) * (depth // block)
    else:
        depth, (height, width), block = weight.size(1), x.shape[2:], config.BK
        row_stride, even = depth * width, depth % block == 0
        steps = weight.size(2) * weight.size(3) * triton.cdiv(depth, block)
    tiles = triton.cdiv(outs, config.BN) * triton.cdiv(m, config.BM)
    each, splits = divided(steps, tiles, config, x.device)
    part = None if splits == 1 else empty(y, splits, m, outs)
    last, none = (scale, bias, residual), (None, None, None)
    launch(
        conv_act_kernel,
        (tiles, splits),
        x, packed, *(last if part is None else none), y if part is None else part,
        m, depth, outs, height, width, row_stride, y.size(2), y.size(3), each, turn(),
        *geometry(weight, conv), of_image, any(conv.padding), relu and part is None,
        part is not None, is_wide(x.shape[1:].numel(), y, config), precision(y.dtype),
        acc(y.dtype), even, config.BM, config.BN, block,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    if part is not None:
        elements, most, at_once = _SUM
        columns = min(most, triton.next_power_of_2(outs))
        tile = (elements // columns, columns)
        launch(
            conv_act_sum_kernel,
            (triton.cdiv(m, tile[0]) * triton.cdiv(outs, columns),),
            part, *last, y, m, outs, splits, relu, acc(y.dtype), *tile, at_once,
        )  # fmt: skip
    return y


def reads_image(weight: Tensor, conv: Conv) -> bool:
    """Whether the kernel reads a copy of x with 4 channels."""
    return conv.has_stem_kernel(weight.size(1))


def pack(weight: Tensor, conv: Conv) -> Tensor:
    """The weight [K, C, R, S] as the kernel reads it: channels_last, which may be itself, or filled
    up to [K, R, SP, 4].
    """
    if reads_image(weight, conv):
        return filled_weight(weight, taps_of(weight.size(3)))
    return krsc(weight)


def image(
    x: Tensor,  # [N, C, H, W] channels_last in weight's dtype; or uint8 [N, H, W, C]
    weight: Tensor,  # [K, C, R, S]
    conv: Conv,
    normalize: tuple[Tensor, Tensor] | None,  # [C] each: x*scale + shift
) -> Tensor:
    """The copy [N, HP, WP, 4] that the kernel reads, zeros in its padding and past C."""
    n, channels, height, width = _shape(x)
    out = output_shape((n, channels, height, width), weight.shape, conv)
    high, wide = sides_of((height, width), weight, conv, out[3])
    copy = torch.empty(n, high, wide, 4, dtype=weight.dtype, device=x.device)
    block = min(_LINE, triton.next_power_of_2(4 * wide))
    launch(
        conv_act_image_kernel,
        (n * high, triton.cdiv(4 * wide, block)),
        x, *(normalize or (None, None)), copy, height, width, high, 4 * wide,
        conv.padding[0], conv.padding[2], channels, acc(weight.dtype), block,
    )  # fmt: skip
    return copy


def _shape(x: Tensor) -> tuple[int, int, int, int]:
    """(N, C, H, W)"""
    if x.dtype == torch.uint8:
        return x.size(0), x.size(3), x.size(1), x.size(2)
    return x.size(0), x.size(1), x.size(2), x.size(3)


def _check(
    x: Tensor,
    weight: Tensor,
    conv: Conv,
    packed: Tensor | None,
    normalize: tuple[Tensor, Tensor] | None,
) -> tuple[int, int, int, int]:
    """The shape of y."""
    op = "conv_act"
    if not isinstance(weight, Tensor) or weight.layout != torch.strided or weight.dim() != 4:
        raise ValueError(f"{op}: weight must be [K, C, R, S], got {described(weight)}")
    if not conv.has_fused_kernel((weight.size(2), weight.size(3))):
        raise ValueError(f"{op}: no kernel for weight {list(weight.shape)} and {conv}")
    dtypes: tuple[torch.dtype, ...] = DTYPES
    if isinstance(x, Tensor) and x.dtype == torch.uint8:
        _check_frames(op, x, weight, conv)
    else:
        check(op, x, name="x")
        dtypes = (x.dtype,)
    shape = _shape(x)
    alike = weight.dtype in dtypes and weight.device == x.device and weight.size(1) == shape[1]
    if not alike or weight.is_neg() or out_of_reach(weight):
        kinds = " or ".join(map(str, dtypes))
        raise ValueError(
            f"{op}: weight must be {kinds} [K, {shape[1]}, R, S] on {x.device}, got "
            f"{described(weight)}"
        )
    if min(conv.stride) < 1 or min(output_shape(shape, weight.shape, conv)[2:]) < 1:
        raise ValueError(
            f"{op}: kernel {list(weight.shape[2:])} does not fit x {list(x.shape)} with {conv}"
        )
    if normalize is not None:
        _check_normalize(op, x, weight, normalize)
    if packed is not None:
        _check_packed(op, packed, weight, conv)
    return output_shape(shape, weight.shape, conv)


def _check_frames(op: str, x: Tensor, weight: Tensor, conv: Conv) -> None:
    if not reads_image(weight, conv):
        raise ValueError(
            f"{op}: uint8 x needs a convolution of at most {STEM_CHANNELS} channels, without "
            f"dilation, got weight {list(weight.shape)} and {conv}"
        )
    dense = x.layout == torch.strided and x.dim() == 4 and x.is_contiguous()
    if not dense or x.device.type != DEVICE or out_of_reach(x):
        raise ValueError(
            f"{op}: uint8 x must be contiguous [N, H, W, C] on {DEVICE}, got {described(x)}"
        )


def _check_normalize(op: str, x: Tensor, weight: Tensor, normalize: tuple[Tensor, Tensor]) -> None:
    types, shape = (torch.float32, stat_dtype(weight.dtype)), (weight.size(1),)
    fit = (
        isinstance(v, Tensor)
        and v.layout == torch.strided
        and (v.shape, v.device) == (shape, x.device)
        and v.dtype in types
        and v.is_contiguous()
        and not (v.is_neg() or out_of_reach(v))
        for v in normalize
    )
    if x.dtype != torch.uint8 or len(normalize) != 2 or not all(fit):
        raise ValueError(
            f"{op}: normalize is of uint8 x, and two of {types[0]} {list(shape)} on {x.device}, "
            f"got {', '.join(map(described, normalize))} and x {x.dtype}"
        )


def _check_packed(op: str, packed: Tensor, weight: Tensor, conv: Conv) -> None:
    shape, order = tuple(weight.shape), torch.channels_last
    if reads_image(weight, conv):
        shape = (shape[0], shape[2], taps_of(shape[3]), 4)
        order = torch.contiguous_format
    check_dense(op, "packed", packed, shape, weight, order)
