"""conv_bn's fused plan for 1x1 convolutions (kernels in device/conv_bn_*.py).

Forward launches one GEMM and one second stage; backward dgrad, wgrad and one second stage. Beside
the results nothing the size of an activation is allocated but dy, which dgrad hands to wgrad.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fusedres._checks import described
from fusedres._conv import Conv, Source, output_shape
from fusedres._plan_table import Shape, device_name
from fusedres._tensors import INTERPRETED, conv_allows_tf32, stat_dtype
from fusedres.triton_kernels._args import acc, check, like, rows, vectors
from fusedres.triton_kernels._configs import HIP, MOST_PARTIALS, Config, arch_of, config_of
from fusedres.triton_kernels._launch import launch, multiprocessors
from fusedres.triton_kernels.batch_norm import (
    batch_norm_bwd,
    batch_norm_fwd,
    finish_statistics,
)
from fusedres.triton_kernels.device.conv_bn_dgrad import conv_bn_dgrad_kernel
from fusedres.triton_kernels.device.conv_bn_finish import conv_bn_finish_kernel
from fusedres.triton_kernels.device.conv_bn_fwd import conv_bn_fwd_kernel
from fusedres.triton_kernels.device.conv_bn_wgrad import conv_bn_wgrad_kernel

_FINISH = (32, 16, 512)  # BR, BC, BW of the second stage


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
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
    """y [N, K, OH, OW]; mean, biased var, rstd, scale and bias [K] each; the activation if emit."""
    op = "conv_bn_fwd"
    _check(op, source, weight, conv)
    x, out = source.x, output_shape(source.x.shape, weight.shape, conv)
    if emit and (source.mean is None or conv.stride != (1, 1)):
        raise ValueError(f"{op}: emit needs a Deferred and stride 1, got stride {conv.stride}")
    weight = weight.contiguous()
    y = torch.empty(out, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    a = like(x) if emit else None
    channels, m = x.size(1), rows(y)
    residual = _residual_kind(source)
    config = _config("fwd", x, weight, conv, m, residual)
    tiles, chunks = _chunks(m, config, x.device)
    part = vectors(y, chunks, 2) if training and m > 0 else None
    launch(
        conv_bn_fwd_kernel,
        (triton.cdiv(out[1], config.BN) * chunks,),
        x, source.mean, source.scale, source.bias, source.residual, source.res_mean,
        source.res_scale, source.res_bias, weight, y, a, part,
        m, channels, out[1], x.size(2), x.size(3), out[2], out[3], tiles,
        *conv.stride, source.mean is not None, residual, source.relu, emit, part is not None,
        tiles > 1, _precision(x.dtype), acc(x.dtype), channels % config.BK == 0,
        config.BM, config.BN, config.BK,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    norm = (bn_weight, bn_bias, running_mean, running_var)
    if part is None:
        return y, batch_norm_fwd(y, *norm, training, momentum, eps), a
    statistics = finish_statistics(part, tiles * config.BM, y, *norm, momentum, eps)
    return y, statistics, a


def conv_bn_bwd(
    source: Source,  # x [N, C, H, W]
    weight: Tensor,  # [K, C, 1, 1] in x's dtype
    parameter: Tensor,  # the weight as it is stored: dw takes its dtype and strides
    conv: Conv,
    a: Tensor | None,  # like x: the activation, if it was emitted
    g: Tensor,  # [N, K, OH, OW]
    sums: Tensor,  # [2, K]: sum g, sum g*(y - mean)
    grad_a: Tensor | None,  # like x: the gradient of the emitted activation
    y: Tensor,  # like g
    mean: Tensor,  # [K]
    scale: Tensor,  # [K]
    rstd: Tensor,  # [K]
    training: bool,
    need_input: bool,
    need_weight: bool,
    weight_dtype: torch.dtype | None,  # of BatchNorm's dweight; None: there is none
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor | None, ...]:
    """g_in like x, its sums [2, C], a Deferred residual's sums [2, C], dw, dweight and dbias."""
    op = "conv_bn_bwd"
    _check(op, source, weight, conv)
    x, channels, outs = source.x, source.x.size(1), weight.size(0)
    check(op, x, {"a": a, "grad_a": grad_a}, name="x")
    check(op, y, {"g": g}, {"y_mean": mean, "y_scale": scale, "y_rstd": rstd, "sums": sums})
    if tuple(y.shape) != output_shape(x.shape, weight.shape, conv) or y.dtype != x.dtype:
        raise ValueError(f"{op}: y does not belong to x {list(x.shape)}, got {described(y)}")
    weight = weight.contiguous()
    geometry = (rows(y), channels, outs, x.size(2), x.size(3), y.size(2), y.size(3))
    common = (_precision(x.dtype), acc(x.dtype))
    norm, kind = source.mean is not None, _residual_kind(source)

    def empty(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or stat_dtype(x.dtype), device=x.device)

    dy = g_in = part = in_sums = res_sums = dw_part = dw = None
    chunks = splits = 0
    if need_input:
        dy = like(y) if need_weight else None
        g_in = like(x)
        mask = 0 if not (norm and source.relu) else 2 if a is None else 1
        config = _config("dgrad", x, weight, conv, rows(y), kind)
        tiles, chunks = _chunks(rows(y), config, x.device)
        if norm:
            in_sums, res_sums = empty(2, channels), empty(2, channels) if kind == 2 else None
            part = empty(chunks, 3 if kind == 2 else 2, channels)
        launch(
            conv_bn_dgrad_kernel,
            (triton.cdiv(channels, config.BN) * chunks,),
            g, y if training else None, mean, scale, rstd, sums, weight, grad_a, a,
            x if norm else None, source.mean, source.scale,
            source.bias, source.residual, source.res_mean, source.res_scale, source.res_bias,
            g_in, dy, part, *geometry, tiles, *conv.stride,
            training, need_weight, grad_a is not None, norm, mask, kind, tiles > 1, *common,
            outs % config.BK == 0, config.BM, config.BN, config.BK,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )  # fmt: skip
    elif need_weight:
        dy, *_ = batch_norm_bwd(g, y, mean, scale, rstd, sums, training, None, None)
    if need_weight:
        left = source if a is None else Source(a, *(None,) * 7, False)
        kind_a = 0 if a is not None else kind
        config = _config("wgrad", x, weight, conv, rows(y), kind_a)
        tiles, splits = _splits(rows(y), channels, outs, config, x.device)
        dw_part, dw = empty(splits, outs, channels), torch.empty_like(parameter)
        launch(
            conv_bn_wgrad_kernel,
            (triton.cdiv(outs, config.BK), triton.cdiv(channels, config.BN), splits),
            left.x, left.mean, left.scale, left.bias, left.residual, left.res_mean, left.res_scale,
            left.res_bias, dy, dw_part, *geometry, tiles, *conv.stride,
            left.mean is not None, kind_a, left.relu, *common, config.BM, config.BN, config.BK,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )  # fmt: skip
    dweight = None if weight_dtype is None else empty(outs, dtype=weight_dtype)
    dbias = None if bias_dtype is None else empty(outs, dtype=bias_dtype)
    br, bc, bw = _FINISH
    sums_programs = triton.cdiv(channels, bc) if in_sums is not None else 0
    dw_programs = triton.cdiv(outs * channels, bw) if need_weight else 0
    own_programs = triton.cdiv(outs, bw) if dweight is not None or dbias is not None else 0
    launch(
        conv_bn_finish_kernel,
        (sums_programs + dw_programs + own_programs,),
        part, in_sums, res_sums, dw_part, dw, sums, rstd, dweight, dbias,
        chunks, splits, channels, outs, *((0, 0) if dw is None else dw.stride()[:2]),
        sums_programs, dw_programs,
        norm and need_input, kind, need_weight, dweight is not None, dbias is not None,
        acc(x.dtype), br, bc, bw,
    )  # fmt: skip
    return g_in, in_sums, res_sums, dw, dweight, dbias


def _check(op: str, source: Source, weight: Tensor, conv: Conv) -> None:
    x, _, _, _, residual, *_ = source
    own = {"mean": source.mean, "scale": source.scale, "bias": source.bias}
    joined = {n: getattr(source, n) for n in ("res_mean", "res_scale", "res_bias")}
    given = {n: v for n, v in own.items() if v is not None}  # of a Tensor there are none
    check(op, x, {"residual": residual}, given | joined, name="x")
    if len({v is None for v in own.values()}) > 1 or (source.mean is None and residual is not None):
        raise ValueError(f"{op}: mean, scale and bias come together, a residual only with them")
    if len({v is None for v in joined.values()}) > 1:
        raise ValueError(f"{op}: res_mean, res_scale and res_bias come together")
    if weight.dim() != 4 or not conv.has_fused_kernel((weight.size(2), weight.size(3))):
        raise ValueError(f"{op}: no fused plan for weight {list(weight.shape)} and {conv}")
    alike = (weight.dtype, weight.device) == (x.dtype, x.device)
    if not alike or weight.size(1) != x.size(1):
        raise ValueError(
            f"{op}: weight must be {x.dtype} [K, {x.size(1)}, 1, 1] on {x.device}, got "
            f"{described(weight)}"
        )


def _residual_kind(source: Source) -> int:
    """0 none, 1 a tensor, 2 one that is normalised too."""
    return 2 if source.res_mean is not None else int(source.residual is not None)


def _config(kernel: str, x: Tensor, weight: Tensor, conv: Conv, m: int, residual: int) -> Config:
    shape = Shape(x.size(1), weight.size(0), (1, 1), conv.stride, m)
    return config_of(kernel, device_name(x.device), x.dtype, shape, residual, arch_of(x.device))


def _chunks(m: int, config: Config, device: torch.device) -> tuple[int, int]:
    """Tiles of rows in a chunk, and chunks.

    On HIP a tile each: its barrier orders local memory alone, and a program's tiles meet in global
    memory.
    """
    tiles = max(1, triton.cdiv(triton.cdiv(m, config.BM), MOST_PARTIALS))
    if arch_of(device) == HIP:
        tiles = 1
    return tiles, triton.cdiv(m, tiles * config.BM)


def _splits(
    m: int, channels: int, outs: int, config: Config, device: torch.device
) -> tuple[int, int]:
    """Tiles of rows in a split of wgrad, and splits: enough programs to fill the device twice."""
    programs = triton.cdiv(channels, config.BN) * triton.cdiv(outs, config.BK)
    wanted = max(1, 2 * multiprocessors(device) // programs)
    tiles = max(1, triton.cdiv(triton.cdiv(m, config.BM), wanted))
    return tiles, triton.cdiv(m, tiles * config.BM)


def _precision(dtype: torch.dtype) -> str:
    """How fp32 products run: as torch's convolutions do."""
    wide = dtype != torch.float32 or INTERPRETED or not conv_allows_tf32()
    return "ieee" if wide else "tf32"
