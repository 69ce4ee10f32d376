"""conv_bn forward of images: a convolution of at most 4 channels, and the moments of y per channel.

    y = x * w                                     [M, K], M = N*OH*OW
    partial rows of (mean, M2) over the rounded y     epilogue

x is a copy of the image in 4 channels with its padding in place, and w has as many, its rows of
taps filled up to SP of them: a row of a window is then 4*SP elements in one piece, which start on
16 bytes where the stride is 2. The k loop takes BK of them at a time. A pixel past the window has
zero weights, but may be no number: its lanes are masked. Rows of M past the last repeat it; they
are masked at the store and in the moments.

The grid is (tiles of K, chunks of M); a chunk is `tiles` tiles of BM rows, and its moments make one
partial row. Bytes, elements a row: reads 4*SH*SW of x once (from cache R*S/(SH*SW) times), and w;
writes K of y. Saved for backward: the image and y.
"""

import triton
import triton.language as tl

from fusedres.triton_kernels.device.bn_relu_maxpool import place_within
from fusedres.triton_kernels.device.reduction import merge_moments, tile_moments


@triton.jit(do_not_specialize=["M", "HP", "OH", "OW", "tiles"])
def conv_bn_stem_fwd_kernel(
    x_ptr,  # [N, HP, WP, 4]
    w_ptr,  # [K, R, SP, 4]
    y_ptr,  # [M, K]
    part_ptr,  # [chunks, 2, K] ACC
    M,
    K,
    HP,
    row_stride,  # 4*WP, a multiple of 16
    OH,
    OW,
    tiles,
    R: tl.constexpr,
    S: tl.constexpr,
    SP: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    STATS: tl.constexpr,
    LOOP: tl.constexpr,  # tiles > 1
    WIDE: tl.constexpr,  # BM is at most OW
    PRECISION: tl.constexpr,  # of fp32 products: "tf32" or "ieee"
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,  # divides 4*SP
):
    across = tl.cdiv(K, BN)
    pn = tl.program_id(0) % across
    chunk = tl.program_id(0) // across
    cols = pn * BN + tl.arange(0, BN)
    inside = cols < K
    lane = tl.arange(0, BK)
    pieces: tl.constexpr = 4 * SP // BK  # of a window's row
    first = chunk * tiles
    last = 1
    if LOOP:
        last = tl.minimum(tiles, tl.cdiv(M, BM) - first)
    for i in tl.range(0, last, disable_licm=True):
        row0 = tl.cast(first + i, M.dtype) * BM
        count = tl.minimum(M - row0, BM).to(tl.int32)
        local = tl.arange(0, BM)
        valid = (local < count)[:, None]
        local = tl.minimum(local, count - 1)
        image, oh, ow = place_within(row0, local, OH, OW, WIDE)
        windows = x_ptr + (image.to(tl.int64) * HP + oh * SH) * row_stride + ow * (4 * SW)
        acc = tl.zeros((BM, BN), ACC)
        for k in range(0, R * pieces):
            at = k // pieces * row_stride + k % pieces * BK
            if SP > S:
                within = lane // 4 < S - k % pieces * (BK // 4)
                x = tl.load(
                    windows[:, None] + (at + lane)[None, :], mask=within[None, :], other=0.0
                )
            else:
                x = tl.load(windows[:, None] + (at + lane)[None, :])
            w_at = cols[None, :] * (4 * R * SP) + (k * BK + lane)[:, None]
            w = tl.load(w_ptr + w_at, mask=inside[None, :], other=0.0)
            acc = tl.dot(x, w, acc, input_precision=PRECISION, out_dtype=ACC)
        y = acc.to(y_ptr.dtype.element_ty)
        at = local[:, None] * K + cols[None, :]
        tl.store(y_ptr + row0.to(tl.int64) * K + at, y, mask=valid & inside[None, :])
        if STATS:
            mean, m2 = tile_moments(y.to(ACC), valid, count.to(ACC))
            row = part_ptr + chunk * 2 * K + cols
            merge_moments(row, K, inside, mean, m2, count, i * BM, ACC)
