"""The one second stage of conv_bn's backward: S of the input, dw, dweight and dbias.

Programs [0, tiles of C) add dgrad's partial rows [R, 2 or 3, C] to the sums of the input and of a
normalised residual; the next ones add wgrad's splits to dw, in the parameter's dtype and strides;
the last take dweight = S1*rstd and dbias = S0 of the node's own BatchNorm from its upstream sums.
All in a fixed order. Reads R*3*C + splits*K*R*S*C of ACC, writes K*R*S*C.
"""

import triton
import triton.language as tl


@triton.jit
def _total(part_ptr, rows, stride, cols, inside, BR: tl.constexpr, BN: tl.constexpr, ACC):
    """Sum over rows of part [rows, cols], BR of them side by side."""
    acc = tl.zeros((BR, BN), ACC)
    for r in range(0, rows, BR):
        rr = r + tl.arange(0, BR)
        at = rr[:, None] * stride + cols[None, :]
        acc += tl.load(part_ptr + at, mask=(rr < rows)[:, None] & inside[None, :], other=0.0)
    return tl.sum(acc, 0)


@triton.jit(do_not_specialize=["rows", "splits", "sums_programs", "dw_programs"])
def conv_bn_finish_kernel(
    part_ptr,  # [rows, 2 or 3, C] ACC
    in_sums_ptr,  # [2, C] ACC
    res_sums_ptr,  # [2, C] ACC
    dw_part_ptr,  # [splits, K, R, S, C] ACC
    dw_ptr,  # [K, C, R, S] by strides
    sums_ptr,  # [2, K] ACC
    rstd_ptr,  # [K] ACC
    dweight_ptr,  # [K]
    dbias_ptr,  # [K]
    rows,
    splits,
    C,
    K,
    taps,  # R*S
    S,
    dw_stride_k,
    dw_stride_c,
    dw_stride_r,
    dw_stride_s,
    sums_programs,
    dw_programs,
    SUMS: tl.constexpr,
    RESIDUAL: tl.constexpr,  # 2: with sums of the residual
    DW: tl.constexpr,
    DWEIGHT: tl.constexpr,
    DBIAS: tl.constexpr,
    ACC: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BW: tl.constexpr,
):
    pid = tl.program_id(0)
    if SUMS:
        if pid < sums_programs:
            cols = pid * BC + tl.arange(0, BC)
            inside = cols < C
            kinds: tl.constexpr = 3 if RESIDUAL == 2 else 2
            total = _total(part_ptr, rows, kinds * C, cols, inside, BR, BC, ACC)
            tl.store(in_sums_ptr + cols, total, mask=inside)
            if RESIDUAL == 2:
                tl.store(res_sums_ptr + cols, total, mask=inside)
                total = _total(part_ptr + 2 * C, rows, kinds * C, cols, inside, BR, BC, ACC)
                tl.store(res_sums_ptr + C + cols, total, mask=inside)
            total = _total(part_ptr + C, rows, kinds * C, cols, inside, BR, BC, ACC)
            tl.store(in_sums_ptr + C + cols, total, mask=inside)
    pid -= sums_programs
    if DW:
        if (pid >= 0) & (pid < dw_programs):
            at = pid * BW + tl.arange(0, BW)
            size = K * taps * C
            in_dw = at < size
            dw = tl.zeros((BW,), ACC)
            for s in range(0, splits):
                split = dw_part_ptr + tl.cast(s, tl.int64) * size
                dw += tl.load(split + at, mask=in_dw, other=0.0)
            tap = at // C % taps
            place = at // (C * taps) * dw_stride_k + at % C * dw_stride_c
            place += tap // S * dw_stride_r + tap % S * dw_stride_s
            tl.store(dw_ptr + place, dw.to(dw_ptr.dtype.element_ty), mask=in_dw)
    pid -= dw_programs
    if DWEIGHT or DBIAS:
        if pid >= 0:
            ck = pid * BW + tl.arange(0, BW)
            in_k = ck < K
            if DWEIGHT:
                s1 = tl.load(sums_ptr + K + ck, mask=in_k, other=0.0)
                dweight = s1 * tl.load(rstd_ptr + ck, mask=in_k, other=0.0)
                tl.store(dweight_ptr + ck, dweight.to(dweight_ptr.dtype.element_ty), mask=in_k)
            if DBIAS:
                s0 = tl.load(sums_ptr + ck, mask=in_k, other=0.0)
                tl.store(dbias_ptr + ck, s0.to(dbias_ptr.dtype.element_ty), mask=in_k)
