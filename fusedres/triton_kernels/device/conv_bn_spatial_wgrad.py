"""conv_bn backward with respect to the weight, for convolutions of any kernel size, stride, padding
and dilation.

    dw^T[c, k] of a tap = act(x at the tap)^T @ dy           summed over M, a GEMM for each tap

The activation is computed again on the way in, or x is one already; dy is plain. As in
conv_bn_wgrad the transformed side is on the left, fed from registers. The grid is (tiles of K, then
taps, then tiles of C; splits of M), the first varying fastest: all programs of a split walk the
same rows at the same time, so that memory gives x and dy once and L2 the other R*S - 1 times. Every
split writes a partial dw in ACC, and conv_bn_finish adds them up in order. Where a row's window
begins is followed from step to step, without a division by what is no constant. What lies in the
padding or past M is zero on the left, behind the activation.

Bytes, elements a row: reads C of x (and of a residual) R*S times a tile of K, K of dy R*S times a
tile of C, nearly all of it from L2; writes splits * K * R*S * C of ACC.
"""

import triton
import triton.language as tl

from fusedres.triton_kernels.device.activation import normalized, relu
from fusedres.triton_kernels.device.conv_bn_rows import reciprocal, window, within, zeroed


@triton.jit(do_not_specialize=["M", "H", "W", "OH", "OW", "tiles"])
def conv_bn_spatial_wgrad_kernel(
    x_ptr,  # [N, H, W, C]
    mean_ptr,  # [C] ACC, as are the next two
    scale_ptr,
    bias_ptr,
    residual_ptr,  # [N, H, W, C]
    res_mean_ptr,  # [C] ACC, as are the next two
    res_scale_ptr,
    res_bias_ptr,
    ones_ptr,  # [1] int32: all bits set
    dy_ptr,  # [M, K]
    part_ptr,  # [splits, K, R, S, C] ACC
    M,
    C,
    K,
    H,
    W,
    OH,
    OW,
    tiles,  # of BM rows in a split
    R: tl.constexpr,
    S: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PT: tl.constexpr,
    PL: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,  # of C
    BK: tl.constexpr,  # of K
):
    across = tl.cdiv(K, BK)
    taps: tl.constexpr = R * S
    ck = tl.program_id(0) % across * BK + tl.arange(0, BK)
    place = tl.program_id(0) // across
    tap = place % taps
    r = tap // S * DH
    s = tap % S * DW
    cc = place // taps * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    in_k = ck < K
    in_c = cc < C
    by_oh = reciprocal(OH)
    by_ow = reciprocal(OW)
    begin = split * tiles * BM
    ow = begin % OW
    oh = begin // OW % OH
    image = begin // OW // OH
    local = tl.arange(0, BM)
    acc = tl.zeros((BN, BK), ACC)
    for row0 in tl.range(begin, tl.minimum(begin + tiles * BM, M), BM, disable_licm=True):
        valid = local < M - row0
        images, top, left = window(local, oh, ow, OH, OW, by_oh, by_ow, SH, SW, PT, PL, WIDE)
        top += r
        left += s
        present = valid & within(top, left, H, W)
        base = tl.cast(image, tl.int64) * H * W * C
        if WIDE:
            images = images.to(tl.int64)
        at = (((images * H + top) * W + left) * C)[None, :] + cc[:, None]
        mask = present[None, :] & in_c[:, None]
        a = tl.load(x_ptr + base + at, mask=mask, other=0.0)
        if NORM:
            u = normalized(
                a.to(ACC),
                tl.load(mean_ptr + cc, mask=in_c, other=0.0)[:, None],
                tl.load(scale_ptr + cc, mask=in_c, other=0.0)[:, None],
                tl.load(bias_ptr + cc, mask=in_c, other=0.0)[:, None],
            )
            if RESIDUAL > 0:
                e = tl.load(residual_ptr + base + at, mask=mask, other=0.0).to(ACC)
                if RESIDUAL == 2:
                    e = normalized(
                        e,
                        tl.load(res_mean_ptr + cc, mask=in_c, other=0.0)[:, None],
                        tl.load(res_scale_ptr + cc, mask=in_c, other=0.0)[:, None],
                        tl.load(res_bias_ptr + cc, mask=in_c, other=0.0)[:, None],
                    )
                u += e
            keep = tl.load(ones_ptr + tl.zeros((BM,), tl.int32), mask=present, other=0)
            u = zeroed(u, keep[None, :])
            if RELU:
                u = relu(u)
            a = u.to(x_ptr.dtype.element_ty)
        dy = tl.load(
            dy_ptr + tl.cast(row0, tl.int64) * K + local[:, None] * K + ck[None, :],
            mask=valid[:, None] & in_k[None, :],
            other=0.0,
        )
        acc = tl.dot(a, dy, acc, input_precision=PRECISION, out_dtype=ACC)
        # on to the row BM further on
        ow += BM % OW
        wraps = (ow >= OW).to(tl.int32)
        ow -= wraps * OW
        oh += BM // OW % OH + wraps
        wraps = (oh >= OH).to(tl.int32)
        oh -= wraps * OH
        image += BM // OW // OH + wraps
    out = part_ptr + split.to(tl.int64) * K * taps * C
    at = ck[None, :] * (taps * C) + tap * C + cc[:, None]
    tl.store(out + at, acc, mask=in_k[None, :] & in_c[:, None])
