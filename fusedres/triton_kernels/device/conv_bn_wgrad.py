"""conv_bn backward with respect to the weight, for 1x1 convolutions.

    dw^T = act(x)^T @ dy                  [C, K], summed over M

The activation is computed again on the way in, or x is one already (emitted, or a plain tensor); dy
is plain, as dgrad wrote it. The transpose keeps the transformed side on the left, where Hopper's
tensor cores take it from registers, and dy on the right goes to shared memory untouched. The grid
is (tiles of K, tiles of C, splits of M); a split takes every splits-th tile of BM rows, so that all
programs go over M together, and writes a partial dw in ACC; conv_bn_finish adds them up in order.
Rows past M are zeros on both sides.

Bytes, elements a row: reads C of x (and of a residual) once a tile of K, K of dy once a tile of C;
writes splits * K * C of ACC.
"""

import triton
import triton.language as tl

from fusedres.triton_kernels.device.activation import normalized, relu
from fusedres.triton_kernels.device.conv_bn_rows import input_row


@triton.jit(do_not_specialize=["M", "H", "W", "OH", "OW"])
def conv_bn_wgrad_kernel(
    x_ptr,  # [N*H*W, C]
    mean_ptr,  # [C] ACC, as are the next two
    scale_ptr,
    bias_ptr,
    residual_ptr,  # [N*H*W, C]
    res_mean_ptr,  # [C] ACC, as are the next two
    res_scale_ptr,
    res_bias_ptr,
    dy_ptr,  # [M, K]
    part_ptr,  # [splits, K, C] ACC
    M,
    C,
    K,
    H,
    W,
    OH,
    OW,
    SH: tl.constexpr,
    SW: tl.constexpr,
    NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,  # of C
    BK: tl.constexpr,  # of K
):
    ck = tl.program_id(0) * BK + tl.arange(0, BK)
    cc = tl.program_id(1) * BN + tl.arange(0, BN)
    split = tl.program_id(2)
    in_k = ck < K
    in_c = cc < C
    if NORM:
        mean = tl.load(mean_ptr + cc, mask=in_c, other=0.0)[:, None]
        scale = tl.load(scale_ptr + cc, mask=in_c, other=0.0)[:, None]
        bias = tl.load(bias_ptr + cc, mask=in_c, other=0.0)[:, None]
        if RESIDUAL == 2:
            res_mean = tl.load(res_mean_ptr + cc, mask=in_c, other=0.0)[:, None]
            res_scale = tl.load(res_scale_ptr + cc, mask=in_c, other=0.0)[:, None]
            res_bias = tl.load(res_bias_ptr + cc, mask=in_c, other=0.0)[:, None]
    acc = tl.zeros((BN, BK), ACC)
    tiles = tl.cdiv(M, BM)
    for i in range(split, tiles, tl.num_programs(2)):
        row0 = (tiles - 1 - i) * BM  # downwards: dgrad, which wrote dy, ended there
        local = tl.arange(0, BM)
        valid = local < M - row0
        start = input_row(row0, H, W, OH, OW, SH, SW)
        rows = local
        if SH > 1 or SW > 1:
            rows = input_row(row0 + local, H, W, OH, OW, SH, SW) - start
        base = tl.cast(start, tl.int64) * C
        at = rows[None, :] * C + cc[:, None]
        mask = valid[None, :] & in_c[:, None]
        a = tl.load(x_ptr + base + at, mask=mask, other=0.0)
        if NORM:
            u = normalized(a.to(ACC), mean, scale, bias)
            if RESIDUAL > 0:
                r = tl.load(residual_ptr + base + at, mask=mask, other=0.0).to(ACC)
                if RESIDUAL == 2:
                    r = normalized(r, res_mean, res_scale, res_bias)
                u += r
            u *= valid.to(ACC)[None, :]  # rows past M: what is finite here may not be once rounded
            if RELU:
                u = relu(u)
            a = u.to(x_ptr.dtype.element_ty)
        dy = tl.load(
            dy_ptr + tl.cast(row0, tl.int64) * K + local[:, None] * K + ck[None, :],
            mask=valid[:, None] & in_k[None, :],
            other=0.0,
        )
        acc = tl.dot(a, dy, acc, input_precision=PRECISION, out_dtype=ACC)
    out = part_ptr + split.to(tl.int64) * K * C
    tl.store(out + ck[None, :] * C + cc[:, None], acc, mask=in_k[None, :] & in_c[:, None])
