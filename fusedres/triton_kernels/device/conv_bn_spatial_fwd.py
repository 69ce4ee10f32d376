"""conv_bn forward for convolutions of any kernel size, stride, padding and dilation, as an implicit
GEMM: y = im2col(act(x)) @ w^T and the moments of y per channel.

    a = act((x - mean)*scale + bias [+ residual])     prologue, rounded to x's dtype; or a = x
    y[m, k] = sum over r, s, c of a[pixel of m at (r, s), c] * w[k, r, s, c]
    partial rows of (mean, M2) over the rounded y     epilogue

The grid is that of conv_bn_fwd: (tiles of K, chunks of M), tiles of K being neighbours. One loop
runs over the blocks of C and, innermost, the taps: nine steps then read nearly the same pixels,
which L1 and L2 hold, divisions are by constants, and there is one pipeline. Where the window of a
row begins is found once a tile; a step moves all rows by one scalar. Padding is zero after the
activation, so a deferred input is zeroed again behind it. A materialised input is loaded with
zeros in its place and goes to shared memory untouched. Rows past M repeat the last one.

Bytes, elements a row: reads C of x (and of the residual) R*S times a tile of K, from memory once
where the rows of a window stay in L2, and w; writes K of y.
Saved for backward: x and its vectors, y.
"""

import triton
import triton.language as tl

from fusedres.triton_kernels.device.activation import normalized, relu
from fusedres.triton_kernels.device.conv_bn_rows import reciprocal, window, within, zeroed
from fusedres.triton_kernels.device.reduction import merge_moments, tile_moments


@triton.jit(do_not_specialize=["M", "H", "W", "OH", "OW", "tiles"])
def conv_bn_spatial_fwd_kernel(
    x_ptr,  # [N, H, W, C]
    mean_ptr,  # [C] ACC, as are the next two
    scale_ptr,
    bias_ptr,
    residual_ptr,  # [N, H, W, C]
    res_mean_ptr,  # [C] ACC, as are the next two
    res_scale_ptr,
    res_bias_ptr,
    ones_ptr,  # [1] int32: all bits set
    w_ptr,  # [K, R, S, C]
    y_ptr,  # [M, K]
    part_ptr,  # [chunks, 2, K] ACC
    M,
    C,
    K,
    H,
    W,
    OH,
    OW,
    tiles,
    R: tl.constexpr,
    S: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PT: tl.constexpr,  # padding at the top
    PL: tl.constexpr,  # and on the left
    DH: tl.constexpr,
    DW: tl.constexpr,
    NORM: tl.constexpr,  # the input is a Deferred
    RESIDUAL: tl.constexpr,  # 0 none, 1 a tensor, 2 one that is normalised too
    RELU: tl.constexpr,
    STATS: tl.constexpr,
    LOOP: tl.constexpr,  # tiles > 1
    WIDE: tl.constexpr,  # the images of a tile exceed 32-bit offsets, or a map its divisions
    PRECISION: tl.constexpr,  # of fp32 products: "tf32" or "ieee"
    ACC: tl.constexpr,
    EVEN: tl.constexpr,  # BK divides C
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    across = tl.cdiv(K, BN)
    pn = tl.program_id(0) % across
    chunk = tl.program_id(0) // across
    cols = pn * BN + tl.arange(0, BN)
    inside = cols < K
    by_oh = reciprocal(OH)
    by_ow = reciprocal(OW)
    taps: tl.constexpr = R * S
    first = chunk * tiles
    last = 1
    if LOOP:
        last = tl.minimum(tiles, tl.cdiv(M, BM) - first)
    for i in tl.range(0, last, disable_licm=True):
        row0 = (first + i) * BM
        count = tl.minimum(M - row0, BM)
        local = tl.minimum(tl.arange(0, BM), count - 1)
        line = row0 // OW
        images, top, left = window(
            local, line % OH, row0 % OW, OH, OW, by_oh, by_ow, SH, SW, PT, PL, WIDE
        )
        base = tl.cast(line // OH, tl.int64) * H * W * C
        if WIDE:
            images = images.to(tl.int64)
        rows = ((images * H + top) * W + left) * C
        at = rows[:, None] + tl.arange(0, BK)[None, :]
        acc = tl.zeros((BM, BN), ACC)
        for j in range(0, tl.cdiv(C, BK) * taps):
            c0 = j // taps * BK
            tap = j % taps
            r = tap // S * DH
            s = tap % S * DW
            ck = c0 + tl.arange(0, BK)
            in_c = ck < C
            present = within(top + r, left + s, H, W)
            start = base + tl.cast(r * W + s, tl.int64) * C + c0
            if EVEN:
                mask = present[:, None]
            else:
                mask = present[:, None] & in_c[None, :]
            x = tl.load(x_ptr + start + at, mask=mask, other=0.0, cache_modifier=".ca")
            if NORM:
                u = normalized(
                    x.to(ACC),
                    tl.load(mean_ptr + ck, mask=in_c, other=0.0)[None, :],
                    tl.load(scale_ptr + ck, mask=in_c, other=0.0)[None, :],
                    tl.load(bias_ptr + ck, mask=in_c, other=0.0)[None, :],
                )
                if RESIDUAL > 0:
                    e = tl.load(
                        residual_ptr + start + at, mask=mask, other=0.0, cache_modifier=".ca"
                    )
                    e = e.to(ACC)
                    if RESIDUAL == 2:
                        e = normalized(
                            e,
                            tl.load(res_mean_ptr + ck, mask=in_c, other=0.0)[None, :],
                            tl.load(res_scale_ptr + ck, mask=in_c, other=0.0)[None, :],
                            tl.load(res_bias_ptr + ck, mask=in_c, other=0.0)[None, :],
                        )
                    u += e
                keep = tl.load(ones_ptr + tl.zeros((BM,), tl.int32), mask=present, other=0)
                u = zeroed(u, keep[:, None])
                if RELU:
                    u = relu(u)
                x = u.to(x_ptr.dtype.element_ty)
            w_at = cols[None, :] * (taps * C) + (tap * C + ck)[:, None]
            if EVEN:
                w = tl.load(w_ptr + w_at, mask=inside[None, :], other=0.0)
            else:
                w = tl.load(w_ptr + w_at, mask=inside[None, :] & in_c[:, None], other=0.0)
            acc = tl.dot(x, w, acc, input_precision=PRECISION, out_dtype=ACC)
        y = acc.to(y_ptr.dtype.element_ty)
        valid = (tl.arange(0, BM) < count)[:, None]
        at_y = local[:, None] * K + cols[None, :]
        tl.store(y_ptr + tl.cast(row0, tl.int64) * K + at_y, y, mask=valid & inside[None, :])
        if STATS:
            mean, m2 = tile_moments(y.to(ACC), valid, count.to(ACC))
            row = part_ptr + chunk * 2 * K + cols
            merge_moments(row, K, inside, mean, m2, count, i * BM, ACC)
