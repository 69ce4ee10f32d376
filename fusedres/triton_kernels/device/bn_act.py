"""BatchNorm apply, residual add and ReLU, in one pass each way.

    a = act((y - mean)*scale + bias [+ residual | + (residual - res_mean)*res_scale + res_bias])
    g = 0 where a <= 0, else grad [+ grad_extra], rounded
    sums = (sum g, sum g*(y - mean)),  res_sums = (sum g, sum g*(res_y - res_mean))

Forward: a program takes one tile of BM rows and BC channels; tiles of one row band are adjacent.
Reads y [and residual], writes a: 4 or 6 bytes per bf16 element. Nothing is saved beyond what the
caller already holds. Backward: the grid is (tiles of C, chunks of M); a chunk is `tiles` tiles of
BM rows, summed over the rounded g in registers, a sum for each place of the tile, and folded into
one partial row at the end; reduction.py's second stage adds the rows. Reads grad [grad_extra] [a]
y [res_y], writes g (not where it is grad itself): 8 bytes per bf16 element with ReLU, 10 with
res_y. An activation that follows from y alone is computed again, not read: 6 bytes; and where g is
not wanted, for who reads grad next masks it himself, only the sums are taken: 4 bytes.
"""

import triton
import triton.language as tl

from fusedres.triton_kernels.device.activation import masked, normalized, relu, rounded


@triton.jit(do_not_specialize=["M"])
def bn_act_fwd_kernel(
    y_ptr,  # [M, C]
    mean_ptr,  # [C] ACC, as are the next two
    scale_ptr,
    bias_ptr,
    residual_ptr,  # [M, C]
    res_mean_ptr,  # [C] ACC, as are the next two
    res_scale_ptr,
    res_bias_ptr,
    a_ptr,  # [M, C]
    M,
    C,
    RESIDUAL: tl.constexpr,  # 0 none, 1 a tensor, 2 normalised too
    RELU: tl.constexpr,
    ACC: tl.constexpr,
    EVEN: tl.constexpr,  # BC divides C
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    across = tl.cdiv(C, BC)
    cols = tl.program_id(0) % across * BC + tl.arange(0, BC)
    row0 = (tl.program_id(0) // across).to(tl.int64) * BM
    local = tl.arange(0, BM)
    inside = cols < C
    mask = (local < M - row0)[:, None]
    if not EVEN:
        mask = mask & inside[None, :]
    base = row0 * C
    at = local[:, None] * C + cols[None, :]
    u = normalized(
        tl.load(y_ptr + base + at, mask=mask, other=0.0).to(ACC),
        tl.load(mean_ptr + cols, mask=inside, other=0.0)[None, :],
        tl.load(scale_ptr + cols, mask=inside, other=0.0)[None, :],
        tl.load(bias_ptr + cols, mask=inside, other=0.0)[None, :],
    )
    if RESIDUAL > 0:
        r = tl.load(residual_ptr + base + at, mask=mask, other=0.0).to(ACC)
        if RESIDUAL == 2:
            r = normalized(
                r,
                tl.load(res_mean_ptr + cols, mask=inside, other=0.0)[None, :],
                tl.load(res_scale_ptr + cols, mask=inside, other=0.0)[None, :],
                tl.load(res_bias_ptr + cols, mask=inside, other=0.0)[None, :],
            )
        u += r
    if RELU:
        u = relu(u)
    tl.store(a_ptr + base + at, u.to(a_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "tiles"])
def bn_act_bwd_kernel(
    grad_ptr,  # [M, C], as are the next two
    extra_ptr,
    a_ptr,
    y_ptr,  # [M, C]
    mean_ptr,  # [C] ACC, as are the next two
    scale_ptr,
    bias_ptr,
    res_y_ptr,  # [M, C]
    res_mean_ptr,  # [C] ACC
    g_ptr,  # [M, C], may be grad itself
    part_ptr,  # [chunks, 2 or 3, C] ACC
    M,
    C,
    tiles,
    EXTRA: tl.constexpr,
    MASK: tl.constexpr,  # 0 no ReLU, 1 a decides, 2 y does
    WRITE: tl.constexpr,  # g
    RESIDUAL: tl.constexpr,  # a third sum, of g*(res_y - res_mean)
    ACC: tl.constexpr,
    EVEN: tl.constexpr,  # BC divides C
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    SUMS: tl.constexpr = 3 if RESIDUAL else 2
    chunk = tl.program_id(1)
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = cols < C
    local = tl.arange(0, BM)
    at = local[:, None] * C + cols[None, :]
    mean = tl.load(mean_ptr + cols, mask=inside, other=0.0)[None, :]
    if MASK == 2:
        scale = tl.load(scale_ptr + cols, mask=inside, other=0.0)[None, :]
        bias = tl.load(bias_ptr + cols, mask=inside, other=0.0)[None, :]
    if RESIDUAL:
        res_mean = tl.load(res_mean_ptr + cols, mask=inside, other=0.0)[None, :]
    s0 = tl.zeros((BM, BC), ACC)
    s1 = tl.zeros((BM, BC), ACC)
    s2 = tl.zeros((BM, BC), ACC)
    first = chunk * tiles
    for tile in range(first, tl.minimum(first + tiles, tl.cdiv(M, BM))):
        row0 = tl.cast(tile, tl.int64) * BM
        mask = (local < M - row0)[:, None]
        if not EVEN:
            mask = mask & inside[None, :]
        base = row0 * C
        g = tl.load(grad_ptr + base + at, mask=mask, other=0.0).to(ACC)
        stored = tl.load(y_ptr + base + at, mask=mask, other=0.0)
        y = stored.to(ACC)
        if EXTRA:
            g += tl.load(extra_ptr + base + at, mask=mask, other=0.0).to(ACC)
        if MASK == 1:
            g = masked(g, tl.load(a_ptr + base + at, mask=mask, other=0.0).to(ACC))
        if MASK == 2:
            g = masked(g, rounded(normalized(y, mean, scale, bias), stored))
        if EXTRA:
            g = rounded(g, stored)
        if WRITE:
            tl.store(g_ptr + base + at, g.to(g_ptr.dtype.element_ty), mask=mask)
        s0 += g
        s1 += g * (y - mean)  # rows past M: g is 0, y and the mean of a finite column are finite
        if RESIDUAL:
            r = tl.load(res_y_ptr + base + at, mask=mask, other=0.0).to(ACC)
            s2 += g * (r - res_mean)
    part = part_ptr + chunk * SUMS * C + cols
    tl.store(part, tl.sum(s0, 0), mask=inside)
    tl.store(part + C, tl.sum(s1, 0), mask=inside)
    if RESIDUAL:
        tl.store(part + 2 * C, tl.sum(s2, 0), mask=inside)
