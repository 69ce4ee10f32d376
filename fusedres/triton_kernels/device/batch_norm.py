"""BatchNorm's statistics, what follows from them per channel, and the gradient of its input.

Statistics, in two launches. First: the grid is (tiles of C, chunks of M); a chunk is `tiles` tiles
of BM rows. Each place of the tile keeps a mean and squared deviations (M2) of its own through the
chunk, a row merged at a time by Chan's formula, without a word between threads; at the end the
places merge into one partial row. Reads y once, 2 bytes per bf16 element. Second: each program
merges all partial rows of BC channels and writes mean, biased var, rstd = 1/sqrt(var + eps),
scale = weight*rstd and bias, and moves the running statistics. Frozen statistics are copied by the
second launch alone. Values are taken as differences from the chunk's first row, and means of chunks
as differences from one of them, so that a large mean costs no digits of the variance.

Backward: dy = scale*g + c0 + c1*(y - mean), c0 = -scale*S0/M, c1 = -scale*rstd^2*S1/M, both absent
where statistics are frozen. A program takes one tile of BM rows and BC channels; those of the first
rows also write dweight = S1*rstd and dbias = S0. Reads g and y, writes dy: 6 bytes per bf16
element, 4 where frozen. Where g comes unmasked, y says what ReLU let through. Saved for backward:
y, mean, rstd, scale.
"""

import triton
import triton.language as tl

from fusedres.triton_kernels.device.activation import masked, normalized, rounded
from fusedres.triton_kernels.device.reduction import merge_rows


@triton.jit(do_not_specialize=["M", "tiles"])
def batch_norm_stats_kernel(
    y_ptr,  # [M, C]
    part_ptr,  # [chunks, 2, C] ACC: mean, M2
    M,
    C,
    tiles,
    ACC: tl.constexpr,
    EVEN: tl.constexpr,  # BC divides C
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    chunk = tl.program_id(1)
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = cols < C
    local = tl.arange(0, BM)
    at = local[:, None] * C + cols[None, :]
    mean = tl.zeros((BM, BC), ACC)
    m2 = tl.zeros((BM, BC), ACC)
    first = chunk * tiles
    start = first.to(tl.int64) * BM
    pivot = tl.load(y_ptr + start * C + cols, mask=inside, other=0.0).to(ACC)
    for tile in range(first, tl.minimum(first + tiles, tl.cdiv(M, BM))):
        row0 = tl.cast(tile, tl.int64) * BM
        valid = (local < M - row0)[:, None]
        mask = valid
        if not EVEN:
            mask = mask & inside[None, :]
        y = tl.load(y_ptr + row0 * C + at, mask=mask, other=0.0).to(ACC) - pivot[None, :]
        off = tl.where(valid, y - mean, 0.0)
        mean += off * (1.0 / tl.cast(tile - first + 1, ACC))
        m2 += off * (y - mean)
    rows = tl.minimum(M - start, tiles * BM).to(tl.int32)
    count = ((rows - local + (BM - 1)) // BM).to(ACC)  # of rows that each place has seen
    mean, m2 = merge_rows(mean, m2, count, rows.to(ACC), tl.zeros((BC,), ACC))
    tl.store(part_ptr + chunk * 2 * C + cols, pivot + mean, mask=inside)
    tl.store(part_ptr + chunk * 2 * C + C + cols, m2, mask=inside)


@triton.jit
def moved(running, new, momentum):
    """torch.lerp(running, new, momentum), by its two formulas."""
    step = new - running
    near = running + momentum * step
    return tl.where(tl.abs(momentum) < 0.5, near, new - step * (1.0 - momentum))


@triton.jit(do_not_specialize=["R", "rows_per_part", "M"])
def batch_norm_finish_kernel(
    part_ptr,  # [R, 2, C] ACC: mean and M2 of rows [r*rows_per_part, (r + 1)*rows_per_part)
    weight_ptr,  # [C] of any dtype or None, as are the next three
    bn_bias_ptr,
    running_mean_ptr,
    running_var_ptr,
    momentum_ptr,  # one element of any dtype; None: the next two
    momentum_hi,
    momentum_lo,
    eps_hi,  # two floats, as an argument keeps no more than 24 bits
    eps_lo,
    mean_ptr,  # [C] ACC, as are the next four
    var_ptr,
    rstd_ptr,
    scale_ptr,
    bias_ptr,
    R,
    rows_per_part,
    M,
    C,
    TRAINING: tl.constexpr,
    MOVE: tl.constexpr,  # the running statistics
    ACC: tl.constexpr,
    WIDE: tl.constexpr,  # where they are moved: fp64 if anything concerned is
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = cols < C
    if TRAINING:
        mean = tl.zeros((BC,), ACC)
        m2 = tl.zeros((BC,), ACC)
        local = tl.arange(0, BR)
        for r0 in range(0, R, BR):
            before = tl.cast(r0, tl.int64) * rows_per_part
            left = M - before
            count = tl.minimum(left - local.to(tl.int64) * rows_per_part, rows_per_part)
            count = tl.maximum(count, 0).to(ACC)
            mask = (local < R - r0)[:, None] & inside[None, :]
            at = part_ptr + (r0 + local)[:, None] * (2 * C) + cols[None, :]
            row_means = tl.load(at, mask=mask, other=0.0)
            row_m2 = tl.load(at + C, mask=mask, other=0.0)
            pivot = tl.load(part_ptr + r0 * (2 * C) + cols, mask=inside, other=0.0)
            rows = tl.minimum(left, rows_per_part * BR).to(ACC)
            tile_mean, tile_m2 = merge_rows(row_means, row_m2, count, rows, pivot)
            delta = tile_mean - mean
            share = rows / (before.to(ACC) + rows)
            mean = tl.where(r0 == 0, tile_mean, mean + delta * share)
            m2 += tile_m2 + delta * delta * (before.to(ACC) * share)
        total = tl.cast(M, ACC)
        var = m2 / tl.maximum(total, 1.0)
        if MOVE:
            if momentum_ptr is not None:
                momentum = tl.load(momentum_ptr).to(WIDE)
            else:
                momentum = tl.cast(momentum_hi, WIDE) + tl.cast(momentum_lo, WIDE)
            unbiased = var.to(WIDE) * (total / tl.maximum(total - 1.0, 1.0)).to(WIDE)
            new = moved(
                tl.load(running_mean_ptr + cols, mask=inside, other=0.0).to(WIDE),
                mean.to(WIDE),
                momentum,
            )
            tl.store(
                running_mean_ptr + cols,
                new.to(running_mean_ptr.dtype.element_ty),
                mask=inside,
            )
            new = moved(
                tl.load(running_var_ptr + cols, mask=inside, other=0.0).to(WIDE),
                unbiased,
                momentum,
            )
            tl.store(
                running_var_ptr + cols,
                new.to(running_var_ptr.dtype.element_ty),
                mask=inside,
            )
    else:
        mean = tl.load(running_mean_ptr + cols, mask=inside, other=0.0).to(ACC)
        var = tl.load(running_var_ptr + cols, mask=inside, other=0.0).to(ACC)
    rstd = tl.rsqrt(var + (tl.cast(eps_hi, ACC) + tl.cast(eps_lo, ACC)))
    scale = rstd
    if weight_ptr is not None:
        scale = rstd * tl.load(weight_ptr + cols, mask=inside, other=0.0).to(ACC)
    bias = tl.zeros((BC,), ACC)
    if bn_bias_ptr is not None:
        bias = tl.load(bn_bias_ptr + cols, mask=inside, other=0.0).to(ACC)
    tl.store(mean_ptr + cols, mean, mask=inside)
    tl.store(var_ptr + cols, var, mask=inside)
    tl.store(rstd_ptr + cols, rstd, mask=inside)
    tl.store(scale_ptr + cols, scale, mask=inside)
    tl.store(bias_ptr + cols, bias, mask=inside)


@triton.jit(do_not_specialize=["M"])
def batch_norm_bwd_kernel(
    g_ptr,  # [M, C], as is the next
    y_ptr,
    mean_ptr,  # [C] ACC, as are the next two
    scale_ptr,
    rstd_ptr,
    bias_ptr,  # [C] ACC, for MASK
    sums_ptr,  # [2, C] ACC
    dy_ptr,  # [M, C], may be g or y itself
    dweight_ptr,  # [C] of any dtype or None, as is the next
    dbias_ptr,
    M,
    C,
    TRAINING: tl.constexpr,
    MASK: tl.constexpr,  # g is still to be masked, by y
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
    scale = tl.load(scale_ptr + cols, mask=inside, other=0.0)
    g = tl.load(g_ptr + base + at, mask=mask, other=0.0).to(ACC)
    if TRAINING or MASK:
        stored = tl.load(y_ptr + base + at, mask=mask, other=0.0)
        y = stored.to(ACC)
        mean = tl.load(mean_ptr + cols, mask=inside, other=0.0)
    if MASK:
        bias = tl.load(bias_ptr + cols, mask=inside, other=0.0)
        u = normalized(y, mean[None, :], scale[None, :], bias[None, :])
        g = masked(g, rounded(u, stored))
    dy = g * scale[None, :]
    if TRAINING:
        rstd = tl.load(rstd_ptr + cols, mask=inside, other=0.0)
        part = -scale / tl.cast(M, ACC)
        c0 = part * tl.load(sums_ptr + cols, mask=inside, other=0.0)
        c1 = part * rstd * rstd * tl.load(sums_ptr + C + cols, mask=inside, other=0.0)
        dy += c0[None, :] + c1[None, :] * (y - mean[None, :])
    tl.store(dy_ptr + base + at, dy.to(dy_ptr.dtype.element_ty), mask=mask)
    if row0 == 0:
        if dweight_ptr is not None:
            rstd = tl.load(rstd_ptr + cols, mask=inside, other=0.0)
            dweight = tl.load(sums_ptr + C + cols, mask=inside, other=0.0) * rstd
            tl.store(dweight_ptr + cols, dweight.to(dweight_ptr.dtype.element_ty), mask=inside)
        if dbias_ptr is not None:
            dbias = tl.load(sums_ptr + cols, mask=inside, other=0.0)
            tl.store(dbias_ptr + cols, dbias.to(dbias_ptr.dtype.element_ty), mask=inside)
