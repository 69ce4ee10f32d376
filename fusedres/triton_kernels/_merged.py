"""Launches of the kernel that gives a 1x1 convolution's dgrad and wgrad in one pass
(device/conv_bn_bwd.py), and which convolutions it is for.

By arithmetic, not by timing: ResNet-50 at batch 256 in a half type on an H200 (132 multiprocessors,
4.3 TB/s, 790 TFLOP/s). `pace` is what a program's tiles of rows keep an SM's four schedulers busy,
as a share of the time in which memory delivers them: instructions of the loop, as compiled for
sm_90, times warps / 4, at 1.75 GHz.

    C, K      input (with the emitted a's gradient)   elements a row   ms from memory   pace
                                                        two    one      two    one
    64, 64    Tensor, grad_a                            448    320     0.17   0.12      0.33
    64, 256   Tensor                                   1152    640     0.43   0.24      0.48
    64, 256   Deferred                                 1216    640     0.45   0.24      0.65
    256, 64   join, a, grad_a                          1536   1152     0.57   0.43      0.54
    256, 64   the same, normalised residual            1792   1408     0.67   0.53      0.58
    256, 128  join, a, grad_a                          1792   1280     0.67   0.48      0.56
    512, 128  join, a, grad_a                          3072   2304     0.29   0.22      0.63
    512, 128  the same, normalised residual            3584   2816     0.34   0.26      0.63

The products take 0.02 to 0.13 ms of that on the tensor cores. A latency of 0.7 us wants 23 KB in
flight on an SM; a tile of what the products read is on its way while another is worked on, which is
24 KB where K is 128 (36 to 48 KB elsewhere, 24 with a normalised residual). x, grad_a and the
residual of a join are not in the pipeline: they are asked for at the head of a step. 128, 512 would
save as much as 64, 256, but spills.
"""

from __future__ import annotations

import triton
from torch import Tensor

from fusedres._conv import Conv, Source, Upstream
from fusedres.triton_kernels import _gemm
from fusedres.triton_kernels._args import acc, like, rows
from fusedres.triton_kernels._gemm import (
    Dgrad,
    config_for,
    empty,
    precision,
    residual_kind,
    splits,
)
from fusedres.triton_kernels._launch import launch
from fusedres.triton_kernels.device.conv_bn_bwd import conv_bn_bwd_kernel

# K: the most C. More tiles of C read g and y more often from L2 than the saving is worth; with more
# of K, dw^T of 64 columns of C leaves the operands of neither product a register.
MOST_CHANNELS = {64: 512, 128: 512, 256: 64}


def serves(
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [K, C, R, S]
    conv: Conv,
    source: Source,
) -> bool:
    """Whether `bwd` has a configuration for it, and less to move than dgrad and wgrad apart.

    A half type on a GPU whose tensor cores read both operands from shared memory: others spill. In
    the interpreter, where there is no speed, all that the kernel computes.
    """
    outs, channels = weight.size(0), x.size(1)
    if not conv.is_pointwise((weight.size(2), weight.size(3))) or conv.stride != (1, 1):
        return False
    if _gemm.INTERPRETED:
        return outs <= max(MOST_CHANNELS)
    reads_shared = 90 <= _gemm.arch_of(x.device) < 120
    fits = channels % 64 == 0 and channels <= MOST_CHANNELS.get(outs, 0)
    return x.dtype.itemsize == 2 and reads_shared and fits


def bwd(
    up: Upstream,
    source: Source,  # x [N, C, H, W]
    a: Tensor | None,  # like x: the activation, if it was emitted
    grad_a: Tensor | None,  # like x: the gradient of the emitted activation
    weight: Tensor,  # [K, C, 1, 1], contiguous
    conv: Conv,  # of stride 1
) -> tuple[Dgrad, Tensor]:
    """g_in and its partial sums, without dy, and partial dw [splits, K, C]."""
    x, y, channels, outs = source.x, up.y, source.x.size(1), weight.size(0)
    m, norm, gmask = rows(y), source.mean is not None, up.bias is not None
    act = 1 if a is not None else 2 if norm else 0
    kind = residual_kind(source)
    config = config_for("bwd", x, weight, conv, m, kind)
    across = triton.cdiv(channels, config.BN)
    # 8 warps of what registers a thread may have fill a multiprocessor
    tiles, parts = splits(m, config, across, x.device, max(1, 8 // config.num_warps))
    depth = max(16, triton.next_power_of_2(outs))
    g_in = like(x)
    part = empty(x, parts, 3 if kind == 2 else 2, channels) if norm else None
    dw_part = empty(x, parts, outs, channels)
    joins = kind if act == 2 or kind == 2 else 0  # emitted, only its sums want the residual
    launch(
        conv_bn_bwd_kernel,
        (across * parts,),
        up.g, y if up.training or gmask else None, up.mean, up.scale, up.rstd, up.bias, up.sums,
        weight, grad_a, a, x if norm or act == 0 else None, source.mean, source.scale, source.bias,
        source.residual if joins else None, source.res_mean, source.res_scale, source.res_bias,
        g_in, part, dw_part, m, channels, outs, tiles,
        up.training, gmask, grad_a is not None, norm, norm and source.relu, act, joins,
        precision(x.dtype), acc(x.dtype), depth == outs, config.BM, config.BN, depth,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    return Dgrad(g_in, part, None), dw_part
