"""conv_bn backward with respect to the input and to the weight in one pass, for 1x1 convolutions of
stride 1 whose dw^T of a tile of C by all of K fits into the registers of a program.

    g    = g, or where it arrives unmasked 0 where act(y) <= 0, else g
    dy   = scale*g + c0 + c1*(y - mean)          [BM, K], c0 = -scale*S0/M, c1 = -scale*rstd^2*S1/M
    da^T = w^T @ dy^T [+ grad_a^T]               [BN, BM] from [BN, K] and [K, BM]
    g_in = 0 where act(x) <= 0, else da          rounded; the gradient of the residual as well
    sums of g_in, g_in*(x - x_mean) [, g_in*(residual - res_mean)]
    dw^T += act(x)^T @ dy                        [BN, K] from [BN, BM] and [BM, K]

The grid is (tiles of C, splits of M); tiles of C are neighbours, so that all but the first find g
and y in L2. A program walks the `tiles` tiles of BM rows of its split and keeps dw^T and the sums
in registers; at the end it writes one partial row of each, and conv_bn_finish adds them up in
order. The walk is the one loop: its loads are pipelined. dy never reaches memory: it lies in shared
memory as the right-hand side of both products, once as it is and once transposed. C is on the left
of both, so that BM may be as small as the pipeline wants, and act(x)^T is what the epilogue has
just compared with zero. Rows past M repeat the last one and count as zeros.

Bytes, elements a row: reads K of g, K of y, and C of each of x, a, grad_a and a residual that
apply (g and y once a tile of C, from memory once); writes C of g_in; at the end splits * K * C of
ACC. Two kernels read and write 2*K of dy beside that, and read C of x or a once more.
"""

import triton
import triton.language as tl

from fusedres.triton_kernels.device.activation import masked, normalized, relu


@triton.jit
def _normalized_gradient(
    g,  # [BM, K] ACC
    y,  # [BM, K] ACC
    mean,  # [K], as are the next four
    scale,
    bias,
    c0,
    c1,
    TRAINING: tl.constexpr,
    GMASK: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
):
    """dy in ACC."""
    if GMASK:  # rounded as forward rounds
        g = masked(g, normalized(y, mean, scale, bias).to(DTYPE).to(ACC))
    if TRAINING:
        return tl.fma(g, scale, tl.fma(y - mean, c1, c0))
    return g * scale


@triton.jit(do_not_specialize=["M", "tiles"])
def conv_bn_bwd_kernel(
    g_ptr,  # [M, K]
    y_ptr,  # [M, K]
    mean_ptr,  # [K] ACC, as are the next three
    scale_ptr,
    rstd_ptr,
    bias_ptr,
    sums_ptr,  # [2, K] ACC: S
    w_ptr,  # [K, C]
    grad_a_ptr,  # [M, C]
    a_ptr,  # [M, C]
    x_ptr,  # [M, C]
    x_mean_ptr,  # [C] ACC, as are the next two
    x_scale_ptr,
    x_bias_ptr,
    residual_ptr,  # [M, C]
    res_mean_ptr,  # [C] ACC, as are the next two
    res_scale_ptr,
    res_bias_ptr,
    g_in_ptr,  # [M, C]
    part_ptr,  # [splits, 2 or 3, C] ACC
    dw_part_ptr,  # [splits, K, C] ACC
    M,
    C,
    K,
    tiles,  # of BM rows in a split
    TRAINING: tl.constexpr,  # else c0 = c1 = 0, and only GMASK reads y
    GMASK: tl.constexpr,  # g is still to be masked
    GRAD_A: tl.constexpr,
    NORM: tl.constexpr,  # the input is a Deferred: its sums are wanted
    RELU: tl.constexpr,  # of the input
    ACT: tl.constexpr,  # where the activation comes from: 0 it is x, 1 a, 2 computed again
    RESIDUAL: tl.constexpr,  # 0 none, 1 a tensor (read for ACT 2), 2 one that is normalised too
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    EVEN_K: tl.constexpr,  # BK is K
    BM: tl.constexpr,
    BN: tl.constexpr,  # of C
    BK: tl.constexpr,  # at least K
):
    DTYPE: tl.constexpr = g_ptr.dtype.element_ty
    across = tl.cdiv(C, BN)
    split = tl.program_id(0) // across
    cols = tl.program_id(0) % across * BN + tl.arange(0, BN)
    inside = cols < C
    ck = tl.arange(0, BK)
    within = ck < K
    wt = tl.load(
        w_ptr + ck[None, :] * C + cols[:, None], mask=within[None, :] & inside[:, None], other=0.0
    )
    scale = tl.load(scale_ptr + ck, mask=within, other=0.0)[None, :]
    mean = scale
    bias = scale
    c0 = scale
    c1 = scale
    if TRAINING or GMASK:
        mean = tl.load(mean_ptr + ck, mask=within, other=0.0)[None, :]
    if GMASK:
        bias = tl.load(bias_ptr + ck, mask=within, other=0.0)[None, :]
    if TRAINING:
        rstd = tl.load(rstd_ptr + ck, mask=within, other=0.0)[None, :]
        per_row = -scale / M
        c0 = per_row * tl.load(sums_ptr + ck, mask=within, other=0.0)[None, :]
        c1 = per_row * rstd * rstd * tl.load(sums_ptr + K + ck, mask=within, other=0.0)[None, :]
    if NORM:
        x_mean = tl.load(x_mean_ptr + cols, mask=inside, other=0.0)[:, None]
        if ACT == 2:
            x_scale = tl.load(x_scale_ptr + cols, mask=inside, other=0.0)[:, None]
            x_bias = tl.load(x_bias_ptr + cols, mask=inside, other=0.0)[:, None]
        if RESIDUAL == 2:
            res_mean = tl.load(res_mean_ptr + cols, mask=inside, other=0.0)[:, None]
            if ACT == 2:
                res_scale = tl.load(res_scale_ptr + cols, mask=inside, other=0.0)[:, None]
                res_bias = tl.load(res_bias_ptr + cols, mask=inside, other=0.0)[:, None]
    dw = tl.zeros((BN, BK), ACC)
    s0 = tl.zeros((BN,), ACC)
    s1 = tl.zeros((BN,), ACC)
    s2 = tl.zeros((BN,), ACC)
    first = split * tiles
    for i in tl.range(0, tl.minimum(tiles, tl.cdiv(M, BM) - first)):
        row0 = (first + i) * BM
        valid = tl.arange(0, BM) < M - row0
        local = tl.minimum(tl.arange(0, BM), M - row0 - 1)
        base = tl.cast(row0, tl.int64) * C
        at = local[None, :] * C + cols[:, None]
        mask = valid[None, :] & inside[:, None]
        # what no product waits for comes first: Triton pipelines operands of products only
        if GRAD_A:
            grad_a = tl.load(grad_a_ptr + base + at, mask=mask, other=0.0)
        if NORM or ACT == 0:
            x = tl.load(x_ptr + base + at, mask=mask, other=0.0)
            a = x
        if RESIDUAL == 2 or (RESIDUAL == 1 and ACT == 2):
            r = tl.load(residual_ptr + base + at, mask=mask, other=0.0).to(ACC)
        if ACT == 1:
            a = tl.load(a_ptr + base + at, mask=mask, other=0.0)
        if ACT == 2:
            u = normalized(x.to(ACC), x_mean, x_scale, x_bias)
            if RESIDUAL == 1:
                u += r
            if RESIDUAL == 2:
                u += normalized(r, res_mean, res_scale, res_bias)
            if RELU:
                u = relu(u)
            a = tl.where(valid[None, :], u, 0.0).to(DTYPE)

        k_base = tl.cast(row0, tl.int64) * K
        k_at = local[:, None] * K + ck[None, :]
        if EVEN_K:
            g = tl.load(g_ptr + k_base + k_at).to(ACC)
        else:
            g = tl.load(g_ptr + k_base + k_at, mask=within[None, :], other=0.0).to(ACC)
        y = g
        if TRAINING or GMASK:
            if EVEN_K:
                y = tl.load(y_ptr + k_base + k_at).to(ACC)
            else:
                y = tl.load(y_ptr + k_base + k_at, mask=within[None, :], other=0.0).to(ACC)
        dy = _normalized_gradient(g, y, mean, scale, bias, c0, c1, TRAINING, GMASK, DTYPE, ACC)
        dy = tl.where(valid[:, None], dy, 0.0).to(DTYPE)
        da = tl.dot(wt, tl.trans(dy), input_precision=PRECISION, out_dtype=ACC)
        dw = tl.dot(a, dy, dw, input_precision=PRECISION, out_dtype=ACC)

        if GRAD_A:
            da += grad_a.to(ACC)
        if RELU:
            da = masked(da, a.to(ACC))
        g_in = da.to(DTYPE)
        tl.store(g_in_ptr + base + at, g_in, mask=mask)
        if NORM:
            counted = tl.where(valid[None, :], g_in.to(ACC), 0.0)
            s0 += tl.sum(counted, 1)
            s1 += tl.sum(counted * (x.to(ACC) - x_mean), 1)
            if RESIDUAL == 2:
                s2 += tl.sum(counted * (r - res_mean), 1)
    if NORM:
        row = part_ptr + split * (3 if RESIDUAL == 2 else 2) * C + cols
        tl.store(row, s0, mask=inside)
        tl.store(row + C, s1, mask=inside)
        if RESIDUAL == 2:
            tl.store(row + 2 * C, s2, mask=inside)
    out = dw_part_ptr + tl.cast(split, tl.int64) * K * C + ck[None, :] * C + cols[:, None]
    tl.store(out, dw, mask=within[None, :] & inside[:, None])
