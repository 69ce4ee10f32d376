"""conv_bn backward with respect to the input, for k x k convolutions of one group.

    dy   = scale*g + c0 + c1*(y - mean)           prologue, for every tap; 0 outside the map
    da   = sum over taps of dy @ w [+ grad_a]     [N*H*W, C] from [N*OH*OW, K] and [K, R, S, C]
    g_in = 0 where act(x) <= 0, else da           rounded; the gradient of the residual as well
    partial rows of sum g_in, sum g_in*(x - x_mean) [, sum g_in*(residual - res_mean)]

c0 = -scale*S0/M, c1 = -scale*rstd^2*S1/M; g may still want its mask, which y decides; without the
prologue dy is given. Output (oh, ow) meets pixel (ih, iw) under tap (r, s) where ih + top = oh*SH +
r*DH, and likewise along W. So pixels are divided into SH*SW classes of one parity: the taps that
meet a class are every TH-th by TW-th, under each of them the class is a dense map of outputs, and
no product is wasted. A class that no tap meets has da = 0 and the same epilogue.

The grid is (tiles of C, classes, chunks of a class), the first fastest: all of a region's classes
run side by side, so that all but the first find dy in L2, and long and short ones mix until the
end. A launch for each class would read dy from memory as often as there are classes, and end in as
many tails, for no gain: the depth of the GEMM, taps times K, is a loop's bound either way. All
classes have the chunks of the largest; a chunk past its class's end leaves a partial row of zeros.

The depth runs through the taps within a block of K, so that what is read once more lies close, and
the vectors of a block are in L1. dy is written once, into a buffer of its own, by the first tile of
C under one tap that meets every output (the host finds one). Chunks and rows past the end as in
conv_bn_fwd.

Bytes, elements: reads K of g and y an output and class (from memory once), or of dy; C of each of
x, a, grad_a and a normalised residual that apply a pixel, and w; writes K of dy an output and C of
g_in a pixel.
"""

import triton
import triton.language as tl

from fusedres.triton_kernels.device.activation import masked, normalized
from fusedres.triton_kernels.device.reduction import add_sums


@triton.jit
def class_along(
    c, size, pad, taps, STRIDE: tl.constexpr, DILATION: tl.constexpr, STEP: tl.constexpr
):
    """Class c along one axis: its first pixel, pixels, first tap, taps (every STEP-th), and the
    output that the first pixel meets under the first tap, which may lie outside the map.
    """
    tap = c % STEP
    parity = tap * DILATION % STRIDE + c // STEP  # classes from STEP on meet no tap
    pixel = (parity + STRIDE - pad % STRIDE) % STRIDE
    met = tl.where(c < STEP, tl.cdiv(taps - tap, STEP), 0)
    return pixel, tl.cdiv(size - pixel, STRIDE), tap, met, (pixel + pad - tap * DILATION) // STRIDE


@triton.jit
def place(m, PH, PW):
    """Image, row and column of pixel m of a class of PH by PW pixels an image."""
    line = m // tl.maximum(PW, 1)
    image = line // tl.maximum(PH, 1)
    return image, line - image * PH, m - line * PW


@triton.jit
def coefficients(vectors, ck, K, per_row, zeros, TRAINING: tl.constexpr, GMASK: tl.constexpr):
    """mean, scale, bias, c0 and c1 of channels ck [BK], zeros for those that nobody reads; per_row
    is -1/M.
    """
    mean_ptr, scale_ptr, rstd_ptr, bias_ptr, sums_ptr = vectors
    within = ck < K
    mean, bias, c0, c1 = zeros, zeros, zeros, zeros
    scale = tl.load(scale_ptr + ck, mask=within, other=0.0)
    if TRAINING or GMASK:
        mean = tl.load(mean_ptr + ck, mask=within, other=0.0)
    if GMASK:
        bias = tl.load(bias_ptr + ck, mask=within, other=0.0)
    if TRAINING:
        rstd = tl.load(rstd_ptr + ck, mask=within, other=0.0)
        c0 = scale * per_row * tl.load(sums_ptr + ck, mask=within, other=0.0)
        c1 = scale * per_row * rstd * rstd * tl.load(sums_ptr + K + ck, mask=within, other=0.0)
    return mean, scale, bias, c0, c1


@triton.jit
def bn_grad(
    g, y, mean, scale, bias, c0, c1, TRAINING: tl.constexpr, GMASK: tl.constexpr, ACC: tl.constexpr
):
    """dy of a block [BM, BK] of g and y, in ACC."""
    dtype: tl.constexpr = g.dtype
    g = g.to(ACC)
    y = y.to(ACC)
    if GMASK:
        u = normalized(y, mean[None, :], scale[None, :], bias[None, :])
        g = masked(g, u.to(dtype).to(ACC))  # rounded as forward rounds
    if TRAINING:
        return tl.fma(g, scale[None, :], tl.fma(y - mean[None, :], c1[None, :], c0[None, :]))
    else:
        return g * scale[None, :]


@triton.jit(
    do_not_specialize=["N", "M", "H", "W", "OH", "OW", "R", "S", "top", "left", "tiles"]
    + ["dy_class", "dy_r", "dy_s"]
)
def conv_bn_spatial_dgrad_kernel(
    g_ptr,  # [N*OH*OW, K]; dy without PROLOGUE
    y_ptr,  # [N*OH*OW, K]
    mean_ptr,  # [K] ACC, as are the next three
    scale_ptr,
    rstd_ptr,
    bias_ptr,  # given with GMASK
    sums_ptr,  # [2, K] ACC: S
    w_ptr,  # [K, R, S, C]
    grad_a_ptr,  # [N*H*W, C]
    a_ptr,  # [N*H*W, C]
    x_ptr,  # [N*H*W, C]
    x_mean_ptr,  # [C] ACC, as are the next two
    x_scale_ptr,
    x_bias_ptr,
    residual_ptr,  # [N*H*W, C]
    res_mean_ptr,  # [C] ACC, as are the next two
    res_scale_ptr,
    res_bias_ptr,
    g_in_ptr,  # [N*H*W, C]
    dy_ptr,  # [N*OH*OW, K]
    part_ptr,  # [chunks, classes, 2 or 3, C] ACC
    N,
    M,  # N*OH*OW
    C,
    K,
    H,
    W,
    OH,
    OW,
    R,
    S,
    top,
    left,
    tiles,
    dy_class,  # where dy is written: the class, and which of its taps
    dy_r,
    dy_s,
    SH: tl.constexpr,
    SW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    TH: tl.constexpr,  # SH / gcd(SH, DH)
    TW: tl.constexpr,
    PROLOGUE: tl.constexpr,
    GMASK: tl.constexpr,  # g is still to be masked
    TRAINING: tl.constexpr,  # else c0 = c1 = 0
    DY: tl.constexpr,
    GRAD_A: tl.constexpr,
    NORM: tl.constexpr,  # the input is a Deferred: its sums are wanted
    MASK: tl.constexpr,  # 0 no ReLU, 1 from a, 2 computed again
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
    cls = chunk % (SH * SW)
    cols = pn * BN + tl.arange(0, BN)
    inside = cols < C
    ih0, PH, r0, nr, oh0 = class_along(cls // SW, H, top, R, SH, DH, TH)
    iw0, PW, s0, ns, ow0 = class_along(cls % SW, W, left, S, SW, DW, TW)
    written = tl.where(
        (pn == 0) & (cls == dy_class), K, 0
    )  # columns of dy that this program stores
    per_row = -1.0 / tl.cast(M, ACC)
    first = chunk // (SH * SW) * tiles
    last = 1
    if LOOP:
        last = tl.maximum(1, tl.minimum(tiles, tl.cdiv(N * PH * PW, BM) - first))
    for i in tl.range(0, last, disable_licm=True):
        row0 = (first + i) * BM
        count = tl.minimum(N * PH * PW - row0, BM)  # not positive past the class's end
        local = tl.arange(0, BM)
        valid = (local < count)[:, None]
        n0, ph0, pw0 = place(row0, PH, PW)
        n, ph, pw = place(row0 + tl.maximum(tl.minimum(local, count - 1), 0), PH, PW)
        start = (tl.cast(n0, tl.int64) * OH + ph0) * OW + pw0
        rows = ((n - n0) * OH + ph - ph0) * OW + pw - pw0
        acc = tl.zeros((BM, BN), ACC)
        zeros = tl.zeros((BK,), ACC)
        mean, scale, bias, c0, c1 = zeros, zeros, zeros, zeros, zeros
        k = 0
        ri = 0
        si = 0
        for _ in range(0, tl.where(count > 0, nr * ns * tl.cdiv(K, BK), 0)):
            ck = k + tl.arange(0, BK)
            within = ck < K
            down = ri * (DH * TH // SH) - oh0  # pixels from here on meet output 0 and on
            along = si * (DW * TW // SW) - ow0
            met = (ph >= down) & (ph < OH + down) & (pw >= along) & (pw < OW + along)
            base = (start - down * OW - along) * K
            at = rows[:, None] * K + ck[None, :]
            there = met[:, None]
            if not EVEN:
                there = there & within[None, :]
            dy = tl.load(g_ptr + base + at, mask=there, other=0.0)
            if PROLOGUE:
                y = dy
                if TRAINING or GMASK:
                    y = tl.load(y_ptr + base + at, mask=there, other=0.0)
                if (ri == 0) & (si == 0):
                    vectors = (mean_ptr, scale_ptr, rstd_ptr, bias_ptr, sums_ptr)
                    mean, scale, bias, c0, c1 = coefficients(
                        vectors, ck, K, per_row, zeros, TRAINING, GMASK
                    )
                grad = bn_grad(dy, y, mean, scale, bias, c0, c1, TRAINING, GMASK, ACC)
                dy = tl.where(met[:, None], grad, 0.0).to(g_ptr.dtype.element_ty)
                if DY:
                    # predicated: a branch costs more registers than it saves instructions
                    here = (ri == dy_r) & (si == dy_s)
                    stored = (ck < tl.where(here, written, 0))[None, :]
                    tl.store(dy_ptr + base + at, dy, mask=valid & met[:, None] & stored)
            tap = (r0 + ri * TH) * S + s0 + si * TW
            w_at = ck[:, None] * (R * S * C) + (tap * C + cols)[None, :]
            if EVEN:
                w = tl.load(w_ptr + w_at, mask=inside[None, :], other=0.0)
            else:
                w = tl.load(w_ptr + w_at, mask=inside[None, :] & within[:, None], other=0.0)
            acc = tl.dot(dy, w, acc, input_precision=PRECISION, out_dtype=ACC)
            si += 1
            ri += tl.where(si == ns, 1, 0)
            si = tl.where(si == ns, 0, si)
            k += tl.where(ri == nr, BK, 0)
            ri = tl.where(ri == nr, 0, ri)

        start = (tl.cast(n0, tl.int64) * H + ph0 * SH + ih0) * W + pw0 * SW + iw0
        rows = ((n - n0) * H + (ph - ph0) * SH) * W + (pw - pw0) * SW
        base = start * C
        at = rows[:, None] * C + cols[None, :]
        mask = valid & inside[None, :]
        if GRAD_A:
            acc += tl.load(grad_a_ptr + base + at, mask=mask, other=0.0).to(ACC)
        if NORM:
            x_mean = tl.load(x_mean_ptr + cols, mask=inside, other=0.0)[None, :]
            x = tl.load(x_ptr + base + at, mask=mask, other=0.0).to(ACC)
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
                # rounded as forward rounds, where a small value may become zero
                acc = masked(acc, u.to(x_ptr.dtype.element_ty).to(ACC))
        g_in = acc.to(g_in_ptr.dtype.element_ty)
        tl.store(g_in_ptr + base + at, g_in, mask=mask)
        if NORM:
            g = tl.where(valid, g_in.to(ACC), 0.0)
            row = part_ptr + chunk * (3 if RESIDUAL == 2 else 2) * C + cols
            add_sums(row, inside, tl.sum(g, 0), i == 0)
            add_sums(row + C, inside, tl.sum(g * (x - x_mean), 0), i == 0)
            if RESIDUAL == 2:
                add_sums(row + 2 * C, inside, tl.sum(g * (r - res_mean), 0), i == 0)
