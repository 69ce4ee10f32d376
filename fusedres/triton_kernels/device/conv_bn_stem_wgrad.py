"""conv_bn backward with respect to the weight, for images of at most 4 channels.

    dw^T = patches(x)^T @ dy              [4*R*SP, K], summed over M = N*OH*OW

dy is plain; or, POOL, it is computed on the way in from y and the gradient of the pooled map:

    dy = scale*g + c0 + c1*(y - mean),  g = what the windows that a pixel won bring it, rounded

with the winners found beforehand (maxpool_winners), so that neither g nor dy is in memory. x is the
copy of the image that the forward kernel reads: 4 channels, padding in place. The grid is (tiles of
K, tiles of taps, splits of M); every split writes a partial dw in ACC, without the fourth channel
and the taps beyond S that fill rows up, and conv_bn_finish adds them up in order. Rows past M are
zeros on both sides.

Bytes, elements a row, once a tile of taps: reads 4*SH*SW of x (from cache R*S/(SH*SW) times) and K
of dy, or K of y with a gradient and a byte for each window; writes splits*K*R*S*C of ACC.
"""

import triton
import triton.language as tl

from fusedres.triton_kernels.device.bn_relu_maxpool import place_of
from fusedres.triton_kernels.device.maxpool_winners import coefficients, pooled_gradient


@triton.jit(do_not_specialize=["M", "HP", "OH", "OW", "PH", "PW", "tiles"])
def conv_bn_stem_wgrad_kernel(
    x_ptr,  # [N, HP, WP, 4]
    dy_ptr,  # [M, K]; y where POOL
    grad_ptr,  # [N*PH*PW, K], of the pooled map
    winners_ptr,  # [N*PH*PW, K] bytes
    mean_ptr,  # [K] ACC, as are the next two
    scale_ptr,
    rstd_ptr,
    sums_ptr,  # [2, K] ACC
    part_ptr,  # [splits, K, R, S, C] ACC
    M,
    K,
    HP,
    row_stride,  # 4*WP, a multiple of 16
    OH,
    OW,
    PH,
    PW,
    tiles,  # of BM rows in a split
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    SP: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    POOL: tl.constexpr,
    TRAINING: tl.constexpr,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,  # of 4*R*SP
    BK: tl.constexpr,  # of K
):
    ck = tl.program_id(0) * BK + tl.arange(0, BK)
    taps = tl.program_id(1) * BN + tl.arange(0, BN)
    split = tl.program_id(2)
    in_k = ck < K
    in_window = taps < 4 * R * SP
    taps_at = taps // (4 * SP) * row_stride + taps % (4 * SP)
    if POOL:
        mean = tl.load(mean_ptr + ck, mask=in_k, other=0.0)[None, :]
        scale, c0, c1 = coefficients(scale_ptr, rstd_ptr, sums_ptr, ck, in_k, M, K, TRAINING, ACC)
        scale, c0, c1 = scale[None, :], c0[None, :], c1[None, :]
    local = tl.arange(0, BM)
    acc = tl.zeros((BN, BK), ACC)
    begin = split.to(tl.int64) * tiles * BM
    for i in range(0, tl.minimum(tiles, tl.cdiv(M - begin, BM).to(tl.int32))):
        row0 = begin + i * BM
        count = tl.minimum(M - row0, BM).to(tl.int32)
        valid = local < count
        image, oh, ow = place_of(row0, tl.minimum(local, count - 1), OH, OW)
        windows = x_ptr + (image * HP + oh * SH) * row_stride + ow * (4 * SW)
        x = tl.load(
            windows[None, :] + taps_at[:, None],
            mask=in_window[:, None] & valid[None, :],
            other=0.0,
        )
        dy = tl.load(
            dy_ptr + row0 * K + local[:, None] * K + ck[None, :],
            mask=valid[:, None] & in_k[None, :],
            other=0.0,
        )
        if POOL:
            g = pooled_gradient(
                grad_ptr, winners_ptr, image, oh, ow, valid, ck, in_k, PH, PW, K,
                SIZE, STRIDE, PADDING, ACC, BM, BK,
            )  # fmt: skip
            u = g.to(dy.dtype).to(ACC) * scale
            if TRAINING:
                u += c0 + c1 * (dy.to(ACC) - mean)
                u = tl.where(valid[:, None], u, 0.0)
            dy = u.to(dy.dtype)
        acc = tl.dot(x, dy, acc, input_precision=PRECISION, out_dtype=ACC)
    tap = taps // 4
    place = (tap // SP * S + tap % SP) * C + taps % 4
    stored = in_window & (tap % SP < S) & (taps % 4 < C)
    out = part_ptr + split.to(tl.int64) * K * (R * S * C)
    tl.store(
        out + ck[None, :] * (R * S * C) + place[:, None],
        acc,
        mask=in_k[None, :] & stored[:, None],
    )
