"""conv_bn backward with respect to the weight, for images of at most 4 channels.

    dw^T = patches(x)^T @ dy              [4*R*SP, K], summed over M = N*OH*OW

dy is plain; or, POOL, it is computed on the way in from y and the gradient of the pooled map:

    dy = scale*g + c0 + c1*(y - mean),  g = what the windows that a pixel won bring it, rounded

with the winners of the 3x3 window of stride 2 found beforehand (maxpool_winners), so that neither g
nor dy is in memory; rows are then cells of 2x2 pixels, and a step is four products. x is the copy
of the image that the forward kernel reads: 4 channels, padding in place. The grid is (tiles of K,
tiles of taps, splits of the rows); every split writes a partial dw in ACC, without the fourth
channel and the taps beyond S that fill rows up, and conv_bn_finish adds them up in order. Rows past
the last, and pixels of a cell that y has not, are zeros on both sides.

Bytes, elements a row, once a tile of taps: reads 4*SH*SW of x (from cache R*S/(SH*SW) times) and K
of dy, or K of y with a gradient and a byte for each window; writes splits*K*R*S*C of ACC.
"""

import triton
import triton.language as tl

from fusedres.triton_kernels.device.bn_relu_maxpool import place_within
from fusedres.triton_kernels.device.maxpool_winners import cell_gradients, coefficients


@triton.jit(do_not_specialize=["M", "rows", "HP", "OH", "OW", "PH", "PW", "CH", "CW", "tiles"])
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
    rows,  # N*CH*CW: cells, or M
    HP,
    row_stride,  # 4*WP, a multiple of 16
    OH,
    OW,
    PH,
    PW,
    CH,
    CW,
    tiles,  # of BM rows in a split
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    SP: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    POOL: tl.constexpr,
    TRAINING: tl.constexpr,
    PADDING: tl.constexpr,  # of the pool
    WIDE: tl.constexpr,  # BM is at most CW
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
        scale, c0, c1 = coefficients(
            scale_ptr, rstd_ptr, sums_ptr, ck, in_k, M, K, True, TRAINING, ACC
        )
    local = tl.arange(0, BM)
    acc = tl.zeros((BN, BK), ACC)
    first = split * tiles
    for tile in range(first, tl.minimum(first + tiles, tl.cdiv(rows, BM))):
        row0 = tl.cast(tile, rows.dtype) * BM
        count = tl.minimum(rows - row0, BM).to(tl.int32)
        valid = local < count
        image, ch, cw = place_within(row0, tl.minimum(local, count - 1), CH, CW, WIDE)
        if POOL:
            gradients = cell_gradients(
                grad_ptr, winners_ptr, image, ch, cw, valid, ck, in_k, PH, PW, K, ACC
            )
            for p in tl.static_range(4):
                oh = ch * 2 + (p // 2 - PADDING)
                ow = cw * 2 + (p % 2 - PADDING)
                exists = valid & (oh >= 0) & (oh < OH) & (ow >= 0) & (ow < OW)
                at = ((image.to(tl.int64) * OH + oh) * OW + ow) * K
                mask = exists[:, None] & in_k[None, :]
                y = tl.load(dy_ptr + at[:, None] + ck[None, :], mask=mask, other=0.0)
                dy = gradients[p].to(y.dtype).to(ACC) * scale
                if TRAINING:
                    dy += c0 + c1 * (y.to(ACC) - mean)
                    # of no pixel: what is finite here may not be once rounded, and 0 times it
                    dy = tl.where(exists[:, None], dy, 0.0)
                x = _patches(
                    x_ptr, image, oh, ow, HP, row_stride, taps_at, in_window, exists, SH, SW
                )
                acc = tl.dot(x, dy.to(y.dtype), acc, input_precision=PRECISION, out_dtype=ACC)
        else:
            at = row0.to(tl.int64) * K + local[:, None] * K + ck[None, :]
            dy = tl.load(dy_ptr + at, mask=valid[:, None] & in_k[None, :], other=0.0)
            x = _patches(x_ptr, image, ch, cw, HP, row_stride, taps_at, in_window, valid, SH, SW)
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


@triton.jit
def _patches(
    x_ptr, image, oh, ow, HP, row_stride, taps_at, in_window, exists,
    SH: tl.constexpr, SW: tl.constexpr,
):  # fmt: skip
    """What the windows of pixels (oh, ow) hold, as columns [BN, BM]."""
    windows = (image.to(tl.int64) * HP + oh * SH) * row_stride + ow * (4 * SW)
    mask = in_window[:, None] & exists[None, :]
    return tl.load(x_ptr + windows[None, :] + taps_at[:, None], mask=mask, other=0.0)
