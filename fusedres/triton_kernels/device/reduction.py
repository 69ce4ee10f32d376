"""Per-channel reductions in two stages, both in a fixed order.

First stage: a program covers a chunk of `tiles` tiles of rows and writes a row of partial results.
A GEMM keeps that row in memory between tiles: in registers, beside its accumulators, it spills.
Second stage: a few programs merge at most some 1,024 such rows.
"""

import triton
import triton.language as tl


@triton.jit
def tile_moments(y, valid, count):
    """Mean and sum of squared deviations of the valid rows of y [BM, BN], `count` of them."""
    y = tl.where(valid, y, 0.0)
    mean = tl.sum(y, 0) / count
    off = tl.where(valid, y - mean[None, :], 0.0)
    return mean, tl.sum(off * off, 0)


@triton.jit
def merge_moments(part_ptr, stride, inside, mean, m2, count, before, ACC: tl.constexpr):
    """Merges a tile's moments into the partial row at part_ptr [BN], m2 `stride` further on.

    `before` is the number of rows merged so far; Chan's formula.
    """
    if before > 0:
        tl.debug_barrier()  # what other threads of this program stored
        old_mean = tl.load(part_ptr, mask=inside, other=0.0)
        old_m2 = tl.load(part_ptr + stride, mask=inside, other=0.0)
        delta = mean - old_mean
        total = (before + count).to(ACC)
        weight = count.to(ACC) / total
        mean = old_mean + delta * weight
        m2 = old_m2 + m2 + delta * delta * ((total - count.to(ACC)) * weight)
        tl.debug_barrier()
    tl.store(part_ptr, mean, mask=inside)
    tl.store(part_ptr + stride, m2, mask=inside)


@triton.jit
def add_sums(part_ptr, inside, value, first):
    """Adds value [BN] to the partial row at part_ptr, or starts it."""
    if not first:
        tl.debug_barrier()
        value += tl.load(part_ptr, mask=inside, other=0.0)
        tl.debug_barrier()
    tl.store(part_ptr, value, mask=inside)


@triton.jit
def merge_rows(mean, m2, count, total, pivot):
    """Moments of the union of samples (count [B], mean and m2 [B, BN]) with `total` members in all.

    Means are taken as differences from pivot [BN], which lies among them; one whose count is 0 may
    hold anything finite.
    """
    count = count[:, None]
    off = tl.where(count > 0, mean - pivot[None, :], 0.0)
    shift = tl.sum(off * count, 0) / total
    off -= shift[None, :]
    return pivot + shift, tl.sum(m2 + off * off * count, 0)


@triton.jit(do_not_specialize=["R"])
def sum_rows_kernel(
    part_ptr,  # [R, SUMS, C] ACC
    sums_ptr,  # [2, C] ACC: sums 0 and 1
    res_sums_ptr,  # [2, C] ACC: sums 0 and 2
    R,
    C,
    SUMS: tl.constexpr,  # 2 or 3
    ACC: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Second stage of sums: a program adds the rows of BC channels of one sum."""
    k = tl.program_id(1)
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = cols < C
    local = tl.arange(0, BR)
    total = tl.zeros((BR, BC), ACC)
    for r0 in range(0, R, BR):
        at = ((r0 + local) * SUMS + k)[:, None] * C + cols[None, :]
        mask = (local < R - r0)[:, None] & inside[None, :]
        total += tl.load(part_ptr + at, mask=mask, other=0.0)
    result = tl.sum(total, 0)
    if k < 2:
        tl.store(sums_ptr + k * C + cols, result, mask=inside)
    if SUMS == 3:
        if k != 1:
            tl.store(res_sums_ptr + k // 2 * C + cols, result, mask=inside)
