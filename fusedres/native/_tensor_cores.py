"""conv_bn forward and its dgrad on a GPU's tensor cores (csrc/cuda/conv_bn_fwd.cu,
conv_bn_dgrad.cu): 1x1 convolutions of stride 1 in channels_last, fp16 or bf16.

Kernels read 16 bytes at a time: what lies elsewhere is copied first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedres._checks import check_dense, check_norm, described
from fusedres._conv import MOST_TILED, TILE, Conv, Source, Upstream, output_shape
from fusedres._plans import PRODUCTS
from fusedres._tensors import elements_per_channel
from fusedres.native import require
from fusedres.native._args import (
    check,
    head,
    like,
    numbered,
    on_cpu,
    pointers,
    vectors,
    workspace,
)
from fusedres.native._conv_args import check_source, filters_of
from fusedres.native.batch_norm import FROZEN, Forward, GradientVectors, Statistics, batch_norm_fwd
from fusedres.native.bn_act import bn_act_fwd

CHANNELS_LAST = torch.channels_last
_DTYPES = (torch.float16, torch.bfloat16)


def conv_bn_fwd(
    source: Source,  # x [N, C, H, W]
    weight: Tensor,  # [K, C, 1, 1] in x's dtype
    conv: Conv,
    emit: bool,
    bn_weight: Tensor | None,  # [K]
    bn_bias: Tensor | None,  # [K]
    running_mean: Tensor | None,  # [K], moved in place if training, else read
    running_var: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    product: str,
) -> tuple[Tensor, Statistics, Tensor | None, None]:
    """As conv_bn.conv_bn_fwd."""
    op = "conv_bn_fwd"
    stored, number = _check(op, source, weight, conv, product)
    x, *vectors_of, relu = _aligned_source(source)
    shape = output_shape(x.shape, weight.shape, conv)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=CHANNELS_LAST)
    norm = (bn_weight, bn_bias, running_mean, running_var)
    check_norm(op, y, *norm, training, momentum)
    a = like(x) if emit and source.mean is not None else None
    if x.numel() == 0:
        return y, batch_norm_fwd(y, *norm, training, momentum, eps), a, None
    c, args, filters = require(), head(x), weight.size(0)
    work = workspace(c.conv_bn_fwd_workspace(args, filters, training, number), x)
    f = Forward(y, *norm, momentum, eps, args) if training else None
    numbers, normed, results = FROZEN if f is None else (f.numbers, f.vectors, f.results)
    act = (relu, pointers(x, *vectors_of, a))
    own = (training, *numbers, normed, (y.data_ptr(), *results, work.data_ptr()))
    c.conv_bn_fwd(args, filters, *act, *own, numbered(stored), number)
    if f is None:
        return y, batch_norm_fwd(y, *norm, training, momentum, eps), a, None
    return y, f.settle(elements_per_channel(y)), a, None


def conv_bn_dgrad(
    source: Source,  # x [N, C, H, W]; not empty
    weight: Tensor,  # [K, C, 1, 1] in x's dtype
    conv: Conv,
    a: Tensor | None,  # like x: the activation, where a residual may have joined in it
    up: Upstream,  # its bias: g is still to be masked
    grad_a: Tensor | None,  # of the emitted activation: like x, or of every second row and column
    product: str,  # one of _plans.PRODUCTS
    need_dy: bool,
    weight_dtype: torch.dtype | None,  # of BatchNorm's dweight; None: there is none
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor | None, ...]:
    """g_in like x, its sums [2, C], a Deferred residual's sums [2, C], dy, dweight and dbias."""
    op = "conv_bn_bwd"
    stored, number = _check(op, source, weight, conv, product)
    x, y = source.x, up.y
    own = {"mean": up.mean, "scale": up.scale, "rstd": up.rstd, "sums": up.sums}
    check(op, y, {"g": up.g}, own | {"y_bias": up.bias}, memory_format=CHANNELS_LAST)
    if tuple(y.shape) != output_shape(x.shape, weight.shape, conv) or y.dtype != x.dtype:
        raise ValueError(f"{op}: y does not belong to x {list(x.shape)}, got {described(y)}")
    whole = isinstance(grad_a, Tensor) and grad_a.shape == x.shape
    check(op, x, {"a": a, "grad_a": grad_a if whole else None}, name="x")
    sampled, steps = (None, (1, 1)) if whole else _sampled(op, grad_a, x)
    if x.numel() == 0:
        raise ValueError(f"{op}: x is empty, {described(x)}")
    source, up = _aligned_source(source), up._replace(**_aligned_of(up))
    deferred, gated = source.mean is not None, source.mean is not None and source.relu
    if gated and a is None and source.residual is not None:
        a = bn_act_fwd(*source)  # type: ignore[arg-type]
    affine = gated and a is None  # what was emitted may hold a residual, which is not saved then
    g_in, dy = like(x), like(y) if need_dy else None
    found = GradientVectors(y, (weight_dtype, bias_dtype))
    sums = vectors(g_in, 2) if deferred else None
    res_sums = vectors(g_in, 2) if source.res_mean is not None else None
    read = (grad_a if whole else None, sampled, a if gated else None)
    joins, sampled, a = (_aligned(t) for t in read)
    act = pointers(
        g_in,
        joins,
        a,
        source.x if deferred else None,
        source.mean,
        source.scale if affine else None,
        source.bias if affine else None,
        source.residual if res_sums is not None else None,
        source.res_mean,
        g_in,
        sums,
        res_sums,
        None,
    )
    c, args, filters = require(), head(g_in), weight.size(0)
    work = workspace(c.conv_bn_dgrad_workspace(args, filters, act, number), g_in)
    upstream = pointers(up.g, up.y, up.mean, up.scale, up.rstd, up.sums, up.bias, dy, work)
    rest = (numbered(stored), act, *pointers(sampled), steps, number)
    c.conv_bn_dgrad(args, filters, up.training, upstream, found.vectors, *rest)
    return g_in, sums, res_sums, dy, *found.settle(up.sums, up.rstd)


def _check(op: str, source: Source, weight: Tensor, conv: Conv, product: str) -> tuple[Tensor, int]:
    """The weight, which lies in [K, C] without gaps, and the product's number."""
    if product not in PRODUCTS:
        raise ValueError(f"{op}: product: got {product!r}, accepted: {', '.join(PRODUCTS)}")
    check_source(op, source)
    x = source.x
    ranked = isinstance(weight, Tensor) and weight.dim() == 4
    alike = ranked and (weight.dtype, weight.device) == (x.dtype, x.device)
    served = (
        alike and weight.size(1) == x.size(1) and conv.has_tensor_core_kernel(weight.shape, product)
    )
    stored = x.dtype in _DTYPES and x.is_contiguous(memory_format=CHANNELS_LAST)
    if not served or not stored or on_cpu(head(x)):
        most = MOST_TILED[product]
        raise ValueError(
            f"{op}: {product} needs fp16 or bf16 in channels_last on a GPU, a 1x1 kernel, stride "
            f"1, no padding, channels and filters in multiples of {TILE} up to {most}, got x "
            f"{described(x)}, weight {described(weight)} and {conv}"
        )
    filters = filters_of(op, weight)
    return filters if filters.data_ptr() % 16 == 0 else filters.clone(), PRODUCTS.index(product)


def _sampled(op: str, grad_a: Tensor | None, x: Tensor) -> tuple[Tensor | None, tuple[int, int]]:
    """A gradient of every second row or column of x's pixels, and the steps between them."""
    if grad_a is None:
        return None, (1, 1)
    if not isinstance(grad_a, Tensor) or grad_a.dim() != 4:
        raise ValueError(
            f"{op}: grad_a does not belong to x {list(x.shape)}, got {described(grad_a)}"
        )
    height, width = x.shape[2:]
    steps = 1 + (grad_a.size(2) < height), 1 + (grad_a.size(3) < width)
    shape = (*x.shape[:2], -(-height // steps[0]), -(-width // steps[1]))
    check_dense(op, "grad_a", grad_a, shape, x, CHANNELS_LAST)
    return grad_a, steps


def _aligned_source(source: Source) -> Source:
    """Its tensors where kernels can read them."""
    return source._replace(**_aligned_of(source))


def _aligned_of(operands: Source | Upstream) -> dict[str, Any]:
    """What of them had to be copied."""
    tensors = {name: t for name, t in operands._asdict().items() if isinstance(t, Tensor)}
    return {name: _aligned(t) for name, t in tensors.items() if t.data_ptr() % 16}


def _aligned(t: Tensor | None) -> Tensor | None:
    """The tensor, or a copy at a multiple of 16 bytes."""
    if t is None or t.data_ptr() % 16 == 0:
        return t
    return t.clone()  # dense: of the same strides
