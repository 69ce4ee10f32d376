"""conv_bn forward for 1x1 convolutions: y = act(x) @ w^T and the moments of y per channel.

    a = act((x - mean)*scale + bias [+ residual])     prologue, rounded to x's dtype; or a = x
    bits = where a lets a gradient through            one a byte for 8 channels, if asked for
    y = a @ w^T                                       [M, K] from [M, C] and [K, C]
    partial rows of (mean, M2) over the rounded y     epilogue

The grid is (tiles of K, chunks of M): tiles of K are neighbours, so that all but the first find the
activation in L2. A chunk is `tiles` tiles of BM rows, and its moments make one partial row. Where a
chunk is one tile (LOOP false) the loop vanishes, and with it up to a third of the registers. Rows
past M repeat the last one: they cost no mask in the prologue, and are masked at the stores and in
the moments.

Bytes, elements a row: reads C of x once a tile of K (from memory once), as many of the residual,
and w; writes K of y, and C where the activation is emitted, by the first tile of K; bits are 1/16
of a bf16 activation. Saved for backward: x and its vectors, y, the emitted activation and its bits.
"""

import triton
import triton.language as tl

from fusedres.triton_kernels.device.activation import normalized, packed, relu
from fusedres.triton_kernels.device.conv_bn_rows import input_row, walked
from fusedres.triton_kernels.device.reduction import merge_moments, tile_moments


@triton.jit(do_not_specialize=["M", "H", "W", "OH", "OW", "tiles", "down"])
def conv_bn_fwd_kernel(
    x_ptr,  # [N*H*W, C]
    mean_ptr,  # [C] ACC, as are the next two
    scale_ptr,
    bias_ptr,
    residual_ptr,  # [N*H*W, C]
    res_mean_ptr,  # [C] ACC, as are the next two
    res_scale_ptr,
    res_bias_ptr,
    w_ptr,  # [K, C]
    y_ptr,  # [M, K]
    a_ptr,  # [M, C]
    bits_ptr,  # [M, C/8] uint8
    part_ptr,  # [chunks, 2, K] ACC
    M,
    C,
    K,
    H,
    W,
    OH,
    OW,
    tiles,
    down,
    SH: tl.constexpr,
    SW: tl.constexpr,
    NORM: tl.constexpr,  # the input is a Deferred
    RESIDUAL: tl.constexpr,  # 0 none, 1 a tensor, 2 one that is normalised too
    RELU: tl.constexpr,
    EMIT: tl.constexpr,
    BITS: tl.constexpr,  # of what is emitted; 8 divides C
    STATS: tl.constexpr,
    LOOP: tl.constexpr,  # tiles > 1
    PRECISION: tl.constexpr,  # of fp32 products: "tf32" or "ieee"
    ACC: tl.constexpr,
    EVEN: tl.constexpr,  # BK divides C
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    across = tl.cdiv(K, BN)
    pn = tl.program_id(0) % across
    chunk = walked(tl.program_id(0) // across, tl.num_programs(0) // across, down)
    cols = pn * BN + tl.arange(0, BN)
    inside = cols < K
    emitted = tl.where(pn == 0, C, 0)  # columns of the activation that this program stores
    first = chunk * tiles
    last = 1
    if LOOP:
        last = tl.minimum(tiles, tl.cdiv(M, BM) - first)
    for i in tl.range(0, last, disable_licm=True):
        row0 = (first + i) * BM
        count = tl.minimum(M - row0, BM)
        local = tl.arange(0, BM)
        valid = (local < count)[:, None]
        local = tl.minimum(local, count - 1)
        start = input_row(row0, H, W, OH, OW, SH, SW)
        rows = local
        if SH > 1 or SW > 1:
            rows = input_row(row0 + local, H, W, OH, OW, SH, SW) - start
        base = tl.cast(start, tl.int64) * C
        acc = tl.zeros((BM, BN), ACC)
        for k in range(0, C, BK):
            ck = k + tl.arange(0, BK)
            within = ck < C
            at = rows[:, None] * C + ck[None, :]
            if EVEN:
                x = tl.load(x_ptr + base + at)
            else:
                x = tl.load(x_ptr + base + at, mask=within[None, :], other=0.0)
            if NORM:
                u = normalized(
                    x.to(ACC),
                    tl.load(mean_ptr + ck, mask=within, other=0.0)[None, :],
                    tl.load(scale_ptr + ck, mask=within, other=0.0)[None, :],
                    tl.load(bias_ptr + ck, mask=within, other=0.0)[None, :],
                )
                if RESIDUAL > 0:
                    if EVEN:
                        r = tl.load(residual_ptr + base + at).to(ACC)
                    else:
                        r = tl.load(residual_ptr + base + at, mask=within[None, :], other=0.0)
                        r = r.to(ACC)
                    if RESIDUAL == 2:
                        r = normalized(
                            r,
                            tl.load(res_mean_ptr + ck, mask=within, other=0.0)[None, :],
                            tl.load(res_scale_ptr + ck, mask=within, other=0.0)[None, :],
                            tl.load(res_bias_ptr + ck, mask=within, other=0.0)[None, :],
                        )
                    u += r
                if RELU:
                    u = relu(u)
                x = u.to(x_ptr.dtype.element_ty)
                if EMIT:
                    tl.store(a_ptr + base + at, x, mask=valid & (ck < emitted)[None, :])
                if BITS:
                    byte = k // 8 + tl.arange(0, BK // 8)
                    b_at = bits_ptr + tl.cast(start, tl.int64) * (C // 8)
                    b_at += local[:, None] * (C // 8) + byte[None, :]
                    tl.store(b_at, packed(x), mask=valid & (byte < emitted // 8)[None, :])
            w_at = cols[None, :] * C + ck[:, None]
            if EVEN:
                w = tl.load(w_ptr + w_at, mask=inside[None, :], other=0.0)
            else:
                w = tl.load(w_ptr + w_at, mask=inside[None, :] & within[:, None], other=0.0)
            acc = tl.dot(x, w, acc, input_precision=PRECISION, out_dtype=ACC)
        y = acc.to(y_ptr.dtype.element_ty)
        at = local[:, None] * K + cols[None, :]
        tl.store(y_ptr + tl.cast(row0, tl.int64) * K + at, y, mask=valid & inside[None, :])
        if STATS:
            mean, m2 = tile_moments(y.to(ACC), valid, count.to(ACC))
            row = part_ptr + chunk * 2 * K + cols
            merge_moments(row, K, inside, mean, m2, count, i * BM, ACC)
