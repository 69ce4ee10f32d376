"""conv_bn backward with respect to the input, for 1x1 convolutions.

    g    = 0 where act(y) <= 0, else g          prologue, where g comes unmasked
    dy   = scale*g + c0 + c1*(y - mean)         prologue; c0 = -scale*S0/M, c1 = -scale*rstd^2*S1/M
    da   = dy @ w [+ grad_a]                    [M, C] from [M, K] and [K, C]
    g_in = 0 where act(x) <= 0, else da         rounded; the gradient of the residual as well
    partial rows of sum g_in, sum g_in*(x - x_mean) [, sum g_in*(residual - res_mean)]

dy is written once, by the first tile of C, into a buffer of its own: wgrad reads it plain, and the
other tiles still read g. The mask comes from the emitted activation or its bits, or is computed
again from x as forward computed it. grad_a may be there for the pixels alone that a strided
shortcut reads. Grid, chunks and rows past M as in conv_bn_fwd. Strided: row m of the output is
one row of the input; its SH*SW - 1 neighbours, which no output reads, are written with it.

Bytes, elements a row: reads K of g and K of y once a tile of C (from memory once), C of each of x,
a (or 1/16 of a bf16 one in bits), grad_a and a normalised residual that apply, and w; writes K of
dy and C of g_in.
"""

import triton
import triton.language as tl

from fusedres.triton_kernels.device.activation import masked, normalized, rounded, unpacked
from fusedres.triton_kernels.device.conv_bn_rows import input_row
from fusedres.triton_kernels.device.reduction import add_sums


@triton.jit(do_not_specialize=["M", "H", "W", "OH", "OW", "tiles"])
def conv_bn_dgrad_kernel(
    g_ptr,  # [M, K]
    y_ptr,  # [M, K]
    mean_ptr,  # [K] ACC, as are the next two
    scale_ptr,
    rstd_ptr,
    bias_ptr,  # [K] ACC, for G_MASK
    sums_ptr,  # [2, K] ACC: S
    w_ptr,  # [K, C]
    grad_a_ptr,  # [N*H*W, C], or [N*ceil(H/GH)*ceil(W/GW), C]
    a_ptr,  # [N*H*W, C]
    bits_ptr,  # [N*H*W, C/8] uint8
    x_ptr,  # [N*H*W, C]
    x_mean_ptr,  # [C] ACC, as are the next two
    x_scale_ptr,
    x_bias_ptr,
    residual_ptr,  # [N*H*W, C]
    res_mean_ptr,  # [C] ACC, as are the next two
    res_scale_ptr,
    res_bias_ptr,
    g_in_ptr,  # [N*H*W, C]
    dy_ptr,  # [M, K]
    part_ptr,  # [chunks, 2 or 3, C] ACC
    M,
    C,
    K,
    H,
    W,
    OH,
    OW,
    tiles,
    SH: tl.constexpr,
    SW: tl.constexpr,
    TRAINING: tl.constexpr,  # else c0 = c1 = 0, and y is read for G_MASK alone
    G_MASK: tl.constexpr,  # g is still to be masked, by y
    DY: tl.constexpr,
    GRAD_A: tl.constexpr,
    GH: tl.constexpr,  # grad_a is of every GH-th row of pixels and every GW-th column
    GW: tl.constexpr,
    NORM: tl.constexpr,  # the input is a Deferred: its sums are wanted
    MASK: tl.constexpr,  # 0 no ReLU, 1 from a, 2 computed again, 3 from bits
    RESIDUAL: tl.constexpr,  # 0 none, 1 a tensor (read for MASK 2), 2 one that is normalised too
    LOOP: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    EVEN: tl.constexpr,  # BK divides K
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    across = tl.cdiv(C, BN)
    pn = tl.program_id(0) % across
    chunk = tl.program_id(0) // across
    cols = pn * BN + tl.arange(0, BN)
    inside = cols < C
    written = tl.where(pn == 0, K, 0)  # columns of dy that this program stores
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
        base = tl.cast(row0, tl.int64) * K
        acc = tl.zeros((BM, BN), ACC)
        for k in range(0, K, BK):
            ck = k + tl.arange(0, BK)
            within = ck < K
            at = local[:, None] * K + ck[None, :]
            if EVEN:
                g = tl.load(g_ptr + base + at).to(ACC)
            else:
                g = tl.load(g_ptr + base + at, mask=within[None, :], other=0.0).to(ACC)
            scale = tl.load(scale_ptr + ck, mask=within, other=0.0)
            if TRAINING or G_MASK:
                if EVEN:
                    stored = tl.load(y_ptr + base + at)
                else:
                    stored = tl.load(y_ptr + base + at, mask=within[None, :], other=0.0)
                y = stored.to(ACC)
                mean = tl.load(mean_ptr + ck, mask=within, other=0.0)
            if G_MASK:
                bias = tl.load(bias_ptr + ck, mask=within, other=0.0)
                u = normalized(y, mean[None, :], scale[None, :], bias[None, :])
                g = masked(g, rounded(u, stored))
            if TRAINING:
                rstd = tl.load(rstd_ptr + ck, mask=within, other=0.0)
                per_row = -scale / M
                c0 = per_row * tl.load(sums_ptr + ck, mask=within, other=0.0)
                c1 = per_row * rstd * rstd * tl.load(sums_ptr + K + ck, mask=within, other=0.0)
                dy = tl.fma(g, scale[None, :], tl.fma(y - mean[None, :], c1[None, :], c0[None, :]))
            else:
                dy = g * scale[None, :]
            dy = dy.to(g_ptr.dtype.element_ty)
            if DY:
                tl.store(dy_ptr + base + at, dy, mask=valid & (ck < written)[None, :])
            w_at = ck[:, None] * C + cols[None, :]
            if EVEN:
                w = tl.load(w_ptr + w_at, mask=inside[None, :], other=0.0)
            else:
                w = tl.load(w_ptr + w_at, mask=inside[None, :] & within[:, None], other=0.0)
            acc = tl.dot(dy, w, acc, input_precision=PRECISION, out_dtype=ACC)

        start = input_row(row0, H, W, OH, OW, SH, SW)
        rows = local
        if SH > 1 or SW > 1:
            rows = input_row(row0 + local, H, W, OH, OW, SH, SW) - start
        base = tl.cast(start, tl.int64) * C
        at = rows[:, None] * C + cols[None, :]
        mask = valid & inside[None, :]
        if GRAD_A:
            if GH > 1 or GW > 1:
                m = row0 + local
                h = m // W % H
                w = m % W
                there = mask & ((h % GH == 0) & (w % GW == 0))[:, None]
                kept = (m // (H * W) * tl.cdiv(H, GH) + h // GH) * tl.cdiv(W, GW) + w // GW
                kept_at = grad_a_ptr + (kept.to(tl.int64) * C)[:, None] + cols[None, :]
                acc += tl.load(kept_at, mask=there, other=0.0).to(ACC)
            else:
                acc += tl.load(grad_a_ptr + base + at, mask=mask, other=0.0).to(ACC)
        if NORM:
            x_mean = tl.load(x_mean_ptr + cols, mask=inside, other=0.0)[None, :]
            stored = tl.load(x_ptr + base + at, mask=mask, other=0.0)
            x = stored.to(ACC)
            if RESIDUAL == 2:
                res_mean = tl.load(res_mean_ptr + cols, mask=inside, other=0.0)[None, :]
            if RESIDUAL == 2 or (RESIDUAL == 1 and MASK == 2):
                r = tl.load(residual_ptr + base + at, mask=mask, other=0.0).to(ACC)
            if MASK == 1:
                acc = masked(acc, tl.load(a_ptr + base + at, mask=mask, other=0.0).to(ACC))
            if MASK == 2:
                x_scale = tl.load(x_scale_ptr + cols, mask=inside, other=0.0)[None, :]
                x_bias = tl.load(x_bias_ptr + cols, mask=inside, other=0.0)[None, :]
                u = normalized(x, x_mean, x_scale, x_bias)
                if RESIDUAL == 1:
                    u += r
                if RESIDUAL == 2:
                    res_scale = tl.load(res_scale_ptr + cols, mask=inside, other=0.0)[None, :]
                    res_bias = tl.load(res_bias_ptr + cols, mask=inside, other=0.0)[None, :]
                    u += normalized(r, res_mean, res_scale, res_bias)
                acc = masked(acc, rounded(u, stored))
            if MASK == 3:
                byte = pn * (BN // 8) + tl.arange(0, BN // 8)
                b_at = bits_ptr + tl.cast(start, tl.int64) * (C // 8)
                b_at += rows[:, None] * (C // 8) + byte[None, :]
                bits = tl.load(b_at, mask=valid & (byte < C // 8)[None, :], other=0)
                acc = tl.where(unpacked(bits), acc, 0.0)
        g_in = acc.to(g_in_ptr.dtype.element_ty)
        tl.store(g_in_ptr + base + at, g_in, mask=mask)
        if SH > 1 or SW > 1:
            m = row0 + local
            below = H - m // OW % OH * SH
            right = W - m % OW * SW
            for dh in tl.static_range(SH):
                for dw in tl.static_range(SW):
                    if dh + dw > 0:
                        there = mask & ((dh < below) & (dw < right))[:, None]
                        beside = base + (dh * W + dw) * C
                        value = tl.zeros((BM, BN), g_in_ptr.dtype.element_ty)
                        if GRAD_A:
                            value = tl.load(grad_a_ptr + beside + at, mask=there, other=0.0)
                        tl.store(g_in_ptr + beside + at, value, mask=there)
        if NORM:
            g = tl.where(valid, g_in.to(ACC), 0.0)
            row = part_ptr + chunk * (3 if RESIDUAL == 2 else 2) * C + cols
            add_sums(row, inside, tl.sum(g, 0), i == 0)
            add_sums(row + C, inside, tl.sum(g * (x - x_mean), 0), i == 0)
            if RESIDUAL == 2:
                add_sums(row + 2 * C, inside, tl.sum(g * (r - res_mean), 0), i == 0)
