"""conv_act: a convolution of any kernel size, stride, padding and dilation as an implicit GEMM,
with what an inference does to its result in the epilogue.

    u[m, k] = sum over r, s, c of x[pixel of m at (r, s), c] * w[k, r, s, c]
    y = act(u*scale + bias [+ residual])              [M, K], M = N*OH*OW, rounded once

The grid is (tiles of K and M, splits); tiles of K are neighbours, so that all but the first find
the activation in L2. One loop runs over the blocks of C and, innermost, the taps: their steps read
nearly the same pixels. Where the window of a row begins is found once; a step moves all rows by
one scalar. Rows past M and columns past K repeat the last one and are masked at the store, so that
without padding, and where BK divides C, no load has a mask.

An image of at most 4 channels comes as a copy with 4 of them and its padding in place, and w with
as many, its rows of taps filled up to SP of them: a row of a window is 4*SP elements in one piece,
which takes the place of C, and there is a tap for each of R. A pixel past the window has zero
weights, but may be no number: its lanes are masked.

Where the tiles are fewer than the multiprocessors, `splits` programs divide the steps of a tile,
each leaves its sums, and a second kernel adds them, first to last, before the same epilogue.

Bytes, elements a row: reads C of x R*S times a tile of K, from memory once where the rows of a
window stay in L2, and w; K of the residual; writes K of y. A split moves 8 bytes an element of y
more. The image's copy: reads C, 1 byte each of a camera's, and writes 4 elements a pixel.
"""

import triton
import triton.language as tl

from fusedres.triton_kernels.device.activation import relu
from fusedres.triton_kernels.device.conv_bn_rows import reciprocal, walked, window, within


@triton.jit
def taps_within(
    top,  # [BM]: where the first tap of a window lies
    left,
    H,
    W,
    R: tl.constexpr,
    S: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
):
    """Which taps lie on the map, a bit for each: what a step asks takes one register a row."""
    across = tl.zeros_like(left)
    for s in tl.static_range(S):
        across |= tl.where((left + s * DW).to(tl.uint32) < W.to(tl.uint32), 1 << s, 0)
    seen = tl.zeros_like(left)
    for r in tl.static_range(R):
        seen |= tl.where((top + r * DH).to(tl.uint32) < H.to(tl.uint32), across << r * S, 0)
    return seen


@triton.jit
def finish(
    u,  # [BM, BN]
    given,  # pointers to scale and bias [K] in u's dtype, residual and y [rows, K]; None but of y:
    # ones, zeros, zeros
    row0,  # of the tile, in 64 bits
    local,  # [BM], rows after it
    valid,  # [BM]
    cols,  # [BN]
    K,
    RELU: tl.constexpr,
):
    """Stores act(u*scale + bias [+ residual])."""
    scale_ptr, bias_ptr, residual_ptr, y_ptr = given
    inside = cols < K
    at = row0 * K
    tile = local[:, None] * K + cols[None, :]
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + cols, mask=inside, other=0.0)[None, :]
        if bias_ptr is not None:
            u = tl.fma(u, scale, tl.load(bias_ptr + cols, mask=inside, other=0.0)[None, :])
        else:
            u = u * scale
    elif bias_ptr is not None:
        u += tl.load(bias_ptr + cols, mask=inside, other=0.0)[None, :]
    mask = valid[:, None] & inside[None, :]
    if residual_ptr is not None:
        u += tl.load(residual_ptr + at + tile, mask=mask, other=0.0).to(u.dtype)
    if RELU:
        u = relu(u)
    tl.store(y_ptr + at + tile, u.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "H", "W", "OH", "OW", "each", "down"])
def conv_act_kernel(
    x_ptr,  # [N, H, W, C]; an IMAGE [N, H, W, 4]
    w_ptr,  # [K, R, S, C]; of an IMAGE [K, R, C]
    scale_ptr,  # [K] ACC; None: ones
    bias_ptr,  # [K] ACC; None: zeros
    residual_ptr,  # [M, K], or None
    y_ptr,  # [M, K]; of splits their sums [splits, M, K] ACC, without the four arguments above
    M,
    C,  # of an IMAGE 4*SP
    K,
    H,
    W,
    row_stride,  # elements of a row of x
    OH,
    OW,
    each,  # steps of a split
    down,
    R: tl.constexpr,
    S: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PT: tl.constexpr,  # padding at the top
    PL: tl.constexpr,  # and on the left
    DH: tl.constexpr,
    DW: tl.constexpr,
    IMAGE: tl.constexpr,
    PADDED: tl.constexpr,  # windows may leave the map
    RELU: tl.constexpr,
    SPLIT: tl.constexpr,  # more than one
    WIDE: tl.constexpr,  # the images of a tile exceed 32-bit offsets, or a map its divisions
    PRECISION: tl.constexpr,  # of fp32 products: "tf32" or "ieee"
    ACC: tl.constexpr,
    EVEN: tl.constexpr,  # BK divides C; of an IMAGE: SP is S
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,  # of an IMAGE it divides C
):
    across = tl.cdiv(K, BN)
    pid = tl.program_id(0)
    cols = pid % across * BN + tl.arange(0, BN)
    w_rows = tl.minimum(cols, K - 1)
    tile = walked(pid // across, tl.num_programs(0) // across, down)
    row0 = tl.cast(tile, M.dtype) * BM
    count = tl.minimum(M - row0, BM).to(tl.int32)
    local = tl.minimum(tl.arange(0, BM), count - 1)
    columns: tl.constexpr = 1 if IMAGE else S  # of taps
    taps: tl.constexpr = R * columns
    if taps == 1 and SH == 1 and SW == 1 and not PADDED and not IMAGE:
        base = row0.to(tl.int64) * C
        rows = local * C
    else:
        pixel = 4 if IMAGE else C
        line = row0 // OW
        images, top, left = window(
            local, (line % OH).to(tl.int32), (row0 % OW).to(tl.int32), OH, OW,
            reciprocal(OH), reciprocal(OW), SH, SW, PT, PL, WIDE,
        )  # fmt: skip
        base = tl.cast(line // OH, tl.int64) * H * row_stride
        if WIDE:
            images = images.to(tl.int64)
        rows = (images * H + top) * row_stride + left * pixel
    at = rows[:, None] + tl.arange(0, BK)[None, :]
    if PADDED and taps < 32:
        seen = taps_within(top, left, H, W, R, S, DH, DW)
    first = 0
    steps = tl.cdiv(C, BK) * taps
    out = row0.to(tl.int64)
    if SPLIT:
        first = tl.program_id(1) * each
        steps = tl.minimum(steps - first, each)
        out += tl.cast(tl.program_id(1), tl.int64) * M
    acc = tl.zeros((BM, BN), ACC)
    for i in range(0, steps):
        j = first + i
        c0 = j // taps * BK
        tap = j % taps
        ck = c0 + tl.arange(0, BK)
        in_c = ck // 4 < S if IMAGE else ck < C
        r = tap // columns * DH
        s = tap % columns * DW
        start = base + tl.cast(r, tl.int64) * row_stride + s * C + c0
        if PADDED:
            if taps < 32:
                present = (seen >> tap) & 1 != 0
            else:
                present = within(top + r, left + s, H, W)
            mask = present[:, None] if EVEN else present[:, None] & in_c[None, :]
            x = tl.load(x_ptr + start + at, mask=mask, other=0.0, cache_modifier=".ca")
        elif EVEN:
            x = tl.load(x_ptr + start + at)
        else:
            x = tl.load(x_ptr + start + at, mask=in_c[None, :], other=0.0)
        w_at = w_rows[None, :] * (taps * C) + (tap * C + ck)[:, None]
        if EVEN or IMAGE:
            w = tl.load(w_ptr + w_at)
        else:
            w = tl.load(w_ptr + w_at, mask=in_c[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION, out_dtype=ACC)
    valid = tl.arange(0, BM) < count
    given = (scale_ptr, bias_ptr, residual_ptr, y_ptr)
    if BN < 128:
        finish(acc, given, out, local, valid, cols, K, RELU)
    else:  # one half after the other: of both, the residual's registers would spill
        half: tl.constexpr = BN // 2
        u, v = tl.split(tl.permute(tl.reshape(acc, (BM, 2, half)), (0, 2, 1)))
        cols = pid % across * BN + tl.arange(0, half)
        finish(u, given, out, local, valid, cols, K, RELU)
        finish(v, given, out, local, valid, cols + half, K, RELU)


@triton.jit(do_not_specialize=["M", "splits"])
def conv_act_sum_kernel(
    part_ptr,  # [splits, M, K] ACC
    scale_ptr,  # [K] ACC; None: ones
    bias_ptr,  # [K] ACC; None: zeros
    residual_ptr,  # [M, K], or None
    y_ptr,  # [M, K]
    M,
    K,
    splits,
    RELU: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BS: tl.constexpr,  # splits on their way at once
):
    """The second stage: a program adds the splits of BM rows by BN columns, first to last."""
    across = tl.cdiv(K, BN)
    cols = tl.program_id(0) % across * BN + tl.arange(0, BN)
    row0 = tl.cast(tl.program_id(0) // across, tl.int64) * BM
    local = tl.arange(0, BM)
    valid = local < M - row0
    mask = valid[:, None] & (cols < K)[None, :]
    at = local[:, None] * K + cols[None, :]
    acc = tl.zeros((BM, BN), ACC)
    for s0 in range(0, splits, BS):
        for s in tl.static_range(BS):
            row = tl.cast(s0 + s, tl.int64) * M + row0
            there = tl.full((BN,), s0 + s, tl.int32) < splits
            acc += tl.load(part_ptr + row * K + at, mask=mask & there[None, :], other=0.0)
    given = (scale_ptr, bias_ptr, residual_ptr, y_ptr)
    finish(acc, given, row0, local, valid, cols, K, RELU)


@triton.jit(do_not_specialize=["H", "W", "HP", "top", "left"])
def conv_act_image_kernel(
    x_ptr,  # [N, H, W, C]: in out's dtype, or uint8
    scale_ptr,  # [C]; None, as the next: values as they are
    shift_ptr,  # [C]
    out_ptr,  # [N, HP, WP, 4]
    H,
    W,
    HP,
    row_stride,  # 4*WP, a multiple of 16
    top,
    left,
    C: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x*scale + shift in 4 channels with zeros around it, BLOCK elements of a row to a program."""
    line = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    c = i % 4
    h = line % HP - top
    w = i // 4 - left
    inside = within(h + tl.zeros_like(w), w, H, W) & (c < C)
    row = x_ptr + (tl.cast(line // HP, tl.int64) * H + h) * (W * C)
    v = tl.load(row + w * C + c, mask=inside, other=0).to(ACC)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + c, mask=c < C, other=0.0).to(ACC)
        v = tl.fma(v, scale, tl.load(shift_ptr + c, mask=c < C, other=0.0).to(ACC))
    v = tl.where(inside, v, 0.0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + tl.cast(line, tl.int64) * row_stride + i, v, mask=i < row_stride)
