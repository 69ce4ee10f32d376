"""Launches of conv_bn's dgrad kernel for k x k convolutions (device/conv_bn_spatial_dgrad.py)."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from fusedres._conv import Conv, Source, Upstream
from fusedres.triton_kernels._args import acc, like, rows
from fusedres.triton_kernels._gemm import (
    Dgrad,
    chunks,
    config_for,
    empty,
    precision,
    residual_kind,
)
from fusedres.triton_kernels._launch import launch
from fusedres.triton_kernels.batch_norm import batch_norm_bwd
from fusedres.triton_kernels.device.conv_bn_spatial_dgrad import conv_bn_spatial_dgrad_kernel


def dgrad(
    up: Upstream,
    source: Source,  # x [N, C, H, W]
    a: Tensor | None,  # like x: the activation, if it was emitted
    grad_a: Tensor | None,  # like x: the gradient of the emitted activation
    weight: Tensor,  # [K, C, R, S], dense
    conv: Conv,
    need_dy: bool,
    dy: Tensor | None = None,  # like y, where it is there already
) -> Dgrad:
    """g_in, its partial sums, and dy. Where dy is wanted but no tap meets every output, a light
    pass writes it first.
    """
    x, y, channels, outs = source.x, up.y, source.x.size(1), weight.size(0)
    norm, kind = source.mean is not None, residual_kind(source)
    mask = 0 if not (norm and source.relu) else 2 if a is None else 1
    weight = weight.contiguous(memory_format=torch.channels_last)
    place = _tap_of_every_output(x, y, weight, conv) if need_dy else (0, 0, 0)
    if dy is None and place is None:
        dy = dy_of(up)
    prologue = dy is None
    stores = prologue and need_dy
    g = up.g if dy is None else dy
    if stores:
        dy = like(y)
    config = config_for("dgrad", x, weight, conv, rows(y), kind)
    classes, most = conv.stride[0] * conv.stride[1], _pixels_of_a_class(x, conv)
    tiles, _ = chunks(classes * most, config, x.device)
    parts = classes * triton.cdiv(most, tiles * config.BM)
    g_in = like(x)
    part = empty(x, parts, 3 if kind == 2 else 2, channels) if norm else None
    gmask = prologue and up.bias is not None
    bn = (up.mean, up.scale, up.rstd, up.bias, up.sums) if prologue else (None,) * 5
    launch(
        conv_bn_spatial_dgrad_kernel,
        (triton.cdiv(channels, config.BN) * parts,),
        g, y if prologue and (up.training or gmask) else None, *bn, weight, grad_a, a,
        x if norm else None, source.mean, source.scale,
        source.bias, source.residual, source.res_mean, source.res_scale, source.res_bias,
        g_in, dy if stores else None, part, x.size(0), rows(y), channels, outs,
        *x.shape[2:], *y.shape[2:], *weight.shape[2:], conv.padding[0], conv.padding[2], tiles,
        *(place or (0, 0, 0)),
        *conv.stride, *conv.dilation, *_tap_steps(conv), prologue, gmask, up.training, stores,
        grad_a is not None, norm, mask, kind, tiles > 1, precision(x.dtype), acc(x.dtype),
        outs % config.BK == 0, config.BM, config.BN, config.BK,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    return Dgrad(g_in, part, dy if need_dy else None)


def dy_of(up: Upstream) -> Tensor:
    """dy, by the light pass."""
    own = (up.g, up.y, up.mean, up.scale, up.rstd, up.sums, up.training, None, None)
    return batch_norm_bwd(*own, mask_bias=up.bias)[0]


def _tap_steps(conv: Conv) -> tuple[int, int]:
    """Every how manieth tap meets a class of pixels, along H and W."""
    steps = (s // math.gcd(s, d) for s, d in zip(conv.stride, conv.dilation, strict=True))
    return next(steps), next(steps)


def _pixels_of_a_class(x: Tensor, conv: Conv) -> int:
    """Of the largest class, in all images."""
    return (
        x.size(0) * triton.cdiv(x.size(2), conv.stride[0]) * triton.cdiv(x.size(3), conv.stride[1])
    )


def _tap_of_every_output(
    x: Tensor, y: Tensor, weight: Tensor, conv: Conv
) -> tuple[int, int, int] | None:
    """A tap under which every output meets a pixel: its class, and which of the class's taps it is
    along H and W; None where each of them sees padding.
    """
    found = []
    for axis in range(2):
        before, stride = conv.padding[2 * axis], conv.stride[axis]
        last = (y.size(2 + axis) - 1) * stride
        for tap in range(weight.size(2 + axis)):
            pixel = tap * conv.dilation[axis] - before  # of output 0
            if pixel >= 0 and last + pixel < x.size(2 + axis):
                found.append(tap)
                break
        else:
            return None
    (r, s), (step_h, step_w) = found, _tap_steps(conv)
    return r % step_h * conv.stride[1] + s % step_w, r // step_h, s // step_w
